"""The linear scaling rule."""

from __future__ import annotations

from typing import Any

import pytest
import toy

from gdetkd_cli.recipe.scaling import changes, epochs, scaled_to_batch
from gdetkd_cli.recipe.schema import Recipe


def recipe(**train: Any) -> Recipe:
    made = toy.recipe().model_dump()
    made["train"] |= {
        "steps": 900,
        "batch_size": 2,
        "evaluate_every": 300,
        "reference_batch": 16,
        "optimizer": {"name": "sgd", "lr": 0.02},
        "schedule": {"warmup_steps": 50},
    } | train
    made["distill"] |= {"sgfi": {"warmup_steps": 10}}
    return Recipe.model_validate(made)


@pytest.mark.parametrize(
    ("processes", "lr", "steps", "warmup", "every", "term"),
    [
        (8, 0.02, 900, 50, 300, 10),
        (4, 0.01, 1800, 100, 600, 20),
        (1, 0.0025, 7200, 400, 2400, 80),
        (24, 0.06, 300, 17, 100, 4),
    ],
)
def test_as_many_images_are_seen(processes: int, lr: float, steps: int, warmup: int, every: int, term: int) -> None:
    scaled = scaled_to_batch(recipe(), processes)
    assert scaled.train.optimizer.lr == pytest.approx(lr)
    assert scaled.train.steps == steps
    assert scaled.train.schedule.warmup_steps == warmup
    assert scaled.train.evaluate_every == every
    assert scaled.distill is not None and scaled.distill.sgfi is not None
    assert scaled.distill.sgfi.warmup_steps == term
    assert epochs(recipe(), 720, processes) == epochs(scaled, 720, processes) == 20.0
    assert scaled_to_batch(scaled, processes) == scaled  # once is enough: a resumed run keeps what was settled
    assert changes(recipe(), scaled) == (
        [] if processes == 8 else [f"scaled from a batch of 16: learning rate {lr:g}, {steps} steps"]
    )


def test_without_a_reference_nothing_changes() -> None:
    plain = recipe(reference_batch=None)
    assert scaled_to_batch(plain, 3) is plain
    assert changes(plain, plain) == []
