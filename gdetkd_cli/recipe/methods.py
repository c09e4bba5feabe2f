"""The methods that ``gdetkd compare`` knows, and the recipe of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from gdetkd_cli.errors import RecipeError
from gdetkd_cli.recipe.checks import plain_recipe
from gdetkd_cli.recipe.distillation import (
    CKD,
    CWD,
    FGD,
    PKD,
    SGFI,
    Distill,
    FitNet,
    GTMask,
    Logit,
    PredictionKD,
    RoIImitation,
)
from gdetkd_cli.recipe.schema import DistillationRecipe, Recipe

NONE, WHOLE, HEAD = "none", "gdetkd", "head"
TERMS: Mapping[str, type[BaseModel]] = {
    "sgfi": SGFI,
    "ckd": CKD,
    "class_kd": PredictionKD,
    "box_kd": PredictionKD,
    "fitnet": FitNet,
    "gt_mask": GTMask,
    "roi_imitation": RoIImitation,
    "pkd": PKD,
    "cwd": CWD,
    "fgd": FGD,
    "logit": Logit,
}
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # a term with other settings, as a method of its own
    "gt_box": ("gt_mask", {"mask": "boxes"}),
}
_SQUARED_ERRORS = ("fitnet", "gt_mask", "roi_imitation")
DEFAULT = (NONE, "fitnet", "gt_mask", "gt_box", "roi_imitation", "pkd", "cwd", "fgd", "sgfi", "ckd", WHOLE)


def default_methods(*, head: bool) -> tuple[str, ...]:
    """The methods of a table that names none: each alone.

    Args:
        head: whether ``gdetkd`` starts from the teacher's head. Every method then has a second row that does so too:
            a head start is worth the same to all of them.
    """
    if not head:
        return DEFAULT
    doubled = [(name,) if name in (NONE, WHOLE) else (name, f"{name}+{HEAD}") for name in DEFAULT]
    return tuple(name for rows in doubled for name in rows)


def recipe_of(recipe: DistillationRecipe, method: str, *, steps: int, seed: int) -> Recipe:
    """The recipe, but with one method.

    Args:
        recipe: the pair, the data and the settings of the terms.
        method: ``none`` (plain training), ``gdetkd`` (the recipe's own block), or names of terms joined by ``+``, with
            ``head`` for head transfer. A term has the recipe's settings where it is there, else its defaults; but a
            squared error has SGFI's weight and warm-up, as the same loss on other cells. ``gt_box`` is ``gt_mask``
            with ``mask: boxes``.
        steps: optimizer steps.
        seed: of the student's weights and the order of images.

    Raises:
        RecipeError: there is no such method.
    """
    train = recipe.train.model_copy(update={"steps": steps})
    changed: dict[str, Any] = {"train": train, "seed": seed}
    if method == NONE:
        return plain_recipe(recipe, **changed)
    if method != WHOLE:
        changed["distill"] = _only(recipe.distill, method)
    return recipe.model_copy(update=changed)


def _only(block: Distill, method: str) -> Distill:
    """The block with the terms of a method alone."""
    names = method.split("+")
    unknown = [name for name in names if name not in (*TERMS, *VARIANTS, HEAD)]
    if unknown or names == [HEAD]:
        raise RecipeError(
            f"there is no method {method!r}; expected {NONE}, {WHOLE}, or terms joined by '+', of: "
            f"{', '.join((*TERMS, *VARIANTS))}, {HEAD}"
        )
    asked: dict[str, Mapping[str, Any]] = {}
    for name in dict.fromkeys(names):
        term, changes = VARIANTS.get(name, (name, {}))
        if term in asked:
            raise RecipeError(f"the method {method!r} has the term {term} twice; name {name} or the other one")
        asked[term] = changes
    terms = {}
    for name, settings in TERMS.items():
        own = getattr(block, name)
        shared = {}
        if block.sgfi and name in _SQUARED_ERRORS:
            shared = {"weight": block.sgfi.weight, "warmup_steps": block.sgfi.warmup_steps}
        # Not "auto": a term that is asked for by name is there, or the pair is refused.
        chosen = own if isinstance(own, settings) else settings(**shared)
        terms[name] = chosen.model_copy(update=asked[name]) if name in asked else None
    return block.model_copy(update={**terms, "head_transfer": HEAD in names})
