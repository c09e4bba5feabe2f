"""Detectors as a user may write them, called like torchvision's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, smooth_l1_loss
from torchvision.models.detection import FCOS
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from twins import TopDown, conv

from gdetkd_cli.adapter import TrainableModule

STRIDES = (8, 16, 32)


class Own(nn.Module):
    """One class score and one box per cell of three levels; all images of a batch have one size."""

    def __init__(self, classes: int = 9) -> None:
        super().__init__()
        self.neck = TopDown()
        self.tower, self.classes, self.boxes = conv(16, 16), nn.Conv2d(16, classes + 1, 1), nn.Conv2d(16, 4, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        scores, boxes = [], []
        for level, stride in zip(self.neck(torch.stack(images) - 0.5), STRIDES, strict=True):
            hidden = self.tower(level)
            scores.append(self.classes(hidden).flatten(2).transpose(1, 2))
            y, x = torch.meshgrid(*(torch.arange(n) * stride + 0.5 for n in level.shape[-2:]), indexing="ij")
            sides = self.boxes(hidden).flatten(2).transpose(1, 2).exp() * stride
            at = torch.stack([x, y, x, y], dim=-1).flatten(0, 1).to(sides)
            boxes.append(at + sides * sides.new_tensor([-1, -1, 1, 1]))
        score, box = torch.cat(scores, dim=1), torch.cat(boxes, dim=1)
        if not self.training:
            best, labels = score.softmax(dim=2)[..., 1:].max(dim=2)
            return [{"boxes": b, "scores": s, "labels": k + 1} for b, s, k in zip(box, best, labels, strict=True)]
        assert targets is not None
        wanted = torch.zeros(score.shape[:2], dtype=torch.int64, device=score.device)
        wanted[:, 0] = torch.tensor([t["labels"][0] if len(t["labels"]) else 0 for t in targets])
        pairs = zip(targets, box, strict=True)
        near = torch.stack([t["boxes"][0] if len(t["boxes"]) else b[0].detach() for t, b in pairs])
        return {"class": cross_entropy(score.flatten(0, 1), wanted.flatten()), "box": smooth_l1_loss(box[:, 0], near)}


def own(classes: int = 9) -> nn.Module:
    return Own(classes)


def fcos(classes: int = 9) -> nn.Module:
    """torchvision's own class, built directly."""
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, trainable_layers=5)
    return FCOS(backbone, num_classes=1 + classes, min_size=64, max_size=64)


class Stated(TrainableModule):
    """A network with another call, whose losses and detections are stated."""

    def __init__(self) -> None:
        super().__init__(divisor=32)
        self.net = Own()

    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return self.net(list(images), targets)

    def detect(self, images: Tensor) -> list[dict[str, Tensor]]:
        return self.net(list(images))


def stated() -> nn.Module:
    return Stated()


class Vectors(Stated):
    def losses(self, images: Tensor, targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {"class": self.net(list(images), targets)["class"], "box": images.new_ones(4)}


def vectors() -> nn.Module:
    return Vectors()


class OtherTargets(Own):
    """Expects its targets in another form."""

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        return super().forward(images) if targets is None else super().forward(images, targets["boxes"])


def other_targets() -> nn.Module:
    return OtherTargets()


class Bare(nn.Module):
    """Has no losses."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = TopDown()
        self.tower = conv(16, 4)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [self.tower(level) for level in self.neck(images)]


class ChannelsLast(Bare):
    """Normalises the neck's maps with their channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in STRIDES)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = zip(self.norms, self.neck(images), strict=True)
        return [self.tower(norm(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)) for norm, level in maps]


def channels_last() -> nn.Module:
    return ChannelsLast()


def bare() -> nn.Module:
    return Bare()


def fails() -> nn.Module:
    raise KeyError("weights")


def nothing() -> str:
    return "nothing"
