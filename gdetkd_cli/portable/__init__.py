"""Builds detectors as plain torchvision modules from a description.

This package imports only torch, torchvision, timm for a backbone ``timm/NAME``, and itself (by relative names). A run
folder contains a copy, ``student``, next to ``student.pt``, so that a trained student can be rebuilt without gdetkd.

A description is a dictionary that JSON can store:

    {"kind": "torchvision", "name": "retinanet_resnet50_fpn", "arguments": {...}, "norm": "batch"}
    {"kind": "composed", "backbone": "resnet18", "width": 64, "blocks": [2, 2, 2, 2], "head": "fcos",
     "pyramid_channels": 256, "pyramid_levels": [3, 7], "image_size": [800, 1333], "arguments": {...}, "norm": "batch"}

A torchvision description may contain "norm_eps", the epsilon of frozen normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchvision.models import detection

from .arguments import CLASSES, check_anchors, check_arguments, list_arguments, suggest
from .bodies import MOBILENETS, RESNETS, build_backbone
from .heads import DEFAULT_LEVELS, HEAD_ARGUMENTS, HEADS
from .named import TORCHVISION_DETECTORS, build_named
from .timm_bodies import PREFIX as TIMM

__all__ = ["HEADS", "MOBILENETS", "RESNETS", "TIMM", "TORCHVISION_DETECTORS", "build", "load", "suggest"]


def build(description: dict[str, Any], num_classes: int) -> nn.Module:
    """Builds the detector with fresh weights.

    Args:
        description: see the module's docstring.
        num_classes: K, without background. The module has K + 1 outputs.

    Raises:
        ValueError: torchvision does not have a named part, or does not take an argument.
    """
    kind = description["kind"]
    if kind not in _KINDS:
        raise ValueError(f"unknown architecture kind {kind!r}; expected {' or '.join(map(repr, _KINDS))}")
    module = _KINDS[kind](description, num_classes)
    if isinstance(module, detection.FCOS):
        # Distances pass a ReLU that torchvision starts at 0, where it can die for good. A level's boxes reach 4 to 8
        # strides, and from there every distance has a gradient.
        nn.init.constant_(module.head.regression_head.bbox_reg.bias, 4.0)
    return module


def load(path: str) -> nn.Module:
    """Rebuilds the detector of a ``student.pt`` with its weights, in evaluation mode."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    module = build(saved["architecture"], len(saved["classes"]))
    module.load_state_dict(saved["model"])
    return module.eval()


def build_composed(description: dict[str, Any], num_classes: int) -> nn.Module:
    head, channels = description["head"], int(description["pyramid_channels"])
    arguments = dict(description.get("arguments") or {})
    short, long = description["image_size"]
    arguments.setdefault("min_size", short)
    arguments.setdefault("max_size", long)
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; known: {', '.join(HEADS)}")
    check_arguments(f"head {head!r}", arguments, HEAD_ARGUMENTS[head] | list_arguments(CLASSES[head.replace("-", "")]))
    first, last = description.get("pyramid_levels") or DEFAULT_LEVELS[head]
    check_anchors(head, arguments.get("anchor_sizes"), 1 + last - first)
    backbone = build_backbone(description, channels, first, last)
    strides = [2**level for level in range(first, last + 1)]
    try:
        return HEADS[head](backbone, num_classes, channels, strides, arguments)
    except TypeError as error:
        raise ValueError(f"head {head!r} does not take these arguments: {error}") from error


_KINDS = {"torchvision": build_named, "composed": build_composed}
