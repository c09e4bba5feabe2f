"""``gdetkd recipe``: the recipes that ship with gdetkd, and your own."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from gdetkd_cli.cli import options

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, start and check recipes.")

RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="Recipe file (YAML), or a name from: gdetkd recipe list.")
]


@app.command("list")
def list_recipes() -> None:
    """List the built-in recipes."""
    from gdetkd_cli.recipe.builtin import list_builtin

    recipes = list_builtin()
    width = max((len(recipe.name) for recipe in recipes), default=0)
    for recipe in recipes:
        typer.echo(f"{recipe.name:{width}}  {recipe.title}")


@app.command("show")
def show_recipe(recipe: RecipeArgument) -> None:
    """Print a recipe as it stands in its file."""
    from gdetkd_cli.recipe.load import find_recipe

    typer.echo(find_recipe(recipe).read_bytes(), nl=False)


@app.command("init")
def init_recipe(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")] = Path("recipe.yaml"),
) -> None:
    """Write a commented recipe to start from."""
    from gdetkd_cli.recipe.starter import starter_recipe

    if path.exists():
        raise options.UsageError(f"{path} exists already; name another file: gdetkd recipe init PATH")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(starter_recipe(str(path)), encoding="utf-8")
    except OSError as error:
        raise options.UsageError(f"cannot write {path}: {error.strerror}") from error
    typer.echo(path)
    typer.echo(f"edit it, then check it: gdetkd recipe validate {path}", err=True)


@app.command("validate")
def validate_recipe(
    recipe: RecipeArgument,
    overrides: options.SetOption = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Build the data, both detectors and the pair as well, and show them.")
    ] = False,
    trust_code: options.TrustOption = False,
) -> None:
    """Check a recipe; print it with its defaults."""
    from gdetkd_cli.recipe.load import dump_recipe, load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if deep:
        from gdetkd_cli.cli import render
        from gdetkd_cli.cli.output import perform
        from gdetkd_cli.commands import check_recipe

        perform(partial(check_recipe, loaded, recipe, changes=overrides or ()), render.begun, as_json=False)
        return
    typer.echo(dump_recipe(loaded), nl=False)
    typer.echo(f"{recipe} is valid", err=True)


@app.command("schema")
def print_schema() -> None:
    """Print the JSON schema of recipes, for editors."""
    import json

    from gdetkd_cli.recipe.load import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
