"""Two processes on one machine (gloo): one run folder, a gathered queue, one stream of output."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import toy

from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.recipe.load import dump_recipe


def test_two_processes_distil_one_student(tmp_path: Path) -> None:
    # A dense student's regions depend on the truth, so the two processes have different numbers of them.
    recipe = tmp_path / "toy.yaml"
    recipe.write_text(dump_recipe(toy.recipe(student="retinanet", steps=4, checkpoint_every=2)))
    run = tmp_path / "run"
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "gdetkd_cli", "distill", "--recipe", str(recipe), "--output", str(run), "--json"]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = json.loads(done.stdout)  # one document: the second process says nothing
    assert printed["run"] == str(run)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["run"]
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2, 3, 4]
    assert json.loads((run / "environment.json").read_text())["processes"] == 2

    saved = torch.load(run / "resume" / "step-00000002" / "state.pt", weights_only=True)["distiller"]
    name = next(key for key in saved if key.endswith("queue.written"))
    written, ids = int(saved[name]), saved[name.replace("written", "image_ids")]
    # 2 steps x 2 processes x 2 images, at most 8 regions each: one process alone could not have written as many.
    assert written > 2 * 2 * 8
    assert len(set(ids[ids > 0].tolist())) > 4


def test_two_processes_stop_after_the_same_step(tmp_path: Path) -> None:
    recipe, run = tmp_path / "toy.yaml", tmp_path / "run"
    recipe.write_text(dump_recipe(toy.recipe(student="retinanet", steps=400, checkpoint_every=1000)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "gdetkd_cli", "distill", "--recipe", str(recipe), "--output", str(run), "--resume", "auto"]
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        log_lines = run / "metrics.jsonl"
        while process.poll() is None and not (log_lines.exists() and log_lines.read_text().count("\n") >= 2):
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)  # the launcher passes it on to both
        process.wait(timeout=120)
    checkpoint = RunFolder(run).checkpoints().open_latest()
    assert checkpoint is not None, (tmp_path / "log.txt").read_text()[-3000:]
    assert checkpoint.progress.processes == 2
    step = checkpoint.progress.step
    assert 2 <= step < 400
    lines = [json.loads(line)["step"] for line in log_lines.read_text().splitlines()]
    assert lines == list(range(1, step + 1))
