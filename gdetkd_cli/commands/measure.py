"""Measures a trained run on some validation images, so that its report needs neither detector."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from itertools import islice
from time import perf_counter
from typing import Any

import torch

from gdetkd_cli import assembly
from gdetkd_cli.commands.subject import Stopwatch
from gdetkd_cli.data.folds import select_images
from gdetkd_cli.data.loader import load_validation_batches
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.distill.pair_measurement import PairMeasurement, measure_pair
from gdetkd_cli.engine.run_folder import RunFolder, read_json
from gdetkd_cli.errors import PairError
from gdetkd_cli.evaluation.predict import predict_split
from gdetkd_cli.evaluation.stored import write_detections
from gdetkd_cli.files import write_text
from gdetkd_cli.knowledge.teacher import RememberedTeacher
from gdetkd_cli.recipe.schema import CheckpointDetector
from gdetkd_cli.report.levels import draw_levels
from gdetkd_cli.report.pyramid import describe_on_image
from gdetkd_cli.structures import Detections

IMAGES = 64
_SECONDS = 10.0  # per part: a large pair on a CPU stops after fewer images
_TOGETHER = 8  # images per batch, so that CKD's negatives also come from other images


@dataclass(frozen=True)
class MeasuredDetector:
    """A detector's cost. ``ms_per_image`` is the median, one image at a time; None without detections."""

    parameters: int
    size_mb: float
    ms_per_image: float | None


@dataclass(frozen=True)
class MeasuredRun:
    """What ``measured.json`` holds; ``teacher`` and ``pair`` are None for plain training."""

    device: str
    student: MeasuredDetector
    teacher: MeasuredDetector | None = None
    pair: PairMeasurement | None = None


def measure_run(setup: assembly.TrainingSetup, folder: RunFolder) -> None:
    """Measures the trained student and its pair; writes ``measured.json``, ``teacher.npz`` and ``pyramids/``.

    Args:
        setup: after the last step; only ``resize_again`` changes it.
        folder: holds the student's file.
    """
    device = setup.compute.accelerator.device
    some = spread_images(setup.val, IMAGES)
    student, teacher = setup.student.detector, setup.distiller.teacher
    assembly.resize_again([student] if teacher is None else [student, teacher])
    measured = MeasuredRun(
        str(device), _measure_detector(student, some, device, folder.student.stat().st_size / 1e6)[0]
    )
    if teacher is not None:
        spec, size = setup.recipe.teacher, 4 * teacher.parameter_count  # a teacher that is built from code has no file
        if isinstance(spec, CheckpointDetector):
            size = catalog.locate(spec.path).stat().st_size
        cost, detections = _measure_detector(teacher, some, device, size / 1e6)
        if detections:
            write_detections(folder.teacher_detections, teacher.class_names, detections)
        batches = (batch.to(device) for batch in load_validation_batches(split=some, batch_size=_TOGETHER))
        measured = replace(measured, teacher=cost, pair=measure_pair(setup.distiller, batches, seconds=_SECONDS))
    write_text(folder.measured, json.dumps(asdict(measured), indent=1))
    if teacher is not None and len(some):
        _draw_pyramids({"student": student, "teacher": teacher}, some, folder)


def read_measured(folder: RunFolder) -> dict[str, Any]:
    """Reads ``measured.json``; empty if the run has none."""
    return read_json(folder.measured)


def spread_images(split: Split, most: int) -> Split:
    """Returns at most ``most`` images, evenly spread over the split."""
    chosen = [place * len(split) // most for place in range(most)] if len(split) > most else list(range(len(split)))
    return select_images(split, chosen)


def _measure_detector(
    detector: Detector, split: Split, device: torch.device, size_mb: float
) -> tuple[MeasuredDetector, dict[int, Detections]]:
    """Runs a detector one image at a time; returns its cost and its detections, none if they cannot be read."""
    cost = MeasuredDetector(detector.parameter_count, size_mb, None)
    try:
        detector.check_detects()
    except PairError:
        return cost, {}
    if detector.features_only or not len(split):
        return cost, {}
    stopwatch, started = Stopwatch(detector, device), perf_counter()
    detections: dict[int, Detections] = {}
    batches = load_validation_batches(split=split, batch_size=1)
    while perf_counter() - started < _SECONDS and (some := list(islice(batches, 1))):
        detections |= predict_split(stopwatch, some, device)
    if isinstance(detector, RememberedTeacher) and not detector.live:
        return cost, detections  # which were read, so their time is not the teacher's
    return replace(cost, ms_per_image=stopwatch.ms_per_image), detections


def _draw_pyramids(detectors: dict[str, Detector], split: Split, folder: RunFolder) -> None:
    """Draws both pyramids over the first image."""
    image = split.read(0).float() / 255
    for name, detector in detectors.items():
        training = detector.module.training
        detector.module.eval()
        report, maps = describe_on_image(detector, image, source=name, format="run", classes=None)
        draw_levels(image, report.levels, maps, folder.pyramids / f"{name}.jpg")
        detector.module.train(training)
