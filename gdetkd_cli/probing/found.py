"""What the rules for levels find."""

from __future__ import annotations

from dataclasses import dataclass

from gdetkd_cli.probing.flow import Layout, Size


@dataclass(frozen=True)
class FoundLevels:
    """The pyramid among a record's values.

    Attributes:
        levels: indices of the values, fine to coarse.
        sizes: (height, width) cells of each level.
        layouts: order of each level's axes.
        stem: index of the first convolution.
        reference: index of the first convolution's input.
        reason: why these are the levels, shown to the user.
        confidence: how often this rule was right, in 0..1 (see ``CONFIDENCE``).
        alternatives: other candidate sets of maps with their reasons, the likeliest first.
        embedded: for a single level of tokens, the index of the first value with the whole sequence; else None.
        order: if all levels are slices of one value, the place of each among the slices; else empty.
    """

    levels: tuple[int, ...]
    sizes: tuple[Size, ...]
    layouts: tuple[Layout, ...]
    stem: int
    reference: int
    reason: str
    confidence: float
    alternatives: tuple[tuple[tuple[int, ...], str], ...] = ()
    embedded: int | None = None
    order: tuple[int, ...] = ()


@dataclass(frozen=True)
class LevelSet:
    """The levels that a rule found, its reason, and how often the rule is right."""

    levels: tuple[int, ...] = ()
    reason: str = ""
    confidence: float = 0.0


# (right + 1) / (tried + 2) of each rule, on the detectors in docs/reference/probed-models.md.
CONFIDENCE = {
    "shared head": 0.95,
    "pooled": 0.5,
    "own heads": 0.95,
    "decoder": 0.86,
    "one level": 0.75,
    "tokens": 0.67,
    "sequences": 0.5,
}
