"""Which parts of the teacher run, and that it does not change."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from distilling import (
    ALL_TERMS,
    FEATURE_TERMS,
    PAIRS,
    TinyDetector,
    assert_same_state,
    choose,
    forward,
    make_distiller,
    make_term,
    state_of,
    terms_of,
    train,
)
from torch import nn

from gdetkd_cli.distill.distiller import Distiller, WeightedTerm
from gdetkd_cli.methods.baselines.roi_imitation import RoIImitationTerm
from gdetkd_cli.structures import Batch


def test_the_teacher_is_outside(tiny_detector: TinyDetector) -> None:
    student, teacher = tiny_detector("retinanet"), tiny_detector("faster-rcnn", seed=1)
    distiller = make_distiller(student, teacher, FEATURE_TERMS)

    assert distiller.teacher is teacher
    of_teacher = {id(value) for value in [*teacher.module.parameters(), *teacher.module.buffers()]}
    own = {id(value) for value in [*distiller.parameters(), *distiller.buffers()]}
    assert not own & of_teacher
    assert not set(map(id, distiller.modules())) & set(map(id, teacher.module.modules()))
    assert {name.split(".")[0] for name in distiller.state_dict()} == {"student", "terms"}
    assert len(distiller.state_dict()) == len(student.module.state_dict()) + len(distiller.terms.state_dict())
    added = set(map(id, distiller.added_parameters()))
    assert added | set(map(id, student.module.parameters())) == set(map(id, distiller.parameters()))


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_the_teacher_stays_as_it_is(teacher: str, student: str, tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    """Weights and running statistics stay the same to the last bit, in evaluation mode without gradients."""
    frozen = tiny_detector(teacher, seed=1)
    distiller = make_distiller(tiny_detector(student), frozen, terms_of(teacher, student))
    before = state_of(frozen.module)
    assert any(name.endswith("running_mean") for name in before)
    train(distiller.train(), tiny_batch)

    assert_same_state(frozen.module, before)
    assert not any(module.training for module in frozen.module.modules())
    assert all(parameter.grad is None for parameter in frozen.module.parameters())
    assert distiller.student.training


class Calls:
    """Counts how often each submodule runs."""

    def __init__(self, module: nn.Module) -> None:
        self.count: Counter[str] = Counter()
        for name, submodule in module.named_modules():
            submodule.register_forward_hook(lambda *_, name=name: self.count.update([name]))

    def of(self, *names: str) -> list[int]:
        return [self.count[name] for name in names]


@pytest.mark.parametrize(
    ("terms", "head", "predictor"),
    [(("sgfi",), 0, 0), (("ckd",), 1, 0), (("sgfi", "ckd"), 1, 0), (("class_kd",), 1, 1), (ALL_TERMS, 1, 1)],
)
def test_only_what_is_needed_of_a_two_stage_teacher_runs(
    terms: tuple[str, ...], head: int, predictor: int, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    student, teacher = tiny_detector("faster-rcnn"), tiny_detector("faster-rcnn", seed=1)
    of_student, of_teacher = Calls(student.module), Calls(teacher.module)
    forward(make_distiller(student, teacher, terms), tiny_batch)

    assert of_teacher.of("", "rpn", "rpn.head", "roi_heads") == [0, 0, 0, 0]
    assert of_teacher.of("transform", "backbone") == [1, 1]
    ran = of_teacher.of("roi_heads.box_roi_pool", "roi_heads.box_head", "roi_heads.box_predictor")
    assert ran == [head, head, predictor]
    # The student's head ran on the regions already: they are its own proposals.
    assert of_student.of("roi_heads.box_head", "roi_heads.box_predictor", "backbone") == [1, 1, 1]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_a_match_on_the_own_level_alone_is_roi_imitation(
    teacher: str, student: str, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    """Both pool a region by the measured geometry, not like the detector's own head."""
    pupil, frozen = tiny_detector(student), tiny_detector(teacher, seed=1)
    soft = make_term("sgfi", pupil, frozen, centre="student")
    soft.prior = 1e6
    hard = RoIImitationTerm(
        student_channels=max(level.channels for level in pupil.levels),
        teacher_channels=max(level.channels for level in frozen.levels),
    )
    hard.adapter.load_state_dict(soft.matcher.adapters[0].state_dict())
    distiller = Distiller(
        student=pupil,
        teacher=frozen,
        terms={"sgfi": WeightedTerm(soft, 1.0), "roi_imitation": WeightedTerm(hard, 1.0)},
        choose_regions=choose,
    )
    parts = forward(distiller, tiny_batch).parts
    torch.testing.assert_close(parts["sgfi"], parts["roi_imitation"])


@pytest.mark.parametrize(("terms", "towers"), [(("sgfi",), 0), (("ckd",), 5), (FEATURE_TERMS, 5)])
def test_only_what_is_needed_of_a_dense_teacher_runs(
    terms: tuple[str, ...], towers: int, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    student, teacher = tiny_detector("retinanet"), tiny_detector("retinanet", seed=1)
    of_teacher = Calls(teacher.module)
    forward(make_distiller(student, teacher, terms), tiny_batch)

    assert of_teacher.of("", "head", "anchor_generator", "head.regression_head") == [0, 0, 0, 0]
    assert of_teacher.of("head.classification_head.cls_logits") == [0]
    assert of_teacher.of("transform", "backbone", "head.classification_head.conv") == [1, 1, towers]


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_the_teacher_suppresses_nothing(
    teacher: str, student: str, tiny_detector: TinyDetector, tiny_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NMS runs once per image for a two-stage student's own proposals and never for the teacher."""
    calls = Counter[str]()
    original = torch.ops.torchvision.nms
    monkeypatch.setattr("torchvision.ops.boxes.nms", lambda *a: (calls.update(["nms"]), original(*a))[1])
    monkeypatch.setattr(
        "torchvision.ops.boxes.batched_nms",
        lambda boxes, scores, idxs, threshold: (calls.update(["batched"]), original(boxes, scores, threshold))[1],
    )
    distiller = make_distiller(tiny_detector(student), tiny_detector(teacher, seed=1), terms_of(teacher, student))
    forward(distiller, tiny_batch)

    assert calls == ({"batched": len(tiny_batch)} if student.endswith("rcnn") else {})
