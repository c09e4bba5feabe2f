"""Records, paths and sizes in arrays behave like lists of objects."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from gdetkd_cli.data.packed import PackedPaths, PackedRecords, PackedSizes, RecordPacker


def item(x: float, label: int, *, crowd: int = 0) -> dict[str, Any]:
    return {"bbox": [x, 1.0, 4.0, 2.0], "area": 7.5, "category_id": label, "iscrowd": crowd}


@pytest.fixture
def records() -> PackedRecords:
    """Three images; annotations of the first come before and after those of the last, and the second has none."""
    packer = RecordPacker(outlines=True)
    packer.add(0, item(1.0, 2), None)
    packer.add(2, item(0.1, 1), {"size": [10, 20], "counts": [200]})
    packer.add(0, item(3.0, 1, crowd=1), None)
    packer.add(2, item(5.0, 3), None)
    return packer.build([7, 2**62, 1], [(10, 20), (30, 40), (10, 20)], [True, False, True])


def test_records(records: PackedRecords) -> None:
    assert len(records) == 3
    first, empty, last = records
    assert (first.image_id, first.size, first.annotated) == (7, (10, 20), True)
    assert first.boxes.tolist() == [[1, 1, 5, 3]]
    assert first.truth == [item(1.0, 2), item(3.0, 1, crowd=1)]
    assert (empty.image_id, empty.boxes.shape, empty.labels.dtype, empty.truth) == (2**62, (0, 4), torch.int64, [])
    assert not empty.annotated
    assert last.labels.tolist() == [1, 3]
    assert last.boxes.dtype == torch.float32
    assert last.truth[0]["bbox"] == [0.1, 1.0, 4.0, 2.0]  # as exact as in the file
    assert [outline is None for outline in last.outlines] == [False, True]
    assert records.count_empty() == 1


def test_slices_and_the_end(records: PackedRecords) -> None:
    assert [record.image_id for record in records[1:]] == [2**62, 1]
    assert [record.image_id for record in records[:2][:1]] == [7]
    assert len(records[:None]) == 3
    assert records[-1].image_id == 1
    assert records[1:].count_empty() == 1
    assert [record.image_id for record in records.select([2, 0]).select([1, 0])] == [7, 1]
    assert len(records.select([])) == 0
    with pytest.raises(IndexError):
        records[3]


def test_a_changed_record_changes_no_other(records: PackedRecords) -> None:
    records[0].boxes.zero_()
    records[0].labels.zero_()
    assert records[0].boxes.tolist() == [[1, 1, 5, 3]]
    assert records[0].labels.tolist() == [2]


def test_other_labels(records: PackedRecords) -> None:
    other = records.relabel(torch.tensor([0, 30, 20, 10]))
    assert other[2].labels.tolist() == [30, 10]
    assert [each["category_id"] for each in other[0].truth] == [20, 30]
    assert records[2].labels.tolist() == [1, 3]


def test_no_images_and_no_annotations() -> None:
    assert len(RecordPacker(outlines=False).build([], [], [])) == 0
    records = RecordPacker(outlines=False).build([1], [(2, 3)], [False])
    assert (records[0].boxes.shape, records[0].outlines, records.count_empty()) == ((0, 4), (), 1)


def test_loader_processes_pickle_them(records: PackedRecords) -> None:
    assert pickle.loads(pickle.dumps(records))[2].labels.tolist() == [1, 3]


def test_paths_and_sizes() -> None:
    names = ["a.jpg", "more/ü.jpg", "\udcff.png", "/elsewhere/z.png", ""]
    paths = PackedPaths(Path("root"), names)
    assert list(paths) == [Path("root") / name for name in names]
    assert paths[-2] == Path("/elsewhere/z.png")
    assert paths[:2] == [Path("root/a.jpg"), Path("root/more/ü.jpg")]
    with pytest.raises(IndexError):
        paths[5]
    sizes = PackedSizes([(1, 2), (3, 4)])
    assert (list(sizes), sizes[1], sizes[:1]) == ([(1, 2), (3, 4)], (3, 4), [(1, 2)])
