"""Prints, every ten steps at the start of training, the mean weight of the student's own level in SGFI's match.

    python benchmarks/match_start.py --recipe shapes/frcnn-retinanet --set distill.sgfi.similarity=product

Nothing is evaluated or saved. The prior defines the own level, so `distill.sgfi.prior` must be above 0.
"""

from __future__ import annotations

import argparse
from statistics import mean
from typing import Any

from torch import Tensor

from gdetkd_cli.commands.plan import prepare_steps, repeat_batches
from gdetkd_cli.recipe.load import load_recipe
from gdetkd_cli.recipe.methods import select_method

EVERY = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shapes/frcnn-retinanet")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE")
    options = parser.parse_args()
    recipe = load_recipe(options.recipe, ("runtime.threads=1", *options.set))
    recipe = select_method(recipe, "sgfi", steps=recipe.train.steps, seed=recipe.seed)
    setup, stepper = prepare_steps(recipe)

    of_own_level: list[float] = []

    def add_weight(_: Any, inputs: tuple[Any, ...], matched: tuple[Tensor, Tensor]) -> None:
        prior = inputs[3]
        of_own_level.append(matched[1].detach().gather(1, prior.argmax(dim=1, keepdim=True)).mean().item())

    distiller: Any = setup.distiller
    matcher = distiller.terms["sgfi"].matcher
    matcher.register_forward_hook(add_weight)
    losses: list[float] = []
    batches = repeat_batches(setup)
    for step in range(1, options.steps + 1):
        losses.append(float(stepper.distil(next(batches)).parts["sgfi"]))
        if step % EVERY == 0:
            tau = float(matcher.log_tau.detach().exp())
            own, loss = mean(of_own_level[-EVERY:]), mean(losses[-EVERY:])
            print(f"step {step:4}: own level {own:.2f}, loss {loss:.3f}, tau {tau:.2f}", flush=True)


if __name__ == "__main__":
    main()
