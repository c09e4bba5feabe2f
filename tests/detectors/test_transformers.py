"""DETR-like detectors of transformers: levels, losses, queries and boxes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from query_models import CLASSES, SIZE, SOFTMAX, STRIDES, build_detector, make_batch, make_config, shake
from torch import Tensor

from gdetkd_cli.detectors import transformers
from gdetkd_cli.detectors.transformers.detector import QueryDetector, choose_probe_size, choose_queries, find_unit
from gdetkd_cli.distill.regions import choose_regions
from gdetkd_cli.errors import ModelError
from gdetkd_cli.structures import Batch, Regions

NAMES = tuple(STRIDES)


@pytest.fixture(scope="module")
def batch() -> Batch:
    return make_batch()


@pytest.mark.parametrize("name", NAMES)
def test_levels_regions_and_gradients(name: str, batch: Batch) -> None:
    detector, _ = build_detector(name)
    assert tuple(level.stride[0] for level in detector.levels) == STRIDES[name]
    assert detector.exclusive_classes == (name in SOFTMAX)
    detector.module.train()
    seen = detector.forward_train(batch)
    assert seen.candidates is not None
    regions = choose_regions(
        seen.candidates,
        batch,
        per_image=16,
        positive_iou=0.5,
        negatives_per_positive=3,
        generator=torch.Generator().manual_seed(0),
    )
    view = detector.region_outputs(seen, regions, frozenset({"pooled", "embedding"}))
    assert view.pooled is not None and view.embedding is not None
    assert view.pooled.shape == (len(regions), max(level.channels for level in detector.levels), 7, 7)
    assert view.embedding.shape == (len(regions), detector.embedding_channels)
    for level, own in zip(seen.pyramid.maps, detector.levels, strict=True):
        assert level.shape[1] == own.channels
        assert level.requires_grad
    view.pooled.sum().backward(retain_graph=True)
    body = [p for n, p in detector.module.named_parameters() if "backbone" in n or "vit" in n]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in body)
    view.embedding.square().sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_training_is_transformers_own_step_bit_for_bit(name: str, batch: Batch) -> None:
    detector, _ = build_detector(name)
    same, _ = build_detector(name)
    for module in (detector.module, same.module):
        module.train()
    torch.manual_seed(3)  # dropout and denoising
    (loss,) = detector.forward_train(batch).losses.values()
    loss.backward()
    pixels = torch.stack([detector.module.preparation([image]).pixels[0] for image in batch.images])
    labels = []
    for image, target in zip(batch.images, batch.targets, strict=True):
        boxes = target.boxes / torch.tensor([image.shape[2], image.shape[1]] * 2)
        centres = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], dim=1)
        labels.append({"class_labels": target.labels - 1, "boxes": centres})
    torch.manual_seed(3)
    own = same.module.model(pixel_values=pixels, labels=labels).loss
    own.backward()
    assert torch.equal(loss, own)
    for (where, a), (_, b) in zip(detector.module.named_parameters(), same.module.named_parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), where
        assert a.grad is None or b.grad is None or torch.equal(a.grad, b.grad), where


def measure_body(detector: QueryDetector, batch: Batch) -> list[float]:
    """The standard deviation of what each layer of batch normalization in the body returns in training."""
    seen: list[float] = []
    for layer_name, layer in detector.module.named_modules():
        if "backbone" in layer_name and type(layer).__name__.endswith("BatchNorm2d"):
            layer.register_forward_hook(lambda _layer, _inputs, output: seen.append(output.std().item()))
    detector.module.train()
    detector.forward_train(batch)
    return seen


@pytest.mark.parametrize("name", ["rt_detr", "d_fine", "detr", "deformable_detr"])
def test_a_body_with_fresh_weights_is_normalized(name: str, batch: Batch, tmp_path: Path) -> None:
    detector, description = build_detector(name)
    spread = measure_body(detector, batch)
    assert spread and all(0.9 < value < 1.1 for value in spread), spread
    if name == "d_fine":  # as transformers builds it, with trained weights in mind: deep features hardly differ
        frozen = transformers.build(description | {"train_batch_norms": False}, CLASSES)
        assert measure_body(frozen, batch)[-1] < 1e-4
    # Layers that are frozen in a folder of trained weights stay frozen.
    transformers.save_pretrained(detector, description, tmp_path / "p")
    loaded, _, _ = transformers.load_pretrained(str(tmp_path / "p"), CLASSES, keep_classes=True, image_size=None)
    body = [type(m).__name__ for n, m in loaded.module.named_modules() if "backbone" in n]
    assert any(kind.endswith("FrozenBatchNorm2d") for kind in body) and "BatchNorm2d" not in body


def test_a_region_has_the_hidden_state_of_its_query(batch: Batch) -> None:
    detector = shake(build_detector("detr")[0])
    seen = detector.extract_features(batch)
    wanted = ((0, 3), (1, 7))
    # Boxes side by side: fresh decoders predict nearly the same box with every query.
    left = torch.arange(seen.boxes.shape[1]) * 5.0
    seen = replace(seen, boxes=torch.stack([left, left * 0, left + 4, left * 0 + 9], dim=1).expand_as(seen.boxes))
    regions = Regions(
        boxes=torch.stack([seen.boxes[image, query] for image, query in wanted]),
        image_index=torch.tensor([0, 1]),
        candidate=torch.tensor([-1, -1]),
    )
    embedding = detector.region_outputs(seen, regions, frozenset({"embedding"})).embedding
    expected = torch.stack([seen.hidden[image, query] for image, query in wanted])
    assert embedding is not None and torch.equal(embedding, expected)


def test_a_candidate_has_the_hidden_state_of_the_query_that_predicted_it(batch: Batch) -> None:
    detector, _ = build_detector("rt_detr")  # denoising puts other queries before its own
    detector.module.train()
    seen = detector.forward_train(batch)
    assert seen.candidates is not None and seen.query is not None
    rows = torch.tensor([0, 5, len(seen.candidates.boxes) - 1])
    regions = Regions(seen.candidates.boxes[rows], seen.candidates.image_index[rows], rows)
    embedding = detector.region_outputs(seen, regions, frozenset({"embedding"})).embedding
    assert embedding is not None and torch.equal(embedding, seen.hidden.flatten(0, 1)[seen.query[rows]])
    assert seen.hidden.shape[1] == 20


def test_the_most_confident_of_near_duplicates_answers_for_a_region(batch: Batch) -> None:
    detector = build_detector("d_fine")[0]
    seen = detector.extract_features(batch)
    boxes, logits = torch.zeros_like(seen.boxes), torch.full_like(seen.logits, -5.0)
    boxes[..., 2:] = 1.0
    boxes[0, 4], boxes[0, 9] = torch.tensor([10.0, 10, 30, 30]), torch.tensor([10.0, 10, 30, 29])
    logits[0, 9, 0] = 3.0  # as in a decoder that suppresses duplicates by their score
    seen = replace(seen, boxes=boxes, logits=logits)
    regions = Regions(
        torch.tensor([[10.0, 10, 30, 30], [80, 10, 90, 30]]), torch.tensor([0, 0]), torch.tensor([-1, -1])
    )
    queries = detector.region_outputs(seen, regions, frozenset({"predictions"})).queries
    assert queries is not None and queries.rows[0] == 9
    assert queries.overlap.tolist() == [pytest.approx(0.95), 0.0]


def test_the_sides_are_multiples_of_the_windows_of_the_body() -> None:
    config = make_config("rf_detr")
    detector = transformers.build(transformers.describe_fresh(config, (112, 168)), CLASSES)
    assert [level.stride for level in detector.levels] == [(14, 14)]
    detector.module.eval()
    (found,) = detector.predict([torch.rand(3, 100, 150)])
    assert len(found.boxes) == 20 * len(CLASSES)
    with pytest.raises(ModelError, match=r"fails on images of 64 x 96 pixels .*whose sides are multiples of 56"):
        transformers.build(transformers.describe_fresh(config, SIZE), CLASSES)


@pytest.mark.parametrize(
    ("body", "unit", "size"),
    [
        ({}, 32, (352, 416)),
        ({"patch_size": 16}, 32, (352, 416)),
        ({"patch_size": 16, "num_windows": 4}, 64, (384, 448)),
        ({"patch_size": 14, "num_windows": 4}, 56, (392, 448)),
        ({"patch_size": 32, "num_windows": 7}, 224, (448, 672)),
        ({"patch_size": -1, "num_windows": [2]}, 32, (352, 416)),
    ],
)
def test_probe_sizes(body: dict[str, Any], unit: int, size: tuple[int, int]) -> None:
    assert find_unit(SimpleNamespace(backbone_config=SimpleNamespace(**body))) == unit
    assert choose_probe_size(unit) == size


def test_group_detr_detects_with_its_first_group() -> None:
    config = SimpleNamespace(group_detr=3)
    for kind, expected in ((config, slice(20)), (SimpleNamespace(), slice(-20, None))):
        assert choose_queries(kind, 20) == expected


def test_boxes_are_clipped_to_the_image(batch: Batch) -> None:
    detector, _ = build_detector("yolos")
    for image, found in zip(batch.images, detector.predict(batch.images), strict=True):
        edge: Tensor = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert (found.boxes >= 0).all() and (found.boxes <= edge).all()
        assert found.labels.min() >= 1 and found.labels.max() <= 3
