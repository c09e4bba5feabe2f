"""The Python interface: the commands as functions.

Example:
    >>> from gdetkd_cli import api
    >>> report = api.probe("builtin:shapes-teacher")
    >>> [(level.name, level.channels) for level in report.levels][:2]
    [('backbone.0', 48), ('backbone.1', 48)]

Every function raises a ``GDetKDError`` whose message names the mistake. Nothing is printed; pass an ``observer`` to
receive progress.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdetkd_cli.commands import run_demo, run_distill, run_eval, run_export, run_predict, run_probe
from gdetkd_cli.commands.demo import DemoResult
from gdetkd_cli.commands.evaluate import EvalResult
from gdetkd_cli.commands.export import ExportResult
from gdetkd_cli.commands.predict import PredictOptions, PredictResult
from gdetkd_cli.commands.probe import ProbeOptions
from gdetkd_cli.commands.train import TrainResult
from gdetkd_cli.engine.events import Observer, silent
from gdetkd_cli.recipe.load import load_recipe, validate_recipe
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.report.pyramid import PyramidReport

__all__ = ["demo", "distill", "evaluate", "export", "predict", "probe"]


def probe(model: str | Path, options: ProbeOptions | None = None, *, observer: Observer = silent) -> PyramidReport:
    """Measures the feature pyramid of a detector.

    Args:
        model: a torchvision detector's name, a run folder, ``builtin:NAME``, ``package.module:function``, or a file:
            weights, TorchScript, exported program or ONNX.
        options: image size, normalisation and other settings; the defaults fit most models.

    Raises:
        ModelError: the model is none of these, or cannot be run.
        NoPyramidError: it has no feature pyramid.
    """
    return run_probe(str(model), options, observer=observer)


def demo(
    *, steps: int | None = None, seed: int = 0, output: str | Path | None = None, observer: Observer = silent
) -> DemoResult:
    """Trains a student alone and distilled on built-in scenes, and compares both.

    Args:
        steps: optimizer steps of each student; default: 500.
        seed: seed of both students' weights and data order.
        output: a new folder; default: ``runs/demo``.

    Raises:
        GDetKDError: the folder exists, or the exported student differs from the trained one.
    """
    return run_demo(seed=seed, steps=steps, output=None if output is None else Path(output), observer=observer)


def distill(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    observer: Observer = silent,
) -> TrainResult:
    """Trains a recipe's student with its teacher.

    Args:
        recipe: a YAML file, the name of a built-in recipe, its fields, or a validated recipe.
        overrides: ``train.steps=500`` each; for a file or a built-in recipe.
        output: the run's folder; default: ``runs/NAME``.

    Raises:
        GDetKDError: the recipe names something that cannot be used, or the two detectors do not fit.
    """
    if isinstance(recipe, (str, Path)):
        recipe = load_recipe(recipe, overrides)
    elif isinstance(recipe, Mapping):
        recipe = validate_recipe(recipe)
    return run_distill(recipe, output=None if output is None else Path(output), observer=observer)


def evaluate(
    target: str | Path,
    *,
    data: str | Path | None = None,
    classes: Sequence[str] = (),
    observer: Observer = silent,
) -> EvalResult:
    """COCO metrics of a detector on the validation split.

    Args:
        target: a run folder, a model file whose detections can be read, ``builtin:NAME``, or a recipe (its teacher).
        data: a folder of data; default: the data of the recipe beside the detector.
        classes: names of the detector's classes, for a file that does not name them.

    Raises:
        GDetKDError: the target is no detector, its detections cannot be read, or the data have other classes.
    """
    block = None if data is None else Path(data)
    return run_eval(str(target), data=block, classes=classes, observer=observer)


def predict(
    target: str | Path,
    images: str | Path | Sequence[str | Path],
    options: PredictOptions | None = None,
    *,
    observer: Observer = silent,
) -> PredictResult:
    """Detects objects in images and videos.

    Args:
        target: a run folder, a model file whose detections can be read, ``builtin:NAME``, or a recipe (its teacher).
        images: image files, videos, folders or patterns.
        options: the lowest score, the classes to keep, and files to write.

    Raises:
        GDetKDError: the target is no detector, no image can be read, or a file to write exists.
    """
    places = [images] if isinstance(images, (str, Path)) else images
    return run_predict(str(target), [str(place) for place in places], options, observer=observer)


def export(
    target: str | Path,
    *,
    onnx: bool = True,
    torchscript: bool = False,
    safetensors: bool = False,
    batch: int | None = None,
    output: str | Path | None = None,
    observer: Observer = silent,
) -> ExportResult:
    """Writes a detector as ONNX, TorchScript or safetensors, and compares each file with the detector.

    Args:
        target: a run folder, a ``student.pt``, or ``builtin:NAME``.
        onnx, torchscript, safetensors: the formats to write; safetensors holds the weights alone.
        batch: images that the ONNX file takes together, 0 for any number; None: one image without that dimension.
        output: the file, or an existing folder; default: beside the detector.

    Raises:
        GDetKDError: the file exists, the detector cannot be exported, or the file disagrees with it.
    """
    path = None if output is None else Path(output)
    formats = {"onnx": onnx, "torchscript": torchscript, "safetensors": safetensors}
    return run_export(str(target), **formats, batch=batch, output=path, observer=observer)
