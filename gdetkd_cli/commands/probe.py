"""Probes a detector's feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import interpolate

from gdetkd_cli import portable
from gdetkd_cli.data.image_files import ImageFiles, read_image_size
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.factory import is_reference, make
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.events import Note, Observer, report_notes, silent
from gdetkd_cli.errors import ModelError
from gdetkd_cli.files import name_kind
from gdetkd_cli.probing.formats.files import detect_kind, open_runner
from gdetkd_cli.probing.formats.runner import ModuleRunner, Runner, list_calls
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.pyramid import probe, probe_image
from gdetkd_cli.report.pyramid import Alternative, LevelReport, PyramidReport, describe_on_image, measure_level

_SIZE = (480, 640)  # pixels
_COCO_CLASSES = 90  # torchvision's detection weights have this many, background left out


@dataclass(frozen=True)
class ProbeOptions:
    """How to probe.

    Attributes:
        size: (height, width) of the image in pixels; None: the model's fixed size, else 480 x 640.
        scale, mean, std, bgr: the images that a custom model expects, as in ``ModelInput``.
        last: whether a custom model expects images (H, W, 3).
        levels: names of the levels to use instead of those found.
        classes: names of the model's classes, for a file that does not name them.
        image: image file on which to measure the levels; None: a built-in pattern.
        plot: file for a drawing of the levels' activations over the image.
    """

    size: tuple[int, int] | None = None
    scale: float | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    bgr: bool = False
    last: bool = False
    levels: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    image: Path | None = None
    plot: Path | None = None


def run_probe(model: str, options: ProbeOptions | None = None, *, observer: Observer = silent) -> PyramidReport:
    """Probes any detector that gdetkd can read; arguments and errors as in ``gdetkd_cli.api.probe``."""
    options = options or ProbeOptions()
    if options.plot is not None:
        from gdetkd_cli.report.figures import check_drawable  # importing matplotlib is slow

        check_drawable(options.plot)
    if model in portable.TORCHVISION_DETECTORS:
        names = tuple(f"class {i}" for i in range(1, _COCO_CLASSES + 1))
        observer(Note(f"{model} with fresh weights"))
        detector = catalog.build({"kind": "torchvision", "name": model}, names)
        detector.module.eval()
        return _report_detector(detector, model, "torchvision", options, observer, classes=())
    if not model.startswith("builtin:") and not Path(model).exists():
        if is_reference(model):
            return _report_custom(model, options, observer)
        known = ", ".join(portable.TORCHVISION_DETECTORS)
        raise ModelError(
            f"unknown detector {model!r}{name_kind(model)}; expected a file, a run folder, package.module:function, or "
            f"a torchvision detector: {known}{portable.suggest(model, portable.TORCHVISION_DETECTORS)}"
        )
    path = catalog.locate(model)
    kind = detect_kind(path)
    if kind != "checkpoint":
        return _report_runner(open_runner(path, kind, last=options.last), model, kind, options, observer)
    loaded = catalog.load(path)
    if options.classes:
        catalog.rename_classes(loaded.detector, options.classes, model)
    report_notes(observer, loaded.notes)
    format = "torchvision" if loaded.origin == "state_dict" else loaded.origin
    return _report_detector(loaded.detector, model, format, options, observer)


def _report_custom(reference: str, options: ProbeOptions, observer: Observer) -> PyramidReport:
    """Probes a model from the user's own code."""
    model = make(reference, {})
    if isinstance(model, nn.Module):
        runner = ModuleRunner(model.eval(), calls=list_calls(last=options.last))
        return _report_runner(runner, reference, "factory", options, observer)
    return _report_detector(model, reference, "factory", options, observer)


def _report_detector(
    detector: Detector,
    source: str,
    format: str,
    options: ProbeOptions,
    observer: Observer,
    classes: tuple[str, ...] | None = None,
) -> PyramidReport:
    """Measures a detector of a known family."""
    if options.levels:
        raise ModelError(f"the levels of {source} are known; remove --levels, which is for custom models")
    image = _read_image(options, options.size or _SIZE)
    report, maps = describe_on_image(detector, image, source=source, format=format, classes=classes)
    _finish(report, maps, image, options, observer)
    return report


def _report_runner(
    runner: Runner, source: str, format: str, options: ProbeOptions, observer: Observer
) -> PyramidReport:
    """Probes a custom model by running it."""
    class_names = options.classes or runner.class_names
    stated = ModelInput(scale=options.scale or 1.0, mean=options.mean, std=options.std, bgr=options.bgr)
    found = probe(runner, options.size, stated, options.levels, len(class_names) or None)
    model_input, size = found.model_input, found.size
    report_notes(observer, found.notes)
    image = _read_image(options, size)
    addresses = [level.address for level in found.levels]
    network_input, values = runner.read(found.call, [model_input.prepare(image)], addresses)
    maps = [level.as_map(value, network_input.shape[-2:]) for value, level in zip(values, found.levels, strict=True)]
    embedding = found.region_embedding
    report = PyramidReport(
        source=source,
        format=format,
        call=found.call.name,
        family=found.family,
        levels=tuple(
            LevelReport(
                name=level.name,
                channels=level.channels,
                shape=level.shape,
                stride=level.geometry.stride,
                offset=level.geometry.offset,
                module=level.module,
                **measure_level(features),
            )
            for level, features in zip(found.levels, maps, strict=True)
        ),
        region_embedding=None if embedding is None else {"channels": embedding[1], "source": embedding[0]},
        detections=found.detections.name if found.detections else None,
        size=size,
        classes=class_names,
        parameters=runner.parameters,
        reason=found.reason,
        confidence=found.confidence,
        alternatives=tuple(Alternative(names, why) for names, why in found.alternatives),
    )
    _finish(report, maps, image, options, observer)
    return report


def _read_image(options: ProbeOptions, size: tuple[int, int]) -> Tensor:
    """Returns the user's image, resized to ``size``, or the built-in pattern; (3, H, W) in 0..1."""
    if options.image is None:
        return probe_image(size)
    pixels = ImageFiles([options.image], [read_image_size(options.image)], upright=True)(0).float() / 255
    return interpolate(pixels[None], size=size, mode="bilinear", antialias=True)[0]


def _finish(
    report: PyramidReport, maps: Sequence[Tensor], image: Tensor, options: ProbeOptions, observer: Observer
) -> None:
    """Warns about levels without information, and draws all levels."""
    for level in report.levels:
        if level.mean is None:
            observer(Note(f"warning: {level.name} has non-finite values on this image"))
        elif level.std == 0:
            observer(Note(f"warning: {level.name} is constant on this image, so the level may be dead"))
    if options.plot is not None:
        from gdetkd_cli.report.levels import draw_levels  # importing matplotlib is slow

        draw_levels(image, report.levels, maps, options.plot)
        observer(Note(f"wrote {options.plot}"))
