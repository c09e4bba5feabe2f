"""Decodes image files to tensors."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gdetkd_cli.data.bad_images import BadImageError, BadImages
from gdetkd_cli.files import name_kind

# Others are rare as photographs, and Pillow starts another program to read some of them.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TGA", "TIFF", "WEBP", "JPEG2000", "AVIF")
Image.init()  # loads all readers
FORMATS = tuple(format for format in _FORMATS if format in Image.OPEN)
# Pillow's errors for a file that is not an image, is incomplete, or is far too large.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a split, decoded on demand; a class, not a closure, because loader processes pickle it.

    Attributes:
        paths: one per record.
        sizes: (height, width) pixels in the annotations, one per record.
    """

    paths: Sequence[Path]
    sizes: Sequence[tuple[int, int]]

    def __call__(self, index: int) -> Tensor:
        """Decodes one image as stored, without EXIF orientation, like COCO's own tools.

        Returns:
            (3, H, W) uint8 RGB.

        Raises:
            BadImageError: the file cannot be decoded, or its size differs from that in the annotations.
        """
        path = self.paths[index]
        try:
            with Image.open(_check_regular(path), formats=FORMATS) as image:
                pixels = _convert_to_rgb(image)
        except _UNREADABLE as error:
            raise BadImageError(path, f"cannot be decoded ({error}); replace the file") from error
        self._check_size(index, (pixels.shape[0], pixels.shape[1]))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def check_header(self, index: int) -> None:
        """Reads the size of one image from its header.

        Raises:
            BadImageError: the file is not an image, or its size differs from that in the annotations.
        """
        self._check_size(index, read_image_size(self.paths[index]))

    def _check_size(self, index: int, size: tuple[int, int]) -> None:
        height, width = self.sizes[index]
        if size != (height, width):
            raise BadImageError(
                self.paths[index],
                f"should be {width} x {height} pixels according to its annotations, but it is {size[1]} x {size[0]}; "
                "restore the annotated image, or correct the annotations",
            )


def read_image_size(path: Path) -> tuple[int, int]:
    """Reads (height, width) pixels from the file's header, without decoding the image.

    Raises:
        BadImageError: the file is not an image.
    """
    try:
        with Image.open(_check_regular(path), formats=FORMATS) as image:
            return image.height, image.width
    except _UNREADABLE as error:
        raise BadImageError(path, f"cannot be read ({error}); replace the file") from error


def read_sizes(
    paths: Sequence[Path], known: Sequence[tuple[int, int] | None], bad: BadImages | None
) -> list[tuple[int, int] | None]:
    """Reads (height, width) pixels of the images whose size is not known; None for one that is left out.

    Raises:
        DataError: a file is not an image, and ``bad`` allows no more.
    """
    sizes = list(known)
    for index, path in enumerate(paths):
        try:
            sizes[index] = sizes[index] or read_image_size(path)
        except BadImageError as error:
            if bad is None:
                raise
            bad.add(error)
    return sizes


def _check_regular(path: Path) -> Path:
    if os.path.exists(path) and not os.path.isfile(path):
        raise BadImageError(path, f"is not a regular file{name_kind(path)}; replace it")
    return path


def _convert_to_rgb(image: Image.Image) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    """Converts to (H, W, 3) uint8. Pillow would clip 16-bit grey to white, so it is scaled here."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.mode in ("I", "F"):
        raise ValueError("the white point of 32 bits per channel is unknown; save it with 8 or 16 bits")
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.array(image.convert("RGB"))
