"""Device, precision, memory format, threads: every ``auto`` of a recipe's runtime block decided and applied."""

from __future__ import annotations

from typing import Any

import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from gdetkd_cli.assembly.distillation import BuiltPair
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.device import ComputeSettings, best_thread_count
from gdetkd_cli.errors import ModelError
from gdetkd_cli.recipe.schema import Recipe, Runtime


def resolve_runtime(runtime: Runtime, *, local_processes: int | None = None) -> ComputeSettings:
    """Every ``auto`` decided.

    Args:
        runtime: the recipe's block.
        local_processes: how many processes share this machine's cores; None: as many as the launcher started.

    Raises:
        ModelError: CUDA is asked for where there is none, or a precision that only CUDA has.
    """
    cuda = torch.cuda.is_available()
    if runtime.device == "cuda" and not cuda:
        raise ModelError("runtime.device is cuda, but this machine has no usable CUDA device; set it to auto or cpu")
    device = "cuda" if cuda and runtime.device != "cpu" else "cpu"
    on_cuda = device == "cuda"
    if runtime.precision == "fp16" and not on_cuda:
        raise ModelError("runtime.precision is fp16, which needs CUDA; on a CPU set it to auto, bf16 or fp32")
    return ComputeSettings(
        device=device,
        precision=_best_precision(on_cuda) if runtime.precision == "auto" else runtime.precision,
        channels_last=True if runtime.channels_last == "auto" else runtime.channels_last,
        compile=runtime.compile,
        threads=best_thread_count(local_processes) if runtime.threads == "auto" else runtime.threads,
        workers=(4 if on_cuda else 0) if runtime.workers == "auto" else runtime.workers,
    )


def _best_precision(on_cuda: bool) -> str:
    """bf16 on cards that compute in it (Ampere and later); what older ones emulate is slower than fp32."""
    return "bf16" if on_cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


def apply_runtime(
    settings: ComputeSettings, recipe: Recipe, student: Detector, pair: BuiltPair | None, device: torch.device
) -> None:
    """Puts device, memory format and compilation into effect on the networks."""
    detectors = [student] + ([pair.distiller.teacher] if pair and pair.distiller.teacher else [])
    for detector in detectors:
        module: Any = detector.module.to(device)
        if settings.channels_last:
            module.to(memory_format=torch.channels_last)
        _ = detector.levels  # measured now: neither a compiled nor a wrapped network is easy to measure
        if settings.compile and not isinstance(module, torch.jit.ScriptModule):  # which is compiled already
            module.backbone.compile(dynamic=True)
    if pair is not None:
        pair.distiller.to(device)
    if recipe.augment.multi_scale:
        # The loader sets each image's size; the detectors' own resize would undo it. It stays for inference.
        own = _image_size(student.module)
        for detector in detectors:
            # A teacher made for another size keeps its own: boxes are mapped, and its features are best there.
            if own is not None and _image_size(detector.module) == own:
                transform: Any = detector.module.transform
                transform._skip_resize = True


def _image_size(module: Any) -> tuple[Any, int] | None:
    """Short sides and longest side, in pixels, that a torchvision detector brings images to; None for others."""
    transform = getattr(module, "transform", None)
    if not isinstance(transform, GeneralizedRCNNTransform):  # a module of the user's own may resize as it likes
        return None
    return tuple(transform.min_size), transform.max_size
