"""Configs are strict, reproduce themselves, and hold no key that nothing reads."""

import ast
import inspect
import textwrap
import time
from pathlib import Path

import pytest

from helpers.__main__ import build_parser
from helpers.config import Config, load_config, parse_yaml
from helpers.errors import InputError
from helpers.files import CONFIGS, ROOT, in_current_folder, resolve, write_text
from helpers.train.guards import Guards
from helpers.train.training import SAME_NAMES

FILES = sorted(CONFIGS.glob("*.yaml"))
FULL, CRACK = CONFIGS / "full_lora_config.yaml", CONFIGS / "crack_detection_config.yaml"
PACKAGE = sorted((ROOT / "helpers").rglob("*.py"))


def load_with(*overrides):
    return load_config(CRACK, overrides=overrides)


@pytest.mark.parametrize("profile", [None, "tiny", "sam3"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_saved_config_reproduces_itself(path, profile, tmp_path):
    config = load_config(path, profile)
    saved = load_config(write_text(tmp_path / "run" / "config.yaml", config.to_yaml()))
    assert saved == config
    assert saved.fingerprint() == config.fingerprint()


def test_values_are_the_documents():
    full, crack = load_config(FULL), load_config(CRACK)
    assert (full.lora.rank, crack.lora.rank) == (8, 16)
    assert (full.lora.apply_to_text_encoder, crack.lora.apply_to_text_encoder) == (False, True)
    assert (full.training.learning_rate, crack.training.learning_rate) == (5e-5, 1e-4)
    assert (full.training.num_epochs, crack.training.num_epochs) == (20, 50)
    assert (full.training.warmup_steps, crack.training.warmup_steps) == (1000, 100)
    assert (full.training.batch_size, crack.training.batch_size) == (2, 1)
    assert (full.training.gradient_accumulation_steps, crack.training.gradient_accumulation_steps) == (4, 2)  # fmt: skip
    assert (full.data.num_negatives, crack.data.num_negatives) == (0, 3)
    assert full.data.negative_prompts == crack.data.negative_prompts
    for config in (full, crack):
        assert config.lora.target_modules == (
            "q_proj",
            "k_proj",
            "v_proj",
            "out_proj",
            "fc1",
            "fc2",
        )
        assert config.training.mixed_precision == "bf16"
        assert config.evaluation.score_threshold == 0.3
        assert config.model.resolution == 1008


def test_tiny_profile_changes_only_what_the_base_and_its_size_demand():
    plain, tiny = load_config(CRACK).model_dump(), load_config(CRACK, "tiny").model_dump()
    changed = {(s, key) for s in plain for key in plain[s] if plain[s][key] != tiny[s][key]}
    assert changed == {
        ("model", "name"),
        ("model", "resolution"),
        ("training", "batch_size"),
        ("training", "gradient_accumulation_steps"),
        ("training", "mixed_precision"),
        ("scale", "learning_rate"),
        ("scale", "num_epochs"),
        ("scale", "warmup_steps"),
    }


def test_scale_gives_effective_values():
    config = load_with(
        "scale.learning_rate=30", "scale.num_epochs=0.001", "scale.warmup_steps=0.05"
    )
    assert config.effective_learning_rate == pytest.approx(3e-3)
    assert config.effective_num_epochs == 1
    assert config.effective_warmup_steps == 5
    assert load_with("scale.num_epochs=0.2").effective_num_epochs == 10


def test_fingerprint_follows_the_values_only(tmp_path):
    reordered = tmp_path / "other.yaml"
    sections = CRACK.read_text(encoding="utf-8").split("\n\n")
    reordered.write_text("\n\n".join(reversed(sections)), encoding="utf-8")
    assert load_config(reordered).fingerprint() == load_config(CRACK).fingerprint()
    assert load_with("training.seed=43").fingerprint() != load_config(CRACK).fingerprint()


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"data.data_dir": "/elsewhere"}, True),
        ({"output.output_dir": "runs/other"}, True),
        ({"training.num_workers": 4}, True),
        ({"training.logging_steps": 10}, True),
        ({"training.save_total_limit": 9}, True),
        ({"training.gradient_checkpointing": True}, True),
        ({"training.feature_cache": "cache"}, True),
        ({"guards.no_objects": False}, True),
        ({"data.prompts_by_category": {}}, True),
        ({"training.learning_rate": 5e-5, "scale.learning_rate": 2.0}, True),
        ({"training.num_epochs": 25, "scale.num_epochs": 2.0}, True),
        ({"training.num_epochs": 25}, False),
        ({"training.batch_size": 2, "training.gradient_accumulation_steps": 1}, False),
        ({"data.prompts_by_category": {"crack": "fissure"}}, False),
        ({"data.val_split": "test"}, False),
        ({"model.name": "another/base"}, False),
        ({"lora.rank": 4}, False),
        ({"loss.variant": "early"}, False),
        ({"evaluation.score_threshold": 0.4}, False),
    ],
    ids=str,
)
def test_fingerprint_counts_what_decides_the_result_and_nothing_else(change, same):
    other = load_config(CRACK, overrides=change)
    assert (other.fingerprint() == load_config(CRACK).fingerprint()) == same


@pytest.mark.parametrize(
    "name",
    [
        "photos #2",
        "a: b",
        "- x",
        "{a}",
        "'",
        '"',
        "[1",
        "*x",
        "&x",
        "!x",
        "yes",
        "3",
        "é",
        "%",
        "a=b",
    ],
)
@pytest.mark.parametrize("form", [dict, list])
def test_a_path_is_taken_as_it_is(name, form, tmp_path):
    config = load_config(CRACK, overrides=form([("data.data_dir", tmp_path / name)]))
    assert config.data.data_dir == str(tmp_path / name)
    assert load_config(write_text(tmp_path / "config.yaml", config.to_yaml())) == config


@pytest.mark.parametrize(
    "text",
    [
        "a: " + "[" * 5000,
        "a: " + "[" * 100_000,
        "\n".join(" " * depth + "key:" for depth in range(1500)),
        "training:\n  seed: " + "9" * 10_000,
        "#" + "x" * 20_000_000,
        "data:\n  prompt: " + "x" * 100_000,
        "data:\n  negative_prompts: &a [*a]",
        "x" * 100_000 + ": {a: 1}",
        "lora:\n  " + "x" * 100_000 + ": 1",
        "model: " + "x" * 100_000,
        "? [a]\n: 1",
    ],
    ids=lambda text: text[:12],
)
def test_hostile_text_is_refused_at_once_and_not_repeated(text, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    start = time.process_time()
    with pytest.raises(InputError) as error:
        load_config(CRACK, profile=path)
    assert time.process_time() - start < 5
    assert len(str(error.value)) < 1000
    assert str(path) in str(error.value)
    assert error.value.fix


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=1e23",
        "scale.learning_rate=1e5",
        "training.weight_decay=1e30",
        "training.adam_epsilon=1e300",
        "training.max_grad_norm=1e-300",
        "training.save_total_limit=100000000000",
        "training.batch_size=1000000000",
        "training.num_epochs=1000000000",
        "training.gradient_accumulation_steps=1000000000000",
        "training.num_workers=10000",
        "training.warmup_steps=1000000000",
        "training.logging_steps=1000000000",
        "lora.alpha=1e300",
        "scale.num_epochs=1e9",
        "scale.warmup_steps=1e9",
        "evaluation.score_threshold=0",
        "evaluation.score_threshold=1",
        "evaluation.mask_threshold=0",
        "output.output_dir=/",
        "output.output_dir=/dev/null",
        "output.output_dir=../../../etc/SECRET",
        "output.output_dir=runs/../../x",
        "data.train_split=../train",
        "data.train_split=/train",
        "data.val_split=..",
        "data.val_split=train",
        "model.revision=${HOME}",
        'data.data_dir="a\\0b"',
        "data.negative_prompts=[[dog]]",
    ],
)
def test_nonsense_is_refused(override):
    with pytest.raises(InputError) as error:
        load_with(override)
    assert override.partition("=")[0] in str(error.value) or "section" in str(error.value)
    assert error.value.fix


def test_relative_paths_lie_in_the_repository_and_on_the_command_line_in_the_current_folder(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert resolve("data") == ROOT / "data"
    assert resolve("nowhere") == ROOT / "nowhere"
    assert resolve(tmp_path / "x") == tmp_path / "x"
    assert in_current_folder("data") == tmp_path / "data"
    assert in_current_folder(tmp_path / "x") == tmp_path / "x"
    assert resolve("~") == in_current_folder("~") == Path.home()
    arguments = ["train", "--config", "c.yaml", "--data", "photos #2", "--output", "out"]
    args = build_parser().parse_args(arguments)
    assert (args.config, args.data, args.output) == tuple(
        tmp_path / name for name in ("c.yaml", "photos #2", "out")
    )


def test_config_cannot_be_changed_after_loading():
    with pytest.raises(ValueError, match="frozen"):
        load_config(CRACK).training.num_epochs = 1


@pytest.mark.parametrize("text", ["5e-5", "5.0e-5", "0.00005", "+5E-05"])
def test_a_float_is_a_float_however_it_is_written(text):
    assert load_with(f"training.learning_rate={text}").training.learning_rate == 5e-5


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"),
        ("off", "off"),
        ("010", 10),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("true", True),
        ("~", None),
    ],
)
def test_yaml_is_version_1_2(text, value):
    assert parse_yaml(text, where="here") == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.num_epoch=3", "did you mean 'num_epochs'"),
        ("trainning.num_epochs=3", "did you mean 'training'"),
        ("training.rank=3", "did you mean 'lora.rank'"),
        ("training.zzz=3", "valid keys are learning_rate"),
        ("training.learning_rate='5e-5'", "'training.learning_rate' is '5e-5' (str)"),
        ("training.learning_rate=.nan", "finite"),
        ("training.learning_rate=0", "greater than 0"),
        ("training.num_epochs=0", "greater than or equal to 1"),
        ("training.num_epochs=2.0", "valid integer"),
        ("training.num_epochs=true", "valid integer"),
        ("training.gradient_checkpointing=1", "valid boolean"),
        ("lora.apply_to_text_encoder='true'", "valid boolean"),
        ("lora.apply_to_text_encoder=yes", "valid boolean"),
        ("lora.dropout=1", "less than 1"),
        ("lora.target_modules=q_proj", "valid tuple"),
        ("lora.target_modules=[]", "at least 1 item"),
        ("lora.target_modules=[q_proj, q_proj]", "more than once"),
        ("training.mixed_precision=float16", "'bf16', 'fp16' or 'no'"),
        ("data.prompt=' '", "must not be blank"),
        ("data.prompt=Moss", "more than once"),
        ("data.negative_prompts=[dog, Dog]", "more than once"),
        ("evaluation.score_threshold=1.5", "less than 1"),
        ("evaluation.absent_prompts=[]", "needs at least one entry"),
        ("training.num_epochs", "write section.key=value"),
        ("lora.rank=[1", "not valid YAML"),
    ],
)
def test_wrong_override_names_itself_and_the_fix(override, expected):
    with pytest.raises(InputError) as error:
        load_with(override)
    assert expected in str(error.value)
    assert override in str(error.value)
    assert error.value.fix


def test_nothing_to_adapt_is_refused():
    off = [
        f"lora.{key}=false"
        for key in Config.model_fields["lora"].annotation.model_fields
        if key.startswith("apply_to_")
    ]
    with pytest.raises(InputError, match="nothing would be trained"):
        load_with(*off)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("  rank: 16", "  rnak: 16", "did you mean 'rank'"),
        ("  rank: 16", "  rank: 16\n  rank: 8", 'duplicate key "rank"'),
        ("  seed: 42", "  # seed: 42", "'training.seed' is missing"),
        ("lora:", "lora: 3\nlora2:", "holds 3 and no keys"),
        ("model:", "model: [", "not valid YAML"),
    ],
)
def test_wrong_file_is_named(old, new, expected, tmp_path):
    path = tmp_path / "mine.yaml"
    text = CRACK.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_config(path)
    assert expected in str(error.value)
    assert str(path) in str(error.value)


def test_the_layer_that_set_a_wrong_value_is_named(tmp_path):
    profile = tmp_path / "mine.yaml"
    profile.write_text("lora:\n  rank: -1\n", encoding="utf-8")
    with pytest.raises(InputError) as error:
        load_config(CRACK, profile)
    assert str(error.value).startswith(str(profile))


def test_missing_file_profile_and_list_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(InputError, match="sam3, tiny"):
        load_config(CRACK, "tinny")
    (tmp_path / "list.yaml").write_text("- 1\n", encoding="utf-8")
    with pytest.raises(InputError, match="sections are expected"):
        load_config(tmp_path / "list.yaml")


SECTIONS = {name: field.annotation for name, field in Config.model_fields.items()}


def section_of(node, aliases):
    """Return the section an expression stands for: config.lora, self.lora, lora, lora_config."""
    if isinstance(node, ast.Attribute):
        return node.attr.removesuffix("_config") if node.attr.endswith("_config") else node.attr
    if isinstance(node, ast.Name):
        return aliases.get(node.id, node.id.removesuffix("_config"))
    return None


def reads_of(tree):
    """Return (section, key) pairs and Config properties that a module reads, by its syntax."""
    aliases = {
        node.targets[0].id: node.value.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Attribute)
        and node.value.attr in SECTIONS
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            found.add((section_of(node.value, aliases), node.attr))
            found.add(("", node.attr))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "getattr":
            section, key = section_of(node.args[0], aliases), node.args[1]
            if isinstance(key, ast.JoinedStr) and isinstance(key.values[0], ast.Constant):
                prefix = key.values[0].value
                keys = SECTIONS[section].model_fields if section in SECTIONS else ()
                found |= {(section, key) for key in keys if key.startswith(prefix)}
    return found


def test_every_guard_has_its_key_and_every_key_its_guard():
    """`Guards` stops only for the faults of keys that are on."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(Guards._faults)))
    yields = [node.value for node in ast.walk(tree) if isinstance(node, ast.Yield)]
    assert {fault.elts[0].value for fault in yields} == set(SECTIONS["guards"].model_fields)


def test_every_key_is_read_by_the_package():
    trees = {
        path.relative_to(ROOT / "helpers").as_posix(): ast.parse(path.read_text(encoding="utf-8"))
        for path in PACKAGE
    }
    config_tree = trees.pop("config.py")
    reads = set().union(*(reads_of(tree) for tree in trees.values()))
    reads |= {("training", name) for name in SAME_NAMES}  # handed on together, by these names
    for node in ast.walk(config_tree):  # a key is also read through a property that is read
        if isinstance(node, ast.FunctionDef) and ("", node.name) in reads:
            decorators = [getattr(decorator, "id", "") for decorator in node.decorator_list]
            if "property" in decorators:
                reads |= reads_of(node)
    dead = [
        f"{section}.{key}"
        for section, fields in SECTIONS.items()
        for key in fields.model_fields
        if (section, key) not in reads and section != "guards"
    ]
    assert not dead, f"nothing reads {', '.join(dead)}"


def test_dead_keys_are_noticed():
    tree = ast.parse(
        "lora = config.lora\nlora.rank\nother.alpha\ngetattr(config.lora, f'apply_to_{x}')"
    )
    reads = reads_of(tree)
    assert ("lora", "rank") in reads
    assert ("lora", "alpha") not in reads
    assert ("lora", "apply_to_text_encoder") in reads
