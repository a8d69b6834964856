"""Judge the embedded base on walls it never saw, through the same prediction code as the course."""

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from data.tiny_sam3.make_examples import unrelated_prompt
from data.tiny_sam3.make_vocabulary import HELD_OUT_NOUNS
from data.wall_cracks.make import draw_wall
from data.wall_cracks.make_scenes import BASE_CONCEPTS, draw_concepts, render_scene
from helpers.data.masks import mask_to_rle
from helpers.detect.detections import detect
from helpers.detect.metrics import cgf1, coco_ap, threshold_sweep

HELD_OUT_SEED = 990_001
SCORE_THRESHOLD = 0.5
SCORE_FLOOR = 1e-3
REJECTED_BELOW = 0.05
"""An unknown word counts as rejected on an image when no query scores this much."""


def held_out_walls(count):
    """Yield walls of the training distribution, from a seed that training does not use."""
    for index in range(count):
        rng = np.random.default_rng((HELD_OUT_SEED, index))
        yield render_scene(rng, draw_concepts(rng, BASE_CONCEPTS, (1, 5)))


def crack_walls(count):
    """Yield walls with cracks, drawn as the course's data is."""
    for index in range(count):
        yield draw_wall(np.random.default_rng((HELD_OUT_SEED, 1, index)), has_crack=True)


def choose_prompts(rng, present):
    """Return up to two present nouns and as many absent ones, known and unrelated in turn."""
    here = [str(noun) for noun in rng.permutation(sorted(set(present)))[:2]]
    missing = [
        str(noun) for noun in rng.permutation([n for n in BASE_CONCEPTS if n not in present])
    ]
    return here + [missing[0], unrelated_prompt(rng)][: len(here)]


def detection_queries(predictor, count, disable_progress=False):
    """Ask half present, half absent prompts on held-out walls; see `helpers.detect.queries`."""
    queries = []
    bar = {"total": count, "unit": "wall", "disable": disable_progress}
    for index, scene in enumerate(tqdm(held_out_walls(count), desc="held-out walls", **bar)):
        prompts = choose_prompts(np.random.default_rng((HELD_OUT_SEED, 2, index)), scene.concepts)
        for raw in predictor.raw(Image.fromarray(scene.image), list(dict.fromkeys(prompts))):
            found = detect(raw, SCORE_FLOOR)
            masks = [item.mask for item in scene.objects if item.concept == raw.prompt]
            queries.append(
                {
                    "image_id": index,
                    "prompt": raw.prompt,
                    "height": raw.height,
                    "width": raw.width,
                    "exhaustive": True,
                    "gt": [mask_to_rle(mask) for mask in masks],
                    "pred": [{"rle": one["mask_rle"], "score": one["score"]} for one in found],
                    "max_score": raw.max_score,
                }
            )
    return queries


def rejection_scores(predictor, count, disable_progress=False):
    """Return, per word kept out of training, the highest score on each of ``count`` crack walls."""
    scores = {noun: [] for noun in HELD_OUT_NOUNS}
    bar = {"total": count, "unit": "wall", "disable": disable_progress}
    for scene in tqdm(crack_walls(count), desc="crack walls", **bar):
        for raw in predictor.raw(Image.fromarray(scene.image), list(HELD_OUT_NOUNS)):
            scores[raw.prompt].append(raw.max_score)
    return scores


def summarise_scores(queries, rejections):
    """Put detection of known concepts and rejection of unknown words into numbers.

    ``f1``, ``precision`` and ``recall`` are at mask IoU 0.5 and score 0.5 over all prompts.
    ``crack_rejected`` and ``unknown_rejected`` are the shares of images on which "crack" and, over
    all held-out words, any of them scores below 0.05.
    """
    sweep = threshold_sweep(queries, [SCORE_THRESHOLD]).iloc[0]
    concept = cgf1(queries, SCORE_THRESHOLD)
    rejected = {n: float(np.mean(np.array(s) < REJECTED_BELOW)) for n, s in rejections.items()}
    return {
        "walls": len({query["image_id"] for query in queries}),
        "prompts": len(queries),
        "f1": float(sweep["f1"]),
        "precision": float(sweep["precision"]),
        "recall": float(sweep["recall"]),
        "IL_MCC": concept["IL_MCC"],
        "cgF1": concept["cgF1"],
        "AP50": coco_ap(queries)["AP50"],
        "crack_walls": len(rejections["crack"]),
        "crack_rejected": rejected["crack"],
        "unknown_rejected": float(np.mean(list(rejected.values()))),
        "least_rejected_word": min(rejected, key=rejected.get),
        "least_rejected_share": min(rejected.values()),
    }


def score_base(predictor, walls=300, cracks=100):
    """Measure the base as its record states it, on held-out walls and on walls with cracks."""
    return summarise_scores(
        detection_queries(predictor, walls), rejection_scores(predictor, cracks)
    )
