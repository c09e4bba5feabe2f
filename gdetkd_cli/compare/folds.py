"""Cross-validation in ``gdetkd compare``: a recipe per fold, with a teacher that has not seen the held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from gdetkd_cli import assembly
from gdetkd_cli.compare.trials import Trial, build_teacher_trial
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors import catalog
from gdetkd_cli.errors import RecipeError, RunFolderError
from gdetkd_cli.evaluation.coco_metrics import evaluate_coco
from gdetkd_cli.evaluation.predict import list_predicted
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.schema import (
    CheckpointDetector,
    ComposedDetector,
    Data,
    Detector,
    FactoryDetector,
    Fold,
    FolderData,
    KnowledgeDetector,
    Recipe,
    SyntheticData,
    TorchvisionDetector,
    TransformersDetector,
    VocData,
    YoloData,
)
from gdetkd_cli.structures import Detections


def list_folds(recipe: Recipe, folds: int) -> list[Fold]:
    """Lists the folds 1 to ``folds``.

    Raises:
        RecipeError: there are fewer than two folds, the data cannot be divided, or the student was trained on them.
    """
    if folds < 2:
        raise RecipeError(f"--folds must be 2 or more: one fold is held out, the others train; got {folds}")
    data = recipe.data
    if isinstance(data, FolderData) or any(assembly.needs_labels(data, which) for which in assembly.SPLITS):
        raise RecipeError(
            "--folds requires annotations for every image, but the teacher labels these data; provide COCO files with "
            "`labels: annotations`, or compare without --folds"
        )
    if data.fold is not None:
        raise RecipeError("the recipe already selects a fold; remove data.fold, or compare without --folds")
    if _find_overlap(recipe.student, data) != "nothing":
        raise RecipeError(
            f"the student starts from {assembly.format_title(recipe.student)}, which was trained on these images "
            "including the held-out ones; start it from other weights, or compare without --folds"
        )
    return [Fold(number=number, of=folds) for number in range(1, folds + 1)]


def select_fold(data: Data, fold: Fold | None) -> Data:
    """Returns the data block with one fold held out; None changes nothing."""
    return data if fold is None else data.model_copy(update={"fold": fold})


def plan_fold_teachers(recipe: Recipe, folder: Path, folds: list[Fold]) -> dict[Fold, tuple[Trial, Recipe]]:
    """Plans a teacher per fold that has not seen the held-out images; empty if the teacher has seen none of the data.

    If the teacher is a run on the recipe's data, each fold trains it again with the run's recipe.

    Args:
        recipe: the comparison's recipe, with resolved runtime settings.

    Raises:
        RecipeError: the teacher has seen these images and cannot be trained again.
        ModelError: the teacher does not exist.
    """
    assert recipe.teacher is not None
    seen = _find_overlap(recipe.teacher, recipe.data)
    if seen == "nothing":
        return {}
    own = _read_run_recipe(recipe.teacher)
    assert own is not None
    title = assembly.format_title(recipe.teacher)
    # The run's student itself, not an export of it or a detector built from its weights.
    if not isinstance(recipe.teacher, CheckpointDetector) or catalog.locate(recipe.teacher.path).name != "student.pt":
        raise RecipeError(
            f"the teacher {title} belongs to a run on these images; use the run folder as the teacher (`teacher: "
            "{arch: checkpoint, path: RUN}`), so that each fold can train it again"
        )
    if seen == "some":
        raise RecipeError(
            f"the teacher {title} was trained on another selection of these data, which includes held-out images; "
            "train it on the recipe's own data block, or compare without --folds"
        )
    if own.distill is not None or _find_overlap(own.student, recipe.data) != "nothing":
        raise RecipeError(
            f"the teacher {title} depends on another run on these images, which folds cannot train again; use a "
            "teacher trained without distillation and from other weights, or compare without --folds"
        )
    teachers = {}
    for fold in folds:
        trial = build_teacher_trial(folder, own.train.steps, own.seed, fold)
        data = select_fold(own.data, fold)
        teachers[fold] = trial, own.model_copy(update={"data": data, "runtime": recipe.runtime})
    return teachers


def build_fold_recipe(recipe: Recipe, fold: Fold | None, teachers: Mapping[Fold, tuple[Trial, Recipe]]) -> Recipe:
    """Returns a trial's recipe on its fold, with the fold's own teacher if it has one."""
    changed: dict[str, object] = {"data": select_fold(recipe.data, fold)}
    if fold is not None and fold in teachers and recipe.teacher is not None:
        trial, _ = teachers[fold]
        changed["teacher"] = recipe.teacher.model_copy(update={"path": str(trial.run.path)})
    return recipe.model_copy(update=changed)


def pool_teacher_ap(teachers: Mapping[Fold, tuple[Trial, Recipe]], split: Split) -> float | None:
    """Computes the AP in 0-100 of the folds' own teachers on their held-out images, pooled over folds.

    Args:
        split: the images of all folds, with the classes of the comparison.

    Raises:
        RunFolderError: the teacher of a fold is not trained.
    """
    detections: dict[int, Detections] = {}
    for trial, _ in teachers.values():
        if not trial.finished:
            raise RunFolderError(f"{trial.folder} has no finished teacher; run the same command again")
        detections |= trial.read_detections(split.class_names)
    return evaluate_coco(list_predicted(split, detections), split.class_names, detections).ap


def _find_overlap(spec: Detector, data: Data) -> Literal["nothing", "some", "all"]:
    """Returns how many of the data's images the detector was trained on, by the run recipe beside its weights."""
    own = _read_run_recipe(spec)
    if own is None:
        return "nothing"
    if type(own.data) is type(data) and _identify_images(own.data) == _identify_images(data):
        return "all"
    return "some" if _list_annotations(own.data) & _list_annotations(data) else "nothing"


def _read_run_recipe(spec: Detector) -> Recipe | None:
    """Reads the recipe of the run that contains the detector's weights; None if no run does."""
    match spec:
        case CheckpointDetector():
            path = catalog.locate(spec.path)
        case ComposedDetector() | TorchvisionDetector() | FactoryDetector():
            path = Path(spec.weights or "")
        case TransformersDetector():
            path = Path(spec.model or "", catalog.FOLDER_CONFIG)
        case KnowledgeDetector():
            return None
    beside = path.parent / "recipe.yaml"
    return load_recipe(beside) if path.is_file() and beside.exists() else None


def _identify_images(data: Data) -> tuple[object, ...]:
    """Returns the settings that determine the images and their order."""
    match data:
        case SyntheticData():
            return data.train_images, data.val_images, data.size, data.seed, data.smallest
        case VocData():
            return _list_voc(data), len(data.train)
        case FolderData():
            return (data.root / data.train_images).resolve(), data.val
        case YoloData():
            return (data.root / data.names).resolve(), data.train, data.val
        case _:
            return tuple(path and (data.root / path).resolve() for path in (data.train, data.val))


def _list_voc(data: VocData) -> tuple[Path, ...]:
    """Lists the lists of both splits."""
    return tuple((data.root / path).resolve() for path in (*data.train, *(data.val or ())))


def _list_annotations(data: Data) -> set[object]:
    """Lists the annotation files of both splits; data blocks with a common file may share images."""
    match data:
        case SyntheticData():
            return {data.seed}  # data with the same seed share scenes
        case VocData():
            return set(_list_voc(data))
        case FolderData():
            return set()
        case YoloData():
            return {(data.root / data.names).resolve()}
        case _:
            return {(data.root / path).resolve() for path in (data.train, data.val) if path is not None}
