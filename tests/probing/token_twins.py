"""Small twins of detectors whose levels are sequences of tokens, or whose tokens are shaped like maps."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from twins import Body, Queries, TokenDecoder, conv


class Mixer(nn.Module):
    """A transformer's block on a sequence (N, T, C)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(channels), nn.Linear(channels, 3 * channels)
        self.feed = nn.Sequential(nn.LayerNorm(channels), nn.Linear(channels, 20), nn.GELU(), nn.Linear(20, channels))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(self.norm(x)).chunk(3, dim=-1)
        x = x + (q @ k.transpose(1, 2)).softmax(dim=-1) @ v
        return x + self.feed(x)


class SplitMemory(nn.Module):
    """Maps are joined to one sequence that an encoder refines; each level's head reads its slice."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.project = Body(), nn.ModuleList(nn.Conv2d(c, 10, 1) for c in (8, 12, 16))
        self.encoder = Mixer(10)
        self.classes, self.boxes = (nn.ModuleList(nn.Linear(10, n) for _ in range(3)) for n in (5, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        slices = self.slices(x)
        classes = [head(part) for head, part in zip(self.classes, slices, strict=True)]
        return torch.cat(classes, dim=1), torch.cat([b(s) for b, s in zip(self.boxes, slices, strict=True)], dim=1)

    def slices(self, x: Tensor) -> list[Tensor]:
        rows = [p(m).flatten(2).transpose(1, 2) for p, m in zip(self.project, self.body(x), strict=True)]
        return list(self.encoder(torch.cat(rows, dim=1)).split([row.shape[1] for row in rows], dim=1))


class Stages(nn.Module):
    """A hierarchical transformer: linear layers merge the tokens of 2 x 2 cells; no stage is a map."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Sequential(nn.Conv2d(3, 8, 8, stride=8), nn.GroupNorm(1, 8))
        self.blocks = nn.ModuleList(Mixer(c) for c in (8, 12, 16))
        self.merge = nn.ModuleList([nn.Linear(32, 12), nn.Linear(48, 16)])

    def forward(self, x: Tensor) -> list[Tensor]:
        grid = self.patches(x)
        height, width = grid.shape[2], grid.shape[3]
        stages = [self.blocks[0](grid.flatten(2).transpose(1, 2))]
        for merge, block in zip(self.merge, self.blocks[1:], strict=True):
            cells = stages[-1].unflatten(1, (height // 2, 2, width // 2, 2)).permute(0, 1, 3, 2, 4, 5)
            height, width = height // 2, width // 2
            stages.append(block(merge(cells.reshape(1, height * width, -1))))
        return stages


class StridedStages(Stages):
    """The same, where strided slices of a channels-last view are merged, as in Swin's own code."""

    def forward(self, x: Tensor) -> list[Tensor]:
        grid = self.patches(x)
        height, width = grid.shape[2], grid.shape[3]
        stages = [self.blocks[0](grid.flatten(2).transpose(1, 2))]
        for merge, block in zip(self.merge, self.blocks[1:], strict=True):
            cells = stages[-1].view(1, height, width, -1)
            height, width = height // 2, width // 2
            parts = [cells[:, y::2, x::2] for y in (0, 1) for x in (0, 1)]
            stages.append(block(merge(torch.cat(parts, dim=-1).view(1, height * width, -1))))
        return stages


class StageHeads(nn.Module):
    """Every stage's tokens have heads of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = Stages()
        self.classes, self.boxes = (nn.ModuleList(nn.Linear(c, n) for c in (8, 12, 16)) for n in (5, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        stages = self.stages(x)
        classes = [head(stage) for head, stage in zip(self.classes, stages, strict=True)]
        return torch.cat(classes, dim=1), torch.cat([b(s) for b, s in zip(self.boxes, stages, strict=True)], dim=1)


class SharedStageHead(nn.Module):
    """A shared head reads every stage's tokens after a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.stages, self.project = StridedStages(), nn.ModuleList(nn.Linear(c, 10) for c in (8, 12, 16))
        self.tower, self.classes, self.boxes = nn.Linear(10, 10), nn.Linear(10, 5), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        towers = [self.tower(p(s)).relu() for p, s in zip(self.project, self.stages(x), strict=True)]
        classes, boxes = [self.classes(tower) for tower in towers], [self.boxes(tower) for tower in towers]
        return torch.cat(classes, dim=1), torch.cat(boxes, dim=1)


class JoinedStages(nn.Module):
    """The stages are joined, coarse to fine, and an encoder refines them before queries read the whole sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.stages, self.project = Stages(), nn.ModuleList(nn.Linear(c, 10) for c in (8, 12, 16))
        self.encoder, self.queries = Mixer(10), nn.Parameter(torch.randn(1, 7, 10))
        self.classes, self.boxes = nn.Linear(10, 5), nn.Linear(10, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        memory = self.memory(x)
        found = (self.queries @ memory.transpose(1, 2)).softmax(dim=-1) @ memory
        return self.classes(found), self.boxes(found).sigmoid()

    def memory(self, x: Tensor) -> Tensor:
        rows = [project(stage) for project, stage in zip(self.project, self.stages(x), strict=True)]
        return self.encoder(torch.cat(rows[::-1], dim=1))


class KeysLikeAMap(Queries):
    """DAB-DETR-like: the transposed keys of the queries, (1, 1, 12, 16), are shaped like one of the body's maps."""

    def __init__(self) -> None:
        super().__init__()
        self.body.c5 = nn.Sequential(conv(12, 16, 3, 2), conv(16, 16, 3, 2))
        self.queries = nn.Parameter(torch.randn(1, 16, 10))
        self.keys = nn.Linear(10, 12)

    def decode(self, level: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encode(level.flatten(2).transpose(1, 2))
        found = (self.queries @ tokens.transpose(1, 2)).softmax(dim=-1) @ tokens
        keys = self.keys(found).unflatten(2, (1, 12)).permute(0, 2, 3, 1)  # (1, heads, channels, queries)
        found = found + (found[:, None, :, :1] @ keys[:, :, :1]).softmax(dim=-1)[:, 0] @ found
        return self.classes(found), self.boxes(found).sigmoid()


class StatisticsLikeAMap(TokenDecoder):
    """D-FINE-like: the box sides' statistics of each query, (1, 9, 6, 8), are shaped like the coarsest map."""

    def __init__(self) -> None:
        super().__init__()
        self.sides, self.quality = nn.Linear(12, 6 * 20), nn.Linear(6 * 8, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.tokens(x)
        found = tokens[:, tokens.mean(dim=-1).topk(9).indices[0]]
        sides = self.sides(found).unflatten(2, (6, 20)).softmax(dim=-1)
        statistics = torch.cat([sides.topk(7, dim=-1).values, sides.mean(dim=-1, keepdim=True)], dim=-1)
        return self.quality(statistics.flatten(2)), self.boxes(found).sigmoid()
