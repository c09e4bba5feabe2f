"""Detections survive their file, which holds arrays only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from drawn import scenes

from gdetkd_cli.errors import DataError
from gdetkd_cli.evaluation.stored import read_detections, write_detections
from gdetkd_cli.structures import Detections

NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))


def test_detections_come_back(tmp_path: Path) -> None:
    _, predictions = scenes()
    predictions[5] = NOTHING
    write_detections(tmp_path / "d.npz", ("cat", "dog"), predictions)
    stored = read_detections(tmp_path / "d.npz")

    assert stored.class_names == ("cat", "dog")
    assert stored.by_image.keys() == predictions.keys()
    for image_id, found in predictions.items():
        for name, value in vars(found).items():
            assert torch.equal(getattr(stored.by_image[image_id], name), value)


def test_labels_follow_the_names(tmp_path: Path) -> None:
    two = Detections(torch.zeros(3, 4), torch.ones(3), torch.tensor([1, 2, 3]))
    write_detections(tmp_path / "d.npz", ("cat", "dog", "cow"), {1: two})

    assert read_detections(tmp_path / "d.npz").relabel(("dog", "cat"))[1].labels.tolist() == [2, 1]


def test_no_detections_at_all(tmp_path: Path) -> None:
    write_detections(tmp_path / "d.npz", ("cat",), {})
    assert read_detections(tmp_path / "d.npz").by_image == {}


@pytest.mark.parametrize("content", [b"", b"PK\3\4 cut off", b"text"])
def test_a_damaged_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "d.npz").write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        read_detections(tmp_path / "d.npz")


def test_pickles_are_not_read(tmp_path: Path) -> None:
    np.savez(tmp_path / "d.npz", images=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="damaged"):
        read_detections(tmp_path / "d.npz")
