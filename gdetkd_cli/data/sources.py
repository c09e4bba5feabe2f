"""Images and videos that a user names: files, folders and patterns."""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gdetkd_cli.data.image_files import ImageFiles, read_image_size
from gdetkd_cli.data.readers.folder import find_images
from gdetkd_cli.errors import DataError, get_first_line
from gdetkd_cli.files import name_kind, walk_files

_VIDEOS = {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"}


@dataclass(frozen=True)
class Source:
    """An image file or a video.

    Attributes:
        name: unique among the sources; below a folder that was named, its relative path.
    """

    path: Path
    name: str

    @property
    def is_video(self) -> bool:
        return self.path.suffix.lower() in _VIDEOS

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Yields the image, or the frames of the video, (3, H, W) uint8 RGB, with a unique name each.

        Raises:
            BadImageError: the image cannot be decoded.
            DataError: the video cannot be read.
        """
        if not self.is_video:
            yield self.name, ImageFiles([self.path], [read_image_size(self.path)], upright=True)(0)
            return
        for number, pixels in enumerate(_read_frames(self.path), start=1):
            yield f"{self.name}/{number:06d}.jpg", pixels


def find_sources(places: Sequence[str]) -> list[Source]:
    """Finds the images and videos in files, folders (with their subfolders) and patterns such as ``a/*.jpg``.

    Raises:
        DataError: a place holds none, or two sources have one name.
    """
    sources: dict[str, Source] = {}
    for place in places:
        for source in _search(place):
            other = sources.setdefault(source.name, source)
            if other.path.resolve() != source.path.resolve():
                raise DataError(
                    f"{other.path} and {source.path} would both be called {source.name}; name a folder that holds both"
                )
    return list(sources.values())


def _search(place: str) -> list[Source]:
    path = Path(place)
    if path.is_dir():
        videos = (file for file in walk_files(path) if file.suffix.lower() in _VIDEOS)
        found = [Source(file, file.relative_to(path).as_posix()) for file in sorted([*find_images(path), *videos])]
    elif path.exists():
        return [Source(path, path.name)]
    else:
        found = [Source(Path(file), Path(file).name) for file in sorted(glob.glob(place, recursive=True))]
        found = [source for source in found if source.path.is_file()]
    if not found:
        raise DataError(f"{place}{name_kind(path)} holds no image and no video; give a file, a folder or a pattern")
    return found


def _read_frames(path: Path) -> Iterator[Tensor]:
    """Yields the frames of a video, (3, H, W) uint8 RGB, decoded by PyAV or OpenCV."""
    if importlib.util.find_spec("av"):
        return _read_with_av(path)
    if importlib.util.find_spec("cv2"):
        return _read_with_opencv(path)
    raise DataError(
        f"{path} is a video, and neither PyAV nor OpenCV is installed; in gdetkd's folder, run: pip install '.[video]'"
    )


def _read_with_av(path: Path) -> Iterator[Tensor]:
    import av

    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                pixels: Any = frame.to_ndarray(format="rgb24")
                yield _to_tensor(pixels)
    except (av.FFmpegError, IndexError) as error:  # the second: it has no video stream
        raise DataError(f"{path} cannot be read as a video ({get_first_line(error)})") from error


def _read_with_opencv(path: Path) -> Iterator[Tensor]:
    import cv2

    capture = cv2.VideoCapture(str(path))
    try:
        frames = 0
        while (read := capture.read())[0]:
            frames += 1
            yield _to_tensor(read[1][:, :, ::-1])  # OpenCV's order is blue, green, red
    finally:
        capture.release()
    if not frames:
        raise DataError(f"{path} cannot be read as a video")


def _to_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """Converts (H, W, 3) to (3, H, W)."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).contiguous()
