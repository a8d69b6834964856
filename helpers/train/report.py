"""The report of a finished run, as a document for programs and as text for people."""

import math

from helpers.model.losses import EARLY_WEIGHTS

VERDICTS = {True: "yes", False: "no", None: "not checkable"}
# Share of the images showing an object on which a prompt has to reach the threshold to work.
WORKS_FROM = 0.9
_ROUNDING = 1e-6
_COUNTED_BY_BOTH = {name: weight for name, weight in EARLY_WEIGHTS.items() if name != "loss_ce"}


def checklist(run, words=None):
    """Work off the document's items for a finished run.

    Parameters
    ----------
    run : helpers.train.run.RunFiles
        From `helpers.train.run.read_run`, or the result of a training.
    words : mapping of str to float, optional
        Prompt to the share, in [0, 1], of the images that show an object on which its best score
        reaches the score threshold; by default only what the validation split tells.

    Returns
    -------
    list of dict
        ``item``, ``expected`` (what the document says), ``measured`` (text) and ``passed``: True,
        False, or None where the document's number cannot be compared.
    """
    losses, total = epoch_means(run.history, "loss"), run.adapter.loc["total"]
    valid_losses = epoch_means(run.history, "eval_loss")
    moved, share = total["B_nonzero"], float(total["share"])
    modules = f"{total['modules']:.0f} modules, {moved:.0%} moved", bool(moved == 1)
    trainable = f"{share:.2%}", 0.02 <= round(share, 3) <= 0.03
    epochs, wanted = run.metrics["epochs"], run.config.effective_num_epochs
    completed = f"{epochs:g} of {wanted} epochs", epochs >= wanted
    best = run.metrics["valid"].get("max_score_present")
    confidence = "the validation split shows no object", None
    if best is not None:
        confidence = f"best score {best:.3f} on average, validation split", best > 0.3
    late = [epoch for epoch in losses if epoch >= 10]
    items = [
        ("LoRA is applied to modules", "a number of modules", modules),
        ("Trainable parameters", "about 2 to 3 %", trainable),
        ("Loss in epoch 1", "from about 2.0 to below 1.0", _loss(run, [1], 0.0, 1.0)),
        ("Loss in epoch 5", "below 0.5", _loss(run, [5], 0.0, 0.5)),
        ("Loss from epoch 10 on", "0.1 to 0.3", _loss(run, late, 0.1, 0.3)),
        ("Training loss over the epochs", "decreasing", _trend(list(losses.values()))),
        ("Validation loss", "decreasing", _trend(list(valid_losses.values()))),
        ("Training completed all epochs without errors", "all epochs", completed),
        ("Final training loss", "below 0.5", _loss(run, [max(losses)], 0.0, 0.5)),
        ("Inference produces detections with confidence", "above 0.3", confidence),
        ('Text prompts like "crack", "defect" work', "both work", _prompts(run, words)),
    ]
    keys = ("item", "expected", "measured", "passed")
    return [dict(zip(keys, (*names, *judged), strict=True)) for *names, judged in items]


def epoch_means(history, name):
    """Average a logged number over each epoch.

    Parameters
    ----------
    history : list of dict
        ``trainer.state.log_history``.
    name : str
        For example ``"loss"``.

    Returns
    -------
    dict of int to float
        Epoch, counted from 1, to the mean of what was logged in it.
    """
    by_epoch = {}
    for entry in history:
        if name in entry:
            by_epoch.setdefault(math.ceil(entry["epoch"] - _ROUNDING), []).append(entry[name])
    return {epoch: sum(values) / len(values) for epoch, values in by_epoch.items()}


def least_early_loss(history):
    """Bound from below, by epoch from 1, what the document's loss would have shown for a run."""
    # Box and mask terms are the same in both; a classification term cannot be negative.
    weighted = [
        {"epoch": entry["epoch"], "bound": sum(w * entry[n] for n, w in _COUNTED_BY_BOTH.items())}
        for entry in history
        if "loss" in entry and all(name in entry for name in _COUNTED_BY_BOTH)
    ]
    return epoch_means(weighted, "bound")


def _loss(run, epochs, low, high):
    """Compare the mean loss of epochs (``early``), or refute it by its bound, or leave it open."""
    losses, bounds = epoch_means(run.history, "loss"), least_early_loss(run.history)
    if not epochs or not set(epochs) <= set(losses):
        return f"the run has {max(losses)} epochs", None
    loss = sum(losses[epoch] for epoch in epochs) / len(epochs)
    if run.config.loss.variant == "early":
        return f"{loss:.3g}", low <= loss <= high
    if not set(epochs) <= set(bounds):
        return f"{loss:.3g} native", None
    bound = sum(bounds[epoch] for epoch in epochs) / len(epochs)
    measured = f"{loss:.3g} native; at least {bound:.2g} with the document's weights"
    return measured, False if bound > high else None


def _trend(values):
    """Say whether a loss fell from the first to the last epoch."""
    if len(values) < 2:
        return "one epoch has no trend", None
    lowest = f"lowest in epoch {values.index(min(values)) + 1}"
    measured = f"{values[0]:.3g} in epoch 1, {values[-1]:.3g} in epoch {len(values)}, {lowest}"
    return measured, values[-1] < values[0]


def _prompts(run, words):
    """Judge the prompts: measured words, or the trained ones on the validation split."""
    threshold = run.config.evaluation.score_threshold
    if words is not None:
        listed = ", ".join(f"{word} {share:.0%}" for word, share in words.items())
        measured = f"images where the best score reaches {threshold:g}: {listed}"
        return measured, all(share >= WORKS_FROM for share in words.values())
    share = run.metrics["valid"].get("max_score_present_share_above")
    trained = ", ".join(run.prompts["prompts"]) or "no prompt"
    if share is None:
        return f"trained on {trained}; the validation split shows none", None
    measured = f"{trained}: reaches {threshold:g} on {share:.0%}; other words not asked"
    return measured, False if share < WORKS_FROM else None


def report(run):
    """Gather all that is worth knowing about a `RunFiles` as plain values."""
    table = run.adapter.astype(object).where(run.adapter.notna(), None)
    return {
        "run": str(run.folder),
        "base": run.config.model.name,
        "config": run.config.fingerprint(),
        "adapter": table.reset_index().to_dict(orient="records"),
        "prompts": run.prompts,
        "metrics": run.metrics,
        "checklist": checklist(run),
    }
