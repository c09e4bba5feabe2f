"""Measures the time of a distillation step, by phase and against plain training."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from time import perf_counter

from gdetkd_cli import assembly
from gdetkd_cli.commands.plan import prepare_steps, repeat_batches
from gdetkd_cli.distill.distiller import synchronize
from gdetkd_cli.engine.device import get_peak_memory_mb
from gdetkd_cli.engine.events import Observer, silent
from gdetkd_cli.engine.stepper import measure_seconds
from gdetkd_cli.recipe.checks import require_distillation
from gdetkd_cli.recipe.schema import Recipe

_WARMUP = 2


def profile_distill(recipe: Recipe, *, steps: int, observer: Observer = silent) -> Profile:
    """Times ``steps`` distillation steps by phase, and the floor that they are compared with.

    The floor is the teacher's features and a plain student step on the same batch. Both alternate, so that changes in
    the machine's speed affect both. The loader is timed alone first, since its processes work ahead during steps.

    Raises:
        GDetKDError: a real run of the recipe would fail too.
    """
    setup, stepper = prepare_steps(require_distillation(recipe), observer)
    train, settings = setup.recipe.train, setup.compute.settings
    phases: list[dict[str, float]] = []
    whole: list[float] = []
    floors: list[float] = []
    loader = _measure_loader(setup, steps)
    batches = repeat_batches(setup)
    for number in range(_WARMUP + steps):
        start = perf_counter()
        batch = next(batches).to(stepper.device)
        synchronize(stepper.device)
        seconds = {"data": perf_counter() - start}
        if batch.views:  # a stored teacher: most steps of a run read what an earlier one computed
            stepper.ask_teacher(batch)
        detailed: dict[str, float] = {}
        # A separate step times the phases, because synchronizing between them slows a step down.
        stepper.distil(batch, detailed)
        distilled = measure_seconds(lambda: stepper.distil(batch), stepper.device)  # noqa: B023  # called at once
        floor = measure_seconds(lambda: stepper.floor(batch), stepper.device)  # noqa: B023
        if number >= _WARMUP:
            phases.append({**seconds, **detailed})
            whole.append(distilled)
            floors.append(floor)
    names = list(phases[0])
    step = median(whole) + median(phase["data"] for phase in phases)
    if settings.workers:  # loaders had three steps per batch to work ahead; in a run they have one
        step = max(step, train.batch_size / loader)
    return Profile(
        steps=steps,
        seconds={name: median(phase[name] for phase in phases) for name in names},
        step=step,
        images_per_second=train.batch_size / step,
        loader_images_per_second=loader,
        workers=settings.workers,
        peak_memory_mb=get_peak_memory_mb(stepper.device),
        recipe_steps=train.steps,
        recipe_hours=train.steps * train.accumulate * step / 3600,
        floor=median(floors),
        ratio=median(a / b for a, b in zip(whole, floors, strict=True)),
        device=settings.device,
        threads=settings.threads,
    )


def _measure_loader(setup: assembly.TrainingSetup, steps: int) -> float:
    """Measures the images per second of the loader alone, after its start."""
    source = repeat_batches(setup)
    next(source)
    start = perf_counter()
    for _ in range(steps):
        next(source)
    return steps * setup.recipe.train.batch_size / (perf_counter() - start)


@dataclass(frozen=True)
class Profile:
    """The time of a distillation step of one batch.

    Attributes:
        seconds: median seconds per step and phase: data, teacher, student forward, each term, backward, optimizer.
        step: median seconds of a whole distillation step with data.
        images_per_second: speed of distillation.
        loader_images_per_second: speed of the loader alone, with its ``workers`` processes (0: in this process).
        peak_memory_mb: peak memory of the process (CPU) or the device (CUDA).
        recipe_steps, recipe_hours: length of the whole recipe at this speed, with all batches of its steps, without
            evaluations.
        floor: median seconds of the teacher's features and a plain student step, without data.
        ratio: step / floor, both without data.
    """

    steps: int
    seconds: dict[str, float]
    step: float
    images_per_second: float
    loader_images_per_second: float
    workers: int
    peak_memory_mb: float
    recipe_steps: int
    recipe_hours: float
    floor: float
    ratio: float
    device: str
    threads: int
