"""The recipe's ``distill`` block: regions, G-DetKD's terms, and other methods' to compare with."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from gdetkd_cli.recipe.base import Fraction, Strict


class RegionChoice(Strict):
    """Which boxes student and teacher are compared on."""

    per_image: PositiveInt | Literal["auto"] = Field(
        "auto",
        description="regions per image at most; auto: as many as the student's head trains on (the paper), 512 where "
        "it samples none; on a CPU 64 at most",
    )
    positive_iou: Fraction = Field(0.5, description="dense students: overlap with the truth that makes a positive")
    negatives_per_positive: NonNegativeFloat = Field(3.0, description="dense students: negatives per positive")


class Warmed(Strict):
    """What comes in gently."""

    warmup_steps: int = Field(0, ge=0, description="steps over which the weight rises linearly from 0")


class Term(Warmed):
    """What every distillation term has but those whose weight depends on the student."""

    weight: NonNegativeFloat = 1.0


class SGFI(Term):
    """Semantic-guided feature imitation (G-DetKD, arXiv 2108.07482)."""

    weight: NonNegativeFloat = Field(10.0, description="of the term; its target is standardised, so 10 suits most")
    normalize: Literal["channel", "scalar", "none"] = Field(
        "channel", description="teacher features are standardised per channel, as a whole, or (as in the paper) not"
    )
    embed_channels: PositiveInt = Field(64, description="channels of the embedding that levels are matched in")
    tau: PositiveFloat = Field(1.0, description="temperature of the match at the start; it is learnt")
    similarity: Literal["cosine", "product"] = Field(
        "cosine", description="levels are matched by the cosine of embeddings, or (as in the paper) by their product"
    )
    prior: NonNegativeFloat = Field(
        3.0,
        description="how much the match favours the student levels near `center`: a level's logit falls by this times "
        "the square of the octaves that its stride lies away; 0: not at all (the paper)",
    )
    center: Literal["student", "teacher"] = Field(
        "student",
        description="where the prior lies: at the level that the student assigns a region to, or at the stride of the "
        "level that the teacher pools it from",
    )
    sampling_ratio: PositiveInt = Field(2, description="RoIAlign samples per bin and axis")


class CKD(Warmed):
    """Contrastive distillation over regions (G-DetKD, arXiv 2108.07482)."""

    weight: NonNegativeFloat | Literal["auto"] = Field("auto", description="auto: 1 for a two-stage student, else 0.05")
    gamma: PositiveFloat = Field(0.07, description="temperature of the contrast")
    negative_iou: Fraction = Field(0.5, description="regions of one image that overlap more are not negatives")
    queue: int = Field(4096, ge=0, description="teacher embeddings remembered as further negatives")
    project_channels: PositiveInt = Field(128, description="channels of the space that regions are compared in")


class PredictionKD(Strict):
    """Class or box predictions of the teacher's RoI head as targets (G-DetKD, arXiv 2108.07482)."""

    weight: NonNegativeFloat = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="steps over which the weight rises linearly from 0; auto: half of the run where the student's head "
        "is fresh, which certain targets would hold back, else 0 (the paper)",
    )


class WholeMaps(Warmed):
    """What the terms that compare whole maps share."""

    pooled_levels: bool = Field(
        False,
        description="compare also student levels that only subsample the one before, as the last of torchvision's "
        "two-stage pyramids does",
    )


class FitNet(WholeMaps):
    """Another method, to compare with: whole maps, level by level (Romero et al., ICLR 2015)."""

    weight: NonNegativeFloat = Field(10.0, description="SGFI's default, as for the other squared errors")


class GTMask(WholeMaps):
    """Another method, to compare with: the cells near objects (Wang et al., CVPR 2019), or inside their boxes."""

    weight: NonNegativeFloat = Field(10.0, description="SGFI's default, as for the other squared errors")
    mask: Literal["anchors", "boxes"] = Field(
        "anchors",
        description="which cells count: those where an anchor overlaps an object nearly as much as the best one does, "
        "or those inside an object's box, on the level that the student assigns it to",
    )
    share: Annotated[float, Field(ge=0.0, lt=1.0)] = Field(
        0.5, description="mask: anchors: of the best anchor's overlap that makes a cell near an object"
    )


class RoIImitation(Term):
    """Another method, to compare with: regions on the one level each detector assigns (Li et al., CVPR 2017)."""

    weight: NonNegativeFloat = Field(10.0, description="SGFI's default, as for the other squared errors")


class PKD(WholeMaps):
    """Another method, to compare with: correlation of maps (Cao et al., NeurIPS 2022)."""

    weight: NonNegativeFloat | Literal["auto"] = Field(
        "auto", description="auto: as published, 6 for a two-stage student, else 10"
    )


class CWD(WholeMaps):
    """Another method, to compare with: where each channel looks (Shu et al., ICCV 2021)."""

    weight: NonNegativeFloat = Field(10.0, description="as published")
    tau: PositiveFloat = Field(1.0, description="temperature of the softmax over cells")


FGDWeight = NonNegativeFloat | Literal["auto"]


class FGD(WholeMaps):
    """Another method, to compare with: focal and global distillation (Yang et al., CVPR 2022).

    The four weights and the temperature are published for each family of detectors; ``auto`` takes those of the
    student's: two-stage, FCOS, and RetinaNet's for any other.
    """

    weight: NonNegativeFloat = Field(1.0, description="of the four parts together")
    temperature: PositiveFloat | Literal["auto"] = Field("auto", description="of the attentions; 0.5, for FCOS 0.8")
    objects: FGDWeight = Field("auto", description="two-stage 5e-5, FCOS 1.6e-3, else 1e-3")
    background: FGDWeight = Field("auto", description="two-stage 2.5e-5, FCOS 8e-4, else 5e-4")
    attention: FGDWeight = Field("auto", description="two-stage 5e-5, FCOS 8e-4, else 5e-4")
    relation: FGDWeight = Field("auto", description="two-stage 5e-7, FCOS 8e-6, else 5e-6")
    sums: Literal["scaled", "published"] = Field(
        "scaled",
        description="sums over channels and cells brought to 256 channels and to images of 800 pixels, which the "
        "published weights are for; or as they are",
    )
    standardize: bool = Field(
        True, description="each of the teacher's levels has mean 0 and deviation 1; or (as published) is as it is"
    )


class Logit(Term):
    """Another method, to compare with: class logits of every cell (Yang et al., ICCV 2023); two dense heads alike."""


class Distill(Strict):
    """The distillation terms. ``null`` leaves a term out; ``auto`` adds it where the pair allows it."""

    pair: Literal["auto", "homogeneous", "heterogeneous"] = "auto"
    regions: RegionChoice = RegionChoice()
    sgfi: SGFI | None = SGFI()
    ckd: CKD | Literal["auto"] | None = Field("auto", description="auto: where the teacher has a region embedding")
    class_kd: PredictionKD | Literal["auto"] | None = "auto"
    box_kd: PredictionKD | Literal["auto"] | None = "auto"
    fitnet: FitNet | None = None
    gt_mask: GTMask | None = None
    roi_imitation: RoIImitation | None = None
    pkd: PKD | None = None
    cwd: CWD | None = None
    fgd: FGD | None = None
    logit: Logit | None = None
    head_transfer: bool | Literal["auto"] = Field(
        "auto",
        description="start the student's head from the teacher's; auto: where it fits and the student's own is fresh",
    )
    task_loss: Literal["own", "none"] = Field(
        "own", description="none: the student's own losses are left out; it learns from the teacher alone"
    )
