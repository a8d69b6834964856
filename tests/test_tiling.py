from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from tiny_random import tiny_model, tiny_processor

from helpers.data.masks import mask_to_rle
from helpers.detect.predictor import Predictor
from helpers.detect.tiles import predict_tiled, tile_boxes
from helpers.errors import InputError

WIDTH, HEIGHT, TILE = 400, 300, 128


@pytest.mark.parametrize("overlap", [0, 0.2, 0.5, 0.9])
@pytest.mark.parametrize("size", [(400, 300), (128, 128), (100, 300), (129, 50)])
def test_tiles_cover_the_image_and_share_what_was_asked(size, overlap):
    boxes = np.array(tile_boxes(*size, TILE, overlap))
    covered = np.zeros(size[::-1], dtype=int)
    for x0, y0, x1, y1 in boxes:
        covered[y0:y1, x0:x1] += 1
    assert covered.min() == 1
    assert len({tuple(box) for box in boxes}) == len(boxes)
    for low, high, side in ((0, 2, size[0]), (1, 3, size[1])):
        assert (boxes[:, high] - boxes[:, low] == min(TILE, side)).all()
        starts = np.unique(boxes[:, low])
        assert (np.diff(starts) <= max(1, TILE * (1 - overlap))).all()


def test_an_image_no_larger_than_a_tile_is_one_tile():
    assert tile_boxes(100, 80, 128, 0.2) == [(0, 0, 100, 80)]


@pytest.mark.parametrize(("tile", "overlap"), [(0, 0.2), (1.5, 0.2), (128, 1.0), (128, -0.1)])
def test_impossible_tiles_are_refused(tile, overlap):
    with pytest.raises(InputError):
        tile_boxes(400, 300, tile, overlap)


def line(x0, y0, x1, y1, thickness=5):
    """Return the mask of a line across the image."""
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    length = np.hypot(x1 - x0, y1 - y0)
    across = np.abs((columns - x0) * (y1 - y0) - (rows - y0) * (x1 - x0)) / length
    along = ((columns - x0) * (x1 - x0) + (rows - y0) * (y1 - y0)) / length
    return (across <= thickness / 2) & (along >= 0) & (along <= length)


OBJECTS = {
    "crack": [
        line(5, 5, 390, 290),  # through many tiles, both ways
        line(10, 250, 390, 240),  # along a row of tiles; crosses the first
        line(200, 20, 215, 30),  # inside one tile
        line(105, 60, 125, 60),  # inside what two tiles share
    ],
    "joint": [line(0, 150, 399, 150, 9)],
    "moss": [],
}


class KnownAnswers:
    """A predictor that knows the objects; it finds its place in the pixels of the picture.

    The red and green of a pixel are its column and row, so a tile tells where it was cut.
    """

    def __init__(self, objects=OBJECTS):
        self.objects, self.sizes = objects, []

    def predict(self, image, prompts, threshold, mask_threshold):
        pixels = np.asarray(image).astype(int)
        x, y = (
            pixels[0, 0, 0] + 256 * (pixels[0, 0, 2] % 2),
            pixels[0, 0, 1] + 256 * (pixels[0, 0, 2] // 2),
        )
        self.sizes.append(image.size)
        return [self._answer(prompt, x, y, *image.size) for prompt in prompts]

    def _answer(self, prompt, x, y, width, height):
        found = []
        for index, mask in enumerate(self.objects[prompt]):
            part = mask[y : y + height, x : x + width]
            if part.any():
                score = 0.9 - 0.1 * index + part.sum() / 1e6  # best where most of it shows
                found.append({"score": score, "box_xyxy": [], "mask_rle": mask_to_rle(part)})
        score = max((one["score"] for one in found), default=0.01)
        return SimpleNamespace(
            prompt=prompt,
            detections=found,
            presence_prob=score,
            max_query_prob=score,
            max_score=score,
        )


def picture():
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    high = columns // 256 + 2 * (rows // 256)
    return Image.fromarray(np.stack([columns % 256, rows % 256, high], -1).astype(np.uint8))


def masks_of(prediction):
    return [coco_mask.decode(one["mask_rle"]).astype(bool) for one in prediction.detections]


@pytest.mark.parametrize(("tile", "overlap"), [(TILE, 0.2), (TILE, 0.5), (90, 0.3), (1008, 0.2)])
def test_tiled_answers_equal_the_whole_truth(tile, overlap):
    predictor = KnownAnswers()
    found = predict_tiled(predictor, picture(), list(OBJECTS), tile=tile, overlap=overlap)
    assert [prediction.prompt for prediction in found] == list(OBJECTS)
    for prediction in found:
        assert (prediction.width, prediction.height) == (WIDTH, HEIGHT)
        masks = masks_of(prediction)
        expected = OBJECTS[prediction.prompt]
        assert len(masks) == len(expected)
        for mask in expected:
            assert any((mask == own).all() for own in masks)
    assert set(predictor.sizes) == {(min(tile, WIDTH), min(tile, HEIGHT))}


def test_scores_and_boxes_of_joined_objects():
    crack, _, moss = predict_tiled(KnownAnswers(), picture(), list(OBJECTS), tile=TILE)
    scores = [one["score"] for one in crack.detections]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] == pytest.approx(0.9, abs=0.01)
    assert crack.max_score == crack.presence_prob == scores[0]
    rows, columns = np.nonzero(OBJECTS["crack"][0])
    tight = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert crack.detections[0]["box_xyxy"] == tight
    assert moss.detections == []
    assert moss.max_score == 0.01


def test_neighbours_that_never_overlap_stay_apart():
    objects = {"crack": [line(10, 100, 390, 100, 3), line(10, 106, 390, 106, 3)]}
    [found] = predict_tiled(KnownAnswers(objects), picture(), "crack", tile=TILE)
    assert sorted(mask.sum() for mask in masks_of(found)) == sorted(
        m.sum() for m in objects["crack"]
    )


class WithoutSlivers(KnownAnswers):
    """A predictor that finds nothing of fewer than 50 pixels."""

    def _answer(self, *question):
        answer = super()._answer(*question)
        answer.detections = [
            one for one in answer.detections if coco_mask.area(one["mask_rle"]) >= 50
        ]
        return answer


@pytest.mark.parametrize(("end", "count"), [(104, 2), (126, 1)])
def test_a_mask_that_runs_a_little_into_a_neighbour_joins_nothing(end, count):
    """Two tiles share x from 102 to 128: there the second mask also marks the end of the first."""
    first, second = line(60, 60, end, 60), line(140, 50, 390, 50)
    second |= first & (np.arange(WIDTH) >= 102)
    predictor = WithoutSlivers({"crack": [first, second]})
    [found] = predict_tiled(predictor, picture(), "crack", tile=TILE)
    assert len(found.detections) == count


def test_two_detections_of_one_tile_are_not_joined():
    twice = {"crack": [line(20, 20, 60, 20), line(20, 20, 60, 20)]}
    [found] = predict_tiled(KnownAnswers(twice), picture(), "crack", tile=1008)
    assert len(found.detections) == 2


def test_seams_cannot_be_joined_without_overlap():
    with pytest.raises(InputError, match="without overlap"):
        predict_tiled(KnownAnswers(), picture(), "crack", tile=TILE, overlap=0)
    with pytest.raises(InputError, match="prompt"):
        predict_tiled(KnownAnswers(), picture(), [], tile=TILE)


def test_one_tile_of_a_real_model_is_its_plain_answer():
    predictor = Predictor(tiny_model(), tiny_processor())
    image, prompts = picture(), ["crack", "dog"]
    plain = predictor.predict(image, prompts, threshold=0.01)
    tiled = predict_tiled(predictor, image, prompts, tile=1008, threshold=0.01)
    for before, after in zip(plain, tiled, strict=True):
        drawn = [one for one in before.detections if coco_mask.area(one["mask_rle"])]
        assert drawn
        assert [one["score"] for one in after.detections] == [one["score"] for one in drawn]
        assert [one["mask_rle"] for one in after.detections] == [one["mask_rle"] for one in drawn]
        assert (after.max_score, after.presence_prob) == (before.max_score, before.presence_prob)


def test_a_file_gives_its_name(tmp_path):
    picture().save(tmp_path / "a.png")
    [found] = predict_tiled(KnownAnswers(), tmp_path / "a.png", "joint", tile=TILE)
    assert found.image == str(tmp_path / "a.png")
    assert len(found.detections) == 1
