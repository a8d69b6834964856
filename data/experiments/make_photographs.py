"""Train both configs on photographs: ``python -m data.experiments.make_photographs DIR ...``.

A row is appended to ``photographs.csv`` as soon as a run is judged; one that is there is not run again.
"""

import argparse
import sys
import tempfile
from functools import partial
from itertools import product
from pathlib import Path

from data.experiments.cells import BASES, BATCH, KNOWN_WORDS, TABLES, code_version, judge
from data.experiments.make import append_rows, run_command
from helpers.config import load_config
from helpers.data import read_split
from helpers.detect import predict_split, threshold_sweep
from helpers.files import CONFIGS, resolve
from helpers.train import train

PHOTOGRAPHS = TABLES / "photographs.csv"
RECIPES = ("crack_detection", "keep_the_rest")
KEYS = ["data", "base", "config", "seed"]
ABSENT = "[piano, banana, teapot, giraffe, umbrella, violin]"  # in none of the pictures
MEASURES = ("detected_share", "AP50", "union_iou", "false_positive_rate", "retention_AP")


def judge_recipe(folder, word, recipe, seed):
    """Train one config on one base and dataset, and judge it; return a list of one row."""
    overrides = [("data.data_dir", folder), ("training.seed", seed), ("model.name", BASES[word])]
    overrides += [*BATCH, f"data.negative_prompts={ABSENT}"]
    overrides += ["evaluation.absent_prompts=[piano, banana, teapot]"]
    config = load_config(CONFIGS / f"{recipe}_config.yaml", "tiny", overrides)
    with tempfile.TemporaryDirectory() as place:
        run = train(config, output_dir=Path(place) / "run", progress=False)
    numbers = judge(run.model, run.processor, config, folder, KNOWN_WORDS)
    asked = {"absent_prompts": config.evaluation.absent_prompts}
    queries = predict_split(run.model, run.processor, read_split(folder, "test"), **asked)
    sweep = threshold_sweep(queries, [config.evaluation.score_threshold]).iloc[0]
    row = dict(zip(KEYS, (Path(folder).name, word, recipe, seed), strict=True))
    row |= {name: numbers[name] for name in MEASURES}
    row |= {"precision": sweep["precision"], "recall": sweep["recall"]}
    return [row | {"steps": run.metrics["steps"], "code_version": code_version()}]


def main(arguments=None):
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data.experiments.make_photographs", description=__doc__
    )
    parser.add_argument("folders", nargs="+", type=resolve, metavar="DIR", help="datasets")
    parser.add_argument("--word", choices=BASES, default="half", help="base, by default half")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--output", type=resolve, default=PHOTOGRAPHS, help="the table")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options):
    runs = product(options.folders, [options.word], RECIPES, options.seeds)
    jobs = {
        (folder.name, *rest): partial(judge_recipe, str(folder), *rest) for folder, *rest in runs
    }
    append_rows(options.output, KEYS, jobs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
