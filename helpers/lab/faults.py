"""All faults of the lab by name, and how the script of the lab is run with one.

A fault lies in the files of the dataset, in `helpers.lab.careless`, or in what was saved.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file, save_file

from helpers.diagnose.patient import LivePatient
from helpers.files import DATA, WALL_CRACKS, read_json, write_json
from helpers.lab.careless import AFTER_TRAINING, MISTAKES, WEIGHTS_FILE, Careless
from helpers.lab.spoil import SPOIL_DATA
from helpers.model.lora import CONFIG_FILE as ADAPTER_CONFIG

RUN_FOLDER, DATA_FOLDER = "run", "data"
COARSE_STEP = 0.1


@dataclass(frozen=True)
class Fault:
    """One fault, a row of ``data/faults.csv``."""

    name: str = ""
    what: str = "nothing is done"
    symptom: str = "nothing is seen"  # what a person sees of it from outside
    cause: str = ""  # key of `helpers.causes.CAUSES` that the diagnosis has to name, if it has to
    codes: tuple[str, ...] = ()  # findings of the data check of which it causes at least one
    seen: str = "both"  # "files", "alive" or "both": where it can be seen
    shown_by: str = ""  # what would show it where it cannot be seen

    @property
    def mistakes(self):
        """What `Careless` is told to do wrong."""
        return (self.name,) if self.name in MISTAKES else ()

    @property
    def trains(self):
        """Whether a training is needed: a healthy one will do for what acts after it."""
        return self.name not in SPOIL_SAVED and self.name not in AFTER_TRAINING


HEALTHY = Fault()


def planted(fault, folder, *, healthy=None, data_dir=WALL_CRACKS, **settings):
    """Run a `Careless` with a fault, save it in a folder, and return it; ``error`` may say why not."""
    # `healthy` is a saved training that is taken where the fault acts after it.
    folder = Path(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if fault.name in SPOIL_DATA:
        data_dir = shutil.copytree(data_dir, folder / DATA_FOLDER)
        SPOIL_DATA[fault.name](data_dir)
    script = Careless(fault.mistakes, data_dir=data_dir, **settings)
    try:
        if fault.trains or healthy is None:
            script.train()
        else:
            script.take(healthy)
        script.save(folder / RUN_FOLDER)
        if fault.name in SPOIL_SAVED:
            SPOIL_SAVED[fault.name](folder / RUN_FOLDER)
        script.load(folder / RUN_FOLDER)
    except Exception as error:  # whatever stops a training of somebody else
        if fault == HEALTHY:
            raise
        script.error = f"{type(error).__name__}: {error}"
    return script


def alive(script):
    """Return the script as a patient that is asked in its own kernel."""
    return LivePatient(
        model=script.model,
        processor=script.processor,
        batches=script.batches(),
        loss=script.loss,
        detect=script.detect,
        data_dir=script.data_dir,
        log=script.log or None,
        settings=script.claims(),
    )


def _weights_changed(change):
    """Make a ``spoil_saved`` that writes ``change(key, tensor)`` for each tensor of the adapter."""

    def spoil(folder):
        weights = load_file(folder / WEIGHTS_FILE)
        changed = dict(change(key, tensor) for key, tensor in weights.items())
        save_file(changed, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    return spoil


def _halve_alpha(folder):
    config = read_json(folder / ADAPTER_CONFIG, fix="")
    write_json(folder / ADAPTER_CONFIG, config | {"lora_alpha": config["lora_alpha"] / 2})


def _cut_weights_off(folder):
    path = folder / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


SPOIL_SAVED: dict[str, Callable] = {
    "keys with prefix": _weights_changed(lambda key, tensor: (f"module.{key}", tensor)),
    "keys of another version": _weights_changed(
        lambda key, tensor: (key.replace("mask_decoder", "mask_head"), tensor)
    ),
    "alpha halved": _halve_alpha,
    "weights rounded": _weights_changed(
        lambda key, tensor: (key, (tensor / COARSE_STEP).round() * COARSE_STEP)
    ),
    "numbers lost": _weights_changed(lambda key, tensor: (key, tensor * float("nan"))),
    "file cut off": _cut_weights_off,
}
"""Faults of what was saved."""
_TABLE = pd.read_csv(DATA / "faults.csv", dtype=str, keep_default_na=False)
_ROWS = _TABLE.rename(columns={"fault": "name"}).drop(columns="lesson").to_dict("records")
_FAULTS = {row["name"]: Fault(**row | {"codes": tuple(row["codes"].split())}) for row in _ROWS}
FAULTS = {name: fault for name, fault in _FAULTS.items() if fault.cause}
"""Name to fault, of those that the diagnosis has to name."""
LESSON_FAULTS = {name: _FAULTS[name] for name in _TABLE["fault"][_TABLE["lesson"] == "01"]}
"""What lesson 01 plants in copies. The last one agrees with itself in every number: only eyes find it."""
