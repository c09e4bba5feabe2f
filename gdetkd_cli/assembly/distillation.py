"""The distiller of a student and a teacher from a recipe's distill block."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn

from gdetkd_cli.assembly.baselines import Rival, rival_term, rivals
from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.distill.distiller import Distiller, WeightedTerm
from gdetkd_cli.distill.pair import PairKind, pair_kind, prediction_columns, stage_weights
from gdetkd_cli.distill.regions import choose_regions
from gdetkd_cli.distill.terms import BoxTerm, CKDTerm, ClassTerm, SGFITerm
from gdetkd_cli.distill.transfer import fitting_head, transfer_head
from gdetkd_cli.errors import PairError
from gdetkd_cli.recipe.distillation import CKD, PKD, SGFI, Distill, PredictionKD
from gdetkd_cli.structures import Batch, Regions

# A two-stage student has layers between its region embedding and its predictions. A dense one's embedding is what its
# class scores are made of: contrast with full weight costs it more than it brings (docs/benchmarks.md).
_CKD_WEIGHTS = (1.0, 0.05)  # of a two-stage student, of a dense one
_PKD_WEIGHTS = (6.0, 10.0)  # the same, as published
_MOST_REGIONS = 512  # of an image, as many as a Faster R-CNN's head trains on
_MOST_REGIONS_ON_CPU = 64  # where the cost of a step grows with them

Block = SGFI | CKD | PredictionKD | Rival


@dataclass(frozen=True)
class TermPlan:
    """One distillation term of a plan: computed with this weight, or left out and why."""

    name: str
    weight: float | None
    reason: str


@dataclass(frozen=True)
class BuiltPair:
    """A distiller and how it came about.

    Attributes:
        kind: homogeneous or heterogeneous.
        terms: every term, its weight or why it is left out.
        head_transfer: what was copied from the teacher's head, or why nothing was.
        transferred: whether it was copied.
        regions_per_image: most regions of an image that the terms compare.
    """

    distiller: Distiller
    kind: PairKind
    terms: tuple[TermPlan, ...]
    head_transfer: str
    transferred: bool
    regions_per_image: int


def build_pair(
    config: Distill,
    student: Detector,
    teacher: Detector,
    seed: int,
    *,
    trained_head: bool = False,
    device: str = "cpu",
    steps: int = 0,
) -> BuiltPair:
    """The distiller of a pair, its terms chosen and checked.

    Args:
        config: the recipe's block.
        student, teacher: on the CPU.
        seed: of the terms' fresh weights and the choice of regions.
        trained_head: the student's head has weights already, which `head_transfer: auto` leaves alone.
        device: where the run computes, ``cpu`` or ``cuda``; a CPU compares fewer regions by default.
        steps: of the run; prediction terms of a fresh head come in over half of them by default.

    Raises:
        PairError: a term that the recipe asks for does not fit the pair.
    """
    kind = pair_kind(student, teacher)
    if config.pair not in ("auto", kind):
        raise PairError(
            f"distill.pair is {config.pair}, but {teacher.family} -> {student.family} is a {kind} pair; "
            "set distill.pair to auto"
        )
    transferred, head_transfer = _transfer(config, student, teacher, trained_head)
    channels = {level.channels for detector in (student, teacher) for level in detector.levels}
    same_space = transferred and len(channels) == 1
    teacher.module.eval()
    for parameter in teacher.module.parameters():  # one by one: TorchScript cannot do it as a whole
        parameter.requires_grad_(False)
    torch.manual_seed(seed)  # the terms' fresh weights
    plans: list[TermPlan] = []
    terms: dict[str, WeightedTerm] = {}

    def add(name: str, block: Block | None, term: nn.Module | None, reason: str) -> None:
        if block is None or term is None:
            plans.append(TermPlan(name=name, weight=None, reason=reason))
            return
        weight = _weight(block, student)
        plans.append(TermPlan(name=name, weight=weight, reason=reason))
        warmup = block.warmup_steps
        if warmup == "auto":
            warmup = 0 if transferred or trained_head else steps // 2
        terms[name] = WeightedTerm(term, weight, warmup)

    add(
        "sgfi",
        config.sgfi,
        _sgfi(config.sgfi, student, teacher, same_space),
        "" if config.sgfi else "left out by the recipe",
    )
    ckd, reason = _settled(config.ckd, teacher)
    add("ckd", ckd, _ckd(ckd, student, teacher), reason)
    stages = stage_weights(student, teacher)
    for name, block, term_class in (
        ("class_kd", config.class_kd, ClassTerm),
        ("box_kd", config.box_kd, BoxTerm),
    ):
        settled, reason, columns = _prediction(name, block, student, teacher)
        add(name, settled, term_class(columns=columns, stage_weights=stages) if columns is not None else None, reason)
    for name, rival in rivals(config):
        add(name, rival, rival_term(rival, student, teacher, same_space=same_space), "")
    if not terms:
        raise PairError("the recipe leaves out every distillation term; use `gdetkd train` for plain training")

    options, per_image = config.regions, _regions_per_image(config, student, device)

    def choose(seen: Observation, batch: Batch, step: int) -> Regions:
        assert seen.candidates is not None
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        return choose_regions(
            seen.candidates,
            batch,
            per_image=per_image,
            positive_iou=options.positive_iou,
            negatives_per_positive=options.negatives_per_positive,
            generator=generator,
        )

    distiller = Distiller(
        student=student,
        teacher=teacher,
        terms=terms,
        choose_regions=choose,
        task_loss=config.task_loss == "own",
    )
    return BuiltPair(
        distiller=distiller,
        kind=kind,
        terms=tuple(plans),
        head_transfer=head_transfer,
        transferred=transferred,
        regions_per_image=per_image,
    )


def _regions_per_image(config: Distill, student: Detector, device: str) -> int:
    """The recipe's number, or as many as the student's head trains on (the paper), fewer on a CPU."""
    if config.regions.per_image != "auto":
        return config.regions.per_image
    own = student.sampled_proposals or _MOST_REGIONS
    return min(own, _MOST_REGIONS_ON_CPU) if device == "cpu" else own


def _transfer(config: Distill, student: Detector, teacher: Detector, trained_head: bool) -> tuple[bool, str]:
    """Whether the teacher's head was copied, and what there is to say of it."""
    if config.head_transfer is False:
        return False, "left out by the recipe"
    try:
        fitting_head(student, teacher)  # first: `true` is no advice to a pair whose heads differ
    except PairError as error:
        if config.head_transfer is True:
            raise PairError(f"distill.head_transfer: {error}; set it to auto or false") from error
        return False, f"nothing copied: {error}"
    if config.head_transfer == "auto" and trained_head:  # measured: a trained student loses by it (docs/experiments.md)
        return False, "nothing copied: the student's own head is trained; head_transfer: true copies all the same"
    copied = transfer_head(student, teacher)
    parts = sorted({re.sub(r"(head|predictor)\..*", r"\1", name) for name in copied})
    return True, f"copied from the teacher: {', '.join(parts)} ({len(copied)} tensors)"


def _sgfi(block: SGFI | None, student: Detector, teacher: Detector, same_space: bool) -> SGFITerm | None:
    if block is None:
        return None
    student_channels = [level.channels for level in student.levels]
    teacher_channels = max(level.channels for level in teacher.levels)
    return SGFITerm(
        student_channels=student_channels,
        teacher_channels=teacher_channels,
        same_space=same_space,
        embed_channels=block.embed_channels,
        initial_tau=block.tau,
        prior=block.prior,
        centre=block.center,
        cosine=block.similarity == "cosine",
        normalize=block.normalize,
        sampling_ratio=block.sampling_ratio,
    )


def _weight(block: Block, student: Detector) -> float:
    """The weight that the recipe says, or the one that suits the student."""
    if block.weight != "auto":
        return block.weight
    two_stage, dense = _PKD_WEIGHTS if isinstance(block, PKD) else _CKD_WEIGHTS
    return two_stage if student.family == "two-stage" else dense


def _settled(block: CKD | str | None, teacher: Detector) -> tuple[CKD | None, str]:
    """CKD's settings, and why it is left out."""
    if block is None:
        return None, "left out by the recipe"
    if isinstance(block, CKD):
        return block, ""
    if teacher.finding is not None:
        # Measured: contrasting regions by the mean of their features makes students worse (docs/experiments.md).
        return None, "the teacher's region embedding is not known; ckd: {} takes the mean of its pooled features"
    return CKD(), ""


def _ckd(block: CKD | None, student: Detector, teacher: Detector) -> CKDTerm | None:
    if block is None:
        return None
    return CKDTerm(
        student_channels=student.embedding_channels,
        teacher_channels=teacher.embedding_channels,
        project_channels=block.project_channels,
        gamma=block.gamma,
        negative_iou=block.negative_iou,
        queue=block.queue,
    )


def _prediction(
    name: str, block: PredictionKD | str | None, student: Detector, teacher: Detector
) -> tuple[PredictionKD | None, str, torch.Tensor | None]:
    """A prediction term's settings, why it is left out, and the class columns."""
    if block is None:
        return None, "left out by the recipe", None
    settled = block if isinstance(block, PredictionKD) else PredictionKD()
    try:
        return settled, "", prediction_columns(student, teacher)
    except PairError as error:
        if isinstance(block, PredictionKD):
            raise PairError(f"distill.{name}: {error}; set it to auto or null") from error
        return None, str(error), None
