"""Whether ``gdetkd`` starts from the teacher's head, so that a table can give the other methods the same start."""

from __future__ import annotations

from collections.abc import Sequence

from gdetkd_cli import build
from gdetkd_cli.errors import PairError
from gdetkd_cli.recipe.methods import WHOLE, recipe_of
from gdetkd_cli.recipe.scaling import epochs
from gdetkd_cli.recipe.schema import Recipe


def starts_from_teachers_head(recipe: Recipe, budgets: Sequence[int]) -> bool:
    """Builds the pair of the recipe's own method, and looks at what it does.

    Args:
        recipe: with a teacher and a distill block.
        budgets: optimizer steps; one that has head transfer is enough.

    Raises:
        GDetKDError: anything that the recipe names cannot be used.
    """
    data = recipe.data
    train = build.unlabelled_split(data, "train") if build.needs_labels(data, "train") else None
    train = train or build.build_split(data, "train")
    for steps in budgets:
        own = recipe_of(recipe, WHOLE, steps=steps, seed=recipe.seed)
        assert own.teacher is not None and own.distill is not None
        teacher = build.build_detector(own.teacher, train.class_names, own.seed, keep_classes=True)
        student = build.build_detector(own.student, train.class_names or teacher.detector.class_names, own.seed)
        try:
            pair = build.build_pair(
                own.distill,
                student.detector,
                teacher.detector,
                own.seed,
                trained_head=student.trained_head,
                epochs=epochs(own, len(train)),
            )
        except PairError:  # the run of the method itself tells it
            continue
        if pair.transferred:
            return True
    return False
