"""Trains a student alone and distilled on built-in scenes, compares both with the teacher, and exports to ONNX."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from gdetkd_cli import assembly
from gdetkd_cli.commands.evaluate import run_eval
from gdetkd_cli.commands.export import run_export
from gdetkd_cli.commands.report import add_report
from gdetkd_cli.commands.train import TrainResult, run_distill, run_train
from gdetkd_cli.detectors import catalog
from gdetkd_cli.engine import run_folder
from gdetkd_cli.engine.device import count_cores
from gdetkd_cli.engine.events import Evaluated, Note, Observer, Phase, silent
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, Recipe
from gdetkd_cli.report.images import draw_grid

RECIPE = "shapes/frcnn-frcnn"
_IMAGES = 4
_SCENES = 200  # validation images; the benchmarks use more


@dataclass(frozen=True)
class DemoRow:
    """One detector of the demo's table."""

    metrics: CocoMetrics
    parameters: int
    size_mb: float
    ms_per_image: float


@dataclass(frozen=True)
class DemoResult:
    """The demo's result.

    Attributes:
        gain: distilled AP minus plain AP.
        steps: steps of each student's training.
        verdict: one or two sentences that interpret the table.
    """

    teacher: DemoRow
    student: DemoRow
    distilled: DemoRow
    gain: float
    onnx_parity: bool
    seconds: float
    steps: int
    seed: int
    output: Path
    image: Path
    verdict: str
    notes: tuple[str, ...] = field(default=())


def run_demo(
    *, seed: int = 0, steps: int | None = None, output: Path | None = None, observer: Observer = silent
) -> DemoResult:
    """Trains a student with and without its teacher, with the same seed and steps, and compares both.

    Arguments and errors: see ``gdetkd_cli.api.demo``.
    """
    with run_folder.start_new(output, "demo") as folder:
        return _run_demo(seed, steps, folder.path, observer)


def _run_demo(seed: int, steps: int | None, folder: Path, observer: Observer) -> DemoResult:
    started = perf_counter()
    overrides = [f"seed={seed}", f"data.val_images={_SCENES}"] + ([f"train.steps={steps}"] if steps is not None else [])
    recipe = load_recipe(RECIPE, overrides)
    plain, distilled = _train_both(recipe, folder, observer)

    observer(Phase("evaluation"))
    assert isinstance(recipe.teacher, CheckpointDetector)
    rows = {
        name: _evaluate(target, recipe, observer, store)
        for name, target, store in (
            ("teacher", recipe.teacher.path, folder / "teacher.npz"),
            ("student", str(plain.run), None),
            ("distilled", str(distilled.run), None),
        )
    }
    observer(Phase("export"))
    exported = run_export(str(distilled.run), onnx=True, torchscript=False, output=None, observer=observer)
    image = _draw(recipe, plain.run, distilled.run, folder / "comparison.png")
    observer(Note(f"images: {image}"))
    add_report([folder], observer)
    gain = (rows["distilled"].metrics.ap or 0.0) - (rows["student"].metrics.ap or 0.0)
    return DemoResult(
        teacher=rows["teacher"],
        student=rows["student"],
        distilled=rows["distilled"],
        gain=gain,
        onnx_parity=all(file.parity.passed for file in exported.files),
        seconds=perf_counter() - started,
        steps=recipe.train.steps,
        seed=seed,
        output=folder,
        image=image,
        verdict=_write_verdict(gain, recipe),
    )


def _train_both(recipe: Recipe, folder: Path, observer: Observer) -> tuple[TrainResult, TrainResult]:
    """Trains both students; at the same time on a CPU, because a small network cannot use all cores."""
    settings = assembly.resolve_runtime(recipe.runtime, local_processes=2)
    # Both students must compute with the same number of threads.
    runtime = recipe.runtime.model_copy(update={"threads": settings.threads})
    recipe = recipe.model_copy(update={"runtime": runtime})
    if settings.device != "cpu" or settings.threads == count_cores():
        observer(Phase("student alone"))
        plain = run_train(recipe, output=folder / "alone", observer=observer)
        observer(Phase("student distilled"))
        return plain, run_distill(recipe, output=folder / "distilled", report=False, observer=observer)
    # Not fork: torch's threads do not survive it.
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as beside:
        alone = beside.submit(run_train, recipe, output=folder / "alone")
        observer(Phase("student distilled"))
        observer(Note("the student alone trains at the same time, in a separate process"))
        try:
            distilled = run_distill(recipe, output=folder / "distilled", report=False, observer=observer)
        except BaseException:
            for process in multiprocessing.active_children():  # else the executor waits for the whole training
                process.terminate()
            raise
        observer(Phase("student alone"))
        plain = alone.result()
        observer(Evaluated(step=plain.steps, metrics=plain.metrics))
    return plain, distilled


def _evaluate(target: str, recipe: Recipe, observer: Observer, store: Path | None) -> DemoRow:
    result = run_eval(target, data=recipe.data, store=store, observer=observer)
    assert result.parameters is not None
    return DemoRow(
        metrics=result.metrics, parameters=result.parameters, size_mb=result.size_mb, ms_per_image=result.ms_per_image
    )


def _draw(recipe: Recipe, plain: Path, distilled: Path, path: Path) -> Path:
    assert isinstance(recipe.teacher, CheckpointDetector)
    sources = {"teacher": recipe.teacher.path, "student alone": str(plain), "student distilled": str(distilled)}
    predictors = {title: catalog.load(catalog.locate(source)).detector for title, source in sources.items()}
    split = assembly.build_split(recipe.data, "val")
    draw_grid(split=split, predictors=predictors, path=path, indices=list(range(_IMAGES)), device="cpu")
    return path


def _write_verdict(gain: float, recipe: Recipe) -> str:
    steps, images = recipe.train.steps, recipe.train.steps * recipe.train.images_per_step
    budget = f"{steps} steps, {images} images"
    if gain <= 0:
        return f"With this budget ({budget}) and seed, the distilled student is not ahead: {gain:+.1f} AP."
    return (
        f"With a short budget ({budget}) the distilled student is ahead by {gain:.1f} AP. The student alone is still "
        "far from its limit, so the table shows faster training. For the gain after longer training, see "
        "docs/benchmarks.md."
    )
