"""The first lines of every notebook: validate the parameters, set the seed, keep results.

papermill neither checks the type of a parameter nor its range, and it passes a misread value on
as text. `start` refuses such a value before anything is computed with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import disable_progress_bars
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from helpers.config import load_config
from helpers.environment import require, versions_line
from helpers.errors import InputError, check_probability
from helpers.files import CONFIGS, ROOT, resolve

RESULTS_FILE = "results.json"
_LARGEST_SEED = 2**32 - 1
_NOTEBOOKS = ROOT / "notebooks"


@dataclass(frozen=True)
class NotebookRun:
    """The validated parameters of one notebook and the places it reads and writes.

    Attributes
    ----------
    name : str
        Stem of the notebook, for example ``"04_train"``.
    profile : str
        Overlay of the configs: ``"tiny"``, ``"sam3"`` or a path.
    data_dir : pathlib.Path
        Folder of the dataset, absolute.
    seed : int
        Seed of every random generator.
    output_dir : pathlib.Path
        Folder that all notebooks of one pass through the course share, absolute.
    fast_run : bool
        True keeps the schedule of the profile, False runs all epochs of the config.
    """

    name: str
    profile: str
    data_dir: Path
    seed: int
    output_dir: Path
    fast_run: bool

    @property
    def folder(self):
        """Folder for what this notebook writes; made when it is first asked for."""
        folder = self.output_dir / self.name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def folder_of(self, name):
        """Return the folder an earlier notebook of this course wrote.

        Parameters
        ----------
        name : str
            Stem of that notebook.

        Returns
        -------
        pathlib.Path

        Raises
        ------
        InputError
            When that notebook has not finished with this ``output_dir``.
        """
        folder = self.output_dir / name
        if not (folder / RESULTS_FILE).is_file():
            raise InputError(
                f"notebook {name} has not finished with this output_dir",
                where=folder,
                fix=f"run notebooks/{name}.ipynb first, or `make course` for all of them",
            )
        return folder

    def config(self, name, *overrides):
        """Load a config with the profile, the data and the seed of this notebook.

        Parameters
        ----------
        name : str
            ``"full_lora"`` or ``"crack_detection"``: a file ``configs/<name>_config.yaml``.
        *overrides : str or (str, object)
            Further settings such as ``"lora.rank=4"`` or ``("lora.rank", 4)``; they win over
            everything else.

        Returns
        -------
        helpers.config.Config
        """
        settings = [("data.data_dir", self.data_dir), ("training.seed", self.seed)]
        if not self.fast_run:
            settings += [("scale.num_epochs", 1.0), ("scale.warmup_steps", 1.0)]
        path = CONFIGS / f"{name}_config.yaml"
        return load_config(path, profile=self.profile, overrides=(*settings, *overrides))

    def save_results(self, results):
        """Write the headline numbers of this notebook, which the summary of the course collects.

        Parameters
        ----------
        results : dict
            Names to numbers, text, or lists and dicts of them; NumPy and torch scalars are
            converted. Not-a-number is refused.

        Returns
        -------
        pathlib.Path
            ``<output_dir>/<name>/results.json``.
        """
        text = json.dumps(results, indent=2, allow_nan=False, default=_plain)
        path = self.folder / RESULTS_FILE
        path.write_text(text + "\n", encoding="utf-8")
        return path


def start(name, *, profile, data_dir, seed, output_dir, fast_run, **thresholds):
    """Validate the parameters of a notebook and prepare the run.

    Sets the seed of Python, NumPy and torch, silences progress bars and notices of the
    libraries, and prints one line that is the same on every machine with the same lock.

    Parameters
    ----------
    name : str
        Stem of the notebook.
    profile : str
        Name of a file in ``configs/profiles/``, or a path to one.
    data_dir : str
        Folder of the dataset; relative to the current folder, the repository or ``notebooks/``.
    seed : int
        From 0 to 2**32 - 1.
    output_dir : str
        Folder for everything the course writes; made when something is written. A relative one
        that begins with ``..`` is seen from ``notebooks/``, wherever the kernel runs, so that the
        default lies in the repository.
    fast_run : bool
        See `NotebookRun`.
    **thresholds : float
        Probabilities such as ``score_threshold``, each in [0, 1].

    Returns
    -------
    NotebookRun

    Raises
    ------
    InputError
        Naming the parameter, its value and what it has to be.
    """
    require()
    for parameter, value in {
        "profile": profile,
        "data_dir": data_dir,
        "output_dir": output_dir,
    }.items():
        _check_type(parameter, value, str, "text")
    _check_type("fast_run", fast_run, bool, "true or false")
    _check_type("seed", seed, int, "a whole number")
    if not 0 <= seed <= _LARGEST_SEED:
        raise _refusal("seed", seed, f"a whole number from 0 to {_LARGEST_SEED}")
    for parameter, value in thresholds.items():
        check_probability(value, parameter, where="parameters")
    output_folder = _output_folder(output_dir)
    run = NotebookRun(name, profile, _data_folder(data_dir), seed, output_folder, fast_run)
    run.config("crack_detection")  # an unusable profile is reported here, not ten cells later
    set_seed(seed)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    print(f"{name}: profile {profile}, seed {seed}, {versions_line()}")
    return run


def _check_type(name, value, kind, expected):
    """Raise `InputError` unless the value is of the kind; True and False are no numbers."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _refusal(name, value, expected)


def _refusal(name, value, expected):
    """Build the error of an impossible parameter."""
    hint = (
        " (papermill reads numbers after -p and leaves text after -r)"
        if isinstance(value, str)
        else ""
    )
    return InputError(
        f"{name} is {value!r}", where="parameters", fix=f"set {name} to {expected}{hint}"
    )


def _data_folder(data_dir):
    """Return the dataset folder as an absolute path, or say how to get one."""
    places = (resolve(data_dir), _NOTEBOOKS / data_dir)
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise InputError(
            f"data_dir {data_dir!r} is no folder",
            where="parameters",
            fix="name a folder with one folder per split, or run `make data` for data/wall_cracks",
        )
    return folder.resolve()


def _output_folder(output_dir):
    """Return the folder to write to as an absolute path; it need not exist."""
    seen_from_notebooks = Path(output_dir).parts[:1] == ("..",)
    return (_NOTEBOOKS / output_dir if seen_from_notebooks else resolve(output_dir)).resolve()


def _plain(value):
    """Convert a NumPy or torch value to what JSON knows."""
    if isinstance(value, np.ndarray | np.generic | torch.Tensor):
        return value.tolist()
    raise TypeError(f"results hold a {type(value).__name__}, which JSON cannot store")
