"""The recipe's fields. Imports no torch.

Steps are optimizer steps, sizes are pixels and AP is in 0-100, unless a field's description names another unit.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from gdetkd_cli.recipe.base import (
    Arguments,
    Channels,
    Count,
    Flag,
    Fraction,
    NotNegative,
    Pixels,
    Positive,
    Real,
    Seed,
    Strict,
    Whole,
)
from gdetkd_cli.recipe.data import Bdd100kData as Bdd100kData
from gdetkd_cli.recipe.data import CocoData as CocoData
from gdetkd_cli.recipe.data import Data as Data
from gdetkd_cli.recipe.data import Fold as Fold
from gdetkd_cli.recipe.data import FolderData as FolderData
from gdetkd_cli.recipe.data import SyntheticData as SyntheticData
from gdetkd_cli.recipe.data import TeacherLabels as TeacherLabels
from gdetkd_cli.recipe.data import VocData as VocData
from gdetkd_cli.recipe.data import YoloData as YoloData
from gdetkd_cli.recipe.distillation import Distill


class Augment(Strict):
    """Random changes to training images. Validation images stay unchanged."""

    flip: Fraction = Field(0.5, description="probability of a horizontal flip")
    multi_scale: list[Pixels] | None = Field(
        None, min_length=1, description="short sides in pixels from which to choose; default: the student's image size"
    )
    max_size: Pixels = Field(1333, description="maximum long side in pixels with multi_scale")
    copy_paste: Fraction = Field(
        0.0,
        description="probability of pasting a slightly resized copy of an object near it, cut along its COCO outline "
        "or, without one, its box",
    )
    scale_jitter: Fraction = Field(
        0.0,
        description="probability of large-scale jitter: the image at half to twice its size, cropped or padded to its "
        "own size",
    )
    photometric: Flag = Field(False, description="jitter brightness, contrast, saturation and hue")


# ------------------------------------------------------------------------------------------------------ detectors


Norm = Annotated[
    Literal["auto", "batch", "frozen"],
    Field(description="batch normalization: trained or frozen; auto: frozen if the weights were trained that way"),
]
BackboneWeights = Annotated[
    str | None,
    Field(
        description="weights file or torchvision weights name for the backbone alone; for timm's, a file, a tag of its "
        "weights such as d2_in1k, or DEFAULT"
    ),
]


class TorchvisionDetector(Strict):
    """A torchvision detector by name."""

    arch: Literal["torchvision"]
    name: str = Field(description="name of the torchvision function, for example fasterrcnn_resnet50_fpn")
    arguments: Arguments = Field(default_factory=dict, description="keyword arguments for the torchvision function")
    norm: Norm = "auto"
    weights: str | None = Field(None, description="weights file or torchvision weights name; null: fresh weights")
    backbone_weights: BackboneWeights = None


class ComposedDetector(Strict):
    """A torchvision ResNet, ResNeXt or MobileNet, or a timm model, with a feature pyramid and one of four heads."""

    arch: Literal["composed"]
    backbone: str = Field(
        description="torchvision backbone, for example resnet18, resnext101_32x8d or mobilenet_v3_small; or timm/NAME, "
        "for example timm/convnext_atto"
    )
    head: Literal["faster-rcnn", "cascade-rcnn", "retinanet", "fcos"]
    width: Annotated[Positive, Field(le=2**12)] | None = Field(
        None, description="ResNet: channels after the stem (64 in the original); MobileNet: width multiplier"
    )
    blocks: list[Annotated[Count, Field(le=200)]] | None = Field(
        None, min_length=4, max_length=4, description="number of ResNet blocks per stage"
    )
    pyramid_channels: Channels = Field(256, description="channels of each pyramid level")
    pyramid_levels: tuple[Whole, Whole] | None = Field(
        None,
        description="first and last level; level l has stride 2**l; default: [2, 6] for two-stage heads, else [3, 7]",
    )
    image_size: tuple[Pixels, Pixels] = Field(
        (800, 1333), description="short side and maximum long side in pixels to which the detector resizes images"
    )
    arguments: Arguments = Field(default_factory=dict, description="keyword arguments for the torchvision class")
    norm: Norm = "auto"
    weights: str | None = Field(None, description="weights file; null: fresh weights")
    backbone_weights: BackboneWeights = None

    @model_validator(mode="after")
    def _check_image_size(self) -> ComposedDetector:
        short, long = self.image_size
        if not 32 <= short <= long:
            raise ValueError(
                f"image_size must be [short side, maximum long side], each at least 32 pixels; got {[short, long]}"
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
    """The images that a custom model expects. Torchvision's and gdetkd's own models ignore this block."""

    range: Literal["0-1", "0-255"] = Field("0-1", description="range of pixel values")
    channels: Literal["rgb", "bgr"] = Field("rgb", description="channel order; OpenCV uses bgr")
    layout: Literal["chw", "hwc"] = Field(
        "chw", description="channels first or last; ONNX files and exported programs define it themselves"
    )
    mean: tuple[Real, Real, Real] | None = Field(None, description="mean per channel to subtract, in `range`")
    std: tuple[Positive, Positive, Positive] | None = Field(
        None, description="standard deviation per channel by which to divide, in `range`"
    )
    size: tuple[Pixels, Pixels] = Field((480, 640), description="height and width of the probe image in pixels")
    fit: Flag = Field(
        False, description="resize every image to `size`, padded to keep its shape; for models with a fixed input size"
    )


Levels = Annotated[
    list[str] | None,
    Field(description="names of the pyramid levels, as `gdetkd probe` prints them; default: those that probing finds"),
]


class CheckpointDetector(Strict):
    """A model file, written by gdetkd or another tool; gdetkd detects the format."""

    arch: Literal["checkpoint"]
    path: str = Field(
        description="run folder, student.pt, state_dict, safetensors, TorchScript, exported program, ONNX file, or "
        "builtin:NAME"
    )
    input: ModelInput = ModelInput()
    levels: Levels = None
    classes: list[str] | None = Field(
        None, description="class names in the order of the model's labels; default: those stored in the file"
    )


class FactoryDetector(Strict):
    """A detector from your own code; requires ``--trust-code``."""

    arch: Literal["factory"]
    factory: str = Field(description="package.module:function that returns a torch.nn.Module")
    arguments: Arguments = Field(default_factory=dict, description="keyword arguments for the function")
    weights: str | None = Field(None, description="weights file; null: the function loads its own weights")
    input: ModelInput = ModelInput()
    levels: Levels = None


class TransformersDetector(Strict):
    """A DETR-like detector of Hugging Face transformers; needs ``pip install '.[transformers]'``."""

    arch: Literal["transformers"]
    model: str | None = Field(
        None, description="folder with config.json and safetensors, or a name on the Hugging Face hub to download"
    )
    config: Arguments | None = Field(
        None, description="configuration of a model with fresh weights, as in its config.json, with model_type"
    )
    image_size: tuple[Pixels, Pixels] | None = Field(
        None,
        description="height and width in pixels to which images are resized; default: as the model was trained, or "
        "640 x 640 for a config",
    )

    @model_validator(mode="after")
    def _check_source(self) -> TransformersDetector:
        if (self.model is None) == (self.config is None):
            raise ValueError("expected either `model`, a folder or a name on the hub, or `config`, for fresh weights")
        return self


class KnowledgeDetector(Strict):
    """A teacher's answers about the training images, which `gdetkd teach` wrote; the teacher itself is not needed."""

    arch: Literal["knowledge"]
    path: str = Field(description="folder that `gdetkd teach` wrote")


Detector = Annotated[
    TorchvisionDetector
    | ComposedDetector
    | CheckpointDetector
    | FactoryDetector
    | TransformersDetector
    | KnowledgeDetector,
    Field(discriminator="arch"),
]


# ------------------------------------------------------------------------------------------------------- training


class Optimizer(Strict):
    name: Literal["adamw", "sgd"] = "adamw"
    lr: Positive = Field(1e-3, description="peak learning rate")
    weight_decay: NotNegative = 1e-4
    momentum: Fraction = Field(0.9, description="momentum; sgd only")


class Schedule(Strict):
    name: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup_steps: Whole = Field(50, description="steps of linear warm-up")
    milestones: list[Fraction] = Field(
        [0.667, 0.917], max_length=20, description="multistep: fractions of the run after which the learning rate drops"
    )
    gamma: Annotated[Positive, Field(le=10)] = Field(
        0.1, description="multistep: factor of the learning rate at each milestone"
    )


class Train(Strict):
    steps: Count = Field(description="number of optimizer steps")
    batch_size: Annotated[Count, Field(le=10**5)] = Field(
        8, description="images per step and process; with `accumulate`, per batch and process"
    )
    accumulate: Annotated[Count, Field(le=10**4)] = Field(
        1, description="batches per optimizer step, whose gradients are averaged, to train on more images than fit"
    )
    reference_batch: Annotated[Count, Field(le=10**7)] | None = Field(
        None,
        description="images per step, over all processes, for which steps and lr are chosen; for another batch the "
        "linear scaling rule adapts both; null: never adapt them",
    )
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    clip_norm: Positive | None = Field(10.0, description="maximum gradient norm; null: no clipping")
    log_every: Count = Field(20, description="steps between lines of metrics.jsonl")
    evaluate_every: Count | None = Field(None, description="steps between evaluations; null: only at the end")
    checkpoint_every: Count = Field(200, description="steps between resume checkpoints")
    keep_checkpoints: Count = Field(2, description="number of resume checkpoints to keep, the newest first")
    ema: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = Field(
        None,
        description="decay of an exponential moving average of the student's weights, for example 0.999; the average "
        "is evaluated, written and exported; null: the last weights are",
    )
    stop_after: Count | None = Field(
        None,
        description="evaluations in a row without a higher AP than the best after which the run ends; needs "
        "`evaluate_every`; null: all steps are taken",
    )

    @model_validator(mode="after")
    def _check_evaluations(self) -> Train:
        if self.stop_after is not None and self.evaluate_every is None:
            raise ValueError(
                "stop_after counts evaluations, and evaluate_every is null, so there is only the last one; set "
                "evaluate_every to a number of steps"
            )
        return self

    @property
    def images_per_step(self) -> int:
        """Images per optimizer step and process."""
        return self.batch_size * self.accumulate


# The trackers that accelerate knows; a test compares the names.
Tracker = Literal["tensorboard", "wandb", "trackio", "mlflow", "comet_ml", "clearml", "dvclive", "swanlab", "aim"]


class Runtime(Strict):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="auto: bf16 on a GPU that supports it, else fp32"
    )
    channels_last: Flag | Literal["auto"] = Field(
        "auto",
        description="use the channels-last memory format; auto: true, as fast or faster on CUDA and CPU. Never used on "
        "a CPU for a network with fewer than 16 channels, whose training it would crash",
    )
    compile: Flag = Field(False, description="compile the backbones with torch.compile")
    threads: Annotated[Count, Field(le=1024)] | Literal["auto"] = Field(
        "auto", description="number of CPU threads; auto: the fastest, measured at the start"
    )
    workers: Annotated[Whole, Field(le=1024)] | Literal["auto"] = Field(
        "auto", description="number of data loader processes; auto: 4 on a GPU, 0 on a CPU"
    )
    cache_mb: Annotated[Whole, Field(le=10**8)] = Field(
        1024, description="memory for decoded images, in MiB per process"
    )
    trackers: list[Tracker] = Field(
        ["tensorboard"],
        max_length=9,
        description="trackers that receive the numbers of metrics.jsonl; their packages must be installed; []: none",
    )


class Recipe(Strict):
    """A whole run. ``gdetkd train`` needs a student; ``gdetkd distill`` also needs ``teacher`` and ``distill``."""

    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="name of the recipe and, by default, of its run folder"
    )
    seed: Seed = Field(0, description="seed of fresh weights and the order of images")
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
