"""The trainable parts that distillation adds beside the student. None of them is ever exported.

Shapes: R regions, L levels, C_s and C_t channels of student and teacher, E embedding channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from gdetkd_cli.losses.sgfi import level_attention, unit


class LevelMatcher(nn.Module):
    """f_adapt, f_embed and tau of SGFI: aggregates a student's levels into what the teacher's feature should be.

    f_adapt is linear and 1x1, so it commutes with the weighted sum over levels (whose weights sum to 1) and folds into
    the embedding's first convolution: it runs once per region, not once per level, and that convolution reads C_s
    channels. The result is the same as adapting every level first.

    Args:
        student_channels: C_s of each level; levels with equal channels share one adapter.
        teacher_channels: C_t.
        embed_channels: E.
        identity: start f_adapt as the identity (all channels must be equal): for a student that got the teacher's
            head, whose features have to become the teacher's own, not a linear map of them.
        initial_tau: temperature of the match at the start.
        cosine: match by the angle between embeddings, not by their product, whose size nothing limits.
    """

    def __init__(
        self,
        *,
        student_channels: Sequence[int],
        teacher_channels: int,
        embed_channels: int,
        identity: bool = False,
        initial_tau: float = 1.0,
        cosine: bool = True,
    ) -> None:
        super().__init__()
        self.cosine = cosine
        self.shared = len(set(student_channels)) == 1
        adapters = [student_channels[0]] if self.shared else list(student_channels)
        self.adapters = nn.ModuleList(new_adapter(channels, teacher_channels, identity) for channels in adapters)
        self.embed_in = nn.Conv2d(teacher_channels, embed_channels, 3, stride=2)  # 7 -> 3
        self.embed_out = nn.Conv2d(embed_channels, embed_channels, 3, stride=2)  # 3 -> 1
        # Learnt as its logarithm, so that tau stays positive.
        self.log_tau = nn.Parameter(torch.tensor(math.log(initial_tau)))

    def forward(
        self,
        levels: Sequence[Tensor],
        target: Tensor,
        affine: tuple[Tensor, Tensor] | None = None,
        prior: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Aggregates.

        Args:
            levels: L tensors (R, C_s, 7, 7), the student's features of each region on every level.
            target: (R, C_t, 7, 7), the teacher's.
            affine: scale and shift, (C_s,) or (1,), that the levels get first; they fold into the adapters.
            prior: (R, L) logits that the match starts from, or none.

        Returns:
            The aggregate (R, C_t, 7, 7) and the weights of the levels (R, L).
        """
        query = self.embed_out(self.embed_in(target).relu()).flatten(1)  # (R, E)
        adapters = [folded(adapter, affine) for adapter in self.adapters]
        convolutions = [self._first_of_keys(*adapter) for adapter in adapters]
        if self.shared:
            adapters, convolutions = adapters * len(levels), convolutions * len(levels)
        # Level by level: together they leave a CPU's cache, which costs more than the few calls saved.
        hidden = torch.stack(
            [conv2d(level, *composed, stride=2) for level, composed in zip(levels, convolutions, strict=True)], dim=1
        )
        keys = self.embed_out(hidden.flatten(0, 1).relu()).flatten(1).unflatten(0, hidden.shape[:2])  # (R, L, E)
        if self.cosine:
            keys, query = unit(keys), unit(query)
        weights = level_attention(keys, query, self.log_tau.exp(), prior)
        if self.shared:
            return conv2d(_weighted_sum(levels, weights), *adapters[0]), weights
        adapted = [conv2d(level, *adapter) for level, adapter in zip(levels, adapters, strict=True)]
        return _weighted_sum(adapted, weights), weights

    def _first_of_keys(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The embedding's first convolution after the adapter, as one: weight (E, C_s, 3, 3) and bias (E,)."""
        assert self.embed_in.bias is not None
        kernel = torch.einsum("etij,ts->esij", self.embed_in.weight, weight[:, :, 0, 0])
        return kernel, self.embed_in.bias + torch.einsum("etij,t->e", self.embed_in.weight, bias)


def _weighted_sum(levels: Sequence[Tensor], weights: Tensor) -> Tensor:
    """L maps (R, C, 7, 7) and weights (R, L) -> (R, C, 7, 7)."""
    first, *others = weights[:, :, None, None, None].unbind(1)
    total = levels[0] * first
    for level, weight in zip(levels[1:], others, strict=True):
        total = torch.addcmul(total, level, weight)
    return total


def folded(adapter: nn.Module, affine: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Weight (C_t, C_s, 1, 1) and bias (C_t,) of the adapter after ``affine``."""
    assert isinstance(adapter, nn.Conv2d) and adapter.bias is not None
    if affine is None:
        return adapter.weight, adapter.bias
    scale, shift = (value.expand(adapter.in_channels) for value in affine)
    return adapter.weight * scale[:, None, None], adapter.bias + adapter.weight[:, :, 0, 0] @ shift


def new_adapter(student_channels: int, teacher_channels: int, identity: bool) -> nn.Conv2d:
    """A fresh f_adapt, 1x1; the identity where the channels are the same space."""
    adapter = nn.Conv2d(student_channels, teacher_channels, 1)
    if identity:
        assert adapter.bias is not None
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    return adapter


class Standardizer(nn.Module):
    """Brings teacher features to mean 0 and standard deviation 1, with statistics that are learnt while running.

    The scale of features differs by orders of magnitude between teachers; standardised, one default weight fits all.
    The statistics average every batch alike at first, and move slowly later; they are saved with the run.

    Args:
        channels: C_t.
        per_channel: one mean and deviation for each channel, or one for all.
    """

    mean: Tensor
    square: Tensor
    updates: Tensor

    def __init__(self, *, channels: int, per_channel: bool) -> None:
        super().__init__()
        size = channels if per_channel else 1
        self.per_channel = per_channel
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("square", torch.ones(size))  # mean of the squares
        # Updates of each, since a batch may have nothing of a channel.
        self.register_buffer("updates", torch.zeros(size, dtype=torch.int64))

    @torch.no_grad()
    def update(self, features: Tensor, channels: Tensor | None = None, inside: Tensor | None = None) -> None:
        """Takes (R, C, h, w) into the statistics; what the batch has nothing of (everything, for R = 0) stays.

        Args:
            features: (R, C, h, w).
            channels: (R,) how many of the C channels a region has; the others are padded with zeros. None: all.
            inside: (R, h, w) bool, the cells that count. None: all.
        """
        values, cells = features.float(), features.shape[2] * features.shape[3]
        present = _present(features, channels)
        count = present.sum(dim=0) * cells  # (C,)
        if inside is not None:
            values = values * inside[:, None]
            count = (present * inside.sum(dim=(1, 2))[:, None]).sum(dim=0)
        total, squares = values.sum(dim=(0, 2, 3)), values.square().sum(dim=(0, 2, 3))  # (C,): padding adds nothing
        if not self.per_channel:
            count, total, squares = count.sum(0, True), total.sum(0, True), squares.sum(0, True)
        seen = count > 0
        self.updates += seen
        rate = seen * (1.0 / self.updates.clamp(min=1)).clamp(min=0.002)
        self.mean.lerp_(total / count.clamp(min=1), rate)
        self.square.lerp_(squares / count.clamp(min=1), rate)

    def forward(self, features: Tensor, channels: Tensor | None = None) -> Tensor:
        """(R, C, h, w) -> the same, standardised; padded ``channels`` stay 0."""
        scale, shift = self.affine()
        standardised = torch.addcmul(shift[:, None, None], features, scale[:, None, None])
        return standardised if channels is None else standardised * _present(features, channels)[:, :, None, None]

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, (C,) or (1,): standardised = features * scale + shift."""
        deviation = (self.square - self.mean.square()).clamp(min=0).sqrt()
        # A channel that is silent in this teacher carries nothing; dividing by its deviation would amplify noise.
        floor = 1e-3 * self.square.mean().sqrt() + 1e-12
        scale = 1 / deviation.clamp(min=floor)
        return scale, -self.mean * scale


def _present(features: Tensor, channels: Tensor | None) -> Tensor:
    """(R, C) bool: the channels that a region has, and that are not padding."""
    if channels is None:
        return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    return torch.arange(features.shape[1], device=features.device) < channels[:, None]
