"""Evaluation: COCO metrics, size and speed of a detector file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from pydantic import TypeAdapter
from torch import Tensor

from gdetkd_cli import assembly
from gdetkd_cli.assembly.detector import DetectorSpec
from gdetkd_cli.assembly.find_data import find_data
from gdetkd_cli.data.loader import validation_batches
from gdetkd_cli.data.readers.coco import align_classes
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.distill.distiller import synchronize
from gdetkd_cli.engine.events import Note, Observer, report_every, silent
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import DataError, RecipeError
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics, evaluate_coco
from gdetkd_cli.evaluation.exported import NotOursError, OnnxDetector, ScriptedDetector
from gdetkd_cli.evaluation.predict import Predictor, predict_split
from gdetkd_cli.probing.formats.files import Kind, kind_of
from gdetkd_cli.recipe.builtin import list_builtin
from gdetkd_cli.recipe.checks import require_trained_teacher
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, Data, Recipe
from gdetkd_cli.structures import Detections


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
    """What is evaluated. ``parameters`` is None where the file does not tell; ``size_mb`` is the file's."""

    predictor: Predictor
    class_names: tuple[str, ...]
    format: str
    parameters: int | None
    size_mb: float


def run_eval(target: str, *, data: Data | Path | None, observer: Observer = silent) -> EvalResult:
    """Evaluates a detector on the validation split, one image at a time, on the GPU where there is one.

    Args:
        target: a run folder, a model file of any kind whose detections can be read, builtin:NAME, or a recipe, whose
            teacher is evaluated as the recipe describes it.
        data: the data, or a folder of them; None: that of the recipe.yaml beside the detector.
        observer: hears what was found on reading the data.

    Raises:
        ModelError, PairError: the target is no detector, or its detections cannot be read.
        DataError: there are no data, or they do not have the detector's classes.
        RecipeError: the recipe beside the detector is not usable.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if isinstance(data, Path):
        data = TypeAdapter(Data).validate_python(find_data(data, observer)[0])
    if Path(target).suffix in (".yaml", ".yml") or target in {recipe.name for recipe in list_builtin()}:
        recipe = load_recipe(target)
        if recipe.teacher is None:
            raise RecipeError(f"the recipe {target} has no teacher to evaluate; name a run or a model file instead")
        require_trained_teacher(recipe)
        split = assembly.build_split(data or recipe.data, "val")
        subject = _built(recipe.teacher, device, split.class_names, observer)
    else:
        path = catalog.locate(target)
        beside = (data, None) if data else (_data_beside(path), _labels(path))
        split = assembly.build_split(beside[0], "val", beside[1])
        subject = _open(path, device, split.class_names, run=Path(target).is_dir(), observer=observer)
    for note in split.notes:
        observer(Note(f"{split.name}: {note}"))
    if len(split) == 0:
        raise DataError(f"{split.name} has no images to evaluate on; name other data with --data")
    split = align_classes(split, subject.class_names)
    stopwatch = _Stopwatch(subject.predictor, device)
    progress = report_every(observer, "evaluated", len(split))
    found = predict_split(stopwatch, validation_batches(split=split, batch_size=1), device, progress)
    return EvalResult(
        source=target,
        format=subject.format,
        data=split.name,
        metrics=evaluate_coco(split.records, split.class_names, found),
        parameters=subject.parameters,
        size_mb=subject.size_mb,
        ms_per_image=stopwatch.ms_per_call,
    )


def teacher_metrics(recipe: Recipe, split: Split, observer: Observer = silent) -> CocoMetrics:
    """COCO metrics of a recipe's teacher on any split, on the GPU where there is one.

    Raises:
        ModelError, PairError: its detections cannot be read.
        DataError: the split has classes that the teacher does not have.
    """
    assert recipe.teacher is not None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    subject = _built(recipe.teacher, device, split.class_names, observer)
    split = align_classes(split, subject.class_names)
    progress = report_every(observer, "evaluated", len(split))
    found = predict_split(subject.predictor, validation_batches(split=split, batch_size=1), device, progress)
    return evaluate_coco(split.records, split.class_names, found)


class _Stopwatch:
    """A predictor that times each call of another one."""

    def __init__(self, predictor: Predictor, device: torch.device) -> None:
        self._predictor = predictor
        self._device = device
        self._seconds: list[float] = []

    def predict(self, images: list[Tensor]) -> list[Detections]:
        synchronize(self._device)
        start = perf_counter()
        found = self._predictor.predict(images)
        synchronize(self._device)
        self._seconds.append(perf_counter() - start)
        return found

    @property
    def ms_per_call(self) -> float:
        """The median in milliseconds; the first call warms up."""
        return 1e3 * median(self._seconds[1:] or self._seconds)


def _open(path: Path, device: torch.device, class_names: tuple[str, ...], *, run: bool, observer: Observer) -> _Subject:
    """The detector in a file, whatever its name ends in; ``class_names`` are the data's, for a file without any."""
    kind = kind_of(path)
    own = _exported(path, kind, device)
    if own is not None:
        return _Subject(own, own.class_names, kind, None, path.stat().st_size / 1e6)
    subject = _built(CheckpointDetector(arch="checkpoint", path=str(path)), device, class_names, observer)
    return replace(subject, format="run" if run else kind) if kind == "checkpoint" else subject


def _exported(path: Path, kind: Kind, device: torch.device) -> OnnxDetector | ScriptedDetector | None:
    """A file that gdetkd exported; None for a checkpoint, and for another tool's."""
    try:
        if kind == "onnx":
            return OnnxDetector(path, device=device.type)
        return ScriptedDetector(path, device=device.type) if kind == "torchscript" else None
    except NotOursError:
        return None


def _built(spec: DetectorSpec, device: torch.device, class_names: tuple[str, ...], observer: Observer) -> _Subject:
    """A detector as a recipe describes it, or a file of another tool; ``class_names`` are the data's."""
    built = assembly.build_detector(spec, class_names, seed=0, keep_classes=True)
    for note in built.notes:
        observer(Note(note))
    detector = built.detector
    detector.module.to(device)
    detector.check_detects()
    parameters = detector.parameter_count
    file = Path(spec.path) if isinstance(spec, CheckpointDetector) else Path()
    size_mb = (file.stat().st_size if file.is_file() else 4 * parameters) / 1e6
    return _Subject(
        detector,
        detector.class_names,
        detector.finding.kind if detector.finding else "torchvision",
        parameters,
        size_mb,
    )


def _labels(path: Path) -> Path | None:
    """The labels that a teacher gave in the detector's run, if it did."""
    labels = RunFolder(path.parent).labels
    return labels if labels.is_dir() else None


def _data_beside(path: Path) -> Data:
    recipe = path.parent / "recipe.yaml"
    if not recipe.exists():
        raise DataError(f"there is no recipe.yaml beside {path} that would name the data; name them with --data")
    return load_recipe(recipe).data
