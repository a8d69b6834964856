"""The files around the code agree with each other and with the code."""

import ast
import importlib.util
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions

import nbformat
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from data.experiments.cells import (
    FIXED,
    FIXED_LONGER,
    RECOMMENDED,
    RECOMMENDED_LONGER,
    SUSPECTS,
)
from data.experiments.statistics import steps_table
from data.experiments.tables import load_base_row, load_table
from data.make_cheat_sheet import SHEET, cheat_sheet
from helpers.config import parse_yaml
from helpers.environment import SUBJECT_PACKAGES
from helpers.files import ROOT
from notebooks.run import STRIP_ARGUMENTS

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


def documents():
    return [path for path in project_files() if path.suffix == ".md"]


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
    assert {"lint", "test", "lessons", "newest"} <= called <= make_targets()


def test_ci_script_can_be_executed_and_runs_the_tests():
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert "set -euo pipefail" in read(".ci/run")
    assert {"make test", "make lessons"} <= set(read(".ci/run").splitlines())


def test_every_target_explains_itself():
    undocumented = re.findall(r"^([a-z]+):(?!.*##).*$", read("Makefile"), flags=re.M)
    assert not undocumented


def test_commands_in_the_documents_exist():
    for path in documents():
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"(?:^|`)make ([a-z]+)", text, flags=re.M)) <= make_targets(), path
        for name in re.findall(r"(?<![\w/])(?:notebooks|configs|data)/[\w./]+\.\w+", text):
            places = (ROOT / name, path.parent / name)
            assert any(place.is_file() for place in places), f"{path.relative_to(ROOT)}: {name}"
        for module in re.findall(r"python -m ((?:helpers|data)\.[\w.]*\w)", text):
            assert importlib.util.find_spec(module), f"{path.relative_to(ROOT)}: {module}"


def test_links_of_the_documents_resolve():
    for path in documents():
        text = path.read_text(encoding="utf-8")
        for mark, label, target in re.findall(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", text):
            assert label.strip() or not mark, f"{path.name}: {target} has no alternative text"
            if not re.match(r"https?://|#", target):
                assert (path.parent / target.split("#")[0]).exists(), f"{path}: {target}"


def test_options_in_the_documents_exist():
    used = {}
    for path in documents():
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for command, rest in re.findall(r"python -m helpers ([a-z]+)([^\n`|]*)", text):
            options = re.findall(r"(?<!\S)--[a-z-]+", rest.split("#")[0])
            used.setdefault(command, set()).update(options)
    assert {"check", "train", "predict", "evaluate", "report", "diagnose"} <= used.keys()
    parser = importlib.import_module("helpers.__main__").build_parser()
    [commands] = [a.choices for a in parser._actions if isinstance(a.choices, dict)]
    for command, options in used.items():
        assert options <= set(commands[command]._option_string_actions), command


def test_the_page_of_the_package_names_every_room_and_files_that_exist():
    rows = re.findall(r"^\| `(\w+)/` \|.*\| ([^|]+) \|$", read("helpers/README.md"), flags=re.M)
    rooms = {path.parent.name for path in (ROOT / "helpers").glob("*/__init__.py")}
    assert {room for room, _ in rows} == rooms
    named = [f"{room}/{name}" for room, files in rows for name in re.findall(r"`(\w+\.py)`", files)]
    named += re.findall(r"`([a-z0-9_]+/\w+\.py)`", read("helpers/README.md"))
    assert len(named) > 25
    for name in named:
        assert (ROOT / "helpers" / name).is_file(), name
    places = re.findall(r"`(\w+/\w+)\.py`, `(\w+)`", read("helpers/README.md"))
    assert len(places) >= 5
    for module, name in places:
        assert hasattr(importlib.import_module(f"helpers.{module.replace('/', '.')}"), name), name


def test_the_table_of_the_readme_is_that_of_the_experiment():
    names = {
        "objects": "objects read",
        "prompt": "training prompt",
        "text_lora": "text LoRA",
        "negatives": "absent prompts per image",
    }
    never, half = (
        steps_table(load_table("causes", word=word), SUSPECTS, "detected_share")
        for word in ("never", "half")
    )
    rows = []
    for (state, factor), step in never.iterrows():
        change = step["change"].replace("object", "“object”")
        cells = [f"the {state} state", f"{names[factor]}: {change}"]
        for table in (step, half.loc[state, factor]):
            low, high = (f"{100 * table[end]:+.0f}" for end in ("low", "high"))
            cells += [f"{table['before']:.0%} to {table['after']:.0%}", f"{low} to {high}"]
        rows.append(f"| {' | '.join(cells)} |")
    table = [line for line in read("README.md").splitlines() if " state | " in line]
    assert table == rows


def test_the_cure_in_the_readme_is_that_of_the_table():
    means = load_table("front").groupby(["recipe", "word"])[
        ["retention_AP", "detected_share", "AP50"]
    ]
    means = means.mean()

    def pair(recipe, column, form=".2f"):
        return " and ".join(f"{means.loc[(recipe, w), column]:{form}}" for w in ("never", "half"))

    assert (
        f"keeps {pair(RECOMMENDED, 'retention_AP')}, detects "
        f"{pair(RECOMMENDED, 'detected_share', '.0%')}, with a mask AP50 of "
        f"{pair(RECOMMENDED, 'AP50')} (fixed config: {pair(FIXED, 'AP50')}), both trained twice as "
        f"long {pair(RECOMMENDED_LONGER, 'AP50')} ({pair(FIXED_LONGER, 'AP50')}; five seeds"
    ) in " ".join(read("README.md").split())


def test_the_points_below_the_table_of_the_readme_have_the_numbers_of_the_experiment():
    columns = ["AP50", "false_positive_rate", "retention_AP"]
    working = {name: levels[1] for name, levels in SUSPECTS.items()}
    rows = {}
    for word in ("never", "half"):
        means = load_table("causes", word=word).groupby(list(SUSPECTS))[columns].mean()
        rows[word] = [means.loc[tuple((working | {"negatives": n}).values())] for n in (0, 3)]
    (never_without, never), (half_without, half) = rows.values()
    before = {word: load_base_row(word=word)["retention_AP"] for word in rows}
    readme = " ".join(read("README.md").split())
    grades = load_table("grades").query("objects == 'yes' and word != 'control'")
    mended = grades[(grades["text_lora"] == "off") & (grades["prompt"] == "object")]
    known = [load_base_row(word=word)["detected_share"] for word in mended["word"].unique()]
    assert (mended["detected_share"] == 1).all()
    assert len(known) == 3
    assert f"which detect {min(known):.0%} to {max(known):.0%} before" in readme
    assert (
        f"{never_without['false_positive_rate']:.0%} of the prompts for something absent are "
        f"answered on the first base and {half_without['false_positive_rate']:.0%} on the second, "
        f"with three of them {never['false_positive_rate']:.0%} and "
        f"{half['false_positive_rate']:.0%}."
    ) in readme
    assert (
        f"falls from {before['never']:.2f} to {never['retention_AP']:.2f} on the first base, from "
        f"{before['half']:.2f} to {half['retention_AP']:.2f} on the second"
    ) in readme
    assert f"Mask AP50 of the working state: {never['AP50']:.2f} and {half['AP50']:.2f}" in readme


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


CLUSTER_JOBS = ROOT / "data" / "experiments" / "jobs.py"


def test_the_cheat_sheet_is_that_of_the_catalogue():
    assert SHEET.read_text(encoding="utf-8") == cheat_sheet(), (
        "run `python -m data.make_cheat_sheet`"
    )


def test_every_import_is_declared():
    providers = packages_distributions()
    own = {"helpers", "data", "notebooks", *(path.stem for path in (ROOT / "tests").glob("*.py"))}
    for path in project_files():
        if path.suffix not in (".py", ".ipynb"):
            continue
        is_for_developers = path.is_relative_to(ROOT / "tests") or path == CLUSTER_JOBS
        known = declared("dev") if is_for_developers else declared()
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


def test_rooms_import_only_from_the_rooms_below():
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"]
        + ["--no-cache"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


def notebook_imports(path):
    """Yield module and names of what a notebook imports from the package."""
    cells = nbformat.read(path, as_version=4).cells
    source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "helpers":
            yield node.module, {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            yield from ((a.name, set()) for a in node.names if a.name.split(".")[0] == "helpers")


def face_of(module):
    """Return the names that a room's `__init__.py` imports; None for a module that is no room."""
    path = ROOT.joinpath(*module.split("."), "__init__.py")
    if not path.is_file():
        return None
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    imports = [node for node in nodes if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names}


def test_notebooks_import_from_the_faces_of_the_rooms():
    paths = [path for path in project_files() if path.suffix == ".ipynb"]
    assert len(paths) > 20
    for path in paths:
        for module, names in notebook_imports(path):
            assert re.fullmatch(r"helpers\.\w+", module), f"{path.name} imports {module}"
            face = face_of(module)
            assert face is None or names <= face, f"{path.name}: {names - face}"


def test_helpers_import_nothing_from_the_scripts_beside_the_data():
    for path in (ROOT / "helpers").rglob("*.py"):
        assert "data" not in set(imports_of(path)), path


LINES, FILES, DOCSTRING_SHARE = 14_000, 75, 0.2
"""The budget of ``helpers/``: a new feature pays by simplifying an old one."""


def docstring_lines(tree):
    """Count the lines of the docstrings in a module."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [node for node in ast.walk(tree) if isinstance(node, owners)]
    texts = [node.body[0] for node in documented if ast.get_docstring(node) is not None]
    return sum(text.end_lineno - text.lineno + 1 for text in texts)


def test_package_stays_within_its_budget():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "helpers").rglob("*.py")]
    lines = sum(len(source.splitlines()) for source in sources)
    share = sum(docstring_lines(ast.parse(source)) for source in sources) / lines
    print(f"helpers/: {lines} lines, {len(sources)} files, docstrings {share:.1%} of the lines")
    assert lines <= LINES
    assert len(sources) <= FILES
    assert share <= DOCSTRING_SHARE
