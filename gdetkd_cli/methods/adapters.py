"""Adapters and the running normalizer of the teacher's features, which several methods train beside the student.

They are never exported. Shapes: R regions, C channels, C_s and C_t those of student and teacher, h x w cells."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gdetkd_cli.methods.processes import sum_over_processes


def build_adapter(student_channels: int, teacher_channels: int, identity: bool) -> nn.Conv2d:
    """Builds f_adapt, a 1x1 convolution; ``identity`` starts it as the identity, for equal channels."""
    adapter = nn.Conv2d(student_channels, teacher_channels, 1)
    if identity:
        assert adapter.bias is not None
        nn.init.dirac_(adapter.weight)
        nn.init.zeros_(adapter.bias)
    return adapter


def fold_affine(adapter: nn.Module, affine: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Folds ``affine``, applied first, into the adapter: weight (C_t, C_s, 1, 1) and bias (C_t,)."""
    assert isinstance(adapter, nn.Conv2d) and adapter.bias is not None
    if affine is None:
        return adapter.weight, adapter.bias
    scale, shift = (value.expand(adapter.in_channels) for value in affine)
    return adapter.weight * scale[:, None, None], adapter.bias + adapter.weight[:, :, 0, 0] @ shift


class RunningNormalizer(nn.Module):
    """Standardises teacher features to mean 0 and standard deviation 1, with running statistics.

    The scale of features differs by orders of magnitude between teachers; after this, one default weight fits all.
    The statistics average all batches equally at first and move slowly later; they are saved with the run.

    Args:
        channels: C_t.
        per_channel: one mean and deviation per channel, or one for all channels.
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
        # Counted per channel, since a batch may have no values of a channel.
        self.register_buffer("updates", torch.zeros(size, dtype=torch.int64))

    @torch.no_grad()
    def update(self, features: Tensor, channels: Tensor | None = None, inside: Tensor | None = None) -> None:
        """Adds (R, C, h, w) to the statistics; channels without values in the batch (all, for R = 0) do not change.

        Every process must call this at every step, even with R = 0: their sums are added.

        Args:
            features: (R, C, h, w).
            channels: (R,) how many of the C channels a region has; the others are padded with zeros. None: all.
            inside: (R, h, w) bool, the cells to use. None: all.
        """
        values, cells = features.float(), features.shape[2] * features.shape[3]
        present = _mask_padding(features, channels)
        count = present.sum(dim=0) * cells  # (C,)
        if inside is not None:
            values = values * inside[:, None]
            count = (present * inside.sum(dim=(1, 2))[:, None]).sum(dim=0)
        total, squares = values.sum(dim=(0, 2, 3)), values.square().sum(dim=(0, 2, 3))  # (C,): padding adds nothing
        if not self.per_channel:
            count, total, squares = count.sum(0, True), total.sum(0, True), squares.sum(0, True)
        count, total, squares = sum_over_processes(torch.stack([count.float(), total, squares]))
        updated = count > 0
        self.updates += updated
        rate = updated * (1.0 / self.updates.clamp(min=1)).clamp(min=0.002)
        self.mean.lerp_(total / count.clamp(min=1), rate)
        self.square.lerp_(squares / count.clamp(min=1), rate)

    def forward(self, features: Tensor, channels: Tensor | None = None) -> Tensor:
        """Standardises (R, C, h, w); padded ``channels`` stay 0."""
        scale, shift = self.affine()
        standardised = torch.addcmul(shift[:, None, None], features, scale[:, None, None])
        return standardised if channels is None else standardised * _mask_padding(features, channels)[:, :, None, None]

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, (C,) or (1,): standardised = features * scale + shift."""
        deviation = (self.square - self.mean.square()).clamp(min=0).sqrt()
        # A constant channel carries no information; division by its deviation would amplify noise.
        floor = 1e-3 * self.square.mean().sqrt() + 1e-12
        scale = 1 / deviation.clamp(min=floor)
        return scale, -self.mean * scale


def _mask_padding(features: Tensor, channels: Tensor | None) -> Tensor:
    """(R, C) bool: True for a region's own channels, False for padding."""
    if channels is None:
        return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    return torch.arange(features.shape[1], device=features.device) < channels[:, None]
