"""The built-in data set: scenes drawn in code, the same on every machine for the same seed.

An object is an outline (disc, square, triangle) with a mark (dot, bar, ring). The pair is its class, so a detector must
see the detail. Sizes range from a few cells of the finest pyramid level to most of the scene, colours from strong to
low contrast. Objects hide one another, and the background has a gradient, noise, strokes and outlines *without* a mark,
which belong to no class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw

from gdetkd_cli.data.split import Record, Split
from gdetkd_cli.memory import check_memory

OUTLINES = ("disc", "square", "triangle")
MARKS = ("dot", "bar", "ring")
CLASS_NAMES = tuple(f"{outline}-{mark}" for outline in OUTLINES for mark in MARKS)

_OVERSAMPLING = 2  # drawn twice as large, then averaged: smooth edges
_LARGEST = 0.88  # outer diameter of an object, as a fraction of the scene's side
_MARK_REACH = (0.34, 0.45)  # half the mark's extent, as a fraction of the object's radius
_MIN_VISIBLE = 0.45  # an object is not drawn if it would leave less of an earlier object visible
_MIN_MARK_VISIBLE = 0.75  # the same for the middle of an earlier object, which holds its mark
_SPLIT_KEYS = {"train": 0, "val": 1}

Point = tuple[float, float]


@dataclass(frozen=True)
class _DrawnObject:
    """A drawn object: xyxy box in scene pixels, label 1..K, number of oversampled pixels in all and in its middle."""

    box: list[float]
    label: int
    pixels: int
    mark_pixels: int


@lru_cache(maxsize=2)  # a demo uses the same validation scenes several times
def draw_split(*, split: str, images: int, size: int, seed: int, smallest: float = 0.12) -> Split:
    """Draws ``images`` scenes of ``size`` x ``size`` pixels.

    Args:
        split: ``train`` or ``val``; the two never share a scene.
        images: number of scenes; the first n scenes do not depend on it.
        size: side in pixels.
        smallest: outer diameter of the smallest object, as a fraction of the side.
    """
    check_memory(f"data.{split}_images: {images} scenes of {size} x {size} pixels", images * 3 * size**2)
    scenes = [
        _draw_scene(np.random.default_rng([seed, _SPLIT_KEYS[split], index]), size, smallest) for index in range(images)
    ]
    drawn = [torch.from_numpy(pixels).permute(2, 0, 1).contiguous() for pixels, _, _ in scenes]
    records = []
    for index, (_, boxes, labels) in enumerate(scenes):
        truth: list[dict[str, object]] = [
            {
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": (x1 - x0) * (y1 - y0),
                "category_id": label,
                "iscrowd": 0,
            }
            for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True)
        ]
        records.append(
            Record(
                image_id=index + 1,
                size=(size, size),
                boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
                labels=torch.tensor(labels, dtype=torch.int64),
                truth=truth,
            )
        )
    return Split(name=f"synthetic {split}", class_names=CLASS_NAMES, records=records, read=drawn.__getitem__)


def _draw_scene(rng: Generator, size: int, smallest: float) -> tuple[np.ndarray, list[list[float]], list[int]]:
    """Draws a scene: (size, size, 3) uint8 pixels, xyxy boxes in pixels, labels 1..K."""
    side = size * _OVERSAMPLING
    image = _draw_background(rng, side)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(3, 9))):
        _draw_clutter(draw, rng, side)

    # Content of each pixel: 0 background, 2 i + 1 the outline of object i, 2 i + 2 its middle, which holds its mark.
    owner = Image.new("L", (side, side), 0)
    placed: list[_DrawnObject] = []
    for _ in range(int(rng.integers(3, 9))):
        label = int(rng.integers(1, len(CLASS_NAMES) + 1))
        radius = 0.5 * side * math.exp(rng.uniform(math.log(smallest), math.log(_LARGEST)))
        centre = (rng.uniform(radius, side - radius), rng.uniform(radius, side - radius))
        outline = _outline(OUTLINES[(label - 1) // len(MARKS)], centre, radius, rng.uniform(0, 2 * math.pi))
        candidate = owner.copy()
        stencil = ImageDraw.Draw(candidate)
        stencil.polygon(outline, fill=2 * len(placed) + 1)
        stencil.ellipse(_circle(centre, radius * _MARK_REACH[1]), fill=2 * len(placed) + 2)
        visible = candidate.histogram()
        if any(
            visible[2 * i + 1] + visible[2 * i + 2] < _MIN_VISIBLE * earlier.pixels
            or visible[2 * i + 2] < _MIN_MARK_VISIBLE * earlier.mark_pixels
            for i, earlier in enumerate(placed)
        ):
            continue
        owner = candidate
        fill = _choose_fill_colour(rng, image, centre)
        draw.polygon(outline, fill=fill)
        _draw_mark(draw, rng, MARKS[(label - 1) % len(MARKS)], centre, radius, fill)
        mark_pixels = visible[2 * len(placed) + 2]
        xs, ys = [x / _OVERSAMPLING for x, _ in outline], [y / _OVERSAMPLING for _, y in outline]
        box = [min(max(v, 0.0), float(size)) for v in (min(xs), min(ys), max(xs), max(ys))]
        placed.append(_DrawnObject(box, label, visible[2 * len(placed) + 1] + mark_pixels, mark_pixels))

    small = np.asarray(image.resize((size, size), Image.Resampling.BOX), dtype=np.int16)
    noisy = small + rng.integers(-8, 9, small.shape, dtype=np.int16)
    pixels = np.clip(noisy, 0, 255).astype(np.uint8)
    return pixels, [p.box for p in placed], [p.label for p in placed]


def _circle(centre: Point, radius: float) -> list[float]:
    """Returns the bounding box of a circle in PIL's form."""
    return [centre[0] - radius, centre[1] - radius, centre[0] + radius, centre[1] + radius]


def _draw_background(rng: Generator, side: int) -> Image.Image:
    """Draws a coloured gradient with smooth blotches."""
    grid = 9
    corner = rng.uniform(40, 215, (2, 2, 3))
    t = np.linspace(0, 1, grid)[:, None]
    top, bottom = (corner[i, 0] * (1 - t) + corner[i, 1] * t for i in range(2))
    gradient = top[None] * (1 - t)[:, None] + bottom[None] * t[:, None]
    coarse = np.rint(0.75 * gradient + 0.25 * rng.integers(0, 256, (grid, grid, 3))).astype(np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BILINEAR)


def _draw_clutter(draw: ImageDraw.ImageDraw, rng: Generator, side: int) -> None:
    """Draws a stroke, a patch, or an outline without a mark; none of them is an object."""
    colour = tuple(int(v) for v in rng.integers(20, 236, 3))
    x, y = rng.uniform(0, side, 2)
    kind = rng.integers(0, 3)
    if kind == 0:
        dx, dy = rng.uniform(-0.4, 0.4, 2) * side
        draw.line([(x, y), (x + dx, y + dy)], fill=colour, width=int(rng.integers(2, 8)))
    elif kind == 1:
        radius = rng.uniform(0.01, 0.05) * side
        draw.ellipse(_circle((x, y), radius), fill=colour)
    else:
        shape = OUTLINES[int(rng.integers(0, len(OUTLINES)))]
        draw.polygon(_outline(shape, (x, y), rng.uniform(0.05, 0.2) * side, rng.uniform(0, 6.3)), fill=colour)


def _outline(shape: str, centre: Point, radius: float, angle: float) -> list[Point]:
    """Returns the corners of an outline inside the circle of ``radius`` around ``centre``."""
    corners = {"disc": 40, "square": 4, "triangle": 3}[shape]
    turns = [angle + 2 * math.pi * i / corners for i in range(corners)]
    return [(centre[0] + radius * math.cos(a), centre[1] + radius * math.sin(a)) for a in turns]


def _choose_fill_colour(rng: Generator, image: Image.Image, centre: Point) -> tuple[int, int, int]:
    """Chooses a colour far from the one under the centre, or near it for a third of the objects (low contrast)."""
    under = np.asarray(image.getpixel((int(centre[0]), int(centre[1]))), dtype=np.float64)
    direction = rng.normal(size=3)
    direction /= np.linalg.norm(direction)
    distance = rng.uniform(28, 45) if rng.random() < 0.33 else rng.uniform(70, 150)
    colour = np.clip(np.rint(under + direction * distance), 0, 255)
    return int(colour[0]), int(colour[1]), int(colour[2])


def _draw_mark(
    draw: ImageDraw.ImageDraw, rng: Generator, mark: str, centre: Point, radius: float, fill: tuple[int, int, int]
) -> None:
    """Draws the mark, lighter or darker than the fill, inside the triangle's inscribed circle."""
    step = rng.uniform(60, 130) * (1 if sum(fill) < 384 else -1)
    colour = tuple(int(min(max(v + step, 0), 255)) for v in fill)
    x, y = centre
    reach = radius * rng.uniform(*_MARK_REACH)
    if mark == "dot":
        draw.ellipse(_circle(centre, reach), fill=colour)
    elif mark == "ring":
        width = max(2, round(reach * 0.38))
        draw.ellipse(_circle(centre, reach), outline=colour, width=width)
    else:
        angle = rng.uniform(0, math.pi)
        across = (reach * 1.2 * math.cos(angle), reach * 1.2 * math.sin(angle))
        along = (-0.35 * across[1], 0.35 * across[0])
        corners = [
            (x + sx * across[0] + sy * along[0], y + sx * across[1] + sy * along[1])
            for sx, sy in ((1, 1), (1, -1), (-1, -1), (-1, 1))
        ]
        draw.polygon(corners, fill=colour)
