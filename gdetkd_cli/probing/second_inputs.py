"""Inputs besides the image whose usual value follows from their name.

Boxes then come in pixels of the network's input: the "original" image is the one that the network reads, and its scale
is 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# name -> (height, width) in pixels -> one image's numbers.
_ROWS: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    # PaddleDetection's.
    "im_shape": lambda height, width: (height, width),
    "im_size": lambda height, width: (height, width),
    "scale_factor": lambda height, width: (1, 1),
    # Detectron's, before PaddleDetection's second version also that one's.
    "im_info": lambda height, width: (height, width, 1),
    # keras-yolo3's, as in ONNX's collection of models.
    "image_shape": lambda height, width: (height, width),
    # The postprocessors of RT-DETR, D-FINE and DEIM multiply x by the first number.
    "orig_target_sizes": lambda height, width: (width, height),
    "orig_size": lambda height, width: (width, height),
    # transformers'.
    "target_sizes": lambda height, width: (height, width),
}
_MASK = "pixel_mask"  # transformers'; 1 where a pixel belongs to the image
_WHOLE = frozenset({"im_size", "orig_target_sizes", "orig_size", "target_sizes", _MASK})
KNOWN = (*_ROWS, _MASK)


@dataclass(frozen=True)
class SecondInput:
    """An input besides the image.

    Attributes:
        name: one of ``KNOWN``.
        batched: it has an axis of images.
    """

    name: str
    dtype: torch.dtype
    batched: bool = True

    @classmethod
    def declare(cls, name: str, dtype: torch.dtype | None = None, shape: Sequence[object] | None = None) -> SecondInput:
        """Describes an input of a file, with the usual type and an axis of images if the file states neither."""
        usual = torch.int64 if name in _WHOLE else torch.float32
        axes = 3 if name == _MASK else 2
        return cls(name, dtype or usual, batched=shape is None or len(shape) == axes)

    def compute(self, count: int, size: tuple[int, int], device: torch.device) -> Tensor:
        """Returns the values for ``count`` images of ``size``, (height, width) pixels."""
        if self.name == _MASK:
            found = torch.ones(count, *size, dtype=self.dtype, device=device)
        else:
            found = torch.tensor([_ROWS[self.name](*size)] * count, dtype=self.dtype, device=device)
        return found if self.batched else found[0]

    def describe(self, size: tuple[int, int]) -> str:
        """``im_shape = (480, 640)``, for an image of ``size``."""
        return f"{self.name} = {'ones' if self.name == _MASK else _ROWS[self.name](*size)}"


def describe_unknown(source: object, names: Sequence[str]) -> str:
    """The error about inputs whose meaning is unknown."""
    return (
        f"{source} also takes {' and '.join(names)}, whose value gdetkd does not know; export the model with the image "
        f"as its only input, or with one of {', '.join(KNOWN)} besides it"
    )
