"""The commands about data: ``check`` and ``convert``; see `helpers.commands` for the form."""

from __future__ import annotations

import sys

from helpers.commands import DEFAULT_CONFIG
from helpers.errors import InputError
from helpers.paths import resolve


def check(args):
    """Check a dataset; status 1 if a finding is an error."""
    from helpers.config import load_config
    from helpers.config_data import check_config_data
    from helpers.sam3 import load_base

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
    from helpers.convert import convert as run_conversion
    from helpers.convert import summary_text

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
        copy=args.copy,
    )
    return 0, summary, summary_text(summary)
