"""What the workbook runs on: versions, device, and a refusal when something needed is missing.

``python -m helpers.environment`` prints the table, ``python -m helpers.environment names`` the
direct dependencies, one per line.
"""

from __future__ import annotations

import os
import platform
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, requires, version

import pandas as pd
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from helpers.errors import InputError

DISTRIBUTION = "sam3-lora-workbook"
SUBJECT_PACKAGES = ("torch", "transformers", "peft")
"""The libraries whose release decides the numbers of the course."""
_SETUP = "run `make setup`, which installs the versions of requirements.lock"


@cache
def declared_requirements():
    """Return the direct dependencies of the workbook, the development tools included.

    Returns
    -------
    tuple of packaging.requirements.Requirement
        As `pyproject.toml` declares them, read from the installed project.

    Raises
    ------
    InputError
        When the project itself is not installed.
    """
    try:
        lines = requires(DISTRIBUTION) or []
    except PackageNotFoundError:
        raise InputError(f"{DISTRIBUTION} is not installed here", fix=_SETUP) from None
    return tuple(Requirement(line) for line in lines)


def package_status(installed, specifier):
    """Compare an installed version with the range it was declared with.

    Parameters
    ----------
    installed : str or None
        Version, None when the package is missing.
    specifier : str or packaging.specifiers.SpecifierSet
        Declared range such as ``">=5.17,<5.24"``.

    Returns
    -------
    str
        ``"ok"``, ``"missing"``, ``"too old"`` or ``"newer than tested"``.

    Examples
    --------
    >>> package_status("5.24.1", ">=5.17,<5.24")
    'newer than tested'
    """
    if installed is None:
        return "missing"
    found, declared = Version(installed), SpecifierSet(str(specifier))
    if declared.contains(found, prereleases=True):
        return "ok"
    lower_bounds = [Version(s.version) for s in declared if s.operator in (">=", "~=", "==")]
    return "too old" if any(found < bound for bound in lower_bounds) else "newer than tested"


def report():
    """Return one row per direct dependency: what is installed and what was declared.

    Returns
    -------
    pandas.DataFrame
        Index ``package``; columns ``installed``, ``declared`` and ``status``
        (see `package_status`).
    """
    rows = []
    for requirement in declared_requirements():
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            installed = None
        status = package_status(installed, requirement.specifier)
        rows.append((requirement.name, installed, str(requirement.specifier), status))
    columns = ["package", "installed", "declared", "status"]
    return pd.DataFrame(rows, columns=columns).set_index("package").sort_index()


def require():
    """Refuse an environment in which the course cannot run.

    Returns
    -------
    pandas.DataFrame
        The table of `report`, when nothing is missing or too old.

    Raises
    ------
    InputError
        Naming every package that is missing or too old. A newer one than tested is no error.
    """
    table = report()
    broken = table[table["status"].isin(["missing", "too old"])]
    if len(broken):
        named = ", ".join(
            f"{row.Index} {row.declared} is {row.status}" for row in broken.itertuples()
        )
        raise InputError(f"the environment does not fit: {named}", where=sys.prefix, fix=_SETUP)
    return table


def versions_line():
    """Return the versions that decide the numbers, the same on every machine of one lock.

    Returns
    -------
    str
        For example ``"torch 2.15.0, transformers 5.23.0, peft 0.21.2"``; the build of torch
        (CPU or CUDA) is left out.
    """
    return ", ".join(f"{name} {Version(version(name)).public}" for name in SUBJECT_PACKAGES)


def device():
    """Describe the machine: Python, accelerator or CPU, threads.

    Returns
    -------
    dict
        ``python``, ``system``, ``device`` ("cuda", "mps" or "cpu"), ``name``,
        ``memory_gib`` (float, of the accelerator, else None), ``cpu_count``, ``torch_threads``.
    """
    facts = {"python": platform.python_version(), "system": platform.system(), "device": "cpu"}
    facts |= {"name": platform.machine(), "memory_gib": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        facts |= {"device": "cuda", "name": properties.name}
        facts["memory_gib"] = round(properties.total_memory / 2**30, 1)
    elif torch.backends.mps.is_available():
        facts["device"] = "mps"
    return facts | {"cpu_count": os.cpu_count(), "torch_threads": torch.get_num_threads()}


def main(arguments=None):
    """Print the table of packages, or only the names of the direct dependencies.

    Parameters
    ----------
    arguments : list of str, optional
        Command line without the program name; ``["names"]`` prints names only.

    Returns
    -------
    int
        Exit status: 0, or 2 when something is missing or too old.
    """
    if (sys.argv[1:] if arguments is None else arguments) == ["names"]:
        print("\n".join(requirement.name for requirement in declared_requirements()))
        return 0
    print(report().to_string())
    print(", ".join(f"{name}: {value}" for name, value in device().items()))
    try:
        require()
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
