"""The methods of a comparison: their recipes, and the notes on a table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import toy

from gdetkd_cli.commands import run_compare
from gdetkd_cli.commands.compare import transfers_head
from gdetkd_cli.compare.table import MethodRow, write_notes
from gdetkd_cli.errors import RecipeError
from gdetkd_cli.recipe.checks import require_distillation
from gdetkd_cli.recipe.distillation import SGFI, FitNet, GTMask
from gdetkd_cli.recipe.methods import DEFAULT, TERMS, list_default_methods, select_method
from gdetkd_cli.recipe.schema import Recipe

# ------------------------------------------------------------------------------------------------------ the methods


def find_terms(recipe: Recipe) -> set[str]:
    assert recipe.distill is not None
    return {name for name in TERMS if getattr(recipe.distill, name) is not None}


def test_every_method_is_the_recipe_with_other_terms() -> None:
    recipe = toy.recipe()
    made = {method: select_method(recipe, method, steps=9, seed=4) for method in DEFAULT}
    for method, one in made.items():
        assert (one.train.steps, one.seed, one.student, one.data) == (9, 4, recipe.student, recipe.data)
        if method not in ("none", "gdetkd"):
            assert find_terms(one) == {"gt_mask" if method == "gt_box" else method}
            assert one.distill is not None
            assert one.distill.head_transfer is False
    assert made["none"].teacher is None
    assert made["none"].distill is None
    assert made["gdetkd"].distill == recipe.distill


def test_terms_are_joined_and_keep_the_recipes_settings() -> None:
    recipe = toy.recipe()
    assert recipe.distill is not None
    own = recipe.distill.model_copy(update={"sgfi": SGFI(weight=3.0), "ckd": None})
    one = select_method(recipe.model_copy(update={"distill": own}), "sgfi+ckd+head", steps=1, seed=0)
    assert find_terms(one) == {"sgfi", "ckd"}
    assert one.distill is not None
    assert one.distill.sgfi == SGFI(weight=3.0)
    assert one.distill.head_transfer is True


def test_squared_errors_weigh_as_sgfi_does() -> None:
    recipe = toy.recipe()
    assert recipe.distill is not None
    block = recipe.distill.model_copy(update={"sgfi": SGFI(weight=3.0), "fitnet": FitNet(weight=7.0)})
    made = select_method(
        recipe.model_copy(update={"distill": block}), "roi_imitation+fitnet+pkd", steps=1, seed=0
    ).distill
    assert made is not None and made.roi_imitation and made.fitnet and made.pkd
    assert (made.roi_imitation.weight, made.fitnet.weight, made.pkd.weight) == (3.0, 7.0, "auto")


def test_squared_errors_warm_up_as_sgfi_does() -> None:
    recipe = toy.recipe()
    assert recipe.distill is not None
    block = recipe.distill.model_copy(update={"sgfi": SGFI(warmup_steps=7)})
    made = select_method(recipe.model_copy(update={"distill": block}), "gt_box+pkd", steps=1, seed=0).distill
    assert made is not None and made.gt_mask and made.pkd
    assert (made.gt_mask.warmup_steps, made.pkd.warmup_steps) == (7, 0)


def test_the_box_mask_is_a_method_of_its_own() -> None:
    recipe = toy.recipe()
    assert recipe.distill is not None
    own = recipe.distill.model_copy(update={"gt_mask": GTMask(weight=3.0)})
    recipe = recipe.model_copy(update={"distill": own})
    masks = {}
    for method in ("gt_mask", "gt_box+head"):
        made = select_method(recipe, method, steps=1, seed=0).distill
        assert made is not None and made.gt_mask
        masks[method] = (made.gt_mask.mask, made.gt_mask.weight, made.head_transfer)
    assert masks == {"gt_mask": ("anchors", 3.0, False), "gt_box+head": ("boxes", 3.0, True)}
    with pytest.raises(
        RecipeError, match=r"'gt_mask\+gt_box' has the term gt_mask twice; remove gt_box or the other one"
    ):
        select_method(recipe, "gt_mask+gt_box", steps=1, seed=0)


def test_methods_of_a_table_that_names_none() -> None:
    assert list_default_methods(head=False) == DEFAULT
    with_head = list_default_methods(head=True)
    assert [name for name in with_head if not name.endswith("+head")] == list(DEFAULT)
    assert {name.removesuffix("+head") for name in with_head if name.endswith("+head")} == {*DEFAULT[1:-1]}


@pytest.mark.parametrize(
    ("student", "head_transfer", "head"),
    [
        ("faster-rcnn", "auto", True),
        ("faster-rcnn", False, False),
        ("retinanet", "auto", False),  # its head is another
    ],
)
def test_a_table_has_heads_where_gdetkd_has_one(student: str, head_transfer: Any, head: bool) -> None:
    recipe = toy.recipe(student=student)
    assert recipe.distill is not None
    block = recipe.distill.model_copy(update={"head_transfer": head_transfer})
    recipe = recipe.model_copy(update={"distill": block})
    assert transfers_head(require_distillation(recipe)) is head


@pytest.mark.parametrize("method", ["pdk", "sgfi+", "head", ""])
def test_unknown_methods(method: str) -> None:
    with pytest.raises(RecipeError, match=r"unknown method .*; expected none, gdetkd, or terms joined by '\+'"):
        select_method(toy.recipe(), method, steps=1, seed=0)


def test_a_recipe_without_a_teacher() -> None:
    with pytest.raises(RecipeError, match="has no `teacher:` block"):
        run_compare(toy.recipe().model_copy(update={"teacher": None}), methods=["none"])


# ---------------------------------------------------------------------------------------------------------- the table


def make_row(steps: int, ap: float, method: str = "none") -> MethodRow:
    return MethodRow(method=method, steps=steps, ap={0: ap}, mean=ap)


def test_notes_on_the_plateau_and_the_teacher() -> None:
    assert write_notes([make_row(100, 30.0)], 40.0) == [
        "to check whether plain training has reached its plateau, add a budget twice as long"
    ]
    speed, climbing = write_notes([make_row(100, 30.0), make_row(200, 41.0)], 40.0)
    assert speed == (
        "at 200 steps plain training reaches 41.0 AP and the teacher 40.0: distillation makes training faster here, "
        "but not better in the end"
    )
    assert climbing == "plain training gains +11.0 AP from 100 to 200 steps: not yet on its plateau"
    assert write_notes([make_row(100, 30.0), make_row(200, 30.5)], 40.0)[-1].endswith("steps: on its plateau")
    assert write_notes([make_row(30, 0.2), make_row(60, 0.6)], 40.0)[-1].endswith(
        "steps: not yet on its plateau"
    )  # it has hardly begun


def test_the_plateau_uses_the_seeds_of_both_budgets() -> None:
    """Seed 1 alone was run at both: +0.5; the means over all seeds would give +4."""
    half = MethodRow(method="none", steps=100, ap={0: 23.0, 1: 30.0}, mean=26.5)
    whole = MethodRow(method="none", steps=200, ap={1: 30.5}, mean=30.5)
    assert write_notes([half, whole], 40.0) == [
        "plain training gains +0.5 AP from 100 to 200 steps (1 seed): on its plateau"
    ]
    none = MethodRow(method="none", steps=200, ap={2: 30.5}, mean=30.5)
    assert "no seed in common" in write_notes([half, none], 40.0)[0]


def test_a_note_on_the_missing_interval_of_one_seed() -> None:
    one = MethodRow(method="pkd", steps=100, ap={0: 33.0}, mean=33.0, difference=3.0, image_deviation=0.5)
    assert write_notes([make_row(100, 30.0), one], 40.0)[-1] == (
        "a difference from one seed has no interval, because one seed does not show the variation; add seeds with "
        "`--seeds 3`"
    )
    two = replace(one, seed_deviation=1.0, interval=(1.0, 5.0))
    assert not any("interval" in note for note in write_notes([make_row(100, 30.0), two], 40.0))
