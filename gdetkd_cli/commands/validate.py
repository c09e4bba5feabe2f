"""Checks a recipe by building its data, detectors and pair as ``distill`` does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gdetkd_cli import assembly
from gdetkd_cli.assembly.warnings import warn_about_data, warn_about_normalization, warn_about_sizes
from gdetkd_cli.commands.rehearse import rehearse
from gdetkd_cli.data.readers.coco import align_classes
from gdetkd_cli.data.split import Split
from gdetkd_cli.engine.events import Observer, report_notes, silent
from gdetkd_cli.recipe.checks import describe_untrained_teacher, require_distillation
from gdetkd_cli.recipe.schema import DistillationRecipe, Recipe
from gdetkd_cli.report.pyramid import PyramidReport, describe_pyramid


@dataclass(frozen=True)
class CheckedRecipe:
    """A recipe whose detectors were built and probed as a pair.

    Attributes:
        recipe: the file, or the built-in recipe's name.
        pair: ``homogeneous`` or ``heterogeneous``.
        student, teacher: the pyramids, at the recipe's image size.
        terms: each term with its weight or the reason for leaving it out.
        head_transfer: the parts copied from the teacher's head, or the reason for copying none; one sentence.
        changes: the ``--set`` values applied to it.
    """

    recipe: str
    pair: str
    student: PyramidReport
    teacher: PyramidReport
    terms: tuple[assembly.TermPlan, ...]
    head_transfer: str
    changes: tuple[str, ...] = ()


def check_recipe(
    recipe: Recipe, source: str, *, changes: Sequence[str] = (), observer: Observer = silent
) -> CheckedRecipe:
    """Builds a distillation recipe's data, detectors and pair, and reports them.

    Args:
        recipe: a recipe with a teacher and a ``distill`` block.
        changes: the ``--set`` values applied to it.

    Raises:
        GDetKDError: something that the recipe names cannot be used.
    """
    recipe = require_distillation(recipe)
    splits = [assembly.read_split(recipe.data, which) for which in assembly.SPLITS]
    assembly.report_bad_images(splits, observer)
    report_notes(observer, (f"{split.name}: {note}" for split in splits for note in split.notes))
    train = splits[0]
    titles = (assembly.format_title(recipe.student), assembly.format_title(recipe.teacher))
    pair = assembly.build_recipe_pair(recipe, train.class_names)
    checked = check_pair(recipe, source, pair, titles, train, observer)
    train, val = (align_classes(split, pair.student.detector.class_names) for split in splits)
    if not assembly.needs_labels(recipe.data, "train"):
        report_notes(observer, warn_about_data(train, val))
    rehearse(pair.student, train, val, observer=observer)
    return replace(checked, changes=tuple(changes))


def check_pair(
    recipe: DistillationRecipe,
    source: str,
    pair: assembly.Pair,
    titles: tuple[str, str],
    train: Split,
    observer: Observer,
) -> CheckedRecipe:
    """Probes the pair, and reports the pyramids for a training image."""
    student, teacher = pair.student, pair.teacher
    if assembly.needs_labels(recipe.data, "train"):
        teacher.detector.check_detects()
    untrained = describe_untrained_teacher(recipe)
    warnings = warn_about_normalization(student.detector) + warn_about_sizes(student.detector, teacher.detector)
    report_notes(observer, (*((untrained,) if untrained else ()), *student.notes, *teacher.notes, *warnings))
    student_report, teacher_report = (
        describe_pyramid(built.detector, source=title, split=train)
        for title, built in zip(titles, (student, teacher), strict=True)
    )
    return CheckedRecipe(
        source, pair.built.kind, student_report, teacher_report, pair.built.terms, pair.built.head_transfer
    )
