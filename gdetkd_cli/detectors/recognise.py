"""Which torchvision detector a state_dict belongs to, told by its names and shapes alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdetkd_cli import portable
from gdetkd_cli.detectors.weights import BATCH_COUNT, CLASS_LAYERS, has_frozen_norms, norm_eps_of_file
from gdetkd_cli.errors import ModelError


@dataclass(frozen=True)
class Recognised:
    """A state_dict's detector.

    Attributes:
        description: rebuilds it (see ``portable``).
        alternatives: other torchvision detectors with the same names and shapes; they differ in settings only.
    """

    description: dict[str, Any]
    alternatives: tuple[str, ...]


def recognise(state: dict[str, Tensor], source: str) -> Recognised:
    """The torchvision detector whose parameters these are; the number of classes is free.

    Args:
        state: tensors by parameter name.
        source: the file, for messages. torchvision's own file names tell settings that no tensor tells.

    Raises:
        ModelError: no torchvision detector has these names and shapes.
    """
    shapes = _shapes(state)
    masked = any(_is_mask(name) for name in state)
    scores: dict[str, tuple[int, int]] = {}  # names and shapes in common, of how many
    fitting = []
    for name in portable.TORCHVISION_DETECTORS:
        own = _shapes_of(name)
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
            f"detector ({near}); name its architecture in a recipe, with `weights: {source}`"
        )
    frozen = has_frozen_norms(state)
    description: dict[str, Any] = {
        "kind": "torchvision",
        "name": fitting[0],
        "arguments": {},
        "norm": "frozen" if frozen else "batch",
    }
    eps = norm_eps_of_file(Path(source).name) if frozen else None
    if eps is not None:
        description["norm_eps"] = eps
    return Recognised(description=description, alternatives=tuple(fitting[1:]))


def _is_mask(name: str) -> bool:
    return name.startswith("roi_heads.mask_")


def _shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes by name, but for what depends on the number of classes, on the mask branch, or on the normalisation."""
    return {
        name: () if name.startswith(CLASS_LAYERS) else tuple(value.shape)
        for name, value in state.items()
        if not name.endswith(BATCH_COUNT) and not _is_mask(name)
    }


def _shapes_of(name: str) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):  # names and shapes alone
        module = portable.build({"kind": "torchvision", "name": name}, 1)
    return _shapes(module.state_dict())
