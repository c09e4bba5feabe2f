"""The recipe: what to do, validated. Knows nothing of tensors (pydantic only, no torch).

Units stand in each field's description; steps are optimizer steps, sizes are pixels, AP is in 0-100.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from gdetkd_cli.recipe.base import Fraction, Strict
from gdetkd_cli.recipe.distillation import Distill

# ----------------------------------------------------------------------------------------------------------- data


class Fold(Strict):
    """One fold of a cross-validation over the training and validation images together."""

    number: PositiveInt = Field(description="the fold that is held out, from 1; the other images are for training")
    of: Annotated[int, Field(ge=2)] = Field(description="folds in all")

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Fold:
        if self.number > self.of:
            raise ValueError(f"number must be 1 to {self.of}, the folds in all; got {self.number}")
        return self


OneFold = Annotated[
    Fold | None,
    Field(description="divide the images of both splits anew, and hold out one fold of them; default: as they are"),
]


class SyntheticData(Strict):
    """The built-in scenes, drawn in code: nothing to download."""

    format: Literal["synthetic"] = "synthetic"
    train_images: PositiveInt = Field(1200, description="scenes in the training split")
    val_images: PositiveInt = Field(1000, description="scenes in the validation split")
    size: Annotated[int, Field(ge=64)] = Field(128, description="side of a scene in pixels")
    smallest: Annotated[float, Field(ge=0.02, le=0.5)] = Field(
        0.12, description="outer diameter of the smallest object, as a fraction of the side"
    )
    seed: int = Field(0, description="another seed draws another data set")
    fold: OneFold = None


class TeacherLabels(Strict):
    """The teacher's confident detections as the truth of images."""

    score: Fraction = Field(0.5, description="lowest score of a detection that becomes a target")
    per_class: dict[str, Fraction] = Field(default_factory=dict, description="other lowest scores, by class name")


class CocoData(Strict):
    """COCO JSON annotations. Relative paths are relative to ``root``."""

    format: Literal["coco"]
    root: Path = Field(Path("."), description="folder that the other paths start from")
    train: Path = Field(Path("train.json"), description="annotations of the training split")
    val: Path = Field(Path("val.json"), description="annotations of the validation split")
    train_images: Path = Field(Path("images"), description="folder of the training images")
    val_images: Path = Field(Path("images"), description="folder of the validation images")
    classes: list[str] | None = Field(None, description="category names to use, in this order; default: all")
    labels: Literal["annotations", "teacher"] | TeacherLabels = Field(
        "annotations", description="targets of the training images: their annotations, or what the teacher detects"
    )
    fold: OneFold = None

    @model_validator(mode="after")
    def _folds_have_annotations(self) -> CocoData:
        if self.fold is not None and self.labels != "annotations":
            raise ValueError("fold needs annotations of every image, so it cannot stand beside labels: teacher")
        return self


class VocData(Strict):
    """Pascal VOC, or any folder of that layout: XML files, images, and lists of names in ``ImageSets/Main``."""

    format: Literal["voc"]
    root: Path = Field(Path("."), description="folder that the lists' paths start from, as VOCdevkit")
    train: list[Path] = Field(
        [Path("VOC2007/ImageSets/Main/trainval.txt"), Path("VOC2012/ImageSets/Main/trainval.txt")],
        min_length=1,
        description="lists of training images",
    )
    val: list[Path] = Field(
        [Path("VOC2007/ImageSets/Main/test.txt")], min_length=1, description="lists of validation images"
    )
    classes: list[str] | None = Field(None, description="names to use, in this order; default: VOC's twenty")
    fold: OneFold = None


class Bdd100kData(Strict):
    """BDD100K's detection labels, of 2018 or ``det_20``. Relative paths are relative to ``root``."""

    format: Literal["bdd100k"]
    root: Path = Field(Path("."), description="folder that the other paths start from")
    train: Path = Field(Path("labels/det_20/det_train.json"), description="labels of the training split")
    val: Path = Field(Path("labels/det_20/det_val.json"), description="labels of the validation split")
    train_images: Path = Field(Path("images/100k/train"), description="folder of the training images")
    val_images: Path = Field(Path("images/100k/val"), description="folder of the validation images")
    classes: list[str] | None = Field(None, description="names to use, in this order; default: the task's ten")
    fold: OneFold = None


class FolderData(Strict):
    """ImageFiles without annotations: what the teacher detects are the targets."""

    format: Literal["folder"]
    root: Path = Field(Path("."), description="folder that the other paths start from")
    train_images: Path = Field(Path("."), description="folder of the training images, searched to any depth")
    val: Path | None = Field(
        None, description="COCO annotations for evaluation; default: every tenth image, as the teacher labels it"
    )
    val_images: Path = Field(Path("."), description="folder of the images that val names")
    classes: list[str] | None = Field(None, description="the teacher's classes to use; default: all")
    labels: Literal["teacher"] | TeacherLabels = "teacher"


Data = SyntheticData | CocoData | VocData | Bdd100kData | FolderData


class Augment(Strict):
    """Changes made to training images; validation images are never changed."""

    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    multi_scale: list[PositiveInt] | None = Field(
        None, description="short sides in pixels to choose from; default: the student's own image size"
    )
    max_size: PositiveInt = Field(1333, description="longest side in pixels that multi_scale may give")
    copy_paste: Fraction = Field(
        0.0,
        description="probability that an object is pasted once more near itself, a little larger or smaller: by its "
        "outline where COCO's annotations have one, else by its box",
    )
    photometric: bool = Field(False, description="jitter brightness, contrast, saturation and hue")


# ------------------------------------------------------------------------------------------------------ detectors


class TorchvisionDetector(Strict):
    """A torchvision detector by name."""

    arch: Literal["torchvision"]
    name: str = Field(description="for example fasterrcnn_resnet50_fpn")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of torchvision's function")
    norm: Literal["auto", "batch", "frozen"] = Field(
        "auto", description="batch normalisation: trained, or frozen; auto: frozen where the weights were made so"
    )
    weights: str | None = Field(None, description="file, torchvision weights name, or nothing")
    backbone_weights: str | None = Field(None, description="file or torchvision weights name of the backbone alone")


class ComposedDetector(Strict):
    """Any torchvision ResNet, ResNeXt or MobileNet under a feature pyramid and one of four heads."""

    arch: Literal["composed"]
    backbone: str = Field(description="for example resnet18, resnext101_32x8d, mobilenet_v3_small")
    head: Literal["faster-rcnn", "cascade-rcnn", "retinanet", "fcos"]
    width: PositiveFloat | None = Field(
        None, description="ResNet: channels after the stem (64 in the original); MobileNet: width multiplier"
    )
    blocks: list[PositiveInt] | None = Field(None, min_length=4, max_length=4, description="ResNet blocks per stage")
    pyramid_channels: PositiveInt = Field(256, description="channels of each pyramid level")
    pyramid_levels: tuple[int, int] | None = Field(
        None,
        description="first and last level; level l has stride 2**l; default 2-6 for two-stage heads, else 3-7",
    )
    image_size: tuple[PositiveInt, PositiveInt] = Field(
        (800, 1333), description="short side, and the most the long side may have, in pixels, inside the detector"
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the torchvision class")
    norm: Literal["auto", "batch", "frozen"] = "auto"
    weights: str | None = Field(None, description="file of weights, or nothing")
    backbone_weights: str | None = Field(None, description="file or torchvision weights name of the backbone alone")

    @model_validator(mode="after")
    def _short_side_first(self) -> ComposedDetector:
        short, long = self.image_size
        if not 32 <= short <= long:
            raise ValueError(
                "image_size must be [short side, the most the long side may have], 32 pixels or more each; got "
                f"{[short, long]}"
            )
        return self

    @model_validator(mode="after")
    def _levels_in_order(self) -> ComposedDetector:
        if self.pyramid_levels is not None:
            first, last = self.pyramid_levels
            if not (2 <= first <= 5 and 5 <= last <= 7):
                raise ValueError(
                    f"pyramid_levels must be [first, last], first in 2-5 and last in 5-7; got {[first, last]}"
                )
        return self


class ModelInput(Strict):
    """What a model wants its images to be, where it does not know it itself as torchvision's and this tool's do."""

    range: Literal["0-1", "0-255"] = Field("0-1", description="values of the images that it takes")
    channels: Literal["rgb", "bgr"] = Field("rgb", description="their order; bgr is OpenCV's")
    layout: Literal["chw", "hwc"] = Field(
        "chw", description="channels first or last; ONNX files and exported programs say it themselves"
    )
    mean: tuple[float, float, float] | None = Field(None, description="subtracted per channel, in that range")
    std: tuple[float, float, float] | None = Field(None, description="divided by per channel, after that")
    size: tuple[PositiveInt, PositiveInt] = Field((480, 640), description="height and width of the probe image")
    fit: bool = Field(
        False, description="bring every image to that size, its shape kept and padded: for a model made for one size"
    )


Levels = Annotated[
    list[str] | None,
    Field(description="names of the pyramid's levels, as `gdetkd probe` tells them, where it finds others by itself"),
]


class CheckpointDetector(Strict):
    """A file that says itself what it is: trained by this tool, or as another tool wrote it."""

    arch: Literal["checkpoint"]
    path: str = Field(
        description="run folder, student.pt, state_dict, TorchScript, exported program, ONNX, or builtin:NAME"
    )
    input: ModelInput = ModelInput()
    levels: Levels = None
    classes: list[str] | None = Field(
        None, description="names of the classes that another tool's model detects, in its order; default: as it says"
    )


class FactoryDetector(Strict):
    """A detector of your own code; it runs with ``--trust-code`` only."""

    arch: Literal["factory"]
    factory: str = Field(description="package.module:function that returns a torch.nn.Module")
    arguments: dict[str, Any] = Field(default_factory=dict, description="keyword arguments of the function")
    weights: str | None = Field(None, description="file of weights, or nothing where the function loads them")
    input: ModelInput = ModelInput()
    levels: Levels = None


Detector = Annotated[
    TorchvisionDetector | ComposedDetector | CheckpointDetector | FactoryDetector, Field(discriminator="arch")
]


# ------------------------------------------------------------------------------------------------------- training


class Optimizer(Strict):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = Field(1e-3, description="peak learning rate")
    weight_decay: NonNegativeFloat = 1e-4
    momentum: Fraction = Field(0.9, description="sgd only")


class Schedule(Strict):
    name: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")
    milestones: list[Fraction] = Field([0.667, 0.917], description="multistep: fractions of the run where lr drops")
    gamma: PositiveFloat = Field(0.1, description="multistep: factor at each milestone")


class Train(Strict):
    steps: PositiveInt = Field(description="optimizer steps")
    batch_size: PositiveInt = Field(8, description="images per step and process")
    reference_batch: PositiveInt | None = Field(
        None,
        description="images per step, over all processes, that steps and lr are meant for; with another batch the "
        "linear scaling rule changes both",
    )
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: PositiveFloat | None = Field(10.0, description="largest gradient norm; null: no clipping")
    log_every: PositiveInt = Field(20, description="steps between lines of metrics.jsonl")
    evaluate_every: PositiveInt | None = Field(None, description="steps between evaluations; null: only at the end")
    checkpoint_every: PositiveInt = Field(200, description="steps between resume checkpoints")


class Runtime(Strict):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field("auto", description="auto: bf16 where a GPU has it")
    channels_last: bool | Literal["auto"] = Field(
        "auto", description="auto: on; as fast or faster on CUDA and on a CPU, most so for small networks"
    )
    compile: bool = Field(False, description="torch.compile the backbones")
    threads: PositiveInt | Literal["auto"] = Field("auto", description="CPU threads; auto: measured at the start")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field("auto", description="loader processes")
    cache_mb: Annotated[int, Field(ge=0)] = Field(1024, description="decoded images kept in memory, MiB per process")


class Recipe(Strict):
    """A whole run. ``gdetkd train`` needs a student; ``gdetkd distill`` a teacher and ``distill`` as well."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="also the default run folder's name")
    seed: int = Field(0, ge=0)
    data: Annotated[Data, Field(discriminator="format")]
    augment: Augment = Augment()
    student: Detector
    teacher: Detector | None = None
    distill: Distill | None = None
    train: Train
    runtime: Runtime = Runtime()


class DistillationRecipe(Recipe):
    """A recipe that has a teacher and a ``distill`` block."""

    teacher: Detector
    distill: Distill
