"""Small twins of common detectors, reduced to the structure that matters for probing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.SiLU()]
    return nn.Sequential(*layers)


class Body(nn.Module):
    """Maps of stride 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, 8, 7, 2), nn.MaxPool2d(3, 2, 1))
        self.c3, self.c4, self.c5 = conv(8, 8, 3, 2), conv(8, 12, 3, 2), conv(12, 16, 3, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        c3 = self.c3(self.stem(x))
        c4 = self.c4(c3)
        return c3, c4, self.c5(c4)


class TopDown(nn.Module):
    """An FPN; its three levels are the outputs of ``out3``, ``out4``, ``out5``."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.in3, self.in4, self.in5 = (nn.Conv2d(c, 16, 1) for c in (8, 12, 16))
        self.out3, self.out4, self.out5 = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> list[Tensor]:
        c3, c4, c5 = self.body(x)
        p5 = self.in5(c5)
        p4 = self.in4(c4) + interpolate(p5, size=c4.shape[-2:], mode="nearest")
        p3 = self.in3(c3) + interpolate(p4, size=c3.shape[-2:], mode="nearest")
        return [self.out3(p3), self.out4(p4), self.out5(p5)]


class SharedHead(nn.Module):
    """RetinaNet-like: one head reads every level."""

    def __init__(self) -> None:
        super().__init__()
        self.neck = TopDown()
        self.tower, self.classes, self.boxes = conv(16, 16), nn.Conv2d(16, 6, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = []
        for level in self.neck(x):
            hidden = self.tower(level)
            flat.append(torch.cat([self.classes(hidden), self.boxes(hidden)], dim=1).flatten(2))
        return torch.cat(flat, dim=2)


class Split(nn.Module):
    """Splits, convolves and concatenates, like the blocks of YOLO's neck."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first, self.inner, self.last = (
            conv(inputs, outputs, 1),
            conv(outputs, outputs),
            conv(2 * outputs, outputs, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        return self.last(torch.cat([y, self.inner(y)], dim=1))


class TwoWay(nn.Module):
    """YOLO-like: a top-down and a bottom-up path, and one head per level."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.up4, self.up3 = Split(28, 12), Split(20, 8)
        self.down3, self.down4 = conv(8, 8, 3, 2), conv(12, 12, 3, 2)
        self.n4, self.n5 = Split(20, 12), Split(28, 16)
        self.classes = nn.ModuleList(nn.Sequential(conv(c, 8), nn.Conv2d(8, 5, 1)) for c in (8, 12, 16))
        self.boxes = nn.ModuleList(nn.Sequential(conv(c, 8), nn.Conv2d(8, 4, 1)) for c in (8, 12, 16))

    def levels(self, x: Tensor) -> list[Tensor]:
        c3, c4, c5 = self.body(x)
        p4 = self.up4(torch.cat([interpolate(c5, scale_factor=2.0), c4], dim=1))
        n3 = self.up3(torch.cat([interpolate(p4, scale_factor=2.0), c3], dim=1))
        n4 = self.n4(torch.cat([self.down3(n3), p4], dim=1))
        n5 = self.n5(torch.cat([self.down4(n4), c5], dim=1))
        return [n3, n4, n5]

    def forward(self, x: Tensor) -> Tensor:
        flat = []
        for level, classes, boxes in zip(self.levels(x), self.classes, self.boxes):  # noqa: B905  # TorchScript does not support strict
            flat.append(torch.cat([boxes(level), classes(level).sigmoid()], dim=1).flatten(2))
        return torch.cat(flat, dim=2)


class Stems(nn.Module):
    """YOLOX-like: the head is a module that begins with one convolution per level."""

    def __init__(self) -> None:
        super().__init__()
        self.neck, self.head = TwoWay(), StemHead((8, 12, 16))
        self.neck.classes, self.neck.boxes = nn.ModuleList(), nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck.levels(x))


class Smoothed(nn.Module):
    """The neck, not the head, ends with one convolution per level."""

    def __init__(self) -> None:
        super().__init__()
        self.neck, self.head = TopDown(), StemHead((6, 6, 6))
        self.neck.out3, self.neck.out4, self.neck.out5 = (nn.Conv2d(16, 6, 3, padding=1) for _ in range(3))
        self.head.stems = nn.ModuleList(nn.Identity() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.neck(x))


class StemHead(nn.Module):
    """A stem, and two branches, by level."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.stems = nn.ModuleList(conv(c, 6, 1) for c in channels)
        self.class_towers, self.box_towers = (nn.ModuleList(conv(6, 6) for _ in channels) for _ in range(2))
        self.classes = nn.ModuleList(nn.Conv2d(6, 5, 1) for _ in channels)
        self.boxes = nn.ModuleList(nn.Conv2d(6, 4, 1) for _ in channels)

    def forward(self, levels: list[Tensor]) -> Tensor:
        flat = []
        for i, level in enumerate(levels):
            x = self.stems[i](level)
            classes, boxes = self.classes[i](self.class_towers[i](x)), self.boxes[i](self.box_towers[i](x))
            flat.append(torch.cat([boxes, classes.sigmoid()], dim=1).flatten(2))
        return torch.cat(flat, dim=2)


class OneConvolutionHeads(TwoWay):
    """Like older YOLOs: each level's head is one convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.all = nn.ModuleList(nn.Conv2d(c, 9, 1) for c in (8, 12, 16))

    def forward(self, x: Tensor) -> Tensor:
        flat = []
        for level, head in zip(self.levels(x), self.all):  # noqa: B905  # TorchScript does not support strict
            flat.append(head(level).flatten(2).sigmoid())
        return torch.cat(flat, dim=2)


class NoNeck(nn.Module):
    """SSD-like: the body's own maps are the levels."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.classes = nn.ModuleList(nn.Conv2d(c, 5, 3, padding=1) for c in (8, 12, 16))
        self.boxes = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (8, 12, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores, deltas = [], []
        for level, classes, boxes in zip(self.body(x), self.classes, self.boxes):  # noqa: B905  # TorchScript does not support strict
            scores.append(classes(level).flatten(2))
            deltas.append(boxes(level).flatten(2))
        return torch.cat(scores, dim=2), torch.cat(deltas, dim=2)


class OneLevel(nn.Module):
    """A detector on one map."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes, self.boxes = Body(), nn.Conv2d(16, 5, 1), nn.Conv2d(16, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        level = self.body(x)[2]
        return self.classes(level).flatten(2), self.boxes(level).flatten(2)


class Unused(OneLevel):
    """CenterNet-like: the body also computes maps that no result depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Conv2d(12, 6, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        _, c4, level = self.body(x)
        self.project(c4.relu())
        return self.classes(level).flatten(2), self.boxes(level).flatten(2)


class Queries(nn.Module):
    """DETR-like: one map, projected, is decoded as tokens by queries."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.project = Body(), nn.Conv2d(16, 10, 1)
        self.queries = nn.Parameter(torch.randn(1, 7, 10))
        self.encode, self.classes, self.boxes = nn.Linear(10, 10), nn.Linear(10, 5), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.decode(self.project(self.body(x)[2]))

    def decode(self, level: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encode(level.flatten(2).transpose(1, 2))
        weights = (self.queries @ tokens.transpose(1, 2)).softmax(dim=-1)
        found = weights @ tokens
        return self.classes(found), self.boxes(found).sigmoid()


class PlainTransformer(Queries):
    """RF-DETR-like: patches are tokens until they become a map before the projection and a channel norm."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Conv2d(3, 16, 16, stride=16), nn.LayerNorm(10)
        self.block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        patches = self.body(x)
        tokens = patches.flatten(2).transpose(1, 2)
        tokens = tokens + self.block(tokens)
        level = self.project(tokens.transpose(1, 2).reshape(patches.shape))
        return self.decode(self.norm(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


class TokensAlone(nn.Module):
    """YOLOS-like: patches stay tokens to the end, between tokens of the image and of the detections."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 12, 16, stride=16)
        self.before, self.after = nn.Parameter(torch.randn(1, 2, 12)), nn.Parameter(torch.randn(1, 7, 12))
        self.positions = nn.Parameter(torch.randn(1, 2 + 12 * 16 + 7, 12))
        self.block = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.norm, self.classes, self.boxes = nn.LayerNorm(12), nn.Linear(12, 6), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = self.tokens(x)[:, -7:]
        return self.classes(found), self.boxes(found).sigmoid()

    def tokens(self, x: Tensor) -> Tensor:
        patches = self.patches(x).flatten(2).transpose(1, 2)
        rows = x.shape[0]
        before, after = self.before.expand(rows, -1, -1), self.after.expand(rows, -1, -1)
        tokens = torch.cat([before, patches, after], dim=1) + self.positions
        tokens = tokens + (tokens @ tokens.transpose(1, 2)).softmax(dim=-1) @ tokens
        return self.norm(tokens + self.block(tokens))


class Functional(nn.Module):
    """No submodules at all: parameters and functions."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(o, i, 3, 3)) for i, o in ((3, 6), (6, 8), (8, 10))])
        self.head = nn.ParameterList([nn.Parameter(torch.randn(4, c, 1, 1)) for c in (8, 10)])

    def forward(self, x: Tensor) -> Tensor:
        a = torch.conv2d(x, self.weights[0], None, [4, 4], [1, 1]).relu()
        b = torch.conv2d(a, self.weights[1], None, [2, 2], [1, 1]).relu()
        c = torch.conv2d(b, self.weights[2], None, [2, 2], [1, 1]).relu()
        outputs = [torch.conv2d(level, head).flatten(2) for level, head in zip([b, c], self.head)]  # noqa: B905  # TorchScript does not support strict
        return torch.cat(outputs, dim=2)


class Tokens(nn.Module):
    """RT-DETR-like: tokens in the middle of the neck, projections before a decoder, scores shaped like a small map."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.encoder = nn.Linear(16, 16)
        self.fuse = Split(28, 12)
        self.project = nn.ModuleList(nn.Sequential(nn.Conv2d(c, 8, 1, bias=False), nn.BatchNorm2d(8)) for c in (12, 16))
        self.scores = nn.Linear(8, 35)

    def forward(self, x: Tensor) -> Tensor:
        _, c4, c5 = self.body(x)
        height, width = c5.shape[2], c5.shape[3]
        p5 = self.encoder(c5.flatten(2).transpose(1, 2)).relu().transpose(1, 2).reshape(-1, 16, height, width)
        p4 = self.fuse(torch.cat([interpolate(p5, size=(height * 2, width * 2)), c4], dim=1))
        projected = [project(level).flatten(2) for level, project in zip([p4, p5], self.project, strict=True)]
        found = torch.cat(projected, dim=2).transpose(1, 2)[:, :30]
        return self.scores(found).view(1, 30, 5, 7).softmax(dim=-1)


class DownToOneCell(nn.Module):
    """SSD-like down to one cell, with squeeze-and-excitation; stacked maps are summed as in EfficientDet."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.squeeze = nn.Conv2d(16, 16, 1)
        self.weights = nn.Parameter(torch.tensor([0.3, 0.7]))
        self.last = nn.Sequential(nn.Conv2d(16, 8, (6, 8)), nn.ReLU())
        self.classes = nn.ModuleList(nn.Conv2d(c, 5, 3, padding=1) for c in (16, 8))
        self.boxes = nn.ModuleList(nn.Conv2d(c, 4, 3, padding=1) for c in (16, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        c5 = self.body(x)[2]
        gated = c5 * self.squeeze(c5.mean(dim=(2, 3), keepdim=True)).sigmoid()
        fine = (torch.stack([c5, gated], dim=-1) * self.weights).sum(dim=-1)
        scores, deltas = [], []
        for level, classes, boxes in zip([fine, self.last(fine)], self.classes, self.boxes, strict=True):
            scores.append(classes(level).view(1, 5, 1, level.shape[2], level.shape[3]).flatten(3))
            deltas.append(boxes(level).view(1, 4, 1, level.shape[2], level.shape[3]).flatten(3))
        return torch.cat(scores, dim=3), torch.cat(deltas, dim=3)


class PatchMerging(nn.Module):
    """Swin-like: channels last; each coarser map comes from 2 x 2 patches of the finer one; a shared head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 8, stride=8)
        self.merge = nn.ModuleList([nn.Linear(32, 16), nn.Linear(64, 32)])
        self.lateral = nn.ModuleList(nn.Conv2d(c, 12, 1) for c in (8, 16, 32))
        self.head = SharedTower(12)

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = [self.stem(x).permute(0, 2, 3, 1)]
        for merge in self.merge:
            n, height, width, channels = maps[-1].shape
            patches = maps[-1].reshape(n, height // 2, 2, width // 2, 2, channels).permute(0, 1, 3, 4, 2, 5).flatten(3)
            maps.append(merge(patches))
        return [self.head(lateral(m.permute(0, 3, 1, 2))) for lateral, m in zip(self.lateral, maps, strict=True)]


class SharedTower(nn.Module):
    """One head for every level."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.tower, self.out = conv(channels, 16), nn.Conv2d(16, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.tower(x)).flatten(2)


class TokenDecoder(nn.Module):
    """D-FINE-like: the neck's maps are decoded as tokens; each coarser map also reads the finer one."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()
        self.project, self.classes, self.boxes = nn.Linear(12, 12), nn.Linear(12, 5), nn.Linear(12, 4)
        self.equal = nn.ModuleList(nn.Conv2d(c, 12, 1) for c in (8, 12, 16))
        self.mix = nn.ModuleList(conv(12, 12, 3, 2) for _ in range(2))

    def tokens(self, x: Tensor) -> Tensor:
        c3, c4, c5 = self.body(x)
        maps = [self.equal[0](c3)]
        maps.append(self.equal[1](c4) + self.mix[0](maps[0]))
        maps.append(self.equal[2](c5) + self.mix[1](maps[1]))
        return self.project(torch.cat([m.flatten(2).transpose(1, 2) for m in maps], dim=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tokens(x)
        return self.classes(tokens), self.boxes(tokens)
