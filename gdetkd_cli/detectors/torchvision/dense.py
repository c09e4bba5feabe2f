"""torchvision's dense detectors: RetinaNet, FCOS, SSD and SSDlite.

Shapes: N images, L levels, A anchors per cell, R regions, C channels, K classes, P candidates; boxes xyxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS
from torchvision.models.detection.retinanet import RetinaNet
from torchvision.models.detection.ssd import SSD
from torchvision.ops import clip_boxes_to_image

from gdetkd_cli.detectors.pooling import POOLED_SIZE, assign_levels, get_channels, pool_all_levels, pool_assigned
from gdetkd_cli.detectors.protocol import Candidates, Detector, Family, Observation, RegionView, View
from gdetkd_cli.detectors.tap import Tap
from gdetkd_cli.detectors.torchvision import common
from gdetkd_cli.detectors.torchvision.exact_boxes import exact_boxes
from gdetkd_cli.host import copy_numbers, copy_tensor
from gdetkd_cli.structures import Batch, Detections, LevelSpec, Pyramid, Regions

_TOWER = "head.classification_head.conv"
_CANDIDATES_PER_IMAGE = 1000


@dataclass(frozen=True)
class DenseObservation(Observation):
    """Adds the tensors from which region embeddings and class maps are read.

    Attributes:
        tower: L maps (N, C, H_l, W_l), the last features of the classification branch; None without such a branch (SSD)
            or after ``extract_features``.
        cell: (P, 3) int64, the (level, y, x) that predicted each candidate; None without candidates.
        class_logits: (N, HWA, K + 1), the head's; None after ``extract_features``.
    """

    tower: tuple[Tensor, ...] | None
    cell: Tensor | None
    class_logits: Tensor | None


class DenseDetector(Detector):
    """A ``torchvision.models.detection`` RetinaNet, FCOS or SSD."""

    family: Family = "dense"

    def __init__(self, *, module: nn.Module, class_names: tuple[str, ...]) -> None:
        self.module: Any = module
        self.class_names = class_names
        self._has_tower = _TOWER in dict(module.named_modules())
        self._sides = _measure_sides(module)  # now, because later the anchors may be on a device

    @cached_property
    def levels(self) -> tuple[LevelSpec, ...]:
        return common.measure_backbone(self.module)

    @property
    def embedding_channels(self) -> int:
        # Without a tower, the embedding concatenates the region's mean on every level.
        return self.levels[0].channels if self._has_tower else sum(level.channels for level in self.levels)

    @property
    def embedding_source(self) -> str:
        return _TOWER if self._has_tower else "mean over the region on every level"

    def forward_train(self, batch: Batch, *, candidates: bool = True) -> DenseObservation:
        names = ["transform", "backbone", "head", "anchor_generator"] + ([_TOWER] if self._has_tower else [])
        common.check_sizes(self.module, batch.images)
        with exact_boxes(self.module), Tap(self.module, names) as tap:
            losses = self.module(batch.images, common.convert_targets(batch))
        images, _ = tap.output("transform")
        features = common.name_features(tap.output("backbone"))
        pyramid = common.build_pyramid(batch.images, images, features, self.levels)
        boxes, cell = None, None
        if candidates:
            boxes, cell = self._select_candidates(tap.output("head"), tap.output("anchor_generator"), pyramid, images)
        return DenseObservation(
            losses=losses,
            pyramid=pyramid,
            candidates=boxes,
            tower=tuple(tap.outputs(_TOWER)) if self._has_tower else None,
            cell=cell,
            class_logits=tap.output("head")["cls_logits"],
        )

    def extract_features(self, batch: Batch) -> DenseObservation:
        images, features = common.extract_features(self.module, batch.images)
        return self.recall(batch, common.build_pyramid(batch.images, images, features, self.levels), {})

    def recall(self, batch: Batch, pyramid: Pyramid, kept: Mapping[str, Tensor]) -> DenseObservation:
        return DenseObservation(losses={}, pyramid=pyramid, candidates=None, tower=None, cell=None, class_logits=None)

    def region_outputs(self, seen: Observation, regions: Regions, needs: frozenset[View]) -> RegionView:
        assert isinstance(seen, DenseObservation), "an observation of another detector"
        fcos = self.dense_head == "fcos"  # which looks at the side that is farthest from a cell
        assignment = assign_levels(seen.pyramid, regions, cells_per_side=self.cells_per_side, longest=fcos)
        pooled = "pooled" in needs
        return RegionView(
            pooled=pool_assigned(seen.pyramid, regions, assignment) if pooled else None,
            pooled_channels=get_channels(self.levels, assignment) if pooled else None,
            embedding=self._embed(seen, regions, assignment) if "embedding" in needs else None,
            level=assignment,
            class_maps=self._read_class_maps(seen) if "class_maps" in needs else None,
        )

    def predict(self, images: list[Tensor]) -> list[Detections]:
        return common.predict(self.module, images)

    @property
    def dense_head(self) -> Literal["retinanet", "fcos"] | None:
        if isinstance(self.module, RetinaNet):
            return "retinanet"
        return "fcos" if isinstance(self.module, FCOS) else None

    @property
    def anchors(self) -> tuple[Tensor, ...] | None:
        """By level (A, 4) xyxy, the anchors of a cell around its centre, in cells; None for SSD.

        SSD's classes exclude each other, so its scores cannot be compared with the others'.
        """
        if isinstance(self.module, SSD):
            return None
        return common.convert_anchors(self.module.anchor_generator, self.levels)

    @cached_property
    def cells_per_side(self) -> tuple[float, ...]:
        """By level, the side in the middle of those that the head trains there: the geometric mean of its anchors.

        An FCOS trains a cell within 1.5 anchors of a box's centre that is 4 to 8 anchors from the farthest side. Two
        levels have as many such cells for a box of about 13 anchors of the finer one.
        """
        strides = [(level.stride[0] * level.stride[1]) ** 0.5 for level in self.levels]
        return tuple(side / stride for side, stride in zip(self._sides, strides, strict=True))

    def _read_class_maps(self, seen: DenseObservation) -> tuple[Tensor, ...]:
        logits = seen.class_logits
        if logits is None:
            with common.use_eval_mode(self.module):
                logits = self.module.head.classification_head(list(seen.pyramid.maps))
        per_cell = self.module.anchor_generator.num_anchors_per_location()
        sizes = [(m.shape[-2], m.shape[-1], a) for m, a in zip(seen.pyramid.maps, per_cell, strict=True)]
        levels = logits.split([height * width * anchors for height, width, anchors in sizes], dim=1)
        return tuple(
            level.unflatten(1, size).flatten(3).permute(0, 3, 1, 2) for level, size in zip(levels, sizes, strict=True)
        )

    def _embed(self, seen: DenseObservation, regions: Regions, assignment: Tensor) -> Tensor:
        if not self._has_tower:
            # As many samples as the mean of a pooled region has; a few would miss most cells of a large region.
            levels = pool_all_levels(seen.pyramid, regions, size=1, sampling_ratio=2 * POOLED_SIZE)
            return torch.cat([level.flatten(1) for level in levels], dim=1)
        cell = self._find_central_cells(seen.pyramid, regions, assignment)
        if seen.cell is not None:
            own = regions.candidate >= 0
            cell = (
                torch.where(own[:, None], seen.cell[regions.candidate.clamp(min=0)], cell) if len(seen.cell) else cell
            )
        tower = seen.tower
        if tower is None:
            with common.use_eval_mode(self.module):
                tower = tuple(self.module.head.classification_head.conv(m) for m in seen.pyramid.maps)
        embedding = tower[0].new_zeros(len(regions), tower[0].shape[1])
        own, y, x = cell.unbind(dim=1)
        # Every region is read on every level: a few more rows cost less than waiting for the rows of each level.
        for level, features in enumerate(tower):
            height, width = features.shape[-2:]
            read = features[regions.image_index, :, y.clamp(max=height - 1), x.clamp(max=width - 1)]
            embedding = torch.where((own == level)[:, None], read, embedding)
        return embedding

    def _find_central_cells(self, pyramid: Pyramid, regions: Regions, assignment: Tensor) -> Tensor:
        """(R, 3) int64: each region's level, and the cell (y, x) that contains the region's centre."""
        pixels = pyramid.frame.to_model(regions.boxes, regions.image_index)
        stride, offset = (  # (R, 2) each, x and y
            copy_numbers(values, pixels)[assignment].flip(1)
            for values in ([level.stride for level in pyramid.levels], [level.offset for level in pyramid.levels])
        )
        last = copy_numbers([(m.shape[-2] - 1, m.shape[-1] - 1) for m in pyramid.maps], assignment)[assignment]
        low, high = ((corner - offset) / stride + 0.5 for corner in pixels.split(2, dim=1))  # like ``convert_to_cells``
        cell = ((low + high) / 2).floor().long().flip(1).clamp(min=0).minimum(last)  # (R, 2), y and x
        return torch.cat([assignment[:, None], cell], dim=1)

    @torch.no_grad()
    def _select_candidates(
        self, head: dict[str, Tensor], anchors: list[Tensor], pyramid: Pyramid, images: Any
    ) -> tuple[Candidates, Tensor]:
        """Each image's predictions with the best scores, before NMS, and their cells."""
        scores = self._compute_scores(head).float()  # (N, HWA)
        cell_of = self._list_cells(pyramid, scores.shape[1])
        count = min(_CANDIDATES_PER_IMAGE, scores.shape[1])
        best = scores.topk(count, dim=1).indices  # (N, count)
        boxes, image_index = [], []
        for i, (rows, image_size) in enumerate(zip(best, images.image_sizes, strict=True)):
            decoded = self._decode(head["bbox_regression"][i, rows].float(), anchors[i][rows])
            boxes.append(clip_boxes_to_image(decoded, image_size))
            image_index.append(torch.full((count,), i, device=rows.device))
        index = torch.cat(image_index)
        all_boxes = torch.cat(boxes)
        # A clipped box may be empty, and an empty box cannot be pooled.
        inside = ((all_boxes[:, 2:] - all_boxes[:, :2]) >= 1).all(dim=1) & torch.isfinite(all_boxes).all(dim=1)
        kept = inside.cpu()  # the only wait; the counts need it too
        rows = copy_tensor(kept.nonzero().squeeze(1), inside)
        index, all_boxes, cell = index[rows], all_boxes[rows], cell_of[best.flatten()[rows]]
        candidates = Candidates(
            boxes=pyramid.frame.to_image(all_boxes, index),
            image_index=index,
            sampled=False,
            counts=tuple(kept.view(-1, count).sum(dim=1).tolist()),
        )
        return candidates, cell

    def _compute_scores(self, head: dict[str, Tensor]) -> Tensor:
        logits = head["cls_logits"]
        if isinstance(self.module, SSD):
            return logits.softmax(dim=-1)[..., 1:].amax(dim=-1)
        scores = logits.sigmoid().amax(dim=-1)
        if isinstance(self.module, FCOS):
            scores = (scores * head["bbox_ctrness"].squeeze(-1).sigmoid()).sqrt()
        return scores

    def _decode(self, deltas: Tensor, anchors: Tensor) -> Tensor:
        if isinstance(self.module, FCOS):
            return self.module.box_coder.decode(deltas, anchors)
        decoded: Tensor = self.module.box_coder.decode_single(deltas, anchors)
        return decoded

    def _list_cells(self, pyramid: Pyramid, predictions: int) -> Tensor:
        """(HWA, 3) int64: (level, y, x) of each prediction, in the heads' order (level, y, x, anchor)."""
        per_cell = self.module.anchor_generator.num_anchors_per_location()
        parts = []
        for level, (features, anchors) in enumerate(zip(pyramid.maps, per_cell, strict=True)):
            height, width = features.shape[-2:]
            position = torch.arange(height * width, device=features.device).repeat_interleave(anchors)
            parts.append(torch.stack([torch.full_like(position, level), position // width, position % width], dim=1))
        cell = torch.cat(parts)
        assert len(cell) == predictions, f"{len(cell)} cells x anchors, but {predictions} predictions"
        return cell


def _measure_sides(module: Any) -> list[float]:
    """By level, in pixels of the model, the side of ``DenseDetector.cells_per_side``."""
    generator = module.anchor_generator
    if isinstance(module, SSD):
        width, height = module.transform.fixed_size
        anchors = [shapes.clamp(max=1) * shapes.new_tensor([width, height]) for shapes in generator._wh_pairs]
    else:
        anchors = [corners[:, 2:] - corners[:, :2] for corners in generator.cell_anchors]
    factor = 13 / 2**0.5 if isinstance(module, FCOS) else 1.0
    return [factor * float(shapes.prod(dim=1).log().mean().mul(0.5).exp()) for shapes in anchors]
