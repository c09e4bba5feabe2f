"""Adapts a recipe to another batch size, by the linear scaling rule, or to another length."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import TypeVar

from gdetkd_cli.recipe.schema import Recipe

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def scale_to_batch(recipe: AnyRecipe, processes: int) -> AnyRecipe:
    """Scales a recipe to its actual batch: ``batch_size`` times ``accumulate`` times ``processes``.

    If the recipe has a ``train.reference_batch``, the learning rate grows with the batch, and steps, warm-ups and
    evaluation intervals shrink, so that they cover the same number of images (Goyal et al., "Accurate, Large
    Minibatch SGD", 2017). The result has no ``reference_batch``.
    """
    train = recipe.train
    if train.reference_batch is None:
        return recipe
    # Exact, because 700 / 0.7 is more than 1000 in floating point, and would be rounded up.
    factor = Fraction(train.images_per_step * processes, train.reference_batch)
    optimizer = train.optimizer.model_copy(update={"lr": train.optimizer.lr * float(factor)})
    changed = {"reference_batch": None, "optimizer": optimizer}
    return shorten(recipe.model_copy(update={"train": train.model_copy(update=changed)}), factor)


def shorten(recipe: AnyRecipe, factor: float | Fraction) -> AnyRecipe:
    """Divides the steps, the warm-ups and the evaluation interval of a recipe by a factor, and rounds up."""
    train = recipe.train
    steps = {
        name: max(1, ceil(value / factor))
        for name in ("steps", "evaluate_every")
        if (value := getattr(train, name)) is not None
    }
    schedule = train.schedule.model_copy(update={"warmup_steps": ceil(train.schedule.warmup_steps / factor)})
    distill = recipe.distill
    if distill is not None:
        terms = {
            name: term.model_copy(update={"warmup_steps": ceil(term.warmup_steps / factor)})
            for name, term in distill
            if isinstance(getattr(term, "warmup_steps", None), int)
        }
        distill = distill.model_copy(update=terms)
    return recipe.model_copy(
        update={"train": train.model_copy(update={**steps, "schedule": schedule}), "distill": distill}
    )


def count_epochs(recipe: Recipe, images: int) -> float:
    """Counts the recipe's passes over the training images, on one process."""
    train = scale_to_batch(recipe, processes=1).train
    return train.steps * train.images_per_step / images


def describe_scaling(before: Recipe, after: Recipe) -> list[str]:
    """Describes the changes that scaling made, if any."""
    if before.train.reference_batch is None or before.train.steps == after.train.steps:
        return []
    lr, steps = after.train.optimizer.lr, after.train.steps
    return [f"scaled from a batch of {before.train.reference_batch}: learning rate {lr:.4g}, {steps} steps"]
