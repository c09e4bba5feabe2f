"""Checks of a recipe that depend on the command."""

from __future__ import annotations

from gdetkd_cli.errors import RecipeError
from gdetkd_cli.recipe.schema import (
    CheckpointDetector,
    Detector,
    DistillationRecipe,
    FactoryDetector,
    KnowledgeDetector,
    Recipe,
    TransformersDetector,
)


def narrow_recipe(recipe: Recipe) -> Recipe:
    """Returns the recipe as a ``DistillationRecipe`` if it has a teacher and a ``distill`` block."""
    if isinstance(recipe, DistillationRecipe) or recipe.teacher is None or recipe.distill is None:
        return recipe
    return DistillationRecipe.model_construct(recipe.model_fields_set, **dict(recipe))


def remove_teacher(recipe: Recipe, **changes: object) -> Recipe:
    """Returns the recipe for supervised training of its student, with ``changes`` to its fields."""
    fields = dict(recipe) | {"teacher": None, "distill": None} | changes
    return Recipe.model_construct(recipe.model_fields_set, **fields)


def require_distillation(recipe: Recipe) -> DistillationRecipe:
    """Returns the recipe as a ``DistillationRecipe``.

    Raises:
        RecipeError: it has no teacher or no ``distill`` block.
    """
    for name in ("teacher", "distill"):
        if getattr(recipe, name) is None:
            raise RecipeError(
                f"the recipe {recipe.name!r} has no `{name}:` block; add one, or use `gdetkd train` for plain training"
            )
    typed = narrow_recipe(recipe)
    assert isinstance(typed, DistillationRecipe)
    return typed


def has_weights(spec: Detector) -> bool:
    """Whether the recipe gives a detector trained weights."""
    match spec:
        case CheckpointDetector() | KnowledgeDetector():
            return True
        case TransformersDetector():
            return spec.model is not None
        case _:
            return spec.weights is not None


def describe_untrained_teacher(recipe: Recipe) -> str | None:
    """Returns advice if the teacher has fresh weights, else None."""
    spec = recipe.teacher
    if spec is None or isinstance(spec, FactoryDetector) or has_weights(spec):  # a factory may load its own weights
        return None
    return (
        f"the teacher of the recipe {recipe.name!r} has no trained weights; train it with `gdetkd train --recipe "
        "RECIPE --detector teacher --output RUN`, then use the run as the teacher: "
        "`teacher: {arch: checkpoint, path: RUN}`"
    )


def require_trained_teacher(recipe: Recipe) -> None:
    """Raises a RecipeError if the recipe's teacher has fresh weights."""
    advice = describe_untrained_teacher(recipe)
    if advice:
        raise RecipeError(advice)


def has_task_loss(recipe: Recipe) -> bool:
    """Whether training uses the student's own losses."""
    return recipe.distill is None or recipe.distill.task_loss == "own"
