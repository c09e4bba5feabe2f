"""torchvision's two-stage detectors: Faster R-CNN, and Mask R-CNN used as a box detector.

Shapes: N images, R regions, D embedding channels, K classes; boxes xyxy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gdetkd_cli.detectors.pooling import assign_levels, pool_assigned
from gdetkd_cli.detectors.protocol import Candidates, Detector, Family, Observation, RegionView, StageView, View
from gdetkd_cli.detectors.tap import Tap
from gdetkd_cli.detectors.torchvision import common
from gdetkd_cli.detectors.torchvision.exact_boxes import exact_boxes
from gdetkd_cli.structures import Batch, Detections, LevelSpec, Pyramid, Regions

_POOL, _HEAD, _PREDICTOR = "roi_heads.box_roi_pool", "roi_heads.box_head", "roi_heads.box_predictor"


@dataclass(frozen=True)
class TwoStageObservation(Observation):
    """Adds the inputs of the RoI head, and its outputs for its own training proposals (the candidates).

    Attributes:
        features: the backbone's output by key.
        image_sizes: N (height, width) model pixels without padding.
        sampled: the head's outputs for the candidates, row by row; None after ``extract_features``.
    """

    features: dict[str, Tensor]
    image_sizes: list[tuple[int, int]]
    sampled: RegionView | None


class TwoStageDetector(Detector):
    """A ``torchvision.models.detection.FasterRCNN`` (or a Mask R-CNN without its mask branch)."""

    family: Family = "two-stage"

    def __init__(self, *, module: nn.Module, class_names: tuple[str, ...]) -> None:
        self.module: Any = module
        self.class_names = class_names

    @cached_property
    def levels(self) -> tuple[LevelSpec, ...]:
        return common.measure_backbone(self.module)

    @property
    def embedding_channels(self) -> int:
        return int(self.module.roi_heads.box_predictor.cls_score.in_features)

    @property
    def embedding_source(self) -> str:
        return _HEAD

    @property
    def sampled_proposals(self) -> int | None:
        return int(self.module.roi_heads.fg_bg_sampler.batch_size_per_image)

    @property
    def box_weights(self) -> tuple[float, ...]:
        return tuple(self.module.roi_heads.box_coder.weights)

    @property
    def later_weights(self) -> tuple[float, ...]:
        return tuple(getattr(self.module.roi_heads, "later_weights", ()))

    @property
    def later_box_weights(self) -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(stage.box_coder.weights) for stage in getattr(self.module.roi_heads, "later", ()))

    @property
    def anchors(self) -> tuple[Tensor, ...]:
        """By level (A, 4) xyxy, the RPN's anchors of a cell around its centre, in cells."""
        return common.convert_anchors(self.module.rpn.anchor_generator, self.levels)

    def forward_train(self, batch: Batch, *, candidates: bool = True) -> TwoStageObservation:
        later = [f"roi_heads.later.{number}" for number in range(len(self.later_weights))]
        names = ["transform", "backbone", _POOL, _HEAD, _PREDICTOR]
        names += [f"{stage}.{part}" for stage in later for part in ("box_roi_pool", "box_predictor")]
        common.check_sizes(self.module, batch.images)
        with exact_boxes(self.module), Tap(self.module, names) as tap:
            losses = self.module(batch.images, common.convert_targets(batch))
        images, _ = tap.output("transform")
        features = common.name_features(tap.output("backbone"))
        pyramid = common.build_pyramid(batch.images, images, features, self.levels)
        proposals: list[Tensor] = tap.inputs(_POOL)[1]
        image_index = torch.cat([torch.full((len(p),), i, device=p.device) for i, p in enumerate(proposals)])
        with torch.no_grad():
            boxes, *refined = (
                pyramid.frame.to_image(torch.cat(tap.inputs(pool)[1]), image_index)
                for pool in (_POOL, *(f"{stage}.box_roi_pool" for stage in later))
            )
        class_logits, box_deltas = tap.output(_PREDICTOR)
        return TwoStageObservation(
            losses=losses,
            pyramid=pyramid,
            candidates=Candidates(
                boxes=boxes, image_index=image_index, sampled=True, counts=tuple(len(p) for p in proposals)
            ),
            features=features,
            image_sizes=images.image_sizes,
            sampled=RegionView(
                embedding=tap.output(_HEAD),
                class_logits=class_logits,
                box_deltas=box_deltas.unflatten(1, (-1, 4)),
                later=tuple(
                    _build_stage(boxes, tap.output(f"{stage}.box_predictor"))
                    for boxes, stage in zip(refined, later, strict=True)
                ),
            ),
        )

    def extract_features(self, batch: Batch) -> TwoStageObservation:
        images, features = common.extract_features(self.module, batch.images)
        return TwoStageObservation(
            losses={},
            pyramid=common.build_pyramid(batch.images, images, features, self.levels),
            candidates=None,
            features=features,
            image_sizes=images.image_sizes,
            sampled=None,
        )

    def recall(self, batch: Batch, pyramid: Pyramid, kept: Mapping[str, Tensor]) -> TwoStageObservation:
        sizes = torch.tensor([[image.shape[-1], image.shape[-2]] for image in batch.images])
        resized = (pyramid.frame.on_host().scale * sizes).round().long().flip(1)
        keys = [level.name.removeprefix(common.LEVEL_PREFIX) for level in self.levels]
        return TwoStageObservation(
            losses={},
            pyramid=pyramid,
            candidates=None,
            features=dict(zip(keys, pyramid.maps, strict=True)),
            image_sizes=[(height, width) for height, width in resized.tolist()],
            sampled=None,
        )

    def region_outputs(self, seen: Observation, regions: Regions, needs: frozenset[View]) -> RegionView:
        assert isinstance(seen, TwoStageObservation), "an observation of another detector"
        view = RegionView()
        if needs & {"embedding", "predictions"}:
            view = self._run_head(seen, regions, predictions="predictions" in needs)
        if not needs & {"level", "pooled"}:
            return view
        level = self._assign(seen.pyramid, regions)
        # Pooling by measured geometry, as for every detector. The head's own pooling ignores the measured offset, so it
        # reads a fraction of a cell away.
        return replace(
            view, pooled=pool_assigned(seen.pyramid, regions, level) if "pooled" in needs else None, level=level
        )

    def _run_head(self, seen: TwoStageObservation, regions: Regions, *, predictions: bool) -> RegionView:
        """The RoI head's embeddings and, on request, its predictions."""
        if seen.sampled is not None and regions.are_candidates():
            rows = regions.candidate  # the head ran on these boxes already
            return RegionView(
                embedding=_select_rows(seen.sampled.embedding, rows),
                class_logits=_select_rows(seen.sampled.class_logits, rows),
                box_deltas=_select_rows(seen.sampled.box_deltas, rows),
                later=tuple(
                    StageView(stage.boxes[rows], stage.class_logits[rows], stage.box_deltas[rows])
                    for stage in seen.sampled.later
                ),
            )
        heads = self.module.roi_heads
        embedding = self._embed(heads, seen, regions, regions.boxes)
        if not predictions:
            return RegionView(embedding=embedding)
        with exact_boxes(heads):
            class_logits, box_deltas = heads.box_predictor(embedding)
            # Later stages take the boxes as the student's own stages refined them.
            later = tuple(
                _build_stage(boxes, stage.box_predictor(self._embed(stage, seen, regions, boxes)))
                for boxes, stage in zip(regions.refined, getattr(heads, "later", ()), strict=False)
            )
        return RegionView(
            embedding=embedding, class_logits=class_logits, box_deltas=box_deltas.unflatten(1, (-1, 4)), later=later
        )

    def _embed(self, heads: Any, seen: TwoStageObservation, regions: Regions, boxes: Tensor) -> Tensor:
        """(R, D) embeddings by a RoI head, or a stage of a cascade, of boxes (R, 4) in batch-image pixels."""
        boxes = seen.pyramid.frame.to_model(boxes, regions.image_index)
        per_image = list(boxes.split(regions.count_by_image(len(seen.image_sizes))))
        embedding: Tensor = heads.box_head(heads.box_roi_pool(seen.features, per_image, seen.image_sizes))
        return embedding

    def _assign(self, pyramid: Pyramid, regions: Regions) -> Tensor:
        """(R,) the level that the RoI head pools a region from; a level's octave begins at the canonical scale."""
        pool = self.module.roi_heads.box_roi_pool
        cells_per_side = pool.canonical_scale / 2**pool.canonical_level * 2**0.5
        return assign_levels(pyramid, regions, cells_per_side=cells_per_side, among=len(pool.featmap_names))

    def predict(self, images: list[Tensor]) -> list[Detections]:
        return common.predict(self.module, images)


def _build_stage(boxes: Tensor, predictions: tuple[Tensor, Tensor]) -> StageView:
    class_logits, box_deltas = predictions
    return StageView(boxes=boxes, class_logits=class_logits, box_deltas=box_deltas.unflatten(1, (-1, 4)))


def _select_rows(values: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if values is None else values[rows]
