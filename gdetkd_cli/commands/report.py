"""``gdetkd report``: one HTML page about runs, a comparison or the demo."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from csv import DictReader
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gdetkd_cli import assembly
from gdetkd_cli.commands.evaluate import run_eval
from gdetkd_cli.commands.measure import read_measured
from gdetkd_cli.compare.trials import find_finished_trials
from gdetkd_cli.data.folds import select_images
from gdetkd_cli.data.split import Split
from gdetkd_cli.engine.events import Note, Observer, silent
from gdetkd_cli.engine.run_folder import RunFolder, read_json
from gdetkd_cli.errors import DataError, RunFolderError
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.evaluation.stored import read_detections
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.methods import NONE
from gdetkd_cli.recipe.schema import Recipe
from gdetkd_cli.report.contents import Contents, Shown
from gdetkd_cli.report.write import write_report
from gdetkd_cli.structures import Detections

_FULL = "gdetkd"  # the method that stands for distillation, if it is in the table


@dataclass(frozen=True)
class ReportResult:
    """A written report; ``size_mb`` is the size of its file."""

    report: Path
    size_mb: float
    detectors: tuple[str, ...]


@dataclass(frozen=True)
class _Runs:
    """The folders behind a report.

    Attributes:
        distilled, alone: run folders, if there are any.
        command: repeats the run or the comparison.
        words: which trials of a comparison stand for their methods.
    """

    home: Path
    distilled: RunFolder | None
    alone: RunFolder | None
    command: str
    words: str = ""


def run_report(
    runs: Sequence[Path], *, output: Path | None = None, teacher: bool = False, observer: Observer = silent
) -> ReportResult:
    """Writes a report of a distilled run, a plain run, both together, a comparison, or the demo.

    Args:
        runs: folders; at most one distilled and one plain run, or one folder of ``compare`` or ``demo``.
        output: the HTML file; default: ``report.html`` in the distilled run's folder, or in the only one.
        teacher: evaluate the teacher on all validation images, and keep its detections in the folder.

    Raises:
        RunFolderError: a folder is none of these, there are two of a kind, or a file in it is damaged.
        GDetKDError: the teacher cannot be evaluated.
    """
    found = _find_runs(runs)
    if teacher:
        run_eval(str(found.home / "recipe.yaml"), data=None, store=found.home / "teacher.npz", observer=observer)
    contents = _collect(found)
    path = output or found.home / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_report(contents, path)
    return ReportResult(path, path.stat().st_size / 1e6, tuple(one.title for one in contents.shown))


def add_report(runs: Sequence[Path], observer: Observer) -> None:
    """Writes the report of finished work; a failure becomes a note, because the work itself is complete."""
    try:
        observer(Note(f"report: {run_report(runs).report}"))
    except Exception as error:
        names = shlex.join(str(run) for run in runs)
        reason = f"{type(error).__name__}: {error}"
        observer(Note(f"the report could not be written ({reason}); `gdetkd report {names}` tries again"))


def _find_runs(runs: Sequence[Path]) -> _Runs:
    """Finds the folders behind the given ones."""
    if len(runs) == 1 and (runs[0] / "distilled" / "recipe.yaml").exists():
        return _find_demo(runs[0])
    if len(runs) == 1 and (runs[0] / "recipe.yaml").exists() and any(runs[0].glob("*/recipe.yaml")):
        return _find_comparison(runs[0])
    kinds: dict[str, list[Path]] = {"distilled": [], "plain": []}
    for path in runs:
        if not (path / "recipe.yaml").exists():
            raise RunFolderError(f"{path} is no folder of a run, of compare or of demo; it has no recipe.yaml")
        kinds["distilled" if load_recipe(path / "recipe.yaml").distill else "plain"].append(path)
    for kind, paths in kinds.items():
        if len(paths) > 1:
            raise RunFolderError(
                f"{' and '.join(map(str, paths))} are both {kind} runs; a report shows one distilled and one plain run "
                "(`gdetkd compare` compares more)"
            )
    distilled, alone = (RunFolder(paths[0]) if paths else None for paths in kinds.values())
    home = (distilled or alone or RunFolder(runs[0])).path
    commands = [
        f"gdetkd {word} --recipe {shlex.quote(str(folder.recipe))} --output NEW"
        for word, folder in (("train", alone), ("distill", distilled))
        if folder
    ]
    words = ""
    if distilled and alone and load_recipe(distilled.recipe).data != load_recipe(alone.recipe).data:
        words = "The two runs have different data blocks, so their numbers may not be comparable."
    return _Runs(home, distilled, alone, "\n".join(commands), words=words)


def _find_demo(folder: Path) -> _Runs:
    distilled, alone = RunFolder(folder / "distilled"), RunFolder(folder / "alone")
    recipe = load_recipe(distilled.recipe)
    command = f"gdetkd demo --seed {recipe.seed} --steps {recipe.train.steps}"
    return _Runs(folder, distilled, alone if alone.recipe.exists() else None, command)


def _find_comparison(folder: Path) -> _Runs:
    """Chooses two trials of a comparison with the same budget and seed: plain training, and a distilled student."""
    finished = find_finished_trials(folder)
    steps = sorted({trial.steps for trial in finished})
    methods = list(dict.fromkeys(trial.method for trial in finished))
    seeds = len({trial.seed for trial in finished})
    command = shlex.join(["gdetkd", "compare", str(folder / "recipe.yaml")])
    if not finished:
        words = "No trial without folds is finished, so the report shows no single detector."
        return _Runs(folder, None, None, command, words=words)
    command += f" --methods {','.join(methods)} --steps {','.join(map(str, steps))} --seeds {seeds} --output NEW"
    budget = [trial for trial in finished if trial.steps == steps[-1]]
    others = [trial for trial in budget if trial.method != NONE]
    best = max(others, key=lambda trial: (trial.method == _FULL, finished[trial]["AP"] or 0.0), default=None)
    if best is not None:
        best = min((trial for trial in others if trial.method == best.method), key=lambda trial: trial.seed)
    plain = [t for t in budget if t.method == NONE and (best is None or t.seed == best.seed)]
    alone = plain[0] if plain else None
    shown = " and ".join(trial.title for trial in (alone, best) if trial)
    words = f"The sections about single detectors show these trials: {shown}."
    distilled, plainly = (trial.run if trial else None for trial in (best, alone))
    return _Runs(folder, distilled, plainly, command, words)


def _collect(found: _Runs) -> Contents:
    """Reads everything that the report shows."""
    main = found.distilled or found.alone
    source = found.home / "recipe.yaml" if main is None else main.recipe
    recipe = load_recipe(source)
    split, reason = _read_split(recipe, [folder for folder in (main, RunFolder(found.home)) if folder])
    measured = {} if found.distilled is None else read_measured(found.distilled)
    students = [
        found.alone and _show_run(found.alone, "alone", split),
        found.distilled and _show_run(found.distilled, "distilled", split),
    ]
    split = _leave_out_bad_images(split, [one.detections for one in students if one and one.detections])
    shown = [_show_teacher(found, measured.get("teacher"), split), *students]
    table = found.home / "table.csv"
    drawn = {} if main is None else {name: main.pyramids / f"{name}.jpg" for name in ("student", "teacher")}
    environment = {} if main is None else read_json(main.environment)
    return Contents(
        title=f"{recipe.name}: distillation report",
        shown=tuple(one for one in shown if one),
        split=split,
        without_split=reason,
        table=list(DictReader(table.open(newline=""))) if table.exists() else (),
        trials=found.words,
        measured=measured,
        pyramids={name: path for name, path in drawn.items() if path.exists()},
        environment=environment,
        recipe=source.read_text(encoding="utf-8"),
        command=found.command,
    )


def _read_split(recipe: Recipe, folders: Sequence[RunFolder]) -> tuple[Split | None, str]:
    """Reads the validation images and their truth; returns None and the reason if they cannot be read."""
    labels = next((folder.labels for folder in folders if (folder.labels / "val.json").exists()), None)
    try:
        return assembly.build_split(recipe.data, "val", labels), ""
    except (DataError, OSError) as error:
        return None, f"{error}."


def _leave_out_bad_images(split: Split | None, predicted: Sequence[Mapping[int, Detections]]) -> Split | None:
    """Returns the split without the images that a run left out because they could not be read."""
    if split is None or split.bad is None:
        return split
    records = enumerate(split.records)
    return select_images(split, [i for i, record in records if all(record.image_id in one for one in predicted)])


def _show_run(folder: RunFolder, role: Any, split: Split | None) -> Shown:
    """A trained student: its metrics, detections, log and cost."""
    log = list(folder.read_log())
    evaluations = [line["evaluation"] for line in log if "evaluation" in line]
    metrics = folder.read_metrics() or (evaluations[-1] if evaluations else None)
    detections = None
    if split is not None and folder.detections.exists():
        detections = read_detections(folder.detections).relabel(split.class_names)
    cost = read_measured(folder).get("student", {})
    if not cost and folder.student.exists():
        cost = {"size_mb": folder.student.stat().st_size / 1e6}
    evaluated = metrics if metrics and metrics["AP"] is not None else None
    return Shown(role, str(folder.path), evaluated, detections, log, cost)


def _show_teacher(found: _Runs, cost: dict[str, Any] | None, split: Split | None) -> Shown | None:
    """The teacher: its metrics, if its detections on all images are stored; None for a plain run."""
    if found.distilled is None:
        return None
    teacher = load_recipe(found.distilled.recipe).teacher
    name = assembly.format_title(teacher) if teacher else ""
    shown = Shown("teacher", name, cost=cost or {})
    if kept := read_json(found.home / "teacher.json"):
        shown = replace(shown, metrics=kept)
    files = (found.home / "teacher.npz", found.distilled.teacher_detections)
    stored = next((path for path in files if path.exists()), None)
    if split is None or stored is None:
        return shown
    detections = read_detections(stored).relabel(split.class_names)
    shown = replace(shown, detections=detections)
    if {record.image_id for record in split.records} <= detections.keys():
        metrics = evaluate_coco(split.records, split.class_names, detections).to_json()
        shown = replace(shown, metrics=metrics)
    return shown
