"""``gdetkd compare``: trains one student with many methods on the same data, steps and seeds; writes a table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from gdetkd_cli import assembly
from gdetkd_cli.assembly.labels import label_data
from gdetkd_cli.commands.evaluate import evaluate_teacher, run_eval
from gdetkd_cli.commands.report import add_report
from gdetkd_cli.compare.cluster import Cluster, Launcher
from gdetkd_cli.compare.folds import build_fold_recipe, list_folds, plan_fold_teachers, pool_teacher_ap, select_fold
from gdetkd_cli.compare.plot import draw_comparison
from gdetkd_cli.compare.table import (
    Comparison,
    describe_interval,
    make_rows,
    select_predicted,
    write_curves,
    write_notes,
    write_pooled,
    write_table,
    write_trials,
)
from gdetkd_cli.compare.trials import Trial, build_trial, find_finished_trials, find_fold_counts, run_trials
from gdetkd_cli.data.split import Split
from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.engine.events import Note, Observer, silent
from gdetkd_cli.engine.run_folder import read_json
from gdetkd_cli.errors import GDetKDError, PairError, RecipeError, RunFolderError
from gdetkd_cli.files import write_text
from gdetkd_cli.recipe.checks import require_distillation, require_trained_teacher
from gdetkd_cli.recipe.differences import find_changed_fields
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.methods import NONE, list_default_methods, select_method
from gdetkd_cli.recipe.scaling import scale_to_batch
from gdetkd_cli.recipe.schema import DistillationRecipe, Fold, Recipe, Runtime

_SOURCES = "sources.json"  # hashes of the data and of the teacher's file
# Fields that may differ between calls: each trial sets them, or they change no number.
_MAY_DIFFER = (
    "seed",
    "train.steps",
    "train.evaluate_every",
    "distill.teacher_cache_dir",
    "distill.teacher_cache_gb",
    "runtime.threads",
    "runtime.workers",
    "runtime.cache_mb",
    "runtime.trackers",
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
    launcher: Launcher | None = None,
    observer: Observer = silent,
) -> Comparison:
    """Runs the missing trials of a table, and writes a table of all finished trials in the folder.

    Args:
        recipe: the pair, the data and the settings of the terms.
        methods: as in ``select_method``; empty: ``list_default_methods``.
        steps: budgets in optimizer steps; default: the recipe's steps.
        seeds: number of seeds, from the recipe's seed.
        folds: number of folds of the training and validation images together; None: the recipe's splits.
        jobs: number of trials that run at the same time.
        baseline: the method to compare the others with.
        output: folder of the trials and the table, new or existing; default: ``runs/compare-NAME``.
        launcher: the scheduler that runs each trial as a job; None: this machine runs them.

    Raises:
        RecipeError: a method is unknown, the baseline is not in the table, the recipe has no teacher, the student has
            no detections, or the data cannot be divided into folds.
        RunFolderError: the folder belongs to another recipe, has other folds, or the data or the teacher have changed.
        DataError: there are fewer images than folds.
        LauncherError: the launcher is not available, or refuses its settings.
    """
    recipe = require_distillation(recipe)
    require_trained_teacher(recipe)
    recipe = scale_to_batch(recipe, processes=1)  # not in the trials' processes: they run exactly the budget
    head = transfers_head(recipe)
    parts: list[Fold] = [] if folds is None else list_folds(recipe, folds)
    names = tuple(dict.fromkeys(methods)) or list_default_methods(head=head)
    folder = output or Path("runs") / f"compare-{recipe.name}"
    recipes = _build_trials(recipe, folder, names, tuple(dict.fromkeys(steps)), seeds, parts)
    _check_baseline(baseline, names, folder, folds)
    _check_folds(folder, folds)
    cluster = None if launcher is None else Cluster(launcher, folder / "jobs")
    recipe, settings = _claim(folder, recipe, jobs, here=cluster is None)
    torch.set_num_threads(settings.threads)
    run = partial(run_trials, settings=settings, jobs=jobs, cluster=cluster, observer=observer)
    data = label_data(recipe, folder / "labels", settings.device, observer)
    split = assembly.build_all_folds(select_fold(data, parts[0])) if parts else assembly.build_split(data, "val")
    _check_sources(folder, recipe, split if parts else assembly.build_split(data, "train"), split)
    teachers = _plan_teachers(recipe, folder, parts, observer)
    failures = run(dict(teachers.values()), what="teachers of folds")
    shared = {"runtime": recipe.runtime, "data": data}
    recipes = {
        trial: _share_teacher(
            build_fold_recipe(own.model_copy(update=shared), trial.fold, teachers),
            (teachers[trial.fold][0].folder if trial.fold in teachers else folder) / "knowledge",
        )
        for trial, own in recipes.items()
    }
    failures += run(recipes)
    teacher = _measure_teacher(folder, recipe, split if parts else None, teachers, observer)
    table = _Table(folder, recipe.name, split, baseline, folds)
    return _write(table, [(trial.steps, trial.method) for trial in recipes], teacher, failures, observer)


def _build_trials(
    recipe: DistillationRecipe,
    folder: Path,
    methods: Sequence[str],
    steps: Sequence[int],
    seeds: int,
    folds: list[Fold],
) -> dict[Trial, Recipe]:
    """Builds every trial and its recipe, so that an error in any method is found before the first trial runs."""
    return {
        build_trial(folder, method, budget, seed, fold, measured=seed == recipe.seed and fold is None): select_method(
            recipe, method, steps=budget, seed=seed
        )
        for budget in steps or (recipe.train.steps,)
        for seed in range(recipe.seed, recipe.seed + seeds)
        for fold in folds or (None,)
        for method in methods
    }


def _share_teacher(recipe: Recipe, folder: Path) -> Recipe:
    """Returns a trial's recipe whose teacher is asked once for all trials, if the recipe stores its answers on disk."""
    distill = recipe.distill
    if distill is None or distill.teacher_cache not in ("disk", "auto") or distill.teacher_cache_dir is not None:
        return recipe
    update = {"teacher_cache_dir": str(folder.resolve())}
    return recipe.model_copy(update={"distill": distill.model_copy(update=update)})


@dataclass(frozen=True)
class _Table:
    """The facts that all rows of a table share.

    Attributes:
        recipe: name of the recipe.
        split: the validation images; with folds, all images.
        baseline: the method to compare the others with.
    """

    folder: Path
    recipe: str
    split: Split
    baseline: str
    folds: int | None


def _write(
    table: _Table,
    requested: Sequence[tuple[int, str]],
    teacher: float | None,
    failures: Sequence[str],
    observer: Observer,
) -> Comparison:
    """Builds the table of all finished trials and writes its files; ``requested`` holds budgets and methods."""
    folder, folds = table.folder, table.folds
    if folds is None:
        observer(Note("resampling images to estimate intervals"))
    finished = find_finished_trials(folder, folds)
    split = select_predicted(table.split, finished)
    rows, runs = make_rows(requested, finished, split, table.baseline, folds)
    comparison = Comparison(
        recipe=table.recipe,
        baseline=table.baseline,
        teacher_ap=teacher,
        rows=tuple(rows),
        notes=tuple(write_notes(rows, teacher, finished, folds)),
        failures=tuple(failures),
        trials=folder / "trials.csv",
        table=folder / "table.csv",
        plot=folder / "comparison.png",
        folds=folds,
        interval_over=describe_interval(folds),
    )
    write_trials(comparison.trials, table.recipe, finished, folds)
    write_curves(folder / "curves.csv", table.recipe, finished, folds)
    if folds:
        write_pooled(folder / "pooled.csv", table.recipe, runs)
    write_table(comparison.table, rows, table.baseline, len(split), folds)
    draw_comparison(comparison, comparison.plot)
    add_report([folder], observer)
    return comparison


def transfers_head(recipe: DistillationRecipe) -> bool:
    """Builds the recipe's pair; returns whether ``gdetkd`` copies the teacher's head.

    Raises:
        RecipeError: the student has no detections to compare.
        GDetKDError: something that the recipe names cannot be used.
    """
    train = assembly.read_split(recipe.data, "train")
    try:
        pair = assembly.build_recipe_pair(recipe, train.class_names)
    except PairError:  # the method's own trial reports it
        return False
    if pair.student.detector.features_only:
        raise RecipeError(
            f"{assembly.format_title(recipe.student)} accepts no targets, so it has no detections to compare; use "
            "`gdetkd distill`"
        )
    return pair.built.transferred


def _check_baseline(baseline: str, methods: Sequence[str], folder: Path, folds: int | None) -> None:
    """Raises a RecipeError if the baseline is neither requested nor among the finished trials."""
    if baseline in (NONE, *methods):
        return
    in_table = dict.fromkeys([*methods, *(trial.method for trial in find_finished_trials(folder, folds))])
    if baseline not in in_table:
        raise RecipeError(f"the baseline {baseline!r} is not in the table; expected one of {', '.join(in_table)}")


def _check_folds(folder: Path, folds: int | None) -> None:
    """Raises a RunFolderError if the folder's trials have another number of folds, since one table needs the same."""
    others = find_fold_counts(folder) - {folds}
    if others:
        other = others.pop()
        advice = "continue without --folds" if other is None else f"continue with --folds {other}"
        kind = "trials without folds" if other is None else f"trials with {other} folds"
        raise RunFolderError(f"{folder} has {kind}; {advice}, or choose another --output")


def _plan_teachers(
    recipe: Recipe, folder: Path, folds: list[Fold], observer: Observer
) -> dict[Fold, tuple[Trial, Recipe]]:
    """Returns ``plan_fold_teachers``; adds a note if one teacher serves all folds."""
    teachers = plan_fold_teachers(recipe, folder, folds) if folds else {}
    if folds and not teachers and recipe.teacher is not None:
        title = assembly.format_title(recipe.teacher)
        observer(
            Note(
                f"all folds use the teacher {title}; if it was trained on these images, it has seen the held-out ones "
                "and the comparison is not valid"
            )
        )
    return teachers


def _claim(
    folder: Path, recipe: DistillationRecipe, jobs: int, *, here: bool
) -> tuple[DistillationRecipe, ComputeSettings]:
    """Stores the recipe in the folder, with runtime settings that all trials share; returns both.

    Trials that do not run ``here`` choose theirs where they run; the settings are for the rest of the work.

    Raises:
        RunFolderError: the folder has trials of another recipe.
    """
    kept = folder / "recipe.yaml"
    started = any(folder.glob("*/recipe.yaml"))
    before = load_recipe(kept) if kept.exists() and started else None
    runtime = recipe.runtime
    if before is not None and runtime.threads == "auto":
        runtime = runtime.model_copy(update={"threads": before.runtime.threads})
    if here:
        settings = assembly.resolve_runtime(runtime, local_processes=jobs)
        resolved = {name: getattr(settings, name) for name in ("device", "precision", "channels_last", "threads")}
        recipe = recipe.model_copy(update={"runtime": runtime.model_copy(update=resolved)})
    else:
        settings = assembly.resolve_runtime(Runtime(threads=runtime.threads))
    if before is not None:
        changed = find_changed_fields(before.model_dump(mode="json"), recipe.model_dump(mode="json"))
        if conflicts := [name for name in changed if name not in _MAY_DIFFER]:
            raise RunFolderError(
                f"{folder} has trials of a recipe that differs in {', '.join(conflicts)}; choose another --output"
            )
        return recipe, settings
    folder.mkdir(parents=True, exist_ok=True)
    # Without trials, these may belong to another recipe.
    shutil.rmtree(folder / "labels", ignore_errors=True)
    for name in (_SOURCES, "teacher.json", "teacher.npz"):
        (folder / name).unlink(missing_ok=True)
    write_text(kept, dump_recipe(recipe))
    return recipe, settings


def _check_sources(folder: Path, recipe: Recipe, train: Split, val: Split) -> None:
    """Stores hashes of the data and the teacher's file; raises a RunFolderError if the folder's trials had others."""
    kept, now = folder / _SOURCES, assembly.hash_sources(recipe, train, val)
    if not kept.exists():
        write_text(kept, json.dumps(now))
    elif changed := [name for name, value in read_json(kept).items() if now.get(name) != value]:
        raise RunFolderError(
            f"the {', '.join(changed)} changed since the first trials in {folder}, so other trials cannot be compared "
            "with them; choose another --output"
        )


def _measure_teacher(
    folder: Path,
    recipe: Recipe,
    every_fold: Split | None,
    teachers: Mapping[Fold, tuple[Trial, Recipe]],
    observer: Observer,
) -> float | None:
    """Computes the teacher's AP on the same images, once; returns None if its detections cannot be read.

    Args:
        every_fold: the images of all folds; None: the validation split.
        teachers: the folds' own teachers; each is evaluated on its held-out images, and their detections are pooled.
        observer: receives the reason if there is no AP.
    """
    kept, source = folder / "teacher.json", str(folder / "recipe.yaml")
    if kept.exists():
        return float(read_json(kept)["AP"])
    try:
        if teachers:
            assert every_fold is not None
            ap = pool_teacher_ap(teachers, every_fold)
        elif every_fold is not None:
            ap = evaluate_teacher(recipe, every_fold, observer).ap
        else:
            ap = run_eval(source, data=None, store=folder / "teacher.npz", observer=observer).metrics.ap
    except GDetKDError as error:
        observer(Note(f"the teacher cannot be evaluated: {error}"))
        return None
    if ap is not None:
        write_text(kept, json.dumps({"AP": ap}))
    return ap
