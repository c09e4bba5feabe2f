"""Images that cannot be read are an error, or are left out, counted, listed and limited."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image

from gdetkd_cli.data.bad_images import BadImageError, BadImages
from gdetkd_cli.data.dataset import DetectionDataset
from gdetkd_cli.data.image_files import ImageFiles
from gdetkd_cli.data.loader import load_training_batches, load_validation_batches
from gdetkd_cli.data.readers.folder import read_folder
from gdetkd_cli.data.split import Record, Split
from gdetkd_cli.errors import DataError

IMAGES = 5


def write(folder: Path, *spoilt: int) -> list[Path]:
    """Writes images, some of which end early."""
    paths = [folder / f"{i}.png" for i in range(IMAGES)]
    for i, path in enumerate(paths):
        Image.new("RGB", (16, 8), (50 * i, 0, 0)).save(path)
        if i in spoilt:
            path.write_bytes(path.read_bytes()[:-30])
    return paths


def build(paths: list[Path], bad: BadImages | None) -> Split:
    sizes = [(8, 16)] * len(paths)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    records = [Record(10 + i, size, *nothing) for i, size in enumerate(sizes)]
    return Split("it", ("thing",), records, ImageFiles(paths, sizes), bad=bad)


def train(split: Split, workers: int = 0) -> list[list[int]]:
    dataset = DetectionDataset(split=split, augmentation=None, seed=0, cache_mb=0)
    batches = load_training_batches(dataset=dataset, batch_size=2, steps=10, seed=0, workers=workers)
    return [batch.image_ids.tolist() for batch in batches]


def test_the_next_image_takes_the_place_in_training(tmp_path: Path) -> None:
    whole = train(build(write(tmp_path), None))
    bad, notes = BadImages(2), []
    bad.report_to(notes.append)
    left = train(build(write(tmp_path, 3, 4), bad))
    assert left == [[{13: 10, 14: 10}.get(number, number) for number in batch] for batch in whole]
    assert [note[:45] for note in sorted(notes)] == [
        f"warning: left out image {i} of at most 2: the im"[:45] for i in (1, 2)
    ]  # once each, though each image comes up in four passes
    assert train(build(write(tmp_path, 3, 4), BadImages(2)), workers=1) == left


def test_an_unreadable_image_is_an_error_by_default(tmp_path: Path) -> None:
    split = build(write(tmp_path, 3), None)
    with pytest.raises(BadImageError, match=r"the image .*3\.png cannot be decoded"):
        train(split)
    with pytest.raises(BadImageError, match=r"3\.png cannot be decoded"):
        list(load_validation_batches(split=split, batch_size=2))


def test_it_is_in_no_batch_of_an_evaluation(tmp_path: Path) -> None:
    split = build(write(tmp_path, 0, 1, 3), BadImages(3))
    assert [batch.image_ids.tolist() for batch in load_validation_batches(split=split, batch_size=2)] == [[12], [14]]


def test_more_than_the_limit_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 images cannot be read, more than data\.max_bad_samples allows \(1\); the"):
        list(load_validation_batches(split=build(write(tmp_path, 0, 3), BadImages(1)), batch_size=1))
    with pytest.raises(DataError, match="no image of it can be read; give other data"):
        train(build(write(tmp_path, *range(IMAGES)), BadImages(9)))


def test_the_list_has_each_image_once(tmp_path: Path) -> None:
    file = tmp_path / "bad_images.txt"
    for _ in range(2):  # the second time as a resumed run
        bad = BadImages(5)
        bad.add(BadImageError(tmp_path / "a\n.png", "is torn"))  # found before the folder is known
        bad.list_in(file)
        for _ in range(2):
            bad.add(BadImageError(tmp_path / "b.png", "is torn"))
    assert file.read_text().splitlines() == [
        rf"{tmp_path}/a\n.png" + "\t" + rf"the image {tmp_path}/a\n.png is torn",
        f"{tmp_path}/b.png\tthe image {tmp_path}/b.png is torn",
    ]


def test_an_error_survives_the_way_out_of_a_loader_process() -> None:
    error = pickle.loads(pickle.dumps(BadImageError(Path("a.png"), "is torn")))
    assert (str(error), error.path) == ("the image a.png is torn", Path("a.png"))


def test_a_header_that_cannot_be_read(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "2.png").write_bytes(b"")
    with pytest.raises(BadImageError, match=r"2\.png cannot be read"):
        read_folder(tmp_path)
    bad = BadImages(1)
    split = read_folder(tmp_path, bad=bad)
    assert [path.name for path in split.read.paths] == ["0.png", "1.png", "3.png", "4.png"]  # type: ignore[attr-defined]
    assert (len(split), split.bad) == (4, bad)
