"""Exports a trained student to a file that runs without this package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from math import ceil
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional

from gdetkd_cli import assembly
from gdetkd_cli.assembly.warnings import warn_about_weights
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.events import Note, Observer, report_every, silent
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import DataError, ExportError, ModelError, RecipeError
from gdetkd_cli.evaluation.exported import OnnxDetector, ScriptedDetector
from gdetkd_cli.evaluation.predict import Predictor
from gdetkd_cli.export.onnx import OPSET, export_onnx
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
from gdetkd_cli.export.torchscript import export_torchscript
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import Data, SyntheticData

# Factors (height, width) by which parity images are stretched, to find exports that work for one size only.
_STRETCHES = ((1.0, 1.0), (0.8, 1.25), (1.3, 0.7), (0.53, 0.53), (1.7, 1.1), (0.67, 1.9))
_LONGEST, _SHORTEST = 640, 32  # pixels of a parity image's sides
_CALIBRATION_IMAGES = 100
_EMPTY_SIZE = (96, 128)


@dataclass(frozen=True)
class ExportedFile:
    """One written file.

    Attributes:
        path: the file.
        format: ``onnx``, ``torchscript``, ``onnx float16`` or ``onnx int8``.
        exporter: for example ``torch.onnx TorchScript, opset 17``.
        size_mb: of the file.
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
    half: bool = False,
    int8: bool = False,
    opset: int = OPSET,
    observer: Observer = silent,
) -> ExportResult:
    """Writes a detector in one or two formats. A file gets its final name only after the parity check.

    Args:
        target: a run folder, a student.pt, or builtin:NAME.
        onnx: write an ONNX file.
        torchscript: write a TorchScript file.
        output: the file, or an existing folder; with two formats, each gets its own suffix. None: beside the
            detector, or in the working directory for builtin:NAME.
        half, int8: also write the ONNX file with float16 or 8-bit layers, as ``NAME.fp16.onnx`` and ``NAME.int8.onnx``.
        opset: of the ONNX file.
        observer: receives progress.

    Raises:
        ModelError: the target is not a gdetkd detector.
        ExportError: the file exists, the detector cannot be exported, or the file differs from the detector.
    """
    source = catalog.locate(target)
    loaded = catalog.load(source)
    for note in (*loaded.notes, *warn_about_weights(loaded.detector)):
        observer(Note(note))
    detector, architecture = loaded.detector, loaded.description
    formats = [_Format("onnx", partial(export_onnx, opset=opset), OnnxDetector)] if onnx else []
    formats += [_Format("torchscript", export_torchscript, ScriptedDetector)] if torchscript else []
    folder = Path() if target.startswith("builtin:") else source.parent
    paths = [_choose_path(kind, folder / source.stem, output, only=len(formats) == 1) for kind in formats]
    forms = [name for name, wanted in (("fp16", half), ("int8", int8)) if wanted and onnx]
    reduced = {name: paths[0].with_suffix(f".{name}.onnx") for name in forms}
    for path in (*paths, *reduced.values()):
        if path.exists():
            raise ExportError(f"{path} already exists; remove it, or choose another file with --output")
    images = _read_images(source, observer)
    if detector.family != "query":  # whose detections are always as many as its queries
        images.append(build_empty_image(detector, _EMPTY_SIZE))
    files = [
        _export(kind, path, detector, architecture, images, observer) for kind, path in zip(formats, paths, strict=True)
    ]
    files += [_reduce(form, paths[0], path, detector, images, source, observer) for form, path in reduced.items()]
    return ExportResult(source=target, files=tuple(files))


def try_export(source: Path) -> None:
    """Writes a detector's file as ONNX into the file's folder, without a comparison.

    Raises:
        ExportError: the detector cannot be exported.
    """
    loaded = catalog.load(source)
    export_onnx(loaded.detector, source.with_suffix(".onnx"), architecture=loaded.description)


def _choose_path(kind: _Format, default: Path, output: Path | None, *, only: bool) -> Path:
    if output is None:
        return default.with_suffix(f".{kind.name}")
    if output.is_dir():
        return output / f"{default.name}.{kind.name}"
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
        relative = QUERY_TOLERANCE if detector.family == "query" else 0.0
        parity = check_parity(detector, kind.read(fresh), images, cut=Cut.of(detector.module), relative=relative)
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
            calibration = _read_calibration(source, observer)
            observer(Note(f"measuring the ranges of 8-bit numbers on {len(calibration)} images"))
            progress = report_every(observer, "ranges measured on", len(calibration))
            write_int8(whole, fresh, calibration, progress)
            name, exporter = "onnx int8", f"onnxruntime's static quantisation on {len(calibration)} images"
        relative = QUERY_TOLERANCE if detector.family == "query" else 0.0
        parity = check_parity(detector, OnnxDetector(fresh), images, cut=Cut.of(detector.module), relative=relative)
        fresh.rename(path)
    finally:
        fresh.unlink(missing_ok=True)
    return ExportedFile(path, name, exporter, path.stat().st_size / 1e6, parity, reduced=True)


def _read_calibration(source: Path, observer: Observer) -> list[Tensor]:
    """Reads training images (3, H, W) in 0..1 of the detector's run, evenly chosen; else synthetic scenes."""
    recipe = source.parent / "recipe.yaml"
    data: Data = SyntheticData(train_images=_CALIBRATION_IMAGES)
    if recipe.exists():
        data = load_recipe(recipe).data
    else:
        observer(Note(f"warning: {source} has no recipe.yaml with its data beside it, so synthetic scenes are used"))
    split = assembly.build_split(data, "train", RunFolder(source.parent).find_labels())
    chosen = range(0, len(split), ceil(len(split) / _CALIBRATION_IMAGES))
    return [split.read(index).float() / 255 for index in chosen]


def _describe_difference(parity: Parity) -> str:
    return (
        f"its detections differ from the detector's. On {parity.images} images {parity.unmatched} boxes have no "
        f"counterpart, box coordinates differ by up to {parity.max_box_error:.3g} pixels (allowed: {BOX_TOLERANCE}), "
        f"scores by up to {parity.max_score_error:.3g} (allowed: {SCORE_TOLERANCE})"
    )


def _read_images(source: Path, observer: Observer) -> list[Tensor]:
    """Reads images (3, H, W) in 0..1 of different sizes: validation images of the run, else synthetic scenes."""
    recipe = source.parent / "recipe.yaml"
    if recipe.exists():
        try:
            return _read_stretched(load_recipe(recipe).data)
        except (DataError, RecipeError) as error:
            observer(Note(f"comparing on synthetic scenes, because the run's data cannot be read: {error}"))
    return _read_stretched(SyntheticData())


def _read_stretched(data: Data) -> list[Tensor]:
    if isinstance(data, SyntheticData):  # building the split draws every scene, so draw only a few
        data = data.model_copy(update={"val_images": min(data.val_images, len(_STRETCHES)), "fold": None})
    split = assembly.build_split(data, "val")
    indices = range(min(len(split), len(_STRETCHES)))
    images = [split.read(index).float() / 255 for index in indices]
    return [_stretch(image, by) for image, by in zip(cycle(images), _STRETCHES, strict=False)]


def _stretch(image: Tensor, by: tuple[float, float]) -> Tensor:
    """(3, H, W) -> (3, H', W'): scales by (height, width) factors, within the limits of a parity image's sides."""
    height, width = (side * factor for side, factor in zip(image.shape[-2:], by, strict=True))
    shrink = min(1.0, _LONGEST / max(height, width))
    size = [max(_SHORTEST, round(side * shrink)) for side in (height, width)]
    return functional.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0].clamp(0, 1)
