"""Region embeddings of a dense detector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from catalogue import CLASSES, all_regions

from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.pooling import pool_all_levels
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.structures import Batch, Regions, Target


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_a_candidate_is_embedded_where_it_was_predicted(
    head: str, tiny_detector: Callable[..., Detector], batch: Batch
) -> None:
    detector = tiny_detector(head, classes=CLASSES)
    module: Any = detector.module
    seen: Any = detector.forward_train(batch)
    regions = all_regions(seen.candidates, own=True)
    embedding = detector.region_outputs(seen, regions, frozenset({"embedding"})).embedding
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
    seen = detector.extract_features(batch)  # image 0: 48 x 64 pixels, twice as large in the model, at 64 x 85
    scale = seen.pyramid.frame.scale[0]
    # These sides belong to the first level, with stride 8. The centre is that of cell (y 3, x 5).
    centre = torch.tensor([5 * 8 + 0.5, 3 * 8 + 0.5])
    assert isinstance(detector.cells_per_side, tuple)
    half = 4 * detector.cells_per_side[0]
    box = torch.cat([(centre - half) / scale, (centre + half) / scale])[None]
    regions = Regions(box, torch.tensor([0]), torch.tensor([-1]))
    embedding = detector.region_outputs(seen, regions, frozenset({"embedding"})).embedding

    module.eval()
    tower = module.head.classification_head.conv(seen.pyramid.maps[0])
    torch.testing.assert_close(embedding, tower[:1, :, 3, 5])


@pytest.mark.parametrize(
    ("head", "arguments"),
    [("fcos", {}), ("retinanet", {}), ("retinanet", {"anchor_sizes": [[12, 17], [24, 34], [48, 68], [90, 118]]})],
)
def test_a_box_belongs_to_the_level_that_the_head_trains_on_it(
    head: str, arguments: dict[str, Any], tiny_detector: Callable[..., Detector], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = tiny_detector(head, classes=CLASSES, pyramid_levels=[2, 5], image_size=[256, 256], arguments=arguments)
    module: Any = detector.module
    counts: list[list[int]] = []
    compute = module.head.compute_loss

    def count(targets: Any, outputs: Any, anchors: Any, matched: list[torch.Tensor]) -> Any:
        per_cell = module.anchor_generator.num_anchors_per_location()
        sizes = [(256 // stride) ** 2 * n for stride, n in zip((4, 8, 16, 32), per_cell, strict=True)]
        counts.append([int((part >= 0).sum()) for part in matched[0].split(sizes)])
        return compute(targets, outputs, anchors, matched)

    monkeypatch.setattr(module.head, "compute_loss", count)
    generator = torch.Generator().manual_seed(0)
    chosen = []
    for side in (16, 24, 36, 46, 72, 90, 150, 180):
        counts.clear()
        for _ in range(4):
            corner = (256 - side) * torch.rand(2, generator=generator)
            box = torch.cat([corner, corner + side])[None]
            batch = Batch([torch.rand(3, 256, 256)], [Target(box, torch.tensor([1]))], torch.arange(1))
            with torch.no_grad():
                seen = detector.forward_train(batch, candidates=False)
        regions = Regions(box, torch.tensor([0]), torch.tensor([-1]))
        (level,) = detector.region_outputs(seen, regions, frozenset({"level"})).level.tolist()  # type: ignore[union-attr]
        trained = torch.tensor(counts).sum(dim=0)
        assert trained[level] >= 0.6 * trained.max(), (side, level, trained)
        chosen.append(level)
    assert set(chosen) >= {0, 1, 2}


@pytest.fixture(scope="module")
def ssdlite() -> Any:
    description = {"kind": "torchvision", "name": "ssdlite320_mobilenet_v3_large", "arguments": {}, "norm": "batch"}
    return catalog.build(description, CLASSES)


def test_ssd_embeds_the_mean_of_a_region(ssdlite: Any, batch: Batch) -> None:
    """On every level, also where the region has many cells: the mean over its 7 x 7 bins."""
    seen = ssdlite.extract_features(batch)
    seen = replace(seen, pyramid=replace(seen.pyramid, maps=tuple(map(torch.rand_like, seen.pyramid.maps))))
    boxes = torch.tensor([[0.0, 0, 40, 30], [5, 4, 12, 11]])
    regions = Regions(boxes, torch.tensor([0, 1]), torch.full((2,), -1))
    embedding = ssdlite.region_outputs(seen, regions, frozenset({"embedding"})).embedding
    pooled = pool_all_levels(seen.pyramid, regions, size=7, sampling_ratio=2)
    torch.testing.assert_close(embedding, torch.cat([level.mean(dim=(2, 3)) for level in pooled], dim=1))


def test_ssd_levels_are_those_of_its_default_boxes(ssdlite: Any) -> None:
    detector = ssdlite
    generator = detector.module.anchor_generator
    for level, cells, scale, after in zip(
        detector.levels, detector.cells_per_side, generator.scales, generator.scales[1:], strict=False
    ):
        side = cells * level.stride[0] / 320
        assert scale * 0.85 < side < after, (side, scale)  # shapes are cut at the image's sides


@pytest.mark.parametrize("head", ["retinanet", "fcos"])
def test_class_logits_of_every_cell(head: str, tiny_detector: Callable[..., Detector], batch: Batch) -> None:
    detector = tiny_detector(head, classes=CLASSES)
    module: Any = detector.module
    seen: Any = detector.forward_train(batch)
    regions = all_regions(seen.candidates, own=True)
    observations: tuple[Any, ...] = (seen, detector.extract_features(batch))
    for observation in observations:
        maps = detector.region_outputs(observation, regions, frozenset({"class_maps"})).class_maps
        assert maps is not None
        tower = [module.head.classification_head.conv(m) for m in observation.pyramid.maps]
        for found, features in zip(maps, tower, strict=True):
            torch.testing.assert_close(
                found, module.head.classification_head.cls_logits(features), rtol=1e-4, atol=1e-4
            )


def test_every_distance_of_a_fresh_fcos_learns(tiny_detector: Callable[..., Detector], batch: Batch) -> None:
    """A distance at 0 behind the ReLU has no gradient and may never get one again."""
    module: Any = tiny_detector("fcos", classes=CLASSES).module
    images, _ = module.transform(batch.images, None)
    distances, _ = module.head.regression_head(list(module.backbone(images.tensors).values()))
    assert (distances > 2).all()  # cells: a level's boxes reach 4 to 8 to their farthest side
    assert (distances < 6).all()
