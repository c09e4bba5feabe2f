"""SGFI's equations, by hand and against plain loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gdetkd_cli.methods.sgfi import imitation_loss, level_attention, level_prior, scale_to_unit


def slow_attention(keys: Tensor, queries: Tensor, tau: float, prior: Tensor | None = None) -> Tensor:
    """Region by region, level by level, in Python's doubles."""
    weights = []
    for i, (region, query) in enumerate(zip(keys.tolist(), queries.tolist(), strict=True)):
        start = [0.0] * len(region) if prior is None else prior[i].tolist()
        scores = [
            math.exp(sum(k * q for k, q in zip(key, query, strict=True)) / tau + start[level])
            for level, key in enumerate(region)
        ]
        weights.append([score / sum(scores) for score in scores])
    return torch.tensor(weights)


@pytest.mark.parametrize(
    ("tau", "expected"),
    [
        (1.0, [0.268941, 0.731059]),  # softmax(1, 2): 1 / (1 + e), e / (1 + e)
        (0.5, [0.119203, 0.880797]),  # softmax(2, 4): 1 / (1 + e^2), e^2 / (1 + e^2)
    ],
)
def test_attention_by_hand(tau: float, expected: list[float]) -> None:
    query = torch.tensor([[1.0, 2.0]])
    keys = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # <k, q> = 1 and 2

    torch.testing.assert_close(level_attention(keys, query, torch.tensor(tau)), torch.tensor([expected]))


def test_attention_is_the_slow_version() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(6, 4, 5, generator=generator), torch.randn(6, 5, generator=generator)

    torch.testing.assert_close(level_attention(keys, queries, torch.tensor(0.7)), slow_attention(keys, queries, 0.7))


def test_unit_by_hand() -> None:
    torch.testing.assert_close(
        scale_to_unit(torch.tensor([[3.0, 4.0], [0.0, -2.0]])), torch.tensor([[0.6, 0.8], [0.0, -1.0]])
    )


def test_the_gradient_of_a_vanishing_embedding_stays_finite() -> None:
    embedding = torch.tensor([[0.0, 0.0], [1e-30, 0.0]], requires_grad=True)
    scale_to_unit(embedding).sum().backward()

    assert embedding.grad is not None and embedding.grad.abs().max() <= 1e3


def test_attention_with_a_prior() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, queries = torch.randn(6, 4, 5, generator=generator), torch.randn(6, 5, generator=generator)
    prior = torch.randn(6, 4, generator=generator)
    tau = torch.tensor(0.7)

    torch.testing.assert_close(level_attention(keys, queries, tau, prior), slow_attention(keys, queries, 0.7, prior))
    torch.testing.assert_close(level_attention(keys, queries, tau, 0 * prior), level_attention(keys, queries, tau))
    # Nothing to match by: one octave away weighs e^-3 of the own level.
    weights = level_attention(torch.zeros(1, 2, 5), torch.zeros(1, 5), tau, torch.tensor([[0.0, -3.0]]))
    torch.testing.assert_close(weights, torch.tensor([[0.952574, 0.047426]]))


def test_the_prior_by_hand() -> None:
    """Levels have strides 4, 8 and 32 in pixels of one image, and 2, 4 and 16 in those of another."""
    octaves = torch.tensor([[2.0, 3, 5], [2, 3, 5], [1, 2, 4]])
    prior = level_prior(octaves, torch.tensor([2.0, 5, 3]), 2.0)
    assert prior.tolist() == [[0, -2, -18], [-18, -8, 0], [-8, -2, -2]]
    assert not level_prior(octaves, torch.tensor([2.0, 5, 3]), 0.0).any()


def test_the_weights_of_a_region_sum_to_one_over_its_levels() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = level_attention(
        torch.randn(8, 3, 5, generator=generator), torch.randn(8, 5, generator=generator), torch.tensor(1.0)
    )

    assert weights.shape == (8, 3)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(8))
    # The softmax of a public re-implementation runs over regions: there every column sums to 1.
    assert (weights.sum(dim=0) - 1).abs().min() > 0.1


def test_a_region_does_not_depend_on_the_others() -> None:
    generator = torch.Generator().manual_seed(2)
    keys, queries = torch.randn(4, 3, 5, generator=generator), torch.randn(4, 5, generator=generator)
    tau = torch.tensor(1.3)

    torch.testing.assert_close(level_attention(keys, queries, tau)[1:2], level_attention(keys[1:2], queries[1:2], tau))


def test_attention_of_no_regions() -> None:
    assert level_attention(torch.zeros(0, 3, 5), torch.zeros(0, 5), torch.tensor(1.0)).shape == (0, 3)


def slow_imitation(imitation: Tensor, target: Tensor, channels: list[int]) -> float:
    """mean_i MSE_i, each over the channels that region i's target has."""
    errors = []
    for ours, theirs, count in zip(imitation.tolist(), target.tolist(), channels, strict=True):
        squares = [
            (a - b) ** 2
            for map_a, map_b in zip(ours[:count], theirs[:count], strict=True)
            for row_a, row_b in zip(map_a, map_b, strict=True)
            for a, b in zip(row_a, row_b, strict=True)
        ]
        errors.append(sum(squares) / len(squares))
    return sum(errors) / len(errors)


def test_imitation_by_hand() -> None:
    imitation = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[5.0, 5.0], [5.0, 5.0]]]])  # (2, 1, 2, 2)
    target = torch.tensor([[[[0.0, 0.0], [0.0, 0.0]]], [[[5.0, 5.0], [5.0, 5.0]]]])

    # MSE of the first (1 + 4 + 9 + 16) / 4 = 7.5, of the second 0; their mean 3.75.
    assert imitation_loss(imitation, target).item() == 3.75


def test_padded_channels_do_not_count() -> None:
    # Two regions, two channels, one cell. The first region's target has one channel only.
    imitation = torch.tensor([[[[3.0]], [[100.0]]], [[[1.0]], [[2.0]]]])
    target = torch.tensor([[[[1.0]], [[0.0]]], [[[0.0]], [[0.0]]]])

    # First region (3 - 1)^2 / 1 = 4, second (1 + 4) / 2 = 2.5: the mean over regions is 3.25.
    assert imitation_loss(imitation, target, torch.tensor([1, 2])).item() == 3.25


@pytest.mark.parametrize("channels", [[3, 3, 3, 3], [1, 3, 2, 3]])
def test_imitation_is_the_slow_version(channels: list[int]) -> None:
    generator = torch.Generator().manual_seed(3)
    imitation, target = torch.randn(2, 4, 3, 7, 7, generator=generator)
    expected = slow_imitation(imitation, target, channels)

    assert imitation_loss(imitation, target, torch.tensor(channels)).item() == pytest.approx(expected, rel=1e-5)
    if channels == [3, 3, 3, 3]:
        assert imitation_loss(imitation, target).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_goes_to_the_imitation_alone() -> None:
    imitation, target = torch.ones(1, 1, 1, 2, requires_grad=True), torch.zeros(1, 1, 1, 2, requires_grad=True)
    imitation_loss(imitation, target).backward()

    assert imitation.grad is not None
    assert imitation.grad.flatten().tolist() == [1.0, 1.0]  # d mean(x^2) / dx = 2 x / 2 cells
    assert target.grad is None


@pytest.mark.parametrize("channels", [None, torch.zeros(0, dtype=torch.int64)])
def test_no_regions_give_zero_with_a_gradient_path(channels: Tensor | None) -> None:
    imitation = torch.zeros(0, 4, 7, 7, requires_grad=True)
    loss = imitation_loss(imitation, torch.zeros(0, 4, 7, 7), channels)
    loss.backward()

    assert loss.item() == 0
    assert imitation.grad is not None
