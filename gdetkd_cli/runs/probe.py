"""Probing: what a detector's pyramid is."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch

from gdetkd_cli.detectors import architectures, catalog
from gdetkd_cli.detectors.files import Kind, kind_of, open_runner
from gdetkd_cli.detectors.probed import ProbedDetector
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.probe import probe
from gdetkd_cli.probing.runner import CALLS
from gdetkd_cli.results import LevelReport, PyramidReport
from gdetkd_cli.structures import Batch
from gdetkd_cli.training.events import Note, Observer, silent

_SIZE = (480, 640)  # pixels
_COCO_CLASSES = 90  # torchvision's detection weights have this many, background left out


def run_probe(model: str, *, size: tuple[int, int] | None = None, observer: Observer = silent) -> PyramidReport:
    """Probes a torchvision detector by name, a TorchScript file of any detector, or one that this tool trained.

    Args:
        model: a name, a run folder, a student.pt, a state_dict of a torchvision detector,
            ``builtin:NAME``, or a TorchScript file.
        size: (height, width) pixels of the picture that shapes and strides are reported for; None: the only size that
            the model takes, else 480 x 640.
        observer: is told of progress.

    Raises:
        ModelError: the model is none of these, or it cannot be run.
        NoPyramidError: it has no feature pyramid.
    """
    if model in architectures.TORCHVISION_DETECTORS:
        names = tuple(f"class {i}" for i in range(1, _COCO_CLASSES + 1))
        observer(Note(f"{model} with fresh weights"))
        detector = catalog.build({"kind": "torchvision", "name": model}, names)
        detector.module.eval()
        return report_of(detector, source=model, format="torchvision", size=size or _SIZE, classes=())
    if not model.startswith("builtin:") and not Path(model).exists():
        known = ", ".join(architectures.TORCHVISION_DETECTORS)
        raise ModelError(f"{model!r} is neither a file, a run folder, nor a torchvision detector; detectors: {known}")
    path = catalog.locate(model)
    kind = kind_of(path)
    if kind != "checkpoint":
        return _probe_file(path, kind, model, size, observer)
    loaded = catalog.load(path)
    for note in loaded.notes:
        observer(Note(note))
    format = "run" if loaded.origin == "run" else "torchvision"
    return report_of(loaded.detector, source=model, format=format, size=size or _SIZE)


def _probe_file(path: Path, kind: Kind, source: str, size: tuple[int, int] | None, observer: Observer) -> PyramidReport:
    runner = open_runner(path, kind)
    size = size or runner.size or _SIZE
    found = probe(runner, size, ModelInput(scale=255.0 if runner.bytes else 1.0, fit=runner.size))
    observer(Note(f"{source}: {found.reason}"))
    embedding = found.region_embedding
    return PyramidReport(
        source=source,
        format=kind,
        call=found.call.name,
        family=found.family,
        levels=tuple(
            LevelReport(
                name=level.name,
                channels=level.channels,
                shape=level.shape,
                stride=level.geometry.stride,
                offset=level.geometry.offset,
            )
            for level in found.levels
        ),
        region_embedding=None if embedding is None else {"channels": embedding[1], "source": embedding[0]},
        size=size,
        classes=(),
        parameters=runner.parameters,
    )


def report_of(
    detector: Detector, *, source: str, format: str, size: tuple[int, int], classes: tuple[str, ...] | None = None
) -> PyramidReport:
    """What was measured of a detector, in pixels of a picture of ``size`` (height, width)."""
    # A frozen TorchScript model has neither.
    tensors = chain(detector.module.parameters(), detector.module.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    picture = Batch(images=[torch.zeros(3, *size, device=device)], targets=[], image_ids=torch.zeros(1))
    with torch.no_grad():
        pyramid = detector.look(picture).pyramid
    scale_x, scale_y = pyramid.frame.scale[0].tolist()
    shift_x, shift_y = pyramid.frame.shift[0].tolist()
    levels = tuple(
        LevelReport(
            name=level.name,
            channels=level.channels,
            shape=(features.shape[-2], features.shape[-1]),
            stride=(level.stride[0] / scale_y, level.stride[1] / scale_x),
            offset=((level.offset[0] - shift_y) / scale_y, (level.offset[1] - shift_x) / scale_x),
        )
        for level, features in zip(pyramid.levels, pyramid.maps, strict=True)
    )
    probed = detector if isinstance(detector, ProbedDetector) else None
    return PyramidReport(
        source=source,
        format=probed.kind if probed else format,
        call=probed.probed.call.name if probed else CALLS[0].name,
        family=detector.family,
        levels=levels,
        region_embedding={"channels": detector.embedding_channels, "source": detector.embedding_source},
        size=size,
        classes=detector.class_names if classes is None else classes,
        parameters=probed.parameters if probed else sum(p.numel() for p in detector.module.parameters()),
    )
