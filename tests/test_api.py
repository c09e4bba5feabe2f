"""The Python interface: one example of each function."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest
import toy

from gdetkd_cli import api
from gdetkd_cli.errors import RecipeError


def test_probe() -> None:
    report = api.probe("builtin:shapes-teacher")

    assert report.family == "two-stage"
    assert not doctest.testmod(api).failed


@pytest.mark.draws
def test_distill_evaluate_and_export(tmp_path: Path) -> None:
    fields = toy.recipe(steps=2).model_dump(mode="json")
    trained = api.distill(fields, output=tmp_path / "run")
    evaluated = api.evaluate(trained.run)
    exported = api.export(trained.run, onnx=False, torchscript=True)

    predicted = api.predict(trained.run, tmp_path / "run" / "images")

    assert predicted.images[0].image == "00.png"
    assert trained.steps == 2
    assert evaluated.metrics.ap == trained.metrics.ap
    assert [file.path.name for file in exported.files] == ["student.torchscript"]
    assert exported.files[0].parity.passed


def test_a_recipe_with_mistakes() -> None:
    fields = toy.recipe().model_dump(mode="json")
    fields["train"]["steps"] = "many"
    with pytest.raises(RecipeError, match=r"^train\.steps: "):
        api.distill(fields)
    with pytest.raises(RecipeError, match="no recipe file or built-in recipe is named nowhere"):
        api.distill("nowhere")
