"""The methods of ``gdetkd compare`` and their recipes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from gdetkd_cli.errors import RecipeError
from gdetkd_cli.recipe.checks import remove_teacher
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
VARIANTS: Mapping[str, tuple[str, Mapping[str, Any]]] = {  # method name: a term and the settings that differ
    "gt_box": ("gt_mask", {"mask": "boxes"}),
}
_SQUARED_ERRORS = ("fitnet", "gt_mask", "roi_imitation")
DEFAULT = (NONE, "fitnet", "gt_mask", "gt_box", "roi_imitation", "pkd", "cwd", "fgd", "sgfi", "ckd", WHOLE)


def list_default_methods(*, head: bool) -> tuple[str, ...]:
    """Lists the methods that ``compare`` runs by default.

    Args:
        head: whether ``gdetkd`` copies the teacher's head. If so, each method also has a row with the copied head,
            so that the comparison is fair.
    """
    if not head:
        return DEFAULT
    doubled = [(name,) if name in (NONE, WHOLE) else (name, f"{name}+{HEAD}") for name in DEFAULT]
    return tuple(name for rows in doubled for name in rows)


def select_method(recipe: DistillationRecipe, method: str, *, steps: int, seed: int) -> Recipe:
    """Returns the recipe with a single method.

    Args:
        recipe: the pair, the data and the settings of the terms.
        method: ``none`` (plain training), ``gdetkd`` (the recipe's own block), or names of terms joined by ``+``, with
            ``head`` for head transfer. A term in the recipe keeps its settings; another term has its defaults, except
            that squared errors take SGFI's weight and warm-up, because they are the same loss on other cells.
            ``gt_box`` is ``gt_mask`` with ``mask: boxes``.
        steps: optimizer steps.
        seed: seed of the student's weights and the image order.

    Raises:
        RecipeError: the method is unknown.
    """
    train = recipe.train.model_copy(update={"steps": steps})
    changed: dict[str, Any] = {"train": train, "seed": seed}
    if method == NONE:
        return remove_teacher(recipe, **changed)
    if method != WHOLE:
        changed["distill"] = _select_terms(recipe.distill, method)
    return recipe.model_copy(update=changed)


def _select_terms(block: Distill, method: str) -> Distill:
    """Returns the block with only the terms of a method."""
    names = method.split("+")
    unknown = [name for name in names if name not in (*TERMS, *VARIANTS, HEAD)]
    if unknown or names == [HEAD]:
        raise RecipeError(
            f"unknown method {method!r}; expected {NONE}, {WHOLE}, or terms joined by '+' from: "
            f"{', '.join((*TERMS, *VARIANTS))}, {HEAD}"
        )
    selected: dict[str, Mapping[str, Any]] = {}
    for name in dict.fromkeys(names):
        term, changes = VARIANTS.get(name, (name, {}))
        if term in selected:
            raise RecipeError(f"the method {method!r} has the term {term} twice; remove {name} or the other one")
        selected[term] = changes
    terms = {}
    for name, settings in TERMS.items():
        own = getattr(block, name)
        shared = {}
        if block.sgfi and name in _SQUARED_ERRORS:
            shared = {"weight": block.sgfi.weight, "warmup_steps": block.sgfi.warmup_steps}
        # Not "auto": a named term that does not fit the pair must raise an error.
        chosen = own if isinstance(own, settings) else settings(**shared)
        terms[name] = chosen.model_copy(update=selected[name]) if name in selected else None
    return block.model_copy(update={**terms, "head_transfer": HEAD in names})
