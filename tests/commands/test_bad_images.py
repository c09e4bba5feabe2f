"""A run goes on without images that cannot be read, if its recipe allows it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import toy

from gdetkd_cli.commands import check_recipe, run_distill, run_eval
from gdetkd_cli.commands.export_images import find_calibration, read_parity_images
from gdetkd_cli.commands.report import _collect, _find_runs, run_report
from gdetkd_cli.engine.events import silent
from gdetkd_cli.errors import DataError
from gdetkd_cli.recipe.schema import Recipe


def write(root: Path, **data: Any) -> Recipe:
    """A recipe of three training and two validation images, one of each torn."""
    names = [f"{i}.png" for i in range(5)]
    toy.write_coco(root, names, train=(0, 1, 2))
    for name in (names[1], names[4]):
        path = root / "images" / name
        path.write_bytes(path.read_bytes()[:-400])
    fields = toy.recipe(steps=2, log_every=1).model_dump(mode="json")
    return Recipe.model_validate(fields | {"data": {"format": "coco", "root": str(root), **data}})


@pytest.mark.draws
def test_a_run_without_the_torn_images(tmp_path: Path) -> None:
    recipe = write(tmp_path, on_bad_sample="skip")
    check_recipe(recipe, "toy.yaml")
    run = run_distill(recipe, output=tmp_path / "run")
    assert run.metrics.images == 1
    lines = (run.run / "bad_images.txt").read_text().splitlines()
    assert sorted(Path(line.partition("\t")[0]).name for line in lines) == ["1.png", "4.png"]
    assert [path.name for path in (run.run / "images").iterdir()] == ["00.png"]
    assert run_eval(str(run.run), data=None).metrics == run.metrics
    # The report counts the objects of one image alone, and 8-bit ranges are measured on two.
    run_report([run.run])
    contents = _collect(_find_runs([run.run]))
    assert contents.split is not None and len(contents.split) == 1 and contents.complete
    assert next(image.shape for image in read_parity_images(run.run / "student.pt", silent)) == (3, 64, 64)
    calibration = find_calibration(run.run / "student.pt", silent)
    assert [calibration.read(place) is None for place in range(3)] == [False, True, False]


def test_the_limit_and_the_default_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"1\.png cannot be decoded"):
        run_distill(write(tmp_path), output=tmp_path / "run")
    recipe = write(tmp_path, on_bad_sample="skip", max_bad_samples=1)
    (tmp_path / "images" / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"2 images cannot be read, more than data\.max_bad_samples allows"):
        run_distill(recipe, output=tmp_path / "run2")


def test_a_folder_that_the_teacher_labels(tmp_path: Path) -> None:
    names = [f"images/{i:02d}.png" for i in range(12)]
    toy.write_images(tmp_path, names)
    (tmp_path / names[3]).write_bytes(b"")
    torn = tmp_path / names[5]
    torn.write_bytes(torn.read_bytes()[:-400])
    data = {"format": "folder", "root": str(tmp_path / "images"), "on_bad_sample": "skip", "labels": {"score": 0.0}}
    recipe = Recipe.model_validate(toy.recipe(steps=1).model_dump(mode="json") | {"data": data})
    run = run_distill(recipe, output=tmp_path / "run").run
    labelled = json.loads((run / "labels" / "train.json").read_text())["images"]
    assert [image["file_name"] for image in labelled] == [f"{i:02d}.png" for i in (1, 2, 4, 6, 7, 8, 9, 11)]
    assert len((run / "bad_images.txt").read_text().splitlines()) == 2
    # The teacher of the run's own recipe is evaluated on the labels in its folder, as `report --teacher` does.
    assert run_eval(str(run / "recipe.yaml"), data=None).metrics.images > 0
    assert len(read_parity_images(run / "student.pt", silent)) == 6
