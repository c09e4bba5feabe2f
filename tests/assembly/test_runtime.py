"""Every ``auto`` of how a recipe is run."""

from __future__ import annotations

import pytest
import torch
import toy
from torch import nn

from gdetkd_cli.assembly import apply_runtime, build_detector, resolve_runtime
from gdetkd_cli.errors import ModelError
from gdetkd_cli.recipe.schema import ComposedDetector, Runtime


def _runtime(**fields: object) -> Runtime:
    return Runtime.model_validate({"threads": 1, **fields})


def _card(monkeypatch: pytest.MonkeyPatch, major: int) -> None:
    """A CUDA device of compute capability ``major``; bfloat16 is in cards from 8 on, and emulated before."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or major >= 8
    )


@pytest.mark.parametrize(("major", "precision"), [(7, "fp32"), (8, "bf16")])
def test_precision_is_what_the_card_computes_in(monkeypatch: pytest.MonkeyPatch, major: int, precision: str) -> None:
    _card(monkeypatch, major)
    settings = resolve_runtime(_runtime())
    assert (settings.device, settings.precision, settings.workers) == ("cuda", precision, 4)
    assert resolve_runtime(_runtime(precision="fp16")).precision == "fp16"


def test_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    _card(monkeypatch, 8)
    settings = resolve_runtime(_runtime(device="cpu"))
    assert (settings.device, settings.precision, settings.workers) == ("cpu", "fp32", 0)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"device": "cuda"}, "runtime.device is cuda, but this machine has no CUDA device"),
        ({"precision": "fp16"}, "runtime.precision is fp16, which needs CUDA; on a CPU set it to auto, bf16 or fp32"),
    ],
)
def test_what_a_machine_has_not_is_refused(
    monkeypatch: pytest.MonkeyPatch, fields: dict[str, object], sentence: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelError, match=sentence):
        resolve_runtime(_runtime(**fields))


@pytest.mark.parametrize(("width", "last"), [(8, False), (16, True)])
def test_slim_networks_keep_the_usual_memory_format_on_a_cpu(width: int, last: bool) -> None:
    """oneDNN would write outside its memory in their backward."""
    student = build_detector(ComposedDetector.model_validate(toy.detector("fcos", width)), ("a",), seed=0).detector
    settings = resolve_runtime(_runtime(device="cpu", channels_last=True))
    apply_runtime(settings, toy.recipe(), student, None, torch.device("cpu"))
    weights = [part.weight for part in student.module.modules() if isinstance(part, nn.Conv2d)]
    square = next(weight for weight in weights if weight.shape[-1] == 3 and weight.shape[1] > 3)
    assert square.is_contiguous(memory_format=torch.channels_last) == last
