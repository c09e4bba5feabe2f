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


class Detector(Protocol):
    """A detector of one family, around an nn.Module.

    Attributes:
        module: the network; it alone is trained, saved and exported.
        family: ``two-stage``, ``dense``, or ``unknown`` where only features can be read.
        class_names: K names, label k is ``class_names[k - 1]``.
        levels: the pyramid, fine to coarse.
        embedding_channels: D of the region embedding.
        embedding_source: where the region embedding is read, for people.
        sampled_proposals: most proposals of an image that its own head trains on; None where it samples none.
    """

    module: nn.Module
    family: Family
    class_names: tuple[str, ...]

    @property
    def levels(self) -> tuple[LevelSpec, ...]: ...
    @property
    def embedding_channels(self) -> int: ...
    @property
    def embedding_source(self) -> str: ...
    @property
    def sampled_proposals(self) -> int | None: ...

    def observe(self, batch: Batch, *, candidates: bool = True) -> Observation:
        """A training forward: the detector's own losses, its pyramid, and the boxes it offers, if they are wanted."""
        ...

    def look(self, batch: Batch) -> Observation:
        """Backbone and pyramid only: no heads, no NMS."""
        ...

    def view_regions(self, seen: Observation, regions: Regions, needs: frozenset[View]) -> RegionView:
        """Reads what ``needs`` names of each region from a forward that ``observe`` or ``look`` made."""
        ...

    def predict(self, images: list[Tensor]) -> list[Detections]:
        """Inference on images (3, H, W) in 0..1; boxes in each image's own pixels."""
        ...
