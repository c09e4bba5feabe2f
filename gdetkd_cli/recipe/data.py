"""The recipe's ``data`` block: one class per format. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from gdetkd_cli.recipe.base import Count, Fraction, Pixels, Seed, Strict


class Fold(Strict):
    """One fold of a cross-validation over the training and validation images together."""

    number: Count = Field(description="number of the held-out fold, from 1; the others are for training")
    of: Annotated[Count, Field(ge=2)] = Field(description="number of folds")

    @model_validator(mode="after")
    def _check_number(self) -> Fold:
        if self.number > self.of:
            raise ValueError(f"number must be 1 to {self.of}, the number of folds; got {self.number}")
        return self


OneFold = Annotated[
    Fold | None,
    Field(description="divide the images of both splits into folds and hold out one; default: use the splits"),
]


OnBadSample = Annotated[
    Literal["error", "skip"],
    Field(description="what follows from an image that cannot be read: the end of the run, or a run without the image"),
]
MaxBadSamples = Annotated[
    Count,
    Field(description="with on_bad_sample: skip, images of a split that each process may leave out before it stops"),
]


def _root_field() -> Any:
    return Field(Path("."), description="folder from which the other paths start")


class SyntheticData(Strict):
    """Built-in scenes, drawn in code; nothing to download."""

    format: Literal["synthetic"] = "synthetic"
    train_images: Count = Field(1200, description="scenes in the training split")
    val_images: Count = Field(1000, description="scenes in the validation split")
    size: Annotated[Pixels, Field(ge=64, le=4096)] = Field(128, description="side of a scene in pixels")
    smallest: Annotated[Fraction, Field(ge=0.02, le=0.5)] = Field(
        0.12, description="outer diameter of the smallest object, as a fraction of the side"
    )
    seed: Seed = Field(0, description="seed of the scenes")
    fold: OneFold = None


class TeacherLabels(Strict):
    """Uses the teacher's confident detections as annotations."""

    score: Fraction = Field(0.5, description="minimum score of a detection used as a target")
    per_class: dict[str, Fraction] = Field(default_factory=dict, description="minimum scores by class name")
    images: Literal["all", "unlabelled"] = Field(
        "all", description="images that the teacher labels; unlabelled: only those without annotations"
    )


Labels = Annotated[
    Literal["annotations", "teacher", "mixed"] | TeacherLabels,
    Field(
        description="targets of the training images: their annotations, the teacher's detections, or (mixed) the "
        "annotations where an image has some and the detections elsewhere"
    ),
]


def _check_folds_have_annotations(data: Any) -> Any:
    if data.fold is not None and data.labels != "annotations":
        kind = "mixed" if data.labels == "mixed" else "teacher"
        raise ValueError(
            f"fold requires annotations for every image and cannot be combined with labels: {kind}; remove one"
        )
    return data


class CocoData(Strict):
    """COCO JSON annotations. Relative paths are relative to ``root``."""

    format: Literal["coco"]
    root: Path = _root_field()
    train: Path = Field(Path("train.json"), description="annotations of the training split")
    val: Path | None = Field(
        Path("val.json"), description="annotations of the validation split; null: every tenth image of the other"
    )
    train_images: Path = Field(Path("images"), description="folder of the training images")
    val_images: Path = Field(Path("images"), description="folder of the validation images")
    classes: list[str] | None = Field(None, description="category names to use, in this order; default: all")
    labels: Labels = "annotations"
    on_bad_sample: OnBadSample = "error"
    max_bad_samples: MaxBadSamples = 100
    fold: OneFold = None

    _check = model_validator(mode="after")(_check_folds_have_annotations)


class YoloData(Strict):
    """YOLO's ``data.yaml``, images and label files. Relative paths are relative to ``root``."""

    format: Literal["yolo"]
    root: Path = _root_field()
    names: Path = Field(
        Path("data.yaml"), description="data.yaml, or a text file with a class name per line (classes.txt, obj.names)"
    )
    train: Annotated[list[Path], Field(min_length=1)] | Literal["auto"] = Field(
        "auto", description="folders of training images, or .txt lists of them; auto: those that data.yaml names"
    )
    val: Annotated[list[Path], Field(min_length=1)] | Literal["auto"] | None = Field(
        "auto", description="as `train`, for validation; null: every tenth training image"
    )
    classes: list[str] | None = Field(None, description="class names to use, in this order; default: all")
    labels: Labels = "annotations"
    on_bad_sample: OnBadSample = "error"
    max_bad_samples: MaxBadSamples = 100
    fold: OneFold = None

    _check = model_validator(mode="after")(_check_folds_have_annotations)


class VocData(Strict):
    """Pascal VOC, or any folder in its layout: XML files, images, and lists of names in ``ImageSets/Main``."""

    format: Literal["voc"]
    root: Path = Field(Path("."), description="folder from which the lists' paths start, such as VOCdevkit")
    train: list[Path] = Field(
        [Path("VOC2007/ImageSets/Main/trainval.txt"), Path("VOC2012/ImageSets/Main/trainval.txt")],
        min_length=1,
        description="lists of training images",
    )
    val: list[Path] | None = Field(
        [Path("VOC2007/ImageSets/Main/test.txt")],
        min_length=1,
        description="lists of validation images; null: hold out every tenth training image",
    )
    classes: list[str] | None = Field(None, description="class names to use, in this order; default: VOC's twenty")
    on_bad_sample: OnBadSample = "error"
    max_bad_samples: MaxBadSamples = 100
    fold: OneFold = None


class Bdd100kData(Strict):
    """BDD100K's detection labels, of 2018 or ``det_20``. Relative paths are relative to ``root``."""

    format: Literal["bdd100k"]
    root: Path = _root_field()
    train: Path = Field(Path("labels/det_20/det_train.json"), description="labels of the training split")
    val: Path = Field(Path("labels/det_20/det_val.json"), description="labels of the validation split")
    train_images: Path = Field(Path("images/100k/train"), description="folder of the training images")
    val_images: Path = Field(Path("images/100k/val"), description="folder of the validation images")
    classes: list[str] | None = Field(None, description="class names to use, in this order; default: BDD100K's ten")
    on_bad_sample: OnBadSample = "error"
    max_bad_samples: MaxBadSamples = 100
    fold: OneFold = None


class FolderData(Strict):
    """Images without annotations; the teacher's detections are the targets."""

    format: Literal["folder"]
    root: Path = _root_field()
    train_images: Path = Field(Path("."), description="folder of the training images, with its subfolders")
    val: Path | None = Field(
        None, description="COCO annotations for evaluation; default: every tenth image, labelled by the teacher"
    )
    val_images: Path = Field(Path("."), description="folder of the images in `val`")
    classes: list[str] | None = Field(None, description="the teacher's classes to use; default: all")
    labels: Literal["teacher"] | TeacherLabels = Field(
        "teacher", description="how detections become targets; teacher: the defaults of TeacherLabels"
    )
    on_bad_sample: OnBadSample = "error"
    max_bad_samples: MaxBadSamples = 100


Data = SyntheticData | CocoData | YoloData | VocData | Bdd100kData | FolderData
