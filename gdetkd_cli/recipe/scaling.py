"""The linear scaling rule: what a recipe made for one batch becomes for another."""

from __future__ import annotations

from math import ceil
from typing import TypeVar

from gdetkd_cli.recipe.schema import Recipe

AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def scaled_to_batch(recipe: AnyRecipe, processes: int) -> AnyRecipe:
    """The recipe for the batch that it will have, ``train.batch_size`` times the processes.

    Where it names a ``train.reference_batch``, its learning rate grows with the batch and its steps shrink, so that as
    many images are seen (Goyal et al., "Accurate, Large Minibatch SGD", 2017); warm-ups and evaluations come after as
    many images as before. The result has no ``reference_batch``.
    """
    train = recipe.train
    if train.reference_batch is None:
        return recipe
    factor = train.batch_size * processes / train.reference_batch
    steps = {
        name: max(1, ceil(value / factor))
        for name in ("steps", "evaluate_every")
        if (value := getattr(train, name)) is not None
    }
    changed = train.model_copy(
        update={
            **steps,
            "reference_batch": None,
            "optimizer": train.optimizer.model_copy(update={"lr": train.optimizer.lr * factor}),
            "schedule": train.schedule.model_copy(update={"warmup_steps": ceil(train.schedule.warmup_steps / factor)}),
        }
    )
    distill = recipe.distill
    if distill is not None:
        terms = {
            name: term.model_copy(update={"warmup_steps": ceil(term.warmup_steps / factor)})
            for name, term in distill
            if isinstance(getattr(term, "warmup_steps", None), int)
        }
        distill = distill.model_copy(update=terms)
    return recipe.model_copy(update={"train": changed, "distill": distill})


def epochs(recipe: Recipe, images: int, processes: int = 1) -> float:
    """Passes over the training images that the recipe makes."""
    train = scaled_to_batch(recipe, processes).train
    return train.steps * train.batch_size * processes / images


def changes(before: Recipe, after: Recipe) -> list[str]:
    """What the rule changed, for people; nothing where it had nothing to do."""
    if before.train.reference_batch is None or before.train.steps == after.train.steps:
        return []
    lr, steps = after.train.optimizer.lr, after.train.steps
    return [f"scaled from a batch of {before.train.reference_batch}: learning rate {lr:.4g}, {steps} steps"]
