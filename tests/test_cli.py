import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image
from pycocotools import mask as coco_mask
from tiny_random import RESOLUTION, save_tiny_base

from helpers.__main__ import main
from helpers.answers import answer_text
from helpers.cli.commands import _labels, build_parser
from helpers.config import load_config
from helpers.data.coco import read_split
from helpers.detect.predictor import Predictor
from helpers.detect.tiles import predict_tiled
from helpers.files import ROOT
from helpers.model.sam3 import best_device
from helpers.train.run import load_run


@pytest.fixture
def run(run_folder):
    return run_folder


@pytest.fixture
def config_file(run_folder):
    return run_folder / "config.yaml"


def call(capfd, *arguments):
    """Run a command; return status, stdout and stderr."""
    capfd.readouterr()
    status = main([str(argument) for argument in arguments])
    captured = capfd.readouterr()
    return status, captured.out, captured.err


def refused(capfd, *arguments, naming):
    """Run a command that has to fail with one clear message."""
    status, out, err = call(capfd, *arguments)
    assert status == 2
    assert out == ""
    assert "Traceback" not in err
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert str(naming) in errors[0]
    return errors[0]


def edit_annotations(data_dir, split, edit):
    path = data_dir / split / "_annotations.coco.json"
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_help_is_fast_and_documents_the_exit_statuses():
    script = (
        "import sys\n"
        "from helpers.__main__ import main\n"
        "try:\n"
        "    main(['--help'])\n"
        "except SystemExit as stop:\n"
        "    assert stop.code == 0\n"
        "assert not {'jinja2', 'torch', 'transformers'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    for part in ("exit status", "130", "unusable input", "check", "predict", "report"):
        assert part in done.stdout


@pytest.mark.parametrize("command", ["check", "train", "predict", "evaluate", "report"])
def test_every_command_has_help(capfd, command):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert "exit status" in capfd.readouterr().out


def test_check_a_good_dataset(capfd, data_dir):
    status, out, _ = call(capfd, "check", data_dir, "--json")
    content = json.loads(out)
    assert status == 0
    assert content["ok"] is True
    assert set(content) == {"data", "ok", "findings", "counts"}
    assert content["counts"]["train"]["objects_after_collate"] == 7
    status, out, _ = call(capfd, "check", data_dir)
    assert status == 0
    assert "ok" in out


def test_check_a_bad_dataset_has_status_1(capfd, data_copy):
    edit_annotations(
        data_copy, "train", lambda c: c["annotations"][0].update(bbox=[50, 30, 40, 40])
    )
    status, out, _ = call(capfd, "check", data_copy, "--json")
    content = json.loads(out)
    assert status == 1
    assert content["ok"] is False
    assert set(content["findings"][0]) == {"code", "severity", "where", "message", "fix"}


def plural(content):
    content["categories"][0].update(name="cracks")


def test_check_reads_the_data_as_the_training_will(capfd, config_file, data_copy):
    """The mapping of --set or --config changes what is asked; a slip in it is refused."""
    for split in ("train", "valid", "test"):
        edit_annotations(data_copy, split, plural)
    mapping = "data.prompts_by_category={cracks: crack}"
    asked = {}
    for options in ((), ("--set", mapping), ("--config", config_file, "--set", mapping)):
        status, out, _ = call(capfd, "check", data_copy, *options, "--json")
        assert status == 0
        asked[len(options)] = list(json.loads(out)["counts"]["train"]["objects_per_category"])
    assert asked == {0: ["cracks"], 2: ["crack"], 4: ["crack"]}
    slip = "data.prompts_by_category={crakcs: crack}"
    line = refused(capfd, "check", data_copy, "--set", slip, naming="crakcs")
    assert "did you mean 'cracks'?" in line


def test_check_takes_the_dataset_of_its_config(capfd, config_file, data_dir):
    by_config = call(capfd, "check", "--config", config_file, "--json")
    by_folder = call(capfd, "check", data_dir, "--config", config_file, "--json")
    assert by_config[:2] == by_folder[:2]
    refused(capfd, "check", naming="neither a dataset nor a config")


def test_train_predict_report_as_one_story(capfd, config_file, data_dir, tmp_path):
    folder = tmp_path / "run"
    arguments = ("train", "--config", config_file, "--output", folder, "--data", data_dir)
    status, out, _ = call(capfd, *arguments, "--set", "training.seed=3", "--json")
    assert status == 0
    assert json.loads(out)["metrics"]["steps"] == 6
    assert load_config(folder / "config.yaml").training.seed == 3
    refused(capfd, *arguments, naming="already holds a run")
    status, out, _ = call(capfd, *arguments, "--set", "training.seed=3", "--resume")
    assert status == 0
    assert "checklist" in out
    status, out, _ = call(capfd, "report", "--adapter", folder)
    assert status == 0
    assert "vision_encoder" in out


def test_predict_prints_the_documented_json(capfd, run, data_dir, tmp_path):
    image, picture = data_dir / "test" / "test_0.png", tmp_path / "out.png"
    status, out, err = call(
        capfd,
        *("predict", "--adapter", run, "--image", image, "--prompt", "crack", "--prompt", "dog"),
        *("--threshold", "0.0001", "--output", picture, "--json"),
    )
    assert status == 0
    content = json.loads(out)
    assert [entry["prompt"] for entry in content] == ["crack", "dog"]
    assert content[0]["image"] == str(image)
    assert set(content[0]) == {
        "image",
        "prompt",
        "presence_prob",
        "max_query_prob",
        "max_score",
        "detections",
    }
    found = content[0]["detections"][0]
    assert set(found) == {"score", "box_xyxy", "mask_rle"}
    assert found["score"] == content[0]["max_score"]
    assert coco_mask.decode(found["mask_rle"]).shape == (40, 60)
    assert Image.open(picture).size[0] > 100


def test_predict_warns_of_prompts_that_were_never_trained(capfd, run, data_dir):
    image = data_dir / "test" / "test_0.png"
    common = ("predict", "--adapter", run, "--image", image, "--json")
    status, out, err = call(capfd, *common, "--prompt", "cracks", "--prompt", "Dog")
    assert status == 0
    assert len(json.loads(out)) == 2
    assert "'cracks' was never asked in training; the closest trained prompt is 'crack'" in err
    assert "'Dog'" not in err


def test_predict_finds_the_run_of_a_config(capfd, run, config_file, data_dir):
    image = data_dir / "test" / "test_0.png"
    common = ("--image", image, "--prompt", "crack", "--json")
    by_config = call(capfd, "predict", "--config", config_file, *common)
    by_folder = call(capfd, "predict", "--adapter", run, *common)
    assert by_config[0] == 0
    assert by_config[1] == by_folder[1]


def test_predict_without_adapter_asks_the_base(capfd, run, base, data_dir):
    image = data_dir / "test" / "test_0.png"
    common = ("--image", image, "--prompt", "crack", "--threshold", "0", "--json")
    alone = call(capfd, "predict", "--base", base, *common)
    tuned = call(capfd, "predict", "--adapter", run, *common)
    assert alone[0] == 0
    assert json.loads(alone[1])[0]["max_score"] != json.loads(tuned[1])[0]["max_score"]


def test_predict_reads_a_bare_peft_adapter(capfd, run, data_dir, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors", "base.json"):
        shutil.copy(run / name, bare / name)
    image = data_dir / "test" / "test_0.png"
    common = ("--image", image, "--prompt", "crack", "--threshold", "0.0001", "--json")
    outs = [call(capfd, "predict", "--adapter", folder, *common)[1] for folder in (bare, run)]
    assert outs[0] == outs[1]
    assert json.loads(outs[0])[0]["detections"]


def test_predict_promptless_says_what_to_expect(capfd, run, data_dir):
    image = data_dir / "test" / "test_0.png"
    status, out, err = call(capfd, "predict", "--adapter", run, "--image", image, "--json")
    assert status == 0
    assert json.loads(out)[0]["prompt"] == "object"
    assert "no prompt given" in err
    assert "0.0001" in err


def test_predict_takes_folders_and_names_pictures_after_images(capfd, run, data_dir, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for name in ("test_0.png", "test_1.png"):
        shutil.copy(data_dir / "test" / name, images / name)
    for name in ("a.heic", "b.gif", ".hidden"):
        (images / name).touch()
    (images / "more").mkdir()
    arguments = ("predict", "--adapter", run, "--image", images, "--prompt", "crack", "--json")
    status, out, err = call(capfd, *arguments, "--output", tmp_path / "o.png")
    assert status == 0
    assert "3 other files and folders" in err
    assert "a.heic, b.gif, more" in err
    assert len(json.loads(out)) == 2
    assert (tmp_path / "o_test_0.png").is_file()
    assert (tmp_path / "o_test_1.png").is_file()


@pytest.fixture
def large_image(tmp_path):
    """Grey noise with a dark bar, three times as wide as the input of the model."""
    pixels = np.random.default_rng(0).integers(120, 200, (90, 3 * RESOLUTION, 3), dtype=np.uint8)
    pixels[40:50, 20:-20] = 30
    Image.fromarray(pixels).save(tmp_path / "large.png")
    return tmp_path / "large.png"


def test_predict_by_tiles_looks_as_predict_tiled_does(capfd, run, large_image, tmp_path):
    picture = tmp_path / "out.png"
    common = ("predict", "--adapter", run, "--image", large_image, "--prompt", "crack", "--json")
    options = ("--threshold", "0.001", "--tile", RESOLUTION, "--overlap", "0.5")
    status, out, err = call(capfd, *common, *options, "--output", picture)
    assert (status, err) == (0, "")
    loaded = load_run(run)
    [expected] = predict_tiled(
        Predictor(loaded.model, loaded.processor), large_image, "crack",
        tile=RESOLUTION, overlap=0.5, threshold=0.001,
    )  # fmt: skip
    [answer] = json.loads(out)
    pairs = [(answer, expected.to_dict())]
    if best_device().type == "cpu":
        assert answer == pairs[0][1]
    pairs += zip(*(one.pop("detections") for one in pairs[0]), strict=True)
    for own, other in pairs:  # a GPU adds up in another order each time
        assert own.pop("box_xyxy", 0) == pytest.approx(other.pop("box_xyxy", 0), abs=1)
        scores = [name for name in other if name.endswith(("score", "prob"))]
        assert [own[name] for name in scores] == pytest.approx([other[n] for n in scores], rel=1e-4)
    assert expected.detections
    assert picture.is_file()


def test_predict_by_one_large_tile_is_the_plain_answer(capfd, run, large_image):
    common = ("predict", "--adapter", run, "--image", large_image, "--prompt", "crack", "--json")
    plain, tiled = (
        json.loads(call(capfd, *common, *options)[1])[0] for options in ((), ("--tile", "999"))
    )
    assert plain["max_score"] == tiled["max_score"]


def test_predict_hints_at_tiles_where_an_image_is_much_larger(capfd, run, large_image, data_dir):
    common = ("predict", "--adapter", run, "--prompt", "crack", "--image")
    _, _, err = call(capfd, *common, large_image)
    assert f"{3 * RESOLUTION} pixels to {RESOLUTION}" in err
    assert "--tile" in err
    small = data_dir / "test" / "test_0.png"
    assert "--tile" not in call(capfd, *common, small)[2]
    assert "--tile" not in call(capfd, *common, large_image, "--tile", RESOLUTION)[2]


@pytest.mark.parametrize(("option", "value"), [("--tile", "0"), ("--overlap", "0")])
def test_predict_refuses_impossible_tiles(capfd, run, large_image, option, value):
    arguments = ("predict", "--adapter", run, "--image", large_image, "--prompt", "crack")
    options = {"--tile": str(RESOLUTION), option: value}
    given = [part for pair in options.items() for part in pair]
    refused(capfd, *arguments, *given, naming=option.removeprefix("--"))


def test_evaluate_prints_the_documented_json(capfd, run, data_dir):
    arguments = ("evaluate", "--adapter", run, "--data", data_dir, "--split", "test")
    status, out, _ = call(capfd, *arguments, "--json")
    assert status == 0
    names = {"AP", "AP50", "AP75", "cgF1", "pmF1", "IL_MCC", "union_iou"}
    names |= {"max_score_present", "max_score_absent"}
    assert names <= set(json.loads(out))
    status, out, _ = call(capfd, *arguments)
    assert status == 0
    assert "union_iou" in out


def test_evaluate_writes_a_page_that_holds_every_picture(capfd, run, data_dir, tmp_path):
    page = tmp_path / "page.html"
    arguments = ("evaluate", "--adapter", run, "--data", data_dir, "--html", page, "--json")
    status, out, _ = call(capfd, *arguments)
    assert status == 0
    text = page.read_text(encoding="utf-8")
    assert call(capfd, *arguments, "--split", "valid")[0] == 0, "its own page is replaced"
    assert '"validation"' in page.read_text(encoding="utf-8")  # where a threshold may be chosen
    assert '"validation"' not in text
    page.write_text("my notes")
    with pytest.raises(SystemExit):
        main([str(argument) for argument in arguments])
    assert "is no page of this command line" in capfd.readouterr().err
    assert page.read_text() == "my notes"
    content = json.loads(text.partition('type="application/json">')[2].partition("</script>")[0])
    split = read_split(data_dir, "test")
    content = content["content"]
    assert [one["name"] for one in content["images"]] == [r.image_id for r in split.records]
    asked = [question for one in content["images"] for question in one["questions"]]
    assert sum(len(one["objects"]) > 0 for one in asked) == json.loads(out)["num_present"]
    assert content["masks"] == [0.3, 0.5, 0.7]
    for one in asked:
        (answer,) = one["answers"]
        scores = answer["scores"]
        assert scores == sorted(scores, reverse=True)
        for level in answer["masks"]:
            assert np.shape(level["overlaps"]) == (len(scores), len(scores)) or not scores
            assert all(len(row) == len(one["objects"]) for row in level["ious"])


def test_evaluate_says_which_objects_it_cannot_judge(capfd, run, data_copy):
    edit_annotations(
        data_copy, "test", lambda c: c["annotations"][0].update(bbox=[1, 1, float("inf"), 5])
    )
    status, _, err = call(capfd, "evaluate", "--adapter", run, "--data", data_copy)
    assert status == 0
    assert "hold NaN or infinity (D41_NOT_FINITE)" in err


def test_evaluate_refuses_a_blank_prompt(capfd, run, data_dir):
    refused(
        capfd, "evaluate", "--data", data_dir, "--adapter", run, "--prompt", " ", naming="empty"
    )


def test_evaluate_a_split_without_objects_has_status_1(capfd, run, data_copy):
    edit_annotations(data_copy, "test", lambda content: content.update(annotations=[]))
    status, out, _ = call(capfd, "evaluate", "--adapter", run, "--data", data_copy, "--json")
    assert status == 1
    assert json.loads(out)["AP"] is None


def test_routing_asks_the_base_for_what_was_not_trained(capfd, run, base, data_dir, tmp_path):
    image = data_dir / "test" / "test_0.png"
    asked = ("--image", image, "--prompt", "crack", "--prompt", "wall", "--json")
    answers = []
    for source in (("--adapter", run, "--routing"), ("--adapter", run), ("--base", base)):
        status, out, _ = call(capfd, "predict", *source, *asked)
        assert status == 0
        answers.append([entry["max_score"] for entry in json.loads(out)])
    routed, adapter, alone = answers
    assert routed == pytest.approx([adapter[0], alone[1]], abs=1e-6)
    assert abs(adapter[0] - alone[0]) > 1e-4

    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / name, bare)
    source = ("--adapter", bare, "--base", base, "--routing")
    refused(capfd, "predict", *source, *asked, naming="--routing needs the words")


def test_evaluate_says_what_is_left_of_the_base(capfd, run, data_dir, monkeypatch):
    monkeypatch.setattr(
        "helpers.detect.knowledge.CLEAR_YES", 0.01
    )  # a random base is sure of nothing
    arguments = ("evaluate", "--adapter", run, "--data", data_dir, "--retention", "moss, hole")
    status, out, _ = call(capfd, *arguments, "--json")
    assert status == 0
    kept = json.loads(out)["retention"]
    assert kept["words"] == ["moss", "hole"]
    assert kept["objects"] > 0
    assert 0 <= kept["AP"] <= kept["AP50"] <= 1
    status, out, _ = call(capfd, *arguments)
    assert f"of {kept['objects']} objects that the base detects as moss, hole: AP" in out
    monkeypatch.setattr("helpers.detect.knowledge.CLEAR_YES", 1.0)
    refused(capfd, *arguments, naming="the base detects none of moss, hole")


# -- unusable data ---------------------------------------------------------------------------


def missing_folder(data):
    shutil.rmtree(data)


def empty_folder(data):
    shutil.rmtree(data)
    data.mkdir()


def truncated_json(data):
    path = data / "train" / "_annotations.coco.json"
    path.write_bytes(path.read_bytes()[:200])


def corrupt_image(data):
    (data / "train" / "train_0.png").write_bytes(b"no picture")


def box_outside(data):
    edit_annotations(data, "train", lambda c: c["annotations"][0].update(bbox=[50, 30, 40, 40]))


def nameless_category(data):
    edit_annotations(data, "train", lambda c: c["categories"][0].update(name=""))


FAULTS = {
    missing_folder: "no such folder",
    empty_folder: "holds no split",
    truncated_json: "_annotations.coco.json",
    corrupt_image: "train_0.png",
    box_outside: "box",
    nameless_category: "name",
}


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_train_refuses_bad_data_and_writes_nothing(capfd, config_file, data_copy, tmp_path, spoil):
    spoil(data_copy)
    folder = tmp_path / "run"
    arguments = ("train", "--config", config_file, "--data", data_copy, "--output", folder)
    refused(capfd, *arguments, naming=FAULTS[spoil])
    assert not folder.exists()


@pytest.mark.parametrize("spoil", FAULTS, ids=lambda spoil: spoil.__name__)
def test_check_reports_bad_data(capfd, data_copy, spoil):
    spoil(data_copy)
    if spoil in (missing_folder, empty_folder):
        refused(capfd, "check", data_copy, "--json", naming=FAULTS[spoil])
        return
    status, out, err = call(capfd, "check", data_copy, "--json")
    assert status == 1
    assert "Traceback" not in err
    errors = [f for f in json.loads(out)["findings"] if f["severity"] == "error"]
    assert any(FAULTS[spoil] in f"{error['where']} {error['message']}" for error in errors)


def test_predict_refuses_bad_images(capfd, run, tmp_path):
    picture = tmp_path / "out.png"
    common = ("--prompt", "crack", "--output", picture)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_bytes(b"no picture")
    for image, part in (
        ("nothing.png", "no such image"),
        ("empty", "holds no image"),
        ("bad.jpg", "no readable image"),
    ):
        refused(
            capfd, "predict", "--adapter", run, "--image", tmp_path / image, *common, naming=part
        )
    assert not picture.exists()


def test_corrupt_image_among_good_ones_leaves_no_picture(capfd, run, data_dir, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    shutil.copy(data_dir / "test" / "test_0.png", images / "a.png")
    (images / "b.png").write_bytes(b"no picture")
    arguments = ("predict", "--adapter", run, "--image", images, "--prompt", "crack")
    refused(capfd, *arguments, "--output", tmp_path / "o.png", naming="b.png")
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--prompt", ""), "prompt"),
        (("--prompt", "crack", "--threshold", "1.5"), "threshold"),
        (("--prompt", "crack", "--threshold", "nan"), "threshold"),
        (("--prompt", "crack", "--mask-threshold", "-1"), "mask_threshold"),
        (("--prompt", "crack", "--output", "out.xyz"), ".xyz"),
    ],
)
def test_predict_refuses_impossible_values(
    capfd, run, data_dir, tmp_path, monkeypatch, arguments, part
):
    monkeypatch.chdir(tmp_path)
    image = data_dir / "test" / "test_0.png"
    refused(capfd, "predict", "--adapter", run, "--image", image, *arguments, naming=part)
    assert list(tmp_path.iterdir()) == []


def test_predict_does_not_draw_over_its_image(capfd, run, data_dir, tmp_path):
    image = shutil.copy(data_dir / "test" / "test_0.png", tmp_path / "mine.png")
    before = image.read_bytes()
    arguments = ("predict", "--adapter", run, "--image", image, "--prompt", "crack")
    refused(capfd, *arguments, "--output", image, naming="overwrite")
    assert image.read_bytes() == before


@pytest.fixture
def twins(data_dir, tmp_path):
    """Two different pictures of one name, in two folders."""
    images = []
    for number, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        source = data_dir / "test" / f"test_{number}.png"
        images.append(shutil.copy(source, tmp_path / folder / "0001.png"))
    return images


def test_predict_draws_each_of_two_pictures_of_one_name(capfd, run, twins, tmp_path):
    arguments = ("predict", "--adapter", run, "--prompt", "crack", "--image", *twins)
    assert call(capfd, *arguments, "--output", tmp_path / "o.png")[0] == 0
    pictures = [tmp_path / f"o_{folder}_0001.png" for folder in "ab"]
    first, second = (picture.read_bytes() for picture in pictures)
    assert first != second
    before = {picture: picture.stat().st_mtime_ns for picture in pictures}
    assert call(capfd, *arguments, "--output", tmp_path / "o.png")[0] == 0  # its own are replaced
    assert all(picture.stat().st_mtime_ns > before[picture] for picture in pictures)


@pytest.mark.parametrize("stems", [("a/b_c", "a_b/c"), ("x", "x"), ("Wall", "wall"), ("d/x", "x")])
def test_no_two_pictures_get_one_name(stems):
    endings = (".png", ".jpg")
    images = [Path(stem + ending) for stem, ending in zip(stems, endings, strict=True)]
    labels = _labels(images)
    assert len({label.casefold() for label in labels}) == 2


@pytest.mark.parametrize("link", [os.link, os.symlink, None], ids=["hard link", "link", "itself"])
def test_predict_never_draws_over_another_input(capfd, run, twins, tmp_path, link):
    """Also where the output's name is another name of the input."""
    target = tmp_path / "o_a_0001.png"
    images = list(twins)
    if link is None:
        images.append(shutil.copy(twins[1], target))
    else:
        link(twins[1], target)
    before = target.read_bytes()
    arguments = ("predict", "--adapter", run, "--prompt", "crack", "--image", *images)
    refused(capfd, *arguments, "--output", tmp_path / "o.png", naming="o_a_0001.png")
    assert target.read_bytes() == before == twins[1].read_bytes()


def test_predict_keeps_a_picture_that_it_did_not_draw(capfd, run, data_dir, tmp_path):
    photo = tmp_path / "holiday.png"
    Image.new("RGB", (9, 9)).save(photo)
    before = photo.read_bytes()
    image = data_dir / "test" / "test_0.png"
    arguments = ("predict", "--adapter", run, "--image", image, "--prompt", "crack")
    refused(capfd, *arguments, "--output", photo, naming="not drawn by predict")
    refused(capfd, *arguments, "--output", tmp_path, naming="is a folder")
    assert photo.read_bytes() == before
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "later.png")
    refused(capfd, *arguments, "--output", link, naming="not drawn by predict")
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "make room"),
        (errno.EROFS, "can be written"),
        (errno.EACCES, "permissions"),
        (errno.ENAMETOOLONG, "shorter name"),
    ],
)
def test_a_disk_that_refuses_is_one_line(
    capfd, monkeypatch, run, data_dir, tmp_path, number, remedy
):
    def refuse(figure, path, **options):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", refuse)
    image = data_dir / "test" / "test_0.png"
    arguments = ("predict", "--adapter", run, "--image", image, "--prompt", "crack")
    assert remedy in refused(capfd, *arguments, "--output", tmp_path / "o.png", naming="o.png")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_too_long_is_one_line(capfd, run, data_dir, tmp_path):
    image = data_dir / "test" / "test_0.png"
    arguments = ("predict", "--adapter", run, "--image", image, "--prompt", "crack")
    refused(capfd, *arguments, "--output", tmp_path / ("x" * 300 + ".png"), naming="shorter name")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
@pytest.mark.parametrize("options", [(), ("--json",)])
def test_an_answer_that_cannot_be_written_is_one_line(data_dir, options):
    command = [sys.executable, "-m", "helpers", "check", str(data_dir), *options]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, check=False
        )
    assert done.returncode == 2
    assert "make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


def test_names_never_reach_the_terminal_raw(capfd, tmp_path):
    line = refused(capfd, "check", tmp_path / "a\x1b[2J\nb", naming="\\x1b[2J\\nb")
    assert "\x1b" not in line


def test_every_command_has_a_template_for_its_answer():
    [commands] = [a.choices for a in build_parser()._actions if isinstance(a.choices, dict)]
    names = {path.stem for path in (ROOT / "helpers" / "answers").glob("*.txt")}
    assert names == {*commands, "dry_run", "ending"}


def test_no_value_breaks_a_line_of_an_answer_or_is_missed():
    entry = {"image": "a\x1b[2J\nb.png", "prompt": "crack", "detections": [{}], "max_score": 0.5}
    with pytest.raises(UndefinedError, match="presence_prob"):
        answer_text("predict", [entry])
    entry |= {"presence_prob": 0.625, "max_query_prob": 0.8}
    line = "a\\x1b[2J\\nb.png  'crack': 1 detection, max score 0.500 = presence 0.625 x query 0.800"
    assert answer_text("predict", [entry, entry]) == f"{line}\n{line}"
    assert answer_text("predict", []) == ""


def test_a_dry_run_says_what_fits_and_what_to_try():
    fits = {"fits": True, "device": "cpu", "images": 2, "prompts": 8, "objects": 5}
    fits |= {"peak_memory_of": "this process, resident", "peak_memory_bytes": 3 * 2**29}
    fits |= {"seconds_per_step": 12.3456, "steps_per_epoch": 7, "seconds_per_epoch": 86.4}
    first = "fullest batch: 2 images, 8 prompts, 5 objects, on cpu\n"
    peak = "peak memory of this process, resident: 1.50 GiB\n"
    last = "12.3 s per step; 7 steps, at most 86.4 s, per epoch, without validation"
    assert answer_text("train", fits) == first + peak + last
    assert answer_text("train", fits | {"peak_memory_bytes": None}) == first + last
    for options, text in ((["a=1", "b=2"], "--set a=1 --set b=2"), ([], "nothing smaller is left")):
        answer = fits | {"fits": False, "next": options}
        assert answer_text("train", answer) == f"{first}out of memory; next to try: {text}"


def test_a_number_that_json_cannot_hold_is_one_line(capfd, monkeypatch, run):
    monkeypatch.setattr("helpers.train.report.report", lambda run: {"loss": float("nan")})
    refused(capfd, "report", "--adapter", run, "--json", naming="NaN")


def test_ctrl_c_promises_a_resumption_only_where_there_is_one(
    capfd, monkeypatch, config_file, tmp_path
):
    def interrupt(config, output_dir, **settings):
        if output_dir.exists():
            (output_dir / "config.yaml").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("helpers.train.training.train", interrupt)
    arguments = ("train", "--config", config_file, "--output", tmp_path / "run")
    status, _, err = call(capfd, *arguments)
    assert (status, err) == (130, "interrupted\n")
    (tmp_path / "run").mkdir()
    status, _, err = call(capfd, *arguments)
    assert (status, err) == (130, "continue with --resume\ninterrupted\n")


# -- unusable adapters -----------------------------------------------------------------------


def test_adapter_folders_that_are_none(capfd, run, config_file, data_dir, tmp_path):
    image = data_dir / "test" / "test_0.png"
    (tmp_path / "empty").mkdir()
    (tmp_path / "interrupted").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "interrupted")
    for folder, part in (
        ("nothing", "no such folder"),
        ("empty", "metrics.json"),
        ("interrupted", "--resume"),
    ):
        for command in (
            ("predict", "--image", image, "--prompt", "crack"),
            ("evaluate", "--data", data_dir),
            ("report",),
        ):
            refused(capfd, *command, "--adapter", tmp_path / folder, naming=part)


def test_adapter_of_another_model_is_refused(capfd, run, data_dir, tmp_path):
    other = save_tiny_base(tmp_path / "other", seed=1)
    image = data_dir / "test" / "test_0.png"
    common = ("--adapter", run, "--base", other)
    refused(capfd, "predict", "--image", image, "--prompt", "crack", *common, naming="another base")
    refused(capfd, "evaluate", "--data", data_dir, *common, naming="another base")


@pytest.mark.parametrize(
    "name",
    [
        "adapter_model.safetensors",
        "adapter_config.json",
        "base.json",
        "prompts.json",
        "metrics.json",
        "config.yaml",
    ],
)
def test_damaged_run_is_refused_by_file(capfd, run, data_dir, tmp_path, name):
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / name).write_bytes((copied / name).read_bytes()[:40])
    image = data_dir / "test" / "test_0.png"
    arguments = ("predict", "--adapter", copied, "--image", image, "--prompt", "crack")
    refused(capfd, *arguments, naming=name)


def test_resuming_from_a_run_of_another_base_is_refused(capfd, run, base, config_file, tmp_path):
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / "metrics.json").unlink()
    other = save_tiny_base(tmp_path / "other", seed=1)
    arguments = ("train", "--config", config_file, "--output", copied, "--resume")
    refused(capfd, *arguments, "--set", f"model.name={other}", naming="model.name was")


# -- unusable settings -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ("training.epochs=3", "num_epochs"),
        ("training.num_epochs=0", "num_epochs"),
        ("training.num_epochs=many", "num_epochs"),
        ("nonsense", "section.key=value"),
        ("lora.target_modules=[qkv]", "qkv"),
        (f"model.resolution={RESOLUTION + 1}", "resolution"),
        ("model.name=data/no_such_base", "no such folder"),
        ("data.train_split=holdout", "holdout"),
    ],
)
def test_train_refuses_bad_settings_and_writes_nothing(capfd, config_file, tmp_path, setting, part):
    folder = tmp_path / "run"
    arguments = ("train", "--config", config_file, "--output", folder, "--set", setting)
    refused(capfd, *arguments, naming=part)
    assert not folder.exists()


def test_gated_base_says_that_the_tiny_profile_needs_no_access(capfd, config_file, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    arguments = ("train", "--config", config_file, "--set", "model.name=facebook/no-such-model")
    line = refused(capfd, *arguments, "--overwrite", naming="facebook/no-such-model")
    assert "tiny" in line


def test_adapter_and_config_exclude_each_other(run, config_file, data_dir):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--adapter", str(run), "--config", str(config_file)])
    assert stop.value.code == 2


def test_ctrl_c_is_no_traceback(capfd, monkeypatch, data_dir):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("helpers.checks.dataset.check_dataset", interrupt)
    status, out, err = call(capfd, "check", data_dir)
    assert (status, out) == (130, "")
    assert err.strip().endswith("interrupted")


def test_libraries_that_print_do_not_reach_stdout(capfd, monkeypatch, data_dir):
    from helpers.checks.dataset import check_dataset

    def chatty(*args, **kwargs):
        print("loading annotations into memory...")
        return check_dataset(*args, **kwargs)

    monkeypatch.setattr("helpers.checks.dataset.check_dataset", chatty)
    _, out, err = call(capfd, "check", data_dir, "--json")
    json.loads(out)
    assert "loading annotations" in err


def test_module_runs_as_a_command(data_dir):
    done = subprocess.run(
        [sys.executable, "-m", "helpers", "check", str(data_dir / "nothing"), "--json"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert np.char.count(done.stderr, "\n") == 1


def test_knows_tells_a_locked_word_from_a_known_one(capfd):
    data = ("--data", ROOT / "data" / "known_things", "--base", ROOT / "data" / "tiny_sam3")
    status, out, _ = call(capfd, "knows", *data, "--words", "tape, crack", "--json")
    words = json.loads(out)["words"]
    assert status == 1
    assert {word: row["knowledge"] for word, row in words.items()} == {
        "tape": "known",
        "crack": "locked",
    }
    assert words["tape"]["images"] == 2
    status, out, _ = call(capfd, "knows", *data, "--words", "tape")
    assert status == 0
    assert "tape: detected on 100% of 2 images [34%, 100%]" in out
    refused(capfd, "knows", *data, "--words", "tape,,", naming="the prompt '' is empty")


@pytest.fixture
def own_run(run, tmp_path):
    """Return a copy of the run that a test may write into."""
    return shutil.copytree(run, tmp_path / "own_run")


def test_calibrate_refuses_the_split_that_is_judged(capfd, own_run, data_dir):
    for name in ("test", "train"):
        arguments = ("calibrate", "--adapter", own_run, "--data", data_dir, "--split", name)
        status, _, err = call(capfd, *arguments)
        assert status == 2
        assert f"a threshold chosen on {name!r} flatters" in err
    assert not (own_run / "thresholds.json").exists()


def test_predict_uses_the_thresholds_that_the_run_keeps(capfd, own_run, data_dir):
    image = read_split(data_dir, "test").records[0].path
    arguments = ("predict", "--adapter", own_run, "--image", image, "--json", "--prompt", "crack")
    status, _, err = call(capfd, *arguments, "--threshold", "auto")
    assert status == 2
    assert "helpers calibrate --adapter" in err
    _, out, _ = call(capfd, *arguments, "--threshold", "0")
    scores = sorted((one["score"] for one in json.loads(out)[0]["detections"]), reverse=True)
    between = (scores[3] + scores[4]) / 2  # scores move by 1e-7 with the number of prompts
    ends = {"low": 0.1, "high": 0.9}
    words = {"crack": {"threshold": between} | ends, "moss": {"threshold": scores[-1]} | ends}
    (own_run / "thresholds.json").write_text(json.dumps({"words": words}))
    status, out, err = call(capfd, *arguments, "--prompt", "dog", "--threshold", "auto")
    assert status == 0
    crack, dog = json.loads(out)
    assert len(crack["detections"]) == 4
    default = load_run(own_run).config.evaluation.score_threshold
    assert all(one["score"] >= default for one in dog["detections"])
    assert f"'crack': threshold {between:.3g}, from thresholds.json" in err
    assert f"'dog': threshold {default:g} of the config, as it was never calibrated" in err


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", '{"words": {"crack": {}}}', '{"words": {"crack": {"threshold": 0.5}}}'),
        '{"words": {"crack": {"threshold": 7, "low": 0.1, "high": 0.9}}}',
    ],
)
def test_damaged_thresholds_are_refused(capfd, own_run, data_dir, text):
    (own_run / "thresholds.json").write_text(text)
    image = read_split(data_dir, "test").records[0].path
    arguments = ("predict", "--adapter", own_run, "--image", image, "--prompt", "crack")
    status, _, err = call(capfd, *arguments, "--threshold", "auto")
    assert status == 2
    assert "thresholds.json" in err
    assert "Traceback" not in err


def test_calibrate_keeps_what_it_chose(capfd, own_run, data_dir):
    arguments = ("calibrate", "--adapter", own_run, "--data", data_dir, "--json")
    status, out, _ = call(capfd, *arguments)
    assert status == 0
    own = json.loads((own_run / "thresholds.json").read_text())
    assert json.loads(out) == own | {name: json.loads(out)[name] for name in ("run", "data")}
    assert not {"run", "data"} & own.keys()  # paths of a machine, which a push would send
    row = json.loads(out)["words"]["crack"]
    assert row["low"] <= row["threshold"] <= row["high"]
    page = own_run.with_name("page.html")
    assert call(capfd, "evaluate", *arguments[1:5], "--html", page)[0] == 0
    marked = {"calibrated": {"crack": {name: row[name] for name in ("threshold", "low", "high")}}}
    assert json.dumps(marked, sort_keys=True)[1:-1] in page.read_text(encoding="utf-8")
    status, _, err = call(capfd, *arguments, "--goal", "precision", "--least", "1")
    assert status == 2
    assert "'crack': no threshold has precision 1" in err


def test_a_threshold_that_is_no_number_is_refused(capfd):
    with pytest.raises(SystemExit):
        main(["predict", "--image", "a.png", "--threshold", "high"])
    assert "'high' is neither a number nor auto" in capfd.readouterr().err


def test_report_writes_a_page(capfd, own_run, data_dir, tmp_path):
    page = tmp_path / "report.html"
    arguments = ("report", "--adapter", own_run, "--data", data_dir, "--html", page, "--json")
    status, out, _ = call(capfd, *arguments, "--compare", own_run)
    assert status == 0
    assert json.loads(out)["run"] == str(own_run)
    text = page.read_text(encoding="utf-8")
    assert "http://" not in text.replace("http://www.w3.org", "")
    assert "https://" not in text
    for title in ("Numbers", "Mistakes", "Labels to look at", "checklist", "Diagnosis"):
        assert title in text
    assert "denied in its training where they are absent" in text
    assert "Thresholds chosen on the validation split" in text


def test_a_report_measures_what_was_kept_with_words_of_the_training(
    capfd, own_run, data_dir, tmp_path, monkeypatch
):
    kept, path = [], own_run / "prompts.json"
    shown = "helpers.show.report_page", "helpers.diagnose.diagnosis.diagnose"
    monkeypatch.setattr(shown[0], lambda *_, retention, **__: kept.append(retention) or "page")
    monkeypatch.setattr(shown[1], lambda *_, **__: SimpleNamespace(parts=dict))
    prompts = json.loads(path.read_text())
    arguments = ("report", "--adapter", own_run, "--data", data_dir, "--html")
    cases = (
        ({"replayed": {"hole": 2}}, [], ["hole"], "replayed in its training"),
        ({"replayed": {"hole": 2}}, ["--retention", "wall"], ["wall"], "named with --retention"),
        ({"negatives": {"moss": 1, "dog": 2}}, [], ["moss", "dog"], "denied in its training"),
        ({}, [], None, None),
    )
    for number, (changed, options, words, why) in enumerate(cases):
        path.write_text(json.dumps(prompts | {"replayed": {}, "negatives": {}} | changed))
        assert call(capfd, *arguments, tmp_path / f"{number}.html", *options)[0] == 0
        assert (kept[-1] and kept[-1]["words"]) == words
        assert kept[-1] is None or why in kept[-1]["why"]


def test_report_without_a_page_refuses_what_is_for_the_page(capfd, run):
    status, _, err = call(capfd, "report", "--adapter", run, "--compare", run)
    assert status == 2
    assert "name a page with --html" in err
