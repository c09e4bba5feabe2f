"""benchmarks/gpu.py never repeats finished measurements, continues interrupted ones, and summarises the results."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from threading import Barrier
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_benchmark"] = module  # dataclasses look their module up
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPT.parent))  # where Python looks when it is run as a script
        spec.loader.exec_module(module)
    return module


def test_results_survive_a_line_that_was_cut(gpu: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    assert gpu.read_results(path) == {}
    gpu.add_result(path, "a", {"AP": 1.0})
    path.write_text(path.read_text() + '{"key": "b", "AP"')
    gpu.add_result(path, "c", {"AP": 3.0})

    assert gpu.read_results(path) == {"a": {"key": "a", "AP": 1.0}, "c": {"key": "c", "AP": 3.0}}


def test_a_slice_does_what_is_left_in_the_time_that_is_left(gpu: ModuleType, tmp_path: Path) -> None:
    clock, calls = [0.0], []

    def work(key: str, takes: float, result: Any) -> Any:
        def done(seconds: float) -> Any:
            calls.append((key, seconds))
            clock[0] += takes
            if isinstance(result, Exception):
                raise result
            return result

        return done

    parts = [
        gpu.Measurement("finished", 1, work("finished", 1, {})),
        gpu.Measurement("fails", 1, work("fails", 10, RuntimeError("no"))),
        gpu.Measurement("works", 1, work("works", 20, {"x": 1})),
        gpu.Measurement("long", 80, work("long", 90, {})),  # 70 s are left then
        gpu.Measurement("cut", 1, work("cut", 70, None)),
        gpu.Measurement("late", 1, work("late", 1, {})),
    ]
    results = tmp_path / "results.jsonl"
    gpu.add_result(results, "finished", {})
    gpu.work_on(parts, results, deadline=100.0, now=lambda: clock[0])

    assert calls == [("fails", 100.0), ("works", 90.0), ("cut", 70.0)]
    assert list(gpu.read_results(results)) == ["finished", "works"]
    left = [one.key for one in gpu.list_unfinished(parts, gpu.read_results(results))]
    assert left == ["fails", "long", "cut", "late"]


def test_a_command_that_takes_too_long_is_ended(gpu: ModuleType, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    assert gpu.run([sys.executable, "-c", "print(7)"], 60, log) == "7\n"
    assert gpu.run([sys.executable, "-c", "import time; time.sleep(60)"], 0.1, log) is None
    with pytest.raises(RuntimeError, match=r"exit code 1: ValueError: so"):
        gpu.run([sys.executable, "-c", "raise ValueError('so')"], 60, log)


def test_training_goes_on_from_its_checkpoint(gpu: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []
    folder = tmp_path / "run"

    def ended(command: list[str], seconds: float, log: Path) -> None:
        commands.append(command[3:])

    monkeypatch.setattr(gpu, "run", ended)
    start = ["train", "--recipe", "r.yaml"]
    assert gpu.train_slice(start, folder, 9.0) is None
    assert commands == [[*start, "--output", str(folder), "--resume", "auto", "--json"]]

    facts = {"AP": 1.0, "AP50": 2.0, "steps": 3, "seconds_per_step": 4.0, "peak_memory_mb": 5.0}
    folder.mkdir()
    (folder / "metrics.json").write_text(json.dumps(facts | {"more": 6}))
    assert gpu.train_slice(start, folder, 9.0) == facts
    assert len(commands) == 1


def test_the_summary_has_targets_and_dashes(gpu: ModuleType, tmp_path: Path) -> None:
    results = {
        "cost-bf16-step": {"floor": 0.2, "ratio": 1.08},
        "cost-bf16-memory-plain": {"peak_memory_mb": 1000.0},
        "cost-bf16-memory-distilled": {"peak_memory_mb": 1500.0},
        "pasted": {"bf16": 73.2, "fp32": 73.4},
    }
    for seed, ap in enumerate((10.0, 12.0)):
        trial = tmp_path / f"roi_imitation-300-{seed}"
        (trial / "run").mkdir(parents=True)
        (trial / "run" / "metrics.json").write_text(
            json.dumps({"AP": ap, "seconds_per_step": 0.25, "peak_memory_mb": 900.0})
        )
    (tmp_path / "gdetkd-300-0" / "run").mkdir(parents=True)  # still at it
    text = gpu.write_summary(results, gpu.read_bccd_trials(tmp_path))

    assert "| bf16 | 216 | 200 | 1.08 (target 1.10: met) | 1500 | 1000 | 1.50 (target 1.35: missed) |" in text
    assert "| fp32 | - | - | - | - | - | - |" in text
    assert "| 73.2 | 73.4 |" in text
    assert "| roi_imitation | 10.0, 12.0 | 11.0 | 1.4 | 0.250 | 900 |" in text
    assert "| gdetkd | - | - | - | - | - |" in text
    assert "Two processes on one device: not measured." in text
    assert "Two processes" in gpu.write_summary({}, {})


def test_every_measurement_has_its_own_name(gpu: ModuleType, tmp_path: Path) -> None:
    settings = gpu.Settings(output=tmp_path, bccd=tmp_path, device="cpu", small=True, jobs=2)
    keys = [one.key for one in gpu.list_measurements(settings)]

    assert len(keys) == len(set(keys)) == 12
    chains = {one.key: one.chain for one in gpu.list_measurements(settings)}
    assert {key for key, chain in chains.items() if chain == "timed"} == {"cost-bf16-step", "cost-fp32-step"}
    assert [key for key, chain in chains.items() if chain == "bccd"] == ["bccd-teacher", "bccd-students"]


def test_a_timed_measurement_has_the_machine_for_itself(gpu: ModuleType, tmp_path: Path) -> None:
    running, seen = set(), {}
    together = Barrier(2)  # both must run at once to pass it

    def work(key: str, meet: bool) -> Any:
        def done(seconds: float) -> dict[str, Any]:
            running.add(key)
            if meet:
                together.wait(timeout=10)
            seen[key] = set(running)
            if meet:
                together.wait(timeout=10)
            running.discard(key)
            return {}

        return done

    parts = [
        gpu.Measurement("a", 1, work("a", True)),
        gpu.Measurement("time", 1, work("time", False), "timed"),
        gpu.Measurement("b", 1, work("b", True)),
    ]
    gpu.work_on(parts, tmp_path / "results.jsonl", deadline=1e12, jobs=2)

    assert seen == {"time": {"time"}, "a": {"a", "b"}, "b": {"a", "b"}}
