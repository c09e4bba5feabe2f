"""What people read: numbers, tables, and the narration on a terminal and elsewhere."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType
from rich.progress import Progress

from gdetkd_cli.cli import render
from gdetkd_cli.cli.live import _Bar, narration
from gdetkd_cli.cli.output import to_json
from gdetkd_cli.cli.render_comparison import format_comparison
from gdetkd_cli.cli.terminal import is_first_process
from gdetkd_cli.engine.events import Evaluated, Event, ImagesDone, Note, Phase, StepDone, TrialDone
from gdetkd_cli.evaluation.coco_metrics import CocoMetrics

STEP = StepDone(20, 600, 1.234, {"sgfi": 0.5, "ckd": 0.25}, 1e-3, 35.25, 80.0)


def text(renderable: RenderableType, width: int = 80) -> str:
    stream = io.StringIO()
    Console(file=stream, width=width, markup=False, emoji=False, highlight=False).print(renderable, crop=False)
    return stream.getvalue()


def has_row(table: str, *cells: str) -> bool:
    return any(line.split() == " ".join(cells).split() for line in table.splitlines())


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (318.2, "5 min 18 s"),
        (3599.7, "1 h 00 min"),
        (7384, "2 h 03 min"),
    ],
)
def test_duration(seconds: float, expected: str) -> None:
    assert render.format_duration(seconds) == expected


def test_number_is_a_dash_where_there_is_none() -> None:
    shown = (render.format_number(31.26), render.format_number(None), render.format_number(2, digits=0))
    assert shown == ("31.3", "-", "2")


def test_headline(metrics: CocoMetrics) -> None:
    assert render.format_metrics(metrics) == "AP 31.2  AP50 50.1  AP75 33.0  AP_S -  AP_M 30.0  AP_L 40.5  AR 45.0"


def test_a_finished_run(runs: Any) -> None:
    shown = text(render.format_run(runs.results["run_train"]))
    assert "run runs/tiny: 600 steps in 5 min 18 s" in shown


def test_evaluation_has_a_row_per_metric_and_class(runs: Any) -> None:
    shown = text(render.format_evaluation(runs.results["run_eval"]))
    assert "runs/tiny (run) on synthetic" in shown
    assert "1.23 M parameters, 4.9 MB, 12.3 ms per image" in shown
    assert "200 images, 1234 detections" in shown
    assert has_row(shown, "AP", "mean over IoU 0.50 to 0.95", "31.2")
    assert has_row(shown, "AP_S", "objects below 32 x 32 pixels", "-")
    assert has_row(shown, "disc", "40.0")
    assert has_row(shown, "[bold]box", "-"), "class names are not markup"


def test_evaluation_of_a_file_without_known_parameters(runs: Any) -> None:
    result = dataclasses.replace(runs.results["run_eval"], parameters=None)
    assert "- parameters, 4.9 MB" in text(render.format_evaluation(result))


def test_a_probe_shows_levels_and_region_embedding(runs: Any) -> None:
    shown = text(render.format_pyramid(runs.results["run_probe"]))
    assert "teacher.pt: two-stage, torchvision, 41.00 M parameters" in shown
    assert "probed with 480 x 640 pixels; called as list of images" in shown
    assert "classes: disc, box" in shown
    assert has_row(shown, "p2", "256", "120 x 160", "4", "2, 2.5", "0.1", "1.5")
    assert has_row(shown, "p3", "256", "60 x 80", "8", "4", "not finite", "not finite")
    assert "region embedding: channels 1024, name roi_heads.box_head" in shown


def test_a_long_name_breaks_at_its_dots(runs: Any) -> None:
    report = runs.results["run_probe"]
    level = dataclasses.replace(report.levels[0], name="backbone.projector.layers.0\x1b", module="neck.out")
    shown = text(render.format_pyramid(dataclasses.replace(report, levels=(level,))))
    assert has_row(shown, "backbone.", "256", "120 x 160", "4", "2, 2.5", "0.1", "1.5")
    for line in ("projector.", "layers.0\\x1b", "(neck.out)"):
        assert has_row(shown, line)


def test_a_line_break_in_a_class_name_is_shown(runs: Any) -> None:
    metrics = dataclasses.replace(runs.results["run_eval"].metrics, per_class={"disc\nforged row": 1.0})
    shown = text(render.format_evaluation(dataclasses.replace(runs.results["run_eval"], metrics=metrics)))
    assert has_row(shown, "disc\\nforged row", "1.0")


def test_a_probe_of_an_unknown_model(runs: Any) -> None:
    report = dataclasses.replace(runs.results["run_probe"], classes=(), region_embedding=None)
    shown = text(render.format_pyramid(report))
    assert "classes: unknown" in shown
    assert "region embedding: none" in shown


def test_a_plan_shows_pair_pyramids_terms_and_cost(runs: Any) -> None:
    shown = text(render.format_plan(runs.results["plan_distill"]))
    assert "tiny: homogeneous: two-stage -> two-stage" in shown
    assert shown.count("120 x 160") == 2
    assert has_row(shown, "sgfi", "1", "configured")
    assert has_row(shown, "class_kd", "left out", "the class lists differ")
    for line in (
        "head transfer: nothing: shapes differ",
        "losses of one step, before their weights: loss 3.21  sgfi 0.5",
        "600 steps of 8 images",
        "1200 training images, 200 validation images",
        "cpu, fp32, 2 threads; peak memory 812 MB",
        "0.53 s per step, about 5 min 18 s in total",
        "teacher: 91 classes",
    ):
        assert line in shown.splitlines()


def test_a_plans_pyramids_stand_side_by_side_where_there_is_room(runs: Any) -> None:
    shown = text(render.format_plan(runs.results["plan_distill"]), width=160)
    assert any(line.count("120 x 160") == 2 for line in shown.splitlines())


def test_a_profile_shows_phases_and_the_ratio(runs: Any) -> None:
    shown = text(render.format_profile(runs.results["profile_distill"]), width=200)
    assert has_row(shown, "backward", "200.0", "50.0 %")
    assert "a distillation step takes 400.0 ms (median of 20; cpu, 2 threads)" in shown
    assert "take 300.0 ms; a distillation step takes 1.30 times as long" in shown


@pytest.mark.parametrize(("passed", "word"), [(True, "ok"), (False, "FAILED")])
def test_an_export_shows_parity_and_never_breaks_a_path(runs: Any, passed: bool, word: str) -> None:
    result = runs.results["run_export"]
    (file,) = result.files
    path = Path("/".join(["a-long-folder-name"] * 10)) / "student.onnx"
    parity = dataclasses.replace(file.parity, passed=passed)
    shown = text(
        render.format_export(dataclasses.replace(result, files=(dataclasses.replace(file, path=path, parity=parity),)))
    )
    assert f"{path}  onnx, 4.9 MB, by torch.onnx, opset 17" in shown
    assert (
        f"  parity {word}: 57 detections on 8 images (1 without detections), boxes within 0.0004 pixels, "
        "scores within 2e-06"
    ) in shown


def test_the_demo_shows_three_rows_gain_and_verdict(runs: Any) -> None:
    shown = text(render.format_demo(runs.results["run_demo"]))
    for name in ("teacher", "student", "distilled"):
        assert has_row(shown, name, "31.2", "50.1", "-", "30.0", "40.5", "1.23 M", "4.9", "12.3")
    assert "gain from distillation: +2.5 AP at 300 steps (seed 0)" in shown
    assert "ONNX file matches the detector: yes" in shown
    assert "Distillation helped." in shown
    assert "image demo/image.png" in shown


def test_json_spreads_metrics_and_has_no_nan(runs: Any, metrics: CocoMetrics) -> None:
    result = dataclasses.replace(
        runs.results["run_train"], metrics=dataclasses.replace(metrics, ap=float("nan")), seconds=float("inf")
    )
    plain = to_json(result)
    assert (plain["run"], plain["AP"], plain["AP50"], plain["seconds"]) == ("runs/tiny", None, 50.1, None)
    assert "metrics" not in plain


def test_a_table_of_methods(runs: Any) -> None:
    compared = runs.results["run_compare"]
    shown = text(format_comparison(compared))
    table = shown[: shown.index("teacher: AP")]
    assert max(map(len, table.splitlines())) <= 80
    assert "500 steps" in table
    assert "seeds and images" in table
    assert "folds" in text(format_comparison(dataclasses.replace(compared, interval_over="folds")))
    assert "to none" in shown and "to sgfi" in text(format_comparison(dataclasses.replace(compared, baseline="sgfi")))
    assert has_row(shown, "none", "31.0 ± 1.4", "-", "-", "-", "-")
    assert has_row(shown, "none", "30.0 / 32.0", "-", "33.3", "-")
    assert has_row(shown, "sgfi+ckd", "36.5 ± 0.7", "+5.5", "+4.2 … +6.9", "0.25", "812")
    assert has_row(shown, "sgfi+ckd", "36.0 / 37.0", "-", "-", "-")
    assert has_row(shown, "pkd", "not run")
    assert "teacher: AP 52.8" in shown
    assert "plain training gains +0.4 AP from 250 to 500 steps: on its plateau" in shown
    assert "out/table.csv  out/trials.csv  out/comparison.png" in shown


# -------------------------------------------------------------------------------------------------------- narration


def narrated(*events: Event, terminal: bool, width: int = 120) -> str:
    stream = io.StringIO()
    console = Console(
        file=stream, force_terminal=terminal, width=width, markup=False, highlight=False, color_system=None
    )
    with narration(console) as observer:
        for event in events:
            observer(event)
    return stream.getvalue()


def test_elsewhere_each_event_is_one_plain_line(metrics: CocoMetrics) -> None:
    labelled = ImagesDone("labelled", 1200, 40_000)
    events = (Phase("student"), labelled, Note("wrote [b]" + "x" * 200), STEP, Evaluated(20, metrics))
    shown = narrated(*events, terminal=False)
    assert shown.splitlines() == [
        "== student",
        "labelled 1,200 of 40,000 images",
        "wrote [b]" + "x" * 200,
        "step 20/600  35.2 images/s  1 min 20 s left  loss 1.23  sgfi 0.5  ckd 0.25  lr 0.001",
        f"step 20: {render.format_metrics(metrics)}",
    ]


def test_what_is_left_of_a_table() -> None:
    title = "sgfi, 500 steps, seed 0"
    done = (TrialDone(title, 23.4, 2, 310.0), TrialDone(title, None, 1, None), TrialDone(title, 23.4, 0, 0.0))
    assert narrated(*done, terminal=False).splitlines() == [
        f"{title}: AP 23.4; 2 to go, about 5 min 10 s",
        f"{title}: AP -; 1 to go",
        f"{title}: AP 23.4",
    ]


def test_a_terminal_shows_a_bar_for_each_phase_and_lines_above_it(metrics: CocoMetrics) -> None:
    last = dataclasses.replace(STEP, step=600, eta_seconds=0.0)
    events = (STEP, Phase("student"), STEP, Note("half way"), Evaluated(20, metrics), last, Phase("distilled"), STEP)
    shown = narrated(*events, terminal=True)
    assert "\x1b[?25l" in shown
    final = shown[shown.rindex("training") :]
    training, student, distilled = (line.split() for line in final.splitlines()[:3])
    assert (training[0], student[0], distilled[0]) == ("training", "student", "distilled")
    assert "600/600" in student
    assert " ".join(distilled[2:]) == "20/600 35.2 images/s 1 min 20 s left loss 1.23 sgfi 0.5 ckd 0.25"
    assert "half way\n" in shown
    assert f"step 20: {render.format_metrics(metrics)}\n" in shown


def test_the_bar_of_a_phase_shows_its_last_and_its_best_ap(metrics: CocoMetrics) -> None:
    lower = dataclasses.replace(metrics, ap=12.34)
    shown = narrated(Evaluated(10, metrics), STEP, Evaluated(20, lower), STEP, terminal=True)
    final = shown[shown.rindex("training") :].splitlines()[0]
    assert f"left  AP 12.3 (best {metrics.ap:.1f})  loss 1.23" in final
    again = narrated(Evaluated(10, metrics), Phase("student"), STEP, terminal=True)
    assert "left  loss 1.23" in again[again.rindex("student") :]


def test_a_terminal_shows_images_as_a_bar_until_their_work_is_done() -> None:
    progress = Progress(console=Console(file=io.StringIO()))
    bar = _Bar(progress)
    for event in (ImagesDone("evaluated", 1200, 40_000), ImagesDone("evaluated", 30_000, 40_000)):
        bar(event)
        (task,) = progress.tasks
        assert (task.description, task.completed, task.total) == ("evaluated", event.done, 40_000)
    bar(STEP)
    (task,) = progress.tasks
    assert task.description == "training"
    assert "evaluated" not in narrated(STEP, ImagesDone("evaluated", 1200, 40_000), terminal=True)


@pytest.mark.parametrize(
    ("variables", "first"),
    [
        ({}, True),
        ({"RANK": "0", "LOCAL_RANK": "0"}, True),
        ({"RANK": "1", "LOCAL_RANK": "1"}, False),
        ({"RANK": "8", "LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1"}, False),
    ],
)
def test_only_rank_0_speaks(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], first: bool) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert is_first_process() == first
    assert bool(narrated(Note("hello"), terminal=False)) == first
