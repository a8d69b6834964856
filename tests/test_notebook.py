import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers.course import notebook
from helpers.course.notebook import start
from helpers.errors import InputError
from helpers.files import ROOT

GOOD = {"profile": "tiny", "data_dir": "data/wall_cracks", "seed": 42, "fast_run": True}


@pytest.fixture
def begin(tmp_path):
    def begin(**changes):
        return start("04_train", **{**GOOD, "output_dir": str(tmp_path / "course"), **changes})

    return begin


def test_good_parameters_are_kept_and_told_in_one_line(begin, tmp_path, capsys):
    run = begin(score_threshold=0.3)
    assert run.data_dir == ROOT / "data" / "wall_cracks"
    assert run.output_dir == tmp_path / "course"
    line = capsys.readouterr().out
    assert line.startswith("04_train: profile tiny, seed 42, torch ")
    assert line.count("\n") == 1
    assert not run.output_dir.exists()


@pytest.mark.parametrize("folder", [".", "notebooks", "tests"])
def test_defaults_mean_the_same_wherever_the_kernel_runs(begin, monkeypatch, folder):
    monkeypatch.chdir(ROOT / folder)
    run = begin(data_dir="../data/wall_cracks", output_dir="../runs/course")
    assert run.data_dir == ROOT / "data" / "wall_cracks"
    assert run.output_dir == ROOT / "runs" / "course"


def test_folder_is_relative_to_the_repository(begin, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert begin(output_dir="runs/seed7").output_dir == ROOT / "runs" / "seed7"


@pytest.mark.parametrize("below", ["", "course"])
def test_output_folder_that_is_a_file_is_refused(begin, tmp_path, below):
    (tmp_path / "taken").write_text("something of yours")
    folder = tmp_path / "taken" / below
    with pytest.raises(InputError, match=r"output_dir is .*taken is a file"):
        begin(output_dir=str(folder))
    assert (tmp_path / "taken").read_text() == "something of yours"


def test_output_folder_that_becomes_a_file_is_one_line(begin, tmp_path):
    run = begin()
    (tmp_path / "course").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        run.save_results({})


def test_seed_is_set(begin):
    draws = []
    for _ in range(2):
        begin(seed=7)
        draws.append((torch.rand(1).item(), np.random.rand()))  # noqa: NPY002
    assert draws[0] == draws[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("score_threshold", 1.5),
        ("score_threshold", -0.01),
        ("score_threshold", float("nan")),
        ("score_threshold", "0.3"),
        ("seed", -1),
        ("seed", 2**32),
        ("seed", 1.0),
        ("seed", True),
        ("seed", "42"),
        ("fast_run", "False"),
        ("fast_run", 1),
        ("profile", "giant"),
        ("profile", None),
        ("data_dir", "data/no_such_folder"),
        ("data_dir", 3),
        ("output_dir", None),
    ],
)
def test_impossible_value_is_refused_by_name(begin, name, value):
    with pytest.raises(InputError) as refusal:
        begin(**{name: value})
    assert name in str(refusal.value)
    assert str(value) in str(refusal.value)
    assert refusal.value.fix


@pytest.mark.parametrize("value", [0, 0.0, 0.99, 1])
def test_ends_of_the_range_are_allowed(begin, value):
    begin(score_threshold=value)


def test_config_carries_the_parameters(begin):
    run = begin(seed=7)
    config = run.config("crack_detection", "lora.rank=4")
    assert config.data.data_dir == str(run.data_dir)
    assert config.training.seed == 7
    assert config.lora.rank == 4
    assert config.model.name == "data/tiny_sam3"


def test_slow_run_trains_all_epochs(begin):
    fast, slow = (begin(fast_run=fast).config("crack_detection") for fast in (True, False))
    assert fast.scale.num_epochs < slow.scale.num_epochs == slow.scale.warmup_steps == 1.0


def test_results_are_written_as_json(begin, tmp_path):
    path = begin().save_results(
        {"AP50": np.float32(0.5), "steps": torch.tensor(3), "name": "crack"}
    )
    assert path == tmp_path / "course" / "04_train" / "results.json"
    assert json.loads(path.read_text()) == {"AP50": 0.5, "steps": 3, "name": "crack"}


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_results_that_json_cannot_hold_are_refused(begin, value):
    with pytest.raises((ValueError, TypeError)):
        begin().save_results({"AP50": value})


def test_earlier_notebook_is_found_or_named(begin):
    run = begin()
    with pytest.raises(InputError, match=r"notebook 03_text_encoder_lora has not finished"):
        run.folder_of("03_text_encoder_lora")
    run.save_results({})
    assert run.folder_of("04_train") == run.folder


@pytest.fixture
def cells(monkeypatch):
    """Return a function that pretends that some cells were executed before `start`."""

    def executed(*sources):
        shell = SimpleNamespace(user_ns={"In": ["", *sources, "start()"]})
        shell.transform_cell = lambda source: source.replace("%", "")
        monkeypatch.setattr(notebook, "get_ipython", lambda: shell)

    return executed


PARAMETERS = 'seed: int = 42  # of every generator\nepochs = 3\n%pylab\nprofile = "tiny"'


def test_a_misspelt_parameter_of_papermill_is_refused(cells):
    cells(PARAMETERS, "# Parameters\nsede = 7\n")
    with pytest.raises(InputError, match="no parameter 'sede'. Fix: did you mean 'seed'"):
        notebook._refuse_misspelt_parameters()
    cells(PARAMETERS, "# Parameters\nzzz = 7\n")
    with pytest.raises(InputError, match="one of seed, epochs, profile"):
        notebook._refuse_misspelt_parameters()


def test_known_parameters_and_cells_of_a_person_are_accepted(cells):
    cells(PARAMETERS, "# Parameters\nseed = 7\nepochs: int = 1\n")
    notebook._refuse_misspelt_parameters()
    cells(PARAMETERS, "own = 7")
    notebook._refuse_misspelt_parameters()
