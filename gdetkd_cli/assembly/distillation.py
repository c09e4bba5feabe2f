"""Builds the distiller of a student and a teacher from a recipe's ``distill`` block."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from gdetkd_cli.detectors.compatibility import PairKind, classify_pair
from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.distill.distiller import ChooseRegions, Distiller, WeightedTerm
from gdetkd_cli.distill.policy import choose_prediction_warmup, choose_region_count, choose_weight
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

_MOST_PARTS = 5  # of a transferred head that a message names

Block = SGFI | CKD | PredictionKD | WholeMaps | RoIImitation | Logit
GDETKD_TERMS = ("sgfi", "ckd", "class_kd", "box_kd")


@dataclass(frozen=True)
class TermPlan:
    """One distillation term: its weight, or None and the reason for leaving it out."""

    name: str
    weight: float | None
    reason: str


@dataclass(frozen=True)
class BuiltPair:
    """A distiller and the decisions behind it.

    Attributes:
        kind: homogeneous or heterogeneous.
        terms: every term with its weight or the reason for leaving it out.
        head_transfer: the parts copied from the teacher's head, or the reason for copying none; one sentence.
        transferred: whether the head was copied.
        regions_per_image: maximum number of regions per image that the terms compare.
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
    """Builds the distiller of a pair, and selects and checks its terms.

    Args:
        seed: seed of the terms' fresh weights and the choice of regions.
        trained_head: whether the student's head is trained; ``head_transfer: auto`` keeps such a head.
        device: device type of the run, ``cpu`` or ``cuda``; a CPU compares fewer regions by default.
        steps: steps of the run; by default, prediction terms of a fresh head warm up over half of them.

    Raises:
        PairError: a term in the recipe does not fit the pair.
    """
    kind = classify_pair(student, teacher)
    if config.pair not in ("auto", kind):
        raise PairError(
            f"distill.pair is {config.pair}, but {teacher.family} -> {student.family} is a {kind} pair; set it to auto"
        )
    transferred, head_transfer = _transfer_head(config, student, teacher, trained_head)
    freeze(teacher)
    torch.manual_seed(seed)  # the terms' fresh weights
    channels = {level.channels for detector in (student, teacher) for level in detector.levels}
    pair = Detectors(student, teacher, same_space=transferred and len(channels) == 1)
    plans, terms = _build_terms(config, pair, choose_prediction_warmup(steps, trained_head=transferred or trained_head))
    if not terms:
        raise PairError("no distillation term is left; add one, or use `gdetkd train` for plain training")
    per_image = config.regions.per_image
    if per_image == "auto":
        per_image = choose_region_count(student, device)
    distiller = Distiller(
        student=student,
        teacher=teacher,
        terms=terms,
        choose_regions=_build_region_chooser(config.regions, per_image, seed),
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
    """Switches to evaluation mode and disables gradients."""
    detector.module.eval()
    for parameter in detector.module.parameters():  # TorchScript modules have no requires_grad_
        parameter.requires_grad_(False)


def _build_terms(config: Distill, pair: Detectors, fresh_warmup: int) -> tuple[list[TermPlan], dict[str, WeightedTerm]]:
    """Builds the recipe's terms, and plans of all terms; raises a PairError if one of the recipe does not fit."""
    plans: list[TermPlan] = []
    terms: dict[str, WeightedTerm] = {}
    for name in BUILDERS:
        block, reason = _resolve_block(name, getattr(config, name), pair)
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
                advice = "set it to auto or null" if name in GDETKD_TERMS else "leave the term out"
                raise PairError(f"distill.{name}: {error}; {advice}") from error
            plans.append(TermPlan(name=name, weight=None, reason=str(error)))
            continue
        if weight == "auto":
            weight = choose_weight(name, pair.student)  # type: ignore[arg-type]  # the two whose weight can be auto
        terms[name] = WeightedTerm(term, weight, fresh_warmup if warmup == "auto" else warmup)
        plans.append(TermPlan(name=name, weight=weight, reason=""))
    return plans, terms


def _resolve_block(name: str, block: Block | str | None, pair: Detectors) -> tuple[Block | None, str]:
    """Returns a term's settings, or None and the reason for leaving it out."""
    if block is None or not isinstance(block, str):
        return block, ""
    if name == "ckd" and pair.teacher.finding is not None:
        # Contrasting regions by the mean of their features makes students worse (docs/experiments.md).
        return None, "the teacher has no known region embedding; `ckd: {}` uses the mean of its pooled features"
    return (CKD() if name == "ckd" else PredictionKD()), ""


def _build_region_chooser(options: RegionChoice, per_image: int, seed: int) -> ChooseRegions:
    def choose(observation: Observation, batch: Batch, step: int) -> Regions:
        assert observation.candidates is not None
        return choose_regions(
            observation.candidates,
            batch,
            per_image=per_image,
            positive_iou=options.positive_iou,
            negatives_per_positive=options.negatives_per_positive,
            generator=torch.Generator().manual_seed(seed * 1_000_003 + step),
        )

    return choose


def _transfer_head(config: Distill, student: Detector, teacher: Detector, trained_head: bool) -> tuple[bool, str]:
    """Copies the teacher's head if the recipe and the pair allow it; returns whether it did, and a description."""
    if config.head_transfer is False:
        return False, "left out by the recipe"
    try:
        match_head(student, teacher)  # first, so that the message below suggests `true` only if the heads fit
    except PairError as error:
        if config.head_transfer is True:
            raise PairError(f"distill.head_transfer: {error}; set it to auto or false") from error
        return False, f"nothing copied: {error}"
    if config.head_transfer == "auto" and trained_head:  # copying lowers a trained student's AP (docs/experiments.md)
        return False, "nothing copied: the student's head is trained already; `head_transfer: true` copies anyway"
    copied = transfer_head(student, teacher)
    parts = sorted({re.sub(r"(head|predictor)\..*|\.\d+\..*", r"\1", name) for name in copied})
    more = f" and {len(parts) - _MOST_PARTS} more parts" if len(parts) > _MOST_PARTS else ""
    return True, f"copied from the teacher: {', '.join(parts[:_MOST_PARTS])}{more} ({len(copied)} tensors)"
