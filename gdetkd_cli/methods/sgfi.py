"""Semantic-guided feature imitation (SGFI; G-DetKD, arXiv 2108.07482).

A region's teacher feature is compared with a weighted sum of the student's features from every level. Matching
embeddings gives the weights.

Shapes: R regions, L levels, C_s and C_t channels of student and teacher, E channels of the matching embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence
from math import log2
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, mse_loss, normalize

from gdetkd_cli.detectors.pooling import pool_all_levels
from gdetkd_cli.detectors.protocol import View
from gdetkd_cli.host import copy_numbers
from gdetkd_cli.methods.adapters import RunningNormalizer, build_adapter, fold_affine
from gdetkd_cli.methods.base import Detectors, ObservedPair
from gdetkd_cli.structures import Pyramid

_LEAST_NORM = 1e-3  # of an embedding; the gradient of the direction of a shorter one would explode


# ------------------------------------------------------------------------------------------------------ equations


def level_attention(keys: Tensor, queries: Tensor, tau: Tensor, prior: Tensor | None = None) -> Tensor:
    """a_i = softmax over levels of <k_il, q_i> / tau + prior_il.

    Args:
        keys: (R, L, E) embeddings of the student's region features on each level.
        queries: (R, E) embeddings of the teacher's region features.
        tau: positive scalar.
        prior: (R, L) logits added to the match; None: no prior, as in the paper.

    Returns:
        (R, L); the weights of a region sum to 1.
    """
    logits = (keys * queries[:, None]).sum(dim=2) / tau
    return (logits if prior is None else logits + prior).softmax(dim=1)


def scale_to_unit(embedding: Tensor) -> Tensor:
    """Scales (..., E) to length 1, so that <k_il, q_i> is the cosine between them."""
    return normalize(embedding, dim=-1, eps=_LEAST_NORM)


def level_prior(octaves: Tensor, centre: Tensor, strength: float) -> Tensor:
    """prior_il = -strength (octaves_il - centre_i)^2: penalises a level by its distance in octaves.

    Args:
        octaves: (R, L) log2 of the stride of each student level, in pixels of the region's image.
        centre: (R,) log2 of the stride that the prior favours for each region.
        strength: 0 favours no level.

    Returns:
        (R, L) logits.
    """
    return -strength * (octaves - centre[:, None]).square()


def imitation_loss(imitation: Tensor, target: Tensor, channels: Tensor | None = None) -> Tensor:
    """L_sgfi = mean_i MSE(sum_l a_il A_il, T_i); 0 with a gradient path if there are no regions.

    Args:
        imitation: (R, C_t, 7, 7) the student's aggregate.
        target: (R, C_t, 7, 7) the teacher's features.
        channels: (R,) how many of the C_t channels a region's target has, if levels differ in channels and are padded
            with zeros; None: all.
    """
    if channels is None:
        return mse_loss(imitation, target.detach()) if len(imitation) else imitation.sum() * 0.0
    error = (imitation - target.detach()).square()
    valid = (torch.arange(error.shape[1], device=error.device) < channels[:, None])[:, :, None, None]
    cells = error.shape[2] * error.shape[3]
    per_region = (error * valid).sum(dim=(1, 2, 3)) / (channels * cells)
    return per_region.mean() if len(error) else imitation.sum() * 0.0


# ------------------------------------------------------------------------------------------------------- the term


class LevelMatcher(nn.Module):
    """f_adapt, f_embed and tau of SGFI: aggregates a student's levels to imitate the teacher's feature.

    f_adapt is linear and 1x1, so it commutes with the weighted sum over levels (the weights sum to 1) and folds into
    the embedding's first convolution. It runs once per region instead of once per level, and that convolution reads
    C_s channels. The result equals adapting every level first.

    Args:
        student_channels: C_s of each level; if all are equal, the levels share one adapter.
        teacher_channels: C_t.
        embed_channels: E.
        identity: start f_adapt as the identity (all channels must be equal); see ``Detectors.same_space``.
        initial_tau: temperature of the match at the start.
        cosine: match by the angle between embeddings, not by their product, which is unbounded.
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
        self.adapters = nn.ModuleList(build_adapter(channels, teacher_channels, identity) for channels in adapters)
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
            affine: scale and shift, (C_s,) or (1,), applied to the levels first; they fold into the adapters.
            prior: (R, L) logits added to the match, or None.

        Returns:
            The aggregate (R, C_t, 7, 7) and the weights of the levels (R, L).
        """
        query = self.embed_out(self.embed_in(target).relu()).flatten(1)  # (R, E)
        adapters = [fold_affine(adapter, affine) for adapter in self.adapters]
        convolutions = [self._fold_adapter(*adapter) for adapter in adapters]
        if self.shared:
            adapters, convolutions = adapters * len(levels), convolutions * len(levels)
        # Level by level, because all levels together do not fit into a CPU's cache.
        hidden = torch.stack(
            [conv2d(level, *composed, stride=2) for level, composed in zip(levels, convolutions, strict=True)], dim=1
        )
        keys = self.embed_out(hidden.flatten(0, 1).relu()).flatten(1).unflatten(0, hidden.shape[:2])  # (R, L, E)
        if self.cosine:
            keys, query = scale_to_unit(keys), scale_to_unit(query)
        weights = level_attention(keys, query, self.log_tau.exp(), prior)
        if self.shared:
            return conv2d(_sum_levels(levels, weights), *adapters[0]), weights
        adapted = [conv2d(level, *adapter) for level, adapter in zip(levels, adapters, strict=True)]
        return _sum_levels(adapted, weights), weights

    def _fold_adapter(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Folds an adapter into the embedding's first convolution: weight (E, C_s, 3, 3) and bias (E,)."""
        assert self.embed_in.bias is not None
        kernel = torch.einsum("etij,ts->esij", self.embed_in.weight, weight[:, :, 0, 0])
        return kernel, self.embed_in.bias + torch.einsum("etij,t->e", self.embed_in.weight, bias)


def _sum_levels(levels: Sequence[Tensor], weights: Tensor) -> Tensor:
    """L maps (R, C, 7, 7) and weights (R, L) -> (R, C, 7, 7)."""
    first, *others = weights[:, :, None, None, None].unbind(1)
    total = levels[0] * first
    for level, weight in zip(levels[1:], others, strict=True):
        total = torch.addcmul(total, level, weight)
    return total


class SGFITerm(nn.Module):
    """Semantic-guided feature imitation.

    Args:
        student_channels: channels of each student level.
        teacher_channels: C_t of the teacher's pooled features.
        embed_channels: E.
        initial_tau: temperature of the match at the start.
        cosine: match levels by the angle between embeddings, or by their product (the paper).
        normalize: standardise the target per ``channel``, as one ``scalar``, or not (``none``).
        prior: how much the match favours the student levels near ``centre``; 0: not at all (the paper).
        centre: whose assigned level of a region gives the favoured stride.
        sampling_ratio: RoIAlign samples per bin and axis on the student's levels.
        same_space: see ``Detectors``; the levels get the teacher's statistics and f_adapt starts as the identity.
    """

    student_needs: frozenset[View]
    teacher_needs: frozenset[View]

    def __init__(
        self,
        *,
        student_channels: Sequence[int],
        teacher_channels: int,
        embed_channels: int,
        prior: float,
        centre: Literal["teacher", "student"] = "student",
        cosine: bool = True,
        initial_tau: float = 1.0,
        normalize: str,
        sampling_ratio: int,
        same_space: bool = False,
    ) -> None:
        super().__init__()
        self.matcher = LevelMatcher(
            student_channels=student_channels,
            teacher_channels=teacher_channels,
            embed_channels=embed_channels,
            initial_tau=initial_tau,
            identity=same_space,
            cosine=cosine,
        )
        self.same_space = same_space
        self.normalizer = (
            None
            if normalize == "none"
            else RunningNormalizer(channels=teacher_channels, per_channel=normalize == "channel")
        )
        self.prior = prior
        self.centre = centre
        level: frozenset[View] = frozenset({"level"} if prior else ())
        pooled: frozenset[View] = frozenset({"pooled"})
        self.student_needs = level if centre == "student" else frozenset[View]()
        self.teacher_needs = pooled | level if centre == "teacher" else pooled
        self.sampling_ratio = sampling_ratio

    def forward(self, pair: ObservedPair) -> Tensor:
        target, channels = pair.teacher_view.pooled, pair.teacher_view.pooled_channels
        assert target is not None
        if self.normalizer is not None:
            self.normalizer.update(target, channels)
        imitation, target, _ = self._imitate(pair)
        return imitation_loss(imitation, target, channels)

    @torch.no_grad()
    def match_levels(self, pair: ObservedPair) -> Tensor:
        """(R, L) how much each student level answers for the teacher's feature of a region; the term is unchanged."""
        return self._imitate(pair)[2]

    def _imitate(self, pair: ObservedPair) -> tuple[Tensor, Tensor, Tensor]:
        """The student's aggregate and the target, (R, C_t, 7, 7) each, and the weights of the levels (R, L)."""
        target, channels = pair.teacher_view.pooled, pair.teacher_view.pooled_channels
        assert target is not None
        if self.normalizer is not None:
            target = self.normalizer(target.float(), channels)
        pyramid = pair.student_seen.pyramid
        levels = pool_all_levels(pyramid, pair.regions, size=target.shape[-1], sampling_ratio=self.sampling_ratio)
        prior = self._compute_prior(pair)
        affine = self.normalizer.affine() if self.same_space and self.normalizer is not None else None
        # The adapters' weights include the standardisation, and half precision would lose a small deviation around a
        # large mean.
        with torch.autocast(target.device.type, enabled=False):
            imitation, weights = self.matcher(levels, target.float(), affine, prior)
        return imitation.float(), target.float(), weights

    def _compute_prior(self, pair: ObservedPair) -> Tensor | None:
        """(R, L) logits added to the match of each region; None if the prior favours no level."""
        if self.prior == 0:
            return None
        index = pair.regions.image_index
        octaves = _compute_octaves(pair.student_seen.pyramid, index)
        view, theirs = pair.student_view, octaves
        if self.centre == "teacher":
            view, theirs = pair.teacher_view, _compute_octaves(pair.teacher_seen.pyramid, index)
        assert view.level is not None
        return level_prior(octaves, theirs.gather(1, view.level[:, None]).squeeze(1), self.prior)


def _compute_octaves(pyramid: Pyramid, image_index: Tensor) -> Tensor:
    """(R, L) log2 of the stride of each level in pixels of each region's image, the mean of both axes."""
    scale = pyramid.frame.scale
    strides = copy_numbers([log2(level.stride[0] * level.stride[1]) / 2 for level in pyramid.levels], scale)
    return strides - scale[image_index].log2().mean(dim=1, keepdim=True)


# ------------------------------------------------------------------------------------------------------- assembly


def build(
    pair: Detectors,
    *,
    embed_channels: int,
    tau: float,
    prior: float,
    center: Literal["teacher", "student"],
    similarity: Literal["cosine", "product"],
    normalize: Literal["channel", "scalar", "none"],
    sampling_ratio: int,
) -> SGFITerm:
    """Builds the term; any pair allows it."""
    return SGFITerm(
        student_channels=pair.student_channels,
        teacher_channels=max(pair.teacher_channels),
        same_space=pair.same_space,
        embed_channels=embed_channels,
        initial_tau=tau,
        prior=prior,
        centre=center,
        cosine=similarity == "cosine",
        normalize=normalize,
        sampling_ratio=sampling_ratio,
    )
