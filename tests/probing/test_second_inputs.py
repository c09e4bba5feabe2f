"""Inputs besides the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from forms import build
from torch import Tensor, nn
from written import SIZE, WRITERS, Detecting, draw, open_detector, probe_notes, to_onnx

from gdetkd_cli.commands.probe import run_probe
from gdetkd_cli.errors import ModelError


class SecondRows(Detecting):
    """The right corner of its boxes shows the second input: its first number and a hundredth of its second."""

    def forward(self, images: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        rows = second.to(images.dtype).flatten(1)
        return self.decode(images, rows[:, 0] + rows[:, 1] / 100)


def rename(name: str) -> type[nn.Module]:
    """The same network, whose second argument has this name."""
    source = f"def forward(self, images, {name}):\n    return SecondRows.forward(self, images, {name})\n"
    space: dict[str, Any] = {"SecondRows": SecondRows}
    exec(source, space)  # noqa: S102  # the names of arguments cannot be made otherwise
    return type("Renamed", (SecondRows,), {"forward": space["forward"]})


ROWS = {
    "im_shape": (96, 128),
    "scale_factor": (1, 1),
    "im_info": (96, 128, 1),
    "orig_target_sizes": (128, 96),  # its boxes reach beyond the image and are clipped
    "image_shape": (96, 128),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WRITERS)
@pytest.mark.parametrize("name", ROWS)
def test_second_inputs_of_a_usual_name(tmp_path: Path, form: str, name: str) -> None:
    row = ROWS[name]
    example = (torch.rand(1, 3, *SIZE), torch.tensor([row], dtype=torch.float32))
    path = tmp_path / "model"
    options = {"input_names": ["images", name]} if form == "onnx" else {}
    WRITERS[form](build(rename(name)), path, example, **options)

    (one,) = open_detector(path).predict(draw(1))
    assert one.boxes[0].tolist() == pytest.approx([0, 0, min(row[0] + row[1] / 100, 128), 32])
    assert f"also passes {name} = {row}" in probe_notes(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WRITERS)
def test_a_mask_of_the_images_pixels(tmp_path: Path, form: str) -> None:
    example = (torch.rand(1, 3, *SIZE), torch.ones(1, *SIZE, dtype=torch.int64))
    path = tmp_path / "model"
    options = {"input_names": ["pixel_values", "pixel_mask"]} if form == "onnx" else {}
    WRITERS[form](build(rename("pixel_mask")), path, example, **options)
    (one,) = open_detector(path).predict(draw(1))
    assert one.boxes[0].tolist() == pytest.approx([0, 0, 1.01, 32])
    assert "also passes pixel_mask = ones" in probe_notes(path)


@pytest.mark.filterwarnings("ignore")
def test_inputs_in_paddles_order_and_for_several_images(tmp_path: Path) -> None:
    class Paddle(SecondRows):
        def forward(self, im_shape: Tensor, image: Tensor, scale_factor: Tensor) -> Any:  # type: ignore[override]
            return super().forward(image, im_shape * scale_factor)

    path = tmp_path / "model.onnx"
    names = ["im_shape", "image", "scale_factor"]
    rows = torch.ones(1, 2)
    to_onnx(
        build(Paddle),
        path,
        (rows, torch.rand(1, 3, *SIZE), rows),
        input_names=names,
        dynamic_axes={name: {0: "N"} for name in names},
    )
    found = open_detector(path).predict(draw(2))
    assert [one.boxes[0].tolist() for one in found] == [pytest.approx([0, 0, 97.28, 32])] * 2
    assert "also passes im_shape = (96, 128), scale_factor = (1, 1)" in probe_notes(path)


@pytest.mark.filterwarnings("ignore")
def test_a_mask_given_by_name_in_an_exported_program(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    given = {"images": torch.rand(1, 3, *SIZE), "pixel_mask": torch.ones(1, *SIZE)}
    torch.export.save(torch.export.export(build(rename("pixel_mask")), (), given), path)
    (one,) = open_detector(path).predict(draw(1))
    assert one.boxes[0].tolist() == pytest.approx([0, 0, 1.01, 32])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", WRITERS)
def test_other_inputs_are_refused_by_name(tmp_path: Path, form: str) -> None:
    example = (torch.rand(1, 3, *SIZE), torch.ones(1, 2))
    path = tmp_path / "model"
    options = {"input_names": ["images", "prompts"]} if form == "onnx" else {}
    WRITERS[form](build(rename("prompts")), path, example, **options)
    with pytest.raises(ModelError, match=r"also takes prompts, whose value gdetkd does not know; export"):
        run_probe(str(path))
