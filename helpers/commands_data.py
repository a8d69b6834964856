"""What ``python -m helpers convert`` does; see `helpers.commands` for the form."""

from __future__ import annotations


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
