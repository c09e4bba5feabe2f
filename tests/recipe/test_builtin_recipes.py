"""Every recipe that ships: it opens with the command that runs it, validates, and names files that ship too."""

from __future__ import annotations

import shlex

import pytest

from gdetkd_cli.recipe.builtin import BuiltinRecipe, find_recipes_folder, list_builtin
from gdetkd_cli.recipe.load import load_recipe

RECIPES = list_builtin()


def test_the_demo_and_the_real_data_have_recipes() -> None:
    assert {"shapes/frcnn-frcnn", "shapes/teacher", "bccd/teacher", "bccd/frcnn-frcnn"} <= {r.name for r in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.name)
def test_it_validates_and_its_first_line_is_its_command(recipe: BuiltinRecipe) -> None:
    loaded = load_recipe(recipe.path)
    command = shlex.split(recipe.path.read_text().splitlines()[0].lstrip("# "))
    assert command[0] == "gdetkd"
    assert command[1] == ("train" if loaded.distill is None else "distill")
    assert command[2:4] == ["--recipe", recipe.name]
    assert recipe.title


def test_the_table_lists_them_all() -> None:
    rows = (find_recipes_folder() / "README.md").read_text().splitlines()
    assert sorted(row.split("`")[1] for row in rows if row.startswith("| `")) == sorted(r.name for r in RECIPES)
