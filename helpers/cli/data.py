"""The commands about datasets: ``check`` and ``convert``.

Every command takes the parsed arguments and returns ``(exit status, JSON document, text)``.
Libraries are imported inside, so that ``--help`` answers at once.
"""

from __future__ import annotations

from helpers.cli.model import DEFAULT_CONFIG, add_set_option, profile_name
from helpers.errors import InputError
from helpers.files import in_current_folder, resolve


def add_commands(add):
    """Add the parsers of this file's commands."""
    _check_options(add(check))
    _convert_options(add(convert))


def _check_options(command):
    """Add the options of ``check``."""
    command.add_argument(
        "data",
        nargs="?",
        type=in_current_folder,
        metavar="DATA",
        help="folder with one folder per split, by default data.data_dir of --config",
    )
    command.add_argument(
        "--config",
        type=in_current_folder,
        metavar="FILE",
        help="check as its training would read it",
    )
    command.add_argument(
        "--profile",
        type=profile_name,
        help="tiny, sam3 or a file; without --config tiny by default",
    )
    add_set_option(command)


def _convert_options(command):
    """Add the options of ``convert``."""
    command.add_argument("source", metavar="SRC", help="dataset: a folder, or a COCO file")
    command.add_argument("output", metavar="DST", help="new folder, one folder per split in it")
    command.add_argument(
        "--format",
        choices=("coco", "yolo", "voc", "masks", "labelme"),
        help="by default recognised; coco means Roboflow's export and per-image JSON, too",
    )
    command.add_argument("--category", metavar="NOUN", help="what binary mask pictures show")
    command.add_argument(
        "--objects",
        choices=("components", "whole", "values"),
        default="components",
        help="what is one object of a mask picture: a connected component (default), all of a "
        "class, or each value",
    )
    command.add_argument(
        "--polygons",
        choices=("auto", "outline", "pixels"),
        default="auto",
        help="whether corners (YOLO, VOC, LabelMe) lie on the outline or are pixels of the object; "
        "auto (default): pixels if all are whole numbers",
    )
    command.add_argument(
        "--split",
        nargs="+",
        type=float,
        metavar="SHARE",
        help="divide anew into train, valid and test, for example 0.8 0.1 0.1",
    )
    command.add_argument("--seed", type=int, default=42, help="of the division, default 42")
    command.add_argument("--tile", type=int, metavar="PIXELS", help="cut larger images into tiles")
    command.add_argument("--overlap", type=float, default=0.2, help="of tiles, default 0.2")
    command.add_argument("--copy", action="store_true", help="images are always copied")


def check(args):
    """Check a dataset; status 1 if a finding is an error."""
    from helpers.checks.dataset import check_dataset
    from helpers.config import load_config
    from helpers.data.dataset import load_dataset
    from helpers.model.sam3 import load_base

    if args.data is None and args.config is None:
        raise InputError("neither a dataset nor a config is named", fix="name the folder to check")
    profile = args.profile or (None if args.config else "tiny")
    config = load_config(args.config or DEFAULT_CONFIG, profile=profile, overrides=args.set)
    model = processor = None
    if resolve(config.model.name).is_dir():  # else a gated model, which a data check does not need
        model, processor = load_base(config.model.name, resolution=config.model.resolution)
    report = check_dataset(load_dataset(config, args.data), model, processor)
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
