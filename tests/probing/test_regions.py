"""The rule that assigns regions to levels, estimated from the regions that a model pools."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign
from twins import TopDown

from gdetkd_cli.detectors.pooling import DENSE_CELLS, TWO_STAGE_CELLS
from gdetkd_cli.detectors.probed import ProbedDetector
from gdetkd_cli.probing.formats.files import detect_kind, open_runner
from gdetkd_cli.probing.formats.runner import ModuleRunner, Runner
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.pyramid import probe
from gdetkd_cli.probing.record import measure_sides
from gdetkd_cli.structures import Batch, Regions

SIZE = (256, 256)


class Pools(nn.Module):
    """Pools boxes of many sizes, each from its level by torchvision's rule."""

    def __init__(self, canonical: int) -> None:
        super().__init__()
        self.neck = TopDown()
        self.pool = MultiScaleRoIAlign(["0", "1", "2"], 3, 2, canonical_scale=canonical, canonical_level=4)
        self.classes, self.boxes = nn.Linear(144, 5), nn.Linear(144, 4)
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("sides", torch.rand(300, generator=generator) * 250 + 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        levels = {str(i): level for i, level in enumerate(self.neck(x))}
        boxes = torch.stack([0 * self.sides, 0 * self.sides, self.sides, self.sides], dim=1)
        pooled = self.pool(levels, [boxes], [SIZE]).flatten(1)
        return self.classes(pooled), self.boxes(pooled)


def open_model(canonical: int, form: str, folder: Path) -> Runner:
    torch.manual_seed(0)
    model = Pools(canonical).eval()
    if form == "eager":
        return ModuleRunner(model)
    path, example = folder / "model", torch.rand(1, 3, *SIZE)
    with warnings.catch_warnings(action="ignore"):
        if form == "traced":
            torch.jit.trace(model, example, check_trace=False).save(path)
        else:
            torch.onnx.export(model, (example,), path, dynamo=False, opset_version=17)
    return open_runner(path, detect_kind(path))


@pytest.mark.parametrize("canonical", [64, 112])
@pytest.mark.parametrize("form", ["eager", "traced", "onnx"])
def test_the_rule_is_the_models_own(canonical: int, form: str, tmp_path: Path) -> None:
    runner = open_model(canonical, form, tmp_path)
    found = probe(runner, SIZE, ModelInput())

    assert found.family == "two-stage"
    assert found.reason == "the maps that regions are pooled from"
    assert found.least_side == pytest.approx(canonical / 16, rel=0.05)
    teacher = ProbedDetector(runner=runner, source="it", kind="factory", model_input=ModelInput(), size=SIZE)
    batch = Batch(images=[torch.rand(3, *SIZE)], targets=[], image_ids=torch.tensor([1]))
    seen = teacher.extract_features(batch)
    side = canonical * 1.4  # torchvision's level 4, whose stride is 16
    regions = Regions(torch.tensor([[8.0, 8, 8 + side, 8 + side]]), torch.tensor([0]), torch.tensor([-1]))
    pooled = teacher.region_outputs(seen, regions, frozenset({"pooled"})).pooled
    assert pooled is not None
    expected = MultiScaleRoIAlign(["1"], 7, 2)({"1": seen.pyramid.maps[1]}, [regions.boxes], [SIZE])
    torch.testing.assert_close(pooled, expected, rtol=0.05, atol=0.05)


class Fixed(Pools):
    """Pools regions of one size, which do not determine the rule."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.sides.fill_(40.0)
        return super().forward(x)


def test_regions_of_one_size_determine_no_rule() -> None:
    torch.manual_seed(0)
    model = Fixed(112).eval()
    teacher = ProbedDetector(
        runner=ModuleRunner(model), source="it", kind="factory", model_input=ModelInput(), size=SIZE
    )
    assert teacher.probed.least_side is None
    assert teacher.cells_per_side == TWO_STAGE_CELLS
    assert (pytest.approx(224 / 16 * 2**0.5), pytest.approx(5.657, abs=1e-3)) == (TWO_STAGE_CELLS, DENSE_CELLS)


def test_sides_by_hand() -> None:
    boxes = torch.tensor([[0.0, 10, 10, 30, 50], [0, 0, 0, 8, 2]])  # image, xyxy: 20 x 40 and 8 x 2 pixels
    assert measure_sides(boxes, 0.25) == (pytest.approx(1.0), pytest.approx(800**0.5 / 4))
    assert measure_sides(boxes[:, 1:], 1.0) == (pytest.approx(4.0), pytest.approx(800**0.5))
    assert measure_sides(boxes[:0], 1.0) is None
