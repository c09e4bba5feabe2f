"""Whether ``gdetkd`` starts from the teacher's head, so that a table can give the other methods the same start."""

from __future__ import annotations

from gdetkd_cli import build
from gdetkd_cli.errors import PairError
from gdetkd_cli.recipe.schema import Recipe


def starts_from_teachers_head(recipe: Recipe) -> bool:
    """Builds the recipe's pair and returns whether the teacher's head was copied.

    Args:
        recipe: with a teacher and a distill block.

    Raises:
        GDetKDError: anything that the recipe names cannot be used.
    """
    data = recipe.data
    train = build.unlabelled_split(data, "train") if build.needs_labels(data, "train") else None
    train = train or build.build_split(data, "train")
    assert recipe.teacher is not None and recipe.distill is not None
    teacher = build.build_detector(recipe.teacher, train.class_names, recipe.seed, keep_classes=True)
    student = build.build_detector(recipe.student, train.class_names or teacher.detector.class_names, recipe.seed)
    try:
        pair = build.build_pair(
            recipe.distill, student.detector, teacher.detector, recipe.seed, trained_head=student.trained_head
        )
    except PairError:  # the method's own run reports it
        return False
    return pair.transferred
