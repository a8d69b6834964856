"""The commands that give a result away: ``merge`` and ``push``; see `helpers.commands`."""

from __future__ import annotations


def merge(args):
    """Write a full model; status 1, and nothing written, if it detects anything else."""
    from helpers.merging import MergeDiffers
    from helpers.merging import merge as merge_run

    try:
        document, status = merge_run(args.adapter, args.output, args.dtype, args.base), 0
    except MergeDiffers as verdict:
        document, status = verdict.document, 1
    lines = [
        f"compared with base and adapter on {document['num_images']} images "
        f"({document['images']}), {document['written']['num_questions']} questions:"
    ]
    for name, title in (
        ("merged", "merged, float32"),
        ("written", f"written, {document['dtype']}"),
    ):
        numbers = document[name]
        lines.append(
            f"  {title:<18}{numbers['num_detections']} detections, {numbers['num_changed']} changed; "
            f"logits differ by at most {numbers['max_logit_difference']:.2g}, scores by "
            f"{numbers['max_score_difference']:.2g}; masks agree to an IoU of at least "
            f"{numbers['min_mask_iou']:.3f}"
        )
    if status:
        lines.append("not the same: nothing was written")
    else:
        lines.append(f"the same: {args.output} is a full model in {document['dtype']}")
    return status, document, "\n".join(lines)


def push(args):
    """Show what an upload to the Hugging Face Hub would send; with --yes, send it."""
    from helpers.publishing import plan_push
    from helpers.publishing import push as upload

    plan = plan_push(args.adapter, args.repo)
    url = upload(plan) if args.yes else None
    document = plan.to_json() | {"url": url}
    total = sum(plan.files.values())
    lines = [f"{plan.folder} -> {plan.repo}: {len(plan.files)} files, {total / 1e6:.1f} MB"]
    lines += [f"  {size:>13,}  {name}" for name, size in plan.files.items()]
    for title, entries in (
        ("left out", plan.left_out),
        ("missing from the card", plan.missing),
        ("names a folder of this machine", plan.machine_paths),
    ):
        lines += [f"{title}:", *(f"  {entry}" for entry in entries)] if entries else []
    lines.append(f"uploaded to {url}" if url else "nothing was sent; add --yes to upload")
    return 0, document, "\n".join(lines)
