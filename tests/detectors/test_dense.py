"""Region embeddings of a dense detector."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from catalogue import CLASSES, all_regions

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.structures import Batch, Regions


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
    # Sides of 45 model pixels belong to stride 8: 45 = 4 sqrt(2) x 8. The centre is that of cell (y 3, x 5).
    centre = torch.tensor([5 * 8 + 0.5, 3 * 8 + 0.5])
    box = torch.cat([(centre - 22.6) / scale, (centre + 22.6) / scale])[None]
    regions = Regions(box, torch.tensor([0]), torch.tensor([-1]))
    embedding = detector.region_outputs(seen, regions, frozenset({"embedding"})).embedding

    module.eval()
    tower = module.head.classification_head.conv(seen.pyramid.maps[0])
    torch.testing.assert_close(embedding, tower[:1, :, 3, 5])


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
