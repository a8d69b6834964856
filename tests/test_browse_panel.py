"""Targets are drawn where the tensors say, and the panel needs no kernel."""

import numpy as np
import pytest
import torch
from builders import HEIGHT, WIDTH, make_processor, write_coco
from PIL import Image

from helpers.data.coco import read_split
from helpers.data.dataset import PromptCollator, PromptDataset
from helpers.errors import InputError
from helpers.show.panels import describe_target, target_picture, targets_figure
from notebooks.target_browser import browse_panel

RESOLUTION = 64


@pytest.fixture
def processor():
    return make_processor()


@pytest.fixture
def batch(tmp_path, processor):
    split = read_split(write_coco(tmp_path), "train")
    dataset = PromptDataset(split, processor, resolution=RESOLUTION, mask_size=32, num_negatives=1)
    return PromptCollator(processor)([dataset[index] for index in range(len(dataset))])


def row_of(batch, image_id, prompt):
    asked = [(query["image_id"], query["prompt"]) for query in batch["queries"]]
    return asked.index((image_id, prompt))


def pixels(batch, row, processor, size=(WIDTH, HEIGHT)):
    picture = target_picture(batch, row, processor.image_processor)
    return np.asarray(picture.resize(size, Image.Resampling.BOX), dtype=float)


def test_colours_are_those_of_the_resized_image(tmp_path, batch, processor):
    row = row_of(batch, "c.png", "crack")  # an image without objects: nothing is drawn on it
    with Image.open(tmp_path / "train" / "c.png") as image:
        expected = image.resize((RESOLUTION, RESOLUTION), Image.Resampling.BILINEAR)
    shown = pixels(batch, row, processor, (RESOLUTION, RESOLUTION))
    correlation = np.corrcoef(shown.ravel(), np.asarray(expected, dtype=float).ravel())[0, 1]
    assert correlation > 0.95
    assert abs(shown.mean() - np.asarray(expected).mean()) < 2


def test_target_is_drawn_where_the_object_is(batch, processor):
    row = row_of(batch, "a.png", "crack")  # 8, 8 to 24, 40 of 96 x 64 pixels
    drawn = pixels(batch, row, processor)
    batch["targets"][row] = {key: value[:0] for key, value in batch["targets"][row].items()}
    changed = np.abs(drawn - pixels(batch, row, processor)).max(2) > 20
    assert changed[12:36, 12:20].mean() > 0.7
    changed[4:44, 4:28] = False
    assert not changed.any()


def test_object_without_a_mask_is_drawn_as_its_box(batch, processor):
    row = row_of(batch, "a.png", "crack")
    with_mask = pixels(batch, row, processor)
    batch["targets"][row]["masks"] = torch.zeros_like(batch["targets"][row]["masks"])
    batch["targets"][row]["mask_valid"][:] = False
    box_only = pixels(batch, row, processor)
    assert np.abs(with_mask - box_only)[20:28, 14:18].mean() > 5
    assert describe_target(batch, row) == '"crack" (present): 1 object, 0 with a mask'


def test_words_tell_present_from_absent(batch):
    texts = [describe_target(batch, row) for row in range(len(batch["queries"]))]
    assert '"crack" (present): 2 objects, 2 with a mask' in texts
    assert '"joint" (absent): 0 objects, 0 with a mask' in texts


def test_figure_has_a_picture_per_query(batch, processor):
    figure = targets_figure(batch, processor.image_processor)
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert len(titles) == len(batch["queries"])
    assert any("b.png" in title and '"joint" (present)' in title for title in titles)


def test_panel_follows_image_and_prompt(batch, processor):
    panel = browse_panel(batch, processor.image_processor)
    assert panel.image.value == batch["queries"][0]["image_id"]
    first = panel.picture.value
    panel.image.value = "b.png"
    assert set(panel.prompt.options) == {"crack", "joint"}
    assert panel.readout.value == '"crack" (present): 1 object, 1 with a mask'
    crack = panel.picture.value
    panel.prompt.value = "joint"
    assert panel.readout.value == '"joint" (present): 1 object, 1 with a mask'
    assert len({first, crack, panel.picture.value}) == 3
    assert 'alt="b.png, &quot;joint&quot; (present)' in panel.picture.value


def test_panel_without_a_query_is_refused(batch, processor):
    with pytest.raises(InputError, match="no query"):
        browse_panel({**batch, "queries": [], "targets": []}, processor.image_processor)


def test_the_still_has_the_sentence_of_the_panel(batch, processor):
    panel = browse_panel(batch, processor.image_processor)
    panel.image.value = "c.png"
    data, metadata = panel.widget._repr_mimebundle_()
    assert data["text/plain"].endswith(f"move them. c.png, {panel.readout.value}.")
    assert metadata == {"image/jpeg": {"alt": data["text/plain"]}}
    panel.widget.still = ()
    data, metadata = panel.widget._repr_mimebundle_()
    assert (metadata, "image/jpeg" in data) == ({}, False)
    assert data["text/plain"] == "A panel with sliders: run the notebook to move them."
