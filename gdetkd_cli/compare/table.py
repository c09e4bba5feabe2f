"""The table of a comparison: rows over seeds, intervals, notes, and the files."""

from __future__ import annotations

import csv
import io
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
from gdetkd_cli.evaluation.predict import list_predicted
from gdetkd_cli.files import write_text
from gdetkd_cli.recipe.methods import NONE
from gdetkd_cli.structures import Detections

Key = tuple[str, int, int]  # method, steps, seed
Facts = Mapping[str, Any]  # metrics under the names of ``CocoMetrics.to_json``, seconds per step and peak memory

_FACTS = ("AP", "AP50", "AP75", "AP_S", "AP_M", "AP_L", "seconds_per_step", "peak_memory_mb")
_OF_A_TRIAL = ("recipe", "method", "steps", "seed")
_PLATEAU = 1.0  # maximum AP that doubling the steps adds on the plateau of plain training


@dataclass(frozen=True)
class MethodRow:
    """One method at one budget, over seeds.

    Attributes:
        ap: AP by seed; with folds, from the detections of all folds together.
        mean, deviation: mean and standard deviation of AP; a single seed has no deviation.
        ap_small, ap_medium, ap_large: means over seeds.
        difference: mean over seeds of AP minus the baseline's AP with the same seed.
        interval: 95 % interval of the difference, over seeds and images together; with folds, over folds. None: too
            few seeds or folds.
        seed_deviation: standard deviation of the difference over seeds.
        image_deviation: standard deviation of the mean difference over resampled validation images; None with folds.
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
    """The result of ``gdetkd compare``.

    Attributes:
        baseline: the method to compare the others with.
        teacher_ap: the teacher's AP on the same images; None if its detections cannot be read.
        rows: rows by budget and method, in the requested order; a row without AP has no finished trial.
        failures: titles of failed trials and their errors.
        folds: number of folds; None: one training and one validation split.
        interval_over: scope of the rows' intervals: ``seeds and images``, or ``folds``.
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
    requested: Iterable[tuple[int, str]],
    finished: Mapping[Trial, Facts],
    split: Split,
    baseline: str,
    folds: int | None,
) -> tuple[list[MethodRow], dict[Key, Facts]]:
    """Makes the rows of a table, by budget.

    Args:
        requested: budget and method of each requested row; rows of other finished trials follow.
        split: N validation images; with folds, the images of all folds.
        baseline: the method to compare the others with.
        folds: number of folds; None for one training and one validation split.

    Returns:
        The rows, and the facts behind them by method, budget and seed; with folds, pooled over all folds.
    """
    known = dict.fromkeys([*requested, *((trial.steps, trial.method) for trial in finished)])
    runs = _pool_folds(finished, split, folds) if folds else {_get_key(trial): fact for trial, fact in finished.items()}
    rows = [_make_row(method, steps, runs, baseline) for steps, method in sorted(known, key=lambda row: row[0])]
    if folds:
        return [_add_fold_interval(row, runs, finished, baseline) for row in rows], runs
    return _add_intervals(rows, finished, split, baseline), runs


def select_predicted(split: Split, finished: Iterable[Trial]) -> Split:
    """Returns the split without the images that no trial could read; unchanged if no trial is finished."""
    if split.bad is None:
        return split
    predicted = {number: one for trial in finished for number, one in trial.read_detections(split.class_names).items()}
    return replace(split, records=list_predicted(split, predicted)) if predicted else split


def describe_interval(folds: int | None) -> str:
    """Returns the scope of a table's intervals."""
    return "seeds and images" if folds is None else "folds"


def _get_key(trial: Trial) -> Key:
    return trial.method, trial.steps, trial.seed


def _pool_folds(finished: Mapping[Trial, Facts], split: Split, folds: int) -> dict[Key, Facts]:
    """Computes the facts of each method, budget and seed with all folds; each image counts once, when held out."""
    trials: dict[Key, list[Trial]] = defaultdict(list)
    for trial in finished:
        trials[_get_key(trial)].append(trial)
    pooled: dict[Key, Facts] = {}
    for key, own in trials.items():
        if len(own) < folds:
            continue
        detections: dict[int, Detections] = {}
        for trial in own:
            detections |= trial.read_detections(split.class_names)
        metrics = evaluate_coco(split.records, split.class_names, detections).to_json()
        costs = {
            name: median(finished[trial][name] for trial in own) for name in ("seconds_per_step", "peak_memory_mb")
        }
        pooled[key] = metrics | costs
    return pooled


def _make_row(method: str, steps: int, runs: Mapping[Key, Facts], baseline: str) -> MethodRow:
    own = {seed: fact for (name, budget, seed), fact in runs.items() if (name, budget) == (method, steps)}
    ap = {seed: float(fact["AP"]) for seed, fact in own.items() if fact["AP"] is not None}
    if not ap:
        return MethodRow(method=method, steps=steps, ap={})

    def average(name: str) -> float | None:
        values = [float(fact[name]) for fact in own.values() if fact[name] is not None]
        return mean(values) if values else None

    row = MethodRow(
        method=method,
        steps=steps,
        ap=ap,
        mean=mean(ap.values()),
        deviation=stdev(ap.values()) if len(ap) > 1 else None,
        ap_small=average("AP_S"),
        ap_medium=average("AP_M"),
        ap_large=average("AP_L"),
        seconds_per_step=median(float(fact["seconds_per_step"]) for fact in own.values()),
        peak_memory_mb=median(float(fact["peak_memory_mb"]) for fact in own.values()),
    )
    differences = list(_subtract_baseline(row, runs, baseline).values())
    if not differences:
        return row
    spread = stdev(differences) if len(differences) > 1 else None
    return replace(row, difference=mean(differences), seed_deviation=spread)


def _subtract_baseline(row: MethodRow, runs: Mapping[Key, Facts], baseline: str) -> dict[int, float]:
    """Returns AP minus the baseline's AP by seed; empty for the baseline itself."""
    if row.method == baseline:
        return {}
    others = {seed: runs.get((baseline, row.steps, seed), {}).get("AP") for seed in row.ap}
    return {seed: row.ap[seed] - other for seed, other in others.items() if other is not None}


def _add_intervals(
    rows: Sequence[MethodRow], finished: Mapping[Trial, Facts], split: Split, baseline: str
) -> list[MethodRow]:
    """Adds to each row the interval of its difference to the baseline over seeds and images."""
    runs = {_get_key(trial): fact for trial, fact in finished.items()}
    drawings = draw_again(len(split))
    drawn = {}
    for trial in finished:
        matched = MatchedImages(split.records, split.class_names, trial.read_detections(split.class_names))
        drawn[_get_key(trial)] = matched.compute_aps(drawings)
    with_intervals = []
    for row in rows:
        differences = _subtract_baseline(row, runs, baseline)
        if not differences:
            with_intervals.append(row)
            continue
        ours, theirs = ([drawn[name, row.steps, seed] for seed in differences] for name in (row.method, baseline))
        of_images = deviation_of_difference(ours, theirs)
        interval = interval_over_seeds_and_images(list(differences.values()), of_images, len(split))
        with_intervals.append(replace(row, interval=interval, image_deviation=of_images))
    return with_intervals


def _add_fold_interval(
    row: MethodRow, runs: Mapping[Key, Facts], finished: Mapping[Trial, Facts], baseline: str
) -> MethodRow:
    """Adds to the row the interval of its difference to the baseline over folds."""
    seeds = _subtract_baseline(row, runs, baseline)
    if row.difference is None or not seeds:
        return row
    ap: dict[tuple[str, int], list[float]] = defaultdict(list)  # over seeds, by method and fold
    for trial, fact in finished.items():
        if trial.fold and trial.steps == row.steps and trial.seed in seeds and fact["AP"] is not None:
            ap[trial.method, trial.fold.number].append(float(fact["AP"]))
    # A fold without objects has no AP with any method.
    numbers = [number for method, number in ap if method == row.method]
    differences = [mean(ap[row.method, number]) - mean(ap[baseline, number]) for number in numbers]
    if len(differences) < 2:
        return row
    spread = stdev(differences)
    return replace(row, interval=interval_over_folds(row.difference, spread, len(differences)), fold_deviation=spread)


def write_notes(
    rows: Sequence[MethodRow], teacher: float | None, finished: Iterable[Trial] = (), folds: int | None = None
) -> list[str]:
    """Writes notes on how to interpret the table."""
    plain = {row.steps: row.mean for row in rows if row.method == NONE and row.mean is not None}
    notes = []
    for steps, value in plain.items():
        if teacher is None:
            notes.append(f"at {steps} steps: the teacher's AP is unknown")
        elif value >= teacher:
            notes.append(
                f"at {steps} steps plain training reaches {value:.1f} AP and the teacher {teacher:.1f}: distillation "
                "makes training faster here, but not better in the end"
            )
    return notes + _write_plateau_notes(rows, plain) + _write_interval_notes(rows, finished, folds)


def _write_plateau_notes(rows: Sequence[MethodRow], plain: Mapping[int, float]) -> list[str]:
    """Writes whether plain training has reached its plateau, by its mean AP at two budgets."""
    notes = []
    ap = {row.steps: row.ap for row in rows if row.method == NONE}
    for half, whole in ((a, b) for a in plain for b in plain if b == 2 * a):
        common = ap[half].keys() & ap[whole].keys()
        if not common:
            notes.append(f"plain training with {half} and {whole} steps has no seed in common: plateau unknown")
            continue
        before, after = (mean(ap[steps][seed] for seed in common) for steps in (half, whole))
        gained = after - before
        # A student at the very start of training gains little, too.
        state = "on its plateau" if gained < min(_PLATEAU, 0.1 * before) else "not yet on its plateau"
        seeds = f" ({len(common)} seed{'s' * (len(common) > 1)})" if len(ap[half]) > 1 else ""
        notes.append(f"plain training gains {gained:+.1f} AP from {half} to {whole} steps{seeds}: {state}")
    if plain and not any(b == 2 * a for a in plain for b in plain):
        notes.append("to check whether plain training has reached its plateau, add a budget twice as long")
    return notes


def _write_interval_notes(rows: Sequence[MethodRow], finished: Iterable[Trial], folds: int | None) -> list[str]:
    """Writes why a difference has no interval, and which runs lack folds."""
    notes = []
    if folds is None and any(row.difference is not None and row.seed_deviation is None for row in rows):
        notes.append(
            "a difference from one seed has no interval, because one seed does not show the variation; add seeds with "
            "`--seeds 3`"
        )
    if folds is not None:
        counts: dict[Key, int] = Counter(_get_key(trial) for trial in finished)
        notes += [
            f"{method}, {steps} steps, seed {seed} is not in the table: only {count} of {folds} folds are finished"
            for (method, steps, seed), count in counts.items()
            if count < folds
        ]
    return notes


def write_trials(path: Path, recipe: str, finished: Mapping[Trial, Facts], folds: int | None) -> None:
    """Writes one line per trial."""
    rows = [_name_trial(recipe, trial, folds) | _round_facts(fact) for trial, fact in finished.items()]
    _write_csv(path, (*_OF_A_TRIAL, *_fold_field(folds), *_FACTS), rows)


def write_pooled(path: Path, recipe: str, runs: Mapping[Key, Facts]) -> None:
    """Writes one line per method, budget and seed, with AP over the images of all folds together."""
    rows = [dict(zip(_OF_A_TRIAL, (recipe, *key), strict=True)) | _round_facts(fact) for key, fact in runs.items()]
    _write_csv(path, (*_OF_A_TRIAL, *_FACTS), rows)


def write_curves(path: Path, recipe: str, trials: Iterable[Trial], folds: int | None) -> None:
    """Writes each trial's AP during training, one line per evaluation (``train.evaluate_every``)."""
    rows = []
    for trial in trials:
        evaluations = (line for line in trial.run.read_log() if "evaluation" in line)
        names = _name_trial(recipe, trial, folds)
        rows += [names | {"step": line["step"], "AP": line["evaluation"]["AP"]} for line in evaluations]
    _write_csv(path, (*_OF_A_TRIAL, *_fold_field(folds), "step", "AP"), rows)


def write_table(path: Path, rows: Sequence[MethodRow], baseline: str, images: int, folds: int | None) -> None:
    """Writes one line per row, with its interval (``low``, ``high``) and the figures behind it."""
    fields = [f for f in MethodRow.__dataclass_fields__ if f not in ("ap", "interval")]
    lines = []
    for row in rows:
        low, high = row.interval or (None, None)
        line = {f: getattr(row, f) for f in fields}
        line |= {"seeds": len(row.ap), "images": images, "folds": folds, "low": low, "high": high}
        line |= {"interval_over": describe_interval(folds), "baseline": baseline}
        lines.append({k: round(v, 3) if isinstance(v, float) else v for k, v in line.items()})
    _write_csv(path, (*fields, "seeds", "images", "folds", "low", "high", "interval_over", "baseline"), lines)


def _fold_field(folds: int | None) -> tuple[str, ...]:
    return ("fold",) if folds else ()


def _name_trial(recipe: str, trial: Trial, folds: int | None) -> dict[str, Any]:
    """Returns the fields that identify a trial."""
    names = dict(zip(_OF_A_TRIAL, (recipe, *_get_key(trial)), strict=True))
    return names | dict.fromkeys(_fold_field(folds), trial.fold and trial.fold.number)


def _round_facts(fact: Facts) -> dict[str, float | str]:
    return {name: "" if fact[name] is None else round(float(fact[name]), 3) for name in _FACTS}


def _write_csv(path: Path, fields: Sequence[str], rows: Sequence[Mapping[str, object]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, fields)
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())
