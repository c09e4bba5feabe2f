"""Evaluates a detector: COCO metrics, size and speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gdetkd_cli import assembly
from gdetkd_cli.assembly.find_data import find_data
from gdetkd_cli.commands.subject import Stopwatch, build_block, choose_device, load_teacher, open_file
from gdetkd_cli.data.loader import load_validation_batches
from gdetkd_cli.data.readers.coco import align_classes
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.engine.events import Observer, report_every, report_notes, silent
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import DataError
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics, evaluate_coco
from gdetkd_cli.evaluation.predict import list_predicted, predict_split
from gdetkd_cli.evaluation.stored import write_detections
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import Data, Recipe


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


def run_eval(
    target: str,
    *,
    data: Data | Path | None,
    classes: Sequence[str] = (),
    store: Path | None = None,
    observer: Observer = silent,
) -> EvalResult:
    """Evaluates a detector on the validation split, on the GPU if there is one.

    It runs on one image at a time, and an ONNX file with a fixed number of images on as many.

    Args:
        target, data, classes: as in ``gdetkd_cli.api.evaluate``.
        store: a file for the detections (``write_detections``); None: they are not kept.

    Raises:
        ModelError, PairError: the target is no detector, or its detections cannot be read.
        DataError: the data are missing or lack the detector's classes.
        RecipeError: the recipe is not usable.
    """
    device = choose_device()
    if isinstance(data, Path):
        data = find_data(data, observer)[0]
    found = load_teacher(target, classes)
    if found is not None:
        recipe, teacher = found
        labels = None if data else RunFolder(Path(target).parent).find_labels()
        split = assembly.build_split(data or recipe.data, "val", labels)
        subject = build_block(teacher, device, split.class_names, observer)
    else:
        path = catalog.locate(target)
        block, labels = (data, None) if data else (_read_data_beside(path), RunFolder(path.parent).find_labels())
        split = assembly.build_split(block, "val", labels)
        subject = open_file(path, device, observer, classes=classes, data_classes=split.class_names)
    assembly.report_bad_images([split], observer)
    report_notes(observer, (f"{split.name}: {note}" for note in split.notes))
    if len(split) == 0:
        raise DataError(f"{split.name} has no images to evaluate on; choose other data with --data")
    split = align_classes(split, subject.class_names)
    stopwatch = Stopwatch(subject.predictor, device)
    progress = report_every(observer, "evaluated", len(split))
    batches = load_validation_batches(split=split, batch_size=subject.batch)
    detections = predict_split(stopwatch, batches, device, progress)
    if store is not None:
        write_detections(store, split.class_names, detections)
    return EvalResult(
        source=target,
        format=subject.format,
        data=split.name,
        metrics=evaluate_coco(list_predicted(split, detections), split.class_names, detections),
        parameters=subject.parameters,
        size_mb=subject.size_mb,
        ms_per_image=stopwatch.ms_per_image,
    )


def evaluate_teacher(recipe: Recipe, split: Split, observer: Observer) -> CocoMetrics:
    """Computes COCO metrics of a recipe's teacher on a split, on the GPU if there is one.

    Raises:
        ModelError, PairError: the teacher's detections cannot be read.
        DataError: the teacher lacks classes of the split.
    """
    assert recipe.teacher is not None
    device = choose_device()
    subject = build_block(recipe.teacher, device, split.class_names, observer)
    split = align_classes(split, subject.class_names)
    progress = report_every(observer, "evaluated", len(split))
    detections = predict_split(subject.predictor, load_validation_batches(split=split, batch_size=1), device, progress)
    return evaluate_coco(list_predicted(split, detections), split.class_names, detections)


def _read_data_beside(path: Path) -> Data:
    recipe = path.parent / "recipe.yaml"
    if not recipe.exists():
        raise DataError(f"{path} has no recipe.yaml beside it that describes the data; choose data with --data")
    return load_recipe(recipe).data
