"""``gdetkd compare``: one student, many methods, the same data, steps and seeds.

A *cell* is one run: a method, a budget, a seed. Each is a process of its own, so that its memory can be told and its
failure stops no other; a cell that is finished is never run again, one that was killed goes on.
"""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from gdetkd_cli import build
from gdetkd_cli.data.loader import validation_batches
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.errors import GDetKDError, RunFolderError
from gdetkd_cli.evaluation.bootstrap import MatchedPictures, draw_again, interval_of_difference
from gdetkd_cli.evaluation.predict import predict_split
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.methods import NONE, recipe_of
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.report.comparison import draw_comparison
from gdetkd_cli.results import Comparison, MethodRow
from gdetkd_cli.runs.evaluate import run_eval
from gdetkd_cli.runs.job import check_taught
from gdetkd_cli.structures import Detections
from gdetkd_cli.training.events import Note, Observer, Phase, silent
from gdetkd_cli.training.run_folder import RunFolder, write_text
from gdetkd_cli.trust import code_is_trusted

_FACTS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "seconds_per_step", "peak_memory_mb")
CELL_FIELDS = ("recipe", "method", "steps", "seed", *_FACTS)
_PLATEAU = 1.0  # AP that doubling the steps adds at most, where plain training is at its end


@dataclass(frozen=True)
class _Cell:
    method: str
    steps: int
    seed: int
    folder: Path

    @property
    def title(self) -> str:
        return f"{self.method}, {self.steps} steps, seed {self.seed}"

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.folder / "run")

    @property
    def detections(self) -> Path:
        """What the student detects in the validation pictures; written last, so a cell with it is finished."""
        return self.folder / "detections.pt"


def run_compare(
    recipe: Recipe,
    *,
    methods: Sequence[str],
    steps: Sequence[int] = (),
    seeds: int = 3,
    jobs: int = 1,
    output: Path | None = None,
    observer: Observer = silent,
) -> Comparison:
    """Runs what is missing of a table, and writes the table: what was asked for, and all else that the folder has.

    Args:
        recipe: the pair, the data and the settings of the terms.
        methods: see ``recipe_of``.
        steps: budgets; default: the recipe's.
        seeds: from the recipe's on.
        jobs: cells run at the same time.
        output: folder of the cells and the table; ``runs/compare-NAME`` by default. One that exists is continued.
        observer: is told of progress.

    Raises:
        RecipeError: a method that there is not, or a recipe without a teacher.
        RunFolderError: the folder belongs to another recipe.
    """
    check_taught(recipe)
    budgets = tuple(dict.fromkeys(steps)) or (recipe.train.steps,)
    names = tuple(dict.fromkeys(methods))
    numbers = range(recipe.seed, recipe.seed + seeds)
    folder = output or Path("runs") / f"compare-{recipe.name}"
    recipes = {  # all of them first: a mistake in the last is told before the first runs
        _Cell(method, budget, seed, folder / f"{method}-{budget}-{seed}"): recipe_of(
            recipe, method, steps=budget, seed=seed
        )
        for budget in budgets
        for seed in numbers
        for method in names
    }
    _claim(folder, recipe)
    settings = build.resolve_runtime(recipe.runtime, local_processes=jobs)
    runtime = recipe.runtime.model_copy(update={"threads": settings.threads})  # decided once, for all alike
    recipes = {cell: own.model_copy(update={"runtime": runtime}) for cell, own in recipes.items()}
    failures = _run_cells(recipes, jobs, observer)
    split = build.build_split(recipe.data, "val")
    finished = _finished(folder)
    asked = [(cell.steps, cell.method) for cell in recipes]
    known = dict.fromkeys([*asked, *((cell.steps, cell.method) for cell in finished)])
    rows = [_row(method, budget, finished) for budget, method in sorted(known, key=lambda row: row[0])]
    observer(Note("differences over pictures drawn again"))
    rows = _with_intervals(rows, finished, split)
    teacher = _teacher_ap(folder, recipe, observer)
    cells, table, plot = folder / "cells.csv", folder / "table.csv", folder / "comparison.png"
    _write_cells(cells, recipe.name, finished)
    _write_table(table, rows)
    draw_comparison(rows, teacher, plot)
    return Comparison(
        recipe=recipe.name,
        teacher_ap=teacher,
        rows=tuple(rows),
        notes=tuple(_notes(rows, teacher)),
        failures=tuple(failures),
        cells=cells,
        table=table,
        plot=plot,
    )


def _claim(folder: Path, recipe: Recipe) -> None:
    """The recipe is kept in the folder; cells of two recipes are no table."""
    kept = folder / "recipe.yaml"
    if kept.exists():
        before, now = (r.model_dump() for r in (load_recipe(kept), recipe))
        changed = [key for key in now if key not in ("runtime",) and before.get(key) != now[key]]
        if changed:
            raise RunFolderError(
                f"{folder} has cells of a recipe that differs in {', '.join(changed)}; choose another --output"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_text(kept, dump_recipe(recipe))


def _run_cells(recipes: Mapping[_Cell, Recipe], jobs: int, observer: Observer) -> list[str]:
    """Runs the cells that are not finished; says which failed, and why."""
    missing = [cell for cell in recipes if not cell.detections.exists()]
    observer(Note(f"{len(recipes)} cells, {len(recipes) - len(missing)} of them finished before"))
    failures = []

    def work(cell: _Cell) -> None:
        observer(Phase(cell.title))
        _train(cell, recipes[cell])
        _predict(cell, recipes[cell])
        ap = json.loads(cell.run.metrics.read_text())["AP"]
        observer(Note(f"{cell.title}: " + ("no AP" if ap is None else f"AP {ap:.1f}")))

    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for cell, done in [(cell, pool.submit(work, cell)) for cell in missing]:
            try:
                done.result()
            except GDetKDError as error:
                failures.append(f"{cell.title}: {error}")
                observer(Note(failures[-1]))
            except KeyboardInterrupt as interrupt:
                pool.shutdown(wait=False, cancel_futures=True)  # else the others would still be run
                interrupt.add_note("the same command goes on where it was")
                raise
    return failures


def _train(cell: _Cell, recipe: Recipe) -> None:
    """Trains the cell's student in a process, unless it is trained.

    Raises:
        GDetKDError: the process failed.
    """
    run = cell.run
    if run.metrics.exists():
        return
    run.recover_resume()
    command = [sys.executable, "-m", "gdetkd_cli", "distill" if recipe.distill else "train", "--json"]
    if run.resume.exists():
        command += ["--resume", str(run.path)]
    else:
        shutil.rmtree(run.path, ignore_errors=True)  # killed before its first checkpoint
        cell.folder.mkdir(parents=True, exist_ok=True)
        own = cell.folder / "recipe.yaml"
        write_text(own, dump_recipe(recipe))
        command += ["--recipe", str(own), "--output", str(run.path)]
    if code_is_trusted():
        command.append("--trust-code")
    log = cell.folder / "log.txt"
    with log.open("a") as told:
        code = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=told, check=False).returncode
    if code:
        said = log.read_text().strip().splitlines()
        raise GDetKDError(f"{said[-1] if said else f'exit code {code}'} ({log})")


def _predict(cell: _Cell, recipe: Recipe) -> None:
    """Writes what the cell's student detects in the validation pictures."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loaded = catalog.load(catalog.locate(str(cell.run.path)))
    loaded.detector.module.to(device)
    split = build.relabel(build.build_split(recipe.data, "val"), loaded.detector)
    found = predict_split(loaded.detector, validation_batches(split=split, batch_size=1), device)
    fresh = cell.detections.with_suffix(".tmp")
    torch.save({number: vars(one) for number, one in found.items()}, fresh)
    fresh.replace(cell.detections)


def _finished(folder: Path) -> dict[_Cell, Mapping[str, Any]]:
    """Every finished cell of the folder, whoever asked for it, and its metrics; by budget, seed and method."""
    found = []
    for written in folder.glob("*/detections.pt"):
        method, steps, seed = written.parent.name.rsplit("-", 2)
        found.append(_Cell(method, int(steps), int(seed), written.parent))
    found.sort(key=lambda cell: (cell.steps, cell.seed, cell.method))
    return {cell: json.loads(cell.run.metrics.read_text()) for cell in found}


def _row(method: str, steps: int, facts: Mapping[_Cell, Mapping[str, Any]]) -> MethodRow:
    own = {cell.seed: fact for cell, fact in facts.items() if (cell.method, cell.steps) == (method, steps)}
    ap = {seed: float(fact["AP"]) for seed, fact in own.items() if fact["AP"] is not None}
    if not ap:
        return MethodRow(method=method, steps=steps, ap={})

    def of(name: str) -> float | None:
        values = [float(fact[name]) for fact in own.values() if fact[name] is not None]
        return mean(values) if values else None

    plain = {cell.seed: fact["AP"] for cell, fact in facts.items() if (cell.method, cell.steps) == (NONE, steps)}
    differences = [value - plain[seed] for seed, value in ap.items() if plain.get(seed) is not None]
    return MethodRow(
        method=method,
        steps=steps,
        ap=ap,
        mean=mean(ap.values()),
        deviation=stdev(ap.values()) if len(ap) > 1 else None,
        ap_small=of("AP_S"),
        ap_medium=of("AP_M"),
        ap_large=of("AP_L"),
        difference=mean(differences) if differences and method != NONE else None,
        seconds_per_step=median(float(fact["seconds_per_step"]) for fact in own.values()),
        peak_memory_mb=median(float(fact["peak_memory_mb"]) for fact in own.values()),
    )


def _with_intervals(rows: Sequence[MethodRow], facts: Mapping[_Cell, Any], split: Split) -> list[MethodRow]:
    """The rows, with the interval of each difference to plain training."""
    drawings = draw_again(len(split))
    drawn = {}
    for cell in facts:
        stored = torch.load(cell.detections, weights_only=True)
        found = {number: Detections(**one) for number, one in stored.items()}
        matched = MatchedPictures(split.records, split.class_names, found)
        drawn[cell.method, cell.steps, cell.seed] = matched.drawn(drawings)
    done = []
    for row in rows:
        seeds = [seed for seed in row.ap if (NONE, row.steps, seed) in drawn]
        if row.difference is None or not seeds:
            done.append(row)
            continue
        ours, theirs = ([drawn[name, row.steps, seed] for seed in seeds] for name in (row.method, NONE))
        done.append(replace(row, interval=interval_of_difference(ours, theirs)))
    return done


def _teacher_ap(folder: Path, recipe: Recipe, observer: Observer) -> float | None:
    """The teacher's AP on the same pictures, found once; None where its detections cannot be read."""
    kept = folder / "teacher.json"
    if not kept.exists():
        try:
            found: float | None = run_eval(str(folder / "recipe.yaml"), data=None, observer=observer).metrics.ap
        except GDetKDError as error:
            observer(Note(f"the teacher is not evaluated: {error}"))
            found = None
        write_text(kept, json.dumps({"AP": found}))
    value = json.loads(kept.read_text())["AP"]
    return None if value is None else float(value)


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
    for half, whole in ((a, b) for a in plain for b in plain if b == 2 * a):
        gained = plain[whole] - plain[half]
        # A student that has hardly begun gains little as well.
        reached = "its plateau" if gained < min(_PLATEAU, 0.1 * plain[half]) else "not yet its plateau"
        notes.append(f"plain training gains {gained:+.1f} AP from {half} to {whole} steps: {reached}")
    if plain and not any(b == 2 * a for a in plain for b in plain):
        notes.append("whether plain training is at its plateau is not told by these budgets; one twice as long tells")
    return notes


def _write_cells(path: Path, name: str, facts: Mapping[_Cell, Mapping[str, Any]]) -> None:
    rows = []
    for cell, fact in facts.items():
        known = {"recipe": name, "method": cell.method, "steps": cell.steps, "seed": cell.seed}
        numbers = {k: "" if fact[k] is None else round(float(fact[k]), 3) for k in _FACTS}
        rows.append(known | numbers)
    _write_csv(path, CELL_FIELDS, rows)


def _write_table(path: Path, rows: Sequence[MethodRow]) -> None:
    fields = [f for f in MethodRow.__dataclass_fields__ if f not in ("ap", "interval")]
    lines = []
    for row in rows:
        low, high = row.interval or (None, None)
        line = {f: getattr(row, f) for f in fields} | {"seeds": len(row.ap), "low": low, "high": high}
        lines.append({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()})
    _write_csv(path, (*fields, "seeds", "low", "high"), lines)


def _write_csv(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
