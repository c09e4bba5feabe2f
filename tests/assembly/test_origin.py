"""What makes a resumed run another run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gdetkd_cli.assembly import list_differences
from gdetkd_cli.assembly.origin import hash_detector
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import CheckpointDetector, TransformersDetector


@pytest.fixture
def origin() -> dict[str, Any]:
    return {"recipe": load_recipe("shapes/frcnn-frcnn").model_dump(mode="json"), "teacher's file": "12ab"}


def change(origin: dict[str, Any], **train: Any) -> dict[str, Any]:
    return {**origin, "recipe": {**origin["recipe"], "train": {**origin["recipe"]["train"], **train}}}


def test_a_field_that_an_older_version_did_not_have_is_no_difference(origin: dict[str, Any]) -> None:
    older = change(origin)
    del older["recipe"]["train"]["accumulate"], older["recipe"]["train"]["ema"]
    assert list_differences(older, origin) == []
    assert list_differences(older, change(origin, accumulate=2)) == ["train.accumulate was 1 and is 2"]


def test_a_field_that_this_version_does_not_have_is_a_difference(origin: dict[str, Any]) -> None:
    assert list_differences(change(origin, gone=3), origin) == ["train.gone was 3 and is null"]


def test_the_weights_of_a_folder_count(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"one")
    blocks = (
        TransformersDetector(arch="transformers", model=str(tmp_path)),
        CheckpointDetector(arch="checkpoint", path=str(tmp_path)),
    )
    before = [hash_detector(block) for block in blocks]
    (tmp_path / "model.safetensors").write_bytes(b"two")
    after = [hash_detector(block) for block in blocks]
    assert None not in before and all(one != two for one, two in zip(before, after, strict=True))


def test_another_file_is_a_difference(origin: dict[str, Any]) -> None:
    assert list_differences({**origin, "teacher's file": "34cd"}, origin) == ["teacher's file changed"]
