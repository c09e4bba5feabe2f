"""What a recipe must have for a command, beyond the types of its fields."""

from __future__ import annotations

from gdetkd_cli.errors import RecipeError
from gdetkd_cli.recipe.schema import ComposedDetector, DistillationRecipe, Recipe, TorchvisionDetector


def typed_recipe(recipe: Recipe) -> Recipe:
    """The same recipe as a ``DistillationRecipe`` where it has a teacher and a ``distill`` block."""
    if isinstance(recipe, DistillationRecipe) or recipe.teacher is None or recipe.distill is None:
        return recipe
    return DistillationRecipe.model_construct(recipe.model_fields_set, **dict(recipe))


def plain_recipe(recipe: Recipe, **changes: object) -> Recipe:
    """The recipe without its teacher, for supervised training of its student."""
    fields = dict(recipe) | {"teacher": None, "distill": None} | changes
    return Recipe.model_construct(recipe.model_fields_set, **fields)


def require_distillation(recipe: Recipe) -> DistillationRecipe:
    """The recipe, known to have a teacher and a ``distill`` block.

    Raises:
        RecipeError: one of them is missing.
    """
    for name in ("teacher", "distill"):
        if getattr(recipe, name) is None:
            raise RecipeError(
                f"the recipe {recipe.name!r} has no `{name}:` block; add one, or use `gdetkd train` for plain training"
            )
    typed = typed_recipe(recipe)
    assert isinstance(typed, DistillationRecipe)
    return typed


def untrained_teacher(recipe: Recipe) -> str | None:
    """Advice for a teacher with fresh weights, which would teach noise; None for a teacher with other weights."""
    spec = recipe.teacher
    if not isinstance(spec, TorchvisionDetector | ComposedDetector) or spec.weights is not None:
        return None
    return (
        f"the teacher of the recipe {recipe.name!r} has no trained weights; train it (`gdetkd train --recipe RECIPE "
        "--detector teacher --output RUN`), then name the run as the teacher (`teacher: {arch: checkpoint, path: RUN}`)"
    )


def require_trained_teacher(recipe: Recipe) -> None:
    """Raises a RecipeError if the recipe's teacher has fresh weights."""
    untrained = untrained_teacher(recipe)
    if untrained:
        raise RecipeError(untrained)


def has_task_loss(recipe: Recipe) -> bool:
    """Whether the student's own losses count."""
    return recipe.distill is None or recipe.distill.task_loss == "own"
