"""Training runs: plain, distilled, resumed."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Literal

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast_object_list

from gdetkd_cli import build
from gdetkd_cli.data.loader import validation_batches
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import architectures, catalog
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.trainable import TrainableDetector
from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.errors import PairError, RecipeError
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics, evaluate_coco
from gdetkd_cli.evaluation.predict import gather_predictions, predict_split
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.report.pictures import draw_predictions
from gdetkd_cli.results import TrainResult
from gdetkd_cli.runs.probe import report_of
from gdetkd_cli.training import run_folder
from gdetkd_cli.training.device import ComputeSettings, environment
from gdetkd_cli.training.events import Note, Observer, silent
from gdetkd_cli.training.loop import Loop, LoopOptions, seed_everything
from gdetkd_cli.training.run_folder import RunFolder
from gdetkd_cli.training.schedule import build_optimizer, build_schedule

PICTURES = 6
_NO_METRICS = CocoMetrics(None, None, None, None, None, None, None, {}, 0, 0)


@dataclass(frozen=True)
class Job:
    """Everything a run is made of, before it starts.

    Attributes:
        student: the detector that is trained, and the description that rebuilds it.
        pair: what was decided about distillation; None for plain training.
        train, val: the splits, in the student's classes.
        notes: what there was to say.
    """

    recipe: Recipe
    settings: ComputeSettings
    student: build.BuiltDetector
    distiller: Distiller
    pair: build.BuiltPair | None
    train: Split
    val: Split
    notes: tuple[str, ...]


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
    return _run(recipe, output=output, resume=resume, observer=observer)


def resume_run(run: Path, *, observer: Observer = silent) -> TrainResult:
    """Continues a run that was stopped; its recipe comes from its folder.

    Raises:
        RunFolderError: not a run folder, or it has no checkpoint.
    """
    folder = run_folder.open_existing(run)
    return _run(load_recipe(folder.recipe), output=None, resume=run, observer=observer)


def check_distills(recipe: Recipe) -> None:
    """Raises a RecipeError where the recipe has no teacher or no ``distill`` block."""
    for name in ("teacher", "distill"):
        if getattr(recipe, name) is None:
            raise RecipeError(
                f"the recipe {recipe.name!r} has no `{name}:` block; add one, or use `gdetkd train` for plain training"
            )


def _has_task_loss(recipe: Recipe) -> bool:
    """Whether the student's own losses count."""
    return recipe.distill is None or recipe.distill.task_loss == "own"


def prepare(recipe: Recipe, settings: ComputeSettings, device: torch.device) -> Job:
    """Builds everything a run needs on this process's device; nothing is written.

    Raises:
        GDetKDError: anything the recipe names that cannot be used.
    """
    train = build.build_split(recipe.data, "train")
    val = build.build_split(recipe.data, "val")
    student = build.build_detector(recipe.student, train.class_names, recipe.seed)
    if _features_only(student.detector) and _has_task_loss(recipe):
        raise PairError(
            f"{build.title_of(recipe.student)} takes images and no targets, so it has no losses of its own; with a "
            "teacher, `distill.task_loss: none` trains its features"
        )
    train, val = (build.relabel(split, student.detector) for split in (train, val))
    notes = [f"{train.name}: {note}" for note in train.notes] + [f"{val.name}: {note}" for note in val.notes]
    notes += [f"student: {note}" for note in student.notes]
    pair = None
    if recipe.distill is not None and recipe.teacher is not None:
        teacher = build.build_detector(recipe.teacher, train.class_names, recipe.seed, keep_classes=True)
        notes += [f"teacher: {note}" for note in teacher.notes]
        for built in (student, teacher):  # both are measured where they will run
            built.detector.module.to(device)
        pair = build.build_pair(recipe.distill, student.detector, teacher.detector, recipe.seed)
    distiller = pair.distiller if pair else Distiller(student=student.detector)
    build.apply_runtime(settings, recipe, student.detector, pair, device)
    return Job(recipe, settings, student, distiller, pair, train, val, tuple(notes))


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


def accelerator_for(settings: ComputeSettings, recipe: Recipe) -> Accelerator:
    """accelerate's view of the run: device, precision, processes."""
    # Without its own losses, parts of the student get no gradient, and DDP would wait for them.
    partly = DistributedDataParallelKwargs(find_unused_parameters=not _has_task_loss(recipe))
    return Accelerator(
        kwargs_handlers=[partly],
        cpu=settings.device == "cpu",
        mixed_precision="no" if settings.precision == "fp32" else settings.precision,
        log_with="tensorboard",
        project_dir=".",  # a tracker must be given one here; the run's own is set when its folder is known
    )


def _run(recipe: Recipe, *, output: Path | None, resume: Path | None, observer: Observer) -> TrainResult:
    started = perf_counter()
    settings = build.resolve_runtime(recipe.runtime)
    torch.set_num_threads(settings.threads)
    accelerator = accelerator_for(settings, recipe)
    folder = _choose_folder(recipe, output, resume, accelerator)
    job = prepare(recipe, settings, accelerator.device)
    if not accelerator.is_main_process:
        observer = silent
    for note in job.notes:
        observer(Note(note))
    _announce(job, observer)
    if accelerator.is_main_process:
        folder.make()
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
        if _features_only(job.student.detector):
            return None
        return evaluate_split(job.student.detector, job.val, accelerator, recipe.train.batch_size)

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
        metrics = loop.run(resume=resume is not None)
    except KeyboardInterrupt as interrupt:
        if folder.resume.exists():
            command = "distill" if job.pair else "train"
            interrupt.add_note(f"continue with `gdetkd {command} --resume {folder.path}`")
        raise
    seconds = perf_counter() - started
    if metrics is None:  # not the main process, or a student that detects nothing
        metrics = _NO_METRICS
    if accelerator.is_main_process:
        _write_results(folder, job, metrics, seconds)
    accelerator.end_training()
    return TrainResult(run=folder.path, steps=recipe.train.steps, metrics=metrics, seconds=seconds)


def _features_only(detector: Detector) -> bool:
    return isinstance(detector, TrainableDetector) and detector.features_only


def evaluate_split(detector: Detector, split: Split, accelerator: Accelerator, batch_size: int) -> CocoMetrics | None:
    """COCO metrics of a detector; every process predicts its share, the main process gets the result."""
    batches = validation_batches(
        split=split,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    with accelerator.autocast():
        own = predict_split(detector, batches, accelerator.device)
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
    if not job.distiller.task_loss:
        learnt = ", ".join(term.name for term in job.pair.terms if term.weight is not None)
        observer(Note(f"task loss: none; the student learns from {learnt} alone, and its own losses do not count"))
    if _features_only(student):
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


def _write_results(folder: RunFolder, job: Job, metrics: CocoMetrics, seconds: float) -> None:
    detector = job.student.detector
    catalog.save(folder.student, detector, job.student.description)
    if job.student.description.get("kind") != "factory":  # which is rebuilt by its own code
        run_folder.write_text(folder.student_script, Path(architectures.__file__).read_text())
    run_folder.write_text(
        folder.metrics,
        json.dumps({**metrics.to_json(), "steps": job.recipe.train.steps, "seconds": seconds}, indent=2),
    )
    if _features_only(detector):
        return
    draw_predictions(
        split=job.val,
        predictors={"student": detector},
        folder=folder.pictures,
        count=PICTURES,
        device=job.settings.device,
    )
