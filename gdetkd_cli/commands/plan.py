"""Dry run of a distillation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

from gdetkd_cli import assembly
from gdetkd_cli.commands.rehearse import rehearse
from gdetkd_cli.engine.device import get_peak_memory_mb
from gdetkd_cli.engine.events import Note, Observer, silent
from gdetkd_cli.engine.loop import seed_everything
from gdetkd_cli.engine.stepper import Stepper, measure_seconds
from gdetkd_cli.recipe.checks import require_distillation
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.report.pyramid import PyramidReport, describe_pyramid
from gdetkd_cli.structures import Batch, LossReport

_WARMUP, _TIMED = 2, 5  # batches; the first ones choose kernels and fill memory
MOST_LABELLED = 40  # maximum number of images per split that the teacher labels


@dataclass(frozen=True)
class Plan:
    """The plan of a distillation, from a few steps of it.

    Attributes:
        pair: ``homogeneous`` or ``heterogeneous``, with the families: "two-stage -> dense".
        student, teacher: the pyramids.
        terms: each term with its weight or the reason for leaving it out.
        head_transfer: the parts copied from the teacher's head, or the reason for copying none; one sentence.
        losses: losses of one step by name.
        device, precision: as resolved. threads: CPU threads.
        peak_memory_mb: peak memory of the process (CPU) or the device (CUDA).
        batch_size: images per step and process, of all batches of a step.
        seconds_per_step: median of the timed batches with their data, times the batches of a step.
        estimated_seconds: seconds_per_step times the recipe's steps.
        notes: notes from building.
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
    times: list[float] = []
    reports: list[LossReport] = []
    observer(Note(f"taking {_WARMUP + _TIMED} steps to time them"))
    batches = repeat_batches(setup)
    for _ in range(_WARMUP + _TIMED):
        times.append(
            measure_seconds(
                lambda: reports.append(stepper.distil(next(batches).to(stepper.device))),
                stepper.device,
            )
        )
    per_step = median(times[_WARMUP:]) * recipe.train.accumulate
    memory = get_peak_memory_mb(stepper.device)
    notes = rehearse(setup.student, setup.train, setup.val, device=settings.device, observer=observer)
    size = setup.train.records[0].size
    return Plan(
        recipe=recipe.name,
        pair=f"{pair.kind}, {teacher.family} -> {student.family}",
        student=describe_pyramid(student, source=assembly.format_title(recipe.student), size=size),
        teacher=describe_pyramid(teacher, source=assembly.format_title(recipe.teacher), size=size),
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
        estimated_seconds=per_step * recipe.train.steps,
        notes=(*setup.notes, *notes),
    )


def prepare_steps(recipe: Recipe, observer: Observer = silent) -> tuple[assembly.TrainingSetup, Stepper]:
    """Builds the recipe's setup and a stepper that runs steps outside a run.

    Raises:
        GDetKDError: a real run of the recipe would fail too.
    """
    compute, scaled = assembly.start_compute(recipe)
    setup = assembly.build_setup(scaled, compute, unscaled=recipe, most_labelled=MOST_LABELLED, observer=observer)
    for note in setup.notes:
        observer(Note(note))
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
