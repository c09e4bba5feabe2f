"""How a network is called, and which models have no pyramid."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from forms import FORMATS, SIZE, build, run, to_exported, to_onnx
from torch import Tensor, nn
from twins import Body, SharedHead

from gdetkd_cli.errors import ModelError, NoPyramidError
from gdetkd_cli.probing.formats.runner import ModuleRunner, Runner, find_reason, list_calls
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.pyramid import probe


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes = Body(), nn.Linear(16, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classes(self.body(x)[2].mean(dim=(2, 3)))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMATS)
def test_a_classifier_has_no_pyramid(form: str) -> None:
    with pytest.raises(NoPyramidError, match="one prediction per image, like a classifier"):
        run(FORMATS[form](build(Classifier)))


def test_model_without_convolution_has_no_pyramid() -> None:
    with pytest.raises(NoPyramidError, match="no convolution reads an image"):
        run(build(lambda: nn.Sequential(nn.Flatten(2), nn.Linear(192 * 256, 4))))


class Sequence(nn.Module):
    """Reads rows of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.LSTM(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.rows(x)[0]
        return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["eager", "traced", "exported", "onnx"])
def test_model_of_sequences_has_no_pyramid(form: str) -> None:
    model, example = build(Sequence), torch.rand(7, 1, 5)
    convert: dict[str, Callable[[], object]] = {
        "eager": lambda: model,
        "traced": lambda: torch.jit.trace(model, example),
        "exported": lambda: to_exported(model, example),
        "onnx": lambda: to_onnx(model, example),
    }
    with pytest.raises(NoPyramidError, match="no convolution reads an image"):
        run(convert[form]())


class Strict(nn.Module):
    """Takes one image, and raises its own error for anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SharedHead()

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != 3:
            raise ValueError("expected one image")
        return self.inner(x[None])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["eager", "scripted"])
def test_next_call_follows_one_that_raises(form: str) -> None:
    model = FORMATS[form](build(Strict))
    assert run(model).call.name == "one (3, H, W) image"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("The following operation failed.\n  Traceback\nRuntimeError: sizes differ\n", "sizes differ"),
        ("Traceback\nbuiltins.ValueError: images is expected to be a list", "images is expected to be a list"),
        ("forward() Expected a value of type 'Tensor'\nPosition: 1", "forward() Expected a value of type 'Tensor'"),
        ("", "RuntimeError"),
    ],
)
def test_the_reason_of_an_error(text: str, reason: str) -> None:
    assert find_reason(RuntimeError(text)) == reason


def test_error_lists_the_failed_calls() -> None:
    with pytest.raises(ModelError, match=r"192 x 256 pixels .*list of .*tensor: .*to have 1 channels.*with --size"):
        run(build(lambda: nn.Conv2d(1, 1, 3)))


class LastBgr(nn.Module):
    """Takes (N, H, W, 3), blue first."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = SharedHead()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.inner(x.permute(0, 3, 1, 2).flip(1))
        return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["eager", "exported", "onnx"])
def test_channels_last_and_blue_first(form: str) -> None:
    model = build(LastBgr)
    example = torch.rand(1, *SIZE, 3)
    if form == "eager":
        runner: Runner = ModuleRunner(model, calls=list_calls(last=True))
    elif form == "exported":
        runner = to_exported(model, example)
    else:
        runner = to_onnx(model, example)
    model_input = ModelInput(bgr=True)
    found = probe(runner, SIZE, model_input)

    assert found.call.name.endswith("H, W, 3) tensor")
    image = torch.rand(3, *SIZE)
    with torch.no_grad():
        expected = model.inner.neck(image[None])
    _, maps = runner.read(found.call, [model_input.prepare(image)], [level.address for level in found.levels])
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
