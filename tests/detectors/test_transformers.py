"""DETR-like detectors of transformers: levels, losses, queries, files, and what is refused."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from query_models import SOFTMAX, STRIDES, make_config
from torch import Tensor
from transformers import AutoImageProcessor, AutoModelForObjectDetection, DetrImageProcessor, RTDetrImageProcessor

from gdetkd_cli.detectors import catalog, transformers
from gdetkd_cli.detectors.transformers.detector import QueryDetector, choose_probe_size, choose_queries, find_unit
from gdetkd_cli.detectors.transformers.preparation import Preparation, resize_in_graph
from gdetkd_cli.distill.regions import choose_regions
from gdetkd_cli.errors import ExportError, GDetKDError, ModelError
from gdetkd_cli.evaluation.exported import OnnxDetector
from gdetkd_cli.export.onnx import ANY, export_onnx
from gdetkd_cli.export.parity import Cut, check_parity
from gdetkd_cli.structures import Batch, Detections, Regions, Target

CLASSES = ("car", "bus", "bike")
SIZE = (64, 96)
NAMES = tuple(STRIDES)


def build(name: str, size: tuple[int, int] = SIZE) -> tuple[QueryDetector, dict[str, Any]]:
    torch.manual_seed(0)
    description = transformers.describe_fresh(make_config(name), size)
    return transformers.build(description, CLASSES), description


def shake(detector: QueryDetector) -> QueryDetector:
    """Moves the weights, because fresh class layers give equal scores everywhere, whose order is arbitrary."""
    torch.manual_seed(1)
    for parameter in detector.module.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    detector.module.eval()
    return detector


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two images of unlike sizes with one and two objects."""
    generator = torch.Generator().manual_seed(0)
    targets = [
        Target(torch.tensor([[10.0, 10, 50, 40]]), torch.tensor([1])),
        Target(torch.tensor([[20.0, 20, 70, 60], [1, 1, 30, 30]]), torch.tensor([2, 3])),
    ]
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 96), (80, 80))]
    return Batch(images, targets, torch.tensor([1, 2]))


# ------------------------------------------------------------------------------------------------------- contract


@pytest.mark.parametrize("name", NAMES)
def test_levels_regions_and_gradients(name: str, batch: Batch) -> None:
    detector, _ = build(name)
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
    detector, _ = build(name)
    same, _ = build(name)
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
    detector, description = build(name)
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
    detector = shake(build("detr")[0])
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
    detector, _ = build("rt_detr")  # denoising puts other queries before its own
    detector.module.train()
    seen = detector.forward_train(batch)
    assert seen.candidates is not None and seen.query is not None
    rows = torch.tensor([0, 5, len(seen.candidates.boxes) - 1])
    regions = Regions(seen.candidates.boxes[rows], seen.candidates.image_index[rows], rows)
    embedding = detector.region_outputs(seen, regions, frozenset({"embedding"})).embedding
    assert embedding is not None and torch.equal(embedding, seen.hidden.flatten(0, 1)[seen.query[rows]])
    assert seen.hidden.shape[1] == 20


# ---------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("name", NAMES)
def test_files_give_the_same_detections(name: str, batch: Batch, tmp_path: Path) -> None:
    detector, description = build(name)
    detector.module.train()
    detector.forward_train(batch)  # moves the statistics of batch normalization
    shake(detector)
    (expected, *_) = detector.predict(batch.images)
    catalog.save(tmp_path / "student.pt", detector, description)
    again = catalog.load(tmp_path / "student.pt").detector.predict(batch.images)[0]
    assert torch.equal(expected.boxes, again.boxes) and torch.equal(expected.scores, again.scores)

    transformers.save_pretrained(detector, description, tmp_path / "pretrained")
    model = AutoModelForObjectDetection.from_pretrained(tmp_path / "pretrained").eval()
    assert model.config.id2label == dict(enumerate(CLASSES))
    processor = AutoImageProcessor.from_pretrained(tmp_path / "pretrained")
    image = batch.images[0]  # of the model's own size, so that nothing is resized
    pixels = processor(images=[image], do_rescale=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        output = model(pixel_values=pixels)
    (found,) = processor.post_process_object_detection(output, threshold=0.0, target_sizes=[image.shape[-2:]])
    for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
        same = (expected.labels == label + 1) & ((expected.scores - score).abs() < 1e-4)
        inside = box.clamp(min=0).minimum(torch.tensor([image.shape[2], image.shape[1]] * 2))
        assert ((expected.boxes[same] - inside).abs() < 1e-3).all(dim=1).any()

    loaded, _, trained = transformers.load_pretrained(
        str(tmp_path / "pretrained"), CLASSES, keep_classes=False, image_size=None
    )
    assert trained and loaded.class_names == CLASSES
    # Not equal: a frozen layer rounds otherwise.
    boxes = loaded.predict(batch.images)[0].boxes
    assert torch.allclose(boxes.sort(0).values, expected.boxes.sort(0).values, atol=1e-3)


def test_other_classes_start_a_fresh_class_layer(tmp_path: Path) -> None:
    detector, description = build("d_fine")
    transformers.save_pretrained(detector, description, tmp_path / "p")
    loaded, _, trained = transformers.load_pretrained(
        str(tmp_path / "p"), ("a", "b"), keep_classes=False, image_size=(96, 96)
    )
    assert not trained and loaded.class_names == ("a", "b")
    assert loaded.module.preparation.compute_size(10, 20) == (96, 96)
    kept, _, trained = transformers.load_pretrained(str(tmp_path / "p"), ("a",), keep_classes=True, image_size=None)
    assert trained and kept.class_names == CLASSES
    # As many other classes; and the same ones in another order, which the data follow.
    names = tuple(f"other {i}" for i in range(len(CLASSES)))
    other, _, trained = transformers.load_pretrained(str(tmp_path / "p"), names, keep_classes=False, image_size=None)
    own, loaded = (one.module.state_dict() for one in (detector, other))
    changed = {name for name in loaded if not torch.equal(own[name], loaded[name])}
    assert not trained and changed and all("class" in name or "enc_score" in name for name in changed)
    turned, _, trained = transformers.load_pretrained(
        str(tmp_path / "p"), CLASSES[::-1], keep_classes=False, image_size=None
    )
    assert trained and turned.class_names == CLASSES


def test_the_most_confident_of_near_duplicates_answers_for_a_region(batch: Batch) -> None:
    detector = build("d_fine")[0]
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


@pytest.mark.parametrize("name", ["d_fine", "detr", "deformable_detr"])
def test_the_onnx_file_agrees_on_images_of_any_size(name: str, tmp_path: Path) -> None:
    # Not smaller: DETR's group norm over two cells would enlarge rounding errors.
    detector, description = build(name, (128, 192))
    shake(detector)
    export_onnx(detector, tmp_path / "s.onnx", architecture=description)
    images = [torch.rand(3, *size) for size in ((64, 96), (100, 120), (301, 200))]
    parity = check_parity(detector, OnnxDetector(tmp_path / "s.onnx"), images, cut=Cut.of(detector.module))
    assert parity.passed, parity


@pytest.mark.parametrize("batch", [None, ANY])
def test_a_body_that_interpolates_its_positions_is_exported(batch: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    description = transformers.describe_fresh(make_config("rf_detr"), (112, 168))
    detector = shake(transformers.build(description, CLASSES))
    export_onnx(detector, tmp_path / "s.onnx", architecture=description, batch=batch)
    images = [torch.rand(3, *size) for size in ((112, 168), (100, 120))]
    parity = check_parity(detector, OnnxDetector(tmp_path / "s.onnx"), images, cut=Cut.of(detector.module))
    assert parity.passed, parity


def test_an_exporter_that_fails_prints_no_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        sys.stdout.write("Torch IR graph at exception")
        raise torch.onnx.OnnxExporterError("no such operator")

    monkeypatch.setattr(torch.onnx, "export", fail)
    detector, description = build("yolos")
    with pytest.raises(ExportError, match="no such operator"):
        export_onnx(detector, tmp_path / "s.onnx", architecture=description)
    assert not capsys.readouterr().out


def test_an_export_may_differ_by_a_thousandth_of_the_image() -> None:
    @dataclass
    class Answer:
        shift: float

        def predict(self, images: list[Tensor]) -> list[Detections]:
            boxes = torch.tensor([[10.0, 10, 50, 50]]) + self.shift
            return [Detections(boxes=boxes, scores=torch.tensor([0.5]), labels=torch.tensor([1])) for _ in images]

    cut, images = Cut(score=-1.0, count=300), [torch.zeros(3, 100, 200)]
    for shift, passed in ((0.19, True), (0.21, False)):
        assert check_parity(Answer(0), Answer(shift), images, cut=cut, relative=1e-3).passed == passed
    assert not check_parity(Answer(0), Answer(0.06), images, cut=cut).passed


# -------------------------------------------------------------------------------------------------- preprocessing


@pytest.mark.parametrize("size", [(40, 60), (60, 40), (333, 100), (50, 50), (97, 131)])
@pytest.mark.parametrize(
    "processor",
    [
        RTDetrImageProcessor(size={"height": 64, "width": 96}),
        RTDetrImageProcessor(size={"height": 64, "width": 96}, do_normalize=True),
        DetrImageProcessor(size={"shortest_edge": 64, "longest_edge": 100}),
    ],
    ids=["fixed", "normalised", "shortest"],
)
def test_images_are_prepared_as_transformers_prepares_them(processor: Any, size: tuple[int, int]) -> None:
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, *size), dtype=np.uint8))
    expected = processor(images=[image], return_tensors="pt")["pixel_values"]
    own = Preparation.read(processor.to_dict())([image.float() / 255]).pixels
    assert own.shape == expected.shape
    error = (own - expected).abs() * 255 * (0.22 if processor.do_normalize else 1)
    assert error.max() < 1.2 and error.mean() < 0.4  # transformers rounds a resized image to whole values, twice


def test_images_of_unlike_sizes_are_padded() -> None:
    preparation = Preparation.read({"size": {"shortest_edge": 32, "longest_edge": 64}})
    prepared = preparation([torch.ones(3, 32, 48), torch.ones(3, 48, 32)])
    assert prepared.pixels.shape == (2, 3, 48, 48)
    assert prepared.mask.sum(dim=(1, 2)).tolist() == [32 * 48, 48 * 32]
    assert prepared.is_padded and prepared.pixels[0, :, 32:].abs().max() == 0


@pytest.mark.parametrize(("before", "after"), [((50, 60), (64, 96)), ((301, 97), (64, 64)), ((64, 96), (64, 96))])
def test_the_resize_in_a_graph_equals_torchs(before: tuple[int, int], after: tuple[int, int]) -> None:
    image = torch.rand(3, *before)
    expected = torch.nn.functional.interpolate(image[None], size=after, mode="bilinear", antialias=True)[0]
    assert torch.allclose(resize_in_graph(image, after), expected, atol=1e-5)


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_type": "bert"}, "unknown model_type 'bert'"),
        ({"model_type": None}, "unknown model_type None"),
        ({"backbone": "microsoft/resnet-50"}, "names the backbone 'microsoft/resnet-50', which would be downloaded"),
        ({"backbone": "hf-hub:x/y", "use_timm_backbone": True}, "which would be downloaded"),
        ({"d_model": "x"}, "detr"),
        ({"num_queries": -3}, "detr"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(GDetKDError, match=sentence) as caught:
        transformers.build(transformers.describe_fresh(make_config("detr") | change, SIZE), CLASSES)
    assert "\n" not in str(caught.value)


def test_code_and_kernels_in_a_configuration_are_left_out() -> None:
    config = make_config("detr") | {
        "auto_map": {"AutoModelForObjectDetection": "evil.Model"},
        "_attn_implementation": "evil/kernels",
        "quantization_config": {"quant_method": "evil"},
        "backbone_config": make_config("detr")["backbone_config"] | {"auto_map": {"AutoConfig": "evil.C"}},
    }
    detector = transformers.build(transformers.describe_fresh(config, SIZE), CLASSES)
    assert "evil" not in json.dumps(detector.module.model.config.to_dict(), default=str)


def test_weights_that_only_pickle_reads_are_refused(tmp_path: Path) -> None:
    detector, description = build("detr")
    transformers.save_pretrained(detector, description, tmp_path / "p")
    (tmp_path / "p" / "model.safetensors").unlink()
    torch.save(detector.module.model.state_dict(), tmp_path / "p" / "pytorch_model.bin")
    with pytest.raises(ModelError, match="transformers cannot load"):
        transformers.load_pretrained(str(tmp_path / "p"), CLASSES, keep_classes=True, image_size=None)


def test_a_missing_folder_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="there is no folder"):
        transformers.load_pretrained(str(tmp_path / "x"), CLASSES, keep_classes=True, image_size=None)


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"install it with: pip install 'gdetkd\[transformers\]'"):
        transformers.build(transformers.describe_fresh(make_config("detr"), SIZE), CLASSES)


def test_boxes_are_clipped_to_the_image(batch: Batch) -> None:
    detector, _ = build("yolos")
    for image, found in zip(batch.images, detector.predict(batch.images), strict=True):
        edge: Tensor = torch.tensor([image.shape[2], image.shape[1]] * 2)
        assert (found.boxes >= 0).all() and (found.boxes <= edge).all()
        assert found.labels.min() >= 1 and found.labels.max() <= 3
