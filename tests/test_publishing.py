import json
from inspect import signature
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import load_file, save_file

from helpers.__main__ import main
from helpers.config import load_config
from helpers.errors import InputError
from helpers.files import write_text
from helpers.train.share import merge, plan_push, push

REPO = "somebody/cracks"


@pytest.fixture
def run(run_copy):
    return run_copy


class Hub:
    """Stands in for the Hub: keeps what was called, and what a real upload would have read."""

    def __init__(self, monkeypatch):
        self.created, self.uploaded = [], []
        monkeypatch.setattr(HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, repo_id, *, repo_type, private, exist_ok):
        self.created.append((repo_id, repo_type, private, exist_ok))
        return Address(f"https://hub/{repo_id}")

    def upload_folder(self, *, repo_id, repo_type, folder_path, allow_patterns, commit_message):
        self.uploaded.append((repo_id, folder_path, sorted(allow_patterns)))


class Address(str):
    @property
    def repo_id(self):
        return self.removeprefix("https://hub/")


@pytest.fixture
def hub(monkeypatch):
    return Hub(monkeypatch)


def test_dry_run_lists_and_sends_nothing(run, hub, capsys):
    (run / "notes.txt").write_text("mine")
    assert main(["push", "--adapter", str(run), "--repo", REPO, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert hub.created == hub.uploaded == []
    assert document["url"] is None
    assert {"adapter_model.safetensors", "README.md", "metrics.json"} <= set(document["files"])
    for name, size in document["files"].items():
        assert size == (run / name).stat().st_size
    assert document["left_out"] == ["checkpoints/", "notes.txt"]
    assert main(["push", "--adapter", str(run), "--repo", REPO]) == 0
    out = capsys.readouterr().out
    assert "nothing was sent" in out
    assert "checkpoints/" in out


def test_yes_uploads_exactly_what_was_listed(run, hub, capsys):
    assert main(["push", "--adapter", str(run), "--repo", REPO, "--yes"]) == 0
    assert f"uploaded to https://hub/{REPO}" in capsys.readouterr().out
    assert hub.created == [(REPO, "model", True, True)]
    [(repo, folder, patterns)] = hub.uploaded
    assert (repo, folder) == (REPO, run)
    assert patterns == sorted(plan_push(run, REPO).files)
    assert not any("checkpoint" in pattern for pattern in patterns)


def test_merged_model_can_be_pushed(run, hub, tmp_path):
    folder = tmp_path / "merged"
    merge(run, folder)
    plan = plan_push(folder, REPO)
    assert set(plan.files) == {path.name for path in folder.iterdir()}
    assert plan.left_out == []
    (folder / "merge.json").unlink()
    with pytest.raises(InputError, match=r"holds no metrics\.json"):
        plan_push(folder, REPO)


def test_card_of_a_local_base_lacks_base_licence_and_data(run):
    missing = {line.split(":")[0] for line in plan_push(run, REPO).missing}
    assert missing == {"base_model", "license", "datasets"}
    card = (run / "README.md").read_text(encoding="utf-8")
    complete = card.replace(
        "license: unknown", "license: mit\nbase_model: a/b\ndatasets:\n- somebody/walls"
    )
    (run / "README.md").write_text(complete, encoding="utf-8")
    assert plan_push(run, REPO).missing == []
    (run / "README.md").write_text(card.replace("tags:", "tags: ["), encoding="utf-8")
    with pytest.raises(InputError, match="metadata block"):
        plan_push(run, REPO)
    (run / "README.md").unlink()
    assert plan_push(run, REPO).missing == ["README.md: there is no model card"]


def test_folders_of_this_machine_are_named(run):
    places = plan_push(run, REPO).machine_paths
    assert any(place.startswith("config.yaml: /") for place in places)
    assert any(place.startswith("adapter_config.json: /") for place in places)
    assert not any("huggingface.co" in place for place in places)


def test_unfinished_run_is_refused(run, hub, capsys):
    (run / "metrics.json").unlink()
    assert main(["push", "--adapter", str(run), "--repo", REPO, "--yes"]) == 2
    assert "no metrics.json" in capsys.readouterr().err
    assert hub.created == hub.uploaded == []


def test_run_without_weights_is_refused(run):
    (run / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"holds no adapter_model\.safetensors"):
        plan_push(run, REPO)


@pytest.mark.parametrize("damage", ["empty", "half", "no keys"])
def test_run_with_damaged_weights_is_refused(run, hub, damage, capsys):
    path = run / "adapter_model.safetensors"
    whole = path.read_bytes()
    path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "no keys": b"{}"}[damage])
    assert main(["push", "--adapter", str(run), "--repo", REPO, "--yes"]) == 2
    assert str(path) in capsys.readouterr().err
    assert hub.created == hub.uploaded == []


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("nan", "holds nan in 1 of"),
        ("bits", "bytes are not those that were saved"),
        ("alpha", "lora_alpha is 64, but the adapter was trained with 32"),
    ],
)
def test_what_predict_refuses_is_not_sent(run, hub, data_dir, capsys, damage, words):
    path = run / ("adapter_config.json" if damage == "alpha" else "adapter_model.safetensors")
    if damage == "nan":
        weights = load_file(path)
        weights[max(weights)].view(-1)[2] = float("nan")
        save_file(weights, path)
    elif damage == "bits":
        content = bytearray(path.read_bytes())
        content[-1000] ^= 1  # the lowest bit of a mantissa
        path.write_bytes(content)
    else:
        settings = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(settings | {"lora_alpha": 64}), encoding="utf-8")
    image = data_dir / "test" / "test_0.png"
    for arguments in (
        ["predict", "--adapter", str(run), "--image", str(image), "--prompt", "crack"],
        ["push", "--adapter", str(run), "--repo", REPO],
        ["push", "--adapter", str(run), "--repo", REPO, "--yes"],
    ):
        assert main(arguments) == 2
        refusal = capsys.readouterr().err
        assert words in refusal
        assert str(path) in refusal
    assert hub.created == hub.uploaded == []


def test_merged_model_with_nan_is_refused(tmp_path):
    (tmp_path / "merge.json").write_text("{}")
    save_file({"a": torch.full((100,), torch.nan)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match="a holds nan in 100 of 100"):
        plan_push(tmp_path, REPO)


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "base.json", "config.yaml", "prompts.json"]
)
def test_run_without_one_of_its_files_is_refused(run, name):
    (run / name).unlink()
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        plan_push(run, REPO)


@pytest.mark.parametrize("damage", ["empty", "half", "missing"])
def test_merged_model_with_damaged_weights_is_refused(tmp_path, damage):
    (tmp_path / "merge.json").write_text("{}")
    save_file({"a": torch.zeros(100)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    if damage == "missing":
        (tmp_path / "model.safetensors").unlink()
    else:
        (tmp_path / "model.safetensors").write_bytes(whole[:200] if damage == "half" else b"")
    with pytest.raises(InputError, match="safetensors"):
        plan_push(tmp_path, REPO)


def test_only_what_this_package_writes_is_sent_and_no_link_is_followed(run, tmp_path):
    secret = tmp_path / "SECRET"
    secret.write_text("password")
    (run / "LICENSE").symlink_to(secret)
    (run / "notes.txt").write_text("mine")
    (run / ".env").write_text("KEY=1")
    plan = plan_push(run, REPO)
    assert not {"LICENSE", "notes.txt", ".env"} & set(plan.files)
    assert {"LICENSE", "notes.txt", ".env"} <= set(plan.left_out)
    (run / "LICENSE").unlink()
    (run / "LICENSE").write_text("MIT")
    assert "LICENSE" in plan_push(run, REPO).files
    (run / "curves.csv").rename(secret)
    (run / "curves.csv").symlink_to(secret)
    with pytest.raises(InputError, match="is a link"):
        plan_push(run, REPO)


HOME, USERS = "/home", "/Users"  # apart, because no file of the project names such a path whole


@pytest.mark.parametrize(
    "path",
    [
        "~/secret/x",
        f"file://{HOME}/a/b",
        f"C:{USERS}/bob/x",
        "\\\\server\\x",
        f"{USERS}/John Smith/x",
    ],
)
def test_every_form_of_a_path_of_this_machine_is_named(run, path):
    config = load_config(run / "config.yaml", overrides={"data.data_dir": path})
    write_text(run / "config.yaml", config.to_yaml())
    assert f"config.yaml: {path}" in plan_push(run, REPO).machine_paths


@pytest.mark.parametrize("repo", ["a/b/c", "-bad", "a b", ""])
def test_impossible_name_is_refused(run, repo):
    with pytest.raises(InputError, match="--repo"):
        plan_push(run, repo)


@pytest.mark.parametrize(
    "error", [OfflineModeIsEnabled("offline"), PermissionError("403 Forbidden\nmore"), OSError()]
)
def test_refusal_of_the_hub_is_one_line(run, monkeypatch, error):
    def refuse(*args, **kwargs):
        raise error

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(InputError, match=r"the Hub did not take it.*hf auth login"):
        push(plan_push(run, REPO))


def test_real_call_fits_the_library(run, monkeypatch):
    """The arguments bind to the library's own signatures, which `Hub` only imitates."""
    calls = []
    real = {name: signature(getattr(HfApi, name)) for name in ("create_repo", "upload_folder")}
    for name, bound in real.items():

        def record(self, *args, _name=name, _bound=bound, **kwargs):
            calls.append(_bound.bind(self, *args, **kwargs).arguments)
            return SimpleNamespace(repo_id=REPO)

        monkeypatch.setattr(HfApi, name, record)
    push(plan_push(run, REPO))
    assert calls[0]["repo_id"] == calls[1]["repo_id"] == REPO
