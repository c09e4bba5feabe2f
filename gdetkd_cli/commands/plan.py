"""Dry run of a distillation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from statistics import median

import torch

from gdetkd_cli import assembly
from gdetkd_cli.commands.rehearse import rehearse
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.device import get_peak_memory_mb
from gdetkd_cli.engine.events import Note, Observer, report_notes, silent
from gdetkd_cli.engine.loop import seed_everything
from gdetkd_cli.engine.stepper import Stepper, measure_seconds
from gdetkd_cli.knowledge.store import MemoryStore, count_bytes
from gdetkd_cli.knowledge.teacher import RememberedTeacher, remember, to_pixels
from gdetkd_cli.recipe.checks import require_distillation
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.report.pyramid import PyramidReport, describe_pyramid
from gdetkd_cli.structures import Batch, ImageView, LossReport, name_view

_WARMUP, _TIMED = 2, 5  # batches; the first ones choose kernels and fill memory
MOST_LABELLED = 40  # maximum number of images per split that the teacher labels


@dataclass(frozen=True)
class CachePlan:
    """What storing the teacher's features costs and saves.

    Attributes:
        mode: ``distill.teacher_cache``, or ``knowledge`` for a teacher that `gdetkd teach` stored.
        views: views of the training images.
        gigabytes: of all views, from those of a few steps.
        saved_per_step: seconds of the teacher in a step, less those of reading; None if the teacher cannot run.
        saved_seconds: over the run, in which the teacher runs once per view; None likewise.
    """

    mode: str
    views: int
    gigabytes: float
    saved_per_step: float | None
    saved_seconds: float | None


@dataclass(frozen=True)
class Plan:
    """The plan of a distillation, from a few steps of it.

    Attributes:
        pair: ``homogeneous`` or ``heterogeneous``, with the families: "two-stage -> dense".
        terms: each term with its weight or the reason for leaving it out.
        head_transfer: the parts copied from the teacher's head, or the reason for copying none; one sentence.
        losses: losses of one step by name.
        device, precision: as resolved. threads: CPU threads.
        peak_memory_mb: peak memory of the process (CPU) or the device (CUDA).
        batch_size: images per step and process, of all batches of a step.
        seconds_per_step: median of the timed batches with their data, times the batches of a step.
        estimated_seconds: seconds_per_step times the recipe's steps, and the teacher's passes if it is stored.
        cache: storing the teacher's features; None if it sees ever new images.
    """

    recipe: str
    pair: str
    student: PyramidReport
    teacher: PyramidReport
    terms: tuple[assembly.TermPlan, ...]
    head_transfer: str
    losses: dict[str, float]
    device: str
    precision: str
    threads: int
    steps: int
    batch_size: int
    train_images: int
    val_images: int
    peak_memory_mb: float
    seconds_per_step: float
    estimated_seconds: float
    cache: CachePlan | None = None
    notes: tuple[str, ...] = ()


def plan_distill(recipe: Recipe, *, observer: Observer = silent) -> Plan:
    """Builds everything, runs a few steps, and rehearses the end of the run. Writes nothing.

    Raises:
        GDetKDError: a real run of the recipe would fail too.
    """
    setup, stepper = prepare_steps(require_distillation(recipe), observer)
    recipe = require_distillation(setup.recipe)
    settings, pair, teacher = setup.compute.settings, setup.pair, setup.distiller.teacher
    assert pair is not None and teacher is not None
    student = setup.student.detector
    if isinstance(teacher, RememberedTeacher) and not teacher.live:
        assembly.check_taught(recipe, teacher, setup.train)
    times: list[float] = []
    reports: list[LossReport] = []
    observer(Note(f"taking {_WARMUP + _TIMED} steps to time them"))
    batches = repeat_batches(setup)
    for _ in range(_WARMUP + _TIMED):
        taken: list[Batch] = []
        seconds = measure_seconds(lambda: taken.append(next(batches).to(stepper.device)), stepper.device)  # noqa: B023
        (on_device,) = taken
        if on_device.views:  # a stored teacher: most steps of a run read what an earlier one computed
            stepper.ask_teacher(on_device)
        seconds += measure_seconds(lambda: reports.append(stepper.distil(on_device)), stepper.device)  # noqa: B023
        times.append(seconds)
    per_step = median(times[_WARMUP:]) * recipe.train.accumulate
    memory = get_peak_memory_mb(stepper.device)
    cache = _plan_cache(setup, stepper, on_device)
    estimated = per_step * recipe.train.steps
    if isinstance(teacher, RememberedTeacher) and cache is not None and cache.saved_per_step is not None:
        estimated += cache.saved_per_step * recipe.train.steps - (cache.saved_seconds or 0.0)
    notes = rehearse(setup.student, setup.train, setup.val, device=settings.device, observer=observer)
    return Plan(
        recipe=recipe.name,
        pair=f"{pair.kind}, {teacher.family} -> {student.family}",
        student=describe_pyramid(student, source=assembly.format_title(recipe.student), split=setup.train),
        teacher=describe_pyramid(teacher, source=assembly.format_title(recipe.teacher), split=setup.train),
        terms=pair.terms,
        head_transfer=pair.head_transfer,
        losses={name: float(value) for name, value in reports[0].parts.items()},
        device=settings.device,
        precision=settings.precision,
        threads=settings.threads,
        steps=recipe.train.steps,
        batch_size=recipe.train.images_per_step,
        train_images=setup.image_counts["train"],
        val_images=setup.image_counts["val"],
        peak_memory_mb=memory,
        seconds_per_step=per_step,
        estimated_seconds=estimated,
        cache=cache,
        notes=(*setup.notes, *notes),
    )


def _plan_cache(setup: assembly.TrainingSetup, stepper: Stepper, batch: Batch) -> CachePlan | None:
    """Measures what a store of the teacher's features takes and saves, on one batch."""
    recipe, images = require_distillation(setup.recipe), setup.image_counts["train"]
    student, teacher = setup.student.detector, setup.distiller.teacher
    assert teacher is not None
    if assembly.describe_countless_views(recipe, student, teacher) or not hasattr(teacher, "recall"):
        return None
    views = images * sum(assembly.list_views(recipe))
    named = tuple(ImageView(name_view(to_pixels(image))) for image in batch.images)
    if isinstance(teacher, RememberedTeacher) and not teacher.live:
        groups = [teacher.store.read(view.name) for view in batch.views]
        size = sum(count_bytes(group) for group in groups if group is not None) / len(groups)
        return CachePlan("knowledge", views, size * views / 1e9, None, None)
    live = teacher.detector if isinstance(teacher, RememberedTeacher) else teacher
    store = MemoryStore(10**12, lambda _: None)
    stored, plain = remember(live, store), replace(batch, views=())

    def ask(detector: Detector, shown: Batch) -> float:
        with torch.no_grad(), setup.compute.accelerator.autocast():
            return measure_seconds(lambda: detector.extract_features(shown), stepper.device)

    ask(stored, replace(batch, views=named))
    saved = max(0.0, ask(live, plain) - ask(stored, replace(batch, views=named)))  # on this batch
    batches = recipe.train.accumulate
    shown = recipe.train.steps * batches * len(batch)
    runs = min(assembly.count_teacher_runs(recipe, images), shown)
    return CachePlan(
        mode=recipe.distill.teacher_cache,
        views=views,
        gigabytes=store.used / len(set(named)) * views / 1e9,
        saved_per_step=saved * batches,
        saved_seconds=saved / len(batch) * (shown - runs),
    )


def prepare_steps(recipe: Recipe, observer: Observer = silent) -> tuple[assembly.TrainingSetup, Stepper]:
    """Builds the recipe's setup and a stepper that runs steps outside a run.

    Raises:
        GDetKDError: a real run of the recipe would fail too.
    """
    compute, scaled = assembly.start_compute(recipe)
    setup = assembly.build_setup(scaled, compute, unscaled=recipe, most_labelled=MOST_LABELLED, observer=observer)
    report_notes(observer, setup.notes)
    seed_everything(recipe.seed)
    stepper = Stepper(
        distiller=setup.distiller,
        student=setup.student.detector,
        optimizer=setup.optimizer,
        accelerator=compute.accelerator,
        clip_norm=setup.recipe.train.clip_norm,
    )
    return setup, stepper


def repeat_batches(setup: assembly.TrainingSetup) -> Iterator[Batch]:
    """Yields the run's batches, and starts again at the end of the run."""
    while True:
        yield from setup.batches(0)
