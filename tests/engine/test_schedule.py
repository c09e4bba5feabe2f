"""Learning-rate factors by hand, and the parameters that decay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gdetkd_cli.engine.schedule import build_optimizer, build_schedule


def factors(name: str, steps: int, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, name=name, steps=steps, warmup_steps=warmup, milestones=[0.5, 0.75], gamma=0.1)
    found = []
    for _ in range(steps):
        found.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        schedule.step()
    return found


def test_constant_after_linear_warmup() -> None:
    assert factors("constant", 5, 3) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_cosine_falls_from_the_end_of_the_warmup() -> None:
    # 4 steps: cos(0), cos(pi/4), cos(pi/2), cos(3 pi/4), each (1 + cos) / 2
    assert factors("cosine", 4, 0) == pytest.approx([1.0, 0.853553, 0.5, 0.146447], abs=1e-5)


def test_multistep_drops_at_fractions_of_the_run() -> None:
    assert factors("multistep", 8, 0) == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01])


def test_biases_and_norms_are_not_decayed_and_frozen_parameters_left_out() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    module[2].requires_grad_(False)
    decayed, others = build_optimizer(
        name="adamw", modules=[module], lr=0.1, weight_decay=0.5, momentum=0.9
    ).param_groups
    assert decayed["weight_decay"] == 0.5
    assert others["weight_decay"] == 0.0
    assert [tuple(p.shape) for p in decayed["params"]] == [(3, 2)]
    assert [tuple(p.shape) for p in others["params"]] == [(3,), (3,), (3,)]
