"""Decodes image files to tensors."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from gdetkd_cli.data.bad_images import BadImageError, BadImages
from gdetkd_cli.files import name_kind

# Others are rare as photographs, and Pillow starts another program to read some of them.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "PPM", "TGA", "TIFF", "WEBP", "JPEG2000", "AVIF")
Image.init()  # loads all readers
FORMATS = tuple(format for format in _FORMATS if format in Image.OPEN)
# How to turn an image upright, by its EXIF orientation; the last four exchange its sides. Pillow itself turns TIFF.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BROKEN_TAG = (struct.error, SyntaxError, ValueError, TypeError, LookupError, OSError)  # it leaves the pixels whole
# Pillow's errors for a file that is not an image, is incomplete, or is far too large.
_UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a split, decoded on demand; a class, not a closure, because loader processes pickle it.

    Attributes:
        paths: one per record.
        sizes: (height, width) pixels in the annotations, one per record.
        upright: turn every image as its EXIF orientation asks. Otherwise, an image is turned only if this gives it the
            size in the annotations: COCO's own tools do not turn, many labelling tools do.
    """

    paths: Sequence[Path]
    sizes: Sequence[tuple[int, int]]
    upright: bool = False

    def __call__(self, index: int) -> Tensor:
        """Decodes one image.

        Returns:
            (3, H, W) uint8 RGB.

        Raises:
            BadImageError: the file cannot be decoded, or its size differs from that in the annotations.
        """
        path = self.paths[index]
        try:
            with Image.open(_check_regular(path), formats=FORMATS) as image:
                turn = _find_turn(image, None if self.upright else self.sizes[index])
                pixels = _convert_to_rgb(image if turn is None else image.transpose(turn))
        except _UNREADABLE as error:
            raise BadImageError(path, f"cannot be decoded ({error}); replace the file") from error
        self._check_size(index, (pixels.shape[0], pixels.shape[1]))
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    def check_header(self, index: int) -> None:
        """Reads the size of one image from its header.

        Raises:
            BadImageError: the file is not an image, or its size differs from that in the annotations.
        """
        size = read_image_size(self.paths[index], annotated=None if self.upright else self.sizes[index])
        self._check_size(index, size)

    def _check_size(self, index: int, size: tuple[int, int]) -> None:
        height, width = self.sizes[index]
        if size != (height, width):
            raise BadImageError(
                self.paths[index],
                f"should be {width} x {height} pixels according to its annotations, but it is {size[1]} x {size[0]}; "
                "restore the annotated image, or correct the annotations",
            )


def read_image_size(path: Path, *, annotated: tuple[int, int] | None = None) -> tuple[int, int]:
    """Reads (height, width) pixels of the upright image from the file's header, without decoding it.

    Args:
        annotated: size in the annotations; the image is turned upright only if it has this size then.

    Raises:
        BadImageError: the file is not an image.
    """
    try:
        with Image.open(_check_regular(path), formats=FORMATS) as image:
            size = image.height, image.width
            return _turn_size(size, _find_turn(image, annotated))
    except _UNREADABLE as error:
        raise BadImageError(path, f"cannot be read ({error}); replace the file") from error


def _find_turn(image: Image.Image, annotated: tuple[int, int] | None) -> Image.Transpose | None:
    """How an image is turned upright; None if it is upright, or if only the stored pixels have the annotated size."""
    if "exif" not in image.info:
        return None
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except _BROKEN_TAG:
        return None
    stored = image.height, image.width
    return turn if annotated is None or stored != annotated == _turn_size(stored, turn) else None


def _turn_size(size: tuple[int, int], turn: Image.Transpose | None) -> tuple[int, int]:
    return size if turn is None or turn in [_TURNS[2], _TURNS[3], _TURNS[4]] else (size[1], size[0])


def read_sizes(
    paths: Sequence[Path],
    known: Sequence[tuple[int, int] | None],
    bad: BadImages | None,
    *,
    upright: bool = False,
) -> list[tuple[int, int] | None]:
    """Reads (height, width) pixels of the images whose size is not known; None for one that is left out.

    Args:
        bad: collects the images that cannot be read; None: such an image is an error.
        upright: give the sizes of the upright images, not the stored ones.

    Raises:
        DataError: a file is not an image, and ``bad`` allows no more.
    """
    sizes = list(known)
    for index, path in enumerate(paths):
        try:
            sizes[index] = sizes[index] or read_image_size(path, annotated=None if upright else (0, 0))
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
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about the direct way, which gives the same colours
    return np.array(image.convert("RGB"))
