"""Terms of other methods from a recipe's distill block."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

from torch import Tensor, nn
from torchvision.models.detection.fcos import FCOS

from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.distill.map_terms import (
    Assign,
    CWDTerm,
    FGDTerm,
    FitNetTerm,
    GTMaskTerm,
    LogitTerm,
    PKDTerm,
    RoIImitationTerm,
)
from gdetkd_cli.distill.pair import agreeing_anchors, class_map_columns, level_shapes
from gdetkd_cli.errors import PairError
from gdetkd_cli.losses.fgd import DENSE_CELLS, TWO_STAGE_CELLS
from gdetkd_cli.recipe.distillation import CWD, FGD, PKD, Distill, FitNet, GTMask, Logit, RoIImitation, WholeMaps
from gdetkd_cli.structures import Regions

Rival = FitNet | GTMask | RoIImitation | PKD | CWD | FGD | Logit
NAMES = ("fitnet", "gt_mask", "roi_imitation", "pkd", "cwd", "fgd", "logit")


@dataclass(frozen=True)
class FGDWeights:
    """What FGD publishes for a family of detectors: the temperature of its attentions and the weights of its parts."""

    temperature: float
    objects: float
    background: float
    attention: float
    relation: float


# github.com/yzd-v/FGD, configs/distillers/fgd: one set for Faster and Mask R-CNN, one for RetinaNet, GFL and SOLO, one
# for FCOS. RepPoints has FCOS's weights at temperature 0.5.
FGD_TWO_STAGE = FGDWeights(temperature=0.5, objects=5e-5, background=2.5e-5, attention=5e-5, relation=5e-7)
FGD_DENSE = FGDWeights(temperature=0.5, objects=1e-3, background=5e-4, attention=5e-4, relation=5e-6)
FGD_FCOS = FGDWeights(temperature=0.8, objects=1.6e-3, background=8e-4, attention=8e-4, relation=8e-6)


def rivals(config: Distill) -> list[tuple[str, Rival]]:
    """Name and settings of those that the recipe asks for."""
    return [(name, block) for name in NAMES if (block := getattr(config, name)) is not None]


def fgd_weights(block: FGD, student: Detector) -> FGDWeights:
    """The recipe's weights; where it says ``auto``, the published ones of the student's family."""
    published = FGD_TWO_STAGE if student.family == "two-stage" else FGD_DENSE
    if isinstance(student.module, FCOS):
        published = FGD_FCOS
    own = {name: getattr(block, name) for name in FGDWeights.__dataclass_fields__}
    return replace(published, **{name: value for name, value in own.items() if value != "auto"})


def rival_term(block: Rival, student: Detector, teacher: Detector, *, same_space: bool) -> nn.Module:
    """The term of a method's settings, for a pair; ``same_space``: its head was transferred.

    Raises:
        PairError: the method cannot be used for it.
    """
    ours, theirs = ([level.channels for level in detector.levels] for detector in (student, teacher))
    pooled = not isinstance(block, WholeMaps) or block.pooled_levels
    counted = [pooled or not level.subsampled for level in student.levels]
    match block:
        case FitNet():
            return FitNetTerm(student_channels=ours, teacher_channels=theirs, counted=counted, same_space=same_space)
        case GTMask():
            return GTMaskTerm(
                student_channels=ours,
                teacher_channels=theirs,
                anchors=level_shapes(student),
                share=block.share,
                assign=_assignment(student) if block.mask == "boxes" else None,
                counted=counted,
                same_space=same_space,
            )
        case RoIImitation():
            return RoIImitationTerm(student_channels=max(ours), teacher_channels=max(theirs), same_space=same_space)
        case PKD():
            return PKDTerm(student_channels=ours, teacher_channels=theirs, counted=counted)
        case CWD():
            return CWDTerm(
                student_channels=ours, teacher_channels=theirs, tau=block.tau, counted=counted, same_space=same_space
            )
        case Logit():
            try:
                columns = class_map_columns(student, teacher)
            except PairError as error:
                raise PairError(f"distill.logit: {error}; leave the term out") from error
            return LogitTerm(columns=columns, agree=agreeing_anchors(student, teacher))
        case FGD():
            if len(set(theirs)) > 1:
                raise PairError(
                    f"distill.fgd: FGD needs a teacher whose levels have the same channels, but these have {theirs}; "
                    "leave the term out"
                )
            return FGDTerm(
                student_channels=ours,
                teacher_channels=theirs,
                **asdict(fgd_weights(block, student)),
                published_cells=_published_cells(student) if block.sums == "scaled" else None,
                standardized=block.standardize,
                counted=counted,
                same_space=same_space,
            )


def _published_cells(student: Detector) -> int:
    return TWO_STAGE_CELLS if student.family == "two-stage" else DENSE_CELLS


def _assignment(detector: Detector) -> Assign:
    """The level that a detector assigns each region to, (R,)."""

    def assign(seen: Observation, regions: Regions) -> Tensor:
        level = detector.view_regions(seen, regions, frozenset({"level"})).level
        assert level is not None
        return level

    return assign
