"""What does not fit into memory is refused with its field, its amount and what is free."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gdetkd_cli.assembly.data import build_batches
from gdetkd_cli.cli.app import describe_error
from gdetkd_cli.data.synthetic import draw_split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.errors import MemoryLimitError
from gdetkd_cli.memory import check_memory
from gdetkd_cli.methods.queue import RegionQueue
from gdetkd_cli.probing.pyramid import probe_image
from gdetkd_cli.recipe.load import load_recipe


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    """One gigabyte is free."""
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**9))


def _build_batches(*changes: str) -> None:
    split = draw_split(split="train", images=8, size=64, seed=0)
    settings = ComputeSettings(device="cpu", precision="fp32", channels_last=False, compile=False, threads=1, workers=0)
    build_batches(load_recipe("shapes/teacher", changes), split, settings, rank=0, world_size=1)


@pytest.mark.usefixtures("free")
def test_the_boundary_is_what_is_free() -> None:
    check_memory("x", 10**9)
    with pytest.raises(MemoryLimitError, match=r"^x needs at least 2\.0 GB of memory, and 1\.0 GB are free; lower it$"):
        check_memory("x", 2 * 10**9)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize(
    ("ask", "asker"),
    [
        (
            lambda: draw_split(split="train", images=10**6, size=64, seed=0),
            "data.train_images: 1000000 scenes of 64 x 64 pixels",
        ),
        (lambda: RegionQueue(size=10**8, channels=1024), "distill.ckd.queue: 100000000 embeddings of 1024 channels"),
        (
            lambda: _build_batches("train.batch_size=100000"),
            "train.batch_size: 100000 images of 4,096 pixels on average",
        ),
        (lambda: probe_image((9999, 9999)), r"an image of 9999 x 9999 pixels \(height x width\)"),
    ],
    ids=["scenes", "queue", "batch", "image"],
)
def test_what_asks_for_too_much_is_named(ask: Callable[[], Any], asker: str) -> None:
    with pytest.raises(MemoryLimitError, match=rf"^{asker} needs at least [\d.,]+ GB of memory, and 1\.0 GB are free"):
        ask()


@pytest.mark.usefixtures("free")
def test_a_detector_that_does_not_fit_is_not_built(tiny_description: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(
        MemoryLimitError, match=r"a detector with .*pyramid_channels 8192.* and 1 classes needs at least"
    ):
        catalog.build(tiny_description("fcos", pyramid_channels=8192), ("a",))


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "memory ran out; "),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes."),
            "memory ran out for 4,000.0 GB; ",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "memory ran out; "),
    ],
)
def test_exhausted_memory_is_one_sentence(error: Exception, sentence: str) -> None:
    message, code = describe_error(error)
    assert sentence in message
    assert "lower train.batch_size" in message
    assert "\n" not in message
    assert code == 1


KILLED = """
import multiprocessing, os, signal
import typer
from gdetkd_cli.cli.app import app
from gdetkd_cli.data.dataset import DetectionDataset
from gdetkd_cli.data.loader import load_training_batches
from gdetkd_cli.data.synthetic import draw_split


@app.command("read")
def read() -> None:
    split = draw_split(split="train", images=8, size=64, seed=0)
    dataset = DetectionDataset(split=split, augmentation=None, seed=0, cache_mb=0)
    batches = load_training_batches(dataset=dataset, batch_size=2, steps=10**6, seed=0, workers=1)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    for _ in batches:
        pass


app(["read"], prog_name="gdetkd")
"""


def test_a_loader_process_that_is_killed_is_one_sentence() -> None:
    # In a process of its own: torch raises wherever the signal of the ended process arrives.
    ended = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: a data loader process was ended from outside (")
    assert "lower runtime.workers" in ended.stderr
    assert ended.stderr.count("\n") == 1
