"""Prints the weights of the student's levels in SGFI's learnt match, by the size of regions.

    python benchmarks/match.py runs/student

The weights come from the run's last resume checkpoint.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gdetkd_cli.commands.plan import prepare_steps, repeat_batches
from gdetkd_cli.engine.run_folder import RunFolder
from gdetkd_cli.methods.sgfi import LevelMatcher
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.structures import Regions

BATCHES = 8
SIDES = (0, 16, 32, 64, 128, 256, 512, 10_000)  # pixels: square root of a region's area


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    for run in parser.parse_args().runs:
        step, weights, sides, temperature = read_weights(run)
        print(f"{run}: step {step}, tau {temperature:.2f}")
        for low, high in pairwise(SIDES):
            rows = (sides >= low) & (sides < high)
            if rows.any():
                mean = "  ".join(f"{value:.2f}" for value in weights[rows].mean(dim=0).tolist())
                print(f"  {low:4} to {high:5} pixels, {int(rows.sum()):5} regions:  {mean}")


def read_weights(run: Path) -> tuple[int, Tensor, Tensor, float]:
    """Returns the checkpoint's step, (R, L) weights, (R,) sides in pixels, and tau, over a few training batches."""
    recipe = load_recipe(run / "recipe.yaml")
    setup, _ = prepare_steps(recipe)
    distiller: Any = setup.distiller
    checkpoint = RunFolder(run).checkpoints().open_latest()
    assert checkpoint is not None, f"{run} has no checkpoint"
    distiller.load_state_dict(checkpoint.read_state()["distiller"])
    matcher: LevelMatcher = distiller.terms["sgfi"].matcher
    weights: list[Tensor] = []
    regions: list[Regions] = []
    matcher.register_forward_hook(lambda _, __, output: weights.append(output[1].detach()))
    choose = distiller._choose_regions
    distiller._choose_regions = lambda *seen: regions.append(choose(*seen)) or regions[-1]
    distiller.train()
    batches = repeat_batches(setup)
    for _ in range(BATCHES):
        distiller(next(batches))
    boxes = torch.cat([chosen.boxes for chosen in regions])
    sides = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1).sqrt()
    return checkpoint.progress.step, torch.cat(weights), sides, float(matcher.log_tau.detach().exp())


if __name__ == "__main__":
    main()
