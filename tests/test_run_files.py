"""A damaged run folder is named by file and key, by every command that reads it."""

import json

import pytest

from helpers.__main__ import main
from helpers.errors import InputError
from helpers.train.run import is_bare_adapter, read_run


def set_value(content, key, value):
    """Set ``a.b`` in nested dicts; leave the key out for the value None in a list."""
    *parents, last = key.split(".")
    for parent in parents:
        content = content[parent]
    if value is DELETED:
        del content[last]
    else:
        content[last] = value


DELETED = object()
VALUES = [
    ("metrics.json", "steps", "x"),
    ("metrics.json", "steps", None),
    ("metrics.json", "epochs", DELETED),
    ("metrics.json", "best_step", "3"),
    ("metrics.json", "valid", [1]),
    ("metrics.json", "valid.AP", "high"),
    ("metrics.json", "valid.AP", [0.5]),
    ("metrics.json", "train_loss", 3),
    ("metrics.json", "train_loss.last", DELETED),
    ("metrics.json", "objects", {"train": "7"}),
    ("metrics.json", "notes", "none"),
    ("metrics.json", "notes", [1]),
    ("metrics.json", "selected_by", 3),
    ("prompts.json", "prompts", DELETED),
    ("prompts.json", "prompts", None),
    ("prompts.json", "prompts", ["crack"]),
    ("prompts.json", "prompts.crack", "5"),
    ("prompts.json", "negatives", DELETED),
    ("prompts.json", "negatives_per_image", "3"),
]


@pytest.mark.parametrize(("name", "key", "value"), VALUES)
def test_a_wrong_value_is_named_with_its_file_and_key(run_copy, name, key, value, capsys):
    content = json.loads((run_copy / name).read_text())
    set_value(content, key, value)
    (run_copy / name).write_text(json.dumps(content))
    for command in ("report", "push"):
        options = ["--repo", "a/b"] if command == "push" else []
        assert main([command, "--adapter", str(run_copy), *options]) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"error: {run_copy / name}: ")
        assert f"'{key}" in line
        assert "Fix: " in line


NAMES = ("metrics.json", "prompts.json", "curves.csv", "adapter_report.csv", "config.yaml")


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{", "\0", "a,b\n1,2\n", "[" * 100_000])
@pytest.mark.parametrize("name", NAMES)
def test_another_content_is_refused(run_copy, name, text):
    (run_copy / name).write_text(text)
    with pytest.raises(InputError) as error:
        read_run(run_copy)
    assert name in str(error.value.where)
    assert error.value.fix


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_cut_off_is_refused(run_copy, name, share):
    whole = (run_copy / name).read_bytes()
    (run_copy / name).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read_run(run_copy)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("curves.csv", "step,", "steps,"),
        ("curves.csv", "\n1,", "\nx,"),
        ("curves.csv", "\n1,", "\n1.5,"),
        ("curves.csv", "\n1,", "\n,"),
        ("adapter_report.csv", "modules", "layers"),
        ("adapter_report.csv", "\ntotal", "\nsum"),
        ("adapter_report.csv", "component", "part"),
        ("adapter_report.csv", "\ntotal,28", "\ntotal,many"),
        ("adapter_report.csv", "\ntotal,28", "\ntotal,"),
    ],
)
def test_another_table_is_refused(run_copy, name, old, new):
    text = (run_copy / name).read_text()
    assert old in text
    (run_copy / name).write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read_run(run_copy)


def test_a_log_of_another_run_is_refused(run_copy):
    lines = (run_copy / "curves.csv").read_text().splitlines(keepends=True)
    (run_copy / "curves.csv").write_text("".join(lines[:5]))  # the first epoch, complete
    with pytest.raises(InputError, match="ends at step"):
        read_run(run_copy)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_file_is_named_and_does_not_make_a_bare_adapter(run_copy, name, capsys):
    (run_copy / name).unlink()
    assert not is_bare_adapter(run_copy)
    assert main(["report", "--adapter", str(run_copy)]) == 2
    assert name in capsys.readouterr().err


def test_an_adapter_alone_is_bare(run_copy):
    for path in run_copy.iterdir():
        if path.name not in ("adapter_config.json", "adapter_model.safetensors", "README.md"):
            path.rename(run_copy.parent / path.name)
    assert is_bare_adapter(run_copy)


@pytest.mark.parametrize("content", ["{}", '{"message": 3}', "[]", "{"])
def test_a_damaged_note_of_a_stop_is_named(run_copy, content):
    (run_copy / "metrics.json").unlink()
    (run_copy / "stopped.json").write_text(content)
    with pytest.raises(InputError, match=r"stopped\.json"):
        read_run(run_copy)
