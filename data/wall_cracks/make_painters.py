"""How each known thing, and the crack, is painted on a wall: colour, texture and shape of its own."""

import cv2
import numpy as np

RENDER_SIZE = 256
"""Side of a rendered scene in pixels; all sizes below are given at this scale."""


def smooth_noise(rng, cells):
    """Return noise in [0, 1] that varies over ``RENDER_SIZE / cells`` pixels, (S, S) float32."""
    coarse = rng.random((cells + 1, cells + 1), dtype=np.float32)
    return cv2.resize(coarse, (RENDER_SIZE, RENDER_SIZE), interpolation=cv2.INTER_CUBIC)


def paint_wall(rng):
    """Return an empty wall, (S, S, 3) float32 in about [0, 255]: tone, relief, grain, light."""
    tone = rng.uniform(120, 190) + rng.uniform(-14, 14, 3) * (1.0, 0.3, -1.0)
    relief = 26 * (smooth_noise(rng, 5) - 0.5) + 16 * (smooth_noise(rng, 32) - 0.5)
    grain = rng.normal(0, 5, (RENDER_SIZE, RENDER_SIZE)).astype(np.float32)
    speckle = cv2.GaussianBlur(
        (rng.random((RENDER_SIZE, RENDER_SIZE)) < 0.004).astype(np.float32), (0, 0), 1.1
    )
    angle = rng.uniform(0, 2 * np.pi)
    across = np.linspace(-1, 1, RENDER_SIZE, dtype=np.float32)
    light = rng.uniform(0, 18) * (np.cos(angle) * across[None] + np.sin(angle) * across[:, None])
    shade = relief + grain - 120 * speckle + light
    return (tone[None, None] + shade[..., None]).astype(np.float32)


def _blob(rng, radius, roughness):
    """Return an irregular round region of about the given radius in pixels, (S, S) bool."""
    centre = rng.uniform(0.15 * RENDER_SIZE, 0.85 * RENDER_SIZE, 2)
    angles = np.linspace(0, 2 * np.pi, 48, endpoint=False)
    radii = np.ones_like(angles)
    for harmonic in range(2, 7):
        phase = rng.uniform(0, 2 * np.pi)
        radii += roughness / harmonic * rng.normal() * np.cos(harmonic * angles + phase)
    radii = radius * np.clip(radii, 0.4, 1.7)
    squash = rng.uniform(0.7, 1.0)
    points = centre + np.stack([radii * np.cos(angles), squash * radii * np.sin(angles)], 1)
    return _filled(points)


def _filled(points):
    mask = np.zeros((RENDER_SIZE, RENDER_SIZE), np.uint8)
    cv2.fillPoly(mask, [np.round(points).astype(np.int32)], 1)
    return mask.astype(bool)


def _rectangle(rng, width, height, tilt):
    """Return the four corners of a rectangle that keeps off the border, (4, 2) pixels."""
    reach = np.hypot(width, height) / 2
    centre = rng.uniform(min(reach, 110), RENDER_SIZE - min(reach, 110), 2)
    corners = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * (width / 2, height / 2)
    cos, sin = np.cos(tilt), np.sin(tilt)
    return centre + corners @ np.array([[cos, sin], [-sin, cos]])


def _blend(image, mask, colour, opacity, blur=1.0):
    alpha = opacity * cv2.GaussianBlur(mask.astype(np.float32), (0, 0), blur)[..., None]
    image += alpha * (colour - image)


def _textured(rng, colour, contrast, cells):
    jitter = rng.uniform(-12, 12, 3)
    texture = contrast * (smooth_noise(rng, cells) - 0.5)
    return (np.asarray(colour) + jitter)[None, None].astype(np.float32) + texture[..., None]


def _paint_stain(image, rng):
    mask = _blob(rng, rng.uniform(28, 58), 0.35)
    alpha = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), 4)[..., None]
    image *= 1 - alpha * (1 - np.array([0.58, 0.56, 0.68], np.float32) * rng.uniform(0.9, 1.05))
    return mask


def _paint_rust(image, rng):
    mask = _blob(rng, rng.uniform(18, 36), 0.4)
    rows = np.flatnonzero(mask.any(1))
    for _ in range(rng.integers(2, 5)):
        column = int(rng.choice(np.flatnonzero(mask.any(0))))
        end = min(RENDER_SIZE - 1, rows[-1] + int(rng.uniform(8, 50)))
        drip = np.zeros(mask.shape, np.uint8)
        cv2.line(drip, (column, int(rows.mean())), (column, end), 1, int(rng.integers(5, 10)))
        mask = mask | drip.astype(bool)
    _blend(image, mask, _textured(rng, (172, 86, 34), 70, 40), 0.92)
    return mask


def _paint_moss(image, rng):
    mask = _blob(rng, rng.uniform(22, 50), 0.8)
    _blend(image, mask, _textured(rng, (78, 122, 48), 90, 56), 0.9)
    return mask


def _paint_hole(image, rng):
    mask = _blob(rng, rng.uniform(13, 30), 0.12)
    rim = cv2.dilate(mask.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
    _blend(image, rim, image + 35, 0.9)
    _blend(image, mask, _textured(rng, (22, 20, 20), 14, 24), 0.97)
    return mask


def _paint_bolt(image, rng):
    radius, turn = rng.uniform(11, 19), rng.uniform(0, np.pi)
    centre = rng.uniform(30, RENDER_SIZE - 30, 2)
    angles = turn + np.arange(6) * np.pi / 3
    ring = np.stack([np.cos(angles), np.sin(angles)], 1)
    shadow = _filled(centre + (4, 5) + radius * 1.1 * ring)
    _blend(image, shadow, image * 0.55, 0.9, 2)
    mask = _filled(centre + radius * ring)
    _blend(image, mask, _textured(rng, (205, 210, 222), 20, 16), 1.0)
    _blend(image, _filled(centre + 0.55 * radius * ring), np.full(3, 128.0), 0.9)
    return mask


def _paint_tile(image, rng):
    side = rng.uniform(34, 70)
    corners = _rectangle(rng, side, side * rng.uniform(0.85, 1.15), rng.normal(0, 0.12))
    mask = _filled(corners)
    _blend(image, mask, _textured(rng, (58, 128, 178), 26, 4), 0.97)
    cv2.polylines(image, [np.round(corners).astype(np.int32)], True, (222.0, 230.0, 236.0), 4)
    return mask


def _paint_brick(image, rng):
    corners = _rectangle(rng, rng.uniform(48, 92), rng.uniform(24, 40), rng.normal(0, 0.08))
    mask = _filled(corners)
    _blend(image, mask, _textured(rng, (158, 56, 50), 60, 48), 0.97)
    cv2.polylines(image, [np.round(corners).astype(np.int32)], True, (196.0, 188.0, 178.0), 3)
    return mask


def _paint_marking(image, rng):
    start = rng.uniform(50, RENDER_SIZE - 50, 2)
    heading, bend = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.22)
    steps = heading + bend * np.arange(int(rng.integers(7, 14)))
    points = start + np.cumsum(11 * np.stack([np.cos(steps), np.sin(steps)], 1), 0)
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.polylines(mask, [np.round(points).astype(np.int32)], False, 1, int(rng.integers(9, 15)))
    _blend(image, mask.astype(bool), _textured(rng, (236, 204, 40), 30, 64), 0.93)
    return mask.astype(bool)


def _paint_tape(image, rng):
    length, width = rng.uniform(90, 190), rng.uniform(18, 30)
    corners = _rectangle(rng, length, width, rng.uniform(0, np.pi))
    mask = _filled(corners)
    _blend(image, mask, _textured(rng, (150, 70, 160), 18, 6), 0.95)
    middle = (corners[0] + corners[3]) / 2, (corners[1] + corners[2]) / 2
    line = np.round(np.stack(middle)).astype(np.int32)
    cv2.polylines(image, [line], False, (206.0, 160.0, 214.0), 3)
    return mask


def _paint_joint(image, rng):
    at, lean = rng.uniform(40, RENDER_SIZE - 40), rng.normal(0, 5)
    ends = np.array([[at - lean, -4], [at + lean, RENDER_SIZE + 4]])
    if rng.random() < 0.6:
        ends = ends[:, ::-1]
    width = int(rng.integers(9, 15))
    mask = np.zeros(image.shape[:2], np.uint8)
    cv2.polylines(mask, [np.round(ends).astype(np.int32)], False, 1, width)
    _blend(image, mask.astype(bool), _textured(rng, (84, 84, 88), 14, 60), 0.9)
    edge = np.round(ends + (width // 2, width // 2)).astype(np.int32)
    cv2.polylines(image, [edge], False, (214.0, 212.0, 208.0), 2)
    return mask.astype(bool)


def _crack_path(rng, start, heading, steps, width):
    """Return segments (from, to, width) of a wandering line that narrows towards its end."""
    segments, point, straight = [], start, heading
    for step in range(steps):
        heading = straight + 0.6 * (heading - straight) + rng.normal(0, 0.42)
        nxt = point + rng.uniform(7, 13) * np.array([np.cos(heading), np.sin(heading)])
        narrowing = 1 - 0.55 * step / steps
        segments.append((point, nxt, max(4.0, width * narrowing * rng.uniform(0.75, 1.25))))
        point = nxt
    return segments


def paint_crack(image, rng, widths=(8.5, 14.5), colour=(46, 42, 40), branches=(1, 4)):
    """Paint a wandering dark line; ``widths`` in pixels, ``branches`` as a half-open range."""
    heading, width = rng.uniform(0, 2 * np.pi), rng.uniform(*widths)
    steps = int(rng.integers(11, 22))
    start = (
        RENDER_SIZE / 2
        + rng.uniform(-40, 40, 2)
        - steps * 4.5 * np.array([np.cos(heading), np.sin(heading)])
    )
    segments = _crack_path(rng, start, heading, steps, width)
    for _ in range(rng.integers(*branches)):
        at = int(rng.integers(2, steps - 2))
        turn = rng.choice((-1, 1)) * rng.uniform(0.5, 1.1)
        length = int(rng.integers(4, 9))
        segments += _crack_path(
            rng, segments[at][0], heading + turn, length, 0.75 * segments[at][2]
        )
    mask = np.zeros(image.shape[:2], np.uint8)
    for begin, end, thickness in segments:
        line = np.round(np.stack([begin, end])).astype(np.int32)
        cv2.polylines(mask, [line], False, 1, round(thickness))
    _blend(image, mask.astype(bool), _textured(rng, colour, 30, 64), 0.9)
    return mask.astype(bool)


PAINTERS = {
    "stain": _paint_stain,
    "rust": _paint_rust,
    "moss": _paint_moss,
    "hole": _paint_hole,
    "bolt": _paint_bolt,
    "tile": _paint_tile,
    "brick": _paint_brick,
    "marking": _paint_marking,
    "tape": _paint_tape,
    "joint": _paint_joint,
    "crack": paint_crack,
}
"""Painter of each concept: changes the picture in place and returns the mask of what it painted."""
