"""Where the workbook keeps things, and files that are written whole or not at all."""

import glob
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import psutil
from tqdm import tqdm

from helpers.errors import InputError, explain

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "configs"
DATA = ROOT / "data"
RUNS = ROOT / "runs"
TINY_BASE = DATA / "tiny_sam3"
WALL_CRACKS = DATA / "wall_cracks"
PROGRESS_DELAY = 3  # seconds that work may take in silence
_OWN_STAGING = f".partial-{platform.node()}-"


@contextmanager
def staged_folder(folder):
    """Yield a hidden folder in `folder`, and move its files into place only if the block succeeds."""
    # Files of the same name are replaced. What killed processes of this machine left is removed.
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob(f"{glob.escape(_OWN_STAGING)}*-*"):
        pid = path.name.removeprefix(_OWN_STAGING).partition("-")[0]
        if pid.isdigit() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(path, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=f"{_OWN_STAGING}{os.getpid()}-", dir=folder))
    try:
        yield staging
        for path in sorted(staging.iterdir()):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for path in made:
            with suppress(OSError):  # it holds what was made
                path.rmdir()


def write_text(path, text):
    """Write UTF-8 text to a file, replacing it in one step, see `staged_folder`; return its path."""
    path = Path(path)
    with staged_folder(path.parent) as staging:
        (staging / path.name).write_text(text, encoding="utf-8")
    return path


def write_json(path, content, default=None):
    """Write `content` as indented JSON, see `write_text`; NaN and infinity are refused."""
    return write_text(path, json.dumps(content, indent=2, allow_nan=False, default=default) + "\n")


def read_json(path, fix="export the file again"):
    """Return the object in a JSON file, UTF-8 with or without a byte order mark; `fix` is advice."""
    path = Path(path)
    if not path.is_file():
        raise InputError("no such file", where=path, fix=fix)
    errors = (OSError, ValueError, RecursionError)
    with explain(errors, "is no complete JSON in UTF-8", where=path, fix=fix):
        text = path.read_text(encoding="utf-8-sig")
        content = json.loads(text, parse_int=_parse_int, object_pairs_hook=_without_doubles)
    if not isinstance(content, dict):
        raise InputError("is a JSON without keys", where=path, fix=fix)
    return content


def _without_doubles(pairs):
    """Return the dict of an object; Python would take the last of two values of a key in silence."""
    content = dict(pairs)
    for key, value in () if len(content) == len(pairs) else pairs:
        if value != content[key]:
            raise ValueError(f"it has two values of the key {key!r}")
    return content


def _parse_int(digits):
    """Read a whole number; one beyond any id becomes a float, as Python refuses 4,300 digits."""
    return int(digits) if len(digits) < 40 else float(digits)


def files_below(folder, suffixes=()):
    """List the files below a folder in order, without those that a system hides or makes."""
    paths = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        paths += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
    paths = [path for path in paths if not suffixes or path.suffix.lower() in suffixes]
    return [path for path in paths if path.is_file() or path.is_symlink()]  # no pipes


def file_digest(path):
    """Return the SHA-256 of a file's bytes as 64 hex digits."""
    fix = "restore the file or remove its entry"
    with explain(OSError, "cannot be read", where=path, fix=fix), Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_line(text):
    """Write an update of a progress bar as a line, which a log and a notebook keep readable."""
    if text := text.strip():
        print(text, file=sys.stderr, flush=True)


def progress_bar(total, title, unit="image", *, disable=False):
    """Return a `tqdm.tqdm` on stderr for work of seconds: a bar, or a line every ten seconds."""
    lines = {"file": SimpleNamespace(write=_write_line), "mininterval": 10, "ncols": 80}
    look = {} if sys.stderr.isatty() else lines
    return tqdm(total=total, desc=title, unit=unit, delay=PROGRESS_DELAY, disable=disable, **look)


def resolve(path):
    """Turn a path from a config, a notebook or Python into an absolute one; it need not exist.

    A relative path lies in the repository, whatever the current folder is and whatever exists. Only
    one on the command line lies in the current folder: `in_current_folder` says so first.
    """
    return ROOT / os.path.expanduser(path)


def in_current_folder(path):
    """Turn a path from the command line into an absolute one, see `resolve`."""
    return Path.cwd() / os.path.expanduser(path)
