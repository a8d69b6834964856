"""A category asked by another noun: in training, in evaluation, as an absent prompt, in the checks."""

import json

import pytest
from builders import check, edit_coco, make_processor, write_coco
from tiny_random import (
    save_tiny_base,
    tiny_model,
    tiny_processor,
    tiny_run_config,
    write_dataset,
)

from helpers.__main__ import main
from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.data.dataset import PromptDataset
from helpers.data.records import (
    absent_candidates,
    normalise_noun,
    nouns_overlap,
    present_prompts,
    refuse_unknown_categories,
    rename_categories,
)
from helpers.detect.queries import predict_split
from helpers.errors import InputError
from helpers.files import CONFIGS, write_text
from helpers.train.training import train

CRACK, JOINT = "crack", "joint"
CONFIG = CONFIGS / "crack_detection_config.yaml"


@pytest.fixture
def split(tmp_path):
    return read_split(write_coco(tmp_path / "data"), "train")


def record(split, name):
    return next(one for one in split.records if one.image_id == name)


def test_an_empty_mapping_changes_nothing(split):
    assert rename_categories(split, {}) is split
    renamed = rename_categories(split, {"no such": "thing"})
    assert renamed.records == split.records
    assert renamed.categories == split.categories


def test_two_categories_of_one_noun_share_one_query(split):
    renamed = rename_categories(split, {CRACK: "damage", JOINT: "damage"})
    assert renamed.categories == ("damage",)
    assert [entry.name for entry in renamed.category_table] == ["damage"]
    both = record(renamed, "b.png")
    prompts = present_prompts(both, renamed.categories)
    assert {noun: len(items) for noun, items in prompts.items()} == {"damage": 2}
    assert [item.file_category for item in both.objects] == [CRACK, JOINT]


def test_neither_name_of_an_object_is_asked_as_absent(split):
    renamed = rename_categories(split, {CRACK: "fissure"})
    shown = record(renamed, "a.png")
    assert absent_candidates(shown, ["fissure", "cracks", JOINT, "dog"]) == [JOINT, "dog"]
    empty = record(renamed, "c.png")
    assert absent_candidates(empty, ["fissure", CRACK]) == ["fissure", CRACK]


def test_contents_are_known_by_the_noun_too(tmp_path):
    write_coco(tmp_path)
    edit_coco(tmp_path, "train", lambda c: c["images"][2].update(contents=[CRACK]))
    renamed = rename_categories(read_split(tmp_path, "train"), {CRACK: "fissure"})
    assert absent_candidates(record(renamed, "c.png"), ["fissure", CRACK]) == []


def test_the_dataset_asks_the_nouns(split):
    renamed = rename_categories(split, {CRACK: "fissure"})
    dataset = PromptDataset(
        renamed, make_processor(), resolution=56, mask_size=32, num_negatives=2,
        negative_prompts=["crack", "dog"],
    )  # fmt: skip
    asked = [{q["prompt"]: q["is_positive"] for q in item["queries"]} for item in dataset]
    assert asked[0]["fissure"] is True
    assert CRACK not in asked[0]
    assert asked[1] == {"fissure": True, JOINT: True, "dog": False}


def test_evaluation_asks_the_nouns_and_knows_their_objects(tmp_path):
    root = write_dataset(tmp_path / "bars")
    split = rename_categories(read_split(root, "test"), {"crack": "hole"})
    queries = predict_split(tiny_model(), tiny_processor(), split, absent_prompts=("dog",))
    plain = predict_split(
        tiny_model(), tiny_processor(), read_split(root, "test"), prompt="hole",
        absent_prompts=("dog",),
    )  # fmt: skip
    assert {query.prompt for query in queries} == {"hole", "dog"}
    assert [q.gt for q in queries if q.is_positive] == [q.gt for q in plain if q.is_positive]


def test_checks_look_at_the_nouns(tmp_path):
    write_coco(tmp_path)
    for name in ("train", "valid", "test"):
        edit_coco(tmp_path, name, lambda c: [c["categories"][i].update(name=n) for i, n in ((0, "cracks"), (1, "0"))])  # fmt: skip

    def codes(**settings):
        return {finding.code for finding in check(tmp_path, **settings).findings}

    assert "D32_NO_NOUN" in codes()
    assert "D32_NO_NOUN" not in codes(prompts_by_category={"0": "joint", "cracks": "crack"})
    assert "D31_SIMILAR_NAMES" in codes(prompts_by_category={"0": "crack"})
    assert "D31_SIMILAR_NAMES" not in codes(prompts_by_category={"0": "crack", "cracks": "crack"})
    with pytest.raises(InputError, match="'crakcs'.*no category") as error:
        codes(prompts_by_category={"crakcs": "crack"})
    assert error.value.fix == "did you mean 'cracks'?"


def test_unknown_keys_are_refused_only_if_no_split_has_them(split):
    refuse_unknown_categories({JOINT: "gap"}, [split])
    with pytest.raises(InputError, match="use one of|no category"):
        refuse_unknown_categories({"zzz": "gap"}, [split])


def test_a_run_trains_and_is_evaluated_by_its_nouns(tmp_path, capfd):
    base, data_dir = save_tiny_base(tmp_path / "base"), write_dataset(tmp_path / "bars")
    config = tiny_run_config(base, data_dir, "data.prompts_by_category={crack: hole}",
                             "data.negative_prompts=[dog]")  # fmt: skip
    result = train(config, output_dir=tmp_path / "run")
    assert set(result.prompts["prompts"]) == {"hole"}
    assert result.metrics["objects"]["train"] == 7
    capfd.readouterr()
    status = main(["evaluate", "--adapter", str(tmp_path / "run"), "--split", "test", "--json"])
    out, err = capfd.readouterr()
    assert status == 0
    assert json.loads(out)["num_present"] == 2
    assert "never trained" not in err


def test_a_config_without_the_key_is_the_one_with_an_empty_mapping(tmp_path):
    config = load_config(CONFIG)
    text = config.to_yaml()
    assert text.count("prompts_by_category: {}\n") == 1
    path = tmp_path / "before.yaml"
    path.write_text(text.replace("  prompts_by_category: {}\n", ""))
    assert load_config(path) == config
    assert load_config(path).fingerprint() == config.fingerprint()
    mapped = load_config(CONFIG, overrides=['data.prompts_by_category={"0": pothole}'])
    assert mapped.data.prompts_by_category == {"0": "pothole"}
    assert mapped.fingerprint() != config.fingerprint()
    assert load_config(write_text(tmp_path / "mapped.yaml", mapped.to_yaml())) == mapped


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.prompts_by_category={0: pothole}"], "valid string"),
        (['data.prompts_by_category={"0": " "}'], "blank"),
        (["data.prompts_by_category=[crack]"], "valid dictionary"),
        (["data.prompt=crack", "data.prompts_by_category={a: b}"], "prompt replaces every"),
    ],
)
def test_an_impossible_mapping_is_refused(overrides, message):
    with pytest.raises(InputError, match=message):
        load_config(CONFIG, overrides=overrides)


@pytest.mark.parametrize(
    ("noun", "form"),
    [
        ("Concrete_cracks ", "concrete crack"),
        ("moss", "moss"),
        ("Bushes", "bush"),
        ("cavities", "cavity"),
        ("bus", "bus"),
        ("tiles", "tile"),
    ],
)
def test_nouns_are_normalised(noun, form):
    assert normalise_noun(noun) == form


def test_nouns_overlap_in_words():
    assert nouns_overlap("cracks", "concrete crack")
    assert nouns_overlap("brick wall", "Brick")
    assert not nouns_overlap("crack", "cracker")
    assert not nouns_overlap("crack", "joint")
    assert not nouns_overlap("", "joint")
    assert nouns_overlap("-", " -")  # no words, but the same name
    assert not nouns_overlap("-", "crack")
