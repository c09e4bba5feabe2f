"""Two processes on one machine (gloo): one run folder, a gathered queue, one stream of output."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
import toy

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
