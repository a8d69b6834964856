import json

import pytest

from data.benchmarks import measure as bench_module
from data.benchmarks.measure import CASES, bench, bench_figure, bench_table, main, measure
from helpers.files import TINY_BASE

BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module")
def measured():
    return {
        name: measure(case, str(TINY_BASE), "tiny", 0.01)
        for name, case in BY_NAME.items()
        if name != "train, base in half"
    }


def test_what_is_done_less_costs_fewer_operations(measured):
    flops = {name: result["flops"] for name, result in measured.items()}
    assert flops["train, one vision pass"] < flops["train, plain"]
    assert flops["train, checkpointing"] > flops["train, one vision pass"]
    assert flops["train, masks of objects"] < flops["train, checkpointing"]
    assert flops["train, vision frozen, cached"] < flops["train, vision frozen"]
    assert flops["detect, 1 prompt"] < flops["detect, 4 prompts"] < flops["detect, 16 prompts"]
    assert flops["detect, 16 separate passes"] == 16 * flops["detect, 1 prompt"]


def test_saving_the_vision_pass_saves_exactly_the_vision_pass(measured):
    flops = {name: result["flops"] for name, result in measured.items()}
    per_prompt = (flops["detect, 16 prompts"] - flops["detect, 4 prompts"]) / 12
    vision = flops["detect, 1 prompt"] - per_prompt
    saved = flops["detect, 16 separate passes"] - flops["detect, 16 prompts"]
    assert saved == pytest.approx(15 * vision, rel=1e-6)


def test_times_and_memory_are_measured(measured):
    for result in measured.values():
        assert min(result["seconds"]) > 0
        assert result["peak_bytes"] > 1e7  # of tensors alone on a GPU


def test_table_figure_and_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_module, "RUNS", tmp_path)
    main(["--only", "detect, 1 prompt", "--min-seconds", "0.01", "--name", "a test"])
    document = json.loads((tmp_path / "benchmarks" / "a_test.json").read_text())
    assert (tmp_path / "benchmarks" / "a_test.png").is_file()
    (case,) = document["cases"].values()
    assert case["flops_per_second"] == pytest.approx(case["flops"] / case["median_seconds"])
    assert document["device"]["name"]
    assert "detect, 1 prompt" in capsys.readouterr().out


def test_a_case_that_fails_is_reported_and_the_others_go_on(tmp_path):
    cases = [BY_NAME["detect, 1 prompt"]]
    document = bench(str(tmp_path), "tiny", cases=cases, min_seconds=0.01)
    assert "config.json" in document["cases"]["detect, 1 prompt"]["failed"]
    assert "config.json" in bench_table(document).to_string()
    assert bench_figure(document).axes
