import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
from tiny_random import save_tiny_base, write_dataset

from helpers.errors import InputError
from helpers.files import ROOT
from helpers.lab import designs as experiment_designs
from helpers.lab import experiment
from helpers.lab import experiment as jobs
from helpers.lab.designs import (
    DESIGNS,
    EQUAL_PARAMETERS,
    PARTS,
    SEEDS,
    Cell,
    cells_of,
)
from helpers.lab.experiment import KNOWN_THINGS, RESPONSES, publish, run_experiment
from helpers.model.lora import add_lora
from helpers.model.sam3 import load_base

DATA_DIR = "data/wall_cracks"


@pytest.mark.parametrize(
    ("design", "per_seed"), [("causes", 16), ("schedule", 4), ("components", 22)]
)
def test_designs_are_complete_and_every_cell_is_another(design, per_seed):
    cells = cells_of(design)
    assert len(cells) == per_seed * len(SEEDS)
    assert len({cell.name for cell in cells}) == len(cells)
    for seed in SEEDS:
        configs = {
            (cell.config("tiny", DATA_DIR).fingerprint(), cell.objects_read)
            for cell in cells
            if cell.seed == seed
        }
        assert len(configs) == per_seed - (1 if design == "components" else 0)


def test_text_alone_has_the_same_rank_in_both_passes():
    """The reference of the second pass; its config is therefore the same, as counted above."""
    ranks = {
        cell.factors["equal"]: cell.config("tiny", DATA_DIR).lora.rank
        for cell in cells_of("components", [1])
        if cell.factors["lora_on"] == "only text_encoder"
    }
    assert ranks == {"rank": 16, "size": 16}


def test_the_four_causes_are_what_differs():
    first, *_, last = cells_of("causes", [1])
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
    for cell in cells_of("components", [1]):
        if cell.factors["equal"] != "size":
            continue
        config = cell.config("tiny", DATA_DIR)
        model, _ = load_base(config.model.name)
        peft_model = add_lora(model, config.lora)
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
def small(tmp_path, monkeypatch):
    """Two cells on the random base, run in this process."""
    base = save_tiny_base(tmp_path / "base")
    data = write_dataset(tmp_path / "data")
    settings = (
        f"model.name={base}", "model.resolution=56", "scale.num_epochs=0.02", "lora.rank=2",
        "data.negative_prompts=[joint, moss, dog]",
    )  # fmt: skip

    def design(seeds):
        return [Cell("causes", {"text": "on"}, seed, "crack_detection", settings) for seed in seeds]

    monkeypatch.setitem(DESIGNS, "causes", design)
    monkeypatch.setattr(experiment_designs, "_SHORT", {})
    monkeypatch.setattr(experiment, "KNOWN_THINGS", one_known_wall(tmp_path / "known"))
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", InThisProcess)
    return tmp_path, {"profile": "tiny", "data_dir": data, "seeds": [1, 2]}


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


class InThisProcess:
    """Runs jobs at once; what the pool does is tested with real processes below."""

    def __init__(self, *args, **options):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def shutdown(self, **options):
        pass

    def submit(self, function, *args):
        from concurrent.futures import Future

        future = Future()
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        return future


def test_rows_say_what_was_run_and_finished_cells_are_not_run_again(small, monkeypatch):
    folder, options = small
    table = run_experiment("causes", folder / "out", **options)
    assert table["seed"].tolist() == [1, 2]
    assert set(RESPONSES) <= set(table.columns)
    assert table["config_hash"].nunique() == 2
    assert (table["parameters"] > 0).all()
    assert (folder / "out" / "base.json").is_file()

    ran = []
    run_cell = experiment.run_cell
    monkeypatch.setattr(
        experiment, "run_cell", lambda cell, *args: ran.append(cell.seed) or run_cell(cell, *args)
    )
    (folder / "out" / "causes" / "text-on_seed-2.json").unlink()
    again = run_experiment("causes", folder / "out", **options)
    assert ran == [2]
    pd.testing.assert_frame_equal(
        again.drop(columns="seconds"), table.drop(columns="seconds"), check_exact=False
    )


def test_a_cell_of_another_configuration_is_run_again(small):
    folder, options = small
    run_experiment("causes", folder / "out", **options | {"seeds": [1]})
    path = folder / "out" / "causes" / "text-on_seed-1.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"config_hash": "another", "AP50": -7.0}))
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


def test_a_kill_loses_no_row_and_leaves_no_process(tmp_path):
    """SIGKILL the real command while it works: its rows stay, its workers go."""
    command = [
        sys.executable, "-m", "helpers.lab.experiment", "--design", "causes", "--seeds", "1",
        "--output", str(tmp_path), "--workers", "1",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 240
        while not any((tmp_path / "causes").glob(".partial-*/curves.csv")):
            assert time.monotonic() < deadline, "no training started"
            assert process.poll() is None
            time.sleep(0.2)
        workers = _children(process.pid)
        assert workers
        process.send_signal(signal.SIGKILL)
        process.wait()
        deadline = time.monotonic() + 20
        while any(_is_alive(pid) for pid in workers):
            assert time.monotonic() < deadline, "a worker outlives its parent"
            time.sleep(0.2)
        assert (tmp_path / "base.json").is_file()
    finally:
        process.kill()


def _children(pid):
    listed = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True
    )
    return [int(line) for line in listed.stdout.split()]


def _is_alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return (
        "Z"
        not in subprocess.run(
            ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True
        ).stdout
    )
