"""Finds the torchvision detector of a state_dict by its names and shapes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdetkd_cli import portable
from gdetkd_cli.detectors.weights import BATCH_COUNT, CLASS_LAYERS, find_norm_eps_of_file, has_frozen_norms
from gdetkd_cli.errors import ModelError


@dataclass(frozen=True)
class Recognised:
    """The detector of a state_dict.

    Attributes:
        description: rebuilds it (see ``portable``).
        alternatives: other torchvision detectors with the same names and shapes but other settings.
    """

    description: dict[str, Any]
    alternatives: tuple[str, ...]


def recognise(state: dict[str, Tensor], source: str) -> Recognised:
    """Finds the torchvision detector with these parameters; the number of classes is free.

    Args:
        state: tensors by parameter name.
        source: the file. torchvision's own file names identify settings that no tensor shows.

    Raises:
        ModelError: no torchvision detector has these names and shapes.
    """
    shapes = _select_shapes(state)
    masked = any(_is_mask(name) for name in state)
    scores: dict[str, tuple[int, int]] = {}  # tensors in common, tensors of the detector
    fitting = []
    for name in portable.TORCHVISION_DETECTORS:
        with torch.device("meta"):  # only names and shapes are needed
            own = _select_shapes(portable.build({"kind": "torchvision", "name": name}, 1).state_dict())
        scores[name] = (sum(shapes.get(key) == shape for key, shape in own.items()), len(own))
        # A Mask R-CNN without its mask branch is the Faster R-CNN.
        if own == shapes and name.startswith("maskrcnn") == masked:
            fitting.append(name)
    if not fitting:
        nearest = max(scores, key=lambda name: scores[name][0])
        common, of = scores[nearest]
        near = f"nearest is {nearest} with {common} of its {of} tensors" if common else "none is near it"
        raise ModelError(
            f"{source} is a state_dict of {len(state)} tensors, first {next(iter(state))!r}, but of no torchvision "
            f"detector ({near}); name its architecture in a recipe with `weights: {source}`"
        )
    frozen = has_frozen_norms(state)
    description: dict[str, Any] = {
        "kind": "torchvision",
        "name": fitting[0],
        "arguments": {},
        "norm": "frozen" if frozen else "batch",
    }
    eps = find_norm_eps_of_file(Path(source).name) if frozen else None
    if eps is not None:
        description["norm_eps"] = eps
    return Recognised(description=description, alternatives=tuple(fitting[1:]))


def _is_mask(name: str) -> bool:
    return name.startswith("roi_heads.mask_")


def _select_shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, without what depends on the classes, the mask branch or the kind of normalisation."""
    return {
        name: () if name.startswith(CLASS_LAYERS) else tuple(value.shape)
        for name, value in state.items()
        if not name.endswith(BATCH_COUNT) and not _is_mask(name)
    }
