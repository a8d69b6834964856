"""The files around the code agree with each other and with the code."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions

import nbformat
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers.config import parse_yaml
from helpers.course.run import STRIP_ARGUMENTS
from helpers.environment import SUBJECT_PACKAGES
from helpers.files import ROOT

DOCUMENTS = ("README.md", "CONTRIBUTING.md")
MACHINE_PATH = re.compile(r"/(?:work|farm|root|home/\w+|Users/\w+)/[\w.]|/tmp/\w")
REGISTRY = re.compile(
    r"pypi\.org|python[h]osted|download\.pytorch|--(?:extra-)?index-url|find[-]links"
)


@cache
def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def project_files():
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def text_files():
    kinds = {".py", ".md", ".yaml", ".yml", ".toml", ".json", ".txt", ".lock", ".ipynb", ".cfg", ""}
    return [path for path in project_files() if path.suffix in kinds]


def declared(*extras):
    project = tomllib.loads(read("pyproject.toml"))["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    requirements = map(Requirement, lines)
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def locked():
    lines = [line for line in read("requirements.lock").splitlines() if not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    return {
        canonicalize_name(item.name): next(iter(item.specifier)).version for item in requirements
    }


def conda_pins():
    entries = parse_yaml(read("environment.yml"), where="")["dependencies"]
    [nested] = [entry["pip"] for entry in entries if isinstance(entry, dict)]
    assert nested.pop() == "-e ."
    return {canonicalize_name(pin.split("==")[0]): pin.split("==")[1] for pin in nested}


def make_targets():
    return set(re.findall(r"^([a-z]+):", read("Makefile"), flags=re.M))


def test_lock_is_exact_and_fulfils_what_is_declared():
    versions = locked()
    for name, requirement in declared("dev").items():
        assert name in versions, f"{name} is not in requirements.lock"
        assert requirement.specifier.contains(versions[name]), requirement
    for line in read("requirements.lock").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[\w.-]+==[\w.]+(; .+)?", line), line


def test_environment_pins_what_the_lock_holds():
    versions, pins = locked(), conda_pins()
    assert pins.keys() == declared("dev").keys()
    for name, pin in pins.items():
        minor = ".".join(versions[name].split(".")[:2]) + ".*"
        exact = name in (*SUBJECT_PACKAGES, "torchvision")
        assert pin == (versions[name] if exact else minor), name


def test_python_is_the_same_everywhere():
    project = tomllib.loads(read("pyproject.toml"))
    oldest = project["project"]["requires-python"].removeprefix(">=")
    assert f"python={oldest}" in parse_yaml(read("environment.yml"), where="")["dependencies"]
    assert project["tool"]["ruff"]["target-version"] == "py" + oldest.replace(".", "")
    workflow = parse_yaml(read(".github/workflows/ci.yml"), where="")
    steps = [step for name in ("lint", "test") for step in workflow["jobs"][name]["steps"]]
    assert {
        step["with"]["python-version"] for step in steps if "setup-python" in step.get("uses", "")
    } == {oldest}


def test_pre_commit_uses_the_locked_tools_and_the_same_settings():
    repos = parse_yaml(read(".pre-commit-config.yaml"), where="")["repos"]
    by_name = {repo["repo"].rsplit("/", 1)[1]: repo for repo in repos}
    assert by_name["ruff-pre-commit"]["rev"] == "v" + locked()["ruff"]
    assert by_name["nbstripout"]["rev"] == locked()["nbstripout"]
    assert tuple(by_name["nbstripout"]["hooks"][0]["args"]) == STRIP_ARGUMENTS


def test_workflow_calls_make_targets_that_exist():
    jobs = parse_yaml(read(".github/workflows/ci.yml"), where="")["jobs"].values()
    commands = [step["run"] for job in jobs for step in job["steps"] if "run" in step]
    called = {command.split()[1] for command in commands if command.startswith("make ")}
    assert {"lint", "test", "newest"} <= called <= make_targets()


def test_ci_script_can_be_executed_and_runs_the_tests():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert "set -euo pipefail" in read(".ci/run")
    assert "make test" in read(".ci/run")


def test_every_target_explains_itself():
    undocumented = re.findall(r"^([a-z]+):(?!.*##).*$", read("Makefile"), flags=re.M)
    assert not undocumented


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_in_the_documents_exist(document):
    text = read(document)
    assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.M)) <= make_targets()
    for notebook in re.findall(r"notebooks/[\w.]+\.ipynb", text):
        assert (ROOT / notebook).is_file(), notebook
    for config in re.findall(r"configs/[\w./]+\.yaml", text):
        assert (ROOT / config).is_file(), config
    for module in re.findall(r"python -m helpers\.(\w+)", text):
        assert (ROOT / "helpers" / f"{module}.py").is_file(), module


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_of_the_documents_resolve(document):
    for mark, text, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", read(document)):
        assert text.strip() or not mark, f"{target} has no alternative text"
        if not re.match(r"https?://|#", target):
            assert (ROOT / target.split("#")[0]).exists(), target


def test_commands_of_the_command_line_in_the_readme_exist():
    commands = sorted(set(re.findall(r"python -m helpers ([a-z]+)", read("README.md"))))
    assert commands
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "helpers", command, "--help"], capture_output=True
        )
        assert done.returncode == 0, command


def imports_of(path):
    if path.suffix == ".ipynb":
        cells = nbformat.read(path, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    else:
        source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_every_import_is_declared():
    providers = packages_distributions()
    own = {"helpers", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    for path in project_files():
        if path.suffix not in (".py", ".ipynb"):
            continue
        known = declared("dev") if path.is_relative_to(ROOT / "tests") else declared()
        for module in set(imports_of(path)) - own - sys.stdlib_module_names:
            names = {canonicalize_name(name) for name in providers.get(module, [module])}
            assert names & known.keys(), f"{path.relative_to(ROOT)} imports {module}"


def test_no_file_names_a_path_of_a_machine_or_a_registry():
    for path in text_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        found = [
            match.group(0) for rule in (MACHINE_PATH, REGISTRY) for match in rule.finditer(text)
        ]
        assert not found, f"{path.relative_to(ROOT)}: {found}"


def test_files_of_code_stay_readable():
    for path in (ROOT / "helpers").glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= 320, f"{path.name} has {len(lines)} lines"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                length = node.end_lineno - body[0].lineno if body else 0
                assert length < 60, f"{path.name}: {node.name}"


def rows_of_the_map():
    """Return the modules of each row of the table in CONTRIBUTING.md, top row first."""
    table = read("CONTRIBUTING.md").split("| files | concept |")[1].split("\n\n")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [re.findall(r"`(\w+)`", cell) for cell in cells]


def test_map_lists_every_module_once():
    listed = [module for row in rows_of_the_map() for module in row]
    modules = {path.stem for path in (ROOT / "helpers").glob("*.py")} - {"__init__"}
    assert len(listed) == len(set(listed))
    assert modules - set(listed) == set(), "name these in the table of CONTRIBUTING.md"
    assert set(listed) - modules == set(), "these are gone"


def test_modules_import_from_their_row_or_above_and_never_in_a_circle():
    rows = {module: number for number, row in enumerate(rows_of_the_map()) for module in row}
    graph = {module: set() for module in rows}
    for module in rows:
        tree = ast.parse((ROOT / "helpers" / f"{module}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "helpers":
                graph[module] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("helpers."):
                graph[module].add(node.module.split(".")[1])
    assert any(graph.values())
    wrong = [(a, b) for a, used in graph.items() for b in used if rows[b] > rows[a]]
    assert not wrong
    tuple(TopologicalSorter(graph).static_order())  # raises on a circle
