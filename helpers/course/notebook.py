"""The first lines of every notebook: validate the parameters, set the seed, keep results.

papermill checks neither the type of a parameter nor its range, and it passes a misread value on as
text. `start` refuses such a value before anything is computed with it.
"""

import ast
import difflib
from pathlib import Path
from typing import Annotated

from IPython import get_ipython
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from transformers import set_seed

from helpers.config import load_config
from helpers.environment import quieten, require, versions_line
from helpers.errors import InputError, explain
from helpers.files import CONFIGS, ROOT, resolve, write_json

NOTEBOOKS = ROOT / "notebooks"
RESULTS_FILE = "results.json"


def _data_folder(data_dir):
    for place in (resolve(data_dir), NOTEBOOKS / data_dir) if isinstance(data_dir, str) else ():
        if place.is_dir():
            return place.resolve()
    fix = "name a folder with one folder per split, or run `make data` for data/wall_cracks"
    raise InputError(f"data_dir is {data_dir!r}, which is no folder", where="parameters", fix=fix)


def _output_folder(output_dir):
    if not isinstance(output_dir, str):
        raise ValueError("Input should be text")
    is_seen_from_notebooks = Path(output_dir).parts[:1] == ("..",)
    folder = (NOTEBOOKS / output_dir if is_seen_from_notebooks else resolve(output_dir)).resolve()
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place} is a file; name a folder")
    return folder


class NotebookRun(BaseModel):
    """The validated parameters of one notebook and the places it reads and writes."""

    model_config = ConfigDict(strict=True, frozen=True)

    name: str  # stem of the notebook
    profile: str  # overlay of the configs: "tiny", "sam3" or a path
    data_dir: Annotated[Path, BeforeValidator(_data_folder)]
    seed: Annotated[int, Field(ge=0, le=2**32 - 1)]
    output_dir: Annotated[Path, BeforeValidator(_output_folder)]  # shared by all notebooks
    fast_run: bool  # keeps the schedule of the profile; else all epochs of the config
    thresholds: dict[str, Annotated[float, Field(ge=0, le=1)]]  # further parameters

    @property
    def folder(self):
        """Folder for what this notebook writes; made when it is first asked for."""
        folder = self.output_dir / self.name
        fix = "set output_dir to a folder that you may write to"
        with explain(OSError, "cannot be made", where=folder, fix=fix):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def folder_of(self, name):
        """Return the folder that the notebook of this stem wrote; `InputError` if it did not."""
        folder = self.output_dir / name
        if not (folder / RESULTS_FILE).is_file():
            fix = f"run notebooks/{name}.ipynb first, or `make course` for all of them"
            raise InputError(f"notebook {name} has not finished here", where=folder, fix=fix)
        return folder

    def config(self, name, *overrides):
        """Load ``configs/<name>_config.yaml`` with profile, data and seed of this run; overrides win."""
        settings = [("data.data_dir", self.data_dir), ("training.seed", self.seed)]
        if not self.fast_run:
            settings += [("scale.num_epochs", 1.0), ("scale.warmup_steps", 1.0)]
        path = CONFIGS / f"{name}_config.yaml"
        return load_config(path, profile=self.profile, overrides=(*settings, *overrides))

    def save_results(self, results):
        """Write the headline numbers of this notebook (NumPy's and torch's too) as JSON; return the path."""
        return write_json(self.folder / RESULTS_FILE, results, default=_plain)


def start(name, *, profile, data_dir, seed, output_dir, fast_run, **thresholds):
    """Return a `NotebookRun` of valid parameters; set every seed, silence libraries, print a line.

    ``data_dir`` is relative to the repository or ``notebooks/``; an ``output_dir`` that begins with
    ``..`` is seen from ``notebooks/``. ``thresholds`` are probabilities such as ``score_threshold``.
    """
    require()
    _refuse_misspelt_parameters()
    parameters = {"profile": profile, "data_dir": data_dir, "seed": seed, "output_dir": output_dir}
    try:
        run = NotebookRun(name=name, fast_run=fast_run, thresholds=thresholds, **parameters)
    except ValidationError as error:
        problem = error.errors()[0]
        name, value = problem["loc"][-1], problem["input"]
        message = f"{name} is {value!r}: {problem['msg'].removeprefix('Value error, ')}"
        fix = f"correct {name}"
        if isinstance(value, str):
            fix += " (papermill reads numbers after -p and leaves text after -r)"
        raise InputError(message, where="parameters", fix=fix) from None
    run.config("crack_detection")  # an unusable profile is reported here, not ten cells later
    set_seed(seed)
    quieten()
    print(f"{name}: profile {profile}, seed {seed}, {versions_line()}")
    return run


def _refuse_misspelt_parameters():
    """Refuse a name in papermill's cell that the notebook does not set: papermill only warns."""
    sources = [] if get_ipython() is None else get_ipython().user_ns.get("In", [])
    names = {True: [], False: []}  # of papermill's cell, of all others before this one
    for source in sources[:-1]:
        statements = ast.parse(get_ipython().transform_cell(source)).body
        is_papermills = source.startswith("# Parameters")
        for one in statements:
            targets = getattr(one, "targets", [getattr(one, "target", None)])
            names[is_papermills] += [one.id for one in targets if isinstance(one, ast.Name)]
    for name in names[True]:
        if name not in names[False]:
            close = difflib.get_close_matches(name, names[False], n=1, cutoff=0.3)
            fix = f"did you mean {close[0]!r}?" if close else f"one of {', '.join(names[False])}"
            raise InputError(f"there is no parameter {name!r}", where="parameters", fix=fix)


def answered(**answers):
    """Refuse to go on while an answer to a task of an exercise is still ``...``.

    Parameters
    ----------
    **answers
        Name to value, of what the task asked for; `InputError` names those not yet given.
    """
    missing = [name for name, value in answers.items() if value is ...]
    if missing:
        fix = "do the task in the cell above and replace the ..."
        raise InputError(f"not answered yet: {', '.join(missing)}", where="exercise", fix=fix)


def _plain(value):
    if not hasattr(value, "tolist"):
        raise TypeError(f"results hold a {type(value).__name__}, which JSON cannot store")
    return value.tolist()
