"""Ask trained runs for words beside the trained one: ``python -m data.experiments.make_near_words``.

Each run is asked for every word on the test walls, with its adapter and without. Routing asks the
adapter for "crack" and the base for all else, so its answers are in the table, too. Rows are
appended as soon as a run is judged; one that is there is not run again.
"""

import argparse
import sys
import tempfile
from functools import partial
from itertools import product

import pandas as pd

from data.experiments.cells import BASES, BATCH, DATA_DIR, TABLES, code_version
from data.experiments.make import append_rows, run_command
from data.experiments.make_photographs import RECIPES
from helpers.config import load_config
from helpers.data import read_split, rename_categories
from helpers.detect import coco_ap, predict_split
from helpers.files import CONFIGS, resolve
from helpers.train import train

NEAR_WORDS = TABLES / "near_words.csv"
TRAINED = "crack"
WORDS = {
    TRAINED: "the trained word",
    "Crack": "capital",
    "cracks": "plural",
    "a crack in the wall": "phrase",
    "cracked tile": "another thing, same stem",
    "fissure": "synonym",
    "fracture": "synonym",
    "defect": "wider",
    "scratch": "another thing, alike",
}
"""Words that are asked, and what they are to the trained one."""
KEYS = ["base", "config", "seed"]
ANSWERED_AT = 0.3


def judge_run(base, recipe, seed):
    """Train one config on one base and return a row per word and answering model."""
    overrides = [("data.data_dir", DATA_DIR), ("training.seed", seed), ("model.name", BASES[base])]
    config = load_config(CONFIGS / f"{recipe}_config.yaml", "tiny", [*overrides, *BATCH])
    with tempfile.TemporaryDirectory() as place:
        run = train(config, output_dir=f"{place}/run", progress=False)
    rows = []
    for word in WORDS:
        asked = run.model, run.processor, word
        rows.append({"word": word, "answered_by": "adapter", **answers(*asked)})
        with run.model.disable_adapter():
            rows.append({"word": word, "answered_by": "base", **answers(*asked)})
    known = dict(zip(KEYS, (base, recipe, seed), strict=True))
    return [known | row | {"code_version": code_version()} for row in rows]


def answers(model, processor, word):
    """Ask for cracks by some word; return shares of images answered, with a crack and without."""
    split = rename_categories(read_split(DATA_DIR, "test"), {TRAINED: word})
    queries = [query for query in predict_split(model, processor, split) if query.prompt == word]
    shares = {
        is_there: pd.Series([q.max_score for q in queries if q.is_positive == is_there])
        .ge(ANSWERED_AT)
        .mean()
        for is_there in (True, False)
    }
    names = {"detected_share": shares[True], "false_positive_rate": shares[False]}
    return names | {"AP50": coco_ap(queries)["AP50"]}


def main(arguments=None):
    """Run the command line and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m data.experiments.make_near_words", description=__doc__
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output", type=resolve, default=NEAR_WORDS, help="the table")
    options = parser.parse_args(arguments)
    return run_command(lambda: _run(options))


def _run(options):
    runs = product(reversed(BASES), RECIPES, options.seeds)
    append_rows(options.output, KEYS, {run: partial(judge_run, *run) for run in runs})
    return 0


if __name__ == "__main__":
    sys.exit(main())
