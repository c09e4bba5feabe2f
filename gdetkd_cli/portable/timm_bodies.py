"""Bodies of timm: any model that returns feature maps with strides 4, 8, 16 and 32, or a part of them.

A description names one as ``timm/NAME``, such as ``timm/convnext_atto``. Shapes: N images, C channels.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from .arguments import suggest

PREFIX = "timm/"
# Ways of building a model that accepts images of any size: as most do, as Swin does, as ViT does.
_ANY_SIZE: tuple[dict[str, Any], ...] = ({}, {"strict_img_size": False}, {"dynamic_img_size": True})
_SIZE = (96, 160)  # pixels (height, width): 3 x 5 cells at stride 32, which no fixed window divides
_FAULTS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class TimmBody(nn.Module):
    """A timm model, (N, 3, H, W) -> its maps (N, C, H / stride, W / stride) by number, fine to coarse."""

    def __init__(self, *, net: nn.Module, channels_last: bool) -> None:
        super().__init__()
        self.net = net
        self.channels_last = channels_last

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        for i, features in enumerate(self.net(images)):
            maps[str(i)] = features.permute(0, 3, 1, 2).contiguous() if self.channels_last else features
        return maps


def import_timm() -> Any:
    """Returns the package timm.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import timm
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a backbone named {PREFIX}... is one of timm's models, and timm is not installed; run `pip install timm`"
        ) from error
    return timm


def find_model(backbone: str) -> str:
    """Returns the name of a backbone in timm.

    Args:
        backbone: ``timm/NAME``.

    Raises:
        ValueError: timm is not installed, or has no such model.
    """
    timm, name = import_timm(), backbone.removeprefix(PREFIX)
    # timm would download the description of a name such as hf-hub:owner/model, so only plain names are looked up.
    if re.fullmatch(r"[A-Za-z0-9_]+", name) and timm.is_model(name):
        return name
    plain, dot, tag = name.partition(".")
    if dot and re.fullmatch(r"[A-Za-z0-9_]+", plain) and timm.is_model(plain):
        raise ValueError(
            f"unknown backbone {backbone!r}; a backbone has no weights in its name, so write backbone: {PREFIX}{plain} "
            f"and backbone_weights: {tag}"
        )
    near = suggest(name, timm.list_models())
    raise ValueError(
        f"timm {timm.__version__} has no model {name[:80]!r}; `timm.list_models()` returns the names that it has{near}"
    )


def build_body(backbone: str, levels: range, *, frozen: bool) -> tuple[TimmBody, list[int]]:
    """Builds a model without its classifier, with fresh weights.

    Args:
        backbone: ``timm/NAME``.
        levels: to return; level l has stride 2**l.
        frozen: its batch normalization does not train. A model without any stays as it is.

    Returns:
        The body, and the channels of each level.

    Raises:
        ValueError: timm is not installed, or the model has no feature maps, lacks a level, or needs one image size.
    """
    timm, name = import_timm(), find_model(backbone)
    options, indices, widths = _choose_options(name, levels)
    net = timm.create_model(name, pretrained=False, features_only=True, out_indices=indices, **options)
    if frozen:
        net = timm.utils.model.freeze_batch_norm_2d(net)
    channels_last = _check_maps(name, _run(net), levels, widths)
    return TimmBody(net=net, channels_last=channels_last), widths


def _choose_options(name: str, levels: range) -> tuple[dict[str, Any], list[int], list[int]]:
    """Finds how to build a model for images of any size; returns the arguments, and each level's index and channels."""
    timm = import_timm()
    fault = ""
    for options in _ANY_SIZE:
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):  # only shapes are needed
                net = timm.create_model(name, pretrained=False, features_only=True, **options)
                _run(net)
        except _FAULTS as error:
            fault = fault or " ".join(str(error).split())[:160] or type(error).__name__
            continue
        info = net.feature_info
        at = {stride: i for i, stride in enumerate(info.reduction())}  # the last map of a stride
        missing = [2**level for level in levels if 2**level not in at]
        if missing:
            raise ValueError(
                f"timm's {name} has feature maps with strides {', '.join(map(str, sorted(at)))}, but the pyramid needs "
                f"{', '.join(map(str, missing))}; change pyramid_levels (level l has stride 2**l), or choose another "
                "backbone"
            )
        chosen = [at[2**level] for level in levels]
        return options, [info.out_indices[i] for i in chosen], [info.channels()[i] for i in chosen]
    raise ValueError(
        f"timm's {name} has no feature maps for images of any size, which a detector needs ({fault}); choose another "
        "backbone"
    )


@torch.no_grad()
def _run(net: nn.Module) -> list[Tensor]:
    """Runs the model once in evaluation mode."""
    was_training = net.training
    maps: list[Tensor] = net.eval()(torch.zeros(1, 3, *_SIZE))
    net.train(was_training)
    return maps


def _check_maps(name: str, maps: list[Tensor], levels: range, widths: list[int]) -> bool:
    """Checks that every map has its level's cells; returns whether channels are last."""
    cells = [tuple(side // 2**level for side in _SIZE) for level in levels]
    got = [tuple(features.shape[1:]) for features in maps]
    if got == [(width, *own) for width, own in zip(widths, cells, strict=True)]:
        return False
    if got == [(*own, width) for width, own in zip(widths, cells, strict=True)]:
        return True
    level = next(i for i in range(len(cells)) if not set(cells[i]) < set(got[i]))
    raise ValueError(
        f"timm's {name} returns a map of shape {got[level]} at stride {2 ** levels[level]} for {_SIZE[0]} x {_SIZE[1]} "
        f"pixels; expected {cells[level][0]} x {cells[level][1]} cells, so choose another backbone"
    )
