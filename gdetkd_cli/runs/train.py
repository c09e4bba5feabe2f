"""Training runs: plain, distilled, resumed."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import asdict
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from gdetkd_cli import build
from gdetkd_cli.build.labels import write_labels
from gdetkd_cli.data.loader import validation_batches
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import architectures, catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.errors import RecipeError
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics, evaluate_coco
from gdetkd_cli.evaluation.predict import gather_predictions, predict_split
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.scaling import changes, scaled_to_batch
from gdetkd_cli.recipe.schema import CheckpointDetector, Recipe
from gdetkd_cli.report.pictures import draw_predictions
from gdetkd_cli.results import TrainResult
from gdetkd_cli.runs.job import (
    Job,
    accelerator_for,
    check_distills,
    check_taught,
    features_only,
    prepare,
)
from gdetkd_cli.runs.probe import report_of
from gdetkd_cli.training import run_folder
from gdetkd_cli.training.device import environment, peak_memory_mb
from gdetkd_cli.training.events import Note, Observer, counting, silent
from gdetkd_cli.training.loop import Loop, LoopOptions, seed_everything
from gdetkd_cli.training.run_folder import RunFolder
from gdetkd_cli.training.schedule import build_optimizer, build_schedule

PICTURES = 6
_NO_METRICS = CocoMetrics(None, None, None, None, None, None, None, {}, 0, 0)


def run_train(
    recipe: Recipe,
    *,
    detector: Literal["student", "teacher"] = "student",
    output: Path | None = None,
    resume: Path | None = None,
    observer: Observer = silent,
) -> TrainResult:
    """Supervised training of one detector of the recipe; the rest of the recipe's distillation is left aside.

    Raises:
        GDetKDError: anything the recipe names that cannot be used.
    """
    spec = recipe.student if detector == "student" else recipe.teacher
    if spec is None:
        raise RecipeError(f"the recipe {recipe.name!r} has no {detector}; add a `{detector}:` block")
    if detector == "teacher" and (isinstance(spec, CheckpointDetector) or spec.weights is not None):
        observer(Note("the teacher has weights already, and this training goes on from them"))
    plain = recipe.model_copy(update={"student": spec, "teacher": None, "distill": None})
    return _run(plain, output=output, resume=resume, observer=observer)


def run_distill(
    recipe: Recipe, *, output: Path | None = None, resume: Path | None = None, observer: Observer = silent
) -> TrainResult:
    """Trains the recipe's student with its teacher.

    Raises:
        GDetKDError: anything the recipe names that cannot be used, or a pair that does not fit.
    """
    check_distills(recipe)
    check_taught(recipe)
    return _run(recipe, output=output, resume=resume, observer=observer)


def resume_run(run: Path, *, observer: Observer = silent) -> TrainResult:
    """Continues a run that was stopped; its recipe comes from its folder.

    Raises:
        RunFolderError: not a run folder, or it has no checkpoint.
    """
    folder = run_folder.open_existing(run)
    return _run(load_recipe(folder.recipe), output=None, resume=run, observer=observer)


def optimizer_for(recipe: Recipe, distiller: Distiller) -> torch.optim.Optimizer:
    """The recipe's optimizer over the student and what distillation adds."""
    options = recipe.train.optimizer
    return build_optimizer(
        name=options.name,
        modules=[distiller],
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
    )


def _run(recipe: Recipe, *, output: Path | None, resume: Path | None, observer: Observer) -> TrainResult:
    started = perf_counter()
    settings = build.resolve_runtime(recipe.runtime)
    torch.set_num_threads(settings.threads)
    accelerator = accelerator_for(settings, recipe)
    given, recipe = recipe, scaled_to_batch(recipe, accelerator.num_processes)
    folder = _choose_folder(recipe, output, resume, accelerator)
    if not accelerator.is_main_process:
        observer = silent
    job = prepare(recipe, settings, accelerator, labels=folder.labels, observer=observer)
    for note in (*changes(given, recipe), *job.notes):
        observer(Note(note))
    _announce(job, observer)
    with folder.held() if accelerator.is_main_process else nullcontext():
        return _trained(job, accelerator, folder, resume=resume is not None, started=started, observer=observer)


def _trained(
    job: Job, accelerator: Accelerator, folder: RunFolder, *, resume: bool, started: float, observer: Observer
) -> TrainResult:
    """Everything that writes into the run's folder."""
    recipe = job.recipe
    if accelerator.is_main_process:
        if job.labels:
            write_labels(folder.labels, job.labels)
        _write_facts(folder, job, accelerator.num_processes)
    accelerator.project_configuration.logging_dir = str(folder.path)
    accelerator.init_trackers("tensorboard")

    optimizer = optimizer_for(recipe, job.distiller)
    schedule_options = recipe.train.schedule
    schedule = build_schedule(
        optimizer,
        name=schedule_options.name,
        steps=recipe.train.steps,
        warmup_steps=schedule_options.warmup_steps,
        milestones=schedule_options.milestones,
        gamma=schedule_options.gamma,
    )
    seed_everything(recipe.seed, accelerator.process_index)

    def evaluate() -> CocoMetrics | None:
        if features_only(job.student.detector):
            return None
        return evaluate_split(job.student.detector, job.val, accelerator, recipe.train.batch_size, observer)

    loop = Loop(
        accelerator=accelerator,
        distiller=job.distiller,
        optimizer=optimizer,
        schedule=schedule,
        batches=build.build_batches(
            recipe, job.train, job.settings, rank=accelerator.process_index, world_size=accelerator.num_processes
        ),
        evaluate=evaluate,
        folder=folder,
        options=LoopOptions(
            steps=recipe.train.steps,
            clip_norm=recipe.train.clip_norm,
            log_every=recipe.train.log_every,
            evaluate_every=recipe.train.evaluate_every,
            checkpoint_every=recipe.train.checkpoint_every,
        ),
        observer=observer,
    )
    try:
        metrics = loop.run(resume=resume)
    except KeyboardInterrupt as interrupt:
        if folder.resume.exists():
            command = "distill" if job.pair else "train"
            interrupt.add_note(f"continue with `gdetkd {command} --resume {folder.path}`")
        raise
    seconds = perf_counter() - started
    if metrics is None:  # not the main process, or a student that detects nothing
        metrics = _NO_METRICS
    rates = [line["images_per_second"] for line in folder.read_log() if "images_per_second" in line]
    result = TrainResult(
        run=folder.path,
        steps=recipe.train.steps,
        metrics=metrics,
        seconds=seconds,
        seconds_per_step=recipe.train.batch_size * accelerator.num_processes / median(rates),
        peak_memory_mb=peak_memory_mb(accelerator.device),
    )
    if accelerator.is_main_process:
        _write_results(folder, job, result)
    accelerator.end_training()
    return result


def evaluate_split(
    detector: Detector, split: Split, accelerator: Accelerator, batch_size: int, observer: Observer = silent
) -> CocoMetrics | None:
    """COCO metrics of a detector; every process predicts its share, the main process gets the result.

    In float32 whatever the run's precision, so that ``gdetkd eval`` reports the same AP of the saved file.
    """
    progress = counting(observer, "evaluated", ceil(len(split) / accelerator.num_processes))
    batches = validation_batches(
        split=split,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    own = predict_split(detector, batches, accelerator.device, progress)
    everything = gather_predictions(own)
    if not accelerator.is_main_process:
        return None
    return evaluate_coco(split.records, split.class_names, everything)


def _choose_folder(recipe: Recipe, output: Path | None, resume: Path | None, accelerator: Accelerator) -> RunFolder:
    """The run's folder: the main process decides, the others are told."""
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


def _announce(job: Job, observer: Observer) -> None:
    settings = job.settings
    observer(Note(f"{settings.device}, {settings.precision}, {settings.threads} CPU threads"))
    if job.pair is None:
        return
    student, teacher = job.student.detector, job.distiller.teacher
    assert teacher is not None
    observer(Note(f"pair: {job.pair.kind}, {teacher.family} -> {student.family}"))
    for name, detector in (("student", student), ("teacher", teacher)):
        levels = ", ".join(f"{lv.name} 1/{lv.stride[0]:g} x{lv.channels}" for lv in detector.levels)
        observer(Note(f"{name} pyramid: {levels}"))
    for term in job.pair.terms:
        observer(Note(f"term {term.name}: " + (f"weight {term.weight:g}" if term.weight is not None else term.reason)))
    observer(Note(f"head transfer: {job.pair.head_transfer}"))
    observer(Note(f"regions: {job.pair.regions_per_image} per image at most"))
    if not job.distiller.task_loss:
        learnt = ", ".join(term.name for term in job.pair.terms if term.weight is not None)
        observer(Note(f"task loss: none; the student learns from {learnt} alone, and its own losses do not count"))
    if features_only(student):
        observer(Note("the student's detections are not known, so it is not evaluated"))


def _write_facts(folder: RunFolder, job: Job, processes: int) -> None:
    """What the run is, written before its first step."""
    settled = job.recipe.model_copy(
        update={"runtime": job.recipe.runtime.model_copy(update={"threads": job.settings.threads})}
    )
    if not folder.recipe.exists():  # threads are settled once: a resumed run must add up numbers in the same order
        run_folder.write_text(folder.recipe, dump_recipe(settled))
        run_folder.write_text(
            folder.environment, json.dumps(environment(job.settings, job.recipe.seed, processes), indent=2)
        )
    detectors = {"student": job.student.detector}
    if job.distiller.teacher is not None:
        detectors["teacher"] = job.distiller.teacher
        reports = {
            name: asdict(report_of(detector, source=name, format="run", size=job.train.records[0].size))
            for name, detector in detectors.items()
        }
        run_folder.write_text(folder.probe, json.dumps(reports, indent=2))


def _write_results(folder: RunFolder, job: Job, result: TrainResult) -> None:
    detector = job.student.detector
    catalog.save(folder.student, detector, job.student.description)
    if job.student.description.get("kind") != "factory":  # which is rebuilt by its own code
        run_folder.write_text(folder.student_script, Path(architectures.__file__).read_text())
    facts = {name: getattr(result, name) for name in ("steps", "seconds", "seconds_per_step", "peak_memory_mb")}
    run_folder.write_text(folder.metrics, json.dumps({**result.metrics.to_json(), **facts}, indent=2))
    if features_only(detector):
        return
    draw_predictions(
        split=job.val,
        predictors={"student": detector},
        folder=folder.pictures,
        count=PICTURES,
        device=job.settings.device,
    )
