"""What a run is made of: data, student, teacher and the pair of them, built and checked before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from gdetkd_cli import build
from gdetkd_cli.build.labels import Tables, label_split, told, write_labels
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.detectors.trainable import TrainableDetector
from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.errors import PairError, RecipeError
from gdetkd_cli.recipe.schema import CocoData, ComposedDetector, Data, FolderData, Recipe, TorchvisionDetector
from gdetkd_cli.training.device import ComputeSettings
from gdetkd_cli.training.events import Note, Observer, silent


@dataclass(frozen=True)
class Job:
    """Everything a run is made of, before it starts.

    Attributes:
        student: the detector that is trained, and the description that rebuilds it.
        pair: what was decided about distillation; None for plain training.
        train, val: the splits, in the student's classes.
        pictures: in each split, those included that the teacher was not asked to label for a mere look.
        labels: what the teacher said of pictures without annotations, by split, as COCO's tables.
        notes: what there was to say.
    """

    recipe: Recipe
    settings: ComputeSettings
    student: build.BuiltDetector
    distiller: Distiller
    pair: build.BuiltPair | None
    train: Split
    val: Split
    pictures: dict[build.Which, int]
    labels: dict[build.Which, Tables]
    notes: tuple[str, ...]


def prepare(
    recipe: Recipe,
    settings: ComputeSettings,
    accelerator: Accelerator,
    *,
    labels: Path | None = None,
    most_labelled: int | None = None,
    observer: Observer = silent,
) -> Job:
    """Builds everything a run needs on this process's device; nothing is written.

    Args:
        recipe: what to build.
        settings: how it will run.
        accelerator: device and processes.
        labels: folder with the teacher's labels of an earlier start of the run.
        most_labelled: pictures of a split that the teacher labels at most, where it has to; None: all.
        observer: is told of what takes long.

    Raises:
        GDetKDError: anything the recipe names that cannot be used.
    """
    device = accelerator.device
    splits, unlabelled = _read(recipe, labels)
    teacher = None
    if recipe.distill is not None and recipe.teacher is not None:
        names = (splits.get("train") or unlabelled["train"]).class_names
        teacher = build.build_detector(recipe.teacher, names, recipe.seed, keep_classes=True)
        teacher.detector.module.to(device)  # it is measured where it will run
    labelled = {}
    for which, split in unlabelled.items():
        assert teacher is not None and isinstance(recipe.data, CocoData | FolderData)
        labelled[which] = label_split(
            split,
            recipe.data,
            teacher.detector,
            device=device,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            most=most_labelled,
            observer=observer,
        )
        splits[which] = labelled[which].split
    student = build.build_detector(recipe.student, splits["train"].class_names, recipe.seed)
    if features_only(student.detector) and has_task_loss(recipe):
        raise PairError(
            f"{build.title_of(recipe.student)} takes images and no targets, so it has no losses of its own; with a "
            "teacher, `distill.task_loss: none` trains its features"
        )
    student.detector.module.to(device)
    train, val = (build.relabel(splits[which], student.detector) for which in build.SPLITS)
    notes = [untrained] if (untrained := untrained_teacher(recipe)) else []
    notes += [f"{split.name}: {note}" for split in (train, val) for note in split.notes]
    notes += [told(one) for one in labelled.values()]
    notes += [f"student: {note}" for note in student.notes]
    pictures: dict[build.Which, int] = {"train": len(train), "val": len(val)}
    pictures |= {which: one.pictures for which, one in labelled.items()}
    pair = None
    if recipe.distill is not None and teacher is not None:
        notes += [f"teacher: {note}" for note in teacher.notes]
        pair = build.build_pair(
            recipe.distill,
            student.detector,
            teacher.detector,
            recipe.seed,
            trained_head=student.trained_head,
            device=device.type,
            steps=recipe.train.steps,
        )
    distiller = pair.distiller if pair else Distiller(student=student.detector)
    build.apply_runtime(settings, recipe, student.detector, pair, device)
    return Job(
        recipe=recipe,
        settings=settings,
        student=student,
        distiller=distiller,
        pair=pair,
        train=train,
        val=val,
        pictures=pictures,
        labels={which: one.tables for which, one in labelled.items()},
        notes=tuple(notes),
    )


def with_labels(recipe: Recipe, folder: Path, device: str, observer: Observer) -> Data:
    """The recipe's data with annotations for every picture: what its teacher has to label is labelled now, once.

    Args:
        recipe: with a teacher.
        folder: where the labels are kept, as COCO files; those that are there already are taken.
        device: where the teacher runs.
        observer: is told of it.

    Raises:
        GDetKDError: the teacher cannot label the pictures.
    """
    data = recipe.data
    wanted: list[build.Which] = [which for which in build.SPLITS if build.needs_labels(data, which)]
    if not wanted:
        return data
    assert isinstance(data, CocoData | FolderData) and recipe.teacher is not None
    if not all((folder / f"{which}.json").exists() for which in wanted):
        splits = {which: build.unlabelled_split(data, which) for which in wanted}
        teacher = build.build_detector(recipe.teacher, splits["train"].class_names, recipe.seed, keep_classes=True)
        teacher.detector.module.to(device)
        made = {
            which: label_split(split, data, teacher.detector, device=torch.device(device), observer=observer)
            for which, split in splits.items()
        }
        for one in made.values():
            observer(Note(told(one)))
        folder.mkdir(parents=True, exist_ok=True)
        write_labels(folder, {which: one.tables for which, one in made.items()})
    own = {"train": folder.resolve() / "train.json", "train_images": data.train_images}
    if "val" in wanted:
        own |= {"val": folder.resolve() / "val.json", "val_images": data.train_images}
    else:
        assert data.val is not None
        own |= {"val": data.val, "val_images": data.val_images}
    return CocoData(format="coco", root=data.root, classes=data.classes, labels="annotations", **own)


def has_task_loss(recipe: Recipe) -> bool:
    """Whether the student's own losses count."""
    return recipe.distill is None or recipe.distill.task_loss == "own"


def features_only(detector: Detector) -> bool:
    """Whether a student has neither losses nor detections that are known."""
    return isinstance(detector, TrainableDetector) and detector.features_only


def check_distills(recipe: Recipe) -> None:
    """Raises a RecipeError where the recipe has no teacher or no ``distill`` block."""
    for name in ("teacher", "distill"):
        if getattr(recipe, name) is None:
            raise RecipeError(
                f"the recipe {recipe.name!r} has no `{name}:` block; add one, or use `gdetkd train` for plain training"
            )


def untrained_teacher(recipe: Recipe) -> str | None:
    """What to do about a teacher that has fresh weights, which teaches noise; None where it has others."""
    spec = recipe.teacher
    if not isinstance(spec, TorchvisionDetector | ComposedDetector) or spec.weights is not None:
        return None
    return (
        f"the teacher of the recipe {recipe.name!r} has no trained weights; train it (`gdetkd train --recipe RECIPE "
        "--detector teacher --output RUN`), then name the run as the teacher (`teacher: {arch: checkpoint, path: RUN}`)"
    )


def check_taught(recipe: Recipe) -> None:
    """Raises a RecipeError where the recipe's teacher has fresh weights."""
    untrained = untrained_teacher(recipe)
    if untrained:
        raise RecipeError(untrained)


def accelerator_for(settings: ComputeSettings, recipe: Recipe) -> Accelerator:
    """accelerate's view of the run: device, precision, processes."""
    # Without its own losses, parts of the student get no gradient, and DDP would wait for them.
    partly = DistributedDataParallelKwargs(find_unused_parameters=not has_task_loss(recipe))
    return Accelerator(
        kwargs_handlers=[partly],
        cpu=settings.device == "cpu",
        mixed_precision="no" if settings.precision == "fp32" else settings.precision,
        log_with="tensorboard",
        project_dir=".",  # a tracker must be given one here; the run's own is set when its folder is known
    )


def _read(recipe: Recipe, labels: Path | None) -> tuple[dict[build.Which, Split], dict[build.Which, Split]]:
    """The splits whose truth is known, and those that the teacher has to label first."""
    known: dict[build.Which, Split] = {}
    unlabelled: dict[build.Which, Split] = {}
    for which in build.SPLITS:
        kept = labels if labels is not None and (labels / f"{which}.json").exists() else None
        if recipe.distill is not None and kept is None and build.needs_labels(recipe.data, which):
            unlabelled[which] = build.unlabelled_split(recipe.data, which)
        else:
            outlines = which == "train" and recipe.augment.copy_paste > 0
            known[which] = build.build_split(recipe.data, which, kept, outlines=outlines)
    return known, unlabelled
