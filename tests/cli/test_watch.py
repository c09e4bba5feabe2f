"""The curve of ``gdetkd watch``, and a log that is being written."""

from __future__ import annotations

import json
from pathlib import Path

from gdetkd_cli.cli.watch import describe_run, draw_curve
from gdetkd_cli.engine.run_folder import RunFolder


def test_curves() -> None:
    assert draw_curve([0, 7]) == "▁█"
    assert draw_curve([3, 3, 3]) == "▄▄▄"
    long = draw_curve([float(value) for value in range(1000)])
    assert len(long) == 60
    assert long[-1] == "█"


def test_a_run_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").touch()
    with RunFolder(tmp_path).lock():
        shown, running = describe_run(tmp_path)
        assert running
        assert ": running, 0 steps" in shown
        assert "AP   no evaluation yet" in shown

    line = {"step": 20, "loss": 3.0, "sgfi": 1.5, "weight/sgfi": 30.0, "lr": 0.1, "images_per_second": 5.0}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + '\n{"step": 40, "lo')
    (tmp_path / ".lock").touch()  # as a killed process leaves it
    shown, running = describe_run(tmp_path)

    assert not running
    assert "stopped, 20 steps" in shown
    assert "--resume RUN continues it" in shown
    assert "sgfi 1.5" in shown
    assert "weight" not in shown
