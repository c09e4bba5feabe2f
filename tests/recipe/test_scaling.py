"""The linear scaling rule."""

from __future__ import annotations

from typing import Any

import pytest
import toy

from gdetkd_cli.recipe.scaling import count_epochs, describe_scaling, scale_to_batch
from gdetkd_cli.recipe.schema import Recipe


def make_recipe(**train: Any) -> Recipe:
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
def test_scaling_keeps_the_number_of_images(
    processes: int, lr: float, steps: int, warmup: int, every: int, term: int
) -> None:
    scaled = scale_to_batch(make_recipe(), processes)
    assert scaled.train.optimizer.lr == pytest.approx(lr)
    assert scaled.train.steps == steps
    assert scaled.train.schedule.warmup_steps == warmup
    assert scaled.train.evaluate_every == every
    assert scaled.distill is not None and scaled.distill.sgfi is not None
    assert scaled.distill.sgfi.warmup_steps == term
    assert scaled.train.steps * scaled.train.batch_size * processes == 20 * 720
    assert scale_to_batch(scaled, processes) == scaled  # a resumed run is not scaled again
    assert describe_scaling(make_recipe(), scaled) == (
        [] if processes == 8 else [f"scaled from a batch of 16: learning rate {lr:g}, {steps} steps"]
    )


def test_the_batches_of_a_step_count_together() -> None:
    larger, parts = make_recipe(batch_size=4), make_recipe(batch_size=2, accumulate=2)
    first, second = (scale_to_batch(one, 2).train for one in (larger, parts))
    assert second == first.model_copy(update={"batch_size": 2, "accumulate": 2})
    assert count_epochs(parts, images=720) == count_epochs(larger, images=720) == 20


def test_scaled_steps_are_exact() -> None:
    scaled = scale_to_batch(make_recipe(steps=700, batch_size=7, reference_batch=10, evaluate_every=70), 1)
    assert (scaled.train.steps, scaled.train.evaluate_every) == (1000, 100)  # 700 / 0.7 is 1000.0000000000001


def test_without_a_reference_nothing_changes() -> None:
    plain = make_recipe(reference_batch=None)
    assert scale_to_batch(plain, 3) is plain
    assert describe_scaling(plain, plain) == []
