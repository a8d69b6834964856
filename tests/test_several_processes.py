"""Two processes on the CPU do what one process does with twice the batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from tiny_random import save_tiny_base
from two_processes import gradients_of_an_epoch, interrupted_run, run_config

from helpers.errors import InputError
from helpers.files import ROOT, read_json, write_json, write_text
from helpers.train.run import read_history
from helpers.train.training import train


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Return a random base that draws nothing while training."""
    folder = save_tiny_base(tmp_path_factory.mktemp("base"))
    content = read_json(folder / "config.json", fix="")
    for part in ("detr_encoder_config", "detr_decoder_config"):
        content[part]["dropout"] = 0.0
    write_json(folder / "config.json", content)
    return folder


@pytest.fixture(scope="module")
def two(base, data_dir, tmp_path_factory):
    """Return the folder that `two_processes` wrote, run by ``accelerate launch``."""
    folder = tmp_path_factory.mktemp("two")
    launch(ROOT / "tests" / "two_processes.py", base, data_dir, folder)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(base, data_dir, tmp_path_factory):
    return train(run_config(base, data_dir, 2), output_dir=tmp_path_factory.mktemp("whole") / "run")


def launch(*arguments):
    """Run something in two processes without a GPU; returns its stdout."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_processes", "2", "--main_process_port", "0", *map(str, arguments)]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    settings = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **paths}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def losses(history):
    return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 4), (2, 2), (3, 2)])
def test_accumulated_gradients_are_those_of_one_batch(
    base, data_dir, tmp_path, batch_size, accumulation
):
    size = batch_size * accumulation
    whole, whole_log = gradients_of_an_epoch(base, data_dir, tmp_path / "whole", size)
    parts, parts_log = gradients_of_an_epoch(
        base, data_dir, tmp_path / "parts", batch_size, accumulation
    )
    assert len(whole) == len(parts) == -(-6 // size)  # the last step of 1 x 4 has two batches
    for one, other in zip(whole, parts, strict=True):
        for name, gradient in one.items():
            assert gradient.norm() > 0
            assert (gradient - other[name]).norm() < 1e-4 * gradient.norm(), name
    assert losses(parts_log) == pytest.approx(losses(whole_log), rel=1e-5)


def test_gradients_are_those_of_one_process_with_twice_the_batch(two, base, data_dir, tmp_path):
    steps, history = gradients_of_an_epoch(base, data_dir, tmp_path / "one", 2)
    other = torch.load(two / "gradients.pt")
    assert len(steps) == len(other["steps"]) == 3
    for ours, theirs in zip(steps, other["steps"], strict=True):
        assert ours.keys() == theirs.keys()
        for name, gradient in ours.items():
            assert gradient.norm() > 0
            assert (gradient.cpu() - theirs[name]).norm() < 1e-4 * gradient.cpu().norm(), name
    assert losses(other["history"]) == pytest.approx(losses(history), rel=1e-5)
    # The mean over the rows of a process is another in the step whose images differ in prompts.
    means = [
        [entry["train_query_logit_mean"] for entry in log if "loss" in entry]
        for log in (history, other["history"])
    ]
    differing = [abs(a - b) > 1e-3 for a, b in zip(*means, strict=True)]
    assert sum(differing) == 1


def test_one_process_resumes_a_checkpoint_of_two(two, base, data_dir, uninterrupted):
    with pytest.raises(InputError, match="x processes was 2 and is 1"):
        train(run_config(base, data_dir, 1), output_dir=two / "run", resume=True)
    resumed = train(run_config(base, data_dir, 2), output_dir=two / "run", resume=True)
    assert resumed.metrics["steps"] == uninterrupted.metrics["steps"] == 6
    assert losses(resumed.history) == pytest.approx(losses(uninterrupted.history), rel=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the processes resume on a CPU")
def test_two_processes_resume_a_checkpoint_of_one(base, data_dir, uninterrupted, tmp_path):
    folder = tmp_path / "run"
    interrupted_run(base, data_dir, folder, 2)
    assert not (folder / "metrics.json").exists()
    config = write_text(tmp_path / "config.yaml", run_config(base, data_dir, 1).to_yaml())
    stdout = launch(
        "-m", "helpers", "train", "--config", config, "--output", folder, "--resume", "--json"
    )
    assert json.loads(stdout)["metrics"]["steps"] == 6
    resumed = losses(read_history(folder))
    assert resumed == pytest.approx(losses(uninterrupted.history), rel=1e-3)
