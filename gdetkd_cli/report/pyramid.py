"""Describes a pyramid for display: levels, strides and offsets in image pixels, and the region embedding."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.torchvision.common import get_device
from gdetkd_cli.knowledge.teacher import RememberedTeacher
from gdetkd_cli.probing.formats.runner import CALLS
from gdetkd_cli.probing.outputs import ROWS
from gdetkd_cli.probing.pyramid import probe_image
from gdetkd_cli.structures import Batch


@dataclass(frozen=True)
class LevelReport:
    """One pyramid level.

    ``stride`` and ``offset`` are (y, x) in pixels; ``shape`` is (H, W) cells; ``mean`` and ``std`` are of its values on
    the image, None if not finite. ``module`` is where the level is computed, if its name does not say so; else empty.
    """

    name: str
    channels: int
    shape: tuple[int, int]
    stride: tuple[float, float]
    offset: tuple[float, float]
    mean: float | None
    std: float | None
    module: str = ""


@dataclass(frozen=True)
class Alternative:
    """Names of other maps that may be the levels, and the reason."""

    levels: tuple[str, ...]
    reason: str


@dataclass(frozen=True)
class PyramidReport:
    """A described pyramid.

    Attributes:
        source: the model, as the user named it.
        format: ``torchvision``, ``torchscript``, ``exported``, ``onnx``, ``factory`` or ``run``.
        call: how the model takes its input.
        family: ``two-stage``, ``dense``, or ``unknown``.
        levels: fine to coarse.
        region_embedding: channels of the region embedding, and where it is read.
        detections: the form of its detections; None if unknown.
        size: (height, width) pixels of the probe image.
        classes: class names; empty if unknown.
        confidence: share of the detectors in docs/reference/probed-models.md for which this reason was right, in 0..1;
            1 for a known architecture.
    """

    source: str
    format: str
    call: str
    family: str
    levels: tuple[LevelReport, ...]
    region_embedding: dict[str, object] | None
    detections: str | None
    size: tuple[int, int]
    classes: tuple[str, ...]
    parameters: int
    reason: str = "the architecture is known"
    confidence: float = 1.0
    alternatives: tuple[Alternative, ...] = ()


def measure_level(features: Tensor) -> dict[str, float | None]:
    """Mean and deviation of a level's values, None if not finite."""
    values = features.float()
    statistics = {"mean": float(values.mean()), "std": float(values.std(correction=0))}
    return {name: value if math.isfinite(value) else None for name, value in statistics.items()}


def describe_pyramid(detector: Detector, *, source: str, split: Split) -> PyramidReport:
    """Describes a detector's pyramid in pixels of a split's first image.

    The detector sees a pattern of that size. A stored teacher knows the split's images alone, so it sees one of them.
    """
    image = probe_image(split.records[0].size)
    if isinstance(detector, RememberedTeacher) and not detector.live:
        image = split.read_first().float() / 255
        image = image if detector.views[0] else image.flip(-1)
    return describe_on_image(detector, image, source=source, format="run", classes=None)[0]


def describe_on_image(
    detector: Detector, image: Tensor, *, source: str, format: str, classes: tuple[str, ...] | None
) -> tuple[PyramidReport, tuple[Tensor, ...]]:
    """Describes a detector's pyramid in pixels of an image (3, H, W) in 0..1; also returns the levels' maps."""
    batch = Batch(images=[image.to(get_device(detector.module))], targets=[], image_ids=torch.zeros(1))
    with torch.no_grad():
        pyramid = detector.extract_features(batch).pyramid
    scale_x, scale_y = pyramid.frame.scale[0].tolist()
    shift_x, shift_y = pyramid.frame.shift[0].tolist()
    levels = tuple(
        LevelReport(
            name=level.name,
            channels=level.channels,
            shape=(features.shape[-2], features.shape[-1]),
            stride=(level.stride[0] / scale_y, level.stride[1] / scale_x),
            offset=((level.offset[0] - shift_y) / scale_y, (level.offset[1] - shift_x) / scale_x),
            module="",
            **measure_level(features),
        )
        for level, features in zip(pyramid.levels, pyramid.maps, strict=True)
    )
    finding = detector.finding
    report = PyramidReport(
        source=source,
        format=finding.kind if finding else format,
        call=finding.call if finding else CALLS[0].name,
        family=detector.family,
        levels=levels,
        region_embedding={"channels": detector.embedding_channels, "source": detector.embedding_source},
        detections=finding.detections if finding else ROWS.name,
        size=(image.shape[-2], image.shape[-1]),
        classes=detector.class_names if classes is None else classes,
        parameters=detector.parameter_count,
    )
    if finding:
        report = replace(report, reason=finding.reason, confidence=finding.confidence)
    return report, pyramid.maps
