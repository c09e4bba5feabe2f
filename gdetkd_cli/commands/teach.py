"""``gdetkd teach``: runs the teacher over the data once and stores its answers for any number of students."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from time import perf_counter
from typing import cast

import torch
from accelerate.utils import gather_object
from torch import Tensor

from gdetkd_cli import assembly
from gdetkd_cli.commands.measure import IMAGES, spread_images
from gdetkd_cli.data.loader import load_validation_batches
from gdetkd_cli.data.split import Split
from gdetkd_cli.detectors.protocol import Detector
from gdetkd_cli.engine.events import Note, Observer, report_every, report_notes, silent
from gdetkd_cli.errors import DiskError, KnowledgeError, PairError
from gdetkd_cli.knowledge.folder import check_storable, write_teacher
from gdetkd_cli.knowledge.store import DiskStore
from gdetkd_cli.knowledge.teacher import RememberedTeacher, remember, to_pixels
from gdetkd_cli.recipe.checks import require_trained_teacher
from gdetkd_cli.recipe.schema import KnowledgeDetector, Recipe
from gdetkd_cli.structures import Batch, ImageView, name_view


@dataclass(frozen=True)
class TeachResult:
    """A teacher's stored answers.

    Attributes:
        knowledge: the folder, for ``teacher: {arch: knowledge, path: ...}``.
        images: training images; each has ``views`` views.
        detections: whether the teacher's detections are stored, too.
        gigabytes: size of the folder.
        added: answers that this call added; the others were there.
        errors: by level, the rounding error of one image's values: its norm as a share of theirs.
    """

    knowledge: Path
    images: int
    views: int
    detections: bool
    gigabytes: float
    added: int
    seconds: float
    errors: dict[str, float]


def run_teach(recipe: Recipe, *, output: Path, int8: bool = False, observer: Observer = silent) -> TeachResult:
    """Stores the teacher's features of every training image, and its detections on all images.

    A call continues an interrupted one, and adds what is missing if the data have grown. All processes share the work.

    Args:
        recipe: names the data, the augmentation and the teacher; the student does not matter.
        output: the folder, new or of an earlier call.
        int8: 8 bits per value instead of float16.

    Raises:
        KnowledgeError: the folder belongs to another teacher, or this teacher's heads cannot be stored.
        DiskError: the disk cannot hold the answers; what was stored stays.
        GDetKDError: something that the recipe names cannot be used.
    """
    started = perf_counter()
    if recipe.teacher is None:
        raise KnowledgeError(f"the recipe {recipe.name!r} has no teacher to ask; add a `teacher:` block")
    if isinstance(recipe.teacher, KnowledgeDetector):
        raise KnowledgeError(f"{recipe.teacher.path} already holds a teacher's answers; name the teacher itself")
    require_trained_teacher(recipe)
    compute, recipe = assembly.start_compute(recipe)
    accelerator, main = compute.accelerator, compute.accelerator.is_main_process
    observer = observer if main else silent
    assert recipe.teacher is not None
    splits = {which: assembly.read_split(recipe.data, which) for which in assembly.SPLITS}
    assembly.report_bad_images(splits.values(), observer)
    built = assembly.build_detector(recipe.teacher, splits["train"].class_names, recipe.seed, keep_classes=True)
    report_notes(observer, built.notes)
    teacher = built.detector
    check_storable(teacher, built.description)
    teacher.module.to(accelerator.device).eval()
    detects = _find_detections(teacher, observer)
    assembly.claim_folder(output, assembly.describe_teacher(recipe, teacher, int8=int8))
    stores = {name: DiskStore(output / name, None, lambda _: None) for name in ("views", "detections")}
    asked = remember(teacher, stores["views"], int8=int8)
    _check_space(recipe, output, teacher, splits["train"], stores["views"].used, observer, int8=int8)
    kept = stores["detections"] if detects else None
    work = _Work(cast(RememberedTeacher, asked), kept, accelerator.device, recipe.train.batch_size, observer)
    share = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    views = assembly.list_views(recipe)
    work.ask(splits["train"], views, share)
    work.ask(splits["val"], (False, False), share)
    work.ask(spread_images(splits["val"], IMAGES), (True, False), share)  # from which a run measures its pair
    accelerator.wait_for_everyone()
    if main:
        write_teacher(output, teacher, built.description, detections=detects, plain=views[0], mirrored=views[1])
    accelerator.wait_for_everyone()
    return TeachResult(
        knowledge=output,
        images=len(splits["train"]),
        views=sum(views),
        detections=detects,
        gigabytes=sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e9,
        added=sum(gather_object([work.added])),
        seconds=perf_counter() - started,
        errors=work.measure_errors(splits["train"]),
    )


@dataclass
class _Work:
    """The questions to a teacher, and the places of its answers."""

    teacher: RememberedTeacher
    detections: DiskStore | None
    device: torch.device
    batch: int
    observer: Observer
    added: int = 0

    def ask(self, split: Split, views: tuple[bool, bool], share: dict[str, int]) -> None:
        """Stores the features of these views of a split's images, and the detections."""
        progress = report_every(self.observer, "taught", ceil(len(split) / share["world_size"]))
        done = 0
        for batch in load_validation_batches(split=split, batch_size=self.batch, **share):
            pixels = [to_pixels(image) for image in batch.images]
            seen = [view for one in pixels for view in assembly.build_views(one, views)]
            self._store_features(seen)
            if self.detections is not None:
                self._store_detections(pixels, self.detections)
            progress(done := done + len(batch))

    def _store_features(self, pixels: list[Tensor]) -> None:
        missing = [(name, one) for one in pixels if (name := name_view(one)) not in self.teacher.store]
        for start in range(0, len(missing), self.batch):
            part = missing[start : start + self.batch]
            images = [one.to(self.device).float() / 255 for _, one in part]
            for (name, _), answer in zip(part, self.teacher.compute(images), strict=True):
                self.teacher.store.add(name, answer)
                self.added += 1

    def _store_detections(self, pixels: list[Tensor], store: DiskStore) -> None:
        missing = [(name, one) for one in pixels if (name := name_view(one)) not in store]
        if not missing:
            return
        found = self.teacher.predict([one.to(self.device).float() / 255 for _, one in missing])
        for (name, _), one in zip(missing, found, strict=True):
            store.add(name, {"boxes": one.boxes.cpu(), "scores": one.scores.cpu(), "labels": one.labels.cpu()})

    def measure_errors(self, train: Split) -> dict[str, float]:
        """The rounding error of the middle training image by level."""
        image = train.read_first().to(self.device).float() / 255
        batch = Batch([image], [], torch.zeros(1, dtype=torch.int64))
        with torch.no_grad():
            exact = self.teacher.detector.extract_features(batch).pyramid.maps
            named = Batch([image], [], batch.image_ids, (ImageView(name_view(to_pixels(image))),))
            stored = self.teacher.extract_features(named).pyramid.maps
        return {
            level.name: float((ours - theirs).norm() / theirs.norm().clamp(min=1e-30))
            for level, ours, theirs in zip(self.teacher.levels, stored, exact, strict=True)
        }


def _find_detections(teacher: Detector, observer: Observer) -> bool:
    """Whether the teacher's detections can be read; a note says why not."""
    try:
        teacher.check_detects()
    except PairError as error:
        observer(Note(f"only features are stored: {error}"))
        return False
    return True


def _check_space(
    recipe: Recipe, output: Path, teacher: Detector, train: Split, used: int, observer: Observer, *, int8: bool
) -> None:
    """Tells the expected size, and raises a DiskError if the disk is too small for it."""
    expected = assembly.estimate_bytes(recipe, teacher, train, int8=int8)
    free = shutil.disk_usage(output).free
    views = len(train) * sum(assembly.list_views(recipe))
    observer(Note(f"about {expected / 1e9:.3g} GB for {views} views; {free / 1e9:.3g} GB are free"))
    if expected - used > free:
        raise DiskError(
            f"{output} needs about {(expected - used) / 1e9:.3g} GB more, and {free / 1e9:.3g} GB are free; choose "
            "another disk, add --int8 to halve the size, or train on fewer images"
        )
