"""Small pairs of detectors for the tests of distillation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from gdetkd_cli.detectors.compatibility import match_predictions
from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.distill.distiller import Distiller, WeightedTerm
from gdetkd_cli.distill.regions import choose_regions
from gdetkd_cli.engine.schedule import build_optimizer
from gdetkd_cli.methods.ckd import CKDTerm
from gdetkd_cli.methods.prediction import BoxTerm, ClassTerm
from gdetkd_cli.methods.sgfi import SGFITerm
from gdetkd_cli.structures import Batch, LossReport, Regions, Target

FEATURE_TERMS = ("sgfi", "ckd")
ALL_TERMS = (*FEATURE_TERMS, "class_kd", "box_kd")
PAIRS = [  # teacher, student
    ("faster-rcnn", "faster-rcnn"),
    ("cascade-rcnn", "cascade-rcnn"),
    ("faster-rcnn", "retinanet"),
    ("faster-rcnn", "fcos"),
    ("retinanet", "retinanet"),
    ("retinanet", "faster-rcnn"),
    ("fcos", "retinanet"),
]

TinyDetector = Callable[..., Detector]


def terms_of(teacher: str, student: str) -> tuple[str, ...]:
    return ALL_TERMS if teacher == student and student.endswith("rcnn") else FEATURE_TERMS


EVERY_TERM = [(*pair, name) for pair in PAIRS for name in terms_of(*pair)]


def make_term(name: str, student: Detector, teacher: Detector, **of_sgfi: Any) -> nn.Module:
    torch.manual_seed(7)
    if name == "sgfi":
        return SGFITerm(
            student_channels=[level.channels for level in student.levels],
            teacher_channels=max(level.channels for level in teacher.levels),
            embed_channels=8,
            prior=3.0,
            normalize="channel",
            sampling_ratio=2,
            **of_sgfi,
        )
    if name == "ckd":
        return CKDTerm(
            student_channels=student.embedding_channels,
            teacher_channels=teacher.embedding_channels,
            project_channels=8,
            gamma=0.07,
            negative_iou=0.5,
            queue=40,
        )
    columns = match_predictions(student, teacher)
    return ClassTerm(columns=columns) if name == "class_kd" else BoxTerm(columns=columns)


def choose(seen: Observation, batch: Batch, step: int) -> Regions:
    assert seen.candidates is not None
    return choose_regions(
        seen.candidates,
        batch,
        per_image=8,
        positive_iou=0.5,
        negatives_per_positive=3.0,
        generator=torch.Generator().manual_seed(step),
    )


def make_distiller(
    student: Detector,
    teacher: Detector,
    names: tuple[str, ...],
    *,
    weight: float = 1.0,
    warmup_steps: int = 0,
    task_loss: bool = True,
) -> Distiller:
    teacher.module.eval().requires_grad_(False)
    distiller = Distiller(
        student=student,
        teacher=teacher,
        terms={name: WeightedTerm(make_term(name, student, teacher), weight, warmup_steps) for name in names},
        choose_regions=choose,
        task_loss=task_loss,
    )
    return distiller.train()


def forward(distiller: Distiller, batch: Batch, *, seed: int = 3) -> LossReport:
    """One forward whose random numbers (a two-stage head samples its proposals) come from ``seed``."""
    torch.manual_seed(seed)
    report: LossReport = distiller(batch)
    return report


def train(distiller: Distiller, batch: Batch, *, steps: int = 3) -> list[LossReport]:
    """Runs the loop's step with a fresh optimizer; gradients of student and added parts are clipped separately."""
    optimizer = build_optimizer(name="adamw", modules=[distiller], lr=1e-3, weight_decay=0.05, momentum=0.0)
    reports = []
    for step in range(steps):
        distiller.step = step
        reports.append(forward(distiller, batch, seed=step))
        reports[-1].total.backward()
        clip_grad_norm_(list(distiller.student.parameters()), 1.0)
        clip_grad_norm_(list(distiller.added_parameters()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return reports


def without_objects(batch: Batch) -> Batch:
    nothing = Target(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.int64))
    return Batch(images=batch.images, targets=[nothing] * len(batch), image_ids=batch.image_ids)


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def assert_same_state(module: nn.Module, expected: dict[str, Tensor]) -> None:
    state = module.state_dict()
    assert state.keys() == expected.keys()
    differing = [name for name, value in state.items() if not torch.equal(value, expected[name])]
    assert not differing


def first_layer(detector: Detector) -> nn.Parameter:
    """The student's parameter that is furthest from any loss."""
    return next(iter(detector.module.backbone.parameters()))  # type: ignore[union-attr]  # torchvision's have one


def task_gradient(distiller: Distiller, parameter: nn.Parameter, batch: Batch) -> tuple[LossReport, Tensor]:
    distiller.zero_grad(set_to_none=True)
    report = forward(distiller, batch)
    report.total.backward()
    assert parameter.grad is not None
    return report, parameter.grad.clone()
