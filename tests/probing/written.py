"""Writes networks to files, and opens them as detectors and for probing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from twins import SharedHead

from gdetkd_cli.commands.probe import ProbeOptions, run_probe
from gdetkd_cli.detectors.probed import ProbedDetector
from gdetkd_cli.engine.events import Event, Note
from gdetkd_cli.probing.formats.files import detect_kind, open_runner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.structures import Batch

SIZE = (96, 128)
CLASSES = ("a", "b", "c")


def script(model: nn.Module, path: Path, _: Any) -> None:
    torch.jit.script(model).save(str(path))


def trace(model: nn.Module, path: Path, example: tuple[Tensor, ...]) -> None:
    torch.jit.trace(model, example, check_trace=False).save(str(path))


def freeze(model: nn.Module, path: Path, example: tuple[Tensor, ...]) -> None:
    torch.jit.freeze(torch.jit.trace(model, example, check_trace=False)).save(str(path))


def export(model: nn.Module, path: Path, example: tuple[Tensor, ...]) -> None:
    torch.export.save(torch.export.export(model, example), path)


def to_onnx(model: nn.Module, path: Path, example: tuple[Tensor, ...], **options: Any) -> None:
    torch.onnx.export(model, example, path, dynamo=False, **options)


WRITERS: dict[str, Callable[..., None]] = {"traced": trace, "frozen": freeze, "exported": export, "onnx": to_onnx}


def open_detector(path: Path, model_input: ModelInput | None = None) -> ProbedDetector:
    return ProbedDetector(
        runner=open_runner(path, detect_kind(path)),
        source=str(path),
        kind=detect_kind(path),
        model_input=model_input or ModelInput(),
        size=SIZE,
        class_names=CLASSES,
    )


def draw(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(3, *SIZE, generator=generator) for _ in range(count)]


def read_maps(detector: ProbedDetector, images: list[Tensor]) -> tuple[Tensor, ...]:
    return detector.extract_features(Batch(images=images, targets=[], image_ids=torch.arange(len(images)))).pyramid.maps


@torch.no_grad()
def expect_maps(neck: nn.Module, images: Tensor) -> list[Tensor]:
    return neck(images)


def probe_notes(path: Path, options: ProbeOptions | None = None) -> list[str]:
    notes: list[str] = []

    def keep(event: Event) -> None:
        if isinstance(event, Note):
            notes.append(event.text)

    run_probe(str(path), options or ProbeOptions(size=SIZE), observer=keep)
    return notes


class Detecting(nn.Module):
    """Boxes of each cell, whose right corner is the image's mean times 64; two cells have a score, of classes 0, 1."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SharedHead()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.decode(images, images.mean(dim=(1, 2, 3)) * 64)

    def decode(self, images: Tensor, corner: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cells = self.inner(images).transpose(1, 2)
        zeros = cells[..., 0] * 0
        number = (zeros + 1).cumsum(dim=1)
        boxes = torch.stack([zeros, zeros, zeros + corner[:, None], zeros + 32], dim=2)
        return boxes, (number == 1) * 0.9 + (number == 2) * 0.5, (number > 1).long()
