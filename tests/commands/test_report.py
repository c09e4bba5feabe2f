"""Reports of real, tiny runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import invoke
import pytest
import toy

from gdetkd_cli.commands import report as report_command
from gdetkd_cli.commands.report import run_report
from gdetkd_cli.commands.train import run_distill, run_train
from gdetkd_cli.engine.events import Note
from gdetkd_cli.errors import RunFolderError
from gdetkd_cli.evaluation.stored import read_detections

pytestmark = pytest.mark.reports


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A distilled run with its report, and a plain run."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = toy.recipe(steps=4, evaluate_every=2)
    run_distill(recipe, output=folder / "distilled-run")
    run_train(recipe, output=folder / "alone-run")
    return folder / "distilled-run", folder / "alone-run"


def test_a_distilled_run_has_a_report_and_what_it_shows(runs: tuple[Path, Path]) -> None:
    distilled, alone = runs
    measured = json.loads((distilled / "measured.json").read_text())
    html = (distilled / "report.html").read_text()

    assert measured["pair"]["images"] == 4
    assert sum(measured["pair"]["similarity"]["matched"]) == measured["pair"]["objects"]
    assert measured["teacher"]["parameters"] > measured["student"]["parameters"]
    assert "Left out" not in html
    assert "There is no gain to report" in html  # no student alone
    assert len(read_detections(distilled / "detections.npz").by_image) == 4
    assert not (alone / "report.html").exists()
    assert json.loads((alone / "measured.json").read_text())["pair"] is None


def test_two_runs_show_the_gain(runs: tuple[Path, Path], tmp_path: Path) -> None:
    result = run_report(runs, output=tmp_path / "r.html")

    assert result.detectors == ("teacher", "student alone", "distilled student")
    html = result.report.read_text()
    assert "The distilled student gains" in html
    assert "gdetkd train --recipe" in html


def test_a_comparison(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name, run in zip(("gdetkd-4-0", "none-4-0"), runs, strict=True):
        shutil.copytree(run, tmp_path / name / "run")
        shutil.copy(run / "recipe.yaml", tmp_path / name)
    shutil.copy(runs[0] / "recipe.yaml", tmp_path)
    (tmp_path / "teacher.json").write_text('{"AP": 61.25}')
    (tmp_path / "table.csv").write_text(
        "method,steps,mean,difference,seeds,low,high,interval_over,baseline\n"
        "none,4,20.0,,3,,,seeds and images,none\ngdetkd,4,25.0,5.0,3,2.5,7.5,seeds and images,none\n"
    )
    html = run_report([tmp_path]).report.read_text()

    assert "show these trials: none, 4 steps, seed 0 and gdetkd, 4 steps, seed 0" in html
    assert "+2.5 … +7.5" in html
    assert "cover seeds and images" in html
    assert "61.2" in html  # the teacher, of which nothing else is known
    assert "--methods gdetkd,none --steps 4 --seeds 1" in html
    assert "Left out" not in html


def test_a_comparison_without_finished_trials(runs: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "none-4-0").mkdir()
    for folder in (tmp_path, tmp_path / "none-4-0"):
        shutil.copy(runs[1] / "recipe.yaml", folder)

    assert "No trial without folds is finished" in run_report([tmp_path]).report.read_text()


def test_the_folder_of_the_demo(runs: tuple[Path, Path], tmp_path: Path) -> None:
    for name, run in zip(("distilled", "alone"), runs, strict=True):
        shutil.copytree(run, tmp_path / name)
    result = run_report([tmp_path])

    assert result.report == tmp_path / "report.html"
    assert "gdetkd demo --seed 0 --steps 4" in result.report.read_text()


def test_a_plain_run_alone(runs: tuple[Path, Path], tmp_path: Path) -> None:
    html = run_report([runs[1]], output=tmp_path / "r.html").report.read_text()

    assert "Confusion matrix" in html
    assert "Left out, because the run was not measured" in html


def test_lost_images_leave_sections_out(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise FileNotFoundError("no images here")

    monkeypatch.setattr("gdetkd_cli.assembly.build_split", fail)
    html = run_report([runs[0]], output=tmp_path / "r.html").report.read_text()

    assert "the validation images are not available: no images here" in html
    assert "AP per size" in html


@pytest.mark.parametrize("name", ["measured.json", "metrics.json", "environment.json"])
@pytest.mark.parametrize("content", ["{", "[1]"])
def test_a_damaged_file_is_named(runs: tuple[Path, Path], tmp_path: Path, name: str, content: str) -> None:
    shutil.copytree(runs[0], tmp_path / "run", ignore=shutil.ignore_patterns("resume"))
    (tmp_path / "run" / name).write_text(content)
    with pytest.raises(RunFolderError, match=rf"{name} is damaged \(.*; restore it, or remove it"):
        run_report([tmp_path / "run"])


def test_folders_that_are_no_runs(runs: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="is no folder of a run"):
        run_report([tmp_path])
    with pytest.raises(RunFolderError, match="is no folder of a run"):
        run_report([runs[0].parent])  # a folder of runs is no comparison
    with pytest.raises(RunFolderError, match="both distilled runs"):
        run_report([runs[0], runs[0]])


def test_a_failed_report_leaves_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no ink")

    notes: list[object] = []
    monkeypatch.setattr(report_command, "write_report", fail)
    run = run_distill(toy.recipe(steps=2), output=tmp_path / "run", observer=notes.append).run

    assert (run / "metrics.json").exists()
    texts = [note.text for note in notes if isinstance(note, Note)]
    assert [text for text in texts if "RuntimeError: no ink" in text and "gdetkd report" in text]


def test_the_command_and_the_watch(runs: tuple[Path, Path], tmp_path: Path) -> None:
    done = invoke.done("report", str(runs[0]), "--teacher", "--output", str(tmp_path / "r.html"))
    assert "wrote" in done.stdout
    assert len(read_detections(runs[0] / "teacher.npz").by_image) == 4

    shown = invoke.done("watch", str(runs[0]), "--once").stdout
    assert "finished, 4 steps" in shown
    assert "sgfi" in shown
    missing = invoke.gdetkd("watch", str(tmp_path), "--once")
    assert missing.exit_code != 0
    assert "no recipe.yaml" in missing.stderr
