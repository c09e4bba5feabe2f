"""Cascade R-CNN: its three stages against a slow version, and the training of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from catalogue import all_regions
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from gdetkd_cli.detectors.protocol import Detector, View
from gdetkd_cli.structures import Batch

WEIGHTS = ((10.0, 10, 5, 5), (20.0, 20, 10, 10), (30.0, 30, 15, 15))
SIZE = (64, 96)


@pytest.fixture
def heads(tiny_detector: Callable[..., Detector]) -> Any:
    module: Any = tiny_detector("cascade-rcnn").module.eval()
    generator = torch.Generator().manual_seed(3)
    for stage in (module.roi_heads, *module.roi_heads.later):  # weights that tell boxes apart, and move them
        for layer in (stage.box_predictor.cls_score, stage.box_predictor.bbox_pred):
            layer.weight.data = torch.randn(layer.weight.shape, generator=generator)
    return module.roi_heads


@pytest.fixture
def features() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    sizes = [(SIZE[0] // stride, SIZE[1] // stride) for stride in (4, 8, 16, 32, 64)]
    names = ["0", "1", "2", "3", "pool"]
    return {name: torch.rand(1, 16, *size, generator=generator) for name, size in zip(names, sizes, strict=True)}


def move_box(box: list[float], deltas: list[float], weights: tuple[float, ...]) -> list[float]:
    """Applies R-CNN's deltas to a box in plain numbers."""
    x1, y1, x2, y2 = box
    dx, dy, dw, dh = (d / w for d, w in zip(deltas, weights, strict=True))
    cx, cy, width, height = (x1 + x2) / 2 + dx * (x2 - x1), (y1 + y2) / 2 + dy * (y2 - y1), x2 - x1, y2 - y1
    width, height = (
        float(side * torch.tensor(min(d, 4.135166556742356)).exp()) for side, d in ((width, dw), (height, dh))
    )
    return [cx - width / 2, cy - height / 2, cx + width / 2, cy + height / 2]


@torch.no_grad()
def test_each_stage_refines_and_probabilities_are_averaged(heads: Any, features: dict[str, Tensor]) -> None:
    boxes = torch.tensor([[4.0, 4, 40, 50], [20, 10, 90, 60], [50, 5, 70, 30]])
    found, _ = heads(features, [boxes], [SIZE])

    probability = torch.zeros(3, 4)
    for stage, weights in zip((heads, *heads.later), WEIGHTS, strict=True):
        boxes = clip_boxes_to_image(boxes, SIZE)
        pooled = heads.box_roi_pool(features, [boxes], [SIZE])
        logits, deltas = stage.box_predictor(stage.box_head(pooled))
        probability += logits.softmax(dim=1) / 3
        boxes = torch.tensor(
            [move_box(b, d[:4], weights) for b, d in zip(boxes.tolist(), deltas.tolist(), strict=True)]
        )
    boxes = clip_boxes_to_image(boxes, SIZE)
    rows, labels = (probability[:, 1:] > heads.score_thresh).nonzero().unbind(dim=1)
    scores = probability[rows, labels + 1]
    keep = batched_nms(boxes[rows], scores, labels, heads.nms_thresh)
    torch.testing.assert_close(found[0]["scores"], scores[keep])
    torch.testing.assert_close(found[0]["boxes"], boxes[rows[keep]], rtol=1e-4, atol=1e-3)
    assert found[0]["labels"].tolist() == (labels[keep] + 1).tolist()


def test_later_stages_need_closer_boxes(heads: Any) -> None:
    """A box with an overlap of 0.65 is an object to the second stage (0.6) and background to the third (0.7)."""
    truth = [{"boxes": torch.tensor([[0.0, 0, 100, 10]]), "labels": torch.tensor([2])}]
    near = torch.tensor([[0.0, 0, 65, 10]])
    second, third = (stage.label_boxes([near], truth) for stage in heads.later)
    assert second[0][0].tolist() == [2]
    assert third[0][0].tolist() == [0]
    for (_, wanted), weights in zip((second, third), WEIGHTS[1:], strict=True):
        expected = [weights[0] * (50 - 32.5) / 65, 0, weights[2] * float(torch.tensor(100 / 65).log()), 0]
        torch.testing.assert_close(wanted[0][0], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_every_stage_learns(tiny_detector: Callable[..., Detector], batch: Batch) -> None:
    detector = tiny_detector("cascade-rcnn", classes=("circle", "square"))
    losses = detector.forward_train(batch).losses
    assert {f"{name}{stage}" for name in ("loss_classifier", "loss_box_reg") for stage in ("", "_2", "_3")} < set(
        losses
    )
    torch.stack(list(losses.values())).sum().backward()
    module: Any = detector.module
    for stage in (module.roi_heads, *module.roi_heads.later):
        for layer in (stage.box_head.fc6, stage.box_predictor.cls_score):
            assert layer.weight.grad.abs().sum() > 0


def test_both_cascades_give_the_same_for_the_refined_boxes(
    tiny_detector: Callable[..., Detector], tiny_batch: Batch
) -> None:
    """The student is its own teacher: the teacher's later stages get the boxes of the student's."""
    student, teacher = tiny_detector("cascade-rcnn", norm="frozen"), tiny_detector("cascade-rcnn", norm="frozen")
    for detector in (student, teacher):
        for number, stage in enumerate((detector.module.roi_heads, *detector.module.roi_heads.later)):
            torch.manual_seed(number)
            for layer in (stage.box_predictor.cls_score, stage.box_predictor.bbox_pred):
                layer.weight.data = 0.3 * torch.randn(layer.weight.shape)
    seen = student.forward_train(tiny_batch)
    assert seen.candidates is not None
    regions = all_regions(seen.candidates, own=True)
    needs: frozenset[View] = frozenset({"predictions"})
    ours = student.region_outputs(seen, regions, needs)
    refined = replace(regions, refined=tuple(stage.boxes for stage in ours.later))
    with torch.no_grad():
        theirs = teacher.region_outputs(teacher.extract_features(tiny_batch), refined, needs)

    assert len(ours.later) == len(theirs.later) == 2
    assert not torch.allclose(ours.later[0].boxes, regions.boxes, atol=1.0)
    for own, other in zip(ours.later, theirs.later, strict=True):
        torch.testing.assert_close(own.boxes, other.boxes)
        torch.testing.assert_close(own.class_logits, other.class_logits, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(own.box_deltas, other.box_deltas, rtol=1e-3, atol=1e-3)
