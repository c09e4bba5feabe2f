"""Two processes (gloo): one run folder, a gathered queue, one stream of output; torchrun restarts them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import toy
from query_models import make_config

from gdetkd_cli.assembly import build_detector, build_split
from gdetkd_cli.commands import run_distill, run_train
from gdetkd_cli.data.loader import load_validation_batches
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.errors import RunFolderError
from gdetkd_cli.evaluation.predict import predict_split
from gdetkd_cli.evaluation.stored import read_detections
from gdetkd_cli.recipe.load import dump_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, Recipe

STEPS = 40
KILLS = int(os.environ.get("GDETKD_KILLS", "1"))  # more in `make restarts`


def make_recipe(root: Path, **train: Any) -> Recipe:
    """Five images with 1, 2, 0, 0 and 0 objects: one process often has none, and validation has an odd image.

    A dense student's regions depend on the truth, so the two processes have different numbers of them.
    """
    names = [f"{i}.png" for i in range(5)]
    toy.write_images(root / "images", names)
    tables = {
        "images": [{"id": i + 1, "file_name": name, "width": 64, "height": 64} for i, name in enumerate(names)],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"id": i, "image_id": image, "category_id": 1, "bbox": [9 * i, 8, 20, 30], "area": 600, "iscrowd": 0}
            for i, image in enumerate((2, 2, 1))
        ],
    }
    for split in ("train", "val"):
        (root / f"{split}.json").write_text(json.dumps(tables))
    fields = toy.recipe(student="retinanet", keep_checkpoints=100, **train).model_dump(mode="json")
    fields["student"]["norm"] = "frozen"
    return Recipe.model_validate(fields | {"data": {"format": "coco", "root": str(root)}})


def build_command(launch: Sequence[str], recipe: Path, run: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--monitor-interval", "0.1", *launch),
        *("-m", "gdetkd_cli", "distill", "--recipe", str(recipe), "--output", str(run), "--resume", "auto", "--json"),
    ]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """torchrun sets this for several processes on a machine, but not for one; sums depend on the number of threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two processes that nothing stopped, beside its recipe."""
    folder = tmp_path_factory.mktemp("processes")
    recipe = make_recipe(folder / "data", steps=STEPS, batch_size=1, checkpoint_every=2)
    (folder / "toy.yaml").write_text(dump_recipe(recipe))
    command = build_command(["--standalone", "--nproc-per-node", "2"], folder / "toy.yaml", folder / "run")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout)["run"] == str(folder / "run")  # one document: the second process says nothing
    return folder / "run"


def test_two_processes_distil_one_student(whole: Path) -> None:
    steps = [line["step"] for line in RunFolder(whole).read_log() if "loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert json.loads((whole / "environment.json").read_text())["processes"] == 2
    assert json.loads((whole / "metrics.json").read_text())["images"] == 5

    saved = torch.load(whole / "resume" / "step-00000002" / "state.pt", weights_only=True)["distiller"]
    (ids,) = (value for name, value in saved.items() if name.endswith("queue.image_ids"))
    assert len(set(ids[ids > 0].tolist())) == 4  # 2 steps x 2 processes x 1 image


def test_logged_losses_are_of_all_processes(whole: Path, tmp_path: Path) -> None:
    """The first step of two processes has the images of the first step of one with twice the batch."""
    recipe = make_recipe(tmp_path / "data", steps=1, batch_size=2)
    one = next(RunFolder(run_distill(recipe, output=tmp_path / "run").run).read_log())
    two = next(RunFolder(whole).read_log())
    assert two["bbox_regression"] > 0  # the image of one process has objects, that of the other has none
    for name in ("classification", "bbox_regression"):
        assert two[name] == pytest.approx(one[name], rel=1e-4), name


def test_two_processes_with_two_batches_are_one_with_four_images(tmp_path: Path) -> None:
    """The weights, their average and its statistics: of RetinaNet, whose losses are means over images."""
    options = {
        "steps": 6,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.0},
        "schedule": {"name": "constant", "warmup_steps": 0},
        "ema": 0.5,
        "evaluate_every": 2,
        "stop_after": 1,
    }
    fields = make_recipe(tmp_path / "data", batch_size=1, accumulate=2, **options).model_dump(mode="json")
    recipe = Recipe.model_validate(fields | {"distill": None, "teacher": None})
    (tmp_path / "toy.yaml").write_text(dump_recipe(recipe))
    command = build_command(["--standalone", "--nproc-per-node", "2"], tmp_path / "toy.yaml", tmp_path / "two")
    command[command.index("distill")] = "train"
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    whole = recipe.train.model_copy(update={"batch_size": 4, "accumulate": 1})
    run_train(recipe.model_copy(update={"train": whole}), output=tmp_path / "one")

    one, two = (json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("one", "two"))
    assert one["AP"] == two["AP"] == 0  # so early, that the second evaluation is no better than the first
    assert one["steps"] == two["steps"] == 4
    first, second = (torch.load(tmp_path / name / "student.pt", weights_only=True)["model"] for name in ("one", "two"))
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, atol=2e-6, rtol=1e-4, msg=name)
    logs = [[line for line in RunFolder(tmp_path / name).read_log() if "loss" in line] for name in ("one", "two")]
    for alone, together in zip(*logs, strict=True):
        assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
        assert together["gradient_norm"] == pytest.approx(alone["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_run_on_two_machines_survives_a_killed_process(number: int, whole: Path, tmp_path: Path) -> None:
    run, recipe = tmp_path / "run", whole.parent / "toy.yaml"
    rank, saved = str(number % 2), 4 + 2 * (number % 8)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "3", "--local-addr", "127.0.0.1"]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", "toy"]
    agents = [
        subprocess.Popen(build_command(launch, recipe, run), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        manifest = run / "resume" / f"step-{saved:08}" / "manifest.json"
        deadline = time.monotonic() + 200
        while not manifest.exists():
            assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents)
            time.sleep(0.01)
        written = manifest.stat().st_mtime_ns
        time.sleep(0.01 * number)  # at another point between two checkpoints
        children = [child for agent in agents for child in psutil.Process(agent.pid).children()]
        os.kill(next(child.pid for child in children if child.environ()["RANK"] == rank), signal.SIGKILL)
        messages = [agent.communicate(timeout=200)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.terminate()
            agent.wait(timeout=60)
    assert [agent.returncode for agent in agents] == [0, 0], messages
    assert sum("exitcode: -9" in text for text in messages) == 1
    assert "internal error" not in "".join(messages)
    assert manifest.stat().st_mtime_ns == written  # the run went on from a checkpoint
    assert (run / "student.pt").read_bytes() == (whole / "student.pt").read_bytes()
    logs = [[{**line, "images_per_second": 0} for line in RunFolder(path).read_log()] for path in (run, whole)]
    assert logs[0] == logs[1]


def test_machines_without_a_shared_folder_are_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    with pytest.raises(RunFolderError, match="choose an --output on a file system that all machines share"):
        folder.check_shared()
    with folder.lock():
        folder.check_shared()


def test_a_student_that_skips_parameters_without_objects(tmp_path: Path) -> None:
    """D-FINE has no denoising queries for an image without objects, so one process lacks their gradients."""
    recipe = make_recipe(tmp_path / "data", steps=3, batch_size=1, accumulate=2).model_dump(mode="json")
    recipe["student"] = {"arch": "transformers", "config": make_config("d_fine"), "image_size": [64, 96]}
    (tmp_path / "toy.yaml").write_text(dump_recipe(Recipe.model_validate(recipe)))
    command = build_command(["--standalone", "--nproc-per-node", "2"], tmp_path / "toy.yaml", tmp_path / "run")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "pretrained" / "model.safetensors").exists()

    # Its batch norms are trained, and each process has its own statistics; the first one's are written.
    data = Recipe.model_validate(recipe).data
    student = build_detector(CheckpointDetector(arch="checkpoint", path=str(tmp_path / "run")), ("a",), seed=0)
    student.detector.module.eval()
    stored = read_detections(tmp_path / "run" / "detections.npz").by_image
    batches = load_validation_batches(split=build_split(data, "val"), batch_size=1)
    for image, found in predict_split(student.detector, batches, "cpu").items():
        torch.testing.assert_close(stored[image].scores, found.scores, atol=1e-5, rtol=1e-4)
