"""Properties that hold for every recipe, on inputs that hypothesis makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from gdetkd_cli.errors import GDetKDError, RecipeError
from gdetkd_cli.recipe.builtin import list_builtin
from gdetkd_cli.recipe.load import dump_recipe, load_recipe

TREES = [yaml.safe_load(dump_recipe(load_recipe(recipe.path))) for recipe in list_builtin()]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


def list_fields(tree: Any, place: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all fields of a recipe's blocks."""
    if not isinstance(tree, dict):
        return []
    return [
        path
        for key, value in tree.items()
        if key != "arguments"  # the user's own keywords
        for path in [(*place, key), *list_fields(value, (*place, key))]
    ]


PLACES = [(tree, place) for tree in TREES for place in list_fields(tree)]


def replace(tree: Any, place: tuple[str, ...], value: object) -> Any:
    """A copy of the tree with another value in one field."""
    return {**tree, place[0]: replace(tree[place[0]], place[1:], value)} if place else value


def check(tree: object, file: Path, overrides: tuple[str, ...] = ()) -> None:
    """Reads a recipe, which is either refused or the same after it is written and read again."""
    file.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    try:
        recipe = load_recipe(file, overrides)
    except GDetKDError as error:
        refusal = error
    else:
        file.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(file) == recipe
        return
    assert str(refusal).strip() and refusal.exit_code == 2


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes") / "recipe.yaml"


@given(tree=anything)
def test_any_tree_is_a_recipe_or_refused(file: Path, tree: object) -> None:
    check(tree, file)


@given(where=st.sampled_from(PLACES), value=anything)
def test_any_value_in_any_field_is_read_or_refused(
    file: Path, where: tuple[Any, tuple[str, ...]], value: object
) -> None:
    tree, place = where
    check(replace(tree, place, value), file)


@given(where=st.sampled_from(PLACES), text=st.text(max_size=20))
def test_any_text_after_set_is_read_or_refused(file: Path, where: tuple[Any, tuple[str, ...]], text: str) -> None:
    tree, place = where
    check(tree, file, (f"{'.'.join(place)}={text}",))


@given(
    steps=st.integers(1, 10**6),
    batch=st.integers(1, 512),
    rate=st.floats(1e-6, 10),
    seed=st.integers(0, 2**63 - 1),
)
def test_valid_numbers_are_kept_exactly(file: Path, steps: int, batch: int, rate: float, seed: int) -> None:
    changes = (f"train.steps={steps}", f"train.batch_size={batch}", f"train.optimizer.lr={rate}", f"seed={seed}")
    recipe = load_recipe("shapes/teacher", changes)
    assert (recipe.train.steps, recipe.train.batch_size, recipe.train.optimizer.lr, recipe.seed) == (
        steps,
        batch,
        rate,
        seed,
    )


@given(number=st.integers() | st.floats())
def test_a_number_is_taken_as_it_is_or_refused(number: float) -> None:
    change = f"train.clip_norm={yaml.safe_dump(number).split()[0]}"
    if 0 < number <= 10**9:
        assert load_recipe("shapes/teacher", (change,)).train.clip_norm == number
    else:
        with pytest.raises(RecipeError, match=r"train\.clip_norm: input should be"):
            load_recipe("shapes/teacher", (change,))
