"""Recipes that gdetkd writes, the schema, and the starter."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from gdetkd_cli.recipe.load import build_json_schema, dump_recipe, load_recipe
from gdetkd_cli.recipe.schema import CocoData
from gdetkd_cli.recipe.starter import format_starter


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["name='3e4'"],
        ["name=2026-01-31", "train.optimizer.lr=1e-5"],
        ["data={format: coco, root: ../data/bccd, classes: ['yes', '3e4', Größe]}"],
        ["student={arch: torchvision, name: fcos_resnet50_fpn, arguments: {score_thresh: 1e-3, anchors: [[1, 2]]}}"],
        ["distill={class_kd: {weight: 0.5}, sgfi: null}", "teacher={arch: checkpoint, path: 'builtin:x'}"],
    ],
)
def test_a_dumped_recipe_reads_back_equal(recipe: Path, tmp_path: Path, overrides: list[str]) -> None:
    first = load_recipe(recipe, overrides)
    assert load_recipe(write(tmp_path, dump_recipe(first))) == first


def test_the_schema_is_closed_and_its_references_resolve() -> None:
    schema = build_json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert (schema["type"], schema["additionalProperties"]) == ("object", False)
    assert {"name", "data", "student", "train"} == set(schema["required"])
    references = set(re.findall(r"#/\$defs/(\w+)", str(schema)))
    assert references == set(schema["$defs"])


def test_the_starter_validates_as_it_is(tmp_path: Path) -> None:
    read = load_recipe(write(tmp_path, format_starter()))
    assert isinstance(read.data, CocoData)
    assert read.teacher is not None
    assert read.distill is not None
    assert format_starter("my.yaml").startswith("# gdetkd distill --recipe my.yaml\n# ")


def test_the_starters_options_exist_and_show_their_defaults(tmp_path: Path) -> None:
    starter = format_starter()
    plain = load_recipe(write(tmp_path, starter))
    option = re.compile(r"^( *)# ( *(?!arch|path)[a-z_]+:( .*)?)$", re.MULTILINE)
    assert len(option.findall(starter)) > 25
    full = load_recipe(write(tmp_path, option.sub(r"\1\2", starter)))
    shown = {"classes": ["cat", "dog"], "multi_scale": [640, 672, 704]}  # examples: the default is "all", "none"
    explained = {"blocks": [2, 2, 2, 2], "width": 64.0, "pyramid_levels": (2, 6)}  # spelled-out meaning of null
    assert full.data == plain.data.model_copy(update={"classes": shown["classes"]})
    assert full.augment == plain.augment.model_copy(update={"multi_scale": shown["multi_scale"]})
    assert full.student == plain.student.model_copy(update=explained)
    assert (full.distill, full.train, full.runtime) == (plain.distill, plain.train, plain.runtime)


def test_the_starters_trained_teacher_validates(tmp_path: Path) -> None:
    read = yaml.safe_load(format_starter())
    read["teacher"] = yaml.safe_load(
        "\n".join(re.findall(r"^#   ((?:arch|path): .*)$", format_starter(), flags=re.MULTILINE))
    )
    load_recipe(write(tmp_path, yaml.safe_dump(read)))
