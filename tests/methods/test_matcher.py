"""Level matching equals the naive version, and the target is standardised."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, cosine_similarity

from gdetkd_cli.methods.adapters import RunningNormalizer
from gdetkd_cli.methods.sgfi import LevelMatcher


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_matcher(student_channels: list[int], *, cosine: bool = True) -> LevelMatcher:
    torch.manual_seed(0)
    return LevelMatcher(student_channels=student_channels, teacher_channels=6, embed_channels=4, cosine=cosine).double()


def naive(matcher: LevelMatcher, levels: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
    """Adapts every level, embeds each adapted level, then matches and sums them (docs/method.md)."""
    likeness = cosine_similarity if matcher.cosine else lambda key, query: (key * query).sum(dim=1)

    def embed(features: Tensor) -> Tensor:
        hidden = conv2d(features, matcher.embed_in.weight, matcher.embed_in.bias, stride=2).relu()
        return conv2d(hidden, matcher.embed_out.weight, matcher.embed_out.bias, stride=2).flatten(1)

    adapters = list(matcher.adapters) * (len(levels) if len(matcher.adapters) == 1 else 1)
    adapted = [adapter(level) for adapter, level in zip(adapters, levels, strict=True)]
    query = embed(target)
    scores = torch.stack([likeness(embed(level), query) / matcher.log_tau.exp() for level in adapted], dim=1)
    weights = scores.softmax(dim=1)
    aggregate = sum(weights[:, i, None, None, None] * level for i, level in enumerate(adapted))
    assert isinstance(aggregate, Tensor)
    return aggregate, weights


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("student_channels", [[5, 5, 5], [5], [3, 5, 2]], ids=["equal", "one level", "unequal"])
def test_matcher_is_the_naive_version(student_channels: list[int], cosine: bool) -> None:
    matcher = make_matcher(student_channels, cosine=cosine)
    reference = copy.deepcopy(matcher)
    levels = [draw(4, channels, 7, 7, seed=i).requires_grad_() for i, channels in enumerate(student_channels)]
    copies = [level.detach().clone().requires_grad_() for level in levels]
    target, aim = draw(4, 6, 7, 7, seed=10), draw(4, 6, 7, 7, seed=11)

    aggregate, weights = matcher(levels, target)
    expected_aggregate, expected_weights = naive(reference, copies, target)
    torch.testing.assert_close(aggregate, expected_aggregate, rtol=0, atol=1e-10)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-10)

    (aggregate - aim).square().mean().backward()
    (expected_aggregate - aim).square().mean().backward()
    assert len(dict(matcher.named_parameters())) == 2 * len(matcher.adapters) + 5
    for (name, ours), theirs in zip(matcher.named_parameters(), reference.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-10, msg=name)
        if len(student_channels) > 1 or name.startswith("adapters"):  # one level has nothing to choose
            assert ours.grad.abs().sum() > 0, name
    for level, other in zip(levels, copies, strict=True):
        torch.testing.assert_close(level.grad, other.grad, rtol=0, atol=1e-10)


@pytest.mark.parametrize("per_channel", [True, False])
def test_standardising_folds_into_the_adapters(per_channel: bool) -> None:
    matcher = make_matcher([5, 5, 5])
    levels = [draw(4, 5, 7, 7, seed=i) for i in range(3)]
    target = draw(4, 6, 7, 7, seed=10)
    normalizer = RunningNormalizer(channels=5, per_channel=per_channel)
    normalizer.update((3 * draw(9, 5, 7, 7, seed=12) + 2).float())
    normalizer.double()

    aggregate, weights = matcher(levels, target, normalizer.affine())
    expected_aggregate, expected_weights = naive(matcher, [normalizer(level) for level in levels], target)

    torch.testing.assert_close(aggregate, expected_aggregate, rtol=0, atol=1e-10)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-10)


def test_equal_levels_share_an_adapter() -> None:
    assert len(make_matcher([5, 5, 5]).adapters) == 1
    assert [adapter.in_channels for adapter in make_matcher([5, 5, 3]).adapters] == [5, 5, 3]


@pytest.mark.parametrize("log_tau", [-80.0, -3.0, 0.0, 3.0, 80.0])
def test_tau_is_positive_whatever_its_parameter(log_tau: float) -> None:
    matcher = make_matcher([5, 5, 5]).float()
    nn.init.constant_(matcher.log_tau, log_tau)
    levels = [draw(4, 5, 7, 7, seed=seed).float() for seed in range(3)]
    target = draw(4, 6, 7, 7, seed=9).float()
    _, weights = matcher(levels, target)
    _, at_one = naive(make_matcher([5, 5, 5]).float(), levels, target)

    assert torch.isfinite(weights).all()
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(4))
    assert torch.equal(weights.argmax(dim=1), at_one.argmax(dim=1)) or log_tau == 80  # a negative tau turns them over
    if log_tau == -80:
        torch.testing.assert_close(weights.amax(dim=1), torch.ones(4))  # the best level alone
    if log_tau == 80:
        torch.testing.assert_close(weights, torch.full((4, 3), 1 / 3))  # all alike


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4])
def test_no_features_move_the_match_further_than_tau_lets_them(scale: float) -> None:
    """For features of any size, two levels' logits differ by at most 2 / tau and gradients are finite."""
    matcher = make_matcher([5, 5])
    levels = [scale * draw(4, 5, 7, 7, seed=seed) for seed in range(2)]
    for level in levels:
        level.requires_grad_()
    _, weights = matcher(levels, scale * draw(4, 6, 7, 7, seed=9))

    assert (weights[:, 0] / weights[:, 1]).log().abs().max() <= 2
    weights[:, 0].sum().backward()
    gradients = [level.grad for level in levels] + [p.grad for p in matcher.parameters() if p.grad is not None]
    assert all(gradient is not None and torch.isfinite(gradient).all() for gradient in gradients)


def test_tau_starts_where_it_is_told_to() -> None:
    matcher = LevelMatcher(student_channels=[2], teacher_channels=2, embed_channels=4, initial_tau=0.25)

    assert matcher.log_tau.exp().item() == pytest.approx(0.25, rel=1e-5)
    assert matcher.log_tau.requires_grad


def test_adapters_can_start_as_the_identity() -> None:
    matcher = LevelMatcher(student_channels=[6, 6], teacher_channels=6, embed_channels=4, identity=True)
    level = draw(3, 6, 7, 7).float()
    aggregate, _ = matcher([level, level], draw(3, 6, 7, 7, seed=1).float())

    torch.testing.assert_close(aggregate, level)


@pytest.mark.parametrize("student_channels", [[5, 5], [5, 3]])
def test_matcher_without_regions(student_channels: list[int]) -> None:
    matcher = make_matcher(student_channels)
    levels = [torch.zeros(0, c, 7, 7, dtype=torch.float64, requires_grad=True) for c in student_channels]
    aggregate, weights = matcher(levels, torch.zeros(0, 6, 7, 7, dtype=torch.float64))
    aggregate.sum().backward()

    assert aggregate.shape == (0, 6, 7, 7)
    assert weights.shape == (0, 2)
    assert all(parameter.grad is not None for parameter in matcher.adapters.parameters())
    assert all(level.grad is not None for level in levels)


def make_features(*, regions: int = 40, seed: int = 0) -> Tensor:
    """(R, 3, 7, 7) with channels orders of magnitude apart."""
    scale, shift = torch.tensor([0.01, 1.0, 300.0]), torch.tensor([5.0, 0.0, -100.0])
    return draw(regions, 3, 7, 7, seed=seed).float() * scale[:, None, None] + shift[:, None, None]


def test_statistics_after_one_update_are_the_batchs_by_channel() -> None:
    features = make_features()
    normalizer = RunningNormalizer(channels=3, per_channel=True)
    normalizer.update(features)

    deviation, mean = torch.std_mean(features[:, 1:], dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(normalizer.mean[1:], mean)
    seen = normalizer(features)
    torch.testing.assert_close(seen[:, 1:], (features[:, 1:] - mean[:, None, None]) / deviation[:, None, None])
    torch.testing.assert_close(seen[:, 1:].std(dim=(0, 2, 3), correction=0), torch.ones(2), rtol=1e-3, atol=0)


def test_statistics_after_one_update_are_the_batchs_as_a_whole() -> None:
    features = make_features()
    normalizer = RunningNormalizer(channels=3, per_channel=False)
    normalizer.update(features)

    assert normalizer.mean.shape == (1,)
    expected = (features - features.mean()) / features.std(correction=0)
    torch.testing.assert_close(normalizer(features), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("per_channel", [True, False])
def test_statistics_average_the_first_batches_alike(per_channel: bool) -> None:
    batches = [make_features(regions=regions, seed=regions) for regions in (3, 40, 9)]
    normalizer = RunningNormalizer(channels=3, per_channel=per_channel)
    for batch in batches:
        normalizer.update(batch)

    dims = (0, 2, 3) if per_channel else (0, 1, 2, 3)
    means = torch.stack([batch.mean(dim=dims) for batch in batches])
    squares = torch.stack([batch.square().mean(dim=dims) for batch in batches])
    torch.testing.assert_close(normalizer.mean, means.mean(dim=0).view(-1))
    torch.testing.assert_close(normalizer.square, squares.mean(dim=0).view(-1))


def test_statistics_move_slowly_later() -> None:
    normalizer = RunningNormalizer(channels=1, per_channel=True)
    for _ in range(600):
        normalizer.update(torch.zeros(1, 1, 1, 1))
    normalizer.update(torch.ones(1, 1, 1, 1))

    assert normalizer.mean.item() == pytest.approx(0.002, rel=1e-4)  # 1 / 500, not 1 / 601


def test_a_silent_channel_does_not_blow_up() -> None:
    features = make_features()
    features[:, 0] = 0  # a dead channel of this teacher
    normalizer = RunningNormalizer(channels=3, per_channel=True)
    normalizer.update(features)
    noise = features.clone()
    noise[:, 0] = 1e-4

    assert normalizer(features)[:, 0].abs().max() == 0
    assert normalizer(noise)[:, 0].abs().max() < 1e-2
    silent = RunningNormalizer(channels=3, per_channel=True)
    silent.update(torch.zeros(2, 3, 7, 7))
    assert torch.equal(silent(torch.zeros(2, 3, 7, 7)), torch.zeros(2, 3, 7, 7))


def test_no_regions_change_nothing() -> None:
    normalizer = RunningNormalizer(channels=3, per_channel=True)
    normalizer.update(torch.zeros(0, 3, 7, 7))
    assert normalizer(make_features()).allclose(make_features())  # nothing known yet: left as it is

    normalizer.update(make_features())
    before = {name: value.clone() for name, value in normalizer.state_dict().items()}
    normalizer.update(torch.zeros(0, 3, 7, 7))
    assert normalizer(torch.zeros(0, 3, 7, 7)).shape == (0, 3, 7, 7)
    assert all(torch.equal(value, before[name]) for name, value in normalizer.state_dict().items())


def test_channels_that_a_region_lacks_do_not_count() -> None:
    """On levels of 3 and 1 channels, the zeros that pad the missing two do not count."""
    features = make_features(regions=20)
    channels = torch.tensor([3, 1]).repeat(10)
    padded = features * (torch.arange(3) < channels[:, None])[:, :, None, None]
    normalizer, expected = (RunningNormalizer(channels=3, per_channel=True) for _ in range(2))
    normalizer.update(padded, channels)
    expected.update(features[channels == 3])

    torch.testing.assert_close(normalizer.mean[1:], expected.mean[1:])
    torch.testing.assert_close(normalizer.square[1:], expected.square[1:])
    torch.testing.assert_close(normalizer.mean[0], features[:, 0].mean())
    seen = normalizer(padded, channels)
    torch.testing.assert_close(seen[channels == 3][:, 1:], expected(features)[channels == 3][:, 1:])
    assert (seen[channels == 1][:, 1:] == 0).all()


def test_channels_that_a_batch_lacks_keep_their_statistics() -> None:
    normalizer = RunningNormalizer(channels=3, per_channel=True)
    normalizer.update(make_features())
    before = normalizer.mean.clone()
    only_first = make_features(seed=1)
    only_first[:, 1:] = 0
    normalizer.update(only_first, torch.ones(40, dtype=torch.int64))

    assert torch.equal(normalizer.mean[1:], before[1:])
    assert normalizer.mean[0] != before[0]


def test_statistics_are_saved() -> None:
    normalizer, restored = (RunningNormalizer(channels=3, per_channel=True) for _ in range(2))
    for seed in range(3):
        normalizer.update(make_features(seed=seed))
    restored.load_state_dict(normalizer.state_dict())

    for one in (normalizer, restored):
        one.update(make_features(seed=9))
    assert torch.equal(normalizer(make_features()), restored(make_features()))
    assert not list(normalizer.parameters())


def test_statistics_are_float32_for_half_features() -> None:
    normalizer = RunningNormalizer(channels=1, per_channel=True)
    normalizer.update(torch.full((64, 1, 7, 7), 300.0, dtype=torch.float16))  # the squares overflow float16

    assert normalizer.square.dtype == torch.float32
    assert math.isclose(normalizer.square.item(), 90000, rel_tol=1e-3)
