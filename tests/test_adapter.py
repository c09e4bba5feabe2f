"""The base class of students of your own: what it passes on, and what comes back."""

from __future__ import annotations

import io
from typing import Any

import onnxruntime
import pytest
import torch
from torch import Tensor

from gdetkd_cli import adapter
from gdetkd_cli.adapter import TrainableModule


class Echo(TrainableModule):
    """Keeps its input, and detects the middle of each image of the tensor."""

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        self.images, self.targets = images, targets
        return {"sum": images.sum()}

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        box = torch.tensor([[8.0, 4, 24, 12], [-5, -5, 500, 500]])
        return [{"boxes": box, "scores": torch.ones(2), "labels": torch.ones(2, dtype=torch.int64)} for _ in images]


def targets(*boxes: list[list[float]]) -> list[dict[str, Tensor]]:
    tensors = [torch.tensor(own).reshape(-1, 4) for own in boxes]
    return [{"boxes": own, "labels": torch.ones(len(own), dtype=torch.int64)} for own in tensors]


def test_images_of_several_sizes_become_one_tensor() -> None:
    module, images = Echo(divisor=32), [torch.rand(3, 40, 64), torch.rand(3, 30, 70)]
    module(images, targets([[1, 2, 3, 4]], []))

    assert module.images.shape == (2, 3, 64, 96)
    for image, stacked in zip(images, module.images, strict=True):
        height, width = image.shape[-2:]
        assert torch.equal(stacked[:, :height, :width], image)
        assert (stacked[:, height:] == 114 / 255).all()
        assert (stacked[:, :, width:] == 114 / 255).all()
    assert module.targets[0]["boxes"].tolist() == [[1, 2, 3, 4]]
    assert module.targets[1]["boxes"].shape == (0, 4)


def test_boxes_follow_a_resize_there_and_back() -> None:
    module, image = Echo(divisor=16, size=32), torch.rand(3, 32, 64)
    module([image], targets([[16, 8, 48, 24]]))
    assert module.images.shape == (1, 3, 16, 32)
    assert module.targets[0]["boxes"].tolist() == [[8, 4, 24, 12]]

    found = module.eval()([image])
    assert found[0]["boxes"].tolist() == [[16, 8, 48, 24], [0, 0, 64, 32]]  # the second is clipped


@pytest.mark.parametrize("size", [None, 48])
def test_sizes_are_not_fixed_by_an_export(size: int | None) -> None:
    """A traced module pads, resizes and scales images of other sizes like the module."""

    class Sizes(Echo):
        def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
            sides = torch._shape_as_tensor(images)[[3, 2, 3, 2]].float()
            return [{**found, "boxes": sides[None] / 2} for found in super().detect(images)]

    class Single(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = Sizes(divisor=32, size=size).eval()

        def forward(self, image: Tensor) -> Any:
            return self.module([image])[0]["boxes"]

    module, file = Single().eval(), io.BytesIO()
    axes = {"image": {1: "height", 2: "width"}}
    example = (torch.rand(3, 96, 96),)
    torch.onnx.export(module, example, file, dynamo=False, opset_version=17, input_names=["image"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(file.getvalue())
    for height, width in ((96, 96), (33, 64), (50, 201)):
        image = torch.rand(3, height, width)
        (boxes,) = session.run(None, {"image": image.numpy()})
        torch.testing.assert_close(torch.from_numpy(boxes), module(image), rtol=1e-5, atol=1e-4)


def test_detections_are_suppressed_class_by_class() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 11], [20, 20, 30, 30]]])
    scores = torch.tensor([[[0.9, 0.5], [0.8, 0.0], [0.0, 0.3]]])
    (found,) = TrainableModule().select_detections(boxes, scores)
    assert found["boxes"].tolist() == [[0, 0, 10, 10], [0, 0, 10, 10], [20, 20, 30, 30]]
    assert found["scores"].tolist() == pytest.approx([0.9, 0.5, 0.3])
    assert found["labels"].tolist() == [1, 2, 2]

    (found,) = TrainableModule(score_thresh=0.4, detections_per_img=1).select_detections(boxes, scores)
    assert found["labels"].tolist() == [1]
    (found,) = TrainableModule().select_detections(boxes, scores * 0)
    assert found["boxes"].shape == (0, 4)


def test_only_the_best_candidates_are_suppressed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter, "_MOST_CANDIDATES", 2)
    boxes = 20.0 * torch.arange(5)[None, :, None] + torch.tensor([0.0, 0, 10, 10])
    scores = torch.tensor([[[0.1], [0.9], [0.3], [0.8], [0.2]]])
    (found,) = TrainableModule().select_detections(boxes, scores)
    assert found["scores"].tolist() == pytest.approx([0.9, 0.8])
    assert found["boxes"][:, 0].tolist() == [20, 60]


def test_what_a_subclass_must_define() -> None:
    module, images = TrainableModule(), [torch.rand(3, 32, 32)]
    with pytest.raises(NotImplementedError, match=r"TrainableModule must define losses\(images, targets\)"):
        module(images, targets([]))
    with pytest.raises(NotImplementedError, match=r"TrainableModule must define detect\(images\)"):
        module.eval()(images)
