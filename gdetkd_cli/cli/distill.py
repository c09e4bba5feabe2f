"""``gdetkd distill``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from gdetkd_cli.cli import options


def distill(
    recipe_file: options.OptionalRecipe = None,
    recipe: options.RecipeOption = None,
    overrides: options.SetOption = None,
    output: options.OutputOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Build everything, run a few steps and show the plan; write nothing.")
    ] = False,
    profile: Annotated[
        int | None,
        typer.Option("--profile", metavar="N", min=1, max=10**9, help="Time N steps by phase; write nothing."),
    ] = None,
    resume: options.ResumeOption = None,
    steps: options.StepsOption = None,
    force: options.ForceOption = False,
    no_report: Annotated[bool, typer.Option("--no-report", help="Write no report.html at the end.")] = False,
    no_measure: options.NoMeasureOption = False,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Train a recipe's student with its teacher.

    Example: gdetkd distill my.yaml --output runs/student
    """
    from gdetkd_cli.cli import render
    from gdetkd_cli.cli.output import perform

    recipe = options.choose_recipe(recipe_file, recipe)
    others = {"a recipe": recipe, "--set": overrides, "--output": output, "--dry-run": dry_run, "--profile": profile}
    if continued := options.plan_resume(resume, steps=steps, force=force, others=others):
        from gdetkd_cli.commands import resume_run

        work = partial(resume_run, **continued, report=not no_report, measure=not no_measure)
        perform(work, render.format_run, as_json=as_json)
        return
    if dry_run:
        options.check_alone("--dry-run", {"--profile": profile})
    loaded = options.load_required_recipe(recipe, overrides)
    from gdetkd_cli.commands import plan_distill, profile_distill, run_distill

    if dry_run:
        perform(partial(plan_distill, loaded), render.format_plan, as_json=as_json)
    elif profile is not None:
        perform(partial(profile_distill, loaded, steps=profile), render.format_profile, as_json=as_json)
    else:
        work = partial(
            run_distill,
            loaded,
            output=output,
            requeue=resume == "auto",
            report=not no_report,
            measure=not no_measure,
        )
        perform(work, render.format_run, as_json=as_json)
