"""Writes recipes: from a teacher, a student and a data folder, or from a probed teacher."""

from __future__ import annotations

import re
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

import torch

from gdetkd_cli import assembly, portable, yaml_text
from gdetkd_cli.assembly.find_data import find_data
from gdetkd_cli.commands.probe import ProbeOptions, run_probe
from gdetkd_cli.commands.validate import CheckedRecipe, check_pair
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors.factory import is_reference
from gdetkd_cli.engine.events import Note, Observer, silent
from gdetkd_cli.errors import ModelError, RecipeError
from gdetkd_cli.files import name_kind, write_text
from gdetkd_cli.recipe.checks import require_distillation
from gdetkd_cli.recipe.scaling import count_epochs
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.report.pyramid import PyramidReport
from gdetkd_cli.text import show_hidden

_EPOCHS = 24  # the usual "2x" schedule
_LEAST_STEPS, _MOST_STEPS = 1000, 90_000
_FRESH = (
    "Its body has fresh weights. For photographs, ImageNet weights are usually better (downloaded once): "
    "backbone_weights: DEFAULT"
)


def run_init(
    teacher: str,
    student: str,
    data: Path,
    *,
    output: Path,
    classes: Sequence[str] = (),
    observer: Observer = silent,
) -> CheckedRecipe:
    """Probes both detectors, reads the data, and writes a commented recipe that you can run as written.

    Args:
        teacher: a run folder, a model file, ``builtin:NAME``, a torchvision detector's name, or
            ``package.module:function``.
        student: any of these, or ``BACKBONE+HEAD``, for example ``resnet18+retinanet``.
        data: folder of images with COCO, YOLO, VOC or BDD100K annotations, or of images alone for the teacher to label.
        classes: names of the teacher's classes, for a file that does not name them.

    Raises:
        RecipeError: the file already exists, or classes are named for a teacher that is no file.
        GDetKDError: the data, a detector, or the pair cannot be used.
    """
    if output.exists():
        raise RecipeError(f"{output} already exists; choose another file with --output")
    block, train = find_data(data, observer)
    cuda = torch.cuda.is_available()
    short, long = _choose_image_size(train, largest=800 if cuda else 320)
    batch_size = 8 if cuda else 4
    recipe: dict[str, Any] = {
        "name": _choose_name(output),
        "data": block.model_dump(mode="json", exclude_unset=True),
        "student": _describe_detector(student, (short, long), is_student=True),
        "teacher": _describe_teacher(teacher, (short, long), classes),
        "distill": {},
        "train": {
            "steps": min(max(ceil(_EPOCHS * len(train) / batch_size), _LEAST_STEPS), _MOST_STEPS),
            "batch_size": batch_size,
            "optimizer": {"lr": 2e-4 if cuda else 1e-3, "weight_decay": 0.05},
            "schedule": {"warmup_steps": 200},
        },
    }
    valid = require_distillation(Recipe.model_validate(recipe))
    pair = assembly.build_recipe_pair(valid, train.class_names)
    if recipe["student"].get("head") == "retinanet" and not pair.built.transferred:
        recipe["student"]["arguments"] = {"head_norm": True}  # a fresh head hardly learns without it
        valid = require_distillation(Recipe.model_validate(recipe))
        pair = assembly.build_recipe_pair(valid, train.class_names, pair.teacher)
    if recipe["student"]["arch"] == "composed":
        observer(Note(f"the student: {_FRESH[0].lower()}{_FRESH[1:]}"))
    known = pair.teacher.detector.class_names
    if known and (unknown := [name for name in train.class_names if name not in known]):
        observer(
            Note(
                f"the teacher does not know {len(unknown)} of the data's {len(train.class_names)} classes "
                f"({', '.join(unknown[:3])}{', …' * (len(unknown) > 3)}): it teaches by its features, and cannot be "
                "evaluated on these data"
            )
        )
    checked = check_pair(valid, str(output), pair, (student, teacher), train, observer)
    _write(output, _format_checked(recipe, checked, count_epochs(valid, len(train))), recipe)
    return checked


def run_probe_to_recipe(
    model: str, options: ProbeOptions, output: Path, *, observer: Observer = silent
) -> PyramidReport:
    """Probes a model and writes a recipe with it as the teacher, in which the user edits the student and the data.

    Args:
        model, options: as in ``run_probe``.

    Raises:
        RecipeError: the file already exists.
        ModelError, NoPyramidError: the model cannot be probed.
    """
    if output.exists():
        raise RecipeError(f"{output} already exists; choose another file with --recipe")
    report = run_probe(model, options, observer=observer)
    size = (min(report.size), max(report.size))
    teacher = _describe_teacher(model, size, options.classes)
    if "input" in teacher:
        teacher |= {"input": _describe_input(options, report.size)}
        teacher |= {"levels": list(options.levels)} if options.levels else {}
    head = "faster-rcnn" if report.family == "two-stage" else "fcos"
    recipe: dict[str, Any] = {
        "name": _choose_name(output),
        "data": {"format": "coco", "root": "data"},
        "student": {"arch": "composed", "backbone": "resnet18", "head": head, "image_size": list(size)},
        "teacher": teacher,
        "distill": {},
        "train": {"steps": 10_000, "batch_size": 8, "optimizer": {"lr": 2e-4, "weight_decay": 0.05}},
    }
    comments = {
        "data": ["Your data: a folder with train.json and val.json (COCO), and the images in images/."],
        "student": ["Any detector that gdetkd trains; see `gdetkd recipe schema`."],
        "teacher": [*_describe_report(report), f"classes: {', '.join(report.classes) or 'unknown'}"],
    }
    title = f"with {model} as the teacher, written by gdetkd probe"
    _write(output, _format_recipe(output, title, recipe, comments), recipe)
    return report


def _choose_name(output: Path) -> str:
    """Returns the file's name without characters that a recipe's name must not have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", output.stem).strip("-._") or "recipe"


def _describe_input(options: ProbeOptions, size: tuple[int, int]) -> dict[str, Any]:
    """Returns the recipe's ``teacher.input`` without defaults."""
    block: dict[str, Any] = {"size": list(size)}
    block |= {"range": "0-255"} if options.scale == 255.0 else {}
    block |= {"channels": "bgr"} if options.bgr else {}
    block |= {"layout": "hwc"} if options.last else {}
    block |= {name: list(value) for name in ("mean", "std") if (value := getattr(options, name)) is not None}
    return block


def _choose_image_size(split: Split, *, largest: int) -> tuple[int, int]:
    """Returns short side and maximum long side in pixels: the data's median, in multiples of 32, up to ``largest``."""
    sizes = [(min(record.size), max(record.size)) for record in split.records]
    short, ratio = median(size[0] for size in sizes), max(size[1] / size[0] for size in sizes)
    short = max(32, round(min(short, largest) / 32) * 32)
    return short, ceil(short * min(ratio, 2.0) / 32) * 32


def _describe_detector(reference: str, size: tuple[int, int], *, is_student: bool) -> dict[str, Any]:
    """Returns a recipe's block for a detector."""
    backbone, plus, head = reference.partition("+")
    if plus and head in portable.HEADS:
        return {"arch": "composed", "backbone": backbone, "head": head, "image_size": list(size)}
    if reference in portable.TORCHVISION_DETECTORS:
        block: dict[str, Any] = {"arch": "torchvision", "name": reference}
        if not reference.startswith("ssd"):
            block["arguments"] = {"min_size": size[0], "max_size": size[1]}
        return block if is_student else block | {"weights": "DEFAULT"}
    if not Path(reference).exists() and is_reference(reference) and not reference.startswith("builtin:"):
        return {"arch": "factory", "factory": reference, "input": {"size": list(size)}}
    if not reference.startswith("builtin:") and not Path(reference).exists():
        heads = [f"{backbone}+{known}" for known in portable.HEADS]
        near = portable.suggest(reference, heads if plus else portable.TORCHVISION_DETECTORS)
        raise ModelError(
            f"unknown detector {reference!r}{name_kind(reference)}; expected a file, a run folder, "
            "package.module:function, a torchvision detector, or BACKBONE+HEAD, where HEAD is one of "
            f"{', '.join(portable.HEADS)}{near}"
        )
    return {"arch": "checkpoint", "path": reference, "input": {"size": list(size)}}


def _describe_teacher(reference: str, size: tuple[int, int], classes: Sequence[str]) -> dict[str, Any]:
    """Returns the teacher's block with the names of its classes, if they were given."""
    block = _describe_detector(reference, size, is_student=False)
    if not classes:
        return block
    if block["arch"] != "checkpoint":
        raise RecipeError(f"--classes names the classes of a teacher's file; {reference} is no file, so remove it")
    return block | {"classes": list(classes)}


def _format_checked(recipe: dict[str, Any], checked: CheckedRecipe, passes: float) -> str:
    """Formats the recipe with the results of probing as comments."""
    fresh = recipe["student"]["arch"] == "composed"
    comments = {
        "student": _describe_report(checked.student) + [_FRESH] * fresh,
        "teacher": _describe_report(checked.teacher),
        "distill": [
            f"A {checked.pair} pair.",
            *map(_describe_term, checked.terms),
            f"head transfer: {checked.head_transfer}",
        ],
        "train": [f"{passes:.0f} epochs."],
    }
    title = f"{checked.teacher.source} -> {checked.student.source}, written by gdetkd init"
    return _format_recipe(Path(checked.recipe), title, recipe, comments)


def _format_recipe(path: Path, title: str, recipe: dict[str, Any], comments: dict[str, list[str]]) -> str:
    head = [
        f"gdetkd distill --recipe {path}",
        f"{title}.",
        f"First:  gdetkd distill --recipe {path} --dry-run",
        "All fields:  gdetkd recipe schema",
    ]
    lines = _format_comments(head)
    for key, value in recipe.items():
        lines += _format_comments(comments.get(key, []))
        lines.append(yaml_text.dump({key: value}).rstrip())
    return "\n".join(lines) + "\n"


def _format_comments(comments: Sequence[str]) -> list[str]:
    """Makes a line of each comment; a line break in the name of a class must not end it."""
    return [f"# {show_hidden(comment)}" for comment in comments]


def _write(path: Path, text: str, recipe: dict[str, Any]) -> None:
    """Writes a recipe's text, after checking that it matches the fields."""
    assert Recipe.model_validate(yaml_text.parse(text)[0]) == Recipe.model_validate(recipe)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _describe_report(report: PyramidReport) -> list[str]:
    levels = [f"  {level.name}: {level.channels} channels, stride {level.stride[0]:.4g}" for level in report.levels]
    return [f"{report.family}, {report.parameters / 1e6:.2f} M parameters; levels:", *levels]


def _describe_term(term: assembly.TermPlan) -> str:
    return f"{term.name}: left out, {term.reason}" if term.weight is None else f"{term.name}: weight {term.weight:g}"
