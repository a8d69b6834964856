import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from data.experiments import cells, make
from data.experiments.cells import (
    DESIGNS,
    EQUAL_PARAMETERS,
    KNOWN_THINGS,
    PARTS,
    RECOMMENDED,
    RESPONSES,
    SEEDS,
    SEEDS_OF,
    Cell,
    cells_of,
    usages_of,
)
from data.experiments.make import publish, run_experiment
from helpers.config import load_config
from helpers.errors import InputError
from helpers.files import CONFIGS, TINY_BASE
from helpers.model.lora import add_lora
from helpers.model.sam3 import load_base

DATA_DIR = "data/wall_cracks"


@pytest.mark.parametrize(
    ("design", "per_seed"),
    [
        ("causes", 32),
        ("front", 26),
        ("schedule", 4),
        ("components", 22),
        ("grades", 40),
        ("rates", 30),
    ],
)
def test_designs_are_complete_and_every_cell_is_another(design, per_seed):
    cells = cells_of(design, [1, 2])
    assert len(cells) == 2 * per_seed
    assert len({cell.name for cell in cells}) == len(cells)
    for seed in (1, 2):
        configs = {
            (cell.config("tiny", DATA_DIR).fingerprint(), cell.objects_read)
            for cell in cells
            if cell.seed == seed
        }
        # the word as an embedding trains no adapter, and has the config of the first recipe
        assert len(configs) == per_seed - {"components": 1, "front": 2}.get(design, 0)


def test_seeds_that_were_not_run_are_not_expected():
    for design in DESIGNS:
        assert {cell.seed for cell in cells_of(design)} == set(SEEDS_OF.get(design, SEEDS))


def test_the_words_differ_in_the_base_only():
    cells = cells_of("causes", [2])
    never, half = ([c for c in cells if c.factors["word"] == word] for word in ("never", "half"))
    for cell, other in zip(never, half, strict=True):
        assert cell.factors | {"word": "half"} == other.factors
        assert cell.objects_read == other.objects_read
        config, half_config = (one.config("tiny", DATA_DIR) for one in (cell, other))
        assert half_config.model.name == "data/tiny_sam3_half_known"
        assert half_config.replace({"model.name": config.model.name}) == config


def test_another_profile_has_a_base_of_its_own():
    cells = cells_of("causes", [2], "sam3")
    assert len(cells) == 16
    assert {cell.factors["word"] for cell in cells} == {"its own"}
    assert {cell.config("sam3", DATA_DIR).model.name for cell in cells} == {"facebook/sam3"}


def test_the_recommended_config_is_its_recipe():
    [cell] = (
        cell
        for cell in cells_of("front", [42])
        if cell.factors == {"recipe": RECOMMENDED, "word": "never"}
    )
    settings = [("data.data_dir", DATA_DIR), ("scale.num_epochs", 0.1), *cells.BATCH]
    config = load_config(CONFIGS / "keep_the_rest_config.yaml", "tiny", settings)
    assert config.fingerprint() == cell.config("tiny", DATA_DIR).fingerprint()


@pytest.mark.parametrize("profile", ["tiny", "sam3"])
def test_rate_and_epochs_of_a_recipe_are_relative_to_the_profile(profile):
    """A profile multiplies both; a recipe that set the multiplier would be another one elsewhere."""
    configs = {}
    for cell in cells_of("front", [1], profile):
        configs.setdefault(cell.factors["recipe"], cell.config(profile, DATA_DIR))
    fixed = configs["fixed config"]
    for recipe, share in {"a third of the rate": 1 / 3, "a tenth of the rate": 1 / 10}.items():
        rate = configs[recipe].effective_learning_rate
        assert rate == pytest.approx(share * fixed.effective_learning_rate)
    epochs = configs["replay, twice the epochs"].effective_num_epochs
    assert epochs == 2 * fixed.effective_num_epochs


def test_an_adapter_that_is_used_in_several_ways_has_as_many_rows():
    rows = usages_of("front", [1])
    recipes = [row.factors["recipe"] for row in rows if row.factors["word"] == "half"]
    assert len(recipes) == len(set(recipes)) == 17
    assert {"fixed config", "fixed config, routed", "replay, scaled by 0.75"} <= set(recipes)


def test_text_alone_has_the_same_rank_in_both_passes():
    """The reference of the second pass; its config is therefore the same, as counted above."""
    ranks = {
        cell.factors["equal"]: cell.config("tiny", DATA_DIR).lora.rank
        for cell in cells_of("components", [1])
        if cell.factors["lora_on"] == "only text_encoder"
    }
    assert ranks == {"rank": 16, "size": 16}


def test_the_four_causes_are_what_differs():
    first, *_, last = (c for c in cells_of("causes", [1]) if c.factors["word"] == "half")
    one, other = first.config("tiny", DATA_DIR), last.config("tiny", DATA_DIR)
    assert (one.data.prompt, other.data.prompt) == ("object", None)
    assert (one.lora.apply_to_text_encoder, other.lora.apply_to_text_encoder) == (False, True)
    assert (one.data.num_negatives, other.data.num_negatives) == (0, 3)
    assert (first.objects_read, last.objects_read) == (False, True)
    same = {"data": {"prompt", "num_negatives"}, "lora": {"apply_to_text_encoder"}}
    dumped = [config.model_dump() for config in (one, other)]
    for section, keys in same.items():
        for key in keys:
            assert dumped[0][section].pop(key) != dumped[1][section].pop(key)
    assert dumped[0] == dumped[1]


def test_the_schedules_are_the_documents():
    failing, fixed = (
        next(cell for cell in cells_of("schedule", [1]) if cell.factors["schedule"] == name)
        for name in ("failing", "fixed")
    )
    for cell, expected in ((failing, (20, 1000, 5e-5)), (fixed, (50, 100, 1e-4))):
        training = cell.config("tiny", DATA_DIR).training
        assert (training.num_epochs, training.warmup_steps, training.learning_rate) == expected


def test_equal_size_is_as_equal_as_whole_ranks_allow():
    model, _ = load_base(TINY_BASE)
    for cell in cells_of("components", [1]):
        if cell.factors["equal"] != "size":
            continue
        config = cell.config("tiny", DATA_DIR)
        peft_model = add_lora(copy.deepcopy(model), config.lora)
        count = sum(p.numel() for name, p in peft_model.named_parameters() if "lora_" in name)
        assert 0.82 * EQUAL_PARAMETERS <= count <= 1.12 * EQUAL_PARAMETERS, cell.name


def test_parts_are_all_that_a_text_prompt_passes():
    assert PARTS == (
        "vision_encoder",
        "text_encoder",
        "detr_encoder",
        "detr_decoder",
        "mask_decoder",
    )


def test_unknown_design_and_no_seed_are_refused():
    with pytest.raises(InputError, match="no design 'colour'"):
        cells_of("colour")
    with pytest.raises(InputError, match="no seed"):
        cells_of("causes", [])


@pytest.fixture
def small(tmp_path, monkeypatch, base, data_dir):
    """Two cells on the random base, run in this process."""
    settings = (
        "model.resolution=56", "lora.rank=2",
        "data.negative_prompts=[joint, moss, dog]",
    )  # fmt: skip

    def design(seeds):
        return [Cell("causes", {"word": "never"}, seed, settings) for seed in seeds]

    monkeypatch.setitem(DESIGNS, "causes", design)
    monkeypatch.setattr(cells, "EPOCHS_SCALE", {"causes": 0.02})
    monkeypatch.setattr(cells, "BASES", {"never": str(base)})
    monkeypatch.setattr(cells, "KNOWN_THINGS", one_known_wall(tmp_path / "known"))
    monkeypatch.setattr(make, "run_jobs", in_this_process)
    return tmp_path, {"profile": "tiny", "data_dir": data_dir, "seeds": [1, 2]}


def in_this_process(function, jobs, **options):
    """What processes of their own do is tested below."""
    for job in jobs:
        yield function(*job)


def one_known_wall(folder):
    """Copy the first wall of data/known_things, for a base that answers slowly or wrongly."""
    (folder / "test" / "images").mkdir(parents=True)
    content = json.loads((KNOWN_THINGS / "test" / "_annotations.coco.json").read_text())
    content["images"] = content["images"][:1]
    content["annotations"] = [one for one in content["annotations"] if one["image_id"] == 1]
    (folder / "test" / "_annotations.coco.json").write_text(json.dumps(content))
    shutil.copy(KNOWN_THINGS / "test" / "images" / "known_000.png", folder / "test" / "images")
    shutil.copy(KNOWN_THINGS / "prompts.json", folder)
    return folder


def test_rows_say_what_was_run_and_finished_cells_are_not_run_again(small, monkeypatch):
    folder, options = small
    table = run_experiment("causes", folder / "out", **options)
    assert table["seed"].tolist() == [1, 2]
    assert set(RESPONSES) <= set(table.columns)
    assert table["config_hash"].nunique() == 2
    assert (table["parameters"] > 0).all()
    assert (folder / "out" / "base.json").is_file()

    ran = []
    run_cell = make.run_cell
    monkeypatch.setattr(
        make, "run_cell", lambda cell, *args: ran.append(cell.seed) or run_cell(cell, *args)
    )
    (folder / "out" / "causes" / "word-never_seed-2.json").unlink()
    again = run_experiment("causes", folder / "out", **options)
    assert ran == [2]
    pd.testing.assert_frame_equal(
        again.drop(columns="seconds"), table.drop(columns="seconds"), check_exact=False
    )


def test_a_cell_of_another_configuration_is_run_again(small):
    folder, options = small
    run_experiment("causes", folder / "out", **options | {"seeds": [1]})
    path = folder / "out" / "causes" / "word-never_seed-1.json"
    [row] = json.loads(path.read_text())["rows"]
    path.write_text(json.dumps({"rows": [row | {"config_hash": "another", "AP50": -7.0}]}))
    table = run_experiment("causes", folder / "out", **options | {"seeds": [1]})
    assert table["AP50"].item() >= 0


def test_an_unfinished_experiment_is_not_published(small):
    folder, options = small
    with pytest.raises(InputError, match="was not run"):
        publish(folder / "out", folder / "tables")
    run_experiment("causes", folder / "out", **options)
    with pytest.raises(InputError, match="2 of 5 rows"):
        publish(folder / "out", folder / "tables")
    assert not (folder / "tables").exists()


JOBS = """
import os, sys, time
from pathlib import Path
from data.experiments.jobs import run_jobs
from data.experiments.make import run_command

def work(folder, number):
    if number == 1:
        return "finished"
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(300)

def command():
    folder = Path(sys.argv[1])
    for row in run_jobs(work, [(folder, 1), (folder, 2)], description="jobs", workers=2):
        (folder / "row").write_text(row)

if __name__ == "__main__":
    sys.exit(run_command(command))
"""


@pytest.mark.parametrize("victim", ["worker", "parent"])
def test_a_kill_loses_no_row_and_leaves_no_process(tmp_path, victim):
    script = tmp_path / "jobs.py"
    script.write_text(JOBS)
    process = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], stderr=subprocess.PIPE, text=True
    )
    try:
        for name in ("row", "pid"):
            wait_for((tmp_path / name).is_file, 500)
            wait_for((tmp_path / name).read_text, 5)
        worker = int((tmp_path / "pid").read_text())
        os.kill({"worker": worker, "parent": process.pid}[victim], signal.SIGKILL)
        _, messages = process.communicate(timeout=60)
        assert process.returncode == {"worker": 2, "parent": -signal.SIGKILL}[victim]
        if victim == "worker":
            assert "error: a worker process was killed" in messages
            assert "goes on where it was" in messages
        wait_for(lambda: not is_alive(worker), 20)
        assert (tmp_path / "row").read_text() == "finished"
    finally:
        process.kill()


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_alive(pid):
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False


def test_only_missing_bases_are_made(tmp_path, monkeypatch):
    (tmp_path / "most").mkdir()
    places = {word: str(tmp_path / word) for word in ("most", "control")}
    monkeypatch.setattr(make, "GRADED", places)
    made = []
    monkeypatch.setattr(
        "data.tiny_sam3_half_known.make.make_grade",
        lambda word, folder, recipe: made.append((word, folder)),
    )
    make.make_missing_bases()
    assert made == [("control", tmp_path / "control")]


def test_a_base_is_judged_once_and_beside_those_of_other_designs(tmp_path, monkeypatch):
    monkeypatch.setattr(make, "load_base", lambda name, *_, **options: (name, None))
    monkeypatch.setattr(make, "judge", lambda model, *_: {"AP50": 0.5, "base": model})
    monkeypatch.setattr(make, "run_jobs", lambda *_, **options: [])
    for design in ("schedule", "causes", "grades", "front"):
        run_experiment(design, tmp_path, profile="tiny", data_dir=DATA_DIR)
    rows = make.rows_in(tmp_path / "base.json")
    bases = cells.BASES | cells.GRADED
    assert [(row["word"], row["base"]) for row in rows] == list(bases.items())
