"""Probing finds levels that exist only as sequences of tokens or as slices of one."""

from __future__ import annotations

import pytest
import torch
from forms import FORMATS, SIZE, build, run
from token_twins import JoinedStages, SharedStageHead, SplitMemory, StageHeads
from torch import Tensor, nn

from gdetkd_cli.probing.formats.runner import ModuleRunner, Runner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.pyramid import probe

FORMS = [form for form in FORMATS if form != "scripted"]
TWINS: dict[type[nn.Module], list[int]] = {  # class -> channels of its levels
    SplitMemory: [10, 10, 10],
    StageHeads: [8, 12, 16],
    SharedStageHead: [10, 10, 10],
    JoinedStages: [10, 10, 10],
}


def read_levels(model: nn.Module | Runner, image: Tensor) -> list[Tensor]:
    """Returns the levels' maps (1, C, H, W) of an image (3, H, W)."""
    runner = ModuleRunner(model) if isinstance(model, nn.Module) else model
    found = probe(runner, SIZE, ModelInput())
    network_input, values = runner.read(found.call, [image], [level.address for level in found.levels])
    return [level.as_map(v, network_input.shape[-2:]) for v, level in zip(values, found.levels, strict=True)]


def to_map(tokens: Tensor, stride: int) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, (SIZE[0] // stride, SIZE[1] // stride))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("twin", TWINS, ids=lambda twin: twin.__name__)
def test_levels_that_are_sequences(twin: type[nn.Module], form: str) -> None:
    found = run(FORMATS[form](build(twin)))

    assert [level.channels for level in found.levels] == TWINS[twin]
    assert [level.shape for level in found.levels] == [(24, 32), (12, 16), (6, 8)]
    for level, stride in zip(found.levels, (8, 16, 32), strict=True):
        assert level.geometry.stride == pytest.approx((stride, stride), rel=1e-3)
        assert level.layout == "tokens"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["eager", "traced", "onnx"])
def test_slices_of_a_sequence(form: str) -> None:
    image = torch.rand(3, *SIZE)
    split, joined = build(SplitMemory), build(JoinedStages)
    with torch.no_grad():
        memory = joined.memory(image[None])
        expected = [to_map(part, stride) for part, stride in zip(split.slices(image[None]), (8, 16, 32), strict=True)]
    for ours, theirs in zip(read_levels(FORMATS[form](split), image), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    coarse, middle, fine = (to_map(p, s) for p, s in zip(memory.split([48, 192, 768], dim=1), (32, 16, 8), strict=True))
    for ours, theirs in zip(read_levels(FORMATS[form](joined), image), (fine, middle, coarse), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_slices_of_an_image_of_another_size() -> None:
    model = build(JoinedStages)
    runner = ModuleRunner(model)
    found = probe(runner, SIZE, ModelInput())
    image = torch.rand(3, 64, 128)
    network_input, values = runner.read(found.call, [image], [level.address for level in found.levels])
    maps = [level.as_map(v, network_input.shape[-2:]) for v, level in zip(values, found.levels, strict=True)]

    memory = model.memory(image[None]).detach()
    torch.testing.assert_close(maps[0], memory[:, 2 * 4 + 4 * 8 :].transpose(1, 2).unflatten(2, (8, 16)))
    torch.testing.assert_close(maps[2], memory[:, : 2 * 4].transpose(1, 2).unflatten(2, (2, 4)))


def test_sequences_can_be_chosen() -> None:
    runner = ModuleRunner(build(StageHeads))
    chosen = probe(runner, SIZE, ModelInput(), ["add:3", "add:1"])
    assert [(level.channels, level.shape, level.layout) for level in chosen.levels] == [
        (8, (24, 32), "tokens"),
        (12, (12, 16), "tokens"),
    ]


def test_every_slice_has_a_name() -> None:
    found = run(build(JoinedStages))
    assert [level.name for level in found.levels] == ["encoder[2]", "encoder[1]", "encoder[0]"]
    assert found.confidence == 0.5
