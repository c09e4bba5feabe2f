"""Looking before running: what a distillation would do, and where its time would go."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from time import perf_counter

import torch
from accelerate import Accelerator

from gdetkd_cli import build
from gdetkd_cli.distill.distiller import Distiller, synchronize
from gdetkd_cli.recipe.scaling import changes, scaled_to_batch
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.results import Plan, Profile
from gdetkd_cli.runs.job import Job, accelerator_for, check_distills, prepare
from gdetkd_cli.runs.probe import report_of
from gdetkd_cli.runs.train import optimizer_for
from gdetkd_cli.structures import Batch, LossReport
from gdetkd_cli.training.device import peak_memory_mb
from gdetkd_cli.training.events import Note, Observer, silent
from gdetkd_cli.training.loop import clip_apart, seed_everything

_PLAN_STEPS = 4  # the first one warms up
_WARMUP = 2
_LABELLED = 40  # pictures that a teacher labels for a look


class Stepper:
    """Training steps outside a run: nothing is logged or saved."""

    def __init__(self, job: Job, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.device = accelerator.device
        self.distiller = job.distiller
        self._clip_norm = job.recipe.train.clip_norm
        # Everything of the student alone: what a plain run of the same recipe would do at each step.
        self._plain = Distiller(student=job.student.detector)
        self._forwards: dict[int, torch.nn.Module] = {}
        optimizer = optimizer_for(job.recipe, job.distiller)
        forward, self._optimizer = self._accelerator.prepare(job.distiller, optimizer)
        self._forwards[id(self.distiller)] = forward
        self._forwards[id(self._plain)] = self._accelerator.prepare(self._plain)
        forward.train()

    def distil(self, batch: Batch, seconds: dict[str, float] | None = None) -> LossReport:
        """One distillation step."""
        return self._step(self.distiller, batch, seconds)

    def floor(self, batch: Batch) -> None:
        """What no distillation can do without: the teacher's features, and one plain step of the student."""
        assert self.distiller.teacher is not None
        with torch.no_grad(), self._accelerator.autocast():
            self.distiller.teacher.look(batch)
        self._step(self._plain, batch, None)

    def _step(self, distiller: Distiller, batch: Batch, seconds: dict[str, float] | None) -> LossReport:
        distiller.profile = seconds is not None
        report: LossReport = self._forwards[id(distiller)](batch)
        parts = {"backward": lambda: self._accelerator.backward(report.total), "optimizer": self._update}
        for name, part in parts.items():
            spent = timed(part, self.device)
            if seconds is not None:
                seconds[name] = spent
        if seconds is not None:
            seconds.update(report.seconds)
        return report

    def _update(self) -> None:
        self._accelerator.unscale_gradients()
        clip_apart(self.distiller, self._clip_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)


def plan_distill(recipe: Recipe, *, observer: Observer = silent) -> Plan:
    """Builds everything, runs a few steps, writes nothing.

    Raises:
        GDetKDError: anything that a real run would refuse too.
    """
    job, accelerator = _prepared(recipe, observer)
    recipe = job.recipe
    assert recipe.teacher is not None and job.pair is not None and job.distiller.teacher is not None
    stepper = Stepper(job, accelerator)
    times: list[float] = []
    report: LossReport | None = None
    first: LossReport | None = None
    batches = _batches(job, _PLAN_STEPS)
    for batch in batches:
        on_device = batch.to(stepper.device)
        start = perf_counter()
        report = stepper.distil(on_device)
        first = first or report
        synchronize(stepper.device)
        times.append(perf_counter() - start)
    assert first is not None
    per_step = median(times[1:] or times)
    size = job.train.records[0].size
    return Plan(
        recipe=recipe.name,
        pair=f"{job.pair.kind}, {job.distiller.teacher.family} -> {job.student.detector.family}",
        student=report_of(job.student.detector, source=build.title_of(recipe.student), format="run", size=size),
        teacher=report_of(job.distiller.teacher, source=build.title_of(recipe.teacher), format="run", size=size),
        terms=job.pair.terms,
        head_transfer=job.pair.head_transfer,
        losses={name: float(value) for name, value in first.parts.items()},
        device=job.settings.device,
        precision=job.settings.precision,
        threads=job.settings.threads,
        steps=recipe.train.steps,
        batch_size=recipe.train.batch_size,
        train_images=job.pictures["train"],
        val_images=job.pictures["val"],
        peak_memory_mb=peak_memory_mb(stepper.device),
        seconds_per_step=per_step,
        estimated_seconds=per_step * recipe.train.steps,
        notes=job.notes,
    )


def profile_distill(recipe: Recipe, *, steps: int, observer: Observer = silent) -> Profile:
    """Times ``steps`` distillation steps by phase, and the floor they are compared with.

    The floor is the teacher's features and a plain student step on the same batch, timed in turn with the
    distillation steps, so that a machine whose speed drifts is the same for both. The loader is timed on its own first:
    beside the steps, its processes work ahead.

    Raises:
        GDetKDError: anything that a real run would refuse too.
    """
    job, accelerator = _prepared(recipe, observer)
    train = job.recipe.train
    stepper = Stepper(job, accelerator)
    phases: list[dict[str, float]] = []
    whole: list[float] = []
    floors: list[float] = []
    loader = _loader_rate(job, steps)
    batches = batches_of(job)
    for number in range(_WARMUP + steps):
        start = perf_counter()
        batch = next(batches).to(stepper.device)
        synchronize(stepper.device)
        seconds = {"data": perf_counter() - start}
        detailed: dict[str, float] = {}
        # Phases are timed in a step of their own: waiting for the device between them would slow the whole one.
        stepper.distil(batch, detailed)
        distilled = timed(lambda: stepper.distil(batch), stepper.device)  # noqa: B023  # called at once
        floor = timed(lambda: stepper.floor(batch), stepper.device)  # noqa: B023
        if number >= _WARMUP:
            phases.append({**seconds, **detailed})
            whole.append(distilled)
            floors.append(floor)
    names = list(phases[0])
    step = median(whole) + median(phase["data"] for phase in phases)
    if job.settings.workers:  # they worked ahead beside three steps for each batch; a run has one for each
        step = max(step, train.batch_size / loader)
    return Profile(
        steps=steps,
        seconds={name: median(phase[name] for phase in phases) for name in names},
        step=step,
        images_per_second=train.batch_size / step,
        loader_images_per_second=loader,
        workers=job.settings.workers,
        peak_memory_mb=peak_memory_mb(stepper.device),
        recipe_steps=train.steps,
        recipe_hours=train.steps * step / 3600,
        floor=median(floors),
        ratio=median(a / b for a, b in zip(whole, floors, strict=True)),
        device=job.settings.device,
        threads=job.settings.threads,
    )


def _prepared(recipe: Recipe, observer: Observer) -> tuple[Job, Accelerator]:
    check_distills(recipe)
    settings = build.resolve_runtime(recipe.runtime)
    torch.set_num_threads(settings.threads)
    accelerator = accelerator_for(settings, recipe)
    given, recipe = recipe, scaled_to_batch(recipe, accelerator.num_processes)
    job = prepare(recipe, settings, accelerator, most_labelled=_LABELLED, observer=observer)
    for note in (*changes(given, recipe), *job.notes):
        observer(Note(note))
    seed_everything(recipe.seed)
    return job, accelerator


def _batches(job: Job, steps: int) -> list[Batch]:
    source = batches_of(job)
    return [next(source) for _ in range(min(steps, job.recipe.train.steps))]


def batches_of(job: Job) -> Iterator[Batch]:
    """The run's batches; begun again where the recipe has fewer steps than are looked at."""
    batches = build.build_batches(job.recipe, job.train, job.settings, rank=0, world_size=1)
    while True:
        yield from batches(0)


def _loader_rate(job: Job, steps: int) -> float:
    """Images per second of the loader alone, its start not counted."""
    source = batches_of(job)
    next(source)
    start = perf_counter()
    for _ in range(steps):
        next(source)
    return steps * job.recipe.train.batch_size / (perf_counter() - start)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Wall seconds of ``work``, until the device is done with it."""
    synchronize(device)
    start = perf_counter()
    work()
    synchronize(device)
    return perf_counter() - start
