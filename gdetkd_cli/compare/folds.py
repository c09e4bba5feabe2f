"""Cross-validation in ``gdetkd compare``: each fold's recipe, and teachers that have not seen its held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from gdetkd_cli import assembly
from gdetkd_cli.compare.trials import Trial, teacher_trial_of
from gdetkd_cli.detectors import catalog
from gdetkd_cli.errors import RecipeError, RunFolderError
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import (
    CheckpointDetector,
    ComposedDetector,
    Data,
    Detector,
    FactoryDetector,
    Fold,
    FolderData,
    Recipe,
    SyntheticData,
    TorchvisionDetector,
    VocData,
)
from gdetkd_cli.structures import Detections


def folds_of(recipe: Recipe, folds: int) -> list[Fold]:
    """Folds 1 to K.

    Raises:
        RecipeError: fewer than two folds, data that cannot be divided, or a student that may have seen every image.
    """
    if folds < 2:
        raise RecipeError(f"--folds must be 2 or more, since one fold is held out and the others train; got {folds}")
    data = recipe.data
    if isinstance(data, FolderData) or any(assembly.needs_labels(data, which) for which in assembly.SPLITS):
        raise RecipeError(
            "--folds needs annotations of every image, and the teacher labels these; give the data as COCO files with "
            "`labels: annotations`, or compare without --folds"
        )
    if data.fold is not None:
        raise RecipeError("the recipe names one fold already; leave out data.fold, or compare without --folds")
    if _seen(recipe.student, data) != "nothing":
        raise RecipeError(
            f"the student starts from {assembly.format_title(recipe.student)}, which was trained on these images, the "
            "held-out ones among them; start it from other weights, or compare without --folds"
        )
    return [Fold(number=number, of=folds) for number in range(1, folds + 1)]


def with_fold(data: Data, fold: Fold | None) -> Data:
    """The data block with one fold held out; as it is for None."""
    return data if fold is None else data.model_copy(update={"fold": fold})


def fold_teachers(recipe: Recipe, folder: Path, folds: list[Fold]) -> dict[Fold, tuple[Trial, Recipe]]:
    """What to train for each fold so that its teacher has not seen the held-out images; empty: the teacher serves all.

    A teacher that is a run on the recipe's own data is trained anew, by its run's recipe, on each fold's training
    images.

    Args:
        recipe: the comparison's, with how its runs are computed decided.
        folder: of the table.
        folds: all of them.

    Raises:
        RecipeError: the teacher has seen these images, and cannot be trained anew.
        ModelError: there is no such teacher.
    """
    assert recipe.teacher is not None
    seen = _seen(recipe.teacher, recipe.data)
    if seen == "nothing":
        return {}
    own = _run_of(recipe.teacher)
    assert own is not None
    title = assembly.format_title(recipe.teacher)
    if not _is_run(recipe.teacher):
        raise RecipeError(
            f"the teacher {title} belongs to a run on these images; name the run's folder as the teacher (`teacher: "
            "{arch: checkpoint, path: RUN}`), so that it can be trained anew on each fold"
        )
    if seen == "some":
        raise RecipeError(
            f"the teacher {title} was trained on another choice of these data, held-out images among them; train it on "
            "the recipe's own data block, or compare without --folds"
        )
    if own.distill is not None or _seen(own.student, recipe.data) != "nothing":
        raise RecipeError(
            f"the teacher {title} was made with another run on these images, which folds cannot train anew as well; "
            "name one that was trained alone and from other weights, or compare without --folds"
        )
    made = {}
    for fold in folds:
        trial = teacher_trial_of(folder, own.train.steps, own.seed, fold)
        made[fold] = trial, own.model_copy(update={"data": with_fold(own.data, fold), "runtime": recipe.runtime})
    return made


def recipe_for(recipe: Recipe, fold: Fold | None, teachers: Mapping[Fold, tuple[Trial, Recipe]]) -> Recipe:
    """A trial's recipe on its fold, with the fold's own teacher where there is one."""
    changed: dict[str, object] = {"data": with_fold(recipe.data, fold)}
    if fold is not None and fold in teachers and recipe.teacher is not None:
        trial, _ = teachers[fold]
        changed["teacher"] = recipe.teacher.model_copy(update={"path": str(trial.run.path)})
    return recipe.model_copy(update=changed)


def pooled_teacher_ap(teachers: Mapping[Fold, tuple[Trial, Recipe]]) -> float | None:
    """AP in 0-100 of the folds' own teachers, the detections of all folds together; each saw none of its images.

    Raises:
        RunFolderError: the teacher of a fold is not trained.
    """
    found: dict[int, Detections] = {}
    for trial, _ in teachers.values():
        if not trial.detections.exists():
            raise RunFolderError(f"{trial.folder} has no finished teacher")
        found |= trial.read_detections()
    split = assembly.build_all_folds(next(recipe.data for _, recipe in teachers.values()))
    return evaluate_coco(split.records, split.class_names, found).ap


def _seen(spec: Detector, data: Data) -> Literal["nothing", "some", "all"]:
    """What a detector's weights have seen of the data's images, as far as a run's recipe beside them tells."""
    own = _run_of(spec)
    if own is None:
        return "nothing"
    if type(own.data) is type(data) and _sources(own.data) == _sources(data):
        return "all"
    return "some" if _files(own.data) & _files(data) else "nothing"


def _run_of(spec: Detector) -> Recipe | None:
    """The recipe of the run that a detector's weights lie in; None where they lie elsewhere, or there are none."""
    match spec:
        case CheckpointDetector():
            path = catalog.locate(spec.path)
        case ComposedDetector() | TorchvisionDetector() | FactoryDetector():
            path = Path(spec.weights or "")
    beside = path.parent / "recipe.yaml"
    return load_recipe(beside) if path.is_file() and beside.exists() else None


def _is_run(spec: Detector) -> bool:
    """Whether a detector is a run's student itself, not something exported from it or built around its weights."""
    return isinstance(spec, CheckpointDetector) and catalog.locate(spec.path).name == "student.pt"


def _sources(data: Data) -> tuple[object, ...]:
    """What decides which images the data have, and in which order."""
    match data:
        case SyntheticData():
            return data.train_images, data.val_images, data.size, data.seed, data.smallest
        case VocData():
            return tuple((data.root / path).resolve() for path in (*data.train, *data.val)), len(data.train)
        case FolderData():
            return (data.root / data.train_images).resolve(), data.val
        case _:
            return tuple((data.root / path).resolve() for path in (data.train, data.val))


def _files(data: Data) -> set[object]:
    """The annotation files of both splits, by which two data blocks can have images in common."""
    match data:
        case SyntheticData():
            return {data.seed}  # scenes of one seed are alike in every size and number
        case VocData():
            return {(data.root / path).resolve() for path in (*data.train, *data.val)}
        case FolderData():
            return set()
        case _:
            return {(data.root / path).resolve() for path in (data.train, data.val)}
