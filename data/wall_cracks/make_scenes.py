"""Synthetic photographs of walls with known things on them.

One renderer serves the embedded base (which never sees a crack) and the course's data (which is
about cracks). Every concept has an appearance of its own, colour and texture as well as shape,
because a small detector learns appearance within minutes and pure shape hardly at all.
"""

from dataclasses import dataclass

import cv2
import numpy as np

from data.wall_cracks.make_painters import PAINTERS, paint_wall

MIN_VISIBLE_SHARE = 0.6
"""An object covered by others to less than this share of its area is removed from the scene."""


@dataclass(frozen=True)
class SceneObject:
    """One thing on the wall: its noun and its visible pixels, (height, width) bool."""

    concept: str
    mask: np.ndarray

    @property
    def box_xyxy(self):
        """Tight box in pixels, right and bottom exclusive."""
        rows, columns = np.flatnonzero(self.mask.any(1)), np.flatnonzero(self.mask.any(0))
        return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


@dataclass(frozen=True)
class Scene:
    """A picture, (height, width, 3) uint8 RGB, and the visible things on it in painting order."""

    image: np.ndarray
    objects: tuple[SceneObject, ...]

    @property
    def concepts(self):
        """The nouns present in the scene."""
        return frozenset(item.concept for item in self.objects)


BASE_CONCEPTS = tuple(noun for noun in PAINTERS if noun != "crack")
"""What the embedded base knows; the course teaches it the one that is missing."""


def render_scene(rng, concepts, painters=PAINTERS):
    """Paint one object per concept, in order, on a new wall; objects that others cover are left out."""
    image = paint_wall(rng)
    painted: list[tuple[str, np.ndarray, int]] = []
    for concept in concepts:
        attempt = _paint_apart(image, rng, concept, painted, painters)
        if attempt is None:
            continue
        painted = [(noun, mask & ~attempt, area) for noun, mask, area in painted]
        painted.append((concept, attempt, int(attempt.sum())))
    visible = [SceneObject(n, m) for n, m, area in painted if m.sum() >= MIN_VISIBLE_SHARE * area]
    soft = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.5, 1.0))
    return Scene(np.clip(soft, 0, 255).astype(np.uint8), tuple(visible))


def _paint_apart(image, rng, concept, painted, painters):
    """Paint one object that touches none of its kind and hides little of others; None if it cannot."""
    for _ in range(8):
        trial = image.copy()
        mask = painters[concept](trial, rng)
        around = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
        hidden = [
            (around & m).sum() if n == concept else (mask & m).sum() - 0.15 * m.sum()
            for n, m, _ in painted
        ]
        if mask.sum() >= 60 and all(excess <= 0 for excess in hidden):
            image[:] = trial
            return mask
    return None


def draw_concepts(rng, pool, kinds):
    """Choose what is on a wall: between ``kinds[0]`` and ``kinds[1]`` nouns, one to three of each.

    Large things come first so that small ones are painted on top of them.
    """
    nouns = rng.choice(pool, size=int(rng.integers(kinds[0], kinds[1] + 1)), replace=False)
    count = {noun: int(rng.choice((1, 2, 3), p=(0.55, 0.3, 0.15))) for noun in nouns}
    if "joint" in count:
        count["joint"] = 1
    return [noun for noun in PAINTERS if noun in count for _ in range(count[noun])]
