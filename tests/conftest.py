"""What all tests share: no window for figures, notebooks first, and one trained run.

The fixtures without a copy in their name are read-only: all workers of pytest-xdist use the same
files, which are compared at the end.
"""

import gc
import hashlib
import shutil

import matplotlib
import pytest
import torch
from filelock import FileLock
from tiny_random import SHARED_RUN, save_tiny_base, tiny_run_config, write_dataset
from xdist.scheduler import LoadFileScheduling

from helpers.train.run import METRICS_FILE, load_run
from helpers.train.training import train

matplotlib.use("agg")  # not by MPLBACKEND, which the kernels of the notebook tests would inherit


APART = ("tests/test_notebooks_run.py", "tests/test_course.py", "tests/test_lab.py")


class NotebooksApart(LoadFileScheduling):
    """Keep a file of tests on one core, and give every test of a notebook to whichever is free."""

    def _split_scope(self, nodeid):
        return nodeid if nodeid.startswith(APART) else super()._split_scope(nodeid)


@pytest.hookimpl(optionalhook=True)  # unknown with `-p no:xdist`
def pytest_xdist_make_scheduler(config, log):
    return NotebooksApart(config, log)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items):
    """Start with the notebooks, so that short files fill the gaps at the end."""
    items.sort(key=lambda item: item.get_closest_marker("notebook") is None)


@pytest.fixture(scope="session", autouse=True)
def exact_convolutions():
    """Let a GPU convolve in float32, always in the same order: tests compare digits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


@pytest.fixture(scope="session", autouse=True)
def imports_are_kept():
    """Spare every collection of garbage the millions of objects that the imports leave for good."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def in_place(folder, make):
    """Let the first worker make a folder, which appears complete or not at all, and return it."""
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            make(folder.with_suffix(".new"))
            folder.with_suffix(".new").rename(folder)
    return folder


def contents(folder):
    """Return the hash of every file in a folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory, request):
    """Return the folder of this session, the same in all workers."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if hasattr(request.config, "workerinput") else folder


@pytest.fixture(scope="session")
def base(shared_folder):
    """Return the folder of the random base."""
    return in_place(shared_folder / "tiny_random_base", save_tiny_base)


@pytest.fixture(scope="session")
def data_dir(shared_folder):
    """Return a dataset of 6 + 3 + 3 pictures, see `tiny_random.write_dataset`."""
    return in_place(shared_folder / "tiny_random_data", write_dataset)


@pytest.fixture(scope="session")
def config(base, data_dir, shared_folder):
    """Return the config of the shared run: two epochs of three steps, a threshold that some exceed."""
    output = ("output.output_dir", shared_folder / "tiny_random_run")
    return tiny_run_config(base, data_dir, output, *SHARED_RUN)


@pytest.fixture(scope="session")
def run_folder(base, data_dir, config, shared_folder):
    """Return the folder of a finished run, trained once for all tests. Damage a `run_copy` only."""
    folder = shared_folder / "tiny_random_run"
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / METRICS_FILE).exists():
            train(config, progress=False)
    shared = (base, data_dir, folder)
    before = [contents(part) for part in shared]
    yield folder
    assert [contents(part) for part in shared] == before, "a test changed what all tests share"


@pytest.fixture(scope="session")
def run(run_folder):
    """Return the shared run as `helpers.train.run.RunResult`, loaded once per worker."""
    return load_run(run_folder)


@pytest.fixture
def run_copy(run_folder, tmp_path):
    """Return the folder of a copy of the shared run, for a test to damage."""
    return shutil.copytree(run_folder, tmp_path / "run_copy")


@pytest.fixture
def data_copy(data_dir, tmp_path):
    """Return the folder of a copy of the shared dataset, for a test to damage."""
    return shutil.copytree(data_dir, tmp_path / "data_copy")


@pytest.fixture(scope="session")
def browser():
    """Return the system's Chromium, driven by Playwright, which `make browser` installs."""
    api = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
