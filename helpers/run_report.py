"""The report of a finished run, as a document for programs and as text for people."""

from __future__ import annotations

from helpers.checklist import VERDICTS, checklist


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
        Lines on the run, its adapter, its validation metrics, the document's checklist and
        whatever the log gave reason to note.
    """
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
