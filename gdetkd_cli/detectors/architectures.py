"""Detectors as plain torchvision modules, from a plain description.

This file imports torch and torchvision only. A run folder gets a copy of it next to ``student.pt``, so that a
trained student can be rebuilt where this package is not installed.

A description is a dictionary that JSON can hold:

    {"kind": "torchvision", "name": "retinanet_resnet50_fpn", "arguments": {...}, "norm": "batch"}
    {"kind": "composed", "backbone": "resnet18", "width": 64, "blocks": [2, 2, 2, 2], "head": "fcos",
     "pyramid_channels": 256, "pyramid_levels": [3, 7], "image_size": [800, 1333], "arguments": {...}, "norm": "batch"}

A torchvision description may hold "norm_eps", the epsilon of frozen normalisation.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torchvision.models import detection, mobilenet, resnet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import TwoMLPHead
from torchvision.models.detection.fcos import FCOSClassificationHead, FCOSHead, FCOSRegressionHead
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.ssd import SSD
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool, LastLevelP6P7
from torchvision.ops.misc import FrozenBatchNorm2d

TORCHVISION_DETECTORS = (
    "fasterrcnn_resnet50_fpn",
    "fasterrcnn_resnet50_fpn_v2",
    "fasterrcnn_mobilenet_v3_large_fpn",
    "fasterrcnn_mobilenet_v3_large_320_fpn",
    "maskrcnn_resnet50_fpn",
    "maskrcnn_resnet50_fpn_v2",
    "retinanet_resnet50_fpn",
    "retinanet_resnet50_fpn_v2",
    "fcos_resnet50_fpn",
    "ssd300_vgg16",
    "ssdlite320_mobilenet_v3_large",
)
RESNETS = (
    "resnet18",
    "resnet34",
    "resnet50",
    "resnet101",
    "resnet152",
    "resnext50_32x4d",
    "resnext101_32x8d",
    "resnext101_64x4d",
    "wide_resnet50_2",
    "wide_resnet101_2",
)
MOBILENETS = ("mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large")
DEFAULT_LEVELS = {"faster-rcnn": (2, 6), "cascade-rcnn": (2, 6), "retinanet": (3, 7), "fcos": (3, 7)}
# What the heads take here, beside what torchvision's classes take.
_HEAD_ARGUMENTS = {
    "faster-rcnn": {"anchor_sizes", "representation_size", "canonical_scale"},
    "cascade-rcnn": {"anchor_sizes", "representation_size", "canonical_scale"},
    "retinanet": {"anchor_sizes", "head_norm"},
    "fcos": {"anchor_sizes", "head_convs"},
}
_CLASSES = {
    "fasterrcnn": detection.FasterRCNN,
    "cascadercnn": detection.FasterRCNN,
    "maskrcnn": detection.MaskRCNN,
    "retinanet": detection.RetinaNet,
    "fcos": detection.FCOS,
    "ssd300": SSD,
    "ssdlite320": SSD,
}


def build(description: dict[str, Any], num_classes: int) -> nn.Module:
    """Builds the detector with fresh weights.

    Args:
        description: see the module's docstring.
        num_classes: K, without background. The module has K + 1 outputs, as torchvision counts them.

    Raises:
        ValueError: the description names something that torchvision does not have, or arguments it does not take.
    """
    kind = description["kind"]
    if kind not in _KINDS:
        raise ValueError(f"unknown architecture kind {kind!r}; expected {' or '.join(map(repr, _KINDS))}")
    module = _KINDS[kind](description, num_classes)
    if isinstance(module, detection.FCOS):
        # Distances come out of a rectifier that torchvision starts at 0, where it can die for good. A level's boxes
        # reach 4 to 8 strides: from there every distance has a gradient.
        nn.init.constant_(module.head.regression_head.bbox_reg.bias, 4.0)
    return module


def load(path: str) -> nn.Module:
    """Rebuilds the detector of a ``student.pt`` and loads its weights; ready for inference."""
    saved = torch.load(path, map_location="cpu", weights_only=True)
    module = build(saved["architecture"], len(saved["classes"]))
    module.load_state_dict(saved["model"])
    return module.eval()


def _norm_layer(norm: str) -> Callable[..., nn.Module]:
    return {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d}[norm]


def _named(description: dict[str, Any], num_classes: int) -> nn.Module:
    name, arguments = description["name"], dict(description.get("arguments") or {})
    if name not in TORCHVISION_DETECTORS:
        raise ValueError(f"unknown torchvision detector {name!r}; known: {', '.join(TORCHVISION_DETECTORS)}")
    builder = getattr(detection, name)
    _check(name, arguments, _takes(builder) | _takes(_CLASSES[name.partition("_")[0]]))
    try:
        module: nn.Module = builder(weights=None, weights_backbone=None, num_classes=num_classes + 1, **arguments)
    except TypeError as error:
        raise ValueError(f"{name} does not take these arguments: {error}") from error
    if name.startswith("maskrcnn"):  # used as a box detector: without its mask branch it is a Faster R-CNN
        for part in ("mask_roi_pool", "mask_head", "mask_predictor"):
            setattr(module.roi_heads, part, None)
    if description.get("norm", "batch") == "frozen":
        module = _freeze_norms(module, description.get("norm_eps"))
    return module


def _takes(function: Callable[..., Any]) -> set[str]:
    return {p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD}


def _check(what: str, arguments: dict[str, Any], known: set[str]) -> None:
    """Finds misspelt arguments: torchvision's detectors take any keyword, and ignore those that they do not know."""
    known = known | _takes(GeneralizedRCNNTransform)  # they hand theirs on to it
    unknown = sorted(set(arguments) - known)
    if unknown:
        raise ValueError(
            f"{what} does not take these arguments: {', '.join(unknown)}; it takes {', '.join(sorted(known))}"
        )


def _freeze_norms(module: nn.Module, eps: float | None) -> nn.Module:
    """Replaces every BatchNorm2d by torchvision's FrozenBatchNorm2d, in place; ``eps`` None: each layer's own."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, FrozenBatchNorm2d(child.num_features, eps=child.eps if eps is None else eps))
        else:
            _freeze_norms(child, eps)
    return module


def _composed(description: dict[str, Any], num_classes: int) -> nn.Module:
    head, channels = description["head"], int(description["pyramid_channels"])
    arguments = dict(description.get("arguments") or {})
    short, long = description["image_size"]
    arguments.setdefault("min_size", short)
    arguments.setdefault("max_size", long)
    if head not in HEADS:
        raise ValueError(f"unknown head {head!r}; known: {', '.join(HEADS)}")
    _check(f"head {head!r}", arguments, _HEAD_ARGUMENTS[head] | _takes(_CLASSES[head.replace("-", "")]))
    first, last = description.get("pyramid_levels") or DEFAULT_LEVELS[head]
    _check_sizes(head, arguments, 1 + last - first)
    backbone = _backbone(description, channels, first, last)
    strides = [2**level for level in range(first, last + 1)]
    try:
        return HEADS[head](backbone, num_classes, channels, strides, arguments)
    except TypeError as error:
        raise ValueError(f"head {head!r} does not take these arguments: {error}") from error


def _check_sizes(head: str, arguments: dict[str, Any], levels: int) -> None:
    """That what the heads take here are sizes: torchvision would fail later, and say less."""
    for name in ("representation_size", "canonical_scale", "head_convs"):
        value = arguments.get(name, 1)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"head {head!r}: {name} must be a whole number from 1 on, got {value!r}")
    anchors = arguments.get("anchor_sizes")
    if anchors is None:
        return
    lists = isinstance(anchors, list | tuple) and all(isinstance(own, list | tuple) and own for own in anchors)
    if not lists or len(anchors) != levels or not all(isinstance(s, int | float) and s > 0 for o in anchors for s in o):
        raise ValueError(
            f"head {head!r}: anchor_sizes must be one list of pixels for each of the {levels} levels, as [[16], [32], "
            f"...], got {anchors!r}"
        )
    if len({len(own) for own in anchors}) > 1:
        raise ValueError(f"head {head!r}: every level must have as many anchor_sizes as the others, got {anchors!r}")


def _backbone(description: dict[str, Any], channels: int, first: int, last: int) -> BackboneWithFPN:
    """Body and FPN with levels ``first`` to ``last``; level l has stride 2**l.

    Levels up to 5 are the body's stages; level 6 is a max pool of level 5 (as in Faster R-CNN) or, where there is
    a level 7 too, both are convolutions (as in RetinaNet and FCOS).
    """
    name, norm = description["backbone"], _norm_layer(description.get("norm", "batch"))
    stride_levels = range(first, min(last, 5) + 1)
    if name in RESNETS:
        body = _resnet(name, description.get("width"), description.get("blocks"), norm)
        stages = [f"layer{level - 1}" for level in stride_levels]
        widths = [_out_channels(getattr(body, stage)[-1]) for stage in stages]
    elif name in MOBILENETS:
        if description.get("blocks"):
            raise ValueError(f"'blocks' applies to ResNets only, not to {name}")
        multiplier = float(description.get("width") or 1.0)
        body = getattr(mobilenet, name)(weights=None, width_mult=multiplier, norm_layer=norm).features
        stages, widths = _mobilenet_stages(body, [2**level for level in stride_levels])
    else:
        raise ValueError(f"unknown backbone {name!r}; known: {', '.join(RESNETS + MOBILENETS)}")
    extra = {5: NoExtraLevel, 6: LastLevelMaxPool, 7: partial(LastLevelP6P7, channels, channels)}[last]()
    returned = {stage: str(i) for i, stage in enumerate(stages)}
    return BackboneWithFPN(body, returned, widths, channels, extra_blocks=extra)


def _resnet(name: str, width: int | None, blocks: list[int] | None, norm: Callable[..., nn.Module]) -> resnet.ResNet:
    """torchvision's ResNet, optionally slimmer (``width`` channels after the stem, 64 in the original) or shallower."""
    body: resnet.ResNet = getattr(resnet, name)(weights=None, norm_layer=norm)
    if width is None and blocks is None:
        return body
    first = body.layer1[0]
    block = type(first)
    depth = blocks or [len(getattr(body, f"layer{i}")) for i in range(1, 5)]
    stem = 64 if width is None else int(width)
    if stem < 1:
        raise ValueError(f"{name}: width must be at least 1 channel, got {width}")
    body.inplanes = stem
    body.conv1 = nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False)
    body.bn1 = norm(stem)
    for i, count in enumerate(depth):
        # ResNet's own stage builder; it reads and advances body.inplanes.
        stage = body._make_layer(block, stem * 2**i, count, stride=1 if i == 0 else 2)
        setattr(body, f"layer{i + 1}", stage)
    for module in body.modules():  # as ResNet.__init__ does
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return body


def _out_channels(block: Any) -> int:
    """Channels after a ResNet block: BasicBlock ends in conv2, Bottleneck in conv3."""
    last = block.conv3 if hasattr(block, "conv3") else block.conv2
    return int(last.out_channels)


def _mobilenet_stages(body: nn.Sequential, strides: list[int]) -> tuple[list[str], list[int]]:
    """The last module at each stride, and its channels: found by running the body."""
    size = 64
    sizes: list[int] = []
    widths: list[int] = []
    x = torch.zeros(1, 3, size, size)
    was_training = body.training
    body.eval()
    with torch.no_grad():
        for module in body:
            x = module(x)
            sizes.append(x.shape[-1])
            widths.append(x.shape[1])
    body.train(was_training)
    last_at = {s: i for i, s in enumerate(sizes)}
    chosen = [last_at[size // stride] for stride in strides]
    return [str(i) for i in chosen], [widths[i] for i in chosen]


def _anchors(arguments: dict[str, Any], default: list[tuple[int, ...]], ratios: tuple[float, ...]) -> AnchorGenerator:
    """``anchor_sizes`` of the arguments (pixels, one list per level), or the default."""
    sizes = tuple(tuple(sizes) for sizes in arguments.pop("anchor_sizes", None) or default)
    return AnchorGenerator(sizes, (ratios,) * len(sizes))


def _faster_rcnn(
    backbone: nn.Module, num_classes: int, channels: int, strides: list[int], arguments: dict[str, Any]
) -> detection.FasterRCNN:
    hidden = int(arguments.pop("representation_size", 1024))
    pool = MultiScaleRoIAlign(
        featmap_names=[str(i) for i, stride in enumerate(strides) if stride <= 32],
        output_size=7,
        sampling_ratio=2,
        canonical_scale=int(arguments.pop("canonical_scale", 224)),
    )
    return detection.FasterRCNN(
        backbone,
        num_classes=None,
        rpn_anchor_generator=_anchors(arguments, [(8 * stride,) for stride in strides], (0.5, 1.0, 2.0)),
        box_roi_pool=pool,
        box_head=TwoMLPHead(channels * 7**2, hidden),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(hidden, num_classes + 1),
        **arguments,
    )


def _cascade_rcnn(
    backbone: nn.Module, num_classes: int, channels: int, strides: list[int], arguments: dict[str, Any]
) -> detection.FasterRCNN:
    hidden = int(arguments.get("representation_size", 1024))
    module = _faster_rcnn(backbone, num_classes, channels, strides, arguments)
    module.roi_heads = CascadeHeads(module.roi_heads, channels, hidden, num_classes)
    return module


def _retinanet(
    backbone: nn.Module, num_classes: int, channels: int, strides: list[int], arguments: dict[str, Any]
) -> nn.Module:
    octaves = [tuple(int(4 * stride * 2 ** (i / 3)) for i in range(3)) for stride in strides]
    anchors = _anchors(arguments, octaves, (0.5, 1.0, 2.0))
    norm = partial(nn.GroupNorm, _groups(channels)) if arguments.pop("head_norm", False) else None
    return detection.RetinaNet(
        backbone,
        num_classes=num_classes + 1,
        anchor_generator=anchors,
        head=RetinaNetHead(channels, anchors.num_anchors_per_location()[0], num_classes + 1, norm_layer=norm),
        **arguments,
    )


def _fcos(
    backbone: nn.Module, num_classes: int, channels: int, strides: list[int], arguments: dict[str, Any]
) -> nn.Module:
    norm, convolutions = partial(nn.GroupNorm, _groups(channels)), int(arguments.pop("head_convs", 4))
    # FCOSHead itself insists on 32 groups; its two branches do not.
    head = FCOSHead(32, 1, num_classes + 1, num_convs=1)
    head.classification_head = FCOSClassificationHead(channels, 1, num_classes + 1, convolutions, norm_layer=norm)
    head.regression_head = FCOSRegressionHead(channels, 1, convolutions, norm_layer=norm)
    return detection.FCOS(
        backbone,
        num_classes=num_classes + 1,
        anchor_generator=_anchors(arguments, [(stride,) for stride in strides], (1.0,)),
        head=head,
        **arguments,
    )


def _groups(channels: int) -> int:
    """GroupNorm's usual 32 groups, or fewer where the pyramid is slim (at least 8 channels a group)."""
    groups = min(32, max(1, channels // 8))
    while channels % groups:
        groups -= 1
    return groups


class CascadePredictor(nn.Module):
    """Class scores, and one box for all classes, told once for each of them as other heads tell theirs."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, outputs)
        self.bbox_pred = nn.Linear(channels, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.cls_score(x)
        return scores, self.bbox_pred(x).repeat(1, scores.shape[1])


class CascadeStage(RoIHeads):
    """A later stage of a cascade: the parts of a RoI head."""

    def labelled(
        self, proposals: list[torch.Tensor], targets: list[dict[str, torch.Tensor]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Each box's class, and the deltas to its object, by its own overlap and coder; of all, not a sample."""
        truth = [t["boxes"].to(proposals[0].dtype) for t in targets]
        matched, labels = self.assign_targets_to_proposals(proposals, truth, [t["labels"] for t in targets])
        padded = [b if b.numel() > 0 else torch.zeros((1, 4), dtype=b.dtype, device=b.device) for b in truth]
        return labels, self.box_coder.encode([padded[i][matched[i]] for i in range(len(padded))], proposals)


class CascadeHeads(RoIHeads):
    """Three RoI heads in a row (Cai and Vasconcelos, "Cascade R-CNN", CVPR 2018).

    Each gets the boxes that the one before it has refined, and learns from closer ones; their probabilities are
    averaged. The first stands where a Faster R-CNN has its own; ``later`` are the others.
    """

    _LATER = ((0.6, (20.0, 20.0, 10.0, 10.0), 0.5), (0.7, (30.0, 30.0, 15.0, 15.0), 0.25))  # IoU, coder, loss weight

    def __init__(self, plain: RoIHeads, channels: int, hidden: int, num_classes: int) -> None:
        kept = (plain.score_thresh, plain.nms_thresh, plain.detections_per_img)
        sampling = (plain.fg_bg_sampler.batch_size_per_image, plain.fg_bg_sampler.positive_fraction)
        matching = (plain.proposal_matcher.high_threshold, plain.proposal_matcher.low_threshold)
        first = CascadePredictor(hidden, num_classes + 1)
        super().__init__(
            plain.box_roi_pool, plain.box_head, first, *matching, *sampling, plain.box_coder.weights, *kept
        )
        later = []
        for iou, coder, _ in self._LATER:
            parts = (TwoMLPHead(channels * 7**2, hidden), CascadePredictor(hidden, num_classes + 1))
            later.append(CascadeStage(copy.deepcopy(plain.box_roi_pool), *parts, iou, iou, *sampling, coder, *kept))
        self.later: Any = nn.ModuleList(later)
        self.later_weights = [weight for _, _, weight in self._LATER]
        # The last boxes are read by the first head's coder.
        self.last_to_first = plain.box_coder.weights[0] / self._LATER[-1][1][0]

    def forward(
        self,
        features: dict[str, torch.Tensor],
        proposals: list[torch.Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, torch.Tensor]] | None = None,
    ) -> tuple[list[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
        losses: dict[str, torch.Tensor] = {}
        labels: list[torch.Tensor] = []
        wanted: list[torch.Tensor] = []
        if self.training:
            proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        logits, deltas = self.box_predictor(self.box_head(self.box_roi_pool(features, proposals, image_shapes)))
        probability = logits.softmax(dim=-1)
        if self.training:
            losses["loss_classifier"], losses["loss_box_reg"] = fastrcnn_loss(logits, deltas, labels, wanted)
        boxes = self.box_coder.decode_single(deltas[:, :4], torch.cat(proposals))
        for number, stage in enumerate(self.later):
            counts = [p.shape[0] for p in proposals]
            refined = boxes.detach().split(counts)
            proposals = [clip_boxes_to_image(refined[i], image_shapes[i]) for i in range(len(counts))]
            pooled = stage.box_roi_pool(features, proposals, image_shapes)
            logits, deltas = stage.box_predictor(stage.box_head(pooled))
            probability = probability + logits.softmax(dim=-1)
            if self.training and targets is not None:
                labels, wanted = stage.labelled(proposals, targets)
                scores, sides = fastrcnn_loss(logits, deltas, labels, wanted)
                losses[f"loss_classifier_{number + 2}"] = self.later_weights[number] * scores
                losses[f"loss_box_reg_{number + 2}"] = self.later_weights[number] * sides
            boxes = stage.box_coder.decode_single(deltas[:, :4], torch.cat(proposals))
        found: list[dict[str, torch.Tensor]] = []
        if not self.training:
            mean = (probability / (1 + len(self.later))).log()
            all_boxes, all_scores, all_labels = self.postprocess_detections(
                mean, deltas * self.last_to_first, proposals, image_shapes
            )
            for i in range(len(all_boxes)):
                found.append({"boxes": all_boxes[i], "labels": all_labels[i], "scores": all_scores[i]})
        return found, losses


class NoExtraLevel(ExtraFPNBlock):
    """Keeps the pyramid as it is; BackboneWithFPN adds a max-pooled level when it is given nothing."""

    def forward(
        self, results: list[torch.Tensor], x: list[torch.Tensor], names: list[str]
    ) -> tuple[list[torch.Tensor], list[str]]:
        return results, names


_KINDS = {"torchvision": _named, "composed": _composed}
HEADS = {"faster-rcnn": _faster_rcnn, "cascade-rcnn": _cascade_rcnn, "retinanet": _retinanet, "fcos": _fcos}
