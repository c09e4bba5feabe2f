"""Properties that hold for every ``student.pt``, on inputs that hypothesis makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from gdetkd_cli.assembly import build_detector
from gdetkd_cli.detectors import catalog
from gdetkd_cli.errors import ModelError
from gdetkd_cli.recipe.schema import ComposedDetector

CLASSES = ("car", "bus", "bike")
HEADS = ("faster-rcnn", "cascade-rcnn", "retinanet", "fcos")
FIELDS = ("gdetkd", "architecture", "classes", "model")
ARCHITECTURE = (
    "kind",
    "backbone",
    "width",
    "blocks",
    "head",
    "pyramid_channels",
    "pyramid_levels",
    "image_size",
    "norm",
)

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small student, as a run writes it."""
    file = tmp_path_factory.mktemp("students") / "student.pt"
    built = build_detector(ComposedDetector.model_validate(toy.detector()), CLASSES, seed=0)
    catalog.save(file, built.detector, built.description)
    return file


def read(student: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(student, weights_only=True)
    return content


def try_to_load(file: Path) -> catalog.Loaded | None:
    """Loads a file; None if it is refused with a sentence that names it."""
    try:
        return catalog.load(file)
    except ModelError as error:
        refusal = str(error)
    assert str(file) in refusal
    return None


@given(field=st.sampled_from(FIELDS), value=anything)
def test_any_value_in_any_field_is_loaded_or_refused(student: Path, field: str, value: object) -> None:
    content, changed = read(student), student.with_name("changed.pt")
    torch.save({**content, field: value}, changed)
    loaded = try_to_load(changed)
    if loaded is not None:
        assert value == content[field] or (field == "classes" and loaded.detector.class_names == tuple(value))  # type: ignore[arg-type]


@given(field=st.sampled_from(ARCHITECTURE), value=anything)
def test_any_value_in_the_architecture_is_loaded_or_refused(student: Path, field: str, value: object) -> None:
    content, changed = read(student), student.with_name("changed.pt")
    content["architecture"][field] = value
    torch.save(content, changed)
    loaded = try_to_load(changed)
    if loaded is not None:
        detections = loaded.detector.predict([torch.rand(3, 64, 64)])[0]
        assert len(detections.boxes) == len(detections.labels)


@given(place=st.integers(0, 10**6), text=st.binary(max_size=16), kept=st.just(1.0) | st.floats(0, 1))
def test_a_damaged_file_is_loaded_or_refused(student: Path, place: int, text: bytes, kept: float) -> None:
    whole = bytearray(student.read_bytes())
    place %= len(whole)
    whole[place : place + len(text)] = text
    damaged = student.with_name("damaged.pt")
    damaged.write_bytes(whole[: int(kept * len(whole))])
    try_to_load(damaged)


@settings(max_examples=12)
@given(
    head=st.sampled_from(HEADS),
    width=st.sampled_from([4, 8, 12]),
    channels=st.sampled_from([8, 16, 24]),
    names=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=4, unique=True),
    seed=st.integers(0, 1000),
)
def test_a_saved_student_is_the_same_when_it_is_loaded(
    student: Path, head: str, width: int, channels: int, names: list[str], seed: int
) -> None:
    block = toy.detector(head, width) | {"pyramid_channels": channels}
    built = build_detector(ComposedDetector.model_validate(block), tuple(names), seed=seed)
    built.detector.module.eval()
    other = student.with_name("other.pt")
    catalog.save(other, built.detector, built.description)
    loaded = catalog.load(other)
    assert loaded.detector.class_names == tuple(names)
    own, read = built.detector.module.state_dict(), loaded.detector.module.state_dict()
    assert own.keys() == read.keys() and all(torch.equal(own[name], read[name]) for name in own)
    image = torch.rand(3, 64, 64)
    before, after = built.detector.predict([image])[0], loaded.detector.predict([image])[0]
    assert torch.equal(before.boxes, after.boxes) and torch.equal(before.scores, after.scores)
