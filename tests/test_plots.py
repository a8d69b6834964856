import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from pycocotools import mask as coco_mask

from helpers.data.records import ObjectAnnotation
from helpers.errors import InputError
from helpers.show import pictures as overlays
from helpers.show import pictures as plots
from helpers.show.pictures import (
    annotate,
    annotate_detections,
    as_picture,
    comparison_figure,
    decode_mask,
    describe,
    prediction_figure,
    save_prediction_figure,
)

HEIGHT, WIDTH = 60, 80
BOX_XYXY = (10.0, 20.0, 50.0, 40.0)


@pytest.fixture
def image():
    return np.full((HEIGHT, WIDTH, 3), 128, dtype=np.uint8)


@pytest.fixture
def rle():
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[25:35, 15:45] = 1
    encoded = coco_mask.encode(np.asfortranarray(mask))
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


def make_prediction(rle, count, prompt="crack"):
    detections = [
        {"score": 0.9 - 0.05 * i, "box_xyxy": list(BOX_XYXY), "mask_rle": rle} for i in range(count)
    ]
    return {"prompt": prompt, "presence_prob": 0.97, "max_score": 0.9, "detections": detections}


def titles(figure):
    return [ax.get_title(loc="left") for ax in figure.axes]


def test_annotate_enlarges_and_leaves_the_image_alone(image):
    before = image.copy()
    canvas = annotate(image, [BOX_XYXY])
    assert canvas.size == (720, 540)
    assert (image == before).all()


def test_annotate_without_boxes_is_the_plain_enlargement(image):
    assert np.unique(np.asarray(annotate(image, []))).tolist() == [128]


def test_mask_is_tinted_where_it_is_and_nowhere_else(image, rle):
    canvas = np.asarray(annotate(image, [BOX_XYXY], [decode_mask(rle, (WIDTH, HEIGHT), "test")]))
    inside, outside = canvas[30 * 9, 30 * 9], canvas[5 * 9, 70 * 9]
    assert inside[0] > 150 > inside[2]  # orange over grey
    assert outside.tolist() == [128, 128, 128]


def test_only_the_best_detections_are_labelled(image, rle, monkeypatch):
    seen = []
    monkeypatch.setattr(overlays, "annotate", lambda *args: seen.append(args[-1]))
    annotate_detections(image, make_prediction(rle, 11)["detections"][::-1])
    assert seen[0][:2] == ["0.90", "0.85"]
    assert len(seen[0]) == overlays.MAX_LABELS
    assert sum(map(bool, seen[0])) == overlays.MAX_LABELS


def test_mask_of_another_image_is_refused(image, rle):
    with pytest.raises(InputError, match=r"\[60, 80\].*does not fit.*\[60, 40\]"):
        annotate_detections(image[:, :40], make_prediction(rle, 1)["detections"])


def test_picture_of_another_type_is_refused(image):
    with pytest.raises(InputError, match="float64"):
        as_picture(image / 255)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_title_says_what_is_found(image, rle, count):
    figure = prediction_figure(image, [make_prediction(rle, count)])
    assert titles(figure)[0].startswith(f'"crack": {count} detection')
    assert "max score 0.900, presence 0.970" in titles(figure)[0]


def test_long_prompts_are_wrapped(image, rle):
    prompt = "a thin dark line that runs down the wall from the window to the ground"
    figure = prediction_figure(image, [make_prediction(rle, 1, prompt)])
    assert max(map(len, titles(figure)[0].splitlines())) <= 40


@pytest.mark.parametrize(
    ("prompt", "title"),
    [
        ("a $x^$ b", '"a $x^$ b"'),
        ("$$", '"$$"'),
        ("a $x$ b", '"a $x$ b"'),
        ("crack\udce9", '"crack\\udce9"'),
        ("a\x1b[2Jb\x00", '"a\\x1b[2Jb\\x00"'),
        ("\u202ekcarc", '"\\u202ekcarc"'),
        ("Riß 裂缝", '"Riß 裂缝"'),
    ],
)
def test_odd_prompts_are_drawn_as_they_are(image, rle, tmp_path, prompt, title):
    """As text, not as mathematics; what has no shape is escaped."""
    figure = prediction_figure(image, [make_prediction(rle, 1, prompt)])
    figure.draw_without_rendering()
    assert titles(figure)[0].startswith(title)
    assert not figure.axes[0]._left_title.get_parse_math()
    save_prediction_figure(tmp_path / "out.png", image, [make_prediction(rle, 1, prompt)])


def test_odd_categories_are_drawn_too(image, rle):
    """Two categories, so that each object has a label with its name."""
    names = ("$x^$", "crack\ud800\x07")
    objects = [ObjectAnnotation(name, BOX_XYXY, rle) for name in names]
    figure = prediction_figure(image, [], objects)
    figure.draw_without_rendering()
    assert "\\ud800\\x07" in titles(figure)[0].replace("\n", "")


def test_ground_truth_stands_first_and_is_counted(image, rle):
    objects = [ObjectAnnotation("crack", BOX_XYXY, rle), ObjectAnnotation("joint", BOX_XYXY, None)]
    figure = prediction_figure(image, [make_prediction(rle, 1)], objects)
    assert titles(figure)[0] == "ground truth: 1 × crack, 1 × joint"
    assert titles(prediction_figure(image, [], ()))[0] == "ground truth: no object"


def test_each_image_starts_a_row(image, rle):
    prediction = make_prediction(rle, 1)
    figure = comparison_figure([(image, (), [prediction, prediction]), (image, (), [prediction])])
    figure.draw_without_rendering()
    lefts = [round(ax.get_position().x0, 2) for ax in figure.axes]
    assert lefts[0] == lefts[3] < lefts[1] == lefts[4] < lefts[2]


def test_nothing_to_draw_is_refused(image):
    with pytest.raises(InputError, match="nothing to draw"):
        prediction_figure(image, [])


def test_saved_figure_is_a_picture(image, rle, tmp_path):
    path = tmp_path / "new" / "out.png"
    save_prediction_figure(path, image, [make_prediction(rle, 2)])
    with Image.open(path) as written:
        assert min(written.size) > 400


def test_unknown_format_is_refused_before_anything_is_written(image, rle, tmp_path):
    with pytest.raises(InputError, match=r"'\.xyz'.*\.png"):
        save_prediction_figure(tmp_path / "new" / "out.xyz", image, [make_prediction(rle, 1)])
    assert not list(tmp_path.iterdir())


def test_describe_prints_the_sentence_and_stores_it_as_alternative_text(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(plots, "display", shown.append)
    figure = Figure(figsize=(2, 2))
    figure.subplots().plot([0, 1])
    describe(figure, "The loss falls.")
    assert capsys.readouterr().out == "The loss falls.\n"
    data, metadata = shown[0]._repr_mimebundle_()
    assert data.keys() == metadata.keys() == {"image/png"}
    assert metadata["image/png"]["alt"] == "The loss falls."


def test_describe_wraps_what_it_prints_but_not_the_alternative_text(monkeypatch, capsys):
    shown, sentence = [], " ".join(["The half-known word is found."] * 9)
    monkeypatch.setattr(plots, "display", shown.append)
    describe(Figure(figsize=(2, 2)), sentence)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert " ".join(lines) == sentence
    assert shown[0]._repr_mimebundle_()[1]["image/png"]["alt"] == sentence


def test_describe_stores_photographs_as_jpeg(monkeypatch):
    shown = []
    monkeypatch.setattr(plots, "display", shown.append)
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    describe(prediction_figure(noise, [make_prediction(None, 0)]), "Nothing is found.")
    assert shown[0]._repr_mimebundle_()[0].keys() == {"image/jpeg"}
