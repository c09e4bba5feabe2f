"""Everything a training run consists of, built and checked once, before the first step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gdetkd_cli.assembly.data import (
    SPLITS,
    Which,
    build_batches,
    build_split,
    needs_labels,
    relabel,
    unlabelled_split,
)
from gdetkd_cli.assembly.detector import BuiltDetector, build_detector, title_of
from gdetkd_cli.assembly.distillation import BuiltPair, build_pair
from gdetkd_cli.assembly.labels import Labelled, Tables, describe_labels, label_split
from gdetkd_cli.assembly.runtime import apply_runtime, resolve_runtime
from gdetkd_cli.data.split import Split
from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.engine.events import Observer, silent
from gdetkd_cli.engine.schedule import build_optimizer, build_schedule
from gdetkd_cli.errors import PairError
from gdetkd_cli.recipe.checks import describe_untrained_teacher, has_task_loss, narrow_recipe
from gdetkd_cli.recipe.scaling import describe_scaling, scale_to_batch
from gdetkd_cli.recipe.schema import CocoData, DistillationRecipe, FolderData, Recipe
from gdetkd_cli.structures import Batch


@dataclass(frozen=True)
class Compute:
    """Where and how a run computes."""

    settings: ComputeSettings
    accelerator: Accelerator


@dataclass(frozen=True)
class Pair:
    """Both detectors of a recipe, and the distiller built from them."""

    student: BuiltDetector
    teacher: BuiltDetector
    built: BuiltPair


@dataclass(frozen=True)
class TrainingSetup:
    """Everything a run consists of, on its device.

    Attributes:
        recipe: scaled to the batch and the number of processes.
        student: the detector that is trained, and the description that rebuilds it.
        pair: the decisions about distillation; None for plain training.
        train, val: the splits, in the student's classes.
        image_counts: images of each split, including those that a dry run does not have labelled.
        labels: by split, the teacher's labels of images without annotations, as COCO tables.
        optimizer, schedule: over the student's and the terms' trainable parameters.
        batches: start step -> this process's training batches from there to the end of the run.
        notes: remarks for the user.
    """

    recipe: Recipe
    compute: Compute
    student: BuiltDetector
    distiller: Distiller
    pair: BuiltPair | None
    train: Split
    val: Split
    image_counts: dict[Which, int]
    labels: dict[Which, Tables]
    optimizer: Optimizer
    schedule: LambdaLR
    batches: Callable[[int], Iterator[Batch]]
    notes: tuple[str, ...]


def start_compute(recipe: Recipe) -> tuple[Compute, Recipe]:
    """Decides device, precision and threads, joins the other processes, and scales the recipe to their number.

    Raises:
        ModelError: the recipe asks for a device or a precision that this machine lacks.
    """
    settings = resolve_runtime(recipe.runtime)
    torch.set_num_threads(settings.threads)
    accelerator = build_accelerator(settings, recipe)
    return Compute(settings, accelerator), scale_to_batch(recipe, accelerator.num_processes)


def build_accelerator(settings: ComputeSettings, recipe: Recipe) -> Accelerator:
    """accelerate's view of the run: device, precision, processes."""
    # Without its own losses, parts of the student get no gradient, and DDP would wait for them.
    partly = DistributedDataParallelKwargs(find_unused_parameters=not has_task_loss(recipe))
    return Accelerator(
        kwargs_handlers=[partly],
        cpu=settings.device == "cpu",
        mixed_precision="no" if settings.precision == "fp32" else settings.precision,
        log_with="tensorboard",
        project_dir=".",  # required by the tracker; the loop sets the run's own folder
    )


def build_setup(
    recipe: Recipe,
    compute: Compute,
    *,
    given: Recipe | None = None,
    labels: Path | None = None,
    most_labelled: int | None = None,
    observer: Observer = silent,
) -> TrainingSetup:
    """Builds everything a run needs on this process's device. Writes nothing.

    Args:
        recipe: as ``start_compute`` returned it.
        compute: device and processes.
        given: the recipe before it was scaled, for a note of what changed.
        labels: folder with the teacher's labels of an earlier start of the run.
        most_labelled: images of a split that the teacher labels at most; None: all.
        observer: receives progress of the slow parts.

    Raises:
        GDetKDError: anything the recipe names that cannot be used.
    """
    recipe = narrow_recipe(recipe)
    accelerator = compute.accelerator
    device = accelerator.device
    splits, unlabelled = _read_splits(recipe, labels)
    teacher = None
    labelled: dict[Which, Labelled] = {}
    if isinstance(recipe, DistillationRecipe):
        names = (splits.get("train") or unlabelled["train"]).class_names
        teacher = build_detector(recipe.teacher, names, recipe.seed, keep_classes=True)
        teacher.detector.module.to(device)  # measured on the device that it will run on
        for which, split in unlabelled.items():
            assert isinstance(recipe.data, CocoData | FolderData)
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
    student = build_detector(recipe.student, splits["train"].class_names, recipe.seed)
    _check_student(recipe, student)
    student.detector.module.to(device)
    train, val = (relabel(splits[which], student.detector) for which in SPLITS)
    pair = None
    if isinstance(recipe, DistillationRecipe) and teacher is not None:
        pair = build_pair(
            recipe.distill,
            student.detector,
            teacher.detector,
            recipe.seed,
            trained_head=student.trained_head,
            device=device.type,
            steps=recipe.train.steps,
        )
    distiller = pair.distiller if pair else Distiller(student=student.detector)
    apply_runtime(compute.settings, recipe, student.detector, pair, device)
    optimizer, schedule = _build_optimizer(recipe, distiller)
    notes = describe_scaling(given or recipe, recipe)
    notes += [untrained] if (untrained := describe_untrained_teacher(recipe)) else []
    notes += [f"{split.name}: {note}" for split in (train, val) for note in split.notes]
    notes += [describe_labels(one) for one in labelled.values()]
    notes += [f"student: {note}" for note in student.notes]
    notes += [f"teacher: {note}" for note in teacher.notes] if teacher else []
    counts: dict[Which, int] = {"train": len(train), "val": len(val)}
    return TrainingSetup(
        recipe=recipe,
        compute=compute,
        student=student,
        distiller=distiller,
        pair=pair,
        train=train,
        val=val,
        image_counts=counts | {which: one.images for which, one in labelled.items()},
        labels={which: one.tables for which, one in labelled.items()},
        optimizer=optimizer,
        schedule=schedule,
        batches=build_batches(
            recipe, train, compute.settings, rank=accelerator.process_index, world_size=accelerator.num_processes
        ),
        notes=tuple(notes),
    )


def build_recipe_pair(recipe: DistillationRecipe, class_names: tuple[str, ...]) -> Pair:
    """Both detectors of a recipe and their distiller, on the CPU, without a run.

    Args:
        recipe: the pair and its terms.
        class_names: of the training data; empty: the teacher's.

    Raises:
        GDetKDError: a detector cannot be built, or a term does not fit the pair.
    """
    teacher = build_detector(recipe.teacher, class_names, recipe.seed, keep_classes=True)
    student = build_detector(recipe.student, class_names or teacher.detector.class_names, recipe.seed)
    built = build_pair(
        recipe.distill, student.detector, teacher.detector, recipe.seed, trained_head=student.trained_head
    )
    return Pair(student, teacher, built)


def _check_student(recipe: Recipe, student: BuiltDetector) -> None:
    if student.detector.features_only and has_task_loss(recipe):
        raise PairError(
            f"{title_of(recipe.student)} takes images and no targets, so it has no losses of its own; with a "
            "teacher, `distill.task_loss: none` trains its features"
        )


def _build_optimizer(recipe: Recipe, distiller: Distiller) -> tuple[Optimizer, LambdaLR]:
    options, plan = recipe.train.optimizer, recipe.train.schedule
    optimizer = build_optimizer(
        name=options.name,
        modules=[distiller],
        lr=options.lr,
        weight_decay=options.weight_decay,
        momentum=options.momentum,
    )
    schedule = build_schedule(
        optimizer,
        name=plan.name,
        steps=recipe.train.steps,
        warmup_steps=plan.warmup_steps,
        milestones=plan.milestones,
        gamma=plan.gamma,
    )
    return optimizer, schedule


def _read_splits(recipe: Recipe, labels: Path | None) -> tuple[dict[Which, Split], dict[Which, Split]]:
    """The splits with annotations, and those that the teacher has to label first."""
    annotated: dict[Which, Split] = {}
    unlabelled: dict[Which, Split] = {}
    for which in SPLITS:
        kept = labels if labels is not None and (labels / f"{which}.json").exists() else None
        if isinstance(recipe, DistillationRecipe) and kept is None and needs_labels(recipe.data, which):
            unlabelled[which] = unlabelled_split(recipe.data, which)
        else:
            outlines = which == "train" and recipe.augment.copy_paste > 0
            annotated[which] = build_split(recipe.data, which, kept, outlines=outlines)
    return annotated, unlabelled
