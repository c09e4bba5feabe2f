"""Evaluates a detector: COCO metrics, size and speed."""

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
from gdetkd_cli.assembly.find_data import find_data
from gdetkd_cli.assembly.warnings import warn_about_weights
from gdetkd_cli.data.loader import load_validation_batches
from gdetkd_cli.data.readers.coco import align_classes
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.distill.distiller import synchronize
from gdetkd_cli.engine.events import Note, Observer, report_every, silent
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import DataError, PairError, RecipeError
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics, evaluate_coco
from gdetkd_cli.evaluation.exported import NotOursError, OnnxDetector, ScriptedDetector
from gdetkd_cli.evaluation.predict import Predictor, list_predicted, predict_split
from gdetkd_cli.evaluation.stored import write_detections
from gdetkd_cli.probing.formats.files import Kind, detect_kind
from gdetkd_cli.recipe.builtin import list_builtin
from gdetkd_cli.recipe.checks import require_trained_teacher
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, Data, Recipe
from gdetkd_cli.structures import Detections

_FORMATS = {"query": "transformers"}  # by family


@dataclass(frozen=True)
class EvalResult:
    """An evaluated detector. ``format`` is ``run``, ``checkpoint``, ``onnx``, ``torchscript``, ``exported``, …"""

    source: str
    format: str
    data: str
    metrics: CocoMetrics
    parameters: int | None
    size_mb: float
    ms_per_image: float


@dataclass(frozen=True)
class _Subject:
    """The detector to evaluate. ``parameters`` is None if unknown; ``size_mb`` is the file's size."""

    predictor: Predictor
    class_names: tuple[str, ...]
    format: str
    parameters: int | None
    size_mb: float


def run_eval(
    target: str,
    *,
    data: Data | Path | None,
    classes: Sequence[str] = (),
    store: Path | None = None,
    observer: Observer = silent,
) -> EvalResult:
    """Evaluates a detector on the validation split, one image at a time, on the GPU if there is one.

    Args:
        target: a run folder, a model file with readable detections, builtin:NAME, or a recipe (evaluates its teacher).
        data: the data or their folder; None: the data of the recipe.yaml beside the detector.
        classes: names of the detector's classes, for a file that does not name them.
        store: a file for the detections (``write_detections``); None: they are not kept.
        observer: receives notes and progress.

    Raises:
        ModelError, PairError: the target is no detector, or its detections cannot be read.
        DataError: the data are missing or lack the detector's classes.
        RecipeError: the recipe is not usable.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(data, Path):
        data = find_data(data, observer)[0]
    if Path(target).suffix in (".yaml", ".yml") or target in {recipe.name for recipe in list_builtin()}:
        recipe = load_recipe(target)
        if recipe.teacher is None:
            raise RecipeError(f"the recipe {target} has no teacher to evaluate; evaluate a run or a model file instead")
        if classes:
            raise RecipeError(f"--classes is for a file; in the recipe {target}, set teacher.classes instead")
        require_trained_teacher(recipe)
        split = assembly.build_split(data or recipe.data, "val")
        subject = _build(recipe.teacher, device, split.class_names, observer)
    else:
        path = catalog.locate(target)
        block, labels = (data, None) if data else (_read_data_beside(path), _find_labels(path))
        split = assembly.build_split(block, "val", labels)
        spec = CheckpointDetector(arch="checkpoint", path=str(path), classes=list(classes) or None)
        subject = _open(spec, device, split.class_names, observer)
    assembly.report_bad_images([split], observer)
    for note in split.notes:
        observer(Note(f"{split.name}: {note}"))
    if len(split) == 0:
        raise DataError(f"{split.name} has no images to evaluate on; choose other data with --data")
    split = align_classes(split, subject.class_names)
    stopwatch = Stopwatch(subject.predictor, device)
    progress = report_every(observer, "evaluated", len(split))
    detections = predict_split(stopwatch, load_validation_batches(split=split, batch_size=1), device, progress)
    if store is not None:
        write_detections(store, split.class_names, detections)
    return EvalResult(
        source=target,
        format=subject.format,
        data=split.name,
        metrics=evaluate_coco(list_predicted(split, detections), split.class_names, detections),
        parameters=subject.parameters,
        size_mb=subject.size_mb,
        ms_per_image=stopwatch.ms_per_call,
    )


def evaluate_teacher(recipe: Recipe, split: Split, observer: Observer) -> CocoMetrics:
    """Computes COCO metrics of a recipe's teacher on a split, on the GPU if there is one.

    Raises:
        ModelError, PairError: the teacher's detections cannot be read.
        DataError: the teacher lacks classes of the split.
    """
    assert recipe.teacher is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = _build(recipe.teacher, device, split.class_names, observer)
    split = align_classes(split, subject.class_names)
    progress = report_every(observer, "evaluated", len(split))
    detections = predict_split(subject.predictor, load_validation_batches(split=split, batch_size=1), device, progress)
    return evaluate_coco(list_predicted(split, detections), split.class_names, detections)


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
        self._seconds.append(perf_counter() - start)
        return detections

    @property
    def ms_per_call(self) -> float:
        """Median milliseconds per call without the first one, which warms up."""
        return 1e3 * median(self._seconds[1:] or self._seconds)


def _open(spec: CheckpointDetector, device: torch.device, class_names: tuple[str, ...], observer: Observer) -> _Subject:
    """Opens a detector file by its content; ``class_names`` are the data's, for a file without class names."""
    path = Path(spec.path)
    kind = detect_kind(path)
    exported = _open_exported(path, kind, device)
    if exported is not None:
        if spec.classes:
            catalog.rename_classes(exported, spec.classes, spec.path)
        for warning in warn_about_weights(exported):
            observer(Note(warning))
        return _Subject(exported, exported.class_names, kind, None, path.stat().st_size / 1e6)
    subject = _build(spec, device, class_names, observer)
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


def _build(spec: DetectorSpec, device: torch.device, class_names: tuple[str, ...], observer: Observer) -> _Subject:
    """Builds a detector from a recipe's block; ``class_names`` are the data's."""
    built = assembly.build_detector(spec, class_names, seed=0, keep_classes=True)
    for note in built.notes:
        observer(Note(note))
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
    return _Subject(
        detector,
        detector.class_names,
        detector.finding.kind if detector.finding else _FORMATS.get(detector.family, "torchvision"),
        parameters,
        size_mb,
    )


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


def _find_labels(path: Path) -> Path | None:
    """Returns the folder of teacher labels in the detector's run, if it exists."""
    labels = RunFolder(path.parent).labels
    return labels if labels.is_dir() else None


def _read_data_beside(path: Path) -> Data:
    recipe = path.parent / "recipe.yaml"
    if not recipe.exists():
        raise DataError(f"{path} has no recipe.yaml beside it that describes the data; choose data with --data")
    return load_recipe(recipe).data
