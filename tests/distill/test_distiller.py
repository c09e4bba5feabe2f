"""Rules for every term."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from distilling import (
    ALL_TERMS,
    EVERY_TERM,
    FEATURE_TERMS,
    PAIRS,
    TinyDetector,
    assert_same_state,
    choose,
    first_layer,
    forward,
    make_distiller,
    state_of,
    task_gradient,
    terms_of,
    train,
    without_objects,
)
from torch import Tensor, nn

from gdetkd_cli.detectors import catalog
from gdetkd_cli.distill.distiller import Distiller, WeightedTerm
from gdetkd_cli.engine.schedule import build_optimizer
from gdetkd_cli.errors import TermNotComputedError
from gdetkd_cli.structures import Batch, Target


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_weights_of_0_are_plain_training(
    teacher: str, student: str, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    """Losses and student are the same to the last bit after three optimizer steps."""
    plain, distilled = tiny_detector(student), tiny_detector(student)
    expected = train(Distiller(student=plain).train(), tiny_batch)
    names = terms_of(teacher, student)
    reports = train(make_distiller(distilled, tiny_detector(teacher, seed=1), names, weight=0.0), tiny_batch)

    assert_same_state(distilled.module, state_of(plain.module))
    for ours, theirs in zip(reports, expected, strict=True):
        assert torch.equal(ours.total, theirs.total)
        assert ours.parts.keys() == theirs.parts.keys() | set(names)
        assert all(torch.equal(ours.parts[name], value) for name, value in theirs.parts.items())
        assert theirs.weights == {}
        assert ours.weights == dict.fromkeys(names, 0.0)


def test_plain_training_is_the_students_own(tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    student = tiny_detector("fcos")
    report = forward(Distiller(student=student).train(), tiny_batch)
    losses = student.forward_train(tiny_batch, candidates=False).losses

    assert report.parts.keys() == losses.keys()
    torch.testing.assert_close(report.total, torch.stack(list(losses.values())).sum())
    assert not list(Distiller(student=student).added_parameters())


def test_a_students_only_loss_does_not_hide_the_total(
    tiny_detector: TinyDetector, tiny_batch: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_detector("fcos")
    seen = student.forward_train(tiny_batch, candidates=False)
    whole = torch.stack(list(seen.losses.values())).sum()
    monkeypatch.setattr(student, "forward_train", lambda *_, **__: replace(seen, losses={"loss": whole}))
    assert forward(Distiller(student=student).train(), tiny_batch).parts == {"own": whole.detach()}


@pytest.mark.parametrize(("teacher", "student"), PAIRS[:2])
def test_without_the_task_loss_the_terms_are_all(
    teacher: str, student: str, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    learner = tiny_detector(student)
    distiller = make_distiller(learner, tiny_detector(teacher, seed=1), FEATURE_TERMS, task_loss=False)
    report = forward(distiller, tiny_batch)
    report.total.backward()

    torch.testing.assert_close(report.total.detach(), report.parts["sgfi"] + report.parts["ckd"])
    assert set(report.parts) > set(FEATURE_TERMS)  # its own losses are still told
    assert first_layer(learner).grad is not None
    name = "rpn.head" if student.endswith("rcnn") else "head.regression_head.bbox_reg"
    assert all(p.grad is None for p in learner.module.get_submodule(name).parameters())


@pytest.mark.parametrize(("teacher", "student", "name"), EVERY_TERM)
def test_each_term_reaches_the_whole_student(
    teacher: str, student: str, name: str, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    """A term alone changes the gradient of the backbone's first layer and reaches all of its own parameters."""
    learner, frozen = tiny_detector(student), tiny_detector(teacher, seed=1)
    first = first_layer(learner)
    _, task = task_gradient(Distiller(student=learner).train(), first, tiny_batch)
    distiller = make_distiller(learner, frozen, (name,))
    report, gradient = task_gradient(distiller, first, tiny_batch)

    assert torch.isfinite(gradient).all()
    assert (gradient - task).abs().max() > 0
    assert torch.isfinite(report.parts[name])
    assert report.parts[name] > 0
    for parameter_name, parameter in distiller.terms.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0 or "bias" in parameter_name, parameter_name


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
@pytest.mark.parametrize("empty", [False, True], ids=["one image without objects", "no objects at all"])
def test_all_terms_together(
    teacher: str, student: str, empty: bool, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    names = terms_of(teacher, student)
    batch = without_objects(tiny_batch) if empty else tiny_batch
    distiller = make_distiller(tiny_detector(student), tiny_detector(teacher, seed=1), names, weight=0.5)
    reports = train(distiller, batch, steps=2)

    for report in reports:
        assert all(torch.isfinite(value) for value in report.parts.values())
        assert not any(value.requires_grad for value in report.parts.values())
        own = sum(value for name, value in report.parts.items() if name not in names)
        added = sum(0.5 * report.parts[name] for name in names)
        torch.testing.assert_close(report.total.detach(), own + added)
    assert all(torch.isfinite(value).all() for value in distiller.state_dict().values())


def test_ssd_teacher_and_student(tiny_batch: Batch) -> None:
    """Levels differ in channels on both sides, and there is no tower to read embeddings from."""
    torch.manual_seed(0)
    teacher = catalog.build({"kind": "torchvision", "name": "ssdlite320_mobilenet_v3_large"}, ("circle", "square"))
    batch = Batch(
        images=tiny_batch.images[:2],
        targets=[Target(boxes=t.boxes, labels=t.labels.clamp(max=2)) for t in tiny_batch.targets[:2]],
        image_ids=tiny_batch.image_ids[:2],
    )
    assert len({level.channels for level in teacher.levels}) > 1
    student = copy.deepcopy(teacher)
    distiller = make_distiller(student, teacher, FEATURE_TERMS)
    before = state_of(teacher.module)
    report, gradient = task_gradient(distiller, first_layer(student), batch)

    assert all(torch.isfinite(value) and value > 0 for value in report.parts.values())
    assert torch.isfinite(gradient).all()
    for name, parameter in distiller.terms.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
    assert_same_state(teacher.module, before)


@pytest.mark.parametrize(("teacher", "student"), [PAIRS[0], PAIRS[3]])
def test_mixed_precision(teacher: str, student: str, tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    """Under bfloat16 autocast the terms are float32, finite, and near what they are in float32."""
    names = terms_of(teacher, student)
    learner, frozen = tiny_detector(student), tiny_detector(teacher, seed=1)
    expected = forward(make_distiller(copy.deepcopy(learner), frozen, names), tiny_batch)
    distiller = make_distiller(learner, frozen, names)
    with torch.autocast("cpu", torch.bfloat16):
        report = forward(distiller, tiny_batch)
    report.total.backward()

    assert report.total.dtype == torch.float32
    for name in names:
        assert report.parts[name].dtype == torch.float32
    torch.testing.assert_close(report.parts["sgfi"], expected.parts["sgfi"], rtol=0.2, atol=0)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in distiller.terms.parameters())
    gradient = first_layer(learner).grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()


def test_the_pair_is_learnt(tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    """The terms' losses fall while the student trains on one batch."""
    student, teacher = tiny_detector("retinanet"), tiny_detector("faster-rcnn", seed=1)
    distiller = make_distiller(student, teacher, FEATURE_TERMS)
    optimizer = build_optimizer(name="adamw", modules=[distiller], lr=3e-3, weight_decay=0.0, momentum=0.0)
    seen: dict[str, list[float]] = {name: [] for name in FEATURE_TERMS}
    for _ in range(14):
        report = forward(distiller, tiny_batch)
        optimizer.zero_grad()
        report.total.backward()
        optimizer.step()
        for name, values in seen.items():
            values.append(report.parts[name].item())

    for values in seen.values():  # the first two steps have fewer negatives: the memory is not full yet
        assert sum(values[-5:]) < 0.95 * sum(values[2:7])


def test_warmup_by_hand() -> None:
    weighted = WeightedTerm(nn.Identity(), weight=2.0, warmup_steps=3)

    assert [weighted.weight_at(step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert WeightedTerm(nn.Identity(), weight=2.0).weight_at(0) == 2.0


def test_warmup_follows_the_step(tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    student, teacher = tiny_detector("retinanet"), tiny_detector("faster-rcnn", seed=1)
    distiller = make_distiller(student, teacher, ("sgfi",), weight=3.0, warmup_steps=2)

    for step, weight in enumerate([1.0, 2.0, 3.0, 3.0]):
        distiller.step = step
        report = forward(distiller, tiny_batch)
        assert report.weights == {"sgfi": pytest.approx(weight)}
        own = sum(value for name, value in report.parts.items() if name != "sgfi")
        torch.testing.assert_close(report.total.detach(), own + weight * report.parts["sgfi"])


class Forgetful(nn.Module):
    """A term that does not depend on any parameter."""

    student_needs: frozenset[str] = frozenset()
    teacher_needs: frozenset[str] = frozenset()

    def forward(self, _: Any) -> Tensor:
        return torch.tensor(1.0)


def test_a_term_without_gradient_is_an_error(tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    student, teacher = tiny_detector("retinanet"), tiny_detector("faster-rcnn", seed=1)
    distiller = Distiller(
        student=student, teacher=teacher, terms={"forgetful": WeightedTerm(Forgetful(), 1.0)}, choose_regions=choose
    )
    with pytest.raises(TermNotComputedError, match="'forgetful'"):
        distiller.train()(tiny_batch)

    with torch.no_grad():  # as a validation loss would be taken: nothing is to be back-propagated
        assert distiller(tiny_batch).parts["forgetful"] == 1


def test_what_distillation_adds_is_saved(tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    """A restored run continues like the old one: adapters, projections, tau, statistics and memory."""
    teacher = tiny_detector("faster-rcnn", seed=1)
    old = make_distiller(tiny_detector("faster-rcnn"), teacher, ALL_TERMS)
    train(old, tiny_batch)
    new = make_distiller(tiny_detector("faster-rcnn", seed=5), teacher, ALL_TERMS)
    new.load_state_dict(old.state_dict())
    new.step = old.step

    assert {"terms.sgfi.matcher.log_tau", "terms.sgfi.normalizer.mean", "terms.ckd.queue.embeddings"} <= set(
        old.state_dict()
    )
    ours, theirs = forward(new, tiny_batch), forward(old, tiny_batch)
    assert all(torch.equal(ours.parts[name], value) for name, value in theirs.parts.items())


def test_profile_fills_in_seconds(tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    distiller = make_distiller(tiny_detector("retinanet"), tiny_detector("faster-rcnn", seed=1), FEATURE_TERMS)
    assert forward(distiller, tiny_batch).seconds == {}
    distiller.profile = True
    seconds = forward(distiller, tiny_batch).seconds

    assert list(seconds) == ["student forward", "regions", "teacher", "term sgfi", "term ckd"]
    assert all(value > 0 for value in seconds.values())
