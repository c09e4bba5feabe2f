"""A recipe from three things, a teacher, a student and a folder of data; and the check of any recipe."""

from __future__ import annotations

import re
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from gdetkd_cli import assembly, portable
from gdetkd_cli.assembly.find_data import find_data
from gdetkd_cli.commands.probe import ProbeOptions, run_probe
from gdetkd_cli.commands.validate import CheckedRecipe, check_pair
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors.factory import is_reference
from gdetkd_cli.engine.events import Observer, silent
from gdetkd_cli.errors import ModelError, RecipeError
from gdetkd_cli.recipe.checks import require_distillation
from gdetkd_cli.recipe.scaling import count_epochs
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.report.pyramid import PyramidReport

_EPOCHS = 24  # the usual "2x" schedule
_LEAST_STEPS, _MOST_STEPS = 1000, 90_000
_FRESH = (
    "Its body starts from nothing. On photographs torchvision's ImageNet weights are usually better (downloaded once): "
    "backbone_weights: DEFAULT"
)


def run_init(teacher: str, student: str, data: Path, *, output: Path, observer: Observer = silent) -> CheckedRecipe:
    """Probes both detectors, looks at the data, and writes a commented recipe that runs as it is.

    Args:
        teacher: a run folder, a model file, ``builtin:NAME``, a torchvision detector's name, or
            ``package.module:function``.
        student: any of these, or ``BACKBONE+HEAD``, for example ``resnet18+retinanet``.
        data: folder with COCO, VOC or BDD100K annotations and images, or with images alone, which the teacher
            will label.
        output: the file to write.
        observer: is told of progress.

    Raises:
        RecipeError: the file exists already.
        GDetKDError: the data, a detector, or the pair of them cannot be used.
    """
    if output.exists():
        raise RecipeError(f"{output} exists already; name another file with --output")
    block, train = find_data(data, observer)
    cuda = torch.cuda.is_available()
    short, long = _image_size(train, largest=800 if cuda else 320)
    batch_size = 8 if cuda else 4
    recipe: dict[str, Any] = {
        "name": _name(output),
        "data": block,
        "student": _detector(student, (short, long), trains=True),
        "teacher": _detector(teacher, (short, long), trains=False),
        "distill": {},
        "train": {
            "steps": min(max(ceil(_EPOCHS * len(train) / batch_size), _LEAST_STEPS), _MOST_STEPS),
            "batch_size": batch_size,
            "optimizer": {"lr": 2e-4 if cuda else 1e-3, "weight_decay": 0.05},
            "schedule": {"warmup_steps": 200},
        },
    }
    valid = require_distillation(Recipe.model_validate(recipe))
    checked = check_pair(valid, str(output), train, (student, teacher), (short, long), observer)
    _write(output, _text(recipe, checked, count_epochs(valid, len(train))), recipe)
    return checked


def run_probe_to_recipe(
    model: str, options: ProbeOptions, output: Path, *, observer: Observer = silent
) -> PyramidReport:
    """Probes a model, and writes a recipe with it as the teacher; student and data are for its reader to fill in.

    Args:
        model, options: as ``run_probe`` has them.
        output: the file to write.
        observer: is told of progress.

    Raises:
        RecipeError: the file exists already.
        ModelError, NoPyramidError: the model cannot be probed.
    """
    if output.exists():
        raise RecipeError(f"{output} exists already; name another file with --recipe")
    report = run_probe(model, options, observer=observer)
    size = (min(report.size), max(report.size))
    teacher = _detector(model, size, trains=False)
    if "input" in teacher:
        teacher |= {"input": _input_of(options, report.size)}
        teacher |= {"levels": list(options.levels)} if options.levels else {}
    head = "faster-rcnn" if report.family == "two-stage" else "fcos"
    recipe: dict[str, Any] = {
        "name": _name(output),
        "data": {"format": "coco", "root": "data"},
        "student": {"arch": "composed", "backbone": "resnet18", "head": head, "image_size": list(size)},
        "teacher": teacher,
        "distill": {},
        "train": {"steps": 10_000, "batch_size": 8, "optimizer": {"lr": 2e-4, "weight_decay": 0.05}},
    }
    comments = {
        "data": ["A folder with train.json and val.json (COCO), and the images in images/: put yours here."],
        "student": ["Any detector that gdetkd trains: see `gdetkd recipe schema`."],
        "teacher": [*_found(report), f"classes: {', '.join(report.classes) or 'not known'}"],
    }
    _write(output, _lines(output, f"with {model} as the teacher, made by gdetkd probe", recipe, comments), recipe)
    return report


def _name(output: Path) -> str:
    """The file's name, as far as a run's folder may be called so."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", output.stem).strip("-._") or "recipe"


def _input_of(options: ProbeOptions, size: tuple[int, int]) -> dict[str, Any]:
    """The recipe's ``teacher.input``: what was told, defaults left out."""
    told: dict[str, Any] = {"size": list(size)}
    told |= {"range": "0-255"} if options.scale == 255.0 else {}
    told |= {"channels": "bgr"} if options.bgr else {}
    told |= {"layout": "hwc"} if options.last else {}
    told |= {name: list(value) for name in ("mean", "std") if (value := getattr(options, name)) is not None}
    return told


def _image_size(split: Split, *, largest: int) -> tuple[int, int]:
    """Short side, and the most the long side may have: the data's own, in 32s, but no larger than is affordable."""
    sizes = [(min(record.size), max(record.size)) for record in split.records]
    short, ratio = median(size[0] for size in sizes), max(size[1] / size[0] for size in sizes)
    short = max(32, round(min(short, largest) / 32) * 32)
    return short, ceil(short * min(ratio, 2.0) / 32) * 32


def _detector(reference: str, size: tuple[int, int], *, trains: bool) -> dict[str, Any]:
    """A recipe's block."""
    backbone, plus, head = reference.partition("+")
    if plus and head in portable.HEADS:
        return {"arch": "composed", "backbone": backbone, "head": head, "image_size": list(size)}
    if reference in portable.TORCHVISION_DETECTORS:
        block: dict[str, Any] = {"arch": "torchvision", "name": reference}
        if not reference.startswith("ssd"):
            block["arguments"] = {"min_size": size[0], "max_size": size[1]}
        return block if trains else block | {"weights": "DEFAULT"}
    if not Path(reference).exists() and is_reference(reference) and not reference.startswith("builtin:"):
        return {"arch": "factory", "factory": reference, "input": {"size": list(size)}}
    if not reference.startswith("builtin:") and not Path(reference).exists():
        raise ModelError(
            f"{reference!r} is neither a file, a run folder, package.module:function, a torchvision detector, nor "
            f"BACKBONE+HEAD, where HEAD is one of {', '.join(portable.HEADS)}"
        )
    return {"arch": "checkpoint", "path": reference, "input": {"size": list(size)}}


def _text(recipe: dict[str, Any], checked: CheckedRecipe, passes: float) -> str:
    """The recipe with what was found beside it."""
    fresh = recipe["student"]["arch"] in ("composed", "torchvision")
    comments = {
        "student": _found(checked.student) + [_FRESH] * fresh,
        "teacher": _found(checked.teacher),
        "distill": [
            f"A {checked.pair} pair.",
            *map(_said, checked.terms),
            f"head transfer: {checked.head_transfer}",
        ],
        "train": [f"{passes:.0f} epochs."],
    }
    title = f"{checked.teacher.source} -> {checked.student.source}, made by gdetkd init"
    return _lines(Path(checked.recipe), title, recipe, comments)


def _lines(path: Path, title: str, recipe: dict[str, Any], comments: dict[str, list[str]]) -> str:
    lines = [
        f"# gdetkd distill --recipe {path}",
        f"# {title}.",
        f"# First:  gdetkd distill --recipe {path} --dry-run",
        "# Every field there is:  gdetkd recipe schema",
    ]
    for key, value in recipe.items():
        lines += [f"# {comment}" for comment in comments.get(key, [])]
        lines.append(yaml.safe_dump({key: value}, sort_keys=False).rstrip())
    return "\n".join(lines) + "\n"


def _write(path: Path, text: str, recipe: dict[str, Any]) -> None:
    """Writes a recipe whose text says the same as its fields."""
    assert Recipe.model_validate(yaml.safe_load(text)) == Recipe.model_validate(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _found(report: PyramidReport) -> list[str]:
    levels = [f"  {level.name}: {level.channels} channels, stride {level.stride[0]:.4g}" for level in report.levels]
    return [f"{report.family}, {report.parameters / 1e6:.2f} M parameters; levels:", *levels]


def _said(term: assembly.TermPlan) -> str:
    return f"{term.name}: left out, {term.reason}" if term.weight is None else f"{term.name}: weight {term.weight:g}"
