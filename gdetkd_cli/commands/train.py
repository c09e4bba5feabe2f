"""Training runs: plain, distilled and resumed."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gdetkd_cli import assembly, portable
from gdetkd_cli.assembly.labels import write_labels
from gdetkd_cli.data.loader import validation_batches
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine import run_folder
from gdetkd_cli.engine.device import environment, peak_memory_mb
from gdetkd_cli.engine.events import Note, Observer, report_every, silent
from gdetkd_cli.engine.loop import Loop, LoopOptions, seed_everything
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import RecipeError
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics, evaluate_coco
from gdetkd_cli.evaluation.predict import gather_predictions, predict_split
from gdetkd_cli.recipe.checks import remove_teacher, require_distillation, require_trained_teacher
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, Recipe
from gdetkd_cli.report.images import draw_predictions
from gdetkd_cli.report.pyramid import describe_pyramid

DRAWN_IMAGES = 6
_NO_METRICS = CocoMetrics(None, None, None, None, None, None, None, {}, 0, 0)


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        metrics: the student's last evaluation.
        seconds: wall time of the run, since the last resume.
        seconds_per_step: median over the run, with data.
        peak_memory_mb: peak memory of the process (CPU) or the device (CUDA).
    """

    run: Path
    steps: int
    metrics: CocoMetrics
    seconds: float
    seconds_per_step: float
    peak_memory_mb: float


def run_train(
    recipe: Recipe,
    *,
    detector: Literal["student", "teacher"] = "student",
    output: Path | None = None,
    resume: Path | None = None,
    observer: Observer = silent,
) -> TrainResult:
    """Trains one detector of the recipe without distillation.

    Raises:
        GDetKDError: something that the recipe names cannot be used.
    """
    spec = recipe.student if detector == "student" else recipe.teacher
    if spec is None:
        raise RecipeError(f"the recipe {recipe.name!r} has no {detector}; add a `{detector}:` block")
    if detector == "teacher" and (isinstance(spec, CheckpointDetector) or spec.weights is not None):
        observer(Note("the teacher has weights; training continues from them"))
    return _run(remove_teacher(recipe, student=spec), output=output, resume=resume, observer=observer)


def run_distill(
    recipe: Recipe, *, output: Path | None = None, resume: Path | None = None, observer: Observer = silent
) -> TrainResult:
    """Trains the recipe's student with its teacher.

    Raises:
        GDetKDError: something that the recipe names cannot be used, or the pair does not fit.
    """
    distillation = require_distillation(recipe)
    require_trained_teacher(distillation)
    return _run(distillation, output=output, resume=resume, observer=observer)


def resume_run(run: Path, *, observer: Observer = silent) -> TrainResult:
    """Continues a stopped run with the recipe in its folder.

    Raises:
        RunFolderError: the folder is not a run folder, or has no checkpoint.
    """
    folder = run_folder.open_existing(run)
    return _run(load_recipe(folder.recipe), output=None, resume=run, observer=observer)


def _run(recipe: Recipe, *, output: Path | None, resume: Path | None, observer: Observer) -> TrainResult:
    started = perf_counter()
    compute, scaled = assembly.start_compute(recipe)
    main = compute.accelerator.is_main_process
    folder = _choose_folder(scaled, output, resume, compute.accelerator)
    if not main:
        observer = silent
    setup = assembly.build_setup(scaled, compute, unscaled=recipe, labels=folder.labels, observer=observer)
    _announce(setup, observer)
    with folder.lock() if main else nullcontext():
        if main:
            _write_facts(folder, setup)
        metrics = _train(setup, folder, resume=resume is not None, observer=observer)
        result = _build_result(setup, folder, metrics, perf_counter() - started)
        if main:
            _write_results(folder, setup, result)
    compute.accelerator.end_training()
    return result


def _train(setup: assembly.TrainingSetup, folder: RunFolder, *, resume: bool, observer: Observer) -> CocoMetrics | None:
    """Trains to the end; returns the last evaluation in the main process, None in the others."""
    accelerator, train = setup.compute.accelerator, setup.recipe.train
    accelerator.project_configuration.logging_dir = str(folder.path)
    accelerator.init_trackers("tensorboard")
    seed_everything(setup.recipe.seed, accelerator.process_index)

    def evaluate() -> CocoMetrics | None:
        if setup.student.detector.features_only:
            return None
        return evaluate_split(setup.student.detector, setup.val, accelerator, train.batch_size, observer)

    loop = Loop(
        accelerator=accelerator,
        distiller=setup.distiller,
        optimizer=setup.optimizer,
        schedule=setup.schedule,
        batches=setup.batches,
        evaluate=evaluate,
        finish=lambda: _write_student(folder, setup),
        folder=folder,
        options=LoopOptions(
            steps=train.steps,
            clip_norm=train.clip_norm,
            log_every=train.log_every,
            evaluate_every=train.evaluate_every,
            checkpoint_every=train.checkpoint_every,
        ),
        observer=observer,
    )
    try:
        return loop.run(resume=resume)
    except KeyboardInterrupt as interrupt:
        if folder.resume.exists():
            command = "distill" if setup.pair else "train"
            interrupt.add_note(f"continue with `gdetkd {command} --resume {folder.path}`")
        raise


def _build_result(
    setup: assembly.TrainingSetup, folder: RunFolder, metrics: CocoMetrics | None, seconds: float
) -> TrainResult:
    accelerator, train = setup.compute.accelerator, setup.recipe.train
    rates = [line["images_per_second"] for line in folder.read_log() if "images_per_second" in line]
    return TrainResult(
        run=folder.path,
        steps=train.steps,
        metrics=metrics or _NO_METRICS,  # none outside the main process, and for a student without detections
        seconds=seconds,
        seconds_per_step=train.batch_size * accelerator.num_processes / median(rates),
        peak_memory_mb=peak_memory_mb(accelerator.device),
    )


def evaluate_split(
    detector: Detector, split: Split, accelerator: Accelerator, batch_size: int, observer: Observer = silent
) -> CocoMetrics | None:
    """Computes COCO metrics of a detector. Every process predicts its share; only the main one returns metrics.

    Predicts in float32 whatever the run's precision, so that ``gdetkd eval`` reports the same AP for the saved file.
    """
    progress = report_every(observer, "evaluated", ceil(len(split) / accelerator.num_processes))
    batches = validation_batches(
        split=split,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    detections = gather_predictions(predict_split(detector, batches, accelerator.device, progress))
    if not accelerator.is_main_process:
        return None
    return evaluate_coco(split.records, split.class_names, detections)


def _choose_folder(recipe: Recipe, output: Path | None, resume: Path | None, accelerator: Accelerator) -> RunFolder:
    """Chooses the run's folder in the main process, and sends it to the others."""
    path: list[str | None] = [None]
    if accelerator.is_main_process:
        if resume is not None:
            folder = run_folder.open_existing(resume)
            folder.progress()
        else:
            folder = run_folder.choose(output, recipe.name)
        path = [str(folder.path)]
    broadcast_object_list(path)
    assert path[0] is not None
    return RunFolder(Path(path[0]))


def _announce(setup: assembly.TrainingSetup, observer: Observer) -> None:
    for note in setup.notes:
        observer(Note(note))
    settings = setup.compute.settings
    observer(Note(f"{settings.device}, {settings.precision}, {settings.threads} CPU threads"))
    if setup.pair is None:
        return
    student, teacher = setup.student.detector, setup.distiller.teacher
    assert teacher is not None
    observer(Note(f"pair: {setup.pair.kind}, {teacher.family} -> {student.family}"))
    for name, detector in (("student", student), ("teacher", teacher)):
        levels = ", ".join(f"{lv.name} 1/{lv.stride[0]:g} x{lv.channels}" for lv in detector.levels)
        observer(Note(f"{name} pyramid: {levels}"))
    for term in setup.pair.terms:
        observer(Note(f"term {term.name}: " + (f"weight {term.weight:g}" if term.weight is not None else term.reason)))
    observer(Note(f"head transfer: {setup.pair.head_transfer}"))
    observer(Note(f"regions: {setup.pair.regions_per_image} per image at most"))
    if not setup.distiller.task_loss:
        names = ", ".join(term.name for term in setup.pair.terms if term.weight is not None)
        observer(Note(f"task loss: none; the student trains with {names} alone, without its own losses"))
    if student.features_only:
        observer(Note("the student has no known detections, so it is not evaluated"))


def _write_facts(folder: RunFolder, setup: assembly.TrainingSetup) -> None:
    """Writes the recipe, environment, pyramids and labels before the first step."""
    processes = setup.compute.accelerator.num_processes
    if setup.labels:
        write_labels(folder.labels, setup.labels)
    if not folder.recipe.exists():
        # A resumed run must sum in the same order, so it needs the same number of threads.
        runtime = setup.recipe.runtime.model_copy(update={"threads": setup.compute.settings.threads})
        run_folder.write_text(folder.recipe, dump_recipe(setup.recipe.model_copy(update={"runtime": runtime})))
        run_folder.write_text(
            folder.environment, json.dumps(environment(setup.compute.settings, setup.recipe.seed, processes), indent=2)
        )
    detectors = {"student": setup.student.detector}
    if setup.distiller.teacher is not None:
        detectors["teacher"] = setup.distiller.teacher
        reports = {
            name: asdict(describe_pyramid(detector, source=name, size=setup.train.records[0].size))
            for name, detector in detectors.items()
        }
        run_folder.write_text(folder.probe, json.dumps(reports, indent=2))


def _copy_portable(folder: Path) -> None:
    """Copies the code that rebuilds a student without gdetkd."""
    folder.mkdir(exist_ok=True)
    for source in sorted(Path(portable.__file__).parent.glob("*.py")):
        run_folder.write_text(folder / source.name, source.read_text())


def _write_student(folder: RunFolder, setup: assembly.TrainingSetup) -> None:
    catalog.save(folder.student, setup.student.detector, setup.student.description)
    if setup.student.description.get("kind") != "factory":  # the user's own code rebuilds a factory's detector
        _copy_portable(folder.student_code)


def _write_results(folder: RunFolder, setup: assembly.TrainingSetup, result: TrainResult) -> None:
    detector = setup.student.detector
    facts = {name: getattr(result, name) for name in ("steps", "seconds", "seconds_per_step", "peak_memory_mb")}
    run_folder.write_text(folder.metrics, json.dumps({**result.metrics.to_json(), **facts}, indent=2))
    if detector.features_only:
        return
    draw_predictions(
        split=setup.val,
        predictors={"student": detector},
        folder=folder.images,
        count=DRAWN_IMAGES,
        device=setup.compute.settings.device,
    )
