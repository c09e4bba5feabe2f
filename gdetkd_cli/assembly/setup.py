"""Builds and checks every object of a training run before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from gdetkd_cli.assembly.data import (
    SPLITS,
    Unlabelled,
    Which,
    build_batches,
    build_split,
    needs_labels,
    read_unlabelled_split,
    report_bad_images,
)
from gdetkd_cli.assembly.detector import BuiltDetector, build_detector, format_title
from gdetkd_cli.assembly.distillation import BuiltPair, build_pair
from gdetkd_cli.assembly.knowledge import remember_teacher
from gdetkd_cli.assembly.labels import LabelledSplit, describe_labels, label_split
from gdetkd_cli.assembly.runtime import apply_runtime, resolve_runtime
from gdetkd_cli.assembly.sharing import read_once
from gdetkd_cli.assembly.trackers import check_trackers
from gdetkd_cli.assembly.warnings import warn_about_data, warn_about_normalization, warn_about_sizes
from gdetkd_cli.data.readers.coco import Tables, align_classes
from gdetkd_cli.data.split import Split
from gdetkd_cli.distill.distiller import Distiller
from gdetkd_cli.engine.device import ComputeSettings
from gdetkd_cli.engine.events import Note, Observer, silent
from gdetkd_cli.engine.processes import join_processes
from gdetkd_cli.engine.schedule import build_optimizer, build_schedule
from gdetkd_cli.errors import PairError
from gdetkd_cli.knowledge.teacher import RememberedTeacher
from gdetkd_cli.recipe.checks import describe_untrained_teacher, has_task_loss, narrow_recipe
from gdetkd_cli.recipe.scaling import describe_scaling, scale_to_batch
from gdetkd_cli.recipe.schema import DistillationRecipe, Recipe
from gdetkd_cli.structures import Batch


@dataclass(frozen=True)
class Compute:
    """The compute settings of a run and its accelerator."""

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
    """The objects of a training run, on its device.

    Attributes:
        recipe: the recipe, scaled to the batch and the number of processes.
        student: the detector to train, and the description that rebuilds it.
        pair: the decisions about distillation; None for plain training.
        train, val: the splits, with labels in the student's classes.
        image_counts: images per split, including those that a dry run leaves unlabelled.
        labels: the teacher's labels of images without annotations, as COCO tables by split.
        optimizer, schedule: for the trainable parameters of the student and the terms.
        batches: function from a start step to this process's training batches from there to the end of the run.
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
    """Chooses device, precision and threads, joins the other processes, and scales the recipe to their number.

    Raises:
        ModelError: the recipe requires a device or a precision that this machine lacks.
        RecipeError: a tracker is not installed.
    """
    settings = resolve_runtime(recipe.runtime)
    torch.set_num_threads(settings.threads)
    join_processes(settings.device)
    accelerator = build_accelerator(settings, recipe)
    return Compute(settings, accelerator), scale_to_batch(recipe, accelerator.num_processes)


def adopt_runtime(compute: Compute, recipe: Recipe) -> Compute:
    """Applies another recipe's threads and workers to what was started."""
    settings = resolve_runtime(recipe.runtime)
    torch.set_num_threads(settings.threads)
    return Compute(settings, compute.accelerator)


def build_accelerator(settings: ComputeSettings, recipe: Recipe) -> Accelerator:
    """Builds the accelerator with the run's device, precision, processes and trackers.

    Raises:
        RecipeError: a tracker is not installed.
    """
    check_trackers(recipe)
    # Without a task loss, parts of the student get no gradient, and DDP would wait for them.
    ddp = DistributedDataParallelKwargs(find_unused_parameters=not has_task_loss(recipe))
    return Accelerator(
        kwargs_handlers=[ddp],
        cpu=settings.device == "cpu",
        mixed_precision="no" if settings.precision == "fp32" else settings.precision,
        log_with=list(recipe.runtime.trackers) or None,
        project_dir=".",  # required by some trackers; the run sets its own folder
    )


def build_setup(
    recipe: Recipe,
    compute: Compute,
    *,
    unscaled: Recipe,
    labels: Path | None = None,
    most_labelled: int | None = None,
    knowledge: Path | None = None,
    observer: Observer = silent,
) -> TrainingSetup:
    """Builds everything a run needs on this process's device. Writes nothing.

    Args:
        recipe: the scaled recipe from ``start_compute``.
        unscaled: the recipe before scaling, for a note about the changes.
        labels: the run's folder of teacher labels; existing labels are reused.
        most_labelled: maximum number of images per split that the teacher labels; None: all.
        knowledge: the run's folder for the teacher's features; None: they are written nowhere.

    Raises:
        GDetKDError: something that the recipe names cannot be used.
    """
    recipe = narrow_recipe(recipe)
    device = compute.accelerator.device
    rank = {"rank": compute.accelerator.process_index, "world_size": compute.accelerator.num_processes}
    splits, unlabelled = read_once(partial(_read_splits, recipe, labels), compute.accelerator)
    teacher = None
    labelled: dict[Which, LabelledSplit] = {}
    if isinstance(recipe, DistillationRecipe):
        names = (splits.get("train") or unlabelled["train"]).class_names
        teacher = build_detector(recipe.teacher, names, recipe.seed, keep_classes=True)
        teacher.detector.module.to(device)  # so that its levels are measured on the run's device
        for which, split in unlabelled.items():  # on all processes together
            assert isinstance(recipe.data, Unlabelled)
            labelled[which] = label_split(
                split, recipe.data, teacher.detector, device=device, most=most_labelled, observer=observer, **rank
            )
        splits |= {which: one.split for which, one in labelled.items()}
    student = _build_student(recipe, splits["train"].class_names, compute.accelerator)
    train, val = (align_classes(splits[which], student.detector.class_names) for which in SPLITS)
    report_bad_images((train, val), observer)
    pair = None
    if isinstance(recipe, DistillationRecipe) and teacher is not None:
        teacher = remember_teacher(
            recipe,
            teacher,
            student.detector,
            train,
            folder=knowledge,
            processes=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            tell=lambda text: observer(Note(text)),
        )
        pair = _build_pair(recipe, student, teacher, device.type)
    distiller = pair.distiller if pair else Distiller(student=student.detector)
    apply_runtime(compute.settings, recipe, student.detector, pair, device)
    optimizer, schedule = _build_optimizer(recipe, distiller)
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
            recipe,
            train,
            compute.settings,
            views=teacher is not None and isinstance(teacher.detector, RememberedTeacher),
            **rank,
        ),
        notes=_collect_notes(unscaled, recipe, (train, val), labelled.values(), student, teacher),
    )


def _collect_notes(
    unscaled: Recipe,
    recipe: Recipe,
    splits: tuple[Split, Split],
    labelled: Iterable[LabelledSplit],
    student: BuiltDetector,
    teacher: BuiltDetector | None,
) -> tuple[str, ...]:
    return (
        *describe_scaling(unscaled, recipe),
        *([advice] if (advice := describe_untrained_teacher(recipe)) else []),
        *(f"{split.name}: {note}" for split in splits for note in split.notes),
        *warn_about_data(*splits),
        *(describe_labels(one) for one in labelled),
        *(f"student: {note}" for note in student.notes),
        *warn_about_normalization(student.detector),
        *(f"teacher: {note}" for note in (teacher.notes if teacher else ())),
        *(warn_about_sizes(student.detector, teacher.detector) if teacher else ()),
    )


def build_recipe_pair(
    recipe: DistillationRecipe, class_names: tuple[str, ...], teacher: BuiltDetector | None = None
) -> Pair:
    """Builds both detectors of a recipe and their distiller on the CPU.

    Args:
        class_names: class names of the training data; empty: the teacher's.
        teacher: the recipe's, if it is built already.

    Raises:
        GDetKDError: a detector cannot be built, or a term does not fit the pair.
    """
    teacher = teacher or build_detector(recipe.teacher, class_names, recipe.seed, keep_classes=True)
    student = build_detector(recipe.student, class_names or teacher.detector.class_names, recipe.seed)
    return Pair(student, teacher, _build_pair(recipe, student, teacher, device="cpu"))


def _build_pair(recipe: DistillationRecipe, student: BuiltDetector, teacher: BuiltDetector, device: str) -> BuiltPair:
    return build_pair(
        recipe.distill,
        student.detector,
        teacher.detector,
        recipe.seed,
        trained_head=student.trained_head,
        device=device,
        steps=recipe.train.steps,
    )


def _build_student(recipe: Recipe, class_names: tuple[str, ...], accelerator: Accelerator) -> BuiltDetector:
    student = build_detector(recipe.student, class_names, recipe.seed)
    if student.detector.features_only and has_task_loss(recipe):
        raise PairError(
            f"{format_title(recipe.student)} accepts no targets, so it has no losses of its own; to train its features "
            "with a teacher, set distill.task_loss to none"
        )
    if student.detector.features_only and recipe.train.stop_after is not None:
        raise PairError(
            f"{format_title(recipe.student)} has no known detections, so it is never evaluated; set train.stop_after "
            "to null"
        )
    student.detector.module.to(accelerator.device)
    if student.detector.skips_parameters:
        assert accelerator.ddp_handler is not None
        accelerator.ddp_handler.find_unused_parameters = True
    return student


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
    """Reads the splits with annotations, and those that the teacher has to label."""
    annotated: dict[Which, Split] = {}
    unlabelled: dict[Which, Split] = {}
    for which in SPLITS:
        kept = labels if labels is not None and (labels / f"{which}.json").exists() else None
        if isinstance(recipe, DistillationRecipe) and kept is None and needs_labels(recipe.data, which):
            unlabelled[which] = read_unlabelled_split(recipe.data, which)
        else:
            outlines = which == "train" and recipe.augment.copy_paste > 0
            annotated[which] = build_split(recipe.data, which, kept, outlines=outlines)
    return annotated, unlabelled
