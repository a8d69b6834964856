"""The report of a finished run, as a document for programs and as text for people."""

from __future__ import annotations

import math

import pandas as pd

from helpers.model.losses import EARLY_WEIGHTS

# The document's expected output and verification checklist: name to item and expectation.
ITEMS = {
    "modules": ("LoRA is applied to modules", "a number of modules"),
    "trainable": ("Trainable parameters", "about 2 to 3 %"),
    "epoch 1": ("Loss in epoch 1", "from about 2.0 to below 1.0"),
    "epoch 5": ("Loss in epoch 5", "below 0.5"),
    "epoch 10": ("Loss from epoch 10 on", "0.1 to 0.3"),
    "loss": ("Training loss over the epochs", "decreasing"),
    "valid loss": ("Validation loss", "decreasing"),
    "completed": ("Training completed all epochs without errors", "all epochs"),
    "final loss": ("Final training loss", "below 0.5"),
    "confidence": ("Inference produces detections with confidence", "above 0.3"),
    "prompts": ('Text prompts like "crack", "defect" work', "both work"),
}
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
        reaches the score threshold. Without it only the trained prompts are known, from the
        validation split.

    Returns
    -------
    list of dict
        ``item``, ``expected`` (what the document says), ``measured`` (text) and ``passed``: True,
        False, or None where the document's number cannot be compared.
    """
    return [
        _modules_row(run.adapter),
        _share_row(float(run.adapter.loc["total", "share"])),
        *_loss_rows(run),
        _trend_row("loss", list(epoch_means(run.history, "loss").values())),
        _trend_row("valid loss", list(epoch_means(run.history, "eval_loss").values())),
        _completed_row(run),
        _final_row(run),
        _confidence_row(run),
        _prompts_row(run, words),
    ]


def checklist_frame(run, words=None):
    """Return the `checklist` as a table to show.

    Parameters
    ----------
    run, words
        See `checklist`.

    Returns
    -------
    pandas.DataFrame
        Index ``item``; columns ``document says``, ``measured``, ``verdict``: "yes", "no" or
        "not checkable".
    """
    rows = [
        {
            "item": row["item"],
            "document says": row["expected"],
            "measured": row["measured"],
            "verdict": VERDICTS[row["passed"]],
        }
        for row in checklist(run, words)
    ]
    return pd.DataFrame(rows).set_index("item")


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
    """Bound from below, by epoch from 1, what the document's loss would have shown for a run.

    The box and mask terms are the same in both; only their weights differ. The document's loss is
    their sum under its weights plus a classification term that cannot be negative.
    """
    weighted = [
        {"epoch": entry["epoch"], "bound": sum(w * entry[n] for n, w in _COUNTED_BY_BOTH.items())}
        for entry in history
        if "loss" in entry and all(name in entry for name in _COUNTED_BY_BOTH)
    ]
    return epoch_means(weighted, "bound")


def _row(name, measured, passed):
    """Build one line."""
    item, expected = ITEMS[name]
    passed = None if passed is None else bool(passed)
    return {"item": item, "expected": expected, "measured": measured, "passed": passed}


def _modules_row(adapter):
    """Build the line about where LoRA sits: modules there, and all of them moved."""
    modules, moved = adapter.loc["total", "modules"], adapter.loc["total", "B_nonzero"]
    return _row("modules", f"{modules:.0f} modules, {moved:.0%} moved", modules and moved == 1)


def _share_row(share):
    """Build the line about the share of parameters that learn."""
    return _row("trainable", f"{share:.2%}", 0.02 <= round(share, 3) <= 0.03)


def _loss_rows(run):
    """Build the lines about the loss in certain epochs."""
    losses = epoch_means(run.history, "loss")
    bounds = least_early_loss(run.history)
    early = run.config.loss.variant == "early"
    late = [epoch for epoch in losses if epoch >= 10]
    chosen = {"epoch 1": ([1], 0.0, 1.0), "epoch 5": ([5], 0.0, 0.5), "epoch 10": (late, 0.1, 0.3)}
    rows = []
    for name, (epochs, low, high) in chosen.items():
        if not epochs or not set(epochs) <= set(losses):
            rows.append(_row(name, f"the run has {max(losses)} epochs", None))
            continue
        loss, bound = (_mean_of(values, epochs) for values in (losses, bounds))
        rows.append(_loss_row(name, loss, bound, low, high, early))
    return rows


def _final_row(run):
    """Build the line about the training loss of the last epoch."""
    losses, bounds = epoch_means(run.history, "loss"), least_early_loss(run.history)
    last = max(losses)
    early = run.config.loss.variant == "early"
    return _loss_row("final loss", losses[last], bounds.get(last), 0.0, 0.5, early)


def _loss_row(name, loss, bound, low, high, early):
    """Compare a loss directly (``early``), or refute it by its bound, or leave it open."""
    if early:
        return _row(name, f"{loss:.3g}", low <= loss <= high)
    if bound is None:
        return _row(name, f"{loss:.3g} native", None)
    measured = f"{loss:.3g} native; at least {bound:.2g} with the document's weights"
    return _row(name, measured, False if bound > high else None)


def _mean_of(by_epoch, epochs):
    """Average over some epochs; None if one was not logged."""
    values = [by_epoch.get(epoch) for epoch in epochs]
    return None if None in values else sum(values) / len(values)


def _trend_row(name, values):
    """Build a line about a loss that should fall from the first to the last epoch."""
    if len(values) < 2:
        return _row(name, "one epoch has no trend", None)
    lowest = min(range(len(values)), key=values.__getitem__)
    measured = (
        f"{values[0]:.3g} in epoch 1, {values[-1]:.3g} in epoch {len(values)}, "
        f"lowest in epoch {lowest + 1}"
    )
    return _row(name, measured, values[-1] < values[0])


def _completed_row(run):
    """Build the line about the number of epochs."""
    epochs, wanted = run.metrics["epochs"], run.config.effective_num_epochs
    return _row("completed", f"{epochs:g} of {wanted} epochs", epochs >= wanted)


def _confidence_row(run):
    """Build the line about the best score on validation images that show an object."""
    best = run.metrics["valid"].get("max_score_present")
    if best is None:
        return _row("confidence", "the validation split shows no object", None)
    return _row("confidence", f"best score {best:.3f} on average, validation split", best > 0.3)


def _prompts_row(run, words):
    """Build the line about prompts: from measured words, or from the validation split."""
    threshold = run.config.evaluation.score_threshold
    if words is None:
        share = run.metrics["valid"].get("max_score_present_share_above")
        trained = ", ".join(run.prompts["prompts"]) or "no prompt"
        if share is None:
            return _row("prompts", f"trained on {trained}; the validation split shows none", None)
        measured = f"{trained}: reaches {threshold:g} on {share:.0%}; other words not asked"
        return _row("prompts", measured, False if share < WORKS_FROM else None)
    listed = ", ".join(f"{word} {share:.0%}" for word, share in words.items())
    measured = f"images where the best score reaches {threshold:g}: {listed}"
    return _row("prompts", measured, all(share >= WORKS_FROM for share in words.values()))


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


def report_text(content):
    """Write a `report` for people."""
    metrics = content["metrics"]
    kept = metrics["best_step"] or f"{metrics['steps']}, the last"
    lines = [
        f"{content['run']}: base {content['base']}, config {content['config']}",
        f"  {metrics['epochs']:g} epochs, {metrics['steps']} steps; kept step {kept} "
        f"(chosen by {metrics['selected_by']})",
        f"  prompts {', '.join(content['prompts']['prompts']) or 'none with objects'}; "
        f"{content['prompts']['negatives_per_image']} absent prompts per image",
        f"  training loss {metrics['train_loss']['first']:.4g} in the first log, "
        f"{metrics['train_loss']['last']:.4g} in the last",
        "adapter",
    ]
    for row in content["adapter"]:
        if row["modules"]:
            lines.append(
                f"  {row['component']:<17}{row['modules']:>5.0f} modules "
                f"{row['parameters']:>12,.0f} parameters {row['share']:>7.2%}  "
                f"moved {row['B_nonzero']:.0%}"
            )
    lines.append("validation")
    lines += [f"  {name:<32}{value:>10.4f}" for name, value in metrics["valid"].items()]
    lines.append("checklist of the document")
    for row in content["checklist"]:
        verdict, expected = VERDICTS[row["passed"]], row["expected"]
        lines.append(f"  {verdict:<15}{row['item']}: {row['measured']} (expected {expected})")
    return "\n".join(lines + [f"note: {note}" for note in metrics["notes"]])
