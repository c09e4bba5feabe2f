"""Converts networks to every form that probing reads, and calls probing on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from gdetkd_cli.probing.formats.files import detect_kind, open_runner
from gdetkd_cli.probing.formats.runner import ModuleRunner, Runner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.pyramid import Probed, probe

SIZE = (192, 256)


def to_script(model: nn.Module) -> nn.Module:
    return torch.jit.script(model)


def to_trace(model: nn.Module) -> nn.Module:
    return torch.jit.trace(model, torch.rand(1, 3, *SIZE))


def to_frozen(model: nn.Module) -> nn.Module:
    return torch.jit.freeze(torch.jit.trace(model, torch.rand(1, 3, *SIZE)))


def to_exported(model: nn.Module, example: Tensor | None = None) -> Runner:
    images = torch.rand(1, 3, *SIZE) if example is None else example
    with NamedTemporaryFile(suffix=".pt2") as file:
        torch.export.save(torch.export.export(model, (images,)), file.name)
        return open_runner(Path(file.name), detect_kind(Path(file.name)))


def to_onnx(model: nn.Module, example: Tensor | None = None) -> Runner:
    images = torch.rand(1, 3, *SIZE) if example is None else example
    with NamedTemporaryFile(suffix=".onnx") as file:
        torch.onnx.export(model, (images,), file.name, dynamo=False)
        return open_runner(Path(file.name), detect_kind(Path(file.name)))


FORMATS: dict[str, Callable[[nn.Module], nn.Module | Runner]] = {
    "eager": lambda model: model,
    "scripted": to_script,
    "traced": to_trace,
    "frozen": to_frozen,
    "exported": to_exported,
    "onnx": to_onnx,
}


def run(model: Any, size: tuple[int, int] = SIZE) -> Probed:
    return probe(ModuleRunner(model) if isinstance(model, nn.Module) else model, size, ModelInput())


def build(twin: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return twin().eval()
