"""Exports a trained student to a file that runs without this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from gdetkd_cli.assembly.warnings import warn_about_weights
from gdetkd_cli.commands.export_images import arrange_batches, find_calibration, read_parity_images
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.events import Note, Observer, report_every, report_notes, silent
from gdetkd_cli.errors import ExportError, ModelError, OutputError
from gdetkd_cli.evaluation.exported import OnnxDetector, ScriptedDetector
from gdetkd_cli.evaluation.predict import Predictor
from gdetkd_cli.export.onnx import ANY, OPSET, export_onnx
from gdetkd_cli.export.parity import (
    BOX_TOLERANCE,
    QUERY_TOLERANCE,
    SCORE_TOLERANCE,
    Cut,
    Parity,
    build_empty_image,
    check_parity,
)
from gdetkd_cli.export.reduced import write_half, write_int8
from gdetkd_cli.export.safetensors import export_safetensors
from gdetkd_cli.export.torchscript import export_torchscript

_EMPTY_SIZE = (96, 128)


@dataclass(frozen=True)
class ExportedFile:
    """One written file.

    Attributes:
        format: ``onnx``, ``torchscript``, ``safetensors``, ``onnx float16`` or ``onnx int8``.
        exporter: for example ``torch.onnx TorchScript, opset 17``.
        parity: its comparison with the detector; a reduced form need not pass.
        reduced: whether the file computes with fewer bits.
    """

    path: Path
    format: str
    exporter: str
    size_mb: float
    parity: Parity
    reduced: bool = False


@dataclass(frozen=True)
class ExportResult:
    """The files that an export wrote."""

    source: str
    files: tuple[ExportedFile, ...]


class _Export(Protocol):
    def __call__(self, detector: Detector, path: Path, *, architecture: dict[str, Any]) -> str: ...


@dataclass(frozen=True)
class _Format:
    """A file format: its name and suffix, its writer and its reader."""

    name: str
    write: _Export
    read: Callable[[Path], Predictor]


def run_export(
    target: str,
    *,
    onnx: bool,
    torchscript: bool,
    output: Path | None,
    safetensors: bool = False,
    half: bool = False,
    int8: bool = False,
    opset: int = OPSET,
    batch: int | None = None,
    observer: Observer = silent,
) -> ExportResult:
    """Writes a detector in one or more formats. A file gets its final name only after the parity check.

    Args:
        target, onnx, torchscript, safetensors: as in ``gdetkd_cli.api.export``.
        output: the file, or an existing folder; with several formats, each gets its own suffix. None: beside the
            detector, or in the working directory for builtin:NAME.
        half, int8: also write the ONNX file with float16 or 8-bit layers, as ``NAME.fp16.onnx`` and ``NAME.int8.onnx``.
        batch: images that the ONNX file takes together, or ``ANY`` number; None: one image without that dimension.

    Raises:
        ModelError: the target is not a gdetkd detector.
        OutputError: the file exists.
        ExportError: the detector cannot be exported, or the file differs from the detector.
    """
    source = catalog.locate(target)
    loaded = catalog.load(source)
    report_notes(observer, (*loaded.notes, *warn_about_weights(loaded.detector)))
    detector, architecture = loaded.detector, loaded.description
    if onnx and batch == ANY and detector.family != "query":
        raise ExportError(
            f"{target} is no DETR-like detector, so its batches have a fixed number of images; name it, for example "
            "--batch 4"
        )
    formats = [_Format("onnx", partial(export_onnx, opset=opset, batch=batch), OnnxDetector)] if onnx else []
    formats += [_Format("torchscript", export_torchscript, ScriptedDetector)] if torchscript else []
    if safetensors:
        formats.append(_Format("safetensors", export_safetensors, lambda path: catalog.load(path).detector))
    folder = Path() if target.startswith("builtin:") else source.parent
    paths = [_choose_path(kind, folder / source.stem, output, only=len(formats) == 1) for kind in formats]
    forms = [name for name, wanted in (("fp16", half), ("int8", int8)) if wanted and onnx]
    reduced = {name: paths[0].with_suffix(f".{name}.onnx") for name in forms}
    for path in (*paths, *reduced.values()):
        if path.exists():
            raise OutputError(f"{path} already exists; remove it, or choose another file with --output")
    images = read_parity_images(source, observer)
    if detector.family != "query":  # whose detections are always as many as its queries
        images.append(build_empty_image(detector, _EMPTY_SIZE))
    # The image without detections comes early, so that it is in the smallest batch, too.
    batched = images if batch is None else arrange_batches([images[0], images[-1], *images[1:-1]], batch)
    files = [
        _export(kind, path, detector, architecture, batched if kind.name == "onnx" else images, observer)
        for kind, path in zip(formats, paths, strict=True)
    ]
    files += [_reduce(form, paths[0], path, detector, batched, source, observer) for form, path in reduced.items()]
    return ExportResult(source=target, files=tuple(files))


def _choose_path(kind: _Format, default: Path, output: Path | None, *, only: bool) -> Path:
    if output is None or output.is_dir():
        return (output or default.parent) / f"{default.name}.{kind.name}"
    return output if only else output.with_suffix(f".{kind.name}")


def _export(
    kind: _Format,
    path: Path,
    detector: Detector,
    architecture: dict[str, Any],
    images: list[Tensor],
    observer: Observer,
) -> ExportedFile:
    """Writes a file under a temporary name, compares it with the detector, and renames it."""
    observer(Note(f"writing {path} and comparing it with the detector on {len(images)} images"))
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(f"{path.name}.new")
    try:
        exporter = kind.write(detector, fresh, architecture=architecture)
        parity = _compare(detector, kind.read(fresh), images)
        if not parity.passed:
            raise ExportError(f"{path} was not written: {_describe_difference(parity)}")
        fresh.rename(path)
    except ModelError as error:
        raise ExportError(f"{path} was not written: {error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    if not parity.detections:
        observer(Note("warning: the detector detects nothing in the parity images, so the comparison proves little"))
    return ExportedFile(
        path=path, format=kind.name, exporter=exporter, size_mb=path.stat().st_size / 1e6, parity=parity
    )


def _reduce(
    form: str,
    whole: Path,
    path: Path,
    detector: Detector,
    images: list[Tensor],
    source: Path,
    observer: Observer,
) -> ExportedFile:
    """Writes a float32 ONNX file with fewer bits, and measures how far it differs from the detector."""
    fresh = path.with_name(f"{path.name}.new")
    try:
        if form == "fp16":
            write_half(whole, fresh)
            name, exporter = "onnx float16", "gdetkd, float16 layers and float32 boxes"
        else:
            calibration = find_calibration(source, observer)
            count = len(calibration.sizes)
            observer(Note(f"measuring the ranges of 8-bit numbers on {count} images"))
            progress = report_every(observer, "ranges measured on", count)
            write_int8(whole, fresh, calibration, progress)
            name, exporter = "onnx int8", f"onnxruntime's static quantisation on {count} images"
        parity = _compare(detector, OnnxDetector(fresh), images)
        fresh.rename(path)
    finally:
        fresh.unlink(missing_ok=True)
    return ExportedFile(path, name, exporter, path.stat().st_size / 1e6, parity, reduced=True)


def _compare(detector: Detector, file: Predictor, images: list[Tensor]) -> Parity:
    relative = QUERY_TOLERANCE if detector.family == "query" else 0.0
    together = isinstance(file, OnnxDetector) and file.batch != 1
    return check_parity(detector, file, images, cut=Cut.of(detector.module), relative=relative, together=together)


def _describe_difference(parity: Parity) -> str:
    return (
        f"its detections differ from the detector's. On {parity.images} images {parity.unmatched} boxes have no "
        f"counterpart, box coordinates differ by up to {parity.max_box_error:.3g} pixels (allowed: {BOX_TOLERANCE}), "
        f"scores by up to {parity.max_score_error:.3g} (allowed: {SCORE_TOLERANCE})"
    )
