"""Puts a store before a frozen teacher, if the recipe asks for one and the teacher sees few views of each image."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock
from torch import Tensor

from gdetkd_cli.assembly.detector import BuiltDetector
from gdetkd_cli.assembly.origin import hash_detector
from gdetkd_cli.assembly.runtime import find_image_size
from gdetkd_cli.data.bad_images import BadImageError
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.errors import KnowledgeError
from gdetkd_cli.files import write_text
from gdetkd_cli.knowledge.folder import KEY_FILE, read_json
from gdetkd_cli.knowledge.store import DiskStore, MemoryStore, Store, Tell, count_bytes
from gdetkd_cli.knowledge.teacher import RememberedTeacher, remember
from gdetkd_cli.recipe.differences import find_changed_fields
from gdetkd_cli.recipe.schema import DistillationRecipe, Recipe
from gdetkd_cli.structures import name_view

_FORMAT = 1  # changes whenever stored values would differ
_AUTO_SHARE = 0.5  # of the free memory or disk that `teacher_cache_gb: auto` allows
_CHECKED = 32  # images that are looked up before a run with stored answers
_PLACES = ("path", "weights")  # fields of a teacher's block that name a file, whose content is compared instead


def remember_teacher(
    recipe: DistillationRecipe,
    teacher: BuiltDetector,
    student: Detector,
    train: Split,
    *,
    folder: Path | None,
    processes: int,
    tell: Tell,
) -> BuiltDetector:
    """Returns the teacher with the store that ``distill.teacher_cache`` names, or as it is.

    Args:
        teacher: on the run's device, in evaluation mode or not.
        student: on the run's device.
        folder: of ``teacher_cache: disk``, if the recipe names none; None: nothing is written, memory is used.
        processes: number of this machine's processes, which share its memory.

    Raises:
        KnowledgeError: the teacher sees countless views, the folder belongs to another teacher, or stored answers do
            not cover the images.
    """
    options = recipe.distill
    if isinstance(teacher.detector, RememberedTeacher):
        if reason := describe_countless_views(recipe, student, teacher.detector):
            raise KnowledgeError(
                f"{teacher.detector.source} has a teacher's answers about given images, but {reason}; change the "
                "augmentation, or use the teacher itself"
            )
        check_taught(recipe, teacher.detector, train, most=_CHECKED)
        return teacher
    if options.teacher_cache == "off":
        return teacher
    if reason := describe_countless_views(recipe, student, teacher.detector):
        if options.teacher_cache != "auto":
            raise KnowledgeError(
                f"distill.teacher_cache is {options.teacher_cache}, but {reason}; set it to auto or off, or change the "
                "augmentation"
            )
        tell(f"teacher cache: off, because {reason}")
        return teacher
    if options.teacher_cache_dir is not None and folder is not None:
        folder = Path(options.teacher_cache_dir)
    free = int(psutil.virtual_memory().available / processes)
    in_memory = _choose_quota(options.teacher_cache_gb, free)
    mode = options.teacher_cache
    if mode == "auto":
        needed = estimate_bytes(recipe, teacher.detector, train)
        in_memory = min(in_memory, _choose_quota("auto", free))  # the quota may be meant for the disk
        mode = "memory" if needed <= in_memory and options.teacher_cache_dir is None else "disk"
        tell(f"teacher cache: {mode}, about {needed / 1e9:.3g} GB for {len(train) * sum(list_views(recipe))} views")
    store: Store
    if mode == "disk" and folder is not None:
        claim_folder(folder, describe_teacher(recipe, teacher.detector))
        store = DiskStore(folder / "views", None, tell)
        # What is stored already counts as free, because the quota is for all of the store.
        store.most = _choose_quota(options.teacher_cache_gb, shutil.disk_usage(folder).free + store.used)
    else:
        store = MemoryStore(in_memory, tell)
    return replace(teacher, detector=remember(teacher.detector, store))


def check_taught(recipe: Recipe, teacher: RememberedTeacher, train: Split, *, most: int | None = None) -> None:
    """Checks that a stored teacher has an answer about every view of the images, or of ``most`` of them.

    Raises:
        KnowledgeError: it lacks one.
        DataError: an image cannot be read.
    """
    advice = "run `gdetkd teach` with this recipe and the same --output, which adds what is missing"
    needed = list_views(recipe)
    if needed[1] and not teacher.views[1]:
        raise KnowledgeError(f"{teacher.source} has no mirrored images; set augment.flip to 0, or {advice}")
    count = len(train) if most is None else min(most, len(train))
    for index in (place * len(train) // count for place in range(count)):
        try:
            pixels = train.read(index)
        except BadImageError:
            if train.bad is None:
                raise
            continue
        if any(name_view(view) not in teacher.store for view in build_views(pixels, needed)):
            height, width = pixels.shape[-2:]
            raise KnowledgeError(
                f"{teacher.source} has no answer about image {train.records[index].image_id} of {train.name} ({width} "
                f"x {height} pixels), so the image is new or changed; {advice}"
            )


def list_views(recipe: Recipe) -> tuple[bool, bool]:
    """Whether a teacher sees images as they are, and mirrored."""
    return recipe.augment.flip < 1, recipe.augment.flip > 0


def build_views(pixels: Tensor, which: tuple[bool, bool]) -> list[Tensor]:
    """Builds the views of an image (3, H, W): as it is, mirrored, or both."""
    return [view for view, wanted in zip((pixels, pixels.flip(-1)), which, strict=True) if wanted]


def describe_countless_views(recipe: Recipe, student: Detector, teacher: Detector) -> str | None:
    """The reason why the teacher sees ever new views of an image; None if it sees two at most."""
    for field in ("copy_paste", "scale_jitter"):
        if getattr(recipe.augment, field) > 0:
            return f"augment.{field} draws new images at every step"
    size = find_image_size(teacher.module)
    if recipe.augment.multi_scale and size is not None and size == find_image_size(student.module):
        return "the teacher has the student's image size, so it follows augment.multi_scale"
    return None


def count_teacher_runs(recipe: Recipe, images: int) -> float:
    """Expected number of images on which a teacher with a full store runs, out of all that the steps show."""
    passes = recipe.train.steps * recipe.train.images_per_step / max(images, 1)
    shares = (1 - recipe.augment.flip, recipe.augment.flip)  # of the passes that show a view
    return images * sum(1 - (1 - share) ** passes for share in shares)


def estimate_bytes(recipe: Recipe, teacher: Detector, train: Split, *, int8: bool = False) -> int:
    """Estimates the bytes of all views from one image; runs the teacher on it."""
    if not len(train):
        return 0
    module = teacher.module
    training = module.training
    module.eval()
    device = next((tensor.device for tensor in module.state_dict().values()), None)
    image = train.read_first(start=len(train) // 2).to(device).float() / 255
    packed = RememberedTeacher(teacher, MemoryStore(0, lambda _: None), int8=int8).compute([image])[0]
    module.train(training)
    return count_bytes(packed) * len(train) * sum(list_views(recipe))


def describe_teacher(recipe: Recipe, teacher: Detector, *, int8: bool = False) -> dict[str, Any]:
    """What stored answers depend on besides an image's pixels, as JSON."""
    assert recipe.teacher is not None
    block = {name: value for name, value in recipe.teacher.model_dump(mode="json").items() if name not in _PLACES}
    digest = hashlib.sha256()
    for name, value in sorted(teacher.module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return {
        "format": _FORMAT,
        "values": "int8" if int8 else "float16",
        "teacher": block,
        "file": hash_detector(recipe.teacher),
        "weights": digest.hexdigest(),
        "levels": [[level.name, level.channels, *level.stride, *level.offset] for level in teacher.levels],
    }


def claim_folder(folder: Path, key: dict[str, Any]) -> None:
    """Writes a new folder's key, or checks the key of an existing one.

    Raises:
        KnowledgeError: the folder has the answers of another teacher, or of other preprocessing.
    """
    path = folder / KEY_FILE
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):  # the trials of a comparison start together
        if not path.exists():
            write_text(path, json.dumps(key, indent=1))
            return
    changed = find_changed_fields(read_json(path), json.loads(json.dumps(key)))
    if changed:
        raise KnowledgeError(
            f"{folder} holds the answers of another teacher: {', '.join(changed)} changed; choose another folder, or "
            "remove this one"
        )


def _choose_quota(gb: float | str, free: int) -> int:
    """Bytes that a store may use, where ``free`` bytes are free."""
    return int(gb * 1e9) if isinstance(gb, float | int) else int(free * _AUTO_SHARE)
