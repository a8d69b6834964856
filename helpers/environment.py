"""What the workbook runs on: versions, device, and a refusal when something needed is missing.

``python -m helpers.environment`` prints the direct dependencies, one per line.
"""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, requires, version

import pandas as pd
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from helpers.errors import InputError, explain

DISTRIBUTION = "sam3-lora-workbook"
SUBJECT_PACKAGES = ("torch", "transformers", "peft")  # their release decides the numbers
_SETUP = "run `make setup`, which installs the versions of requirements.lock"


def declared_requirements():
    """Return the direct dependencies that `pyproject.toml` declares, development tools included."""
    with explain(PackageNotFoundError, f"{DISTRIBUTION} is missing", where=sys.prefix, fix=_SETUP):
        return tuple(Requirement(line) for line in requires(DISTRIBUTION) or ())


def package_status(installed, specifier):
    """Return "ok", "missing", "too old" or "newer than tested" for a version (None if missing)."""
    if installed is None:
        return "missing"
    release, declared = Version(installed), SpecifierSet(str(specifier))
    if declared.contains(release, prereleases=True):
        return "ok"
    lower_bounds = [Version(s.version) for s in declared if s.operator in (">=", "~=", "==")]
    return "too old" if any(release < bound for bound in lower_bounds) else "newer than tested"


def report():
    """Return a DataFrame by ``package`` with columns ``installed``, ``declared`` and ``status``."""
    rows = {}
    for requirement in declared_requirements():
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        declared = str(requirement.specifier)
        status = package_status(installed, declared)
        rows[requirement.name] = {"installed": installed, "declared": declared, "status": status}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("package").sort_index()


def require():
    """Return the table of `report`, or raise an `InputError` naming what is missing or too old."""
    table = report()
    broken = table[table["status"].isin(["missing", "too old"])]
    if len(broken):
        listed = [f"{row.Index} {row.declared} is {row.status}" for row in broken.itertuples()]
        raise InputError(f"does not fit: {', '.join(listed)}", where=sys.prefix, fix=_SETUP)
    return table


def versions_line():
    """Return the versions that decide the numbers, without the build of torch, on one line."""
    return ", ".join(f"{name} {Version(version(name)).public}" for name in SUBJECT_PACKAGES)


def device():
    """Return a dict on the machine; ``device`` is "cuda", "mps" or "cpu", ``memory_gib`` of "cuda"."""
    facts = {"python": platform.python_version(), "system": platform.system(), "device": "cpu"}
    facts |= {"name": platform.machine(), "memory_gib": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": "cuda", "name": properties.name}
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
    elif torch.backends.mps.is_available():
        facts["device"] = "mps"
    return facts | {"cpu_count": os.cpu_count(), "torch_threads": torch.get_num_threads()}


def quieten():
    """Silence the progress bars and notices of the libraries."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    for library in (logging, hub_logging):
        library.set_verbosity_error()
    logging.disable_progress_bar()
    disable_progress_bars()


if __name__ == "__main__":
    print("\n".join(requirement.name for requirement in declared_requirements()))
