"""Runs a detector on images and videos, and writes what it finds."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gdetkd_cli import assembly, portable
from gdetkd_cli.commands.subject import Stopwatch, build_block, choose_device, load_teacher, open_file
from gdetkd_cli.data.sources import Source, find_sources
from gdetkd_cli.detectors import catalog
from gdetkd_cli.engine.events import Note, Observer, report_every, silent
from gdetkd_cli.errors import DataError, ModelError, OutputError
from gdetkd_cli.recipe.schema import Data
from gdetkd_cli.report.predictions import PredictedImage, draw_detections, list_rows, write_coco, write_csv, write_yolo
from gdetkd_cli.structures import Detections


@dataclass(frozen=True)
class PredictOptions:
    """Which detections are kept, and where they are written.

    Attributes:
        min_score: lowest score in 0..1.
        only: names of the classes to keep; empty: all.
        classes: names of the model's classes, for a file that does not name them.
        save: new folder for the images with their boxes.
        coco, csv: new files.
        yolo: new folder for a text file per image.
    """

    min_score: float = 0.3
    only: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    save: Path | None = None
    coco: Path | None = None
    csv: Path | None = None
    yolo: Path | None = None


@dataclass(frozen=True)
class Found:
    """One detection: its class, its score in 0..1, and its box (x0, y0, x1, y1) in the image's pixels."""

    name: str
    score: float
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class ImageResult:
    """The detections of an image of (height, width) pixels."""

    image: str
    size: tuple[int, int]
    detections: tuple[Found, ...]


@dataclass(frozen=True)
class PredictResult:
    """What a detector found.

    Attributes:
        source: the detector, as the user named it.
        format: as in ``EvalResult``.
        images: one per image or frame.
        per_class: number of detections by class, the most frequent first.
        unreadable: messages about images and videos that cannot be read, are cut short, or make the detector fail.
        ms_per_image: median time of the detector alone.
    """

    source: str
    format: str
    images: tuple[ImageResult, ...]
    per_class: dict[str, int]
    unreadable: tuple[str, ...]
    ms_per_image: float
    written: tuple[Path, ...]


def run_predict(
    model: str, places: Sequence[str], options: PredictOptions | None = None, *, observer: Observer = silent
) -> PredictResult:
    """Runs a detector on images, one at a time, on the GPU if there is one; arguments as in ``gdetkd_cli.api.predict``.

    Raises:
        ModelError, PairError: the model is no detector, its detections cannot be read, or it lacks a class.
        DataError: there is no image, or none can be used.
        OutputError: a file or folder to write exists already, or cannot be written.
    """
    options = options or PredictOptions()
    _check_new(options)
    sources = find_sources(places)
    if options.yolo is not None:
        _check_stems(sources)
    device = choose_device()
    if (found := load_teacher(model, options.classes)) is not None:
        recipe, teacher = found
        subject = build_block(teacher, device, _find_class_names(recipe.data), observer)
    else:
        subject = open_file(catalog.locate(model), device, observer, classes=options.classes)
    names = subject.class_names
    for name in options.only:
        if name not in names:
            raise ModelError(f"{model} has no class {name!r}{portable.suggest(name, names)}; it has {', '.join(names)}")
    _create_folders(options)
    stopwatch = Stopwatch(subject.predictor, device)
    images: list[PredictedImage] = []
    unreadable: list[str] = []
    progress = report_every(observer, "predicted", len(sources))
    for number, source in enumerate(sources, start=1):
        try:
            for name, pixels in source.read():
                images.append(_predict(stopwatch, name, pixels.to(device), names, options))
        except DataError as error:
            unreadable.append(str(error))
            observer(Note(f"warning: left out: {error}"))
        progress(number)
    if not images:
        raise DataError(f"no image could be used; the first problem: {unreadable[0]}")
    if options.coco is not None:
        write_coco(options.coco, images, names)
    if options.csv is not None:
        write_csv(options.csv, images, names)
    if options.yolo is not None:
        write_yolo(options.yolo, images)
    listed = [_list_found(image, names) for image in images]
    return PredictResult(
        source=model,
        format=subject.format,
        images=tuple(listed),
        per_class=dict(Counter(found.name for image in listed for found in image.detections).most_common()),
        unreadable=tuple(unreadable),
        ms_per_image=stopwatch.ms_per_image,
        written=tuple(_list_targets(options).values()),
    )


def _find_class_names(data: Data) -> tuple[str, ...]:
    """Returns the class names of a recipe's data; none if the data are not on this machine."""
    if names := getattr(data, "classes", None):
        return tuple(names)
    try:
        return assembly.read_split(data, "val").class_names
    except DataError:
        return ()


def _predict(
    stopwatch: Stopwatch, name: str, pixels: Tensor, class_names: Sequence[str], options: PredictOptions
) -> PredictedImage:
    """Detects objects in an image (3, H, W) uint8, and draws them if the options say so.

    Raises:
        DataError: the detector fails on this image.
    """
    try:
        (found,) = stopwatch.predict([pixels.float() / 255])
    except (DataError, ModelError) as error:
        raise DataError(f"{name}: {error}") from error
    keep = found.scores >= options.min_score
    if options.only:
        wanted = torch.tensor([class_names.index(one) + 1 for one in options.only], device=found.labels.device)
        keep &= torch.isin(found.labels, wanted)
    kept = Detections(*(values[keep].cpu() for values in (found.boxes, found.scores, found.labels)))
    if options.save is not None:
        draw_detections(pixels.cpu(), kept, class_names, options.save / name)
    return PredictedImage(name, (pixels.shape[-2], pixels.shape[-1]), kept)


def _list_found(image: PredictedImage, class_names: Sequence[str]) -> ImageResult:
    detections = tuple(
        Found(class_names[label - 1], round(score, 4), (round(x0, 2), round(y0, 2), round(x1, 2), round(y1, 2)))
        for (x0, y0, x1, y1), label, score in list_rows(image)
    )
    return ImageResult(image.name, image.size, detections)


def _list_targets(options: PredictOptions) -> dict[str, Path]:
    """Files and folders to write, by option."""
    targets = {"--save": options.save, "--coco": options.coco, "--csv": options.csv, "--yolo": options.yolo}
    return {option: path for option, path in targets.items() if path is not None}


def _check_new(options: PredictOptions) -> None:
    for option, path in _list_targets(options).items():
        if path.is_dir() and option in ("--save", "--yolo") and not any(path.iterdir()):
            continue
        if path.exists():
            raise OutputError(f"{path} already exists; choose another one with {option}")
    named: dict[Path, str] = {}
    for option, path in _list_targets(options).items():
        if (other := named.setdefault(path.resolve(), option)) != option:
            raise OutputError(f"{other} and {option} both name {path}; name two different ones")


def _create_folders(options: PredictOptions) -> None:
    """Creates the folders to write into, so that a mistake shows before the first image."""
    for option, path in _list_targets(options).items():
        folder = path if option in ("--save", "--yolo") else path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder} cannot be created ({error.strerror}); change {option}") from error
        if not os.access(folder, os.W_OK):
            raise OutputError(f"{folder} cannot be written to; choose another folder with {option}")


def _check_stems(sources: Sequence[Source]) -> None:
    """Checks that no two images would get the same text file; a video's frames have theirs in a folder."""
    seen: dict[str, Source] = {}
    for source in sources:
        stem = source.name if source.is_video else str(Path(source.name).with_suffix(""))
        other = seen.setdefault(stem, source)
        if other is not source:
            raise DataError(f"{other.name} and {source.name} would share one text file; leave out one, or --yolo")
