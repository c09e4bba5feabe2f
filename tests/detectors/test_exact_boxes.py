"""Half precision never touches a coordinate, in every family, above 1,000 pixels, where bfloat16 resolves 4 to 8.

Each test fails if ``exact_boxes`` does nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import roi_heads
from torchvision.models.detection.anchor_utils import AnchorGenerator, DefaultBoxGenerator
from torchvision.models.detection.rpn import RegionProposalNetwork
from torchvision.models.detection.ssd import SSD

from gdetkd_cli.data.synthetic import CLASS_NAMES, draw_split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.detectors.tap import Tap
from gdetkd_cli.detectors.torchvision.dense import DenseDetector
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.evaluation.predict import predict_split
from gdetkd_cli.portable import cascade
from gdetkd_cli.structures import Batch, Target

SIZE = (736, 1216)  # (height, width), pixels
CLASSES = ("circle", "square")
FAMILIES = ("faster-rcnn", "cascade-rcnn", "retinanet", "fcos", "ssd")
HALVES = (torch.bfloat16, torch.float16)
TRUTH = torch.tensor([[1060.3, 600.2, 1084.7, 625.1], [700.9, 313.3, 907.4, 551.8]])  # 24 and about 220 pixels


class _Body(nn.Module):
    """Two levels of stride 32 and 64, for an SSD."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, stride=32, padding=1), nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.out_channels = [8, 8]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        fine = self.first(images)
        return OrderedDict([("0", fine), ("1", self.second(fine))])


@pytest.fixture(params=FAMILIES)
def detector(request: pytest.FixtureRequest, tiny_detector: Callable[..., Detector]) -> Detector:
    torch.manual_seed(0)
    if request.param == "ssd":
        anchors = DefaultBoxGenerator([[2], [2]], scales=[0.07, 0.3, 0.6], steps=[32, 64])
        module = SSD(_Body(), anchors, size=SIZE[::-1], num_classes=len(CLASSES) + 1, score_thresh=0.0)
        made: Detector = DenseDetector(module=module, class_names=CLASSES)
        vars(made)["levels"] = tiny_detector("faster-rcnn").levels[3:5]  # strides 32 and 64
        return made
    made = tiny_detector(request.param, classes=CLASSES)
    module = made.module
    module.transform.min_size, module.transform.max_size = (SIZE[0],), SIZE[1]
    heads = getattr(module, "roi_heads", module)
    heads.score_thresh = 0.0
    return made


@pytest.fixture
def large_batch() -> Batch:
    torch.manual_seed(1)
    return Batch(
        images=[torch.rand(3, *SIZE)],
        targets=[Target(boxes=TRUTH, labels=torch.tensor([1, 2]))],
        image_ids=torch.tensor([1]),
    )


def generators(module: nn.Module) -> list[str]:
    return [n for n, m in module.named_modules() if isinstance(m, AnchorGenerator | DefaultBoxGenerator)]


def anchors_of(detector: Detector, batch: Batch, dtype: torch.dtype | None) -> list[Tensor]:
    with Tap(detector.module, generators(detector.module)) as tap, half(dtype):
        detector.forward_train(batch)
    found = tap.output(generators(detector.module)[0])[0]
    return [a.float() for a in (found if isinstance(found, list) else [found])]


@contextmanager
def half(dtype: torch.dtype | None) -> Iterator[None]:
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        yield


@pytest.mark.parametrize("dtype", HALVES)
def test_anchors_are_those_of_float32(detector: Detector, large_batch: Batch, dtype: torch.dtype) -> None:
    exact, halved = (anchors_of(detector, large_batch, kind) for kind in (None, dtype))

    assert all(torch.equal(a, b) for a, b in zip(exact, halved, strict=True))
    assert max(float(a.max()) for a in exact) > 1000


def fix_outputs(head: nn.Module, outputs: Any, dtype: torch.dtype) -> None:
    """Makes a head return ``outputs`` for any input, in half precision under autocast like a real head."""
    inner = head.forward

    def forward(features: Any) -> Any:
        inner(features)  # its towers are read too
        halved = torch.is_autocast_enabled("cpu")
        rows = len(features) if isinstance(features, Tensor) else None  # a RoI head samples fewer when it trains
        return _each(outputs, lambda x: x[:rows].to(dtype if halved else x.dtype))

    head.forward = forward  # type: ignore[method-assign]


def _each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {key: _each(one, function) for key, one in value.items()}
    return type(value)(_each(one, function) for one in value)


def fix_heads(detector: Detector, images: list[Tensor], dtype: torch.dtype) -> None:
    """Fixes the outputs of every head to random numbers that are exact in half precision."""
    parents = [
        (parent, name)
        for parent in detector.module.modules()
        for kind, name in ((RegionProposalNetwork, "head"), (roi_heads.RoIHeads, "box_predictor"))
        if isinstance(parent, kind)
    ]
    if isinstance(detector, DenseDetector):
        parents = [(detector.module, "head")]
    for parent, name in parents:
        torch.manual_seed(3)
        seen: list[Any] = []
        handle = getattr(parent, name).register_forward_hook(lambda *a, seen=seen: seen.append(a[2]))
        detector.predict(images)
        handle.remove()
        rounded = _each(seen[0], lambda x: torch.randn_like(x).to(dtype).float())
        fix_outputs(getattr(parent, name), rounded, dtype)


@pytest.mark.parametrize("dtype", HALVES)
def test_decoding_and_nms_are_those_of_float32(detector: Detector, large_batch: Batch, dtype: torch.dtype) -> None:
    """The same head outputs give the same detections to the last bit."""
    fix_heads(detector, large_batch.images, dtype)
    (exact,) = detector.predict(large_batch.images)
    with half(dtype):
        (halved,) = detector.predict(large_batch.images)

    assert len(exact.boxes) > 5
    assert halved.boxes.dtype == torch.float32
    assert torch.equal(exact.boxes, halved.boxes)
    assert torch.equal(exact.labels, halved.labels)
    assert torch.equal(exact.scores, halved.scores)


def observe_both(detector: Detector, batch: Batch, dtype: torch.dtype) -> list[Observation]:
    """Training forwards with fixed heads and samples, in float32 and in half precision."""
    fix_heads(detector, batch.images, dtype)
    seen = []
    for kind in (None, dtype):
        torch.manual_seed(4)
        with half(kind):
            seen.append(detector.forward_train(batch))
    return seen


@pytest.mark.parametrize("dtype", HALVES)
def test_candidates_are_those_of_float32(detector: Detector, large_batch: Batch, dtype: torch.dtype) -> None:
    """A student's candidates."""
    found = [seen.candidates for seen in observe_both(detector, large_batch, dtype)]

    assert found[0] is not None and found[1] is not None
    assert found[1].boxes.dtype == torch.float32
    assert torch.equal(found[0].boxes, found[1].boxes)


@pytest.mark.parametrize("dtype", HALVES)
def test_box_losses_are_those_of_float32(detector: Detector, large_batch: Batch, dtype: torch.dtype) -> None:
    """Matching, targets and losses of the same head outputs."""
    losses = [seen.losses for seen in observe_both(detector, large_batch, dtype)]

    for name, value in losses[0].items():
        assert torch.isclose(losses[1][name].float(), value, rtol=1e-5), name


@pytest.mark.parametrize("head", ["faster-rcnn", "cascade-rcnn"])
@pytest.mark.parametrize("dtype", HALVES)
def test_regression_targets(
    head: str, dtype: torch.dtype, large_batch: Batch, tiny_detector: Callable[..., Detector], monkeypatch: Any
) -> None:
    """Regression targets equal the box coding of the true box from the proposal in float64, to 1e-3."""
    detector = tiny_detector(head, classes=CLASSES)
    detector.module.transform.min_size, detector.module.transform.max_size = (SIZE[0],), SIZE[1]
    recorded: list[tuple[Tensor, Tensor]] = []
    plain = roi_heads.fastrcnn_loss

    def spy(logits: Tensor, deltas: Tensor, labels: list[Tensor], targets: list[Tensor]) -> Any:
        recorded.append((torch.cat(labels), torch.cat(list(targets))))
        return plain(logits, deltas, labels, targets)

    monkeypatch.setattr(roi_heads, "fastrcnn_loss", spy)
    monkeypatch.setattr(cascade, "fastrcnn_loss", spy)
    heads = detector.module.roi_heads
    coders = [heads.box_coder, *(stage.box_coder for stage in getattr(heads, "later", ()))]
    pools = ["roi_heads.box_roi_pool"] + [f"roi_heads.later.{i}.box_roi_pool" for i in range(len(coders) - 1)]
    one = Batch(large_batch.images, [Target(TRUTH[:1], torch.tensor([1]))], large_batch.image_ids)
    with Tap(detector.module, pools) as tap, half(dtype):
        detector.forward_train(one)

    assert len(recorded) == len(coders)
    for (labels, targets), coder, pool in zip(recorded, coders, pools, strict=True):
        proposals = torch.cat(tap.inputs(pool)[1]).double()
        expected = coder.encode_single(TRUTH[:1].double().expand_as(proposals), proposals)
        positive = labels > 0
        assert positive.any()
        assert (targets.double() - expected)[positive].abs().max() < 1e-3


def test_the_shipped_teacher_far_from_the_corner() -> None:
    """AP on scenes at (1060, 600) of a large image equals float32's within 0.3; bfloat16 boxes lose 30."""
    detector = catalog.load(catalog.locate("builtin:shapes-teacher")).detector
    detector.module.transform.min_size, detector.module.transform.max_size = (SIZE[0],), SIZE[1]
    split = draw_split(split="val", images=12, size=128, seed=0)
    left, top = 1060, 600
    batches = []
    for index, record in enumerate(split.records):
        image = torch.full((3, *SIZE), 0.5)
        image[:, top : top + 128, left : left + 128] = split.read(index) / 255
        batches.append(Batch([image], [], torch.tensor([record.image_id])))
    ap = []
    for kind in (None, torch.bfloat16):
        with half(kind):
            found = predict_split(detector, batches, "cpu")
        shift = torch.tensor([left, top, left, top])
        moved = {n: type(d)(boxes=d.boxes - shift, scores=d.scores, labels=d.labels) for n, d in found.items()}
        ap.append(evaluate_coco(split.records, CLASS_NAMES, moved).ap)

    assert ap[0] is not None and ap[1] is not None and ap[0] > 60
    assert abs(ap[0] - ap[1]) <= 0.3


@pytest.mark.parametrize("head", ["faster-rcnn", "fcos"])
def test_without_autocast_nothing_is_hooked(
    head: str, tiny_detector: Callable[..., Detector], tiny_batch: Batch
) -> None:
    detector = tiny_detector(head)
    seen: list[bool] = []
    detector.module.backbone.register_forward_hook(
        lambda *_: seen.append(any(m._forward_pre_hooks for m in detector.module.modules()))
    )
    detector.forward_train(tiny_batch)
    with half(torch.bfloat16):
        detector.forward_train(tiny_batch)

    assert seen == [False, True]
    assert not any(m._forward_pre_hooks for m in detector.module.modules())
