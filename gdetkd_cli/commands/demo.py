"""The whole job on the built-in scenes: a student alone, the same student distilled, the teacher, ONNX."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter

from gdetkd_cli import assembly
from gdetkd_cli.commands.evaluate import run_eval
from gdetkd_cli.commands.export import run_export
from gdetkd_cli.commands.train import TrainResult, run_distill, run_train
from gdetkd_cli.detectors import catalog
from gdetkd_cli.engine import run_folder
from gdetkd_cli.engine.device import available_cores
from gdetkd_cli.engine.events import Evaluated, Note, Observer, Phase, silent
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, Recipe
from gdetkd_cli.report.images import draw_grid

RECIPE = "shapes/frcnn-frcnn"
_IMAGES = 4
_SCENES = 200  # that the demo evaluates on; tables have more


@dataclass(frozen=True)
class DemoRow:
    """One detector of the demo's table."""

    metrics: CocoMetrics
    parameters: int
    size_mb: float
    ms_per_image: float


@dataclass(frozen=True)
class DemoResult:
    """The demo's outcome. ``gain`` is distilled AP minus plain AP; ``steps`` of each student training.

    ``verdict`` says in one or two sentences what the table shows: faster at a short budget, or better in the end.
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
    """Trains a student twice with the same seed and steps, without and with its teacher, and compares.

    Args:
        seed: of both students' weights and data order.
        steps: optimizer steps of each; default: the recipe's.
        output: a new folder; default ``runs/demo``.
        observer: is told of progress.

    Raises:
        GDetKDError: the folder exists, or the exported student disagrees with the trained one.
    """
    started = perf_counter()
    overrides = [f"seed={seed}", f"data.val_images={_SCENES}"] + ([f"train.steps={steps}"] if steps is not None else [])
    recipe = load_recipe(RECIPE, overrides)
    folder = run_folder.choose(output, "demo").path
    plain, distilled = _train_both(recipe, folder, observer)

    observer(Phase("evaluation"))
    assert isinstance(recipe.teacher, CheckpointDetector)
    rows = {
        name: _row(target, recipe, observer)
        for name, target in (
            ("teacher", recipe.teacher.path),
            ("student", str(plain.run)),
            ("distilled", str(distilled.run)),
        )
    }
    observer(Phase("export"))
    exported = run_export(str(distilled.run), onnx=True, torchscript=False, output=None, observer=observer)
    image = _draw(recipe, plain.run, distilled.run, folder / "comparison.png")
    observer(Note(f"images: {image}"))
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
        verdict=_verdict(gain, recipe),
    )


def _train_both(recipe: Recipe, folder: Path, observer: Observer) -> tuple[TrainResult, TrainResult]:
    """The student alone and distilled; side by side on a CPU, where small networks cannot use many cores at once."""
    settings = assembly.resolve_runtime(recipe.runtime, local_processes=2)
    # Decided once, so that both students are trained alike.
    runtime = recipe.runtime.model_copy(update={"threads": settings.threads})
    recipe = recipe.model_copy(update={"runtime": runtime})
    if settings.device != "cpu" or settings.threads == available_cores():
        observer(Phase("student alone"))
        plain = run_train(recipe, output=folder / "alone", observer=observer)
        observer(Phase("student distilled"))
        return plain, run_distill(recipe, output=folder / "distilled", observer=observer)
    # Not forked: torch's threads do not survive that.
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as beside:
        alone = beside.submit(run_train, recipe, output=folder / "alone")
        observer(Phase("student distilled"))
        observer(Note("the student alone is trained at the same time, in a process of its own"))
        try:
            distilled = run_distill(recipe, output=folder / "distilled", observer=observer)
        except BaseException:
            for process in multiprocessing.active_children():  # else leaving would wait for its last step
                process.terminate()
            raise
        observer(Phase("student alone"))
        plain = alone.result()
        observer(Evaluated(step=plain.steps, metrics=plain.metrics))
    return plain, distilled


def _row(target: str, recipe: Recipe, observer: Observer) -> DemoRow:
    found = run_eval(target, data=recipe.data, observer=observer)
    assert found.parameters is not None
    return DemoRow(
        metrics=found.metrics, parameters=found.parameters, size_mb=found.size_mb, ms_per_image=found.ms_per_image
    )


def _draw(recipe: Recipe, plain: Path, distilled: Path, path: Path) -> Path:
    assert isinstance(recipe.teacher, CheckpointDetector)
    sources = {"teacher": recipe.teacher.path, "student alone": str(plain), "student distilled": str(distilled)}
    predictors = {title: catalog.load(catalog.locate(source)).detector for title, source in sources.items()}
    split = assembly.build_split(recipe.data, "val")
    draw_grid(split=split, predictors=predictors, path=path, indices=list(range(_IMAGES)), device="cpu")
    return path


def _verdict(gain: float, recipe: Recipe) -> str:
    """What the table shows: speed at a short budget. The end of training is a benchmark's matter, not a demo's."""
    steps, images = recipe.train.steps, recipe.train.steps * recipe.train.batch_size
    budget = f"{steps} steps, {images} images"
    if gain <= 0:
        return f"At this budget ({budget}) the distilled student is not ahead on this seed: {gain:+.1f} AP."
    return (
        f"This table shows speed: at a short budget ({budget}) the distilled student is ahead by {gain:.1f} AP, while "
        "the student alone is still far from its own limit. What remains of the gain when both train to their end is "
        "in docs/benchmarks.md, as far as it was measured."
    )
