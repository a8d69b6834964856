"""The report of a finished run, with the seed document's checklist worked off item by item."""

from __future__ import annotations

import math

ITEMS = {
    "trainable": ("Trainable params", "2 to 3 %"),
    "epoch 1": ("Loss at the end of epoch 1", "below 1.0"),
    "epoch 5": ("Loss at the end of epoch 5", "below 0.5"),
    "epoch 10": ("Loss from epoch 10 on", "0.1 to 0.3"),
    "completed": ("Training completed all epochs without errors", "all epochs"),
    "final loss": ("Final training loss", "below 0.5"),
    "valid loss": ("Validation loss", "decreasing"),
    "confidence": ("Inference produces detections with confidence", "above 0.3"),
    "prompts": ("Text prompts like 'crack', 'defect' work correctly", "both"),
}
"""The document's "expected output" and "verification checklist": name to item and expectation."""


def checklist(run):
    """Work off what the document tells a reader to expect and to check after training.

    Parameters
    ----------
    run : helpers.run_folder.RunFiles

    Returns
    -------
    list of dict
        ``item``, ``expected``, ``measured`` (text) and ``passed``: True, False, or None where the
        document's number cannot be compared. Its losses are on the scale of the ``early``
        weights; SAM3's own (``native``) weigh the same terms up to 40 times higher.
    """
    comparable = run.config.loss.variant == "early"
    losses = epoch_losses(run.history)
    valid, share = run.metrics["valid"], float(run.adapter.loc["total", "share"])
    rows = [_row("trainable", f"{share:.2%}", 0.02 <= round(share, 3) <= 0.03)]
    for epoch, low, high in ((1, 0.0, 1.0), (5, 0.0, 0.5), (10, 0.1, 0.3)):
        loss = losses.get(epoch)
        rows.append(_loss_row(f"epoch {epoch}", loss, low, high, comparable))
    epochs, wanted = run.metrics["epochs"], run.config.effective_num_epochs
    rows.append(_row("completed", f"{epochs:g} of {wanted}", epochs >= wanted))
    rows.append(_loss_row("final loss", run.metrics["train_loss"]["last"], 0.0, 0.5, comparable))
    first, last = run.metrics["valid_loss"]["first"], run.metrics["valid_loss"]["last"]
    rows.append(_row("valid loss", f"{first:.4g} to {last:.4g}", last < first))
    best = valid.get("max_score_present")
    measured = "no object in the validation split" if best is None else f"mean of best {best:.3f}"
    rows.append(_row("confidence", measured, best is not None and best > 0.3))
    return [*rows, _prompt_row(run)]


def epoch_losses(history):
    """Average the logged training loss over each epoch.

    Parameters
    ----------
    history : list of dict
        ``trainer.state.log_history``.

    Returns
    -------
    dict of int to float
        Epoch, counted from 1, to loss.
    """
    by_epoch = {}
    for entry in history:
        if "loss" in entry:
            by_epoch.setdefault(math.ceil(entry["epoch"]), []).append(entry["loss"])
    return {epoch: sum(losses) / len(losses) for epoch, losses in by_epoch.items()}


def report(run):
    """Gather everything worth knowing about a run.

    Parameters
    ----------
    run : helpers.run_folder.RunFiles

    Returns
    -------
    dict
        Plain values: ``run``, ``base``, ``config`` (fingerprint), ``adapter`` (rows of the adapter
        report), ``prompts``, ``metrics`` and ``checklist``.
    """
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
    """Write the report for people.

    Parameters
    ----------
    content : dict
        From `report`.

    Returns
    -------
    str
    """
    metrics = content["metrics"]
    kept = metrics["best_step"] or f"{metrics['steps']}, the last"
    lines = [
        f"{content['run']}: base {content['base']}, config {content['config']}",
        f"  {metrics['epochs']:g} epochs, {metrics['steps']} steps; kept step {kept} "
        f"(chosen by {metrics['selected_by']})",
        f"  prompts {', '.join(content['prompts']['prompts']) or 'none with objects'}; "
        f"{content['prompts']['negatives_per_image']} absent prompts per image",
        "adapter",
    ]
    for row in content["adapter"]:
        if row["modules"]:
            lines.append(
                f"  {row['component']:<17}{row['modules']:>5.0f} modules {row['parameters']:>12,.0f}"
                f" parameters {row['share']:>7.2%}  moved {row['B_nonzero']:.0%}"
            )
    lines.append("validation")
    lines += [f"  {name:<32}{value:>10.4f}" for name, value in metrics["valid"].items()]
    lines.append("checklist of the document")
    marks = {True: "yes", False: "no", None: "-"}
    for row in content["checklist"]:
        lines.append(
            f"  {marks[row['passed']]:<4}{row['item']}: {row['measured']} (expected {row['expected']})"
        )
    return "\n".join(lines + [f"note: {note}" for note in metrics["notes"]])


def _row(name, measured, passed):
    """Build one line of the checklist."""
    item, expected = ITEMS[name]
    passed = None if passed is None else bool(passed)
    return {"item": item, "expected": expected, "measured": measured, "passed": passed}


def _loss_row(name, loss, low, high, comparable):
    """Build a line about a training loss, which only the ``early`` weights make comparable."""
    if loss is None:
        return _row(name, "not reached", None)
    scale = "" if comparable else ", on the scale of the native weights"
    return _row(name, f"{loss:.4g}{scale}", low <= loss < high if comparable else None)


def _prompt_row(run):
    """Build the line about prompts: present ones should score high, absent ones low."""
    valid, threshold = run.metrics["valid"], run.config.evaluation.score_threshold
    present = valid.get("max_score_present_share_above")
    absent = valid.get("max_score_absent_share_above")
    if present is None or absent is None:
        return _row("prompts", "not measured: present and absent prompts are both needed", None)
    measured = (
        f"best score reaches {threshold:g} for {present:.0%} of present, {absent:.0%} of absent"
    )
    untrained = [word for word in ("crack", "defect") if word not in run.prompts["prompts"]]
    if untrained:
        measured += f"; never trained: {', '.join(untrained)}"
    return _row("prompts", measured, present >= 0.9 and absent <= 0.1 and not untrained)
