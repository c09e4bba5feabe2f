"""One contract for every detector of the catalogue: what is declared is what is observed."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet, vgg

from gdetkd_cli.detectors import architectures, catalog, geometry
from gdetkd_cli.detectors.protocol import Candidates, Detector, Observation, View
from gdetkd_cli.errors import ModelError
from gdetkd_cli.structures import Batch, Detections, Regions, Target

CLASSES = ("circle", "square")
SIDES = {"min_size": 64, "max_size": 96}  # model pixels
TWO_STAGE = {
    "box_batch_size_per_image": 16,
    "rpn_pre_nms_top_n_train": 30,
    "rpn_post_nms_top_n_train": 30,
    "rpn_pre_nms_top_n_test": 30,
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0,
}
DENSE = {"score_thresh": 0.0, "topk_candidates": 100, "detections_per_img": 60}


@dataclass(frozen=True)
class Spec:
    """A description, and what is known of the pyramid that it builds."""

    description: dict[str, Any]
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    embedding_channels: int
    centred_on_first_pixel: bool = True


def named(
    name: str,
    arguments: dict[str, Any],
    strides: tuple[int, ...],
    channels: tuple[int, ...],
    embedding: int,
    **more: Any,
) -> tuple[str, Spec]:
    description = {"kind": "torchvision", "name": name, "arguments": arguments, "norm": "batch"}
    return name, Spec(description, strides, channels, embedding, **more)


def composed(head: str, backbone: str, first: int, last: int, **fields: Any) -> tuple[str, Spec]:
    description = {
        "kind": "composed",
        "backbone": backbone,
        "width": None,
        "blocks": None,
        "head": head,
        "pyramid_channels": 24,
        "pyramid_levels": [first, last],
        "image_size": [64, 96],
        "arguments": {**TWO_STAGE, "representation_size": 32} if head == "faster-rcnn" else DENSE,
        "norm": "batch",
    } | fields
    levels = range(first, last + 1)
    embedding = 32 if head == "faster-rcnn" else 24
    key = f"{head} on {backbone}, levels {first}-{last}, {description['norm']}"
    return key, Spec(description, tuple(2**level for level in levels), (24,) * len(levels), embedding)


FPN, DENSE_FPN = (4, 8, 16, 32, 64), (8, 16, 32, 64, 128)
SLIM = {"width": 8, "blocks": [1, 1, 1, 1]}
NEXT = {"width": 16, "blocks": [1, 1, 1, 1]}  # 32 groups need 16 channels
SPECS = dict(
    [
        named("fasterrcnn_resnet50_fpn", TWO_STAGE | SIDES, FPN, (256,) * 5, 1024),
        named("fasterrcnn_resnet50_fpn_v2", TWO_STAGE | SIDES, FPN, (256,) * 5, 1024),
        named("fasterrcnn_mobilenet_v3_large_fpn", TWO_STAGE | SIDES, (32, 32, 64), (256,) * 3, 1024),
        named("fasterrcnn_mobilenet_v3_large_320_fpn", TWO_STAGE | SIDES, (32, 32, 64), (256,) * 3, 1024),
        named("maskrcnn_resnet50_fpn", TWO_STAGE | SIDES, FPN, (256,) * 5, 1024),
        named("maskrcnn_resnet50_fpn_v2", TWO_STAGE | SIDES, FPN, (256,) * 5, 1024),
        named("retinanet_resnet50_fpn", DENSE | SIDES, DENSE_FPN, (256,) * 5, 256),
        named("retinanet_resnet50_fpn_v2", DENSE | SIDES, DENSE_FPN, (256,) * 5, 256),
        named("fcos_resnet50_fpn", DENSE | SIDES, DENSE_FPN, (256,) * 5, 256),
        # Two unpadded convolutions at the end keep the stride; pooling stages centre the first cell elsewhere.
        named(
            "ssd300_vgg16",
            DENSE,
            (8, 16, 32, 64, 64, 64),
            (512, 1024, 512, 256, 256, 256),
            2816,
            centred_on_first_pixel=False,
        ),
        named(
            "ssdlite320_mobilenet_v3_large", DENSE, (16, 32, 64, 128, 256, 512), (672, 480, 512, 256, 256, 128), 2304
        ),
        composed("faster-rcnn", "resnet18", 2, 6, **SLIM),
        composed("faster-rcnn", "resnext50_32x4d", 2, 5, **NEXT),
        composed("faster-rcnn", "mobilenet_v3_small", 3, 5, width=0.5, norm="frozen"),
        composed("retinanet", "resnet18", 3, 7, **SLIM, norm="frozen"),
        composed("retinanet", "resnext50_32x4d", 4, 6, **NEXT),
        composed("retinanet", "mobilenet_v2", 2, 5, width=0.25),
        composed("fcos", "resnet18", 3, 7, **SLIM),
        composed("fcos", "resnext50_32x4d", 3, 5, **NEXT),
        composed("fcos", "mobilenet_v3_small", 3, 6, width=0.5),
    ]
)
SSD300_CELLS = (38, 19, 10, 5, 3, 1)


def test_the_whole_catalogue_is_here() -> None:
    assert set(architectures.TORCHVISION_DETECTORS) <= set(SPECS)
    assert {spec.description.get("head") for spec in SPECS.values()} == {None, *architectures.HEADS}


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    """Shallow ResNets and a slim VGG with the real ones' stages, strides and channels.

    The full ResNets that composed ones are cut from get no weights: filling them takes longer than all the rest.
    """

    def shallow_resnet50(*, norm_layer: Callable[..., nn.Module] | None = None, **_: Any) -> nn.Module:
        return resnet.ResNet(resnet.Bottleneck, [1, 1, 1, 1], norm_layer=norm_layer, width_per_group=8)

    def without_weights(builder: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def build(**arguments: Any) -> nn.Module:
            with torch.device("meta"):
                return builder(**arguments)

        return build

    class SlimVGG16(nn.Module):
        def __init__(self, **_: Any) -> None:
            super().__init__()
            widths = [8, 8, "M", 16, 16, "M", 16, 16, 16, "M", 32, 32, 512, "M", 32, 32, 512, "M"]
            self.features = vgg.make_layers(widths)

    with pytest.MonkeyPatch.context() as patch:
        for module in ("faster_rcnn", "mask_rcnn", "retinanet", "fcos"):
            patch.setattr(f"torchvision.models.detection.{module}.resnet50", shallow_resnet50)
        patch.setattr("torchvision.models.detection.ssd.vgg16", SlimVGG16)
        for name in ("resnet18", "resnext50_32x4d"):
            patch.setattr(resnet, name, without_weights(getattr(resnet, name)))
        yield


@dataclass(frozen=True)
class Case:
    spec: Spec
    detector: Detector

    @property
    def module(self) -> Any:
        return self.detector.module


@pytest.fixture(scope="module", params=list(SPECS))
def case(request: pytest.FixtureRequest, _small: None) -> Case:
    spec = SPECS[request.param]
    torch.manual_seed(0)
    case = Case(spec, catalog.build(spec.description, CLASSES))
    with pytest.MonkeyPatch.context() as patch:
        if max(spec.strides) <= 128 and "ssd" not in request.param:
            patch.setattr(geometry, "_SIDES", (128, 192))  # pixels; the SSDs need more
        assert case.detector.levels  # measured here, once
    return case


@pytest.fixture(scope="module")
def observed(case: Case, batch: Batch) -> Observation:
    case.module.train()
    torch.manual_seed(2)
    return case.detector.observe(batch)


@pytest.fixture(scope="module")
def looked(case: Case, batch: Batch) -> Observation:
    return case.detector.look(batch)


@pytest.fixture(scope="module")
def batch() -> Batch:
    """Two images that every detector enlarges, the second without objects."""
    generator = torch.Generator().manual_seed(0)
    return Batch(
        images=[torch.rand(3, 48, 64, generator=generator), torch.rand(3, 60, 40, generator=generator)],
        targets=[
            Target(boxes=torch.tensor([[4.0, 6, 30, 38], [28, 10, 60, 44]]), labels=torch.tensor([1, 2])),
            Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64)),
        ],
        image_ids=torch.tensor([101, 102]),
    )


def all_regions(candidates: Candidates, *, own: bool) -> Regions:
    rows = torch.arange(len(candidates.boxes))
    return Regions(
        boxes=candidates.boxes,
        image_index=candidates.image_index,
        candidate=rows if own else torch.full_like(rows, -1),
    )


def assert_same_detections(first: list[Detections], second: list[Detections]) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a.boxes, b.boxes)
        assert torch.equal(a.scores, b.scores)
        assert torch.equal(a.labels, b.labels)


# --------------------------------------------------------------------------------------------------------- contract


def test_declared_levels_are_the_observed_ones(case: Case, looked: Observation) -> None:
    levels = case.detector.levels
    assert tuple(level.stride for level in levels) == tuple((float(s), float(s)) for s in case.spec.strides)
    assert tuple(level.channels for level in levels) == case.spec.channels
    if case.spec.centred_on_first_pixel:
        assert {level.offset for level in levels} == {(0.5, 0.5)}
    if case.spec.description.get("name") == "ssd300_vgg16":
        # A 2 x 2 pool moves the centre by half a cell, a convolution without padding by its margin.
        assert [level.offset[0] for level in levels] == [4, 8, 8, 8, 72, 136]

    pyramid = looked.pyramid
    assert pyramid.levels == levels
    expected = [tuple(math.ceil(side / stride) for side in pyramid.frame.size) for stride in case.spec.strides]
    if case.spec.description.get("name") == "ssd300_vgg16":
        expected = [(cells, cells) for cells in SSD300_CELLS]
    assert [tuple(m.shape) for m in pyramid.maps] == [
        (2, channels, *cells) for channels, cells in zip(case.spec.channels, expected, strict=True)
    ]


def test_observing_changes_nothing(case: Case, batch: Batch) -> None:
    """The same losses as the module's own, to the last bit; and no hook stays."""
    case.module.train()
    torch.manual_seed(1)
    expected = case.module(batch.images, [{"boxes": t.boxes, "labels": t.labels} for t in batch.targets])
    torch.manual_seed(1)
    losses = case.detector.observe(batch).losses

    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[name], value) for name, value in expected.items())
    assert all(loss.requires_grad and torch.isfinite(loss) for loss in losses.values())
    assert case.module.training
    assert not any(module._forward_hooks for module in case.module.modules())


def test_looking_is_the_backbone_in_evaluation_mode(case: Case, batch: Batch) -> None:
    case.module.train()
    before = {name: value.clone() for name, value in case.module.state_dict().items()}
    seen = case.detector.look(batch)
    assert case.module.training  # as it was
    assert all(torch.equal(value, before[name]) for name, value in case.module.state_dict().items())
    assert seen.losses == {}
    assert seen.candidates is None

    case.module.eval()
    images, _ = case.module.transform(batch.images)
    for ours, theirs in zip(seen.pyramid.maps, case.module.backbone(images.tensors).values(), strict=True):
        assert torch.equal(ours, theirs)
    assert seen.pyramid.frame.size == tuple(images.tensors.shape[-2:])
    assert not case.module.training


def test_candidates_lie_in_their_images(case: Case, batch: Batch, observed: Observation) -> None:
    candidates = observed.candidates
    assert candidates is not None

    assert candidates.sampled == (case.detector.family == "two-stage")
    assert not candidates.boxes.requires_grad
    assert candidates.image_index.dtype == torch.int64
    assert (candidates.image_index.diff() >= 0).all()
    assert candidates.image_index.unique().tolist() == [0, 1]
    for i, image in enumerate(batch.images):
        boxes = candidates.boxes[candidates.image_index == i]
        limit = torch.tensor([image.shape[2], image.shape[1]])
        assert (boxes >= -1e-3).all()
        assert (boxes[:, 2:] <= limit + 1e-3).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 2:].amax(dim=0) > limit / 2).all()  # image pixels, not smaller ones


@pytest.mark.parametrize("which", ["observed", "looked"])
def test_views_have_their_shapes(case: Case, which: str, request: pytest.FixtureRequest) -> None:
    seen: Observation = request.getfixturevalue(which)
    boxes = torch.tensor([[4.0, 6, 30, 38], [-3, 5, 20, 70], [8, 8, 9, 9], [0, 0, 40, 60], [2, 2, 38, 20]])
    outputs = len(CLASSES) + 1
    two_stage = case.detector.family == "two-stage"
    several = len(set(case.spec.channels)) > 1
    assert case.detector.embedding_channels == case.spec.embedding_channels
    case.module.eval()  # a normalised box head cannot train on no region

    every: list[View] = ["pooled", "embedding", "predictions"]
    for needs in ([every[0]], [every[1]], [every[2]], every):
        for count in (0, 5):
            some = Regions(boxes[:count], torch.tensor([0, 0, 0, 1, 1])[:count], torch.full((count,), -1))
            view = case.detector.view_regions(seen, some, frozenset(needs))
            if "pooled" in needs:
                assert view.pooled is not None
                assert view.pooled.shape == (count, max(case.spec.channels), 7, 7)
            if "embedding" in needs:
                assert view.embedding is not None
                assert view.embedding.shape == (count, case.spec.embedding_channels)
            if "predictions" in needs and two_stage:
                assert view.class_logits is not None
                assert view.box_deltas is not None
                assert view.class_logits.shape == (count, outputs)
                assert view.box_deltas.shape == (count, outputs, 4)
            if not two_stage:
                assert view.class_logits is None
                assert view.box_deltas is None
            assert (view.pooled_channels is not None) == (several and "pooled" in needs)
            if view.pooled is not None and view.pooled_channels is not None:
                assert set(view.pooled_channels.tolist()) <= set(case.spec.channels)
                for features, channels in zip(view.pooled, view.pooled_channels, strict=True):
                    assert (features[channels:] == 0).all()


def test_candidates_look_as_their_head_saw_them(case: Case, observed: Observation) -> None:
    """A two-stage head ran on its candidates already: reading the same boxes from the pyramid anew gives the same."""
    assert observed.candidates is not None
    case.module.train()
    two_stage = case.detector.family == "two-stage"
    needs: frozenset[View] = frozenset({"embedding", "predictions"} if two_stage else {"embedding"})
    own = case.detector.view_regions(observed, all_regions(observed.candidates, own=True), needs)

    assert own.embedding is not None
    assert own.embedding.shape == (len(observed.candidates.boxes), case.spec.embedding_channels)
    assert own.embedding.requires_grad
    if two_stage:
        anew = case.detector.view_regions(observed, all_regions(observed.candidates, own=False), needs)
        for ours, theirs in (
            (own.embedding, anew.embedding),
            (own.class_logits, anew.class_logits),
            (own.box_deltas, anew.box_deltas),
        ):
            assert ours is not None and theirs is not None
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_predictions_are_in_each_images_own_pixels(case: Case, batch: Batch) -> None:
    case.module.train()
    found = case.detector.predict(batch.images)
    assert case.module.training  # as it was
    with torch.no_grad():
        raw = case.module.eval()(batch.images)
    objects = [r["labels"] > 0 for r in raw]  # an untrained RetinaNet or FCOS finds background, too
    assert_same_detections(
        found, [Detections(r["boxes"][o], r["scores"][o], r["labels"][o]) for r, o in zip(raw, objects, strict=True)]
    )
    for image, one in zip(batch.images, found, strict=True):
        limit = torch.tensor([image.shape[2], image.shape[1]])
        assert len(one.boxes) > 0
        assert (one.boxes >= 0).all()
        assert (one.boxes[:, 2:] <= limit + 1e-3).all()
        assert (one.scores.diff() <= 0).all()
        assert set(one.labels.tolist()) <= {1, 2}
        assert not one.boxes.requires_grad


def test_a_saved_detector_is_the_same(case: Case, batch: Batch, tmp_path: Path) -> None:
    path = tmp_path / "student.pt"
    catalog.save(path, case.detector, case.spec.description)
    found = catalog.load(path)
    loaded, description = found.detector, found.description
    path.unlink()  # up to 100 MB, which pytest would keep

    assert description == case.spec.description
    assert loaded.class_names == CLASSES
    assert not loaded.module.training
    image = batch.images[:1]
    assert_same_detections(loaded.predict(image), case.detector.predict(image))


# --------------------------------------------------------------------------------------------------- dense embedding


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_a_candidate_is_embedded_where_it_was_predicted(
    head: str, tiny_detector: Callable[..., Detector], batch: Batch
) -> None:
    detector = tiny_detector(head, classes=CLASSES)
    module: Any = detector.module
    seen: Any = detector.observe(batch)
    regions = all_regions(seen.candidates, own=True)
    embedding = detector.view_regions(seen, regions, frozenset({"embedding"})).embedding
    assert embedding is not None

    classify = module.head.classification_head
    tower = [classify.conv(m) for m in seen.pyramid.maps]
    for row, image, (level, y, x) in zip(embedding, regions.image_index, seen.cell.tolist(), strict=True):
        torch.testing.assert_close(row, tower[level][image, :, y, x])
    # Any candidate's class score stands at its cell; the first of an image is the best of all.
    if head == "retinanet":
        logits = [classify.cls_logits(t) for t in tower]
        for image in range(2):
            first = int((regions.image_index == image).nonzero()[0])
            level, y, x = seen.cell[first].tolist()
            assert logits[level][image, :, y, x].max() == max(m[image].max() for m in logits)
    else:  # FCOS measures from the cell to the four sides, so the cell lies in its box
        pixels = seen.pyramid.frame.to_model(regions.boxes, regions.image_index)
        height, width = seen.pyramid.frame.size  # torchvision takes the steps between its anchors from whole cells
        steps = torch.tensor([[width // m.shape[3], height // m.shape[2]] for m in seen.pyramid.maps])[seen.cell[:, 0]]
        at = seen.cell[:, [2, 1]] * steps
        inside = torch.tensor([[i.shape[2], i.shape[1]] for i in batch.images]) * seen.pyramid.frame.scale
        at = at.minimum(inside[regions.image_index])  # a box is clipped to its image, which was padded
        assert (pixels[:, :2] <= at + 1e-3).all()
        assert (pixels[:, 2:] >= at - 1e-3).all()


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_another_box_is_embedded_at_its_centre(head: str, tiny_detector: Callable[..., Detector], batch: Batch) -> None:
    detector = tiny_detector(head, classes=CLASSES)
    module: Any = detector.module
    seen = detector.look(batch)  # image 0: 48 x 64 pixels, twice as large in the model, at 64 x 85
    scale = seen.pyramid.frame.scale[0]
    # Sides of 45 model pixels belong to stride 8: 45 = 4 sqrt(2) x 8. The centre is that of cell (y 3, x 5).
    centre = torch.tensor([5 * 8 + 0.5, 3 * 8 + 0.5])
    box = torch.cat([(centre - 22.6) / scale, (centre + 22.6) / scale])[None]
    regions = Regions(box, torch.tensor([0]), torch.tensor([-1]))
    embedding = detector.view_regions(seen, regions, frozenset({"embedding"})).embedding

    module.eval()
    tower = module.head.classification_head.conv(seen.pyramid.maps[0])
    torch.testing.assert_close(embedding, tower[:1, :, 3, 5])


# ------------------------------------------------------------------------------------------------------------- files

REBUILD = """
import importlib.abc, sys


class NoGDetKD(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "gdetkd_cli":
            raise ImportError("gdetkd_cli is not installed here")


sys.meta_path.insert(0, NoGDetKD())
sys.path.insert(0, sys.argv[1])
import torch
from architectures import load

torch.set_num_threads(1)
images = torch.load("images.pt", weights_only=True)
for name in sys.argv[2:]:
    with torch.no_grad():
        found = load(name + ".pt")(images)
    torch.save(found, name + "-found.pt")
try:
    import gdetkd_cli
except ImportError:
    print("done")
"""


def test_a_saved_detector_can_be_rebuilt_without_this_package(batch: Batch, tmp_path: Path) -> None:
    """``architectures.py`` alone is enough, and nothing in the file needs pickled code."""
    shutil.copy(architectures.__file__, tmp_path)
    torch.save(batch.images, tmp_path / "images.pt")
    expected = {}
    for key in (
        "faster-rcnn on mobilenet_v3_small, levels 3-5, frozen",
        "retinanet on resnext50_32x4d, levels 4-6, batch",
        "fcos on resnet18, levels 3-7, batch",
    ):
        name = key.split(" ")[0]
        detector = catalog.build(SPECS[key].description, CLASSES)
        catalog.save(tmp_path / f"{name}.pt", detector, SPECS[key].description)
        with torch.no_grad():
            expected[name] = detector.module.eval()(batch.images)
        saved = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        assert saved["classes"] == list(CLASSES)

    done = subprocess.run(
        [sys.executable, "-I", "-c", REBUILD, str(tmp_path), *expected],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "done\n", done.stderr
    for name, ours in expected.items():
        theirs = torch.load(tmp_path / f"{name}-found.pt", weights_only=True)
        for one, other in zip(ours, theirs, strict=True):
            assert len(one["boxes"]) > 0
            assert all(torch.equal(one[key], other[key]) for key in ("boxes", "scores", "labels"))


@pytest.fixture
def saved(tiny_detector: Callable[..., Detector], tiny_description: Callable[..., Any], tmp_path: Path) -> Path:
    path = tmp_path / "student.pt"
    catalog.save(path, tiny_detector("fcos"), tiny_description("fcos"))
    return path


def rewrite(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def test_half_precision_files_load_in_float32(saved: Path) -> None:
    def halve(content: dict[str, Any]) -> None:
        content["model"] = {n: v.half() if v.is_floating_point() else v for n, v in content["model"].items()}

    rewrite(saved, halve)
    detector = catalog.load(saved).detector

    assert {p.dtype for p in detector.module.parameters()} == {torch.float32}


def test_what_holds_no_weights_is_no_detector(saved: Path) -> None:
    torch.save({"a": torch.ones(1), "b": "text"}, saved)
    with pytest.raises(ModelError, match="holds no state_dict"):
        catalog.load(saved)
    torch.save(torch.ones(2), saved)
    with pytest.raises(ModelError, match="holds no state_dict"):
        catalog.load(saved)


def test_a_newer_file_says_so(saved: Path) -> None:
    rewrite(saved, lambda content: content.update(gdetkd=catalog.FILE_VERSION + 1))
    with pytest.raises(ModelError, match="written by a newer gdetkd"):
        catalog.load(saved)


def test_weights_that_do_not_fit_their_architecture(saved: Path) -> None:
    rewrite(saved, lambda content: content["architecture"].update(pyramid_channels=24))
    with pytest.raises(ModelError, match="weights do not fit the architecture it names"):
        catalog.load(saved)


def test_locate(saved: Path, tmp_path: Path) -> None:
    assert catalog.locate(str(saved)) == saved
    assert catalog.locate(str(tmp_path)) == saved  # a run folder
    saved.unlink()
    with pytest.raises(ModelError, match=r"holds no student\.pt; expected the folder of a finished run"):
        catalog.locate(str(tmp_path))
    with pytest.raises(ModelError, match="does not exist; expected a run folder"):
        catalog.locate(str(saved))
    with pytest.raises(ModelError, match="no built-in detector 'builtin:nothing'; there are: "):
        catalog.locate("builtin:nothing")


# ----------------------------------------------------------------------------------------------------------- classes


@pytest.mark.parametrize(
    "key",
    [
        "faster-rcnn on resnet18, levels 2-6, batch",
        "retinanet on resnet18, levels 3-7, frozen",
        "fcos on resnet18, levels 3-7, batch",
        "ssd300_vgg16",
        "ssdlite320_mobilenet_v3_large",
    ],
)
def test_classes_of_weights(key: str) -> None:
    description = SPECS[key].description
    five, four = tuple("abcde"), tuple("wxyz")
    state = architectures.build(description, 5).state_dict()

    random = torch.get_rng_state()
    assert catalog.classes_of(state, description, four, five) == five
    assert catalog.classes_of(state, description, four, None) == tuple(f"class {i}" for i in range(1, 6))
    assert torch.equal(torch.get_rng_state(), random)


def test_classes_of_weights_by_the_data_and_of_other_weights() -> None:
    description = SPECS["fcos on resnet18, levels 3-7, batch"].description
    state = architectures.build(description, 5).state_dict()

    assert catalog.classes_of(state, description, tuple("abcde"), tuple("wxyz")) == tuple("abcde")
    assert catalog.classes_of({"other": torch.ones(1)}, description, tuple("wxyz"), None) == tuple("wxyz")


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "hf"}, "unknown architecture kind 'hf'; expected 'torchvision' or 'composed'"),
        ({"backbone": "resnet19"}, "unknown backbone 'resnet19'; known: resnet18, resnet34"),
        ({"head": "yolo"}, "unknown head 'yolo'; known: faster-rcnn, retinanet, fcos"),
        (
            {"arguments": {"colour": 1}},
            "head 'fcos' does not take these arguments: colour; it takes anchor_generator, anchor_sizes",
        ),
        ({"backbone": "mobilenet_v2"}, "'blocks' applies to ResNets only, not to mobilenet_v2"),
        ({"kind": "torchvision", "name": "yolo"}, "unknown torchvision detector 'yolo'; known: fasterrcnn_resnet50"),
        (
            {"kind": "torchvision", "name": "fcos_resnet50_fpn", "arguments": {"colour": 1}},
            "fcos_resnet50_fpn does not take these arguments: colour; it takes anchor_generator",
        ),
    ],
)
def test_descriptions_that_cannot_be_built(
    change: dict[str, Any], message: str, tiny_description: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(ModelError, match=message):
        catalog.build(tiny_description("fcos") | change, CLASSES)


def test_arguments_that_the_transform_takes(tiny_description: Callable[..., dict[str, Any]]) -> None:
    module: Any = catalog.build(tiny_description("fcos", arguments={"size_divisible": 128}), CLASSES).module

    assert module.transform.size_divisible == 128


def test_a_module_of_no_family() -> None:
    with pytest.raises(ModelError, match="Linear is not a detector that gdetkd knows; expected torchvision's"):
        catalog.wrap(nn.Linear(2, 2), CLASSES)


def test_descriptions_are_not_changed_by_building(tiny_description: Callable[..., dict[str, Any]]) -> None:
    for head in architectures.HEADS:
        description = tiny_description(head)
        before = repr(description)
        catalog.build(description, CLASSES)
        assert repr(description) == before


def test_frozen_norms_do_not_train() -> None:
    for key in ("ssdlite320_mobilenet_v3_large", "retinanet on resnet18, levels 3-7, frozen"):
        module = catalog.build(SPECS[key].description | {"norm": "frozen"}, CLASSES).module
        assert not any(isinstance(m, nn.BatchNorm2d) for m in module.modules())
        assert not any(name.endswith("num_batches_tracked") for name in module.state_dict())


def test_slim_and_shallow_resnets() -> None:
    module: Any = catalog.build(SPECS["faster-rcnn on resnet18, levels 2-6, batch"].description, CLASSES).module
    body = module.backbone.body

    assert [len(body[f"layer{i}"]) for i in range(1, 5)] == [1, 1, 1, 1]
    assert [body[f"layer{i}"][-1].conv2.out_channels for i in range(1, 5)] == [8, 16, 32, 64]
    assert body.conv1.out_channels == 8
    assert isinstance(body.conv1.weight, Tensor)
