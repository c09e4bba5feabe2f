"""Resolves a recipe's runtime block and applies it: device, precision, memory format, threads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from gdetkd_cli.assembly.distillation import BuiltPair
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.device import ComputeSettings, choose_thread_count
from gdetkd_cli.errors import ModelError
from gdetkd_cli.recipe.schema import Recipe, Runtime


def resolve_runtime(runtime: Runtime, *, local_processes: int | None = None) -> ComputeSettings:
    """Replaces every ``auto``.

    Args:
        local_processes: number of processes that share this machine's cores; None: those that the launcher started.

    Raises:
        ModelError: the block requires CUDA, which this machine lacks.
    """
    cuda = torch.cuda.is_available()
    if runtime.device == "cuda" and not cuda:
        raise ModelError("runtime.device is cuda, but this machine has no CUDA device; set it to auto or cpu")
    device = "cuda" if cuda and runtime.device != "cpu" else "cpu"
    on_cuda = device == "cuda"
    if runtime.precision == "fp16" and not on_cuda:
        raise ModelError("runtime.precision is fp16, which needs CUDA; on a CPU set it to auto, bf16 or fp32")
    precision: str = runtime.precision
    if precision == "auto":  # bf16 only on GPUs with bf16 units (Ampere and later); emulated, it is slower than fp32
        precision = "bf16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return ComputeSettings(
        device=device,
        precision=precision,
        channels_last=True if runtime.channels_last == "auto" else runtime.channels_last,
        compile=runtime.compile,
        threads=choose_thread_count(local_processes) if runtime.threads == "auto" else runtime.threads,
        workers=(4 if on_cuda else 0) if runtime.workers == "auto" else runtime.workers,
    )


def apply_runtime(
    settings: ComputeSettings, recipe: Recipe, student: Detector, pair: BuiltPair | None, device: torch.device
) -> None:
    """Applies device, memory format and compilation to the networks.

    Raises:
        ModelError: a network has no backbone to compile.
    """
    detectors = [student] + ([pair.distiller.teacher] if pair and pair.distiller.teacher else [])
    for detector in detectors:
        module: Any = detector.module.to(device)
        set_memory_format(module, settings)
        _ = detector.levels  # measure the levels before the network is compiled or wrapped
        if settings.compile and not isinstance(module, torch.jit.ScriptModule):  # a ScriptModule is compiled already
            if not isinstance(getattr(module, "backbone", None), nn.Module):
                raise ModelError(
                    f"runtime.compile compiles the `backbone` of a detector, and {type(module).__name__} has none; set "
                    "runtime.compile to false"
                )
            module.backbone.compile(dynamic=True)
    if pair is not None:
        pair.distiller.to(device)
    if recipe.augment.multi_scale:
        # The loader resizes the images, so training skips the detectors' own resize. Inference keeps it.
        size = find_image_size(student.module)
        for detector in detectors:
            # A teacher for another size keeps its resize: its features are best there, and boxes are mapped.
            if size is not None and find_image_size(detector.module) == size:
                transform: Any = detector.module.transform
                transform._skip_resize = True


def resize_again(detectors: Iterable[Detector]) -> None:
    """Makes detectors resize all images again, those of validation among them, once a run has ended."""
    for detector in detectors:
        if find_image_size(detector.module) is not None:
            transform: Any = detector.module.transform
            transform._skip_resize = False


def set_memory_format(module: nn.Module, settings: ComputeSettings) -> None:
    """Lays out a network's weights channels last, if the settings say so and training survives it."""
    if settings.channels_last and not (settings.device == "cpu" and _breaks_channels_last(module)):
        module.to(memory_format=torch.channels_last)


def _breaks_channels_last(module: nn.Module) -> bool:
    """Whether oneDNN (3.12) writes outside its memory in the backward of one of these convolutions, channels last."""
    return any(
        isinstance(part, nn.Conv2d) and part.kernel_size == (1, 1) and max(part.stride) > 1 and part.in_channels < 16
        for part in module.modules()
    )


def find_image_size(module: Any) -> tuple[Any, int] | None:
    """Returns a torchvision detector's short sides and maximum long side in pixels.

    None for other modules, and for an SSD, whose boxes belong to images of one size.
    """
    transform = getattr(module, "transform", None)
    if not isinstance(transform, GeneralizedRCNNTransform) or transform.fixed_size is not None:
        return None
    return tuple(transform.min_size), transform.max_size
