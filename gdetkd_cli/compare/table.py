"""The table of a comparison: rows over seeds, their intervals, what they show, and the files they are written to."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from gdetkd_cli.compare.trials import Trial
from gdetkd_cli.data.split import Split
from gdetkd_cli.evaluation.bootstrap import MatchedImages, deviation_of_difference, draw_again
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.evaluation.intervals import interval_over_folds, interval_over_seeds_and_images
from gdetkd_cli.recipe.methods import NONE
from gdetkd_cli.structures import Detections

Key = tuple[str, int, int]  # method, steps, seed
Facts = Mapping[str, Any]  # metrics under the names of ``CocoMetrics.to_json``, seconds per step and peak memory

_FACTS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "seconds_per_step", "peak_memory_mb")
_OF_A_CELL = ("recipe", "method", "steps", "seed")
_PLATEAU = 1.0  # AP that doubling the steps adds at most, where plain training is at its end


@dataclass(frozen=True)
class MethodRow:
    """One method at one budget, over seeds.

    Attributes:
        ap: by seed; with folds, of the detections of all folds together.
        mean, deviation: of these; the deviation is None of a single seed.
        ap_small, ap_medium, ap_large: means over seeds.
        difference: mean over seeds of AP minus the baseline's of the same seed.
        interval: 95 % of that difference, over seeds and images together; with folds, over folds. None: too few of
            them to know, one seed for example.
        seed_deviation: standard deviation of the difference over seeds.
        image_deviation: standard deviation of the mean difference over validation images drawn again; None with folds.
        fold_deviation: standard deviation of the difference over folds, each a mean over seeds; None without folds.
        seconds_per_step, peak_memory_mb: medians over seeds.
    """

    method: str
    steps: int
    ap: dict[int, float]
    mean: float | None = None
    deviation: float | None = None
    ap_small: float | None = None
    ap_medium: float | None = None
    ap_large: float | None = None
    difference: float | None = None
    interval: tuple[float, float] | None = None
    seed_deviation: float | None = None
    image_deviation: float | None = None
    fold_deviation: float | None = None
    seconds_per_step: float | None = None
    peak_memory_mb: float | None = None


@dataclass(frozen=True)
class Comparison:
    """What ``gdetkd compare`` found.

    Attributes:
        baseline: the method that the rows' differences are to.
        teacher_ap: the teacher's own, on the same images; None where its detections cannot be read.
        rows: by budget and method, in the order asked for; a row without AP was not run.
        notes: what the table can show and what it cannot.
        failures: trials that did not finish, and why.
        trials, table, plot: files written.
        folds: of the cross-validation; None: one training and one validation split.
        interval_over: what the rows' intervals cover: ``seeds and images``, or ``folds``.
    """

    recipe: str
    baseline: str
    teacher_ap: float | None
    rows: tuple[MethodRow, ...]
    notes: tuple[str, ...]
    failures: tuple[str, ...]
    trials: Path
    table: Path
    plot: Path
    folds: int | None = None
    interval_over: str = "seeds and images"


def make_rows(
    asked: Iterable[tuple[int, str]], finished: Mapping[Trial, Facts], split: Split, baseline: str, folds: int | None
) -> tuple[list[MethodRow], dict[Key, Facts]]:
    """The rows of a table by budget, and the facts that they are made of.

    Args:
        asked: budget and method of each row that is wanted; those of other finished trials follow.
        finished: trials and their metrics.
        split: P validation images; with folds, those of all folds.
        baseline: the method that differences are to.
        folds: K; None for one training and one validation split.

    Returns:
        The rows, and for each run that every image was evaluated in, its facts: with folds, of all folds pooled.
    """
    known = dict.fromkeys([*asked, *((trial.steps, trial.method) for trial in finished)])
    runs = _pooled(finished, split, folds) if folds else {_key(trial): fact for trial, fact in finished.items()}
    rows = [_row(method, steps, runs, baseline) for steps, method in sorted(known, key=lambda row: row[0])]
    if folds:
        return [_with_fold_interval(row, runs, finished, baseline) for row in rows], runs
    return _with_intervals(rows, finished, split, baseline), runs


def interval_over(folds: int | None) -> str:
    """What the intervals of a table cover, for people."""
    return "seeds and images" if folds is None else "folds"


def _key(trial: Trial) -> Key:
    return trial.method, trial.steps, trial.seed


def _pooled(finished: Mapping[Trial, Facts], split: Split, folds: int) -> dict[Key, Facts]:
    """Facts of each method, budget and seed with all folds: each image counts once, by the fold that held it out."""
    trials: dict[Key, list[Trial]] = defaultdict(list)
    for trial in finished:
        trials[_key(trial)].append(trial)
    pooled: dict[Key, Facts] = {}
    for key, own in trials.items():
        if len(own) < folds:
            continue
        found: dict[int, Detections] = {}
        for trial in own:
            found |= trial.read_detections()
        metrics = evaluate_coco(split.records, split.class_names, found).to_json()
        spent = {
            name: median(finished[trial][name] for trial in own) for name in ("seconds_per_step", "peak_memory_mb")
        }
        pooled[key] = metrics | spent
    return pooled


def _row(method: str, steps: int, runs: Mapping[Key, Facts], baseline: str) -> MethodRow:
    own = {seed: fact for (name, budget, seed), fact in runs.items() if (name, budget) == (method, steps)}
    ap = {seed: float(fact["AP"]) for seed, fact in own.items() if fact["AP"] is not None}
    if not ap:
        return MethodRow(method=method, steps=steps, ap={})

    def of(name: str) -> float | None:
        values = [float(fact[name]) for fact in own.values() if fact[name] is not None]
        return mean(values) if values else None

    row = MethodRow(
        method=method,
        steps=steps,
        ap=ap,
        mean=mean(ap.values()),
        deviation=stdev(ap.values()) if len(ap) > 1 else None,
        ap_small=of("AP_S"),
        ap_medium=of("AP_M"),
        ap_large=of("AP_L"),
        seconds_per_step=median(float(fact["seconds_per_step"]) for fact in own.values()),
        peak_memory_mb=median(float(fact["peak_memory_mb"]) for fact in own.values()),
    )
    differences = list(_differences(row, runs, baseline).values())
    if not differences:
        return row
    spread = stdev(differences) if len(differences) > 1 else None
    return replace(row, difference=mean(differences), seed_deviation=spread)


def _differences(row: MethodRow, runs: Mapping[Key, Facts], baseline: str) -> dict[int, float]:
    """AP minus the baseline's AP of the same seed, by seed; none for the baseline itself."""
    if row.method == baseline:
        return {}
    others = {seed: runs.get((baseline, row.steps, seed), {}).get("AP") for seed in row.ap}
    return {seed: row.ap[seed] - other for seed, other in others.items() if other is not None}


def _with_intervals(
    rows: Sequence[MethodRow], finished: Mapping[Trial, Facts], split: Split, baseline: str
) -> list[MethodRow]:
    """The rows, with the interval of each difference to the baseline over seeds and images."""
    runs = {_key(trial): fact for trial, fact in finished.items()}
    drawings = draw_again(len(split))
    drawn = {}
    for trial in finished:
        matched = MatchedImages(split.records, split.class_names, trial.read_detections())
        drawn[_key(trial)] = matched.compute_aps(drawings)
    done = []
    for row in rows:
        differences = _differences(row, runs, baseline)
        if not differences:
            done.append(row)
            continue
        ours, theirs = ([drawn[name, row.steps, seed] for seed in differences] for name in (row.method, baseline))
        of_images = deviation_of_difference(ours, theirs)
        interval = interval_over_seeds_and_images(list(differences.values()), of_images, len(split))
        done.append(replace(row, interval=interval, image_deviation=of_images))
    return done


def _with_fold_interval(
    row: MethodRow, runs: Mapping[Key, Facts], finished: Mapping[Trial, Facts], baseline: str
) -> MethodRow:
    """The row, with the interval of its difference to the baseline over folds."""
    seeds = _differences(row, runs, baseline)
    if row.difference is None or not seeds:
        return row
    ap: dict[tuple[str, int], list[float]] = defaultdict(list)  # over seeds, by method and fold
    for trial, fact in finished.items():
        if trial.fold and trial.steps == row.steps and trial.seed in seeds and fact["AP"] is not None:
            ap[trial.method, trial.fold.number].append(float(fact["AP"]))
    # A fold without objects has no AP, by any method.
    numbers = [number for method, number in ap if method == row.method]
    differences = [mean(ap[row.method, number]) - mean(ap[baseline, number]) for number in numbers]
    if len(differences) < 2:
        return row
    spread = stdev(differences)
    return replace(row, interval=interval_over_folds(row.difference, spread, len(differences)), fold_deviation=spread)


def notes_of(
    rows: Sequence[MethodRow], teacher: float | None, finished: Iterable[Trial] = (), folds: int | None = None
) -> list[str]:
    """What the table shows: speed, or a better end; and what it cannot show."""
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
    return notes + _plateau_notes(rows, plain) + _interval_notes(rows, finished, folds)


def _plateau_notes(rows: Sequence[MethodRow], plain: Mapping[int, float]) -> list[str]:
    """Whether plain training is at its end, by its mean AP at two budgets."""
    notes = []
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


def _interval_notes(rows: Sequence[MethodRow], finished: Iterable[Trial], folds: int | None) -> list[str]:
    """Why a difference has no interval, and which runs lack folds."""
    notes = []
    if folds is None and any(row.difference is not None and row.seed_deviation is None for row in rows):
        notes.append(
            "a difference of one seed has no interval, since one seed cannot show how far seeds differ; get more with "
            "`--seeds 3`"
        )
    if folds is not None:
        there: dict[Key, int] = Counter(_key(trial) for trial in finished)
        notes += [
            f"{method}, {steps} steps, seed {seed} has {count} of {folds} folds: it is not in the table"
            for (method, steps, seed), count in there.items()
            if count < folds
        ]
    return notes


def write_trials(path: Path, recipe: str, finished: Mapping[Trial, Facts], folds: int | None) -> None:
    """One line for each run of a student; with folds, for each of them."""
    rows = [_names(recipe, trial, folds) | _numbers(fact) for trial, fact in finished.items()]
    _write_csv(path, (*_OF_A_CELL, *_fold_field(folds), *_FACTS), rows)


def write_pooled(path: Path, recipe: str, runs: Mapping[Key, Facts]) -> None:
    """One line for each method, budget and seed, its AP over the images of all folds together."""
    rows = [dict(zip(_OF_A_CELL, (recipe, *key), strict=True)) | _numbers(fact) for key, fact in runs.items()]
    _write_csv(path, (*_OF_A_CELL, *_FACTS), rows)


def write_curves(path: Path, recipe: str, trials: Iterable[Trial], folds: int | None) -> None:
    """AP on the way of each trial, one line an evaluation: as many as ``train.evaluate_every`` asks for."""
    rows = []
    for trial in trials:
        found = (line for line in trial.run.read_log() if "evaluation" in line)
        names = _names(recipe, trial, folds)
        rows += [names | {"step": line["step"], "AP": line["evaluation"]["AP"]} for line in found]
    _write_csv(path, (*_OF_A_CELL, *_fold_field(folds), "step", "AP"), rows)


def write_table(path: Path, rows: Sequence[MethodRow], baseline: str, images: int, folds: int | None) -> None:
    """One line for each row, with all that its interval (``low``, ``high``) is computed from."""
    fields = [f for f in MethodRow.__dataclass_fields__ if f not in ("ap", "interval")]
    lines = []
    for row in rows:
        low, high = row.interval or (None, None)
        line = {f: getattr(row, f) for f in fields}
        line |= {"seeds": len(row.ap), "images": images, "folds": folds, "low": low, "high": high}
        line |= {"interval_over": interval_over(folds), "baseline": baseline}
        lines.append({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()})
    _write_csv(path, (*fields, "seeds", "images", "folds", "low", "high", "interval_over", "baseline"), lines)


def _fold_field(folds: int | None) -> tuple[str, ...]:
    return ("fold",) if folds else ()


def _names(recipe: str, trial: Trial, folds: int | None) -> dict[str, Any]:
    """The fields that name the trial of a line."""
    names = dict(zip(_OF_A_CELL, (recipe, *_key(trial)), strict=True))
    return names | dict.fromkeys(_fold_field(folds), trial.fold and trial.fold.number)


def _numbers(fact: Facts) -> dict[str, float | str]:
    return {name: "" if fact[name] is None else round(float(fact[name]), 3) for name in _FACTS}


def _write_csv(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)
