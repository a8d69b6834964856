"""Where the workbook keeps things, independent of the folder a notebook or command runs in."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
DATA = ROOT / "data"
RUNS = ROOT / "runs"
TINY_BASE = DATA / "tiny_sam3"
WALL_CRACKS = DATA / "wall_cracks"


def resolve(path):
    """Turn a path from a config, a notebook parameter or the command line into an absolute one.

    papermill runs a notebook in the caller's folder and JupyterLab in the notebook's own, so a
    relative path that is not found in the current folder is taken relative to the repository.

    Parameters
    ----------
    path : str or os.PathLike
        ``~`` is expanded; an absolute path is kept as it is.

    Returns
    -------
    pathlib.Path
        Absolute. It need not exist: a relative path found nowhere lies under `ROOT`.
    """
    path = Path(path).expanduser()
    if path.is_absolute():
        return path
    in_current_folder = Path.cwd() / path
    return in_current_folder if in_current_folder.exists() else ROOT / path
