"""Checks the names and values of a detector's parts and arguments."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torchvision.models import detection
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform

CLASSES = {
    "fasterrcnn": detection.FasterRCNN,
    "cascadercnn": detection.FasterRCNN,
    "maskrcnn": detection.MaskRCNN,
    "retinanet": detection.RetinaNet,
    "fcos": detection.FCOS,
    "ssd300": SSD,
    "ssdlite320": SSD,
}


def suggest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the nearest known one; empty if none is near."""
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""


_VECTORS = {"image_mean": 3, "image_std": 3, "bbox_reg_weights": 4, "fixed_size": 2}
_MOST = 10**6


def list_arguments(function: Callable[..., Any]) -> dict[str, Any]:
    """Returns the names of a function's arguments with their defaults, None for those without one."""
    return {
        p.name: None if p.default is p.empty else p.default
        for p in inspect.signature(function).parameters.values()
        if p.kind is not p.VAR_KEYWORD
    }


def check_arguments(what: str, arguments: dict[str, Any], known: dict[str, Any]) -> None:
    """Rejects unknown arguments, which torchvision ignores, and wrong values, which fail in the middle of a run.

    Args:
        known: defaults by name.

    Raises:
        ValueError: an argument is unknown, or its value is of another kind than the default.
    """
    known = list_arguments(GeneralizedRCNNTransform) | known  # the detectors pass their keywords on to it
    unknown = sorted(map(str, set(arguments) - set(known)))
    if unknown:
        raise ValueError(
            f"{what} does not take these arguments: {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )
    for name, value in arguments.items():
        expected = _find_fault(name, value, known[name])
        if expected is not None:
            raise ValueError(f"{what}: {name} must be {expected}, got {repr(value)[:80]}")


def _find_fault(name: str, value: Any, default: Any) -> str | None:
    """Returns what was expected; None if the value is fine."""
    if name == "anchor_sizes" or (value is None and default is None):  # see ``check_anchors``
        return None
    if name in _VECTORS:
        count, positive = _VECTORS[name], name != "image_mean"
        fits = isinstance(value, list | tuple) and len(value) == count and all(_is_number(v) for v in value)
        return None if fits and (not positive or min(value) > 0) else f"{count} numbers" + " above 0" * positive
    if name == "min_size":
        sides = value if isinstance(value, list | tuple) and value else [value]
        return (
            None if all(_is_whole(v, 2**14) for v in sides) else f"a whole number from 1 to {2**14}, or a list of them"
        )
    if name == "trainable_backbone_layers":
        return None if value == 0 or _is_whole(value, 6) else "a whole number from 0 to 6"
    if isinstance(default, bool):
        return None if isinstance(value, bool) else "true or false"
    if isinstance(default, int):
        most = 2**14 if name in ("max_size", "size_divisible", "representation_size") else _MOST
        too_large = isinstance(value, int) and value > most
        return None if _is_whole(value, most) else f"at most {most}" if too_large else "a whole number of at least 1"
    if isinstance(default, float):
        most = 1 if default <= 1 else 1000
        return None if _is_number(value) and 0 <= value <= most else f"a number from 0 to {most}"
    return "left out, because it is no plain number"


def _is_whole(value: object, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= most


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _MOST  # False for NaN


def check_anchors(head: str, anchors: Any, levels: int) -> None:
    """Rejects bad anchor sizes, for which torchvision fails later with a worse message."""
    if anchors is None:
        return
    lists = isinstance(anchors, list | tuple) and all(isinstance(own, list | tuple) and own for own in anchors)
    if not lists or len(anchors) != levels or not all(_is_number(s) and s > 0 for own in anchors for s in own):
        raise ValueError(
            f"head {head!r}: anchor_sizes must be one list of pixels for each of the {levels} levels, as [[16], [32], "
            f"...], got {repr(anchors)[:80]}"
        )
    if len({len(own) for own in anchors}) > 1:
        raise ValueError(f"head {head!r}: every level must have the same number of anchor_sizes, got {anchors!r}")
