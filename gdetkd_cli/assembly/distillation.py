"""The distiller of a student and a teacher from a recipe's distill block."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from gdetkd_cli.detectors.compatibility import PairKind, pair_kind
from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.distill.distiller import ChooseRegions, Distiller, WeightedTerm
from gdetkd_cli.distill.policy import auto_weight, prediction_warmup, regions_per_image
from gdetkd_cli.distill.regions import choose_regions
from gdetkd_cli.distill.transfer import match_head, transfer_head
from gdetkd_cli.errors import PairError
from gdetkd_cli.methods import BUILDERS
from gdetkd_cli.methods.base import Detectors
from gdetkd_cli.recipe.distillation import (
    CKD,
    SGFI,
    Distill,
    Logit,
    PredictionKD,
    RegionChoice,
    RoIImitation,
    WholeMaps,
)
from gdetkd_cli.structures import Batch, Regions

Block = SGFI | CKD | PredictionKD | WholeMaps | RoIImitation | Logit
GDETKD_TERMS = ("sgfi", "ckd", "class_kd", "box_kd")


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
    freeze(teacher)
    torch.manual_seed(seed)  # the terms' fresh weights
    channels = {level.channels for detector in (student, teacher) for level in detector.levels}
    pair = Detectors(student, teacher, same_space=transferred and len(channels) == 1)
    plans, terms = _build_terms(config, pair, prediction_warmup(steps, trained_head=transferred or trained_head))
    if not terms:
        raise PairError("the recipe leaves out every distillation term; use `gdetkd train` for plain training")
    per_image = config.regions.per_image
    if per_image == "auto":
        per_image = regions_per_image(student, device)
    distiller = Distiller(
        student=student,
        teacher=teacher,
        terms=terms,
        choose_regions=_region_chooser(config.regions, per_image, seed),
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


def freeze(detector: Detector) -> None:
    """Evaluation mode, and no gradient for any parameter."""
    detector.module.eval()
    for parameter in detector.module.parameters():  # one by one: TorchScript cannot do it as a whole
        parameter.requires_grad_(False)


def _build_terms(config: Distill, pair: Detectors, fresh_warmup: int) -> tuple[list[TermPlan], dict[str, WeightedTerm]]:
    """Every term of the recipe, built or left out with a reason.

    Raises:
        PairError: a term that the recipe asks for does not fit the pair.
    """
    plans: list[TermPlan] = []
    terms: dict[str, WeightedTerm] = {}
    for name in BUILDERS:
        block, reason = _settle(name, getattr(config, name), pair)
        if block is None:
            if name in GDETKD_TERMS or reason:
                plans.append(TermPlan(name=name, weight=None, reason=reason or "left out by the recipe"))
            continue
        settings = dict(block)
        weight, warmup = settings.pop("weight"), settings.pop("warmup_steps", 0)
        try:
            term = BUILDERS[name](pair, **settings)
        except PairError as error:
            if getattr(config, name) != "auto":
                advice = "set it to auto or null"
                raise (PairError(f"distill.{name}: {error}; {advice}") if name in GDETKD_TERMS else error) from error
            plans.append(TermPlan(name=name, weight=None, reason=str(error)))
            continue
        if weight == "auto":
            weight = auto_weight(name, pair.student)  # type: ignore[arg-type]  # the two whose weight can be auto
        terms[name] = WeightedTerm(term, weight, fresh_warmup if warmup == "auto" else warmup)
        plans.append(TermPlan(name=name, weight=weight, reason=""))
    return plans, terms


def _settle(name: str, block: Block | str | None, pair: Detectors) -> tuple[Block | None, str]:
    """The settings of a term, or why it is left out."""
    if block is None or not isinstance(block, str):
        return block, ""
    if name == "ckd" and pair.teacher.finding is not None:
        # Contrasting regions by the mean of their features makes students worse (docs/experiments.md).
        return None, "the teacher's region embedding is not known; ckd: {} takes the mean of its pooled features"
    return (CKD() if name == "ckd" else PredictionKD()), ""


def _region_chooser(options: RegionChoice, per_image: int, seed: int) -> ChooseRegions:
    def choose(seen: Observation, batch: Batch, step: int) -> Regions:
        assert seen.candidates is not None
        return choose_regions(
            seen.candidates,
            batch,
            per_image=per_image,
            positive_iou=options.positive_iou,
            negatives_per_positive=options.negatives_per_positive,
            generator=torch.Generator().manual_seed(seed * 1_000_003 + step),
        )

    return choose


def _transfer(config: Distill, student: Detector, teacher: Detector, trained_head: bool) -> tuple[bool, str]:
    """Whether the teacher's head was copied, and what there is to say of it."""
    if config.head_transfer is False:
        return False, "left out by the recipe"
    try:
        match_head(student, teacher)  # first: `true` is no advice to a pair whose heads differ
    except PairError as error:
        if config.head_transfer is True:
            raise PairError(f"distill.head_transfer: {error}; set it to auto or false") from error
        return False, f"nothing copied: {error}"
    if config.head_transfer == "auto" and trained_head:  # measured: a trained student loses by it (docs/experiments.md)
        return False, "nothing copied: the student's own head is trained; head_transfer: true copies all the same"
    copied = transfer_head(student, teacher)
    parts = sorted({re.sub(r"(head|predictor)\..*", r"\1", name) for name in copied})
    return True, f"copied from the teacher: {', '.join(parts)} ({len(copied)} tensors)"
