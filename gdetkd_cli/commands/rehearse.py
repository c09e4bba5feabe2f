"""Tries what a run does at its end, so that it fails before the training and not after it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from gdetkd_cli import assembly
from gdetkd_cli.data.loader import load_validation_batches
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.engine.events import Note, Observer
from gdetkd_cli.errors import ExportError, ModelError, get_first_line
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.evaluation.predict import list_predicted, predict_split
from gdetkd_cli.export.onnx import export_onnx

_IMAGES = 2


def rehearse(
    student: assembly.BuiltDetector, train: Split, val: Split, *, device: str = "cpu", observer: Observer
) -> tuple[str, ...]:
    """Reads the header of every image, and evaluates, saves, loads and exports the student once.

    Args:
        student: on ``device``; it may be untrained.
        train, val: the splits, with labels in the student's classes.
        observer: receives progress and the notes.

    Returns:
        A note if the student cannot be exported; the run itself does not need that.

    Raises:
        DataError: an image is missing or unreadable, or has another size than its annotations.
        ModelError: the student fails at inference.
    """
    assembly.check_headers((train, val), observer)
    detector = student.detector
    if detector.features_only:
        return ()
    few = replace(val, records=val.records[:_IMAGES])
    try:
        found = predict_split(detector, load_validation_batches(split=few, batch_size=_IMAGES), device)
    except (TypeError, ValueError, RuntimeError) as error:  # torchvision checks no argument before it needs it
        raise ModelError(
            f"the student can be trained, but fails at inference: {get_first_line(error)}; check student.arguments"
        ) from error
    if found:  # the few may all be left out
        evaluate_coco(list_predicted(few, found), few.class_names, found)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "student.pt"
        catalog.save(file, detector, student.description)
        loaded = catalog.load(file)
        try:
            export_onnx(loaded.detector, file.with_suffix(".onnx"), architecture=loaded.description)
        except ExportError as error:
            note = f"the student can be trained, but not exported to ONNX: {error}"
            observer(Note(note))
            return (note,)
    return ()
