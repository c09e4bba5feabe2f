"""Checks COCO's run lengths, because pycocotools writes beyond its memory if they do not fit the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gdetkd_cli.data.readers.json_file import is_whole


def is_mask(segmentation: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether ``counts``, a list or COCO's compressed text, covers the pixels of an image of ``size`` exactly."""
    counts = segmentation.get("counts")
    if segmentation.get("size") != list(size):
        return False
    runs = _expand(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(is_whole(run) and run >= 0 for run in runs):
        return False
    return sum(runs) == size[0] * size[1]


def _expand(text: str) -> list[int] | None:
    """Reads compressed run lengths: 5 bits per character, and from the fourth run on differences; None if broken."""
    runs: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        if not 0 <= bits < 64 or shift > 30:
            return None
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a run
            value -= (1 << shift) if bits & 16 else 0
            runs.append(value + runs[-2] if len(runs) > 2 else value)
            value = shift = 0
    return None if shift else runs
