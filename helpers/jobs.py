"""Run many independent jobs on all cores, one thread each, ending with their parent."""

from __future__ import annotations

import logging
import os
import sys
import threading
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import connection, get_context, parent_process

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from helpers.errors import InputError


def run_jobs(function, jobs, *, description, done=0, workers=None):
    """Call a function once per job in processes of their own, with a progress bar.

    Parameters
    ----------
    function : callable
        Of the top level of a module; writes its result itself, so that a kill loses only what is
        running.
    jobs : sequence of tuple
        Arguments of each call.
    description : str
        For the bar.
    done : int
        Jobs finished in an earlier attempt, for the bar.
    workers : int, optional
        Processes; by default one per core, or one if there is a GPU.

    Yields
    ------
    object
        What the calls return, as they finish. The first exception is raised, and what has not
        started is not started.
    """
    workers = workers or (1 if torch.cuda.is_available() else os.cpu_count() or 1)
    bar = {"initial": done, "total": done + len(jobs), "unit": "run", "file": sys.stderr}
    # Forking a process in which torch has started threads can hang, so each worker starts anew.
    with ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_prepare_worker
    ) as pool:
        futures = [pool.submit(function, *job) for job in jobs]
        try:
            for future in tqdm(as_completed(futures), desc=description, **bar):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def exit_status(command):
    """Run a long command that can be interrupted and started again.

    Parameters
    ----------
    command : callable
        Without arguments; returns an exit status.

    Returns
    -------
    int
        That status, 2 for unusable input, or 130 if interrupted.
    """
    try:
        return command()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where it was", file=sys.stderr)
        return 130


def _prepare_worker():
    """Set a worker process up: one thread, no chatter, and no life beyond that of its parent."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    disable_progress_bar()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent():
    """Wait until the parent process is gone, killed perhaps, and end this one."""
    connection.wait([parent_process().sentinel])
    os._exit(1)
