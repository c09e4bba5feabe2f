"""Opens a detector of any kind to run it on images: a run, a file of gdetkd's or another tool's, a recipe's block."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from torch import Tensor

from gdetkd_cli import assembly
from gdetkd_cli.assembly.detector import DetectorSpec
from gdetkd_cli.assembly.warnings import warn_about_weights
from gdetkd_cli.detectors import catalog
from gdetkd_cli.distill.distiller import synchronize
from gdetkd_cli.engine.events import Observer, report_notes
from gdetkd_cli.errors import PairError, RecipeError
from gdetkd_cli.evaluation.exported import NotOursError, OnnxDetector, ScriptedDetector
from gdetkd_cli.evaluation.predict import Predictor
from gdetkd_cli.probing.formats.files import Kind, detect_kind
from gdetkd_cli.recipe.builtin import list_builtin
from gdetkd_cli.recipe.checks import require_trained_teacher
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, Recipe
from gdetkd_cli.structures import Detections


@dataclass(frozen=True)
class Subject:
    """A detector that is ready to run.

    Attributes:
        parameters: their number; None if unknown.
        batch: images that it runs on together at least; a file with a fixed number fills up with images of zeros.
    """

    predictor: Predictor
    class_names: tuple[str, ...]
    format: str
    parameters: int | None
    size_mb: float
    batch: int = 1


def choose_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Stopwatch:
    """A predictor that times each call of another predictor."""

    def __init__(self, predictor: Predictor, device: torch.device) -> None:
        self._predictor = predictor
        self._device = device
        self._seconds: list[float] = []

    def predict(self, images: list[Tensor]) -> list[Detections]:
        synchronize(self._device)
        start = perf_counter()
        detections = self._predictor.predict(images)
        synchronize(self._device)
        self._seconds.append((perf_counter() - start) / len(images))
        return detections

    @property
    def ms_per_image(self) -> float:
        """Median over the calls of milliseconds per image, without the first call, which warms up."""
        return 1e3 * median(self._seconds[1:] or self._seconds)


def load_teacher(target: str, classes: Sequence[str]) -> tuple[Recipe, DetectorSpec] | None:
    """Loads a recipe and returns it with its teacher's block; None if the target is no recipe.

    Args:
        target: a recipe's file or name, or anything else.
        classes: names that the user gave for a file's classes.

    Raises:
        RecipeError: the recipe has no trained teacher, or there are class names, which belong into the recipe.
    """
    if Path(target).suffix not in (".yaml", ".yml") and target not in {recipe.name for recipe in list_builtin()}:
        return None
    recipe = load_recipe(target)
    if recipe.teacher is None:
        raise RecipeError(f"the recipe {target} has no teacher to run; give a run or a model file instead")
    if classes:
        raise RecipeError(f"--classes is for a file; in the recipe {target}, set teacher.classes instead")
    require_trained_teacher(recipe)
    return recipe, recipe.teacher


def open_file(
    path: Path,
    device: torch.device,
    observer: Observer,
    *,
    classes: Sequence[str] = (),
    data_classes: tuple[str, ...] = (),
) -> Subject:
    """Opens a detector file by its content.

    Args:
        classes: names that the user gave for its classes.
        data_classes: class names of the data, for a file without class names.

    Raises:
        ModelError, PairError: the file is no detector, or its detections cannot be read.
    """
    kind = detect_kind(path)
    exported = _open_exported(path, kind, device)
    if exported is not None:
        if classes:
            catalog.rename_classes(exported, classes, str(path))
        report_notes(observer, warn_about_weights(exported))
        batch = (exported.batch or 1) if isinstance(exported, OnnxDetector) else 1
        return Subject(exported, exported.class_names, kind, None, path.stat().st_size / 1e6, batch)
    spec = CheckpointDetector(arch="checkpoint", path=str(path), classes=list(classes) or None)
    subject = build_block(spec, device, data_classes, observer)
    if path.name == "student.pt":
        return replace(subject, format="run")
    return replace(subject, format=kind) if kind == "checkpoint" and subject.format != "transformers" else subject


def _open_exported(path: Path, kind: Kind, device: torch.device) -> OnnxDetector | ScriptedDetector | None:
    """Opens a file that gdetkd exported; returns None for checkpoints and other tools' files."""
    try:
        if kind == "onnx":
            return OnnxDetector(path, device=device.type)
        return ScriptedDetector(path, device=device.type) if kind == "torchscript" else None
    except NotOursError:
        return None


def build_block(spec: DetectorSpec, device: torch.device, class_names: tuple[str, ...], observer: Observer) -> Subject:
    """Builds a detector from a recipe's block; ``class_names`` are the data's."""
    built = assembly.build_detector(spec, class_names, seed=0, keep_classes=True)
    report_notes(observer, built.notes)
    detector = built.detector
    detector.module.to(device)
    try:
        detector.check_detects()
    except PairError as error:
        if not detector.class_names and _fits_classes(spec, class_names):
            names = shlex.quote(",".join(class_names))
            raise PairError(f"{error}. If its classes are the data's, in their order, add --classes {names}") from error
        raise
    parameters = detector.parameter_count
    file = Path(spec.path) if isinstance(spec, CheckpointDetector) else Path()
    size_mb = (file.stat().st_size if file.is_file() else 4 * parameters) / 1e6
    format = "transformers" if detector.family == "query" else "torchvision"
    if detector.finding is not None:
        format = detector.finding.kind
    return Subject(detector, detector.class_names, format, parameters, size_mb)


def _fits_classes(spec: DetectorSpec, class_names: tuple[str, ...]) -> bool:
    """Whether the output of a model without class names can be read as detections of these classes."""
    if not isinstance(spec, CheckpointDetector):
        return False
    named = spec.model_copy(update={"classes": list(class_names)})
    try:
        assembly.build_detector(named, class_names, seed=0, keep_classes=True).detector.check_detects()
    except PairError:
        return False
    return True
