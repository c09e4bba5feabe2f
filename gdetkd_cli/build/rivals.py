"""Terms of other methods from a recipe's distill block."""

from __future__ import annotations

from torch import nn

from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.distill.map_terms import CWDTerm, FGDTerm, FitNetTerm, GTMaskTerm, LogitTerm, PKDTerm, RoIImitationTerm
from gdetkd_cli.distill.pair import agreeing_anchors, class_map_columns, level_shapes
from gdetkd_cli.errors import PairError
from gdetkd_cli.recipe.distillation import CWD, FGD, PKD, Distill, FitNet, GTMask, Logit, RoIImitation

Rival = FitNet | GTMask | RoIImitation | PKD | CWD | FGD | Logit
NAMES = ("fitnet", "gt_mask", "roi_imitation", "pkd", "cwd", "fgd", "logit")


def rivals(config: Distill) -> list[tuple[str, Rival]]:
    """Name and settings of those that the recipe asks for."""
    return [(name, block) for name in NAMES if (block := getattr(config, name)) is not None]


def rival_term(block: Rival, student: Detector, teacher: Detector, *, same_space: bool) -> nn.Module:
    """The term of a method's settings, for a pair; ``same_space``: its head was transferred.

    Raises:
        PairError: the method cannot be used for it.
    """
    ours, theirs = ([level.channels for level in detector.levels] for detector in (student, teacher))
    match block:
        case FitNet():
            return FitNetTerm(student_channels=ours, teacher_channels=theirs, same_space=same_space)
        case GTMask():
            return GTMaskTerm(
                student_channels=ours,
                teacher_channels=theirs,
                anchors=level_shapes(student),
                share=block.share,
                same_space=same_space,
            )
        case RoIImitation():
            return RoIImitationTerm(student_channels=max(ours), teacher_channels=max(theirs), same_space=same_space)
        case PKD():
            return PKDTerm(student_channels=ours, teacher_channels=theirs)
        case CWD():
            return CWDTerm(student_channels=ours, teacher_channels=theirs, tau=block.tau, same_space=same_space)
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
                temperature=block.temperature,
                objects=block.objects,
                background=block.background,
                attention=block.attention,
                relation=block.relation,
                same_space=same_space,
            )
