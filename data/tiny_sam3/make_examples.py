"""Training examples for the embedded base: rendered walls, their objects, and prompts to ask."""

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import cv2
import numpy as np
import torch
from tqdm.auto import tqdm

from data.tiny_sam3.make_model import IMAGE_SIZE, MASK_SIZE
from data.tiny_sam3.make_vocabulary import ABSENT_NOUNS, plural
from data.wall_cracks.make_painters import RENDER_SIZE
from data.wall_cracks.make_scenes import BASE_CONCEPTS, draw_concepts, render_scene

EMPTY_SHARE = 0.05
"""Share of training walls with nothing on them."""


@dataclass(frozen=True)
class Example:
    """A scene at the model's resolution."""

    image: np.ndarray  # (IMAGE_SIZE, IMAGE_SIZE, 3) uint8
    concepts: tuple[str, ...]  # one noun per object
    masks: np.ndarray  # (n, MASK_SIZE, MASK_SIZE) bool, at least half of the cell covered
    boxes_xyxy: np.ndarray  # (n, 4) float32 in [0, 1], tight around the full-resolution mask


def to_example(scene):
    """Shrink a rendered scene to the model's resolution and its masks to the mask grid."""
    image = cv2.resize(scene.image, (IMAGE_SIZE, IMAGE_SIZE), interpolation=cv2.INTER_AREA)
    step = RENDER_SIZE // MASK_SIZE
    masks = np.zeros((len(scene.objects), MASK_SIZE, MASK_SIZE), bool)
    for row, item in enumerate(scene.objects):
        masks[row] = item.mask.reshape(MASK_SIZE, step, MASK_SIZE, step).mean((1, 3)) >= 0.5
    boxes = (
        np.array([item.box_xyxy for item in scene.objects], np.float32).reshape(-1, 4) / RENDER_SIZE
    )
    return Example(image, tuple(item.concept for item in scene.objects), masks, boxes)


def make_example(index, seed):
    """Render one training wall; ``index`` and ``seed`` decide everything about it."""
    cv2.setNumThreads(1)
    rng = np.random.default_rng((seed, index))
    names = [] if rng.random() < EMPTY_SHARE else draw_concepts(rng, BASE_CONCEPTS, (1, 5))
    return to_example(render_scene(rng, names))


def make_examples(count, seed):
    """Render ``count`` walls on all cores; the same seed gives the same walls."""
    # Forking a process in which torch has started threads can hang, so each worker starts anew.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        jobs = pool.map(partial(make_example, seed=seed), range(count), chunksize=50)
        return list(tqdm(jobs, total=count, desc="rendering walls", unit="wall"))


def draw_prompts(rng, present, count, known=BASE_CONCEPTS):
    """Choose prompts for one wall as (text, concept), concept None where nothing may be found.

    Half of them name what is there (as far as there is enough), a quarter name known concepts that
    are absent, the rest unrelated nouns and made-up words.
    """
    nouns = sorted(set(present))
    chosen = list(rng.permutation(nouns)[: count // 2])
    prompts = [(_form(rng, noun), noun) for noun in chosen]
    missing = [noun for noun in known if noun not in present]
    while len(prompts) < count:
        if rng.random() < 0.5 and missing:
            prompts.append((_form(rng, rng.choice(missing)), None))
        else:
            prompts.append((unrelated_prompt(rng), None))
    return prompts


def _form(rng, noun):
    return plural(str(noun)) if rng.random() < 0.2 else str(noun)


def unrelated_prompt(rng):
    """Return an absent noun, two of them, or a made-up word, but never one that says "crack"."""
    while "crack" in (prompt := _any_unrelated_prompt(rng)):
        pass
    return prompt


def _any_unrelated_prompt(rng):
    kind = rng.random()
    one, two = rng.choice(ABSENT_NOUNS, 2)
    if kind < 0.55:
        return _form(rng, one)
    if kind < 0.65:
        return f"{one} {two}"
    if kind < 0.85:
        return one[: rng.integers(1, len(one) + 1)] + two[rng.integers(0, len(two)) :]
    return "".join(rng.choice(list("abcdefghijklmnopqrstuvwxyz"), int(rng.integers(3, 10))))


def augment(rng, example):
    """Flip left-right half of the time and vary brightness, contrast and colour a little."""
    image, masks, boxes = example.image, example.masks, example.boxes_xyxy
    if rng.random() < 0.5:
        image, masks = image[:, ::-1], masks[:, :, ::-1]
        boxes = np.stack([1 - boxes[:, 2], boxes[:, 1], 1 - boxes[:, 0], boxes[:, 3]], 1)
    gain = rng.uniform(0.85, 1.15) + rng.uniform(-0.04, 0.04, 3)
    image = np.clip(image * gain + rng.uniform(-15, 15), 0, 255).astype(np.uint8)
    return Example(image, example.concepts, np.ascontiguousarray(masks), boxes)


def to_pixels(images):
    """Return (I, 3, S, S) float32 in [-1, 1], as SAM3's image processor normalises."""
    stacked = torch.from_numpy(np.stack(images).astype(np.float32))
    return stacked.permute(0, 3, 1, 2).contiguous() / 127.5 - 1
