"""Small versions of all catalogue detectors, with their known geometry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gdetkd_cli.detectors.protocol import Candidates
from gdetkd_cli.structures import Regions

CLASSES = ("circle", "square")
SIDES = {"min_size": 64, "max_size": 96}  # model pixels
TWO_STAGE = {
    "box_batch_size_per_image": 16,
    "rpn_pre_nms_top_n_train": 30,
    "rpn_post_nms_top_n_train": 30,
    "rpn_pre_nms_top_n_test": 30,
    "rpn_post_nms_top_n_test": 20,
    "box_score_thresh": 0.0,
}
DENSE = {"score_thresh": 0.0, "topk_candidates": 100, "detections_per_img": 60}


@dataclass(frozen=True)
class Spec:
    """A description and the known geometry of its pyramid."""

    description: dict[str, Any]
    strides: tuple[int, ...]
    channels: tuple[int, ...]
    embedding_channels: int
    centred_on_first_pixel: bool = True


def named(
    name: str,
    arguments: dict[str, Any],
    strides: tuple[int, ...],
    channels: tuple[int, ...],
    embedding: int,
    **more: Any,
) -> tuple[str, Spec]:
    description = {"kind": "torchvision", "name": name, "arguments": arguments, "norm": "batch"}
    return name, Spec(description, strides, channels, embedding, **more)


def composed(
    head: str, backbone: str, first: int, last: int, *, centred_on_first_pixel: bool = True, **fields: Any
) -> tuple[str, Spec]:
    description = {
        "kind": "composed",
        "backbone": backbone,
        "width": None,
        "blocks": None,
        "head": head,
        "pyramid_channels": 24,
        "pyramid_levels": [first, last],
        "image_size": [64, 96],
        "arguments": {**TWO_STAGE, "representation_size": 32} if head.endswith("rcnn") else DENSE,
        "norm": "batch",
    } | fields
    levels = range(first, last + 1)
    embedding = 32 if head.endswith("rcnn") else 24
    key = f"{head} on {backbone}, levels {first}-{last}, {description['norm']}"
    strides, channels = tuple(2**level for level in levels), (24,) * len(levels)
    return key, Spec(description, strides, channels, embedding, centred_on_first_pixel)


FPN, DENSE_FPN = (4, 8, 16, 32, 64), (8, 16, 32, 64, 128)
SLIM = {"width": 8, "blocks": [1, 1, 1, 1]}
NEXT = {"width": 16, "blocks": [1, 1, 1, 1]}  # 32 groups need 16 channels
SPECS = dict(
    [
        named("fasterrcnn_resnet50_fpn", TWO_STAGE | SIDES, FPN, (256,) * 5, 1024),
        named("fasterrcnn_resnet50_fpn_v2", TWO_STAGE | SIDES, FPN, (256,) * 5, 1024),
        named("fasterrcnn_mobilenet_v3_large_fpn", TWO_STAGE | SIDES, (32, 32, 64), (256,) * 3, 1024),
        named("fasterrcnn_mobilenet_v3_large_320_fpn", TWO_STAGE | SIDES, (32, 32, 64), (256,) * 3, 1024),
        named("maskrcnn_resnet50_fpn", TWO_STAGE | SIDES, FPN, (256,) * 5, 1024),
        named("maskrcnn_resnet50_fpn_v2", TWO_STAGE | SIDES, FPN, (256,) * 5, 1024),
        named("retinanet_resnet50_fpn", DENSE | SIDES, DENSE_FPN, (256,) * 5, 256),
        named("retinanet_resnet50_fpn_v2", DENSE | SIDES, DENSE_FPN, (256,) * 5, 256),
        named("fcos_resnet50_fpn", DENSE | SIDES, DENSE_FPN, (256,) * 5, 256),
        # Two unpadded convolutions at the end keep the stride; pooling stages centre the first cell elsewhere.
        named(
            "ssd300_vgg16",
            DENSE,
            (8, 16, 32, 64, 64, 64),
            (512, 1024, 512, 256, 256, 256),
            2816,
            centred_on_first_pixel=False,
        ),
        named(
            "ssdlite320_mobilenet_v3_large", DENSE, (16, 32, 64, 128, 256, 512), (672, 480, 512, 256, 256, 128), 2304
        ),
        composed("faster-rcnn", "resnet18", 2, 6, **SLIM),
        composed("faster-rcnn", "resnext50_32x4d", 2, 5, **NEXT),
        composed("faster-rcnn", "mobilenet_v3_small", 3, 5, width=0.5, norm="frozen"),
        composed("cascade-rcnn", "resnet18", 2, 6, **SLIM),
        composed("retinanet", "resnet18", 3, 7, **SLIM, norm="frozen"),
        composed("retinanet", "resnext50_32x4d", 4, 6, **NEXT),
        composed("retinanet", "mobilenet_v2", 2, 5, width=0.25),
        composed("fcos", "resnet18", 3, 7, **SLIM),
        composed("fcos", "resnext50_32x4d", 3, 5, **NEXT),
        composed("fcos", "mobilenet_v3_small", 3, 6, width=0.5),
        # ConvNeXt cuts the image into patches, so a cell lies in the middle of its pixels.
        composed("retinanet", "timm/test_convnext", 2, 5, centred_on_first_pixel=False),
        composed("faster-rcnn", "timm/test_efficientnet", 3, 5, norm="frozen"),
        composed("fcos", "timm/test_mambaout", 3, 7),  # returns its maps with channels last
    ]
)
SSD300_CELLS = (38, 19, 10, 5, 3, 1)


def all_regions(candidates: Candidates, *, own: bool) -> Regions:
    rows = torch.arange(len(candidates.boxes))
    return Regions(
        boxes=candidates.boxes,
        image_index=candidates.image_index,
        candidate=rows if own else torch.full_like(rows, -1),
    )
