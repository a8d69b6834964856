"""Run jobs side by side: on the cores of this machine, or on the machines of a Dask cluster.

Workers import this module by name. What takes long to import is imported where it is used.
"""

import logging
import os
import platform
import sys
import tempfile
import threading
import time
from concurrent.futures import CancelledError
from functools import cache, partial

from tqdm import tqdm

from helpers.errors import InputError

CONNECT_SECONDS = 10  # that a scheduler may take to answer
GOES_ON = "run the same command again: it goes on where it was"
START_WORKERS = (
    "start some there with `dask worker ADDRESS --nworkers -1 --nthreads 1 --memory-limit 0`"
)
SAME_THERE = (
    "check out the same commit on that machine, run `make setup` there, "
    "and start its workers again with `--nthreads 1`"
)


def run_jobs(function, jobs, *, description, done=0, workers=None, scheduler=None):
    """Call a function once per job in processes of their own; yield results as they finish.

    Whoever takes a result should write it at once: a kill then loses only what is running. The
    first exception is raised. ``done`` jobs of an earlier attempt count for the bar. ``scheduler``
    is the address of a Dask cluster with the same code; without it there is one worker per core of
    this machine, or one if there is a GPU, unless ``workers`` says otherwise.
    """
    if scheduler:
        results = _on_cluster(function, jobs, scheduler)
    else:
        results = _on_cores(function, jobs, workers)
    bar = {"initial": done, "total": done + len(jobs), "unit": "run", "file": sys.stderr}
    yield from tqdm(results, desc=description, **bar)


def _on_cores(function, jobs, workers):
    """Yield results of worker processes on this machine."""
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    from helpers.environment import device

    workers = workers or (1 if device()["device"] != "cpu" else os.cpu_count() or 1)
    # inner_max_num_threads: one torch thread per worker, several slow one another down.
    with joblib.parallel_config("loky", n_jobs=workers, inner_max_num_threads=1):
        pool = joblib.Parallel(return_as="generator_unordered", batch_size=1)
        results = pool(joblib.delayed(_in_worker)(os.getpid(), function, job) for job in jobs)
        try:
            yield from results
        except TerminatedWorkerError as error:
            raise InputError(
                "a worker process was killed, perhaps for want of memory",
                fix="run the same command again with fewer --workers: it goes on where it was",
            ) from error


def _in_worker(parent, function, job):
    """Call a function in a worker process, or, with a single worker, in the parent itself."""
    if os.getpid() != parent:
        _prepare_worker(parent)
    return function(*job)


@cache
def _prepare_worker(parent):
    """Set a worker up, once: one torch thread, no chatter, and no life beyond that of its parent."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    # loky ends idle workers, but not those in the middle of a job when their parent was killed.
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True).start()


def _end_with_parent(parent):
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _on_cluster(function, jobs, address):
    """Yield results of the workers of a Dask cluster, which does the jobs of a lost worker again."""
    if not jobs:
        return
    try:
        from distributed import KilledWorker, as_completed
    except ImportError as error:
        raise InputError("Dask is not installed here", fix="run `make setup`") from error

    with _connection(address) as client:
        expected = machine_facts()
        _check_workers(client, address, expected)
        call = partial(_in_cluster, machine_facts, expected, function)
        try:
            # pure=False: equal jobs are different runs.
            for future in as_completed(client.map(call, jobs, key="run", pure=False)):
                result = future.result()
                future.release()  # or the job is done again if its worker is lost later
                yield result
        except KilledWorker as error:
            message = "one run ended several workers, perhaps for want of memory"
            raise InputError(message, where=address, fix=GOES_ON) from error
        except CancelledError as error:
            raise InputError("the scheduler is gone", where=address, fix=GOES_ON) from error


def _connection(address):
    """Return a client of the cluster."""
    from distributed import Client

    try:
        try:
            return Client(address, timeout=CONNECT_SECONDS)
        except AssertionError:  # its thread had not started in ten seconds: the machine is busy
            return Client(address, timeout=CONNECT_SECONDS)
    except (OSError, ValueError) as error:
        fix = "start one with `dask scheduler` and give the address that it prints"
        message = f"no Dask scheduler answers there ({error})"
        raise InputError(message, where=address, fix=fix) from error


def _check_workers(client, address, expected):
    """Refuse a cluster that has no worker, or one that differs from this machine."""
    threads = client.nthreads()
    if not threads:
        raise InputError("the cluster has no worker", where=address, fix=START_WORKERS)
    try:
        facts = client.run(machine_facts, workers=list(threads))
    except Exception as error:  # Dask wraps what a worker without this code says
        message = f"a worker cannot run this code ({error})"
        raise InputError(message, where=address, fix=SAME_THERE) from error
    for worker, found in facts.items():
        _refuse_difference(worker, threads[worker], found, expected)


def _refuse_difference(worker, threads, found, expected):
    """Refuse a worker with other code or versions, or with threads that share their random draws."""
    found, expected = found | {"threads": threads}, expected | {"threads": 1}
    differing = [name for name in sorted(found | expected) if found.get(name) != expected.get(name)]
    if differing:
        listed = [f"{name} {found.get(name)} instead of {expected.get(name)}" for name in differing]
        raise InputError(f"has {', '.join(listed)}", where=f"worker {worker}", fix=SAME_THERE)


@cache
def machine_facts():
    """Return what must be the same on all machines, by name.

    It is kept, as code that was imported is: a later checkout does not change a running worker.
    """
    from packaging.version import Version

    from data.experiments.cells import code_version
    from helpers.environment import report

    installed = report()["installed"].dropna()
    versions = {name: Version(version).public for name, version in installed.items()}
    return {"code": code_version(), "Python": platform.python_version(), **versions}


def _in_cluster(facts, expected, function, job):
    """Call a function on a worker of the cluster, which may have joined after the first check."""
    from distributed import get_worker

    worker = get_worker()
    _refuse_difference(worker.address, worker.state.nthreads, facts(), expected)
    # Dask removes this folder when the worker has ended, also if it was killed.
    tempfile.tempdir = worker.local_directory
    return function(*job)
