"""``gdetkd compare``: one student, many methods, the same data, steps and seeds; the table that they make."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from gdetkd_cli import build
from gdetkd_cli.data.split import Split
from gdetkd_cli.errors import GDetKDError, RecipeError, RunFolderError
from gdetkd_cli.evaluation.bootstrap import MatchedPictures, draw_again, interval_of_difference
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.methods import NONE, default_methods, recipe_of
from gdetkd_cli.recipe.scaling import scaled_to_batch
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.report.comparison import draw_comparison
from gdetkd_cli.results import Comparison, MethodRow
from gdetkd_cli.runs.cells import Cell, cell_of, finished_cells, run_cells
from gdetkd_cli.runs.evaluate import run_eval
from gdetkd_cli.runs.head_start import starts_from_teachers_head
from gdetkd_cli.runs.job import check_taught, features_only, with_labels
from gdetkd_cli.structures import Detections
from gdetkd_cli.training.device import ComputeSettings
from gdetkd_cli.training.events import Note, Observer, silent
from gdetkd_cli.training.run_folder import write_text

_FACTS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "seconds_per_step", "peak_memory_mb")
_OF_A_CELL = ("recipe", "method", "steps", "seed")
CELL_FIELDS = (*_OF_A_CELL, *_FACTS)
_CURVE_FIELDS = (*_OF_A_CELL, "step", "AP")
# What a budget or a seed replaces, and what changes no number.
_OF_NO_MATTER = (
    "seed",
    "train.steps",
    "train.evaluate_every",
    "runtime.threads",
    "runtime.workers",
    "runtime.cache_mb",
)
_PLATEAU = 1.0  # AP that doubling the steps adds at most, where plain training is at its end


def run_compare(
    recipe: Recipe,
    *,
    methods: Sequence[str] = (),
    steps: Sequence[int] = (),
    seeds: int = 3,
    jobs: int = 1,
    baseline: str = NONE,
    output: Path | None = None,
    observer: Observer = silent,
) -> Comparison:
    """Runs what is missing of a table, and writes the table: what was asked for, and all else that the folder has.

    Args:
        recipe: the pair, the data and the settings of the terms.
        methods: see ``recipe_of``; none: ``default_methods``, which adds the teacher's head where ``gdetkd`` has it.
        steps: budgets; default: the recipe's.
        seeds: from the recipe's on.
        jobs: cells run at the same time.
        baseline: the method that the others' differences are to.
        output: folder of the cells and the table; ``runs/compare-NAME`` by default. One that exists is continued.
        observer: is told of progress.

    Raises:
        RecipeError: a method that there is not, a baseline that is not in the table, a recipe without a teacher, or a
            student that detects nothing.
        RunFolderError: the folder belongs to another recipe.
    """
    check_taught(recipe)
    # Cells are processes of their own: their recipes have the rule behind them, so that a budget is what is run.
    recipe = scaled_to_batch(recipe, processes=1)
    budgets = tuple(dict.fromkeys(steps)) or (recipe.train.steps,)
    names = tuple(dict.fromkeys(methods)) or default_methods(head=starts_from_teachers_head(recipe))
    numbers = range(recipe.seed, recipe.seed + seeds)
    folder = output or Path("runs") / f"compare-{recipe.name}"
    recipes = {  # all of them first: a mistake in the last is told before the first runs
        cell_of(folder, method, budget, seed): recipe_of(recipe, method, steps=budget, seed=seed)
        for budget in budgets
        for seed in numbers
        for method in names
    }
    if baseline not in (NONE, *names):
        in_table = dict.fromkeys([*names, *(cell.method for cell in finished_cells(folder))])
        if baseline not in in_table:
            raise RecipeError(f"the baseline {baseline!r} is not in the table; expected one of {', '.join(in_table)}")
    recipe, settings = _claim(folder, recipe, jobs)
    torch.set_num_threads(settings.threads)
    data = with_labels(recipe, folder / "labels", settings.device, observer)
    split = build.build_split(data, "val")
    if features_only(build.build_detector(recipe.student, split.class_names, recipe.seed).detector):
        raise RecipeError(
            f"{build.title_of(recipe.student)} takes images and no targets, so it detects nothing that a table could "
            "compare; use `gdetkd distill`"
        )
    recipes = {cell: own.model_copy(update={"runtime": recipe.runtime, "data": data}) for cell, own in recipes.items()}
    failures = run_cells(recipes, settings, jobs=jobs, observer=observer)
    finished = finished_cells(folder)
    asked = [(cell.steps, cell.method) for cell in recipes]
    known = dict.fromkeys([*asked, *((cell.steps, cell.method) for cell in finished)])
    rows = [_row(method, budget, finished, baseline) for budget, method in sorted(known, key=lambda row: row[0])]
    observer(Note("differences over pictures drawn again"))
    rows = _with_intervals(rows, finished, split, baseline)
    teacher = _teacher_ap(folder, observer)
    cells, table, plot = folder / "cells.csv", folder / "table.csv", folder / "comparison.png"
    _write_cells(cells, recipe.name, finished)
    _write_curves(folder / "curves.csv", recipe.name, finished)
    _write_table(table, rows, baseline)
    draw_comparison(rows, teacher, plot)
    return Comparison(
        recipe=recipe.name,
        baseline=baseline,
        teacher_ap=teacher,
        rows=tuple(rows),
        notes=tuple(_notes(rows, teacher)),
        failures=tuple(failures),
        cells=cells,
        table=table,
        plot=plot,
    )


def _claim(folder: Path, recipe: Recipe, jobs: int) -> tuple[Recipe, ComputeSettings]:
    """The recipe as the folder keeps it, every ``auto`` of how it is run decided once for all of its cells.

    Raises:
        RunFolderError: the folder has cells of another recipe, which are no table with these.
    """
    kept = folder / "recipe.yaml"
    started = any(folder.glob("*/recipe.yaml"))
    before = load_recipe(kept) if kept.exists() and started else None
    runtime = recipe.runtime
    if before is not None and runtime.threads == "auto":
        runtime = runtime.model_copy(update={"threads": before.runtime.threads})
    settings = build.resolve_runtime(runtime, local_processes=jobs)
    decided = {name: getattr(settings, name) for name in ("device", "precision", "channels_last", "threads")}
    recipe = recipe.model_copy(update={"runtime": runtime.model_copy(update=decided)})
    if before is not None:
        then, now = (dict(_fields(r.model_dump())) for r in (before, recipe))
        changed = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        if told := [name for name in changed if name not in _OF_NO_MATTER]:
            raise RunFolderError(
                f"{folder} has cells of a recipe that differs in {', '.join(told)}; choose another --output"
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


def _row(method: str, steps: int, facts: Mapping[Cell, Mapping[str, Any]], baseline: str) -> MethodRow:
    own = {cell.seed: fact for cell, fact in facts.items() if (cell.method, cell.steps) == (method, steps)}
    ap = {seed: float(fact["AP"]) for seed, fact in own.items() if fact["AP"] is not None}
    if not ap:
        return MethodRow(method=method, steps=steps, ap={})

    def of(name: str) -> float | None:
        values = [float(fact[name]) for fact in own.values() if fact[name] is not None]
        return mean(values) if values else None

    others = {cell.seed: fact["AP"] for cell, fact in facts.items() if (cell.method, cell.steps) == (baseline, steps)}
    differences = [value - others[seed] for seed, value in ap.items() if others.get(seed) is not None]
    return MethodRow(
        method=method,
        steps=steps,
        ap=ap,
        mean=mean(ap.values()),
        deviation=stdev(ap.values()) if len(ap) > 1 else None,
        ap_small=of("AP_S"),
        ap_medium=of("AP_M"),
        ap_large=of("AP_L"),
        difference=mean(differences) if differences and method != baseline else None,
        seconds_per_step=median(float(fact["seconds_per_step"]) for fact in own.values()),
        peak_memory_mb=median(float(fact["peak_memory_mb"]) for fact in own.values()),
    )


def _with_intervals(
    rows: Sequence[MethodRow], facts: Mapping[Cell, Any], split: Split, baseline: str
) -> list[MethodRow]:
    """The rows, with the interval of each difference to the baseline."""
    drawings = draw_again(len(split))
    drawn = {}
    for cell in facts:
        stored = torch.load(cell.detections, weights_only=True)
        found = {number: Detections(**one) for number, one in stored.items()}
        matched = MatchedPictures(split.records, split.class_names, found)
        drawn[cell.method, cell.steps, cell.seed] = matched.drawn(drawings)
    done = []
    for row in rows:
        seeds = [seed for seed in row.ap if (baseline, row.steps, seed) in drawn]
        if row.difference is None or not seeds:
            done.append(row)
            continue
        ours, theirs = ([drawn[name, row.steps, seed] for seed in seeds] for name in (row.method, baseline))
        done.append(replace(row, interval=interval_of_difference(ours, theirs)))
    return done


def _teacher_ap(folder: Path, observer: Observer) -> float | None:
    """The teacher's AP on the same pictures, found once; None where its detections cannot be read."""
    kept = folder / "teacher.json"
    if kept.exists():
        return float(json.loads(kept.read_text())["AP"])
    try:
        found = run_eval(str(folder / "recipe.yaml"), data=None, observer=observer).metrics.ap
    except GDetKDError as error:
        observer(Note(f"the teacher is not evaluated: {error}"))
        return None
    if found is not None:
        write_text(kept, json.dumps({"AP": found}))
    return found


def _notes(rows: Sequence[MethodRow], teacher: float | None) -> list[str]:
    """What the table shows: speed, or a better end."""
    plain = {row.steps: row.mean for row in rows if row.method == NONE and row.mean is not None}
    notes = []
    for steps, value in plain.items():
        if teacher is None:
            notes.append(f"at {steps} steps: the teacher's own AP is not known")
        elif value >= teacher:
            notes.append(
                f"at {steps} steps plain training reaches {value:.1f} AP, the teacher {teacher:.1f}: what distillation "
                "adds here is speed, not a better end"
            )
    ap = {row.steps: row.ap for row in rows if row.method == NONE}
    for half, whole in ((a, b) for a in plain for b in plain if b == 2 * a):
        common = ap[half].keys() & ap[whole].keys()
        if not common:
            notes.append(f"plain training of {half} and {whole} steps has no seed in common: its plateau is not told")
            continue
        before, after = (mean(ap[steps][seed] for seed in common) for steps in (half, whole))
        gained = after - before
        # A student that has hardly begun gains little as well.
        reached = "its plateau" if gained < min(_PLATEAU, 0.1 * before) else "not yet its plateau"
        told = f" ({len(common)} seed{'s' * (len(common) > 1)})" if len(ap[half]) > 1 else ""
        notes.append(f"plain training gains {gained:+.1f} AP from {half} to {whole} steps{told}: {reached}")
    if plain and not any(b == 2 * a for a in plain for b in plain):
        notes.append("whether plain training is at its plateau is not told by these budgets; one twice as long tells")
    return notes


def _write_cells(path: Path, name: str, facts: Mapping[Cell, Mapping[str, Any]]) -> None:
    rows = []
    for cell, fact in facts.items():
        numbers = {k: "" if fact[k] is None else round(float(fact[k]), 3) for k in _FACTS}
        rows.append(_names(name, cell) | numbers)
    _write_csv(path, CELL_FIELDS, rows)


def _write_curves(path: Path, name: str, cells: Iterable[Cell]) -> None:
    """AP on the way of each cell, one line an evaluation: as many as ``train.evaluate_every`` asks for."""
    rows = []
    for cell in cells:
        told = (line for line in cell.run.read_log() if "evaluation" in line)
        rows += [_names(name, cell) | {"step": line["step"], "AP": line["evaluation"]["AP"]} for line in told]
    _write_csv(path, _CURVE_FIELDS, rows)


def _names(recipe: str, cell: Cell) -> dict[str, Any]:
    """What says which cell a line is of."""
    return dict(zip(_OF_A_CELL, (recipe, cell.method, cell.steps, cell.seed), strict=True))


def _write_table(path: Path, rows: Sequence[MethodRow], baseline: str) -> None:
    fields = [f for f in MethodRow.__dataclass_fields__ if f not in ("ap", "interval")]
    lines = []
    for row in rows:
        low, high = row.interval or (None, None)
        line = {f: getattr(row, f) for f in fields}
        line |= {"seeds": len(row.ap), "low": low, "high": high, "baseline": baseline}
        lines.append({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()})
    _write_csv(path, (*fields, "seeds", "low", "high", "baseline"), lines)


def _write_csv(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
