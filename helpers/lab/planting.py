"""Plant a fault where it lives, run the real pipeline with it, and take it back."""

from __future__ import annotations

import importlib
import pkgutil
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import helpers
from helpers.causes import CAUSES
from helpers.config import GuardSection, load_config
from helpers.files import CONFIGS, WALL_CRACKS
from helpers.train.run import RUN_CONFIG
from helpers.train.training import train

GUARDS_OFF = tuple(f"guards.{name}=false" for name in GuardSection.model_fields)
LAB_SETTINGS = ("training.batch_size=4", "training.gradient_accumulation_steps=1")
"""On top of ``crack_detection_config.yaml`` and the profile: the healthy run of the laboratory."""
LAB_EPOCHS_SETTING = ("scale.num_epochs=0.1",)
"""Five epochs on the embedded base, so that a fault is judged within a minute."""
DATA_FOLDER, RUN_FOLDER = "data", "run"


@dataclass(frozen=True)
class Fault:
    """One small fault, planted without a copy of the pipeline.

    Attributes
    ----------
    cause : str
        Key of `helpers.causes.CAUSES`: what the diagnosis has to say; its row and its cure.
    what : str
        What is done, in one sentence.
    signature : str
        What a person sees of it from outside.
    settings : tuple of str
        Config overrides ``section.key=value``.
    spoil_data : callable, optional
        Takes the folder of a copy of the dataset and changes the files in it.
    patch : callable, optional
        Returns a context manager that perturbs functions of the pipeline while the run is trained
        and examined.
    spoil_run : callable, optional
        Takes the folder of a finished run and changes the files in it.
    trains : bool
        False for a fault that only needs a copy of a healthy run; one that spoils data spoils them
        after the training.
    """

    cause: str
    what: str
    signature: str
    settings: tuple[str, ...] = ()
    spoil_data: Callable[[Path], None] | None = None
    patch: Callable[[], AbstractContextManager] | None = None
    spoil_run: Callable[[Path], None] | None = None
    trains: bool = True

    @property
    def row(self):
        """str: row of the catalogue."""
        return CAUSES[self.cause].row

    @property
    def cure(self):
        """str: what mends it."""
        return CAUSES[self.cause].fix


@contextmanager
def planted(fault, folder, *, healthy=None, settings=(), data_dir=WALL_CRACKS, profile="tiny"):
    """Make a run with a fault; while the block lasts, the fault is in the code too.

    Parameters
    ----------
    fault : Fault or None
        None makes a healthy run.
    folder : os.PathLike
        Replaced; gets ``run`` and, if the dataset is spoiled, ``data``.
    healthy : os.PathLike, optional
        A healthy run folder, copied for a fault that need not train.
    settings : sequence of str
        Config overrides, before those of the fault.
    data_dir : os.PathLike
        Dataset to train on, or to copy and spoil.
    profile : str

    Yields
    ------
    pathlib.Path
        The run folder. Training may have been stopped by the fault: then the run is unfinished.
    """
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run = folder / RUN_FOLDER
    patch = nullcontext() if fault is None or fault.patch is None else fault.patch()
    with patch:
        if fault is not None and not fault.trains:
            shutil.copytree(healthy, run)
            if fault.spoil_data is not None:
                _name_dataset(run, _spoiled_data(fault, folder, data_dir))
        else:
            _train(fault, run, _spoiled_data(fault, folder, data_dir), settings, profile)
        if fault is not None and fault.spoil_run is not None:
            fault.spoil_run(run)
        yield run


def _spoiled_data(fault, folder, data_dir):
    """Return the dataset to train on: a spoiled copy, or the original."""
    if fault is None or fault.spoil_data is None:
        return Path(data_dir)
    shutil.copytree(data_dir, folder / DATA_FOLDER)
    fault.spoil_data(folder / DATA_FOLDER)
    return folder / DATA_FOLDER


def _name_dataset(run, data_dir):
    """Let the config of a run name another dataset."""
    path = run / RUN_CONFIG
    load_config(path, overrides={"data.data_dir": data_dir}).save(path)


def _train(fault, run, data_dir, settings, profile):
    """Train with everything off that would refuse the fault."""
    own = () if fault is None else fault.settings
    overrides = [("data.data_dir", data_dir), *LAB_SETTINGS, *settings, *GUARDS_OFF, *own]
    path = CONFIGS / "crack_detection_config.yaml"
    config = load_config(path, profile, overrides)
    try:
        train(config, output_dir=run, overwrite=True, allow_empty=True, progress=False)
    except Exception:
        if fault is None:
            raise
        # A fault may well stop the training; what it left is what the diagnosis gets to see.


@contextmanager
def replaced(name, new):
    """Replace a function of the package in every module that imported it.

    Parameters
    ----------
    name : str
        ``"data.coco.read_split"``: module and function, without ``helpers.``.
    new : callable
        Takes its place. One that wraps the original has to look it up before.

    Yields
    ------
    callable
        The original.
    """
    module_name, _, function_name = name.rpartition(".")
    original = getattr(importlib.import_module(f"helpers.{module_name}"), function_name)
    places = []
    for info in pkgutil.walk_packages(helpers.__path__, "helpers."):
        module = importlib.import_module(info.name)
        places += [(module, key) for key, value in vars(module).items() if value is original]
    for module, key in places:
        setattr(module, key, new)
    try:
        yield original
    finally:
        for module, key in places:
            setattr(module, key, original)


@contextmanager
def replaced_method(owner, name, new):
    """Replace a method of a class for the time of the block; yields the original function."""
    original = owner.__dict__[name]
    setattr(owner, name, new)
    try:
        yield original
    finally:
        setattr(owner, name, original)
