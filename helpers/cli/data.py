"""The commands that give a result away: ``merge`` and ``push``; see `helpers.commands`."""

from __future__ import annotations

import sys

from helpers.cli.model import DEFAULT_CONFIG
from helpers.errors import InputError
from helpers.files import resolve


def check(args):
    """Check a dataset; status 1 if a finding is an error."""
    from helpers.checks.dataset import check_config_data
    from helpers.config import load_config
    from helpers.model.sam3 import load_base

    if args.data is None and args.config is None:
        raise InputError("neither a dataset nor a config is named", fix="name the folder to check")
    profile = args.profile or (None if args.config else "tiny")
    config = load_config(args.config or DEFAULT_CONFIG, profile=profile, overrides=args.set)
    model = processor = None
    if resolve(config.model.name).is_dir():  # else a gated model, which a data check does not need
        model, processor = load_base(config.model.name, resolution=config.model.resolution)
    report = check_config_data(
        config,
        model,
        processor,
        data_dir=args.data,
        disable_progress=not sys.stderr.isatty(),
    )
    return (0 if report.ok else 1), report.to_json(), report.summary()


def convert(args):
    """Write a dataset of any common format in the layout that the other commands read."""
    from helpers.convert.conversion import convert as run_conversion
    from helpers.convert.conversion import summary_text

    summary = run_conversion(
        args.source,
        args.output,
        format=args.format,
        category=args.category,
        objects=args.objects,
        polygons=args.polygons,
        split=args.split,
        seed=args.seed,
        tile=args.tile,
        overlap=args.overlap,
    )
    return 0, summary, summary_text(summary)


def merge(args):
    """Write a full model; status 1, and nothing written, if it detects anything else."""
    from helpers.train.merge import MergeDiffers
    from helpers.train.merge import merge as merge_run

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
    from helpers.train.share import plan_push
    from helpers.train.share import push as upload

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
