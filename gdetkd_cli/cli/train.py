"""``gdetkd train``."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import typer

from gdetkd_cli.cli import options


def train(
    recipe_file: options.OptionalRecipe = None,
    recipe: options.RecipeOption = None,
    detector: Annotated[
        Literal["student", "teacher"] | None,
        typer.Option("--detector", help="Detector of the recipe to train. Default: student."),
    ] = None,
    overrides: options.SetOption = None,
    output: options.OutputOption = None,
    resume: options.ResumeOption = None,
    steps: options.StepsOption = None,
    force: options.ForceOption = False,
    no_measure: options.NoMeasureOption = False,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train a recipe's student or teacher without distillation.

    Example: gdetkd train my.yaml --detector teacher --output runs/teacher
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform

    recipe = options.choose_recipe(recipe_file, recipe)
    others = {"a recipe": recipe, "--detector": detector, "--set": overrides, "--output": output}
    if continued := options.plan_resume(resume, steps=steps, force=force, others=others):
        from gdetkd_cli.commands import resume_run

        perform(partial(resume_run, **continued, measure=not no_measure), render.format_run, as_json=as_json)
        return
    loaded = options.load_required_recipe(recipe, overrides)
    from gdetkd_cli.commands import run_train

    work = partial(
        run_train,
        loaded,
        detector=detector or "student",
        output=output,
        requeue=resume == "auto",
        measure=not no_measure,
    )
    perform(work, render.format_run, as_json=as_json)
