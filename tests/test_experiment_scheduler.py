"""The experiment on a Dask cluster; its workers import this file, so the imports are few."""

import os
import signal
import sys
import threading
import time
import uuid
from contextlib import contextmanager
from dataclasses import dataclass

import dask
import pytest
from distributed import Client, LocalCluster

from data.experiments import jobs
from data.experiments.jobs import machine_facts, run_jobs
from helpers.errors import InputError

LAST = 8


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """Return a cluster of two worker processes."""
    quick_start = {"distributed.worker.multiprocessing-method": "forkserver"}
    with (
        dask.config.set(quick_start),
        local_cluster(tmp_path_factory, 2, 1, host="127.0.0.1") as cluster,
    ):
        yield cluster


@pytest.fixture
def threads(tmp_path_factory):
    """Return a cluster in this process, so far without a worker."""
    with local_cluster(tmp_path_factory, 0, 2, processes=False) as cluster:
        yield cluster


@contextmanager
def local_cluster(factory, workers, threads, **options):
    """Yield a cluster with a folder and a port that nobody else has."""
    options |= {"n_workers": workers, "threads_per_worker": threads}
    with (
        dask.config.set({"temporary-directory": str(factory.mktemp("dask"))}),
        LocalCluster(dashboard_address="127.0.0.1:0", **options) as cluster,
    ):
        yield cluster


@pytest.fixture(autouse=True)
def facts(monkeypatch):
    monkeypatch.setattr(jobs, "machine_facts", same_everywhere)


def same_everywhere():
    """In place of the true facts, for which every worker would import everything."""
    return {"code": "abc", "Python": "3"}


def another_in_every_process():
    return {"code": str(os.getpid())}


calls = []


def another_when_asked_again():
    calls.append(1)
    return {"code": str(len(calls))}


def quick_row(number, folder):
    """Note what was done where; the last of the first attempt waits to be killed."""
    if number == LAST and not (folder / "victim").exists():
        (folder / "victim.new").write_text(str(os.getpid()))
        (folder / "victim.new").rename(folder / "victim")
        time.sleep(90)
    time.sleep(0.05)
    (folder / f"done {number} {os.getpid()} {uuid.uuid4()}").touch()
    return number


@dataclass(frozen=True)
class QuickCell:
    """In place of `data.experiments.cells.Cell`, which takes long to import."""

    seed: int

    @property
    def name(self):
        return f"seed-{self.seed}"

    def config(self, profile, data_dir):
        return self

    def fingerprint(self):
        return f"hash {self.seed}"


def quick_cell(cell, profile, data_dir, folder):
    """In place of `make._run_named`; a worker on another machine has no folder of the parent."""
    assert folder is None
    row = {"seed": quick_row(cell.seed, data_dir), "config_hash": cell.fingerprint()}
    return cell.name, [row]


def what_was_done(folder):
    """Return a sorted pair for each finished call, its number and the process."""
    names = [path.name.split() for path in folder.glob("done *")]
    return sorted((int(number), int(pid)) for _, number, pid, _ in names)


def kill_when_others_are_done(folder, rows):
    deadline = time.monotonic() + 60
    while not (folder / "victim").exists() or len(list(rows.glob("*.json"))) < LAST - 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(int((folder / "victim").read_text()), signal.SIGKILL)


def test_a_killed_worker_loses_no_row_and_a_resumed_run_repeats_nothing(
    tmp_path, monkeypatch, cluster
):
    from data.experiments import make

    monkeypatch.setitem(make.DESIGNS, "causes", lambda seeds: [QuickCell(seed) for seed in seeds])
    monkeypatch.setattr(make, "_run_named", quick_cell)
    monkeypatch.setattr(make, "run_bases", lambda *_: [])
    notes, output = tmp_path / "notes", tmp_path / "out"
    notes.mkdir()
    seeds = list(range(1, LAST + 1))
    options = {"profile": "tiny", "data_dir": notes, "seeds": seeds}
    options["scheduler"] = cluster.scheduler_address

    killer = threading.Thread(target=kill_when_others_are_done, args=(notes, output / "causes"))
    killer.start()
    table = make.run_experiment("causes", output, **options)
    killer.join()
    assert table["seed"].tolist() == seeds
    done, victim = what_was_done(notes), int((notes / "victim").read_text())
    assert [number for number, _ in done] == seeds
    assert victim in [process for _, process in done], "the victim had not finished any row"
    assert dict(done)[LAST] != victim, "nothing was killed"

    unreachable = options | {"scheduler": "tcp://127.0.0.1:1"}
    assert make.run_experiment("causes", output, **unreachable).equals(table)
    (output / "causes" / "seed-3.json").unlink()
    assert make.run_experiment("causes", output, **options).equals(table)
    assert [number for number, _ in what_was_done(notes)] == sorted([*seeds, 3])


def results(scheduler, function=abs):
    return list(run_jobs(function, [(-1,), (-2,)], description="jobs", scheduler=scheduler))


def test_an_unreachable_scheduler_is_one_line(tmp_path, monkeypatch, capsys):
    from data.experiments import make

    monkeypatch.setattr(jobs, "CONNECT_SECONDS", 1)
    nowhere = "tcp://127.0.0.1:1"
    assert make.main(["--scheduler", nowhere, "--seeds", "1", "--output", str(tmp_path)]) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"error: {nowhere}: no Dask scheduler answers there")
    assert "Fix: start one with `dask scheduler`" in line
    with pytest.raises(InputError, match="missing port number"):
        results("nowhere")


def test_a_machine_too_busy_to_start_a_thread_is_asked_again(monkeypatch, cluster):
    attempts = []

    def late_client(*arguments, **options):
        attempts.append(arguments)
        assert len(attempts) > 1
        return Client(*arguments, **options)

    monkeypatch.setattr("distributed.Client", late_client)
    assert sorted(results(cluster.scheduler_address)) == [1, 2]
    assert len(attempts) == 2


def test_a_worker_with_other_code_is_refused(monkeypatch, cluster):
    monkeypatch.setattr(jobs, "machine_facts", another_in_every_process)
    with pytest.raises(InputError, match=rf"has code \d+ instead of {os.getpid()}\. ") as caught:
        results(cluster.scheduler_address)
    assert str(caught.value).startswith("worker tcp://127.0.0.1:")
    assert "check out the same commit" in str(caught.value)


def test_a_worker_without_the_code_is_refused(monkeypatch, cluster):
    monkeypatch.setattr(jobs, "machine_facts", Facts(os.getpid()))
    with pytest.raises(InputError, match="a worker cannot run this code .*no module data"):
        results(cluster.scheduler_address)


@dataclass(frozen=True)
class Facts:
    parent: int

    def __call__(self):
        if os.getpid() != self.parent:
            raise ModuleNotFoundError("no module data")
        return {}


def test_a_worker_that_joins_later_with_other_code_is_refused(monkeypatch, cluster):
    monkeypatch.setattr(jobs, "machine_facts", another_when_asked_again)
    with pytest.raises(InputError, match=r"has code [23] instead of 1\. "):
        results(cluster.scheduler_address)


def test_a_cluster_without_workers_or_with_threads_is_refused(threads):
    with pytest.raises(InputError, match="the cluster has no worker"):
        results(threads.scheduler_address)
    threads.scale(1)
    with Client(threads) as client:
        client.wait_for_workers(1)
    with pytest.raises(InputError, match=r"has threads 2 instead of 1\. "):
        results(threads.scheduler_address)


def test_an_error_of_a_job_is_raised(cluster):
    assert sorted(results(cluster.scheduler_address)) == [1, 2]
    with pytest.raises(ZeroDivisionError):
        results(cluster.scheduler_address, function=one_over_nothing)


def one_over_nothing(number):
    return number / 0


def test_without_dask_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(InputError, match="Dask is not installed") as caught:
        results("tcp://127.0.0.1:1")
    assert "make setup" in caught.value.fix


def test_machines_are_compared_by_code_and_versions():
    from data.experiments.cells import code_version

    facts = machine_facts()
    assert facts["code"] == code_version()
    assert facts["torch"].startswith("2.")
    assert "+" not in facts["torch"], "a build for a GPU is the same version"
    assert {"Python", "transformers", "peft"} <= facts.keys()


def test_workers_and_scheduler_exclude_each_other(capsys):
    from data.experiments import make

    with pytest.raises(SystemExit):
        make.main(["--workers", "2", "--scheduler", "tcp://127.0.0.1:1"])
    assert "not allowed with" in capsys.readouterr().err


def test_a_job_that_ends_its_workers_is_one_line(monkeypatch, cluster):
    monkeypatch.setattr(cluster.scheduler, "allowed_failures", 0)
    with pytest.raises(InputError, match="one run ended several workers") as caught:
        results(cluster.scheduler_address, function=end_worker)
    assert "goes on where it was" in caught.value.fix


def end_worker(number):
    os.kill(os.getpid(), signal.SIGKILL)
