"""Image files, and augmentation of images of any size."""

from __future__ import annotations

import random
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzzing import AcceptedSilentlyError, Target, make_once
from mutate import mutate_bytes
from PIL import Image

from gdetkd_cli.data.image_files import ImageFiles, read_image_size
from gdetkd_cli.data.transforms import build_augmentation


def _images(folder: Path) -> list[bytes]:
    pixels = np.random.default_rng(0).integers(0, 255, (24, 40, 3), dtype=np.uint8)
    made: list[bytes] = []
    for mode, format, options in (
        ("RGB", "JPEG", {}), ("L", "JPEG", {}), ("CMYK", "JPEG", {}), ("RGB", "JPEG", {"progressive": True}),
        ("RGB", "PNG", {}), ("RGBA", "PNG", {}), ("P", "PNG", {}), ("I;16", "PNG", {}), ("RGB", "BMP", {}),
        ("P", "GIF", {}), ("RGB", "TIFF", {}), ("RGB", "TIFF", {"compression": "tiff_lzw"}), ("RGB", "WEBP", {}),
        ("RGB", "PPM", {}), ("RGB", "JPEG2000", {}), ("RGB", "TGA", {}), ("RGB", "PCX", {}), ("RGB", "EPS", {}),
    ):  # fmt: skip
        image = Image.fromarray(pixels).convert("L").convert("I;16") if mode == "I;16" else Image.fromarray(pixels)
        path = folder / "made"
        image.convert(mode).save(path, format=format, **options)
        made.append(path.read_bytes())
    return made


def run_image(rng: random.Random, folder: Path, images: list[bytes]) -> None:
    path = folder / "image.jpg"
    content = mutate_bytes(rng, rng.choice(images))
    if rng.random() < 0.3:  # in the header, where sizes stand
        content = mutate_bytes(rng, content[:64]) + content[64:]
    path.write_bytes(content)
    with warnings.catch_warnings(action="ignore"):
        size = read_image_size(path)
        pixels = ImageFiles([path], [size])(0)
    if tuple(pixels.shape) != (3, *size) or pixels.dtype != torch.uint8:
        raise AcceptedSilentlyError(f"{tuple(pixels.shape)} for a size of {size}")


def run_extreme_size(rng: random.Random, folder: Path, _: Any) -> None:
    """Trains on images of extreme sides with extreme settings of multi-scale."""
    sides = rng.sample((1, 2, 3, 7, 8, 31, 33, 100, 1000, 10_000), 2)
    height, width = rng.sample(sides, 2)
    image = torch.randint(0, 255, (3, height, width), dtype=torch.uint8)
    boxes = torch.tensor([[0.0, 0, width, height], [0, 0, max(width / 2, 0.5), max(height / 2, 0.5)]])
    scales = [rng.choice((1, 2, 8, 32, 320, 800)) for _ in range(rng.randrange(1, 4))]
    limit = rng.choice((1, 8, 33, 200, 1333, 5000))
    change = build_augmentation(
        flip=rng.choice((0.0, 1.0)),
        photometric=rng.random() < 0.2,
        multi_scale=scales,
        max_size=limit,
        scale_jitter=rng.choice((0.0, 1.0)),
    )
    torch.manual_seed(rng.randrange(2**31))
    new, corners, labels = change(image, boxes, torch.ones(2, dtype=torch.int64))
    if min(new.shape[1:]) < 1 or len(corners) != len(labels) or not torch.isfinite(corners).all():
        raise AcceptedSilentlyError(f"{tuple(new.shape)} {corners.tolist()}")


TARGETS = [
    Target("image", 2000, partial(make_once, make=_images), run_image, isolated=True),
    Target("image-size", 500, partial(make_once, make=lambda _: None), run_extreme_size, isolated=True),
]
