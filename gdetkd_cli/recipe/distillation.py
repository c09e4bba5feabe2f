"""The recipe's ``distill`` block: regions, the terms of G-DetKD, and other methods for comparison."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from gdetkd_cli.recipe.base import Channels, Count, Flag, Fraction, NotNegative, Positive, Strict, Whole


class RegionChoice(Strict):
    """The boxes on which the terms compare student and teacher."""

    per_image: Annotated[Count, Field(le=10**6)] | Literal["auto"] = Field(
        "auto",
        description="maximum number of regions per image; auto: the number that the student's head samples (as in the "
        "paper), or 512 if it samples none; at most 64 on a CPU",
    )
    positive_iou: Fraction = Field(0.5, description="dense students: minimum IoU of a positive region with an object")
    negatives_per_positive: NotNegative = Field(
        3.0, description="dense students: number of negative regions per positive"
    )


class Warmed(Strict):
    """A term with a warm-up."""

    warmup_steps: Whole = Field(0, description="steps over which the weight rises linearly from 0")


class Term(Warmed):
    """A term with a fixed weight."""

    weight: NotNegative = Field(1.0, description="weight of the term")


class SGFI(Term):
    """Semantic-guided feature imitation (G-DetKD, arXiv 2108.07482)."""

    weight: NotNegative = Field(
        10.0, description="weight of the term; 10 suits most pairs, because the target is standardized"
    )
    normalize: Literal["channel", "scalar", "none"] = Field(
        "channel",
        description="how to standardize the teacher's features: per channel, as a whole, or not (as in the paper)",
    )
    embed_channels: Channels = Field(64, description="channels of the embedding in which levels are matched")
    tau: Positive = Field(1.0, description="initial temperature of the level matching; training adjusts it")
    similarity: Literal["cosine", "product"] = Field(
        "cosine", description="similarity of embeddings: their cosine, or their dot product (as in the paper)"
    )
    prior: NotNegative = Field(
        3.0,
        description="how strongly the matching favours student levels near `center`: each level's logit decreases by "
        "`prior` times the squared distance in octaves of stride; 0: no preference (as in the paper)",
    )
    center: Literal["student", "teacher"] = Field(
        "student",
        description="center of the prior: the level to which the student assigns the region, or the stride of the "
        "level from which the teacher pools it",
    )
    sampling_ratio: Annotated[Count, Field(le=64)] = Field(2, description="RoIAlign samples per bin and axis")


class CKD(Warmed):
    """Contrastive distillation over regions (G-DetKD, arXiv 2108.07482)."""

    weight: NotNegative | Literal["auto"] = Field(
        "auto", description="weight of the term; auto: 1 for a two-stage student, else 0.05"
    )
    gamma: Positive = Field(0.07, description="temperature of the contrastive loss")
    negative_iou: Fraction = Field(
        0.5, description="maximum IoU of two regions of one image that count as negatives of each other"
    )
    queue: Annotated[Whole, Field(le=10**8)] = Field(
        4096, description="earlier teacher embeddings kept as additional negatives"
    )
    project_channels: Channels = Field(128, description="channels of the space in which regions are compared")


class PredictionKD(Strict):
    """Class or box predictions of the teacher's RoI head as targets (G-DetKD, arXiv 2108.07482)."""

    weight: NotNegative = Field(1.0, description="weight of the term")
    warmup_steps: Whole | Literal["auto"] = Field(
        "auto",
        description="steps over which the weight rises linearly from 0; auto: half of the run if the student's head is "
        "fresh, since confident targets slow its training down, else 0 (as in the paper)",
    )


class WholeMaps(Warmed):
    """A term that compares whole feature maps."""

    pooled_levels: Flag = Field(
        False,
        description="also compare student levels that only subsample the previous level, such as the last level of "
        "torchvision's two-stage detectors",
    )


_SQUARED_ERROR_WEIGHT = "weight of the term; the default equals SGFI's, as for all squared errors"


class FitNet(WholeMaps):
    """For comparison: imitates whole maps, level by level (Romero et al., ICLR 2015)."""

    weight: NotNegative = Field(10.0, description=_SQUARED_ERROR_WEIGHT)


class GTMask(WholeMaps):
    """For comparison: imitates the cells near objects (Wang et al., CVPR 2019) or inside their boxes."""

    weight: NotNegative = Field(10.0, description=_SQUARED_ERROR_WEIGHT)
    mask: Literal["anchors", "boxes"] = Field(
        "anchors",
        description="cells to imitate: cells with an anchor that overlaps an object nearly as much as the best anchor "
        "does, or cells inside an object's box on the level to which the student assigns it",
    )
    share: Annotated[Fraction, Field(lt=1.0)] = Field(
        0.5, description="with `mask: anchors`, the fraction of the best anchor's overlap that a cell must reach"
    )


class RoIImitation(Term):
    """For comparison: imitates regions on the one level that each detector assigns (Li et al., CVPR 2017)."""

    weight: NotNegative = Field(10.0, description=_SQUARED_ERROR_WEIGHT)


class PKD(WholeMaps):
    """For comparison: correlates maps (Cao et al., NeurIPS 2022)."""

    weight: NotNegative | Literal["auto"] = Field(
        "auto", description="weight of the term; auto: as published, 6 for a two-stage student, else 10"
    )


class CWD(WholeMaps):
    """For comparison: matches each channel's distribution over cells (Shu et al., ICCV 2021)."""

    weight: NotNegative = Field(10.0, description="weight of the term, as published")
    tau: Positive = Field(1.0, description="temperature of the softmax over cells")


FGDWeight = NotNegative | Literal["auto"]


class FGD(WholeMaps):
    """For comparison: focal and global distillation (Yang et al., CVPR 2022).

    The paper publishes four weights and a temperature per detector family. ``auto`` uses those for the student's
    family: two-stage, FCOS, or RetinaNet for any other.
    """

    weight: NotNegative = Field(1.0, description="weight of the four parts together")
    temperature: Positive | Literal["auto"] = Field(
        "auto", description="temperature of the attention maps; auto: 0.8 for FCOS, else 0.5"
    )
    objects: FGDWeight = Field("auto", description="auto: 5e-5 for two-stage, 1.6e-3 for FCOS, else 1e-3")
    background: FGDWeight = Field("auto", description="auto: 2.5e-5 for two-stage, 8e-4 for FCOS, else 5e-4")
    attention: FGDWeight = Field("auto", description="auto: 5e-5 for two-stage, 8e-4 for FCOS, else 5e-4")
    relation: FGDWeight = Field("auto", description="auto: 5e-7 for two-stage, 8e-6 for FCOS, else 5e-6")
    sums: Literal["scaled", "published"] = Field(
        "scaled",
        description="scaled: scale sums over channels and cells to 256 channels and 800-pixel images, for which the "
        "weights were published; published: do not scale",
    )
    standardize: Flag = Field(
        True, description="standardize each teacher level to mean 0 and deviation 1; the paper does not"
    )


class Logit(Term):
    """For comparison: imitates the class logits of every cell (Yang et al., ICCV 2023); needs two like dense heads."""


def _read_off(value: object) -> object:
    """YAML reads ``off`` as false."""
    return "off" if value is False else value


class Distill(Strict):
    """The distillation terms. ``null`` leaves a term out; ``auto`` adds it if the pair supports it."""

    pair: Literal["auto", "homogeneous", "heterogeneous"] = Field(
        "auto", description="kind of pair; anything but auto makes gdetkd stop if the detectors form the other kind"
    )
    regions: RegionChoice = RegionChoice()
    sgfi: SGFI | None = SGFI()
    ckd: CKD | Literal["auto"] | None = Field(
        "auto", description="auto: add the term if the teacher has a known region embedding"
    )
    class_kd: PredictionKD | Literal["auto"] | None = "auto"
    box_kd: PredictionKD | Literal["auto"] | None = "auto"
    fitnet: FitNet | None = None
    gt_mask: GTMask | None = None
    roi_imitation: RoIImitation | None = None
    pkd: PKD | None = None
    cwd: CWD | None = None
    fgd: FGD | None = None
    logit: Logit | None = None
    head_transfer: Flag | Literal["auto"] = Field(
        "auto",
        description="initialize the student's head from the teacher's; auto: if it fits a fresh head",
    )
    task_loss: Literal["own", "none"] = Field(
        "own", description="own: train with the student's own losses too; none: train with the distillation terms alone"
    )
    teacher_cache: Annotated[Literal["off", "memory", "disk", "auto"], BeforeValidator(_read_off)] = Field(
        "off",
        description="store the teacher's features of each image and of its mirror image when they are first computed; "
        "memory: in each process; disk: in `teacher_cache_dir`, shared by processes and runs; auto: memory if all fit "
        "and `teacher_cache_dir` is null, else disk, and off if the teacher sees ever new images",
    )
    teacher_cache_gb: Positive | Literal["auto"] = Field(
        "auto", description="quota of the teacher's features in GB; auto: half of the free memory or disk"
    )
    teacher_cache_dir: str | None = Field(
        None, description="folder for `teacher_cache: disk`; default: `knowledge` in the folder of the run"
    )
