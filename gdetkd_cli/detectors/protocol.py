"""What the rest of the program knows of a detector. A new family is one file that satisfies ``Detector``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from gdetkd_cli.structures import Batch, Detections, LevelSpec, Pyramid, Regions

Family = Literal["two-stage", "dense", "unknown"]


@dataclass(frozen=True)
class Candidates:
    """Boxes that a student offers as regions, detached.

    Attributes:
        boxes: (K, 4) batch-image pixels.
        image_index: (K,) int64, non-decreasing.
        sampled: True where the detector's own head already sampled them (a two-stage head's training proposals);
            False for a dense head's every prediction.
        counts: candidates of each image, where the host knows them; None: read from the device.
    """

    boxes: Tensor
    image_index: Tensor
    sampled: bool
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Observation:
    """One forward of a detector.

    Attributes:
        losses: the detector's own losses; empty when it was only looked at.
        pyramid: the feature maps its heads read.
        candidates: boxes to choose regions from; None when none were wanted, or it was only looked at.
    """

    losses: dict[str, Tensor]
    pyramid: Pyramid
    candidates: Candidates | None


@dataclass(frozen=True)
class StageView:
    """What a later stage of a cascade says of R regions.

    Attributes:
        boxes: (R, 4) batch-image pixels, detached: what the stages before made of the regions, which it judges.
        class_logits: (R, K + 1), background first.
        box_deltas: (R, K + 1, 4) in the stage's box coding.
    """

    boxes: Tensor
    class_logits: Tensor
    box_deltas: Tensor


@dataclass(frozen=True)
class RegionView:
    """What a detector says of R regions. A field is None when it was not asked for or the family has none.

    Attributes:
        pooled: (R, C, 7, 7) from the one level that the detector's own assignment picks, by measured geometry.
        pooled_channels: (R,) how many of the C channels a region has, where levels differ in channels; else None.
        embedding: (R, D) the region embedding.
        class_logits: (R, K + 1), background first.
        box_deltas: (R, K + 1, 4) in the detector's box coding.
        later: what the later stages of a cascade say; empty for other heads.
        level: (R,) int64, the level of its pyramid that the detector's own assignment picks.
        class_maps: L maps (N, A x (K + 1), H_l, W_l), a dense head's class logits in every cell, whatever the regions.
    """

    pooled: Tensor | None = None
    pooled_channels: Tensor | None = None
    embedding: Tensor | None = None
    class_logits: Tensor | None = None
    box_deltas: Tensor | None = None
    later: tuple[StageView, ...] = ()
    level: Tensor | None = None
    class_maps: tuple[Tensor, ...] | None = None


View = Literal["pooled", "embedding", "predictions", "level", "class_maps"]


@dataclass(frozen=True)
class Finding:
    """How a model of unknown code was understood by probing it.

    Attributes:
        kind: ``torchscript``, ``exported``, ``onnx`` or ``factory``.
        call: how the model is called.
        detections: the form of its detections; None where it is not known.
        reason: why these are the levels.
        confidence: how often this reason was right, in 0..1.
    """

    kind: str
    call: str
    detections: str | None
    reason: str
    confidence: float


class Detector(Protocol):
    """A detector of one family, around an nn.Module. Adapters inherit the defaults of the optional capabilities.

    Attributes:
        module: the network; it alone is trained, saved and exported.
        family: ``two-stage``, ``dense``, or ``unknown`` where only features can be read.
        class_names: K names, label k is ``class_names[k - 1]``.
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
        """Where the region embedding is read, for people."""
        ...

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters())

    @property
    def finding(self) -> Finding | None:
        """How probing understood a model of unknown code; None for a known architecture."""
        return None

    # ------------------------------------------------------------------------------ optional capabilities

    @property
    def features_only(self) -> bool:
        """Whether a student has no losses and detections of its own, so that only a teacher can train it."""
        return False

    @property
    def sampled_proposals(self) -> int | None:
        """Most proposals of an image that its own head trains on; None where it samples none."""
        return None

    @property
    def box_weights(self) -> tuple[float, ...] | None:
        """Weights of the RoI head's box coder: two heads' deltas compare only when these agree. None: no RoI head."""
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
        """A dense head that scores every class in every cell on its own; None for other heads."""
        return None

    @property
    def anchors(self) -> tuple[Tensor, ...] | None:
        """By level (A, 4) xyxy, the anchors of a cell around its centre, in cells; None where there are none."""
        return None

    def check_detects(self) -> None:
        """Raises a PairError where its detections cannot be read, or their classes are not known."""
        return

    # ------------------------------------------------------------------------------------------ forwards

    def forward_train(self, batch: Batch, *, candidates: bool = True) -> Observation:
        """A training forward: the detector's own losses, its pyramid, and the boxes it offers, if they are wanted."""
        ...

    def extract_features(self, batch: Batch) -> Observation:
        """Backbone and pyramid only: no heads, no NMS."""
        ...

    def region_outputs(self, seen: Observation, regions: Regions, needs: frozenset[View]) -> RegionView:
        """Reads what ``needs`` names of each region, from the result of a forward."""
        ...

    def predict(self, images: list[Tensor]) -> list[Detections]:
        """Inference on images (3, H, W) in 0..1; boxes in each image's own pixels."""
        ...
