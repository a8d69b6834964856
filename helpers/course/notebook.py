"""The first lines of every notebook: validate the parameters, set the seed, keep results.

papermill checks neither the type of a parameter nor its range, and it passes a misread value on as
text. `start` refuses such a value before anything is computed with it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from huggingface_hub.utils import disable_progress_bars
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from transformers import set_seed
from transformers.utils import logging as transformers_logging

from helpers.config import load_config
from helpers.environment import require, versions_line
from helpers.errors import InputError
from helpers.files import CONFIGS, ROOT, resolve, write_text

NOTEBOOKS = ROOT / "notebooks"
RESULTS_FILE = "results.json"


def _data_folder(data_dir):
    """Return the dataset folder as an absolute path, or say how to get one."""
    places = (resolve(data_dir), NOTEBOOKS / data_dir) if isinstance(data_dir, str) else ()
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise InputError(
            f"data_dir is {data_dir!r}, which is no folder",
            where="parameters",
            fix="name a folder with one folder per split, or run `make data` for data/wall_cracks",
        )
    return folder.resolve()


def _output_folder(output_dir):
    """Return the folder to write to as an absolute path; it need not exist."""
    if not isinstance(output_dir, str):
        raise ValueError("Input should be text")
    is_seen_from_notebooks = Path(output_dir).parts[:1] == ("..",)
    folder = NOTEBOOKS / output_dir if is_seen_from_notebooks else resolve(output_dir)
    folder = folder.resolve()
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file; name a folder")
    return folder


class NotebookRun(BaseModel):
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
    thresholds : dict of str to float
        Further parameters, each a probability.
    """

    model_config = ConfigDict(strict=True, frozen=True)

    name: str
    profile: str
    data_dir: Annotated[Path, BeforeValidator(_data_folder)]
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    output_dir: Annotated[Path, BeforeValidator(_output_folder)]
    fast_run: bool
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]]

    @property
    def folder(self):
        """Folder for what this notebook writes; made when it is first asked for."""
        folder = self.output_dir / self.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fix = "set output_dir to a folder that you may write to"
            raise InputError(f"cannot be made ({error})", where=folder, fix=fix) from error
        return folder

    def folder_of(self, name):
        """Return the folder that the notebook of this stem wrote; `InputError` if it did not."""
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

        `results` holds text, numbers (NumPy's and torch's too, but no NaN), lists and dicts. They
        go to ``<output_dir>/<name>/results.json``, whose path is returned.
        """
        text = json.dumps(results, indent=2, allow_nan=False, default=_plain)
        return write_text(self.folder / RESULTS_FILE, text + "\n")


def start(name, *, profile, data_dir, seed, output_dir, fast_run, **thresholds):
    """Validate the parameters of a notebook and prepare the run.

    Sets the seed of Python, NumPy and torch, silences progress bars and notices of the
    libraries, and prints one line that is the same on every machine with the same lock.

    Parameters
    ----------
    name, profile, seed, fast_run
        See `NotebookRun`.
    data_dir : str
        Folder of the dataset; relative to the current folder, the repository or ``notebooks/``.
    output_dir : str
        Folder for everything the course writes; made when something is written. A relative one
        that begins with ``..`` is seen from ``notebooks/``, wherever the kernel runs, so that the
        default lies in the repository.
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
    parameters = {"profile": profile, "data_dir": data_dir, "seed": seed, "output_dir": output_dir}
    try:
        run = NotebookRun(name=name, fast_run=fast_run, thresholds=thresholds, **parameters)
    except ValidationError as error:
        raise _refusal(error.errors()[0]) from None
    run.config("crack_detection")  # an unusable profile is reported here, not ten cells later
    set_seed(seed)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    print(f"{name}: profile {profile}, seed {seed}, {versions_line()}")
    return run


def answered(**answers):
    """Refuse to go on while a task of an exercise is not done.

    Parameters
    ----------
    **answers
        Name to value, of what a task asked for.

    Raises
    ------
    InputError
        Naming the answers that are still ``...``.
    """
    missing = [name for name, value in answers.items() if value is ...]
    if missing:
        raise InputError(
            f"not answered yet: {', '.join(missing)}",
            where="exercise",
            fix="do the task in the cell above and replace the ...",
        )


def _refusal(problem):
    """Turn a problem that pydantic reports into an error that names parameter and value."""
    name, value = problem["loc"][-1], problem["input"]
    hint = " (papermill reads numbers after -p and leaves text after -r)"
    return InputError(
        f"{name} is {value!r}: {problem['msg'].removeprefix('Value error, ')}",
        where="parameters",
        fix=f"correct {name}{hint if isinstance(value, str) else ''}",
    )


def _plain(value):
    """Convert a NumPy or torch value to what JSON knows."""
    if not hasattr(value, "tolist"):
        raise TypeError(f"results hold a {type(value).__name__}, which JSON cannot store")
    return value.tolist()
