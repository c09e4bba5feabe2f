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


def list_arguments(function: Callable[..., Any]) -> set[str]:
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}


def check_arguments(what: str, arguments: dict[str, Any], known: set[str]) -> None:
    """Rejects unknown arguments, because torchvision's detectors ignore unknown keywords."""
    known = known | list_arguments(GeneralizedRCNNTransform)  # the detectors pass their keywords on to it
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ValueError(
            f"{what} does not take these arguments: {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )


def check_sizes(head: str, arguments: dict[str, Any], levels: int) -> None:
    """Rejects bad sizes, for which torchvision fails later with a worse message."""
    for name in ("representation_size", "canonical_scale", "head_convs"):
        value = arguments.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"head {head!r}: {name} must be a whole number of at least 1, got {value!r}")
    anchors = arguments.get("anchor_sizes")
    if anchors is None:
        return
    lists = isinstance(anchors, list | tuple) and all(isinstance(own, list | tuple) and own for own in anchors)
    if not lists or len(anchors) != levels or not all(isinstance(s, int | float) and s > 0 for o in anchors for s in o):
        raise ValueError(
            f"head {head!r}: anchor_sizes must be one list of pixels for each of the {levels} levels, as [[16], [32], "
            f"...], got {anchors!r}"
        )
    if len({len(own) for own in anchors}) > 1:
        raise ValueError(f"head {head!r}: every level must have the same number of anchor_sizes, got {anchors!r}")
