"""The command line: ``python -m helpers COMMAND``, see ``--help`` for the commands."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys

from helpers.cli import data as commands_data
from helpers.cli import data as commands_share
from helpers.cli import model as commands
from helpers.errors import InputError

_EPILOG = """exit status:
  0    done, nothing found wrong
  1    findings with errors, or a failure of the thing that was checked
  2    unusable input: a missing or damaged file, an impossible value, an adapter of another base
  130  interrupted with Ctrl-C

With --json, stdout is one JSON document and nothing else; remarks go to stderr.
"""


def build_parser():
    """Return the parser of all commands.

    Returns
    -------
    argparse.ArgumentParser
    """
    parser = argparse.ArgumentParser(
        prog="python -m helpers",
        description="SAM3 with LoRA: check data, train, detect, evaluate.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    as_json = argparse.ArgumentParser(add_help=False)
    as_json.add_argument("--json", action="store_true", help="print one JSON document")
    model = _model_parser()

    def add(name, *parents, module=commands):
        function = getattr(module, name)
        command = subparsers.add_parser(
            name,
            parents=[as_json, *parents],
            help=function.__doc__.splitlines()[0],
            description=function.__doc__,
            epilog=_EPILOG,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(function=function)
        return command

    _check_options(add("check", module=commands_data))

    _convert_options(add("convert", module=commands_data))

    _train_options(add("train"))

    _predict_options(add("predict", model))

    command = add("evaluate", model)
    command.add_argument("--data", metavar="DIR", help="dataset, by default that of the run")
    command.add_argument("--split", default="test", help="split, by default test")
    command.add_argument("--prompt", help="ask for this word in place of the category names")
    command.add_argument("--threshold", type=float, help="score threshold in [0, 1], default 0.3")

    command = add("report")
    command.add_argument("--adapter", required=True, metavar="RUN", help="run folder")

    command = add("diagnose")
    command.add_argument("--adapter", required=True, metavar="RUN", help="run folder")
    command.add_argument("--data", metavar="DIR", help="dataset, by default that of the run")
    command.add_argument("--image", metavar="IMG", help="a picture in which nothing is found")
    command.add_argument("--prompt", help="the word that was asked, by default the category names")

    _share_options(add)
    return parser


def _check_options(command):
    """Add the options of ``check``."""
    command.add_argument(
        "data",
        nargs="?",
        metavar="DATA",
        help="folder with one folder per split, by default data.data_dir of --config",
    )
    command.add_argument("--config", metavar="FILE", help="check as its training would read it")
    command.add_argument("--profile", help="tiny, sam3 or a file; without --config tiny by default")
    _set_option(command)


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


def _predict_options(command):
    """Add the options of ``predict``."""
    command.add_argument(
        "--image", nargs="+", action="extend", required=True, metavar="IMG", help="files or folders"
    )
    command.add_argument("--prompt", action="append", default=[], help="noun; may be repeated")
    command.add_argument("--threshold", type=float, help="score threshold in [0, 1], default 0.3")
    command.add_argument("--mask-threshold", type=float, help="in [0, 1], default 0.5")
    command.add_argument(
        "--tile", type=int, metavar="PIXELS", help="look at larger images in tiles of this side"
    )
    command.add_argument("--overlap", type=float, default=0.2, help="of tiles, default 0.2")
    command.add_argument("--output", metavar="PNG", help="picture to draw")


def _share_options(add):
    """Add ``merge`` and ``push``."""
    command = add("merge", module=commands_share)
    command.add_argument("--adapter", required=True, metavar="RUN", help="run folder")
    command.add_argument("--output", required=True, metavar="DIR", help="new folder of the model")
    command.add_argument("--dtype", help="float32 or bfloat16, by default that of the base's files")
    command.add_argument("--base", metavar="NAME", help="another place of the base")

    command = add("push", module=commands_share)
    command.add_argument("--adapter", required=True, metavar="DIR", help="run or merged model")
    command.add_argument("--repo", required=True, metavar="OWNER/NAME", help="name on the Hub")
    command.add_argument("--yes", action="store_true", help="upload; by default only look")


def _train_options(command):
    """Add the options of ``train``."""
    command.add_argument("--config", required=True, metavar="FILE", help="a file of configs/")
    command.add_argument("--profile", help="tiny, sam3 or a file")
    command.add_argument("--data", metavar="DIR", help="dataset, in place of data.data_dir")
    command.add_argument("--output", metavar="RUN", help="run folder, by default output.output_dir")
    _set_option(command)
    command.add_argument("--resume", action="store_true", help="continue an interrupted run")
    command.add_argument("--overwrite", action="store_true", help="replace a run in the folder")
    command.add_argument(
        "--retry-smaller",
        action="store_true",
        help="when memory runs out, start again with checkpointing, then with smaller batches",
    )


def _set_option(command):
    """Add ``--set``."""
    command.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change a setting"
    )


def _model_parser():
    """Return the options that say which model to use; without any, the embedded base alone."""
    parser = argparse.ArgumentParser(add_help=False)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--adapter", metavar="RUN", help="run folder, or folder of a PEFT adapter")
    source.add_argument("--config", metavar="FILE", help="find the run in its output.output_dir")
    parser.add_argument("--base", metavar="NAME", help="base model: a folder or a hub name")
    parser.add_argument("--profile", help="tiny (default) or sam3: whose base to use")
    return parser


def main(arguments=None):
    """Run one command.

    Parameters
    ----------
    arguments : list of str, optional
        Without the program name; by default those of the process.

    Returns
    -------
    int
        The exit status, see ``--help``.
    """
    args = build_parser().parse_args(arguments)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # whatever a library prints is no result
            _quieten()
            status, document, text = args.function(args)
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(
                json.dumps(document, indent=2, allow_nan=False) if args.json else text, flush=True
            )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        hint = "; continue with --resume" if args.command == "train" else ""
        print(f"interrupted{hint}", file=sys.stderr)
        return 130
    return status


def _quieten():
    """Silence the progress bars and notices of the libraries."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    disable_progress_bars()


if __name__ == "__main__":
    sys.exit(main())
