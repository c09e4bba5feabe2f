"""``gdetkd compare``: one student, many methods, the same data, steps and seeds; the table that they make."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gdetkd_cli import assembly
from gdetkd_cli.assembly.labels import label_data
from gdetkd_cli.commands.evaluate import run_eval, teacher_metrics
from gdetkd_cli.compare.folds import fold_teachers, folds_of, pooled_teacher_ap, recipe_for, with_fold
from gdetkd_cli.compare.plot import draw_comparison
from gdetkd_cli.compare.table import (
    Comparison,
    interval_over,
    make_rows,
    notes_of,
    write_curves,
    write_pooled,
    write_table,
    write_trials,
)
from gdetkd_cli.compare.trials import Trial, finished_trials, folds_in, run_trials, trial_of
from gdetkd_cli.data.split import Split
from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.engine.events import Note, Observer, silent
from gdetkd_cli.engine.run_folder import write_text
from gdetkd_cli.errors import GDetKDError, PairError, RecipeError, RunFolderError
from gdetkd_cli.recipe.checks import require_distillation, require_trained_teacher
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.methods import NONE, list_default_methods, select_method
from gdetkd_cli.recipe.scaling import scale_to_batch
from gdetkd_cli.recipe.schema import DistillationRecipe, Fold, Recipe

# What a budget or a seed replaces, and what changes no number.
_OF_NO_MATTER = (
    "seed",
    "train.steps",
    "train.evaluate_every",
    "runtime.threads",
    "runtime.workers",
    "runtime.cache_mb",
)


def run_compare(
    recipe: Recipe,
    *,
    methods: Sequence[str] = (),
    steps: Sequence[int] = (),
    seeds: int = 3,
    folds: int | None = None,
    jobs: int = 1,
    baseline: str = NONE,
    output: Path | None = None,
    observer: Observer = silent,
) -> Comparison:
    """Runs what is missing of a table, and writes the table: what was asked for, and all else that the folder has.

    Args:
        recipe: the pair, the data and the settings of the terms.
        methods: see ``select_method``; none: ``list_default_methods``, which adds the teacher's head where ``gdetkd`` has it.
        steps: budgets; default: the recipe's.
        seeds: from the recipe's on.
        folds: of a cross-validation over training and validation images together; None: the splits as they are.
        jobs: trials run at the same time.
        baseline: the method that the others' differences are to.
        output: folder of the trials and the table; ``runs/compare-NAME`` by default. One that exists is continued.
        observer: is told of progress.

    Raises:
        RecipeError: a method that there is not, a baseline that is not in the table, a recipe without a teacher, a
            student that detects nothing, or folds that cannot be.
        RunFolderError: the folder belongs to another recipe, or has other folds.
        DataError: there are fewer images than folds.
    """
    recipe = require_distillation(recipe)
    require_trained_teacher(recipe)
    # Trials are processes of their own: their recipes have the rule behind them, so that a budget is what is run.
    recipe = scale_to_batch(recipe, processes=1)
    head = transfers_head(recipe)
    parts: list[Fold] = [] if folds is None else folds_of(recipe, folds)
    budgets = tuple(dict.fromkeys(steps)) or (recipe.train.steps,)
    names = tuple(dict.fromkeys(methods)) or list_default_methods(head=head)
    numbers = range(recipe.seed, recipe.seed + seeds)
    folder = output or Path("runs") / f"compare-{recipe.name}"
    recipes = {  # all of them first: a mistake in the last is told before the first runs
        trial_of(folder, method, budget, seed, fold): select_method(recipe, method, steps=budget, seed=seed)
        for budget in budgets
        for seed in numbers
        for fold in parts or (None,)
        for method in names
    }
    _check_baseline(baseline, names, folder, folds)
    _check_folds(folder, folds)
    recipe, settings = _claim(folder, recipe, jobs)
    torch.set_num_threads(settings.threads)
    data = label_data(recipe, folder / "labels", settings.device, observer)
    split = assembly.build_all_folds(with_fold(data, parts[0])) if parts else assembly.build_split(data, "val")
    teachers = _teachers(recipe, folder, parts, observer)
    failures = _run_teachers(teachers, settings, jobs, observer)
    shared = {"runtime": recipe.runtime, "data": data}
    recipes = {trial: recipe_for(own.model_copy(update=shared), trial.fold, teachers) for trial, own in recipes.items()}
    failures += run_trials(recipes, settings, jobs=jobs, observer=observer)
    teacher = _teacher_ap(folder, recipe, split if parts else None, teachers, observer)
    asked = [(trial.steps, trial.method) for trial in recipes]
    table = _Table(folder, recipe.name, split, baseline, folds)
    return _write(table, asked, teacher, failures, observer)


@dataclass(frozen=True)
class _Table:
    """What a table is of.

    Attributes:
        folder: of its trials.
        recipe: its name.
        split: the validation images; with folds, all images.
        baseline: the method that differences are to.
        folds: of the cross-validation, or None.
    """

    folder: Path
    recipe: str
    split: Split
    baseline: str
    folds: int | None


def _write(
    table: _Table,
    asked: Sequence[tuple[int, str]],
    teacher: float | None,
    failures: Sequence[str],
    observer: Observer,
) -> Comparison:
    """Makes the table of all finished trials, and writes its files; ``asked`` are budgets and methods."""
    folder, folds = table.folder, table.folds
    if folds is None:
        observer(Note("differences over images drawn again"))
    finished = finished_trials(folder, folds)
    rows, runs = make_rows(asked, finished, table.split, table.baseline, folds)
    found = Comparison(
        recipe=table.recipe,
        baseline=table.baseline,
        teacher_ap=teacher,
        rows=tuple(rows),
        notes=tuple(notes_of(rows, teacher, finished, folds)),
        failures=tuple(failures),
        trials=folder / "trials.csv",
        table=folder / "table.csv",
        plot=folder / "comparison.png",
        folds=folds,
        interval_over=interval_over(folds),
    )
    write_trials(found.trials, table.recipe, finished, folds)
    write_curves(folder / "curves.csv", table.recipe, finished, folds)
    if folds:
        write_pooled(folder / "pooled.csv", table.recipe, runs)
    write_table(found.table, rows, table.baseline, len(table.split), folds)
    draw_comparison(found, found.plot)
    return found


def transfers_head(recipe: DistillationRecipe) -> bool:
    """Builds the recipe's pair; returns whether ``gdetkd`` starts from the teacher's head.

    Raises:
        RecipeError: the student has no detections to compare.
        GDetKDError: anything that the recipe names cannot be used.
    """
    data = recipe.data
    train = assembly.read_split(data, "train")
    try:
        pair = assembly.build_recipe_pair(recipe, train.class_names)
    except PairError:  # the method's own run reports it
        return False
    if pair.student.detector.features_only:
        raise RecipeError(
            f"{assembly.format_title(recipe.student)} takes images and no targets, so it has no detections to compare; use "
            "`gdetkd distill`"
        )
    return pair.built.transferred


def _check_baseline(baseline: str, methods: Sequence[str], folder: Path, folds: int | None) -> None:
    """Raises a RecipeError where the baseline is neither asked for nor in the folder's table."""
    if baseline in (NONE, *methods):
        return
    in_table = dict.fromkeys([*methods, *(trial.method for trial in finished_trials(folder, folds))])
    if baseline not in in_table:
        raise RecipeError(f"the baseline {baseline!r} is not in the table; expected one of {', '.join(in_table)}")


def _check_folds(folder: Path, folds: int | None) -> None:
    """Raises a RunFolderError where the folder's trials are of other folds, which are no table with these."""
    others = folds_in(folder) - {folds}
    if others:
        other = others.pop()
        asked = "go on with the same, without --folds" if other is None else f"go on with --folds {other}"
        kind = "trials without folds" if other is None else f"trials of {other} folds"
        raise RunFolderError(f"{folder} has {kind}; {asked}, or choose another --output")


def _teachers(recipe: Recipe, folder: Path, folds: list[Fold], observer: Observer) -> dict[Fold, tuple[Trial, Recipe]]:
    """See ``fold_teachers``; says so where one teacher serves all folds."""
    teachers = fold_teachers(recipe, folder, folds) if folds else {}
    if folds and not teachers and recipe.teacher is not None:
        title = assembly.format_title(recipe.teacher)
        observer(
            Note(
                f"the teacher {title} serves every fold as it is: it is assumed not to have been trained on these "
                "images; if it was, it has seen the held-out ones"
            )
        )
    return teachers


def _run_teachers(
    teachers: Mapping[Fold, tuple[Trial, Recipe]], settings: ComputeSettings, jobs: int, observer: Observer
) -> list[str]:
    """Trains the folds' own teachers that are not trained yet; says which failed, and why."""
    if not teachers:
        return []
    return run_trials(dict(teachers.values()), settings, jobs=jobs, observer=observer, what="teachers of folds")


def _claim(folder: Path, recipe: DistillationRecipe, jobs: int) -> tuple[DistillationRecipe, ComputeSettings]:
    """The recipe as the folder keeps it, every ``auto`` of how it is run decided once for all of its trials.

    Raises:
        RunFolderError: the folder has trials of another recipe, which are no table with these.
    """
    kept = folder / "recipe.yaml"
    started = any(folder.glob("*/recipe.yaml"))
    before = load_recipe(kept) if kept.exists() and started else None
    runtime = recipe.runtime
    if before is not None and runtime.threads == "auto":
        runtime = runtime.model_copy(update={"threads": before.runtime.threads})
    settings = assembly.resolve_runtime(runtime, local_processes=jobs)
    decided = {name: getattr(settings, name) for name in ("device", "precision", "channels_last", "threads")}
    recipe = recipe.model_copy(update={"runtime": runtime.model_copy(update=decided)})
    if before is not None:
        then, now = (dict(_fields(r.model_dump())) for r in (before, recipe))
        changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        if told := [name for name in changed if name not in _OF_NO_MATTER]:
            raise RunFolderError(
                f"{folder} has trials of a recipe that differs in {', '.join(told)}; choose another --output"
            )
        return recipe, settings
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "labels", ignore_errors=True)  # of a call that got no further, perhaps of another recipe
    write_text(kept, dump_recipe(recipe))
    return recipe, settings


def _fields(block: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``train.optimizer.lr`` and its value, for every field."""
    for name, value in block.items():
        if isinstance(value, Mapping):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _teacher_ap(
    folder: Path,
    recipe: Recipe,
    every_fold: Split | None,
    teachers: Mapping[Fold, tuple[Trial, Recipe]],
    observer: Observer,
) -> float | None:
    """The teacher's AP on the same images, computed once; None where its detections cannot be read.

    Args:
        folder: of the table.
        recipe: the comparison's.
        every_fold: the images of all folds; None: the validation split.
        teachers: the folds' own; their detections are pooled, so that no image counts as a teacher that saw it has it.
        observer: hears why there is none.
    """
    kept = folder / "teacher.json"
    if kept.exists():
        return float(json.loads(kept.read_text())["AP"])
    try:
        if teachers:
            found = pooled_teacher_ap(teachers)
        elif every_fold is not None:
            found = teacher_metrics(recipe, every_fold, observer).ap
        else:
            found = run_eval(str(folder / "recipe.yaml"), data=None, observer=observer).metrics.ap
    except GDetKDError as error:
        observer(Note(f"the teacher is not evaluated: {error}"))
        return None
    if found is not None:
        write_text(kept, json.dumps({"AP": found}))
    return found
