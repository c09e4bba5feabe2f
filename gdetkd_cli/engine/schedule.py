"""Optimizer and learning-rate schedule. Steps are optimizer steps."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def build_optimizer(
    *, name: Literal["adamw", "sgd"], modules: Iterable[nn.Module], lr: float, weight_decay: float, momentum: float
) -> torch.optim.Optimizer:
    """AdamW or SGD over the trainable parameters; biases and norms are not decayed."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for module in modules:
        for parameter in module.parameters():
            if parameter.requires_grad:
                (decayed if parameter.dim() > 1 else others).append(parameter)
    # fused: one kernel for all tensors, because slim networks have many small ones.
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, fused=True)
    return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Takes over a stored optimizer's state; settings such as the weight decay stay, since ``--force`` may change them.

    Raises:
        ValueError: the state is that of another kind of optimizer, or of other parameters.
    """
    own, stored = optimizer.state_dict()["param_groups"], state["param_groups"]
    kinds = [{"betas", "momentum"} & group.keys() for group in (own[0], stored[0])]  # of AdamW, of SGD
    if kinds[0] != kinds[1]:
        raise ValueError("its optimizer was another one, whose state this one cannot use")
    if [group["params"] for group in own] != [group["params"] for group in stored]:
        raise ValueError("its optimizer has other parameters")
    optimizer.load_state_dict({**state, "param_groups": own})


def build_schedule(
    optimizer: torch.optim.Optimizer,
    *,
    name: str,
    steps: int,
    warmup_steps: int,
    milestones: Sequence[float],
    gamma: float,
) -> LambdaLR:
    """Linear warm-up, then cosine to 0, drops at milestones (fractions of the run), or constant."""
    drops = [round(fraction * steps) for fraction in milestones]

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / (warmup_steps + 1))
        if name == "cosine":
            progress = max(0.0, step - warmup_steps) / max(1, steps - warmup_steps)
            return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
        if name == "multistep":
            return warm * gamma ** sum(step >= drop for drop in drops)
        return warm

    return LambdaLR(optimizer, factor)


def move_schedule(schedule: LambdaLR, step: int) -> None:
    """Sets a fresh schedule, and the optimizer's learning rates, to where they are after ``step`` steps."""
    rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    position = {"last_epoch": step, "_step_count": step + 1, "_last_lr": rates}
    schedule.load_state_dict(schedule.state_dict() | position)
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
