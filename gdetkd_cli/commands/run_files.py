"""What a training run writes into its folder beside checkpoints and the log."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gdetkd_cli import assembly, portable
from gdetkd_cli.assembly.labels import write_labels
from gdetkd_cli.commands.measure import measure_run
from gdetkd_cli.detectors import catalog, transformers
from gdetkd_cli.detectors.saved import read_saved
from gdetkd_cli.detectors.weights import extract_state_dict, read_torch_file
from gdetkd_cli.engine.checkpoints import Checkpoint
from gdetkd_cli.engine.device import describe_environment
from gdetkd_cli.engine.events import Note, Observer
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics
from gdetkd_cli.files import write_text
from gdetkd_cli.recipe.load import dump_recipe
from gdetkd_cli.report.images import draw_predictions
from gdetkd_cli.report.pyramid import describe_pyramid

DRAWN_IMAGES = 6


def write_facts(folder: RunFolder, setup: assembly.TrainingSetup, *, replace: bool) -> None:
    """Writes the recipe, environment, pyramids and labels before the first step; ``replace``: a recipe, too."""
    processes = setup.compute.accelerator.num_processes
    if replace or not folder.recipe.exists():
        # A resumed run must sum in the same order, so it needs the same number of threads.
        runtime = setup.recipe.runtime.model_copy(update={"threads": setup.compute.settings.threads})
        write_text(folder.recipe, dump_recipe(setup.recipe.model_copy(update={"runtime": runtime})))
        write_text(
            folder.environment,
            json.dumps(describe_environment(setup.compute.settings, setup.recipe.seed, processes), indent=2),
        )
    if setup.labels:
        write_labels(folder.labels, setup.labels)
    detectors = {"student": setup.student.detector}
    if setup.distiller.teacher is not None:
        detectors["teacher"] = setup.distiller.teacher
        reports = {
            name: asdict(describe_pyramid(detector, source=name, split=setup.train))
            for name, detector in detectors.items()
        }
        write_text(folder.probe, json.dumps(reports, indent=2))


def write_student(path: Path, folder: RunFolder, setup: assembly.TrainingSetup) -> None:
    """Writes the student's file, and what loads it without gdetkd."""
    detector, description = setup.student.detector, setup.student.description
    catalog.save(path, detector, description)
    match description["kind"]:
        case "factory":  # the user's own code rebuilds it
            pass
        case "transformers":
            if path == folder.student:
                transformers.save_pretrained(detector, description, folder.pretrained)
        case _:
            copy_portable(folder.student_code)


def copy_portable(folder: Path) -> None:
    """Copies the code that rebuilds a student without gdetkd."""
    folder.mkdir(exist_ok=True)
    for source in sorted(Path(portable.__file__).parent.glob("*.py")):
        write_text(folder / source.name, source.read_text())


def read_trained(setup: assembly.TrainingSetup, folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Loads the student of a finished run, and the terms of its last checkpoint."""
    setup.distiller.load_state_dict(checkpoint.read_state()["distiller"])
    saved = read_saved(read_torch_file(folder.student), str(folder.student))  # with train.ema, the averaged student
    setup.student.detector.module.load_state_dict(extract_state_dict(saved.model, str(folder.student)))


def write_results(
    folder: RunFolder, setup: assembly.TrainingSetup, metrics: CocoMetrics, facts: Mapping[str, Any]
) -> None:
    """Writes ``metrics.json``, and some validation images with the student's detections.

    Args:
        facts: what ``metrics.json`` holds beside them.
    """
    detector = setup.student.detector
    write_text(folder.metrics, json.dumps({**metrics.to_json(), **facts}, indent=2))
    if detector.features_only:
        return
    draw_predictions(
        split=setup.val,
        predictors={"student": detector},
        folder=folder.images,
        count=DRAWN_IMAGES,
        device=setup.compute.settings.device,
    )


def add_measurement(folder: RunFolder, setup: assembly.TrainingSetup, observer: Observer) -> None:
    """Measures the run for its report; a failure becomes a note, because the run itself is complete."""
    observer(Note("measuring the trained student for its report, which takes up to a minute"))
    try:
        measure_run(setup, folder)
    except Exception as error:
        observer(Note(f"the run could not be measured for its report: {type(error).__name__}: {error}"))
