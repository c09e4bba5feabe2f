"""Which arguments a detector takes, and which values make sense."""

from __future__ import annotations

import inspect
from collections.abc import Callable
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


def arguments_of(function: Callable[..., Any]) -> set[str]:
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}


def check_arguments(what: str, arguments: dict[str, Any], known: set[str]) -> None:
    """Finds misspelt arguments: torchvision's detectors take any keyword, and ignore those that they do not know."""
    known = known | arguments_of(GeneralizedRCNNTransform)  # they hand theirs on to it
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ValueError(
            f"{what} does not take these arguments: {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )


def check_sizes(head: str, arguments: dict[str, Any], levels: int) -> None:
    """That what the heads take here are sizes: torchvision would fail later, and say less."""
    for name in ("representation_size", "canonical_scale", "head_convs"):
        value = arguments.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"head {head!r}: {name} must be a whole number from 1 on, got {value!r}")
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
        raise ValueError(f"head {head!r}: every level must have as many anchor_sizes as the others, got {anchors!r}")
