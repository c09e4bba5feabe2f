"""DETR-like detectors of transformers as students and teachers: their queries are their regions.

Shapes: N images, L levels, Q queries, R regions, K classes, D channels, P candidates; boxes xyxy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import box_iou

from gdetkd_cli.detectors.protocol import Candidates, Family, Observation, QueryView, RegionView, View
from gdetkd_cli.detectors.tap import Tap
from gdetkd_cli.detectors.torchvision import common
from gdetkd_cli.detectors.trainable import TrainableDetector
from gdetkd_cli.detectors.transformers.model import QueryModel, convert_boxes
from gdetkd_cli.errors import ModelError
from gdetkd_cli.host import copy_tensor
from gdetkd_cli.probing.formats.runner import RUN_ERRORS, find_reason
from gdetkd_cli.probing.inputs import ModelInput
from gdetkd_cli.probing.record import list_tensors
from gdetkd_cli.structures import Batch, Detections, Pyramid, Regions

_PROBE_SIZE = (352, 416)  # least height and width in pixels; 11 x 13 cells at stride 32
_STRIDE = 32  # pixels, of the usual coarsest level
_ALIKE = 0.1  # difference of overlaps up to which two queries show one object
_MODEL = "model"  # the submodule of ``QueryModel`` that is transformers' own


@dataclass(frozen=True)
class QueryObservation(Observation):
    """Adds what the decoder knows of each query.

    Attributes:
        boxes: (N, Q, 4) batch-image pixels, detached.
        logits: (N, Q, K), or (N, Q, K + 1) with "no object" last.
        sides: (N, Q, 4), the boxes as centre and size, as fractions of the image.
        hidden: (N, Q, D), the decoder's last hidden states.
        query: (P,) int64, the row of each candidate in the N x Q queries; None without candidates.
    """

    boxes: Tensor
    logits: Tensor
    sides: Tensor
    hidden: Tensor
    query: Tensor | None


class QueryDetector(TrainableDetector):
    """A detector that ``AutoModelForObjectDetection`` builds. Probing finds its pyramid.

    A region's embedding is the last hidden state of the query that predicted its box, or whose box is nearest.
    """

    family: Family = "query"
    module: QueryModel

    def __init__(self, *, module: QueryModel, source: str, class_names: tuple[str, ...], fixed_size: bool) -> None:
        """Probes the module.

        Args:
            module: on the CPU.
            class_names: K names.
            fixed_size: whether the module takes images of its own size only.

        Raises:
            ModelError, NoPyramidError: the module cannot be run, or has no pyramid.
        """
        own = module.preparation
        # In small images a level can have the shape of a decoder's value, such as 4 sides x 4 bins, by chance.
        module.preparation = own if fixed_size else replace(own, height=None, width=None, shortest=0)
        self._unit = find_unit(module.model.config)
        size = own.compute_size(480, 640) if fixed_size else choose_probe_size(self._unit)
        super().__init__(module=module, source=source, class_names=class_names, model_input=ModelInput(), size=size)
        module.preparation = own
        output = self._try_forward(own.compute_size(480, 640))
        self._queries: int = output.logits.shape[1]
        self._own = choose_queries(module.model.config, self._queries)
        self._embedding_channels: int = output.last_hidden_state.shape[-1]
        self._exclusive: bool = output.logits.shape[-1] == len(class_names) + 1

    @torch.no_grad()
    def _try_forward(self, size: tuple[int, int]) -> Any:
        """The output for an image of the model's own size, (height, width) pixels."""
        try:
            with common.use_eval_mode(self.module), Tap(self.module, [_MODEL]) as tap:
                self.module([torch.zeros(3, *size)])
        except (*RUN_ERRORS, ValueError, TypeError, LookupError, ArithmeticError) as error:
            reason = find_reason(error).rstrip(".")
            raise ModelError(
                f"{self._source} fails on images of {size[0]} x {size[1]} pixels ({reason}); choose an image_size "
                f"whose sides are multiples of {self._unit}"
            ) from error
        return tap.output(_MODEL)

    @property
    def features_only(self) -> bool:
        return False

    @property
    def finding(self) -> None:
        return None

    @property
    def exclusive_classes(self) -> bool:
        return self._exclusive

    @property
    def embedding_channels(self) -> int:
        return self._embedding_channels

    @property
    def embedding_source(self) -> str:
        return "last hidden state of the region's query"

    def forward_train(self, batch: Batch, *, candidates: bool = True) -> QueryObservation:
        # Boxes are a network's outputs here, and half precision would round them.
        with torch.autocast(batch.images[0].device.type, enabled=False):
            seen = self._observe(batch, common.convert_targets(batch))
        return self._select_candidates(seen) if candidates else seen

    @torch.no_grad()
    def extract_features(self, batch: Batch) -> QueryObservation:
        with common.use_eval_mode(self.module), torch.autocast(batch.images[0].device.type, enabled=False):
            return self._observe(batch, None)

    @torch.no_grad()
    def predict(self, images: list[Tensor]) -> list[Detections]:
        with common.use_eval_mode(self.module), torch.autocast(images[0].device.type, enabled=False):
            found = self.module(images)
        return [Detections(boxes=own["boxes"], scores=own["scores"], labels=own["labels"]) for own in found]

    def check_detects(self) -> None:
        return

    def region_outputs(self, seen: Observation, regions: Regions, needs: frozenset[View]) -> RegionView:
        assert isinstance(seen, QueryObservation), "an observation of another detector"
        view = super().region_outputs(seen, regions, needs - {"embedding", "predictions"})
        if not needs & {"embedding", "predictions"}:
            return view
        rows, overlap = self._find_queries(seen, regions)
        queries = QueryView(seen.logits.flatten(0, 1)[rows], seen.sides.flatten(0, 1)[rows], rows, overlap)
        return replace(
            view,
            embedding=seen.hidden.flatten(0, 1)[rows] if "embedding" in needs else None,
            queries=queries if "predictions" in needs else None,
        )

    def _observe(self, batch: Batch, targets: list[dict[str, Tensor]] | None) -> QueryObservation:
        """Runs the module and reads its levels and queries."""
        outputs = [self._require_output(level.name, level.output) for level in self.probed.levels]
        with Tap(self.module, [_MODEL, *{output.module for output in outputs}]) as tap:
            returned = self.module(batch.images, targets)
        found: Any = tap.output(_MODEL)
        prepared = [self.module.preparation.compute_size(*image.shape[-2:]) for image in batch.images]
        height, width = (max(sides) for sides in zip(*prepared, strict=True))
        values = [list_tensors(tap.outputs(output.module)[output.call])[output.leaf] for output in outputs]
        maps = [level.as_map(value, (height, width)) for value, level in zip(values, self.probed.levels, strict=True)]
        pyramid = Pyramid(
            maps=tuple(maps), levels=self.levels, frame=common.build_frame(batch.images, prepared, (height, width))
        )
        kept = {"logits": found.logits, "boxes": found.pred_boxes, "hidden": found.last_hidden_state}
        seen = self.recall(batch, pyramid, {name: value[:, self._own] for name, value in kept.items()})
        return replace(seen, losses=returned) if targets is not None else seen

    def keep(self, seen: Observation) -> dict[str, Tensor]:
        assert isinstance(seen, QueryObservation), "an observation of another detector"
        return {"logits": seen.logits, "boxes": seen.sides, "hidden": seen.hidden}

    def recall(self, batch: Batch, pyramid: Pyramid, kept: Mapping[str, Tensor]) -> QueryObservation:
        boxes = [
            convert_boxes(own, image.shape[-2], image.shape[-1])
            for own, image in zip(kept["boxes"].detach(), batch.images, strict=True)
        ]
        return QueryObservation(
            losses={},
            pyramid=pyramid,
            candidates=None,
            boxes=torch.stack(boxes),
            logits=kept["logits"],
            sides=kept["boxes"],
            hidden=kept["hidden"],
            query=None,
        )

    def _select_candidates(self, seen: QueryObservation) -> QueryObservation:
        """Adds the predicted boxes as candidates."""
        images, queries = seen.boxes.shape[:2]
        sides = seen.boxes[..., 2:] - seen.boxes[..., :2]
        # A clipped box may be empty, and an empty box cannot be pooled.
        inside = (torch.isfinite(seen.boxes).all(dim=2) & (sides >= 1).all(dim=2)).cpu()  # the only wait
        rows = inside.flatten().nonzero().squeeze(1)
        index = copy_tensor(torch.arange(images).repeat_interleave(queries)[rows], seen.boxes)
        query = copy_tensor(rows, seen.boxes)
        candidates = Candidates(
            boxes=seen.boxes.flatten(0, 1)[query],
            image_index=index,
            sampled=False,
            counts=tuple(inside.sum(dim=1).tolist()),
        )
        return replace(seen, candidates=candidates, query=query)

    def _find_queries(self, seen: QueryObservation, regions: Regions) -> tuple[Tensor, Tensor]:
        """(R,) int64, the row of each region's query in the N x Q queries, and (R,) the overlap of their boxes.

        Decoders suppress duplicates by their scores, so of the queries that overlap a region about as much as the
        nearest one does, the most confident counts.
        """
        own = seen.boxes[regions.image_index]  # (R, Q, 4)
        by_image = zip(regions.per_image(len(seen.boxes)), seen.boxes, strict=True)
        overlap = torch.cat([box_iou(boxes, predicted) for boxes, predicted in by_image])
        centres = (own[..., :2] + own[..., 2:]) / 2
        here = (regions.boxes[:, None, :2] + regions.boxes[:, None, 2:]) / 2
        # Without any overlap, the query with the nearest centre.
        distance = (centres - here).norm(dim=2)
        nearness = overlap - 1e-6 * distance
        logits = seen.logits.detach().float()
        scores = logits.softmax(dim=2)[..., :-1] if self._exclusive else logits.sigmoid()
        confidence = scores.amax(dim=2)[regions.image_index]  # (R, Q)
        most = overlap.amax(dim=1, keepdim=True)
        alike = (overlap >= most - _ALIKE) & (most > _ALIKE)
        chosen = torch.where(alike, 1 + confidence, nearness).argmax(dim=1)
        if seen.query is not None and len(seen.query):
            candidate = seen.query[regions.candidate.clamp(min=0)] % self._queries
            chosen = torch.where(regions.candidate >= 0, candidate, chosen)
        found = overlap.gather(1, chosen[:, None]).squeeze(1)
        return regions.image_index * self._queries + chosen, found


def find_unit(config: Any) -> int:
    """Finds the number of pixels of which both sides of an image must be a multiple.

    A transformer body cuts the image into patches, and some cut the patches into windows. ``num_windows`` counts those
    of a side (RF-DETR) or of the image (LW-DETR); a multiple for the first fits the second.
    """
    body = getattr(config, "backbone_config", None)
    patch, windows = (getattr(body, name, None) for name in ("patch_size", "num_windows"))
    unit = max(patch if isinstance(patch, int) else 1, 1) * max(windows if isinstance(windows, int) else 1, 1)
    while unit < _STRIDE:
        unit *= 2
    return unit


def choose_probe_size(unit: int) -> tuple[int, int]:
    """Returns (height, width) pixels, two different multiples of ``unit``."""
    height, width = (math.ceil(side / unit) * unit for side in _PROBE_SIZE)
    return height, width if width > height else height + unit


def choose_queries(config: Any, count: int) -> slice:
    """The queries of a training forward that are those of an evaluation, of which there are ``count``.

    Queries for denoising come before them. Group-DETR models (LW-DETR) train several groups, and detect with the first.
    """
    return slice(count) if getattr(config, "group_detr", 1) > 1 else slice(-count, None)
