"""TorchScript files that were traced with one image, whose size became a constant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from gdetkd_cli.commands.probe import ProbeOptions, run_probe
from gdetkd_cli.errors import ModelError
from gdetkd_cli.probing.formats.files import open_runner


class Fixed(nn.Module):
    """A pyramid of two levels, whose heads reshape to a number of cells that a trace fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=8, padding=1)
        self.down = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.head = nn.Conv2d(8, 6, 1)

    def forward(self, images: Tensor) -> Tensor:
        fine = torch.relu(self.stem(images))
        coarse = torch.relu(self.down(fine))
        heads = [self.head(level) for level in (fine, coarse)]
        return torch.cat([h.view(1, 6, int(h.shape[-2]) * int(h.shape[-1])) for h in heads], dim=2)


def write(path: Path, side: int) -> str:
    torch.manual_seed(0)
    torch.jit.trace(Fixed().eval(), torch.rand(1, 3, side, side), check_trace=False).save(str(path))
    return str(path)


@pytest.mark.parametrize("side", [96, 224, 320])
def test_the_size_of_the_trace_is_found(tmp_path: Path, side: int) -> None:
    report = run_probe(write(tmp_path / "m.pt", side))
    assert report.size == (side, side)
    assert [level.shape for level in report.levels] == [(side // 8, side // 8), (side // 16, side // 16)]
    for level, stride in zip(report.levels, (8, 16), strict=True):
        assert level.stride == pytest.approx((stride, stride), rel=1e-6)


def test_a_named_size_counts(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no known way of calling"):
        run_probe(write(tmp_path / "m.pt", 72), ProbeOptions())  # not a usual size
    assert run_probe(str(tmp_path / "m.pt"), ProbeOptions(size=(72, 72))).levels[0].shape == (9, 9)


def test_a_module_of_any_size_has_none(tmp_path: Path) -> None:
    torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())).save(str(tmp_path / "any.pt"))
    assert open_runner(tmp_path / "any.pt", "torchscript").size is None
