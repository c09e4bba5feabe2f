"""The device, CPU threads and environment of a run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter

import psutil
import torch
from torch.nn.functional import conv2d

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

_PACKAGES = (
    "gdetkd",
    "torch",
    "torchvision",
    "accelerate",
    "faster-coco-eval",
    "onnx",
    "onnxruntime",
    "numpy",
    "pillow",
)


@dataclass(frozen=True)
class ComputeSettings:
    """Resolved settings of where and how a run computes.

    Attributes:
        device: ``cpu`` or ``cuda``.
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast).
        compile: torch.compile the backbones.
        threads: CPU threads of this process.
    """

    device: str
    precision: str
    channels_last: bool
    compile: bool
    threads: int
    workers: int


def count_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def choose_thread_count(local_processes: int | None = None) -> int:
    """Measures whether one CPU thread or one per core is faster on a small convolution.

    If other programs use the cores, threads that wait for each other are slower than a single one.

    Args:
        local_processes: processes that share this machine's cores; None: as many as the launcher started.
    """
    sharing = local_processes or int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    most = max(1, min(16, count_cores() // sharing))
    if most == 1:
        return 1
    return min((most, 1), key=_time_convolution)


def _time_convolution(threads: int) -> float:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    x, weight = torch.ones(8, 48, 32, 32), torch.ones(48, 48, 3, 3)
    times = []
    for _ in range(12):
        start = perf_counter()
        conv2d(x, weight, padding=1)
        times.append(perf_counter() - start)
    torch.set_num_threads(before)
    return sorted(times)[len(times) // 2]


def describe_environment(settings: ComputeSettings, seed: int, processes: int) -> dict[str, object]:
    """Everything except the recipe that a result depends on."""
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: number for name in _PACKAGES if (number := _find_version(name)) is not None},
        "device": torch.cuda.get_device_name() if settings.device == "cuda" else platform.processor() or "cpu",
        "precision": settings.precision,
        "threads": settings.threads,
        "workers": settings.workers,
        "processes": processes,
        "seed": seed,
        "git_revision": _read_git_revision(),
    }


def _find_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _read_git_revision() -> str | None:
    """The git revision of the current folder, with ``-dirty`` if it has uncommitted changes."""
    try:
        result = subprocess.run(
            # The folder's own configuration may name a program as core.fsmonitor. S607: git is where the PATH has it.
            ["git", "-c", "core.fsmonitor=false", "describe", "--always", "--dirty", "--abbrev=40"],  # noqa: S607
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            cwd=Path.cwd(),
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def get_peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far, of the device's allocator or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return psutil.Process().memory_info().peak_wset / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
