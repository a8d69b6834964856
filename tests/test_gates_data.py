"""Gates on data, prompts and settings: what they compare, from which number on they speak."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from started_runs import copy_walls, examine, start_run
from tiny_random import write_dataset

from helpers.checks.findings import Finding, Place
from helpers.checks.images import contrast, contrast_per_turn, turns
from helpers.data.coco import read_split
from helpers.diagnose.answer_gates import unannotated_objects
from helpers.diagnose.data_gates import (
    DATA_GATES,
    PROMPT_GATES,
    SLIP,
    evidence_of,
    trained_and_asked,
)
from helpers.diagnose.patient import Examination, Inapplicable
from helpers.diagnose.run_gates import CONFIG_GATES, regularisation
from helpers.errors import InputError
from helpers.files import ROOT, TINY_BASE, write_json
from helpers.lab.spoil import in_every_file
from helpers.model.sam3 import load_base

REAL = ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def tiny_sam3():
    return load_base(TINY_BASE, resolution=128)


@pytest.fixture(scope="module")
def walls(tmp_path_factory):
    return copy_walls(tmp_path_factory.mktemp("walls") / "data")


def finding(code, count):
    places = tuple(Place("train", f"{n}.png", None, n) for n in range(count))
    return Finding(code, "somewhere", "something", "mend it", places)


def test_a_slip_of_the_hand_names_no_cause():
    [slip] = evidence_of([finding("D22_BOX_OFF_MASK", 4)], 100)
    [fault] = evidence_of([finding("D22_BOX_OFF_MASK", 50)], 100)
    assert (slip.cause, slip.confidence) == ("boxes_off_masks", SLIP)
    assert fault.confidence == pytest.approx(0.95)
    assert evidence_of([finding("D08_MISSING_IMAGE", 1)], 100)[0].confidence > 0.9
    assert evidence_of([finding("D50_TOO_SMALL", 49)], 100)[0].confidence == SLIP
    assert evidence_of([finding("D73_IMAGE_TURNED", 100)], 100) == []


def test_thin_boxes_are_not_reported_as_off_their_masks_too():
    thin, off = finding("D40_DEGENERATE_BOX", 40), finding("D22_BOX_OFF_MASK", 50)
    shares = {e.cause: e.confidence for e in evidence_of([thin, off], 100)}
    assert shares == pytest.approx({"not_finite": 0.94, "boxes_off_masks": 0.91})


def test_turns_are_the_eight_symmetries_of_a_square():
    pixels = np.arange(9).reshape(3, 3)
    turned = [array for _, array in turns(pixels)]
    assert np.array_equal(turned[0], pixels)
    assert len({array.tobytes() for array in map(np.ascontiguousarray, turned)}) == 8


def test_contrast_counts_deviations_of_the_rim():
    grey = np.full((40, 40), 100.0)
    grey[::2] = 110.0  # deviation 5 around 105
    mask = np.zeros((40, 40), np.uint8)
    mask[10:20, 10:20] = 1
    grey[10:20, 10:20] = 55.0
    assert contrast(grey, mask) == pytest.approx(10.0, rel=0.05)
    assert np.isnan(contrast(grey, np.zeros_like(mask)))


def test_turned_images_have_their_contrast_where_they_are_turned_back(tmp_path):
    folder = write_dataset(tmp_path / "data")
    before = contrast_per_turn(read_split(folder, "train").records)
    for path in (folder / "train").glob("*.png"):
        image = Image.open(path)
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
    after = contrast_per_turn(read_split(folder, "train").records)
    assert np.median(before["as it is"]) > 5 * np.median(after["as it is"])
    mirrored = "mirrored, as it is"
    assert after[mirrored] == pytest.approx(before["as it is"])


def stub(scores, absent=()):
    """Ten images with a crack, then six without, and the scores of their prompts."""
    crack = SimpleNamespace(category="crack")
    sample = [SimpleNamespace(image_id=n, objects=(crack,) if n < 10 else ()) for n in range(16)]
    raws = {(n, "crack"): SimpleNamespace(max_score=score) for n, score in enumerate(scores)}
    for n in range(16):
        raws[n, "dog"] = SimpleNamespace(max_score=0.8 if n in absent else 0.01)
    config = SimpleNamespace(evaluation=SimpleNamespace(absent_prompts=("dog",)))
    return SimpleNamespace(
        sample=sample,
        unannotated=sample[10:],
        raws=lambda prompts, records: raws,
        config=config,
        data_dir="d",
    )


@pytest.mark.parametrize(
    ("scores", "absent", "causes"),
    [
        ([0.7] * 10 + [0.02] * 6, (), []),
        (
            [0.7] * 10 + [0.5] * 3 + [0.02] * 3,
            (),
            [],
        ),  # a weak model errs, but knows the difference
        ([0.7] * 5 + [0.4] * 5 + [0.5] * 3 + [0.02] * 3, (), ["labels_missing"]),
        ([0.7] * 5 + [0.4] * 5 + [0.5] * 3 + [0.02] * 3, (10, 11, 12), []),  # any word scores there
        ([0.01] * 16, (), []),  # it sees nothing anywhere
    ],
)
def test_unannotated_objects_are_seen_by_a_model_that_says_no_elsewhere(scores, absent, causes):
    _, evidence = unannotated_objects(stub(scores, absent))
    assert [one.cause for one in evidence] == causes
    assert not any(one.is_direct for one in evidence)


def test_too_few_images_without_objects_are_not_judged():
    few = stub([0.7] * 16)
    few.unannotated = few.unannotated[:3]
    with pytest.raises(Inapplicable, match="too few to compare"):
        unannotated_objects(few)


@pytest.mark.parametrize(
    ("settings", "causes"),
    [
        (("lora.dropout=0.2", "scale.num_epochs=1.0"), 0),  # 50 epochs
        (("lora.dropout=0.21",), 1),
        (("scale.num_epochs=1.02",), 1),
        (("lora.dropout=0.5", "scale.num_epochs=4.0"), 2),
    ],
)
def test_regularisation_limits(tmp_path, walls, settings, causes):
    _, evidence = regularisation(Examination(start_run(tmp_path, walls, *settings)))
    assert [one.cause for one in evidence] == ["extreme_regularisation"] * causes


def test_words_are_compared_without_case_and_space_but_with_plural(tmp_path, walls):
    run = start_run(tmp_path, walls)
    prompts = {"prompts": {"Crack ": 12}, "negatives": {"moss": 16}, "negatives_per_image": 3}
    write_json(run / "prompts.json", prompts)
    for prompt, causes in (
        (None, []),
        ("crack", []),
        ("cracks", ["other_training_prompt"]),
        ("moss", ["other_training_prompt"]),
    ):
        _, evidence = trained_and_asked(Examination(run, prompt=prompt))
        assert [one.cause for one in evidence] == causes
    write_json(run / "prompts.json", prompts | {"prompts": {}})
    with pytest.raises(InputError, match="no prompt was trained"):
        trained_and_asked(Examination(run))


def add_names(content, *, every_second):
    """Add 'cracks' as a parent; with objects of its own on demand."""
    content["categories"][0]["supercategory"] = "cracks"
    content["categories"].append({"id": 2, "name": "cracks", "supercategory": "none"})
    for entry in content["annotations"] if every_second else ():
        entry["category_id"] = 1 + entry["id"] % 2


@pytest.mark.parametrize(("every_second", "causes"), [(False, []), (True, ["category_names"])])
def test_a_second_name_is_a_cause_where_it_takes_objects_away(
    tmp_path, tiny_sam3, every_second, causes
):
    folder = copy_walls(tmp_path / "data")
    in_every_file(lambda content: add_names(content, every_second=every_second))(folder)
    found, results = examine(start_run(tmp_path / "run", folder), PROMPT_GATES[:1], tiny_sam3)
    assert found == causes
    assert "'cracks'" in results["names"].measured


@pytest.mark.parametrize("name", ["masonry224", "pothole90"])
def test_photographs_give_no_cause(tmp_path, tiny_sam3, name):
    if not (REAL / name).is_dir():
        pytest.skip("the photographs are not here")
    run = start_run(tmp_path, REAL / name)
    write_json(run / "prompts.json", {"prompts": {"crack": 1, "pothole": 1}})
    gates = (*DATA_GATES, *PROMPT_GATES[:-1], *CONFIG_GATES)  # all but what the base is asked
    causes, results = examine(run, gates, tiny_sam3)
    assert causes == []
    assert results["annotations on pixels"].status == "ok"


def test_a_dataset_that_is_not_there_is_unusable_input(tmp_path, tiny_sam3):
    with pytest.raises(InputError, match="no such dataset"):
        examine(start_run(tmp_path, tmp_path / "nowhere"), DATA_GATES, tiny_sam3)


def test_a_dataset_without_splits_is_unreadable_and_the_rest_stays_open(tmp_path, tiny_sam3):
    (tmp_path / "empty").mkdir()
    causes, results = examine(start_run(tmp_path, tmp_path / "empty"), DATA_GATES, tiny_sam3)
    assert causes == ["unreadable_data"]
    statuses = [result.status for result in results.values()]
    assert statuses == ["failed"] + ["not checked"] * (len(DATA_GATES) - 1)
