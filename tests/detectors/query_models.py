"""Small detectors of transformers and their configurations, as a recipe or a config.json holds them."""

from __future__ import annotations

from typing import Any

import torch

from gdetkd_cli.detectors import transformers
from gdetkd_cli.detectors.transformers.detector import QueryDetector
from gdetkd_cli.structures import Batch, Target

CLASSES = ("car", "bus", "bike")
SIZE = (64, 96)

_RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 24, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
}
_RT_RESNET = _RESNET | {"model_type": "rt_detr_resnet", "out_features": ["stage2", "stage3", "stage4"]}
_HGNET: dict[str, Any] = {
    "model_type": "hgnet_v2",
    "embedding_size": 16,
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [16, 24, 32, 48],
    "stem_channels": [3, 8, 8],
    "stage_in_channels": [8, 16, 24, 32],
    "stage_mid_channels": [8, 8, 16, 16],
    "stage_out_channels": [16, 24, 32, 48],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 3, 3],
    "stage_numb_of_layers": [2, 2, 2, 2],
    "out_features": ["stage2", "stage3", "stage4"],
}
_HYBRID: dict[str, Any] = {
    "encoder_hidden_dim": 32,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 2,
    "d_model": 32,
    "decoder_in_channels": [32, 32, 32],
    "decoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "num_queries": 20,
    "num_denoising": 10,
}
_PLAIN: dict[str, Any] = {
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 48,
    "num_queries": 20,
}
# Its 32 channels could be the columns of a map: (24, 28, 32) fits the probe image both ways.
_WINDOWED: dict[str, Any] = {
    "model_type": "lw_detr_vit",
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 96,
    "pretrain_image_size": 96,
    "patch_size": 16,
    "num_windows": 4,
    "window_block_indices": [0, 2],
    "out_indices": [1, 3],
}
_GROUPS: dict[str, Any] = {
    "hidden_expansion": 0.5,
    "c2f_num_blocks": 1,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_self_attention_heads": 4,
    "decoder_cross_attention_heads": 4,
    "num_queries": 20,
    "group_detr": 2,
}
_LAST = _RESNET | {"out_features": ["stage4"]}
_LAST_THREE = _RESNET | {"out_features": ["stage2", "stage3", "stage4"]}

CONFIGS: dict[str, dict[str, Any]] = {
    "rt_detr": {"backbone_config": _RT_RESNET, "encoder_in_channels": [16, 24, 32], **_HYBRID},
    "rt_detr_v2": {"backbone_config": _RT_RESNET, "encoder_in_channels": [16, 24, 32], **_HYBRID},
    "d_fine": {
        "backbone_config": _HGNET,
        "encoder_in_channels": [24, 32, 48],
        "decoder_n_points": [2, 2, 2],
        **_HYBRID,
    },
    "detr": {"backbone_config": _LAST, "d_model": 32, **_PLAIN},
    "conditional_detr": {"backbone_config": _LAST, "d_model": 32, **_PLAIN},
    "deformable_detr": {"backbone_config": _LAST_THREE, "d_model": 32, **_PLAIN},
    "dab_detr": {"backbone_config": _LAST, "hidden_size": 32, **_PLAIN},
    "lw_detr": {
        "backbone_config": _WINDOWED,
        "projector_scale_factors": [2.0, 0.5],
        "num_feature_levels": 2,
        **_GROUPS,
    },
    "rf_detr": {
        "backbone_config": {
            "model_type": "rf_detr_dinov2",
            "hidden_size": 32,
            "num_hidden_layers": 4,
            "num_attention_heads": 2,
            "image_size": 112,
            "patch_size": 14,
            "num_windows": 4,
            "window_block_indexes": [0, 2],
            "out_indices": [2, 4],
        },
        **_GROUPS,
    },
    "yolos": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "image_size": [64, 96],
        "num_detection_tokens": 20,
    },
}
STRIDES = {
    "rt_detr": (8, 16, 32),
    "rt_detr_v2": (8, 16, 32),
    "d_fine": (8, 16, 32),
    "detr": (32,),
    "conditional_detr": (32,),
    "deformable_detr": (8, 16, 32, 64),
    "dab_detr": (32,),
    "lw_detr": (8, 32),
    "yolos": (16,),
}
_WITH_TIMM = ("detr", "conditional_detr", "deformable_detr", "dab_detr")  # whose body may come from timm
SOFTMAX = ("detr", "yolos")  # a query has one class or none


def make_config(name: str) -> dict[str, Any]:
    timm = {"use_timm_backbone": False} if name in _WITH_TIMM else {}
    return {"model_type": name.replace("dab_detr", "dab-detr"), **CONFIGS[name], **timm}


def build_detector(name: str, size: tuple[int, int] = SIZE) -> tuple[QueryDetector, dict[str, Any]]:
    torch.manual_seed(0)
    description = transformers.describe_fresh(make_config(name), size)
    return transformers.build(description, CLASSES), description


def shake(detector: QueryDetector) -> QueryDetector:
    """Moves the weights, because fresh class layers give equal scores everywhere, whose order is arbitrary."""
    torch.manual_seed(1)
    for parameter in detector.module.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    detector.module.eval()
    return detector


def make_batch() -> Batch:
    """Two images of unlike sizes with one and two objects."""
    generator = torch.Generator().manual_seed(0)
    targets = [
        Target(torch.tensor([[10.0, 10, 50, 40]]), torch.tensor([1])),
        Target(torch.tensor([[20.0, 20, 70, 60], [1, 1, 30, 30]]), torch.tensor([2, 3])),
    ]
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 96), (80, 80))]
    return Batch(images, targets, torch.tensor([1, 2]))
