"""The interface of a detector. A new family is one file that satisfies ``Detector``.

Shapes: N images, L levels, R regions, C channels, D embedding channels, K classes, A anchors per cell, P candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from gdetkd_cli.detectors.pooling import DENSE_CELLS
from gdetkd_cli.probing.formats.runner import list_not_finite
from gdetkd_cli.structures import Batch, Detections, LevelSpec, Pyramid, Regions

Family = Literal["two-stage", "dense", "query", "unknown"]


@dataclass(frozen=True)
class Candidates:
    """A student's boxes to choose regions from, detached.

    Attributes:
        boxes: (P, 4) xyxy, batch-image pixels.
        image_index: (P,) int64, non-decreasing.
        sampled: True if the detector's own head sampled them (a two-stage head's training proposals), False for the
            predictions of a dense head.
        counts: candidates of each image, if the host has them; None: read from the device.
    """

    boxes: Tensor
    image_index: Tensor
    sampled: bool
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Observation:
    """One forward of a detector.

    Attributes:
        losses: the detector's own losses; empty after ``extract_features``.
        pyramid: the feature maps that its heads read.
        candidates: boxes to choose regions from; None if not requested, or after ``extract_features``.
    """

    losses: dict[str, Tensor]
    pyramid: Pyramid
    candidates: Candidates | None


@dataclass(frozen=True)
class StageView:
    """The outputs of a later stage of a cascade for R regions.

    Attributes:
        boxes: (R, 4) batch-image pixels, detached: the regions as the earlier stages refined them, its input.
        class_logits: (R, K + 1), background first.
        box_deltas: (R, K + 1, 4) in the stage's box coding.
    """

    boxes: Tensor
    class_logits: Tensor
    box_deltas: Tensor


@dataclass(frozen=True)
class QueryView:
    """The predictions of a DETR-like decoder for R regions.

    Attributes:
        class_logits: (R, K), or (R, K + 1) with "no object" last.
        boxes: (R, 4) centre and size, as fractions of the image.
        rows: (R,) int64, the query of each region among all of the batch.
        overlap: (R,) intersection over union of the query's box and the region.
    """

    class_logits: Tensor
    boxes: Tensor
    rows: Tensor
    overlap: Tensor


@dataclass(frozen=True)
class RegionView:
    """A detector's outputs for R regions. A field is None if it was not requested or the family does not have it.

    Attributes:
        pooled: (R, C, 7, 7) from the one level that the detector's own assignment picks, by measured geometry.
        pooled_channels: (R,) how many of the C channels a region has, if levels differ in channels; else None.
        embedding: (R, D) the region embedding.
        class_logits: (R, K + 1), background first.
        box_deltas: (R, K + 1, 4) in the detector's box coding.
        later: outputs of a cascade's later stages; empty for other heads.
        queries: what a DETR-like decoder predicts with each region's query.
        level: (R,) int64, the level that the detector's own assignment picks.
        class_maps: L maps (N, A x (K + 1), H_l, W_l), a dense head's class logits in every cell.
    """

    pooled: Tensor | None = None
    pooled_channels: Tensor | None = None
    embedding: Tensor | None = None
    class_logits: Tensor | None = None
    box_deltas: Tensor | None = None
    later: tuple[StageView, ...] = ()
    queries: QueryView | None = None
    level: Tensor | None = None
    class_maps: tuple[Tensor, ...] | None = None


View = Literal["pooled", "embedding", "predictions", "level", "class_maps"]


@dataclass(frozen=True)
class Finding:
    """Results of probing a model of unknown code.

    Attributes:
        kind: ``torchscript``, ``exported``, ``onnx`` or ``factory``.
        detections: the form of its detections; None if unknown.
        confidence: share of probed models for which this reason was right, in 0..1.
    """

    kind: str
    call: str
    detections: str | None
    reason: str
    confidence: float


class Detector(Protocol):
    """A detector of one family, around an nn.Module. Adapters inherit the defaults of the optional capabilities.

    Attributes:
        module: the network; only this is trained, saved and exported.
        family: ``two-stage``, ``dense``, ``query`` (DETR-like), or ``unknown`` if only features can be read.
        class_names: K names; label k is ``class_names[k - 1]``.
    """

    module: nn.Module
    family: Family
    class_names: tuple[str, ...]

    @property
    def levels(self) -> tuple[LevelSpec, ...]:
        """The pyramid, fine to coarse."""
        ...

    @property
    def embedding_channels(self) -> int:
        """D of the region embedding."""
        ...

    @property
    def embedding_source(self) -> str:
        """Where the region embedding is read, for display."""
        ...

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    def list_bad_weights(self) -> list[str]:
        """Names of the weights with NaN or infinity."""
        return list_not_finite(self.module.state_dict())

    @property
    def finding(self) -> Finding | None:
        """Results of probing a model of unknown code; None for a known architecture."""
        return None

    # ------------------------------------------------------------------------------ optional capabilities

    @property
    def features_only(self) -> bool:
        """Whether a student has neither losses nor detections, so that it can only learn from a teacher."""
        return False

    @property
    def skips_parameters(self) -> bool:
        """Whether parameters may get no gradient in some steps, for which the processes of a run must be prepared."""
        return False

    @property
    def sampled_proposals(self) -> int | None:
        """Maximum of proposals per image that its own head trains on; None if it samples none."""
        return None

    @property
    def box_weights(self) -> tuple[float, ...] | None:
        """Weights of the RoI head's box coder; deltas are comparable only between equal ones. None: no RoI head."""
        return None

    @property
    def later_weights(self) -> tuple[float, ...]:
        """Weight of each later stage of a cascade in its own loss; empty for other heads."""
        return ()

    @property
    def later_box_weights(self) -> tuple[tuple[float, ...], ...]:
        """Weights of the box coder of each later stage of a cascade."""
        return ()

    @property
    def dense_head(self) -> Literal["retinanet", "fcos"] | None:
        """The kind of a dense head that scores every class independently; None for other heads."""
        return None

    @property
    def exclusive_classes(self) -> bool | None:
        """Whether a query of a DETR-like detector has one class or none (softmax), not any number (sigmoid).

        None for detectors without queries.
        """
        return None

    @property
    def anchors(self) -> tuple[Tensor, ...] | None:
        """By level (A, 4) xyxy, the anchors of a cell around its centre, in cells; None if it has none."""
        return None

    @property
    def cells_per_side(self) -> float | tuple[float, ...]:
        """Usual side of an object in the cells of its level, as ``assign_levels`` takes it."""
        return DENSE_CELLS

    def check_detects(self) -> None:
        """Raises a PairError if its detections cannot be read, or their classes are unknown."""
        return

    # A stored teacher (``knowledge``) keeps the pyramid of an observation, and what else ``region_outputs`` reads.

    def keep(self, seen: Observation) -> dict[str, Tensor]:
        """Tensors of an observation beside its pyramid that ``recall`` reads; each begins with N."""
        return {}

    def recall(self, batch: Batch, pyramid: Pyramid, kept: Mapping[str, Tensor]) -> Observation:
        """Rebuilds the result of ``extract_features`` from a pyramid and the result of ``keep``."""
        return Observation(losses={}, pyramid=pyramid, candidates=None)

    # ------------------------------------------------------------------------------------------ forwards

    def forward_train(self, batch: Batch, *, candidates: bool = True) -> Observation:
        """Runs a training forward: the detector's own losses, its pyramid and, on request, its candidates."""
        ...

    def extract_features(self, batch: Batch) -> Observation:
        """Runs only backbone and pyramid: no heads, no NMS."""
        ...

    def region_outputs(self, seen: Observation, regions: Regions, needs: frozenset[View]) -> RegionView:
        """Reads the outputs in ``needs`` for each region, from the result of a forward."""
        ...

    def predict(self, images: list[Tensor]) -> list[Detections]:
        """Inference on images (3, H, W) in 0..1; boxes in each image's own pixels."""
        ...
