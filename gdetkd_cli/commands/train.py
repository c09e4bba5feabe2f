"""Training runs: plain, distilled and resumed."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, Literal

from accelerate import Accelerator

from gdetkd_cli import assembly
from gdetkd_cli.assembly.trackers import start_trackers
from gdetkd_cli.commands.card import add_card
from gdetkd_cli.commands.report import add_report
from gdetkd_cli.commands.run_files import add_measurement, read_trained, write_facts, write_results, write_student
from gdetkd_cli.commands.target import Target, open_checkpoint, open_folder, read_own_recipe
from gdetkd_cli.data.loader import load_validation_batches
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine import run_folder
from gdetkd_cli.engine.average import WeightAverage
from gdetkd_cli.engine.checkpoints import Checkpoint
from gdetkd_cli.engine.device import get_peak_memory_mb
from gdetkd_cli.engine.events import Note, Observer, report_every, report_notes, silent
from gdetkd_cli.engine.loop import Loop, LoopOptions, LoopResult, seed_everything
from gdetkd_cli.engine.processes import lost_processes_reported
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.engine.signals import StopSignals
from gdetkd_cli.errors import DiskError, RecipeError, StoppedError
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics, evaluate_coco
from gdetkd_cli.evaluation.predict import gather_predictions, list_predicted, predict_split
from gdetkd_cli.evaluation.stored import write_detections
from gdetkd_cli.recipe.checks import has_weights, remove_teacher, require_distillation, require_trained_teacher
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import Recipe

_FACTS = ("steps", "seconds", "seconds_per_step", "peak_memory_mb")  # of a result, beside its metrics
_NO_METRICS = CocoMetrics(None, None, None, None, None, None, None, {}, 0, 0)


@dataclass(frozen=True)
class TrainResult:
    """A finished run.

    Attributes:
        steps: optimizer steps done.
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
    requeue: bool = False,
    measure: bool = True,
    observer: Observer = silent,
) -> TrainResult:
    """Trains one detector of the recipe without distillation.

    Args:
        recipe: names the data and the detector.
        output: the run's folder; default: ``runs/NAME``.
        requeue: continue the run in that folder, if there is one.
        measure: measure the trained student for a report.

    Raises:
        GDetKDError: something that the recipe names cannot be used.
        StoppedError: a signal stopped the run; it can be continued.
    """
    spec = recipe.student if detector == "student" else recipe.teacher
    if spec is None:
        raise RecipeError(f"the recipe {recipe.name!r} has no {detector}; add a `{detector}:` block")
    if detector == "teacher" and has_weights(spec):
        observer(Note("the teacher has weights; training continues from them"))
    return _run(remove_teacher(recipe, student=spec), Target(output, requeue=requeue), observer, measure=measure)


def run_distill(
    recipe: Recipe,
    *,
    output: Path | None = None,
    requeue: bool = False,
    report: bool = True,
    measure: bool = True,
    observer: Observer = silent,
) -> TrainResult:
    """Trains the recipe's student with its teacher; arguments as in ``run_train``.

    Args:
        report: write ``report.html`` at the end.

    Raises:
        As ``run_train``; also if the pair does not fit.
    """
    distillation = require_distillation(recipe)
    require_trained_teacher(distillation)
    return _run(distillation, Target(output, requeue=requeue), observer, report=report, measure=measure)


def resume_run(
    run: Path,
    *,
    steps: int | None = None,
    force: bool = False,
    report: bool = True,
    measure: bool = True,
    observer: Observer = silent,
) -> TrainResult:
    """Continues a stopped run with the recipe in its folder, from its newest checkpoint or, without one, anew.

    Args:
        steps: a new number of steps; the learning rate follows the schedule for that number from here on.
        force: continue even if the recipe or the data changed since the checkpoint.
        report: write ``report.html`` at the end of a distilled run.
        measure: as in ``run_train``.

    Raises:
        RunFolderError: the folder is not a run folder, its checkpoint is damaged or beyond the steps, or the run is
            not the same any more.
        StoppedError: a signal stopped the run; it can be continued.
    """
    recipe = load_recipe(run_folder.open_existing(run).recipe)
    target = Target(run, resume=True, steps=steps, force=force)
    return _run(recipe, target, observer, report=report and recipe.distill is not None, measure=measure)


def _run(
    recipe: Recipe, target: Target, observer: Observer, *, report: bool = False, measure: bool = True
) -> TrainResult:
    started = perf_counter()
    signals = StopSignals()
    with ExitStack() as stack:
        stack.enter_context(signals.installed())
        stack.enter_context(lost_processes_reported())
        compute, scaled = assembly.start_compute(recipe)
        stack.push(partial(_leave_together, compute.accelerator))
        main = compute.accelerator.is_main_process
        folder, resume = open_folder(scaled, target, compute.accelerator, stack)
        if not main:
            observer = silent
        if resume:
            scaled = read_own_recipe(folder, scaled, target)
            compute = assembly.adopt_runtime(compute, scaled)
        setup = assembly.build_setup(
            scaled,
            compute,
            unscaled=recipe,
            labels=folder.labels,
            knowledge=folder.knowledge,
            observer=observer,
        )
        origin = assembly.describe_origin(setup.recipe, setup.train, setup.val)
        checkpoint = open_checkpoint(folder, setup, origin, target, observer) if resume else None
        if checkpoint is not None and (finished := _read_result(folder, setup, checkpoint)):
            observer(Note(_describe_end(folder, setup, finished.steps)))
            lacking = [(measure, folder.measured), (True, folder.card), (report, folder.report)]
            if main and any(wanted and not path.exists() for wanted, path in lacking):  # it was killed near its end
                read_trained(setup, folder, checkpoint)
                _describe_run(setup, folder, observer, report=report, measure=measure)
            return finished
        for split in (setup.train, setup.val):
            if split.bad is not None:
                split.bad.list_in(folder.bad_images)
        _announce(setup, observer)
        # Before anything is written, so that a tracker that does not start leaves no run behind.
        start_trackers(compute.accelerator, setup.recipe, name=folder.path.name, folder=folder.tensorboard)
        if main:
            write_facts(folder, setup, replace=target.steps is not None or target.requeue)
        ended = _train(setup, folder, checkpoint, origin, signals, observer)
        if ended.step < setup.recipe.train.steps:
            observer(Note(_describe_end(folder, setup, ended.step)))
        result = _build_result(setup, folder, ended, perf_counter() - started)
        if main:
            write_results(folder, setup, result.metrics, {name: getattr(result, name) for name in _FACTS})
            _describe_run(setup, folder, observer, report=report, measure=measure)
    return result


def _describe_run(
    setup: assembly.TrainingSetup, folder: RunFolder, observer: Observer, *, report: bool, measure: bool
) -> None:
    """Writes what describes a finished run."""
    if measure:
        add_measurement(folder, setup, observer)
    add_card(folder, setup, observer)
    if report:
        add_report([folder.path], observer)


def _leave_together(accelerator: Accelerator, kind: object, error: BaseException | None, trace: object) -> None:
    """Ends the group of processes when all of them end here; one that fails alone cannot wait for the others."""
    if error is None or isinstance(error, StoppedError):
        accelerator.end_training()


def _read_result(folder: RunFolder, setup: assembly.TrainingSetup, checkpoint: Checkpoint) -> TrainResult | None:
    """The result of a finished run; None if something is left to do."""
    stored, step = folder.read_metrics(), checkpoint.progress.step
    train = setup.recipe.train
    stale = train.stop_after is not None and folder.count_evaluations_since_best() >= train.stop_after
    if stored is None or stored.get("steps") != step or not (step == train.steps or stale):
        return None
    facts = {name: stored[name] for name in _FACTS}
    return TrainResult(run=folder.path, metrics=CocoMetrics.from_json(stored), **facts)


def _describe_end(folder: RunFolder, setup: assembly.TrainingSetup, step: int) -> str:
    """States why a finished run ended, and how to train it further."""
    train = setup.recipe.train
    if step == train.steps:
        return f"{folder.path} is finished; add --steps N to train it further"
    return (
        f"{folder.path} is finished: it ended at step {step} of {train.steps}, after {train.stop_after} evaluations "
        f"without a higher AP (train.stop_after). To train it further, raise train.stop_after in {folder.recipe}, or "
        "set it to null, and resume the run"
    )


def _train(
    setup: assembly.TrainingSetup,
    folder: RunFolder,
    checkpoint: Checkpoint | None,
    origin: dict[str, Any],
    signals: StopSignals,
    observer: Observer,
) -> LoopResult:
    """Trains to the end."""
    accelerator, train = setup.compute.accelerator, setup.recipe.train
    seed_everything(setup.recipe.seed, accelerator.process_index)

    def evaluate() -> CocoMetrics | None:
        if setup.student.detector.features_only:
            return None
        detector = setup.student.detector
        return evaluate_split(detector, setup.val, accelerator, train.batch_size, observer, folder.detections)

    loop = Loop(
        accelerator=accelerator,
        distiller=setup.distiller,
        optimizer=setup.optimizer,
        schedule=setup.schedule,
        batches=setup.batches,
        evaluate=evaluate,
        write_student=lambda path: write_student(path, folder, setup),
        folder=folder,
        options=LoopOptions(
            steps=train.steps,
            clip_norm=train.clip_norm,
            log_every=train.log_every,
            evaluate_every=train.evaluate_every,
            checkpoint_every=train.checkpoint_every,
            keep_checkpoints=train.keep_checkpoints,
            accumulate=train.accumulate,
            stop_after=train.stop_after,
        ),
        origin=origin,
        average=None if train.ema is None else WeightAverage(setup.student.detector.module, train.ema),
        signals=signals,
        observer=observer,
    )
    try:
        return loop.run(checkpoint)
    except (KeyboardInterrupt, DiskError) as error:
        steps = folder.checkpoints().list_steps()
        if steps:
            command = "distill" if setup.pair else "train"
            error.add_note(f"step {steps[-1]} is saved; continue with `gdetkd {command} --resume {folder.path}`")
        raise


def _build_result(setup: assembly.TrainingSetup, folder: RunFolder, ended: LoopResult, seconds: float) -> TrainResult:
    accelerator, train = setup.compute.accelerator, setup.recipe.train
    rates = [line["images_per_second"] for line in folder.read_log() if "images_per_second" in line]
    return TrainResult(
        run=folder.path,
        steps=ended.step,
        metrics=ended.metrics or _NO_METRICS,  # none outside the main process, and for a student without detections
        seconds=seconds,
        seconds_per_step=train.images_per_step * accelerator.num_processes / median(rates),
        peak_memory_mb=get_peak_memory_mb(accelerator.device),
    )


def evaluate_split(
    detector: Detector,
    split: Split,
    accelerator: Accelerator,
    batch_size: int,
    observer: Observer = silent,
    store: Path | None = None,
) -> CocoMetrics | None:
    """Computes COCO metrics of a detector. Every process predicts its share; only the main one returns metrics.

    Predicts in float32 whatever the run's precision, so that ``gdetkd eval`` reports the same AP for the saved file.
    """
    progress = report_every(observer, "evaluated", ceil(len(split) / accelerator.num_processes))
    batches = load_validation_batches(
        split=split,
        batch_size=batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
    )
    detections = gather_predictions(predict_split(detector, batches, accelerator.device, progress))
    if not accelerator.is_main_process:
        return None
    if store is not None:
        write_detections(store, split.class_names, detections)
    return evaluate_coco(list_predicted(split, detections), split.class_names, detections)


def _announce(setup: assembly.TrainingSetup, observer: Observer) -> None:
    report_notes(observer, setup.notes)
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
