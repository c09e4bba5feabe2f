"""What a built pair starts from: the teacher's head, unless the student has one of its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gdetkd_cli.assembly.detector import build_detector
from gdetkd_cli.assembly.distillation import BuiltPair, build_pair
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.methods.base import Detectors
from gdetkd_cli.methods.baselines import fgd
from gdetkd_cli.methods.baselines.gt_mask import GTMaskTerm
from gdetkd_cli.methods.baselines.maps import MapTerm
from gdetkd_cli.methods.sgfi import SGFITerm
from gdetkd_cli.recipe.distillation import FGD, Distill
from gdetkd_cli.recipe.schema import ComposedDetector
from gdetkd_cli.structures import Batch, Regions

TinyDetector = Callable[..., Detector]
CLASSES = ("circle", "square", "triangle")


@pytest.mark.parametrize(
    ("classes", "trained"), [(None, False), (CLASSES, True), (("circle", "square"), False)], ids=["none", "same", "two"]
)
def test_a_head_is_trained_if_its_weights_are_for_these_classes(
    classes: tuple[str, ...] | None,
    trained: bool,
    tiny_detector: TinyDetector,
    tiny_description: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    description = tiny_description("faster-rcnn") | {"arch": "composed"}
    del description["kind"]
    if classes:
        torch.save(tiny_detector("faster-rcnn", classes=classes).module.state_dict(), tmp_path / "weights.pth")
        description["weights"] = str(tmp_path / "weights.pth")
    assert build_detector(ComposedDetector(**description), CLASSES, seed=0).trained_head is trained


def built_with_head(tiny_detector: TinyDetector, head_transfer: Any, copied: bool, **how: Any) -> BuiltPair:
    """A pair whose heads fit; asserts that the teacher's was copied, or was not."""
    student, teacher = tiny_detector("faster-rcnn"), tiny_detector("faster-rcnn", seed=1)
    pair = build_pair(Distill(head_transfer=head_transfer), student, teacher, seed=0, **how)
    heads = [detector.module.roi_heads.box_head.fc6.weight for detector in (student, teacher)]  # type: ignore[union-attr]
    assert torch.equal(*heads) == copied
    assert pair.transferred == copied
    return pair


@pytest.mark.parametrize(
    ("head_transfer", "trained", "copied"),
    [("auto", False, True), ("auto", True, False), (True, True, True), (False, False, False)],
)
def test_a_trained_head_is_left_alone_unless_the_recipe_says_otherwise(
    head_transfer: Any, trained: bool, copied: bool, tiny_detector: TinyDetector
) -> None:
    pair = built_with_head(tiny_detector, head_transfer, copied, trained_head=trained)
    assert pair.head_transfer.startswith("copied from the teacher: box_head" if copied else ("nothing", "left out"))
    assert ("the student's head is trained already" in pair.head_transfer) == (trained and not copied)


@pytest.mark.parametrize(("head_transfer", "copied"), [(True, True), (False, False)])
def test_features_become_the_teachers_own_where_its_head_reads_them(
    head_transfer: Any, copied: bool, tiny_detector: TinyDetector
) -> None:
    pair = built_with_head(tiny_detector, head_transfer, copied)
    term = pair.distiller.terms["sgfi"]
    assert isinstance(term, SGFITerm)
    assert term.same_space == copied  # free features go with a head of one's own


def test_a_pair_whose_heads_differ_is_not_told_to_copy(tiny_detector: TinyDetector) -> None:
    pair = build_pair(Distill(), tiny_detector("fcos"), tiny_detector("faster-rcnn"), seed=0, trained_head=True)
    assert pair.head_transfer.startswith("nothing copied: ")
    assert "head_transfer: true" not in pair.head_transfer


@pytest.mark.parametrize(
    ("student", "per_image", "device", "expected"),
    [
        ("faster-rcnn", "auto", "cuda", 16),  # the toy's head trains on 16
        ("faster-rcnn", "auto", "cpu", 16),
        ("fcos", "auto", "cuda", 512),
        ("fcos", "auto", "cpu", 64),
        ("fcos", 100, "cpu", 100),
    ],
)
def test_regions_follow_the_head_and_the_device(
    student: str, per_image: Any, device: str, expected: int, tiny_detector: TinyDetector
) -> None:
    config = Distill.model_validate({"regions": {"per_image": per_image}})
    pair = build_pair(config, tiny_detector(student), tiny_detector("faster-rcnn", seed=1), seed=0, device=device)
    assert pair.regions_per_image == expected


@pytest.mark.parametrize(
    ("head_transfer", "trained", "block", "expected"),
    [
        (False, False, "auto", 50),  # a fresh head
        ("auto", False, "auto", 0),  # the teacher's head
        ("auto", True, "auto", 0),  # a trained one of its own
        (False, False, {"warmup_steps": 7}, 7),
        (False, False, {"warmup_steps": 0}, 0),  # the paper
    ],
)
def test_prediction_terms_come_in_late_where_the_head_is_fresh(
    head_transfer: Any, trained: bool, block: Any, expected: int, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    config = Distill.model_validate({"head_transfer": head_transfer, "class_kd": block, "box_kd": block})
    student, teacher = tiny_detector("faster-rcnn"), tiny_detector("faster-rcnn", seed=1)
    pair = build_pair(config, student, teacher, seed=0, trained_head=trained, steps=100)
    weights, whole = pair.distiller(tiny_batch).weights, {term.name: term.weight for term in pair.terms}
    assert weights["sgfi"] == whole["sgfi"]
    for name in ("class_kd", "box_kd"):  # the first step of a linear warm-up
        assert weights[name] == pytest.approx(whole[name] / (expected + 1))


def test_later_stages_of_two_cascades_are_distilled(tiny_detector: TinyDetector) -> None:
    pairs = {
        student: build_pair(Distill(), tiny_detector(student), tiny_detector("cascade-rcnn", seed=1), seed=0)
        for student in ("cascade-rcnn", "faster-rcnn")
    }
    weights = {name: pair.distiller.terms["class_kd"].stage_weights for name, pair in pairs.items()}
    assert weights == {"cascade-rcnn": (0.5, 0.25), "faster-rcnn": ()}


@pytest.mark.parametrize(
    ("student", "ckd", "weight"),
    [
        ("faster-rcnn", {}, 1.0),
        ("retinanet", {}, 0.05),
        ("fcos", {"weight": "auto", "queue": 8}, 0.05),
        ("retinanet", {"weight": 3}, 3.0),
        ("faster-rcnn", {"weight": 0}, 0.0),
    ],
)
def test_the_weight_of_contrast_suits_the_student(
    student: str, ckd: dict[str, Any], weight: float, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    pair = build_pair(
        Distill.model_validate({"ckd": ckd}), tiny_detector(student), tiny_detector("faster-rcnn", seed=1), seed=0
    )
    assert {term.name: term.weight for term in pair.terms}["ckd"] == weight
    assert pair.distiller(tiny_batch).weights["ckd"] == weight


@pytest.mark.parametrize(
    ("student", "published"),
    [
        ("faster-rcnn", (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7)),
        ("cascade-rcnn", (0.5, 5e-5, 2.5e-5, 5e-5, 5e-7)),
        ("retinanet", (0.5, 1e-3, 5e-4, 5e-4, 5e-6)),
        ("fcos", (0.8, 1.6e-3, 8e-4, 8e-4, 8e-6)),
    ],
)
def test_fgd_has_the_weights_published_for_the_students_family(
    student: str, published: tuple[float, ...], tiny_detector: TinyDetector
) -> None:
    pair = Detectors(tiny_detector(student), tiny_detector("faster-rcnn"))

    def weights(block: FGD) -> tuple[float, ...]:
        term = fgd.build(pair, **block.model_dump(exclude={"weight", "warmup_steps"}))
        return (term.temperature, *term.weights)

    assert weights(FGD()) == published
    assert weights(FGD(temperature=2.0, relation=0.0)) == (2.0, *published[1:4], 0.0)


@pytest.mark.parametrize(
    ("student", "pooled", "counted"),
    [
        ("faster-rcnn", False, (True, True, True, True, False)),
        ("faster-rcnn", True, (True,) * 5),
        ("retinanet", False, None),
        ("fcos", False, None),
    ],
)
def test_maps_are_compared_without_the_pooled_copy_of_the_last_level(
    student: str, pooled: bool, counted: tuple[bool, ...] | None, tiny_detector: TinyDetector
) -> None:
    trained, teacher = tiny_detector(student), tiny_detector("faster-rcnn", seed=1)
    names = ("fitnet", "gt_mask", "pkd", "cwd", "fgd")
    block = Distill.model_validate({name: {"pooled_levels": pooled} for name in names})
    pair = build_pair(block, trained, teacher, seed=0)
    for name in names:
        term = pair.distiller.terms[name]
        assert isinstance(term, MapTerm)
        assert term.counted == (counted or (True,) * len(trained.levels))


@pytest.mark.parametrize("student", ["faster-rcnn", "retinanet", "fcos"])
def test_objects_lie_on_the_level_that_the_student_assigns_them_to(
    student: str, tiny_detector: TinyDetector, tiny_batch: Batch
) -> None:
    trained, teacher = tiny_detector(student), tiny_detector("faster-rcnn", seed=1)
    pair = build_pair(Distill.model_validate({"gt_mask": {"mask": "boxes"}}), trained, teacher, seed=0)
    term = pair.distiller.terms["gt_mask"]
    assert isinstance(term, GTMaskTerm)
    assert term.assign is not None
    boxes = torch.cat([target.boxes for target in tiny_batch.targets])
    index = torch.tensor([0, 0, 2])
    regions = Regions(boxes, index, torch.full_like(index, -1))
    seen = trained.extract_features(tiny_batch)
    own = trained.region_outputs(seen, regions, frozenset({"level"})).level
    assert own is not None
    assert torch.equal(term.assign(seen, regions), own)
    report = pair.distiller.train()(tiny_batch)
    assert report.parts["gt_mask"] > 0
