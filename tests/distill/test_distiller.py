"""The rules that hold for every term (METHOD, section 5)."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from gdetkd_cli.detectors import catalog
from gdetkd_cli.detectors.protocol import Detector, Observation
from gdetkd_cli.distill.distiller import Distiller, WeightedTerm
from gdetkd_cli.distill.pair import prediction_columns
from gdetkd_cli.distill.regions import choose_regions
from gdetkd_cli.distill.terms import BoxTerm, CKDTerm, ClassTerm, SGFITerm
from gdetkd_cli.errors import TermNotComputedError
from gdetkd_cli.structures import Batch, LossReport, Regions, Target
from gdetkd_cli.training.schedule import build_optimizer

FEATURE_TERMS = ("sgfi", "ckd")
ALL_TERMS = (*FEATURE_TERMS, "class_kd", "box_kd")
PAIRS = [  # teacher, student
    ("faster-rcnn", "faster-rcnn"),
    ("faster-rcnn", "retinanet"),
    ("faster-rcnn", "fcos"),
    ("retinanet", "retinanet"),
    ("retinanet", "faster-rcnn"),
    ("fcos", "retinanet"),
]

TinyDetector = Callable[..., Detector]


def terms_of(teacher: str, student: str) -> tuple[str, ...]:
    return ALL_TERMS if teacher == student == "faster-rcnn" else FEATURE_TERMS


EVERY_TERM = [(*pair, name) for pair in PAIRS for name in terms_of(*pair)]


def make_term(name: str, student: Detector, teacher: Detector) -> nn.Module:
    torch.manual_seed(7)
    if name == "sgfi":
        return SGFITerm(
            student_channels=[level.channels for level in student.levels],
            teacher_channels=max(level.channels for level in teacher.levels),
            embed_channels=8,
            normalize="channel",
            sampling_ratio=2,
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
    columns = prediction_columns(student, teacher)
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
    student: Detector, teacher: Detector, names: tuple[str, ...], *, weight: float = 1.0, warmup_steps: int = 0
) -> Distiller:
    teacher.module.eval().requires_grad_(False)
    distiller = Distiller(
        student=student,
        teacher=teacher,
        terms={name: WeightedTerm(make_term(name, student, teacher), weight, warmup_steps) for name in names},
        choose_regions=choose,
    )
    return distiller.train()


def forward(distiller: Distiller, batch: Batch, *, seed: int = 3) -> LossReport:
    """One forward whose random numbers (a two-stage head samples its proposals) come from ``seed``."""
    torch.manual_seed(seed)
    report: LossReport = distiller(batch)
    return report


def train(distiller: Distiller, batch: Batch, *, steps: int = 3) -> list[LossReport]:
    """The loop's step, three times: a fresh optimizer, gradients of the student and the rest clipped apart."""
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


# ------------------------------------------------------------------------------------------------------ the teacher


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
    """Weights and running statistics to the last bit, evaluation mode, and no gradient."""
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
    assert of_teacher.of("transform", "backbone", "roi_heads.box_roi_pool") == [1, 1, 1]
    assert of_teacher.of("roi_heads.box_head", "roi_heads.box_predictor") == [head, predictor]
    # The student's head ran on the regions already: they are its own proposals.
    assert of_student.of("roi_heads.box_head", "roi_heads.box_predictor", "backbone") == [1, 1, 1]


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
    """NMS runs for a two-stage student's own proposals, once for each image, and never for the teacher's."""
    calls = Counter[str]()
    original = torch.ops.torchvision.nms
    monkeypatch.setattr("torchvision.ops.boxes.nms", lambda *a: (calls.update(["nms"]), original(*a))[1])
    monkeypatch.setattr(
        "torchvision.ops.boxes.batched_nms",
        lambda boxes, scores, idxs, threshold: (calls.update(["batched"]), original(boxes, scores, threshold))[1],
    )
    distiller = make_distiller(tiny_detector(student), tiny_detector(teacher, seed=1), terms_of(teacher, student))
    forward(distiller, tiny_batch)

    assert calls == ({"batched": len(tiny_batch)} if student == "faster-rcnn" else {})


# ----------------------------------------------------------------------------------------------------- no distilling


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_weights_of_0_are_plain_training(
    teacher: str, student: str, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    """The same losses and the same student, to the last bit, after three optimizer steps."""
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
    losses = student.observe(tiny_batch).losses

    assert report.parts.keys() == losses.keys()
    torch.testing.assert_close(report.total, torch.stack(list(losses.values())).sum())
    assert not list(Distiller(student=student).added_parameters())


# ------------------------------------------------------------------------------------------------------- distilling


@pytest.mark.parametrize(("teacher", "student", "name"), EVERY_TERM)
def test_each_term_reaches_the_whole_student(
    teacher: str, student: str, name: str, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    """Alone, it changes the gradient of the backbone's first layer, and gives one to all of its own parameters."""
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
    """Every level has channels of its own, on both sides, and there is no tower to read embeddings from."""
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
    """What the terms measure falls while the student trains on one batch."""
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


# ---------------------------------------------------------------------------------------------------------- weights


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


# ----------------------------------------------------------------------------------------------------------- errors


class Forgetful(nn.Module):
    """A term whose value does not depend on anything that learns."""

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


# ------------------------------------------------------------------------------------------------- saving, profiling


def test_what_distillation_adds_is_saved(tiny_detector: TinyDetector, tiny_batch: Batch) -> None:
    """Adapters, projections, tau, statistics and the memory: a restored run goes on as the old one would have."""
    teacher = tiny_detector("faster-rcnn", seed=1)
    old = make_distiller(tiny_detector("faster-rcnn"), teacher, ALL_TERMS)
    train(old, tiny_batch)
    new = make_distiller(tiny_detector("faster-rcnn", seed=5), teacher, ALL_TERMS)
    new.load_state_dict(old.state_dict())
    new.step = old.step

    assert {"terms.sgfi.matcher.log_tau", "terms.sgfi.standardizer.mean", "terms.ckd.queue.embeddings"} <= set(
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
