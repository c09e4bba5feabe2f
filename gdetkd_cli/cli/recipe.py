"""``gdetkd recipe``: the recipes that ship with gdetkd, and your own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gdetkd_cli.cli import options

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, show, create and check recipes.")


@app.command("list")
def list_recipes(as_json: options.JsonOption = False) -> None:
    """List the built-in recipes.

    Example: gdetkd recipe list
    """
    from gdetkd_cli.recipe.builtin import list_builtin

    recipes = list_builtin()
    if as_json:
        _print_json({"recipes": [{"name": recipe.name, "title": recipe.title} for recipe in recipes]})
        return
    width = max((len(recipe.name) for recipe in recipes), default=0)
    for recipe in recipes:
        typer.echo(f"{recipe.name:{width}}  {recipe.title}")


@app.command("show")
def show_recipe(recipe: options.RecipeArgument, as_json: options.JsonOption = False) -> None:
    """Print a recipe's file unchanged, but hidden characters as visible text.

    Example: gdetkd recipe show shapes/frcnn-frcnn
    """
    from gdetkd_cli.recipe.load import find_recipe, load_recipe
    from gdetkd_cli.text import show_hidden

    if as_json:
        _print_json({"recipe": load_recipe(recipe).model_dump(mode="json", exclude_unset=True)})
        return
    text = find_recipe(recipe).read_bytes().decode(errors="surrogateescape")
    typer.echo(show_hidden(text, keep="\ufeff\r\n\t").encode(), nl=False)


@app.command("init")
def init_recipe(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Recipe to write.")] = Path("recipe.yaml"),
    as_json: options.JsonOption = False,
) -> None:
    """Write a commented recipe for you to edit.

    Example: gdetkd recipe init my.yaml
    """
    from gdetkd_cli.files import write_text
    from gdetkd_cli.recipe.starter import format_starter
    from gdetkd_cli.text import show_hidden

    shown = show_hidden(str(path))
    if path.exists():
        raise options.UsageError(f"{path} already exists; choose another file: gdetkd recipe init PATH")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, format_starter(shown))
    except OSError as error:
        raise options.UsageError(f"cannot write {path}: {error.strerror}") from error
    if as_json:
        _print_json({"path": str(path)})
    else:
        typer.echo(shown)
    typer.echo(f"Edit this file, then check it with: gdetkd recipe validate {shown}", err=True)


@app.command("validate")
def validate_recipe(
    recipe: options.RecipeArgument,
    overrides: options.SetOption = None,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also build the data and both detectors, and show how they fit together.")
    ] = False,
    trust_code: options.TrustOption = False,
    as_json: options.JsonOption = False,
) -> None:
    """Check a recipe and print it with all defaults.

    Example: gdetkd recipe validate my.yaml --deep
    """
    from gdetkd_cli.recipe.load import dump_recipe, load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if deep:
        from gdetkd_cli.cli import render
        from gdetkd_cli.cli.output import perform
        from gdetkd_cli.commands import check_recipe

        perform(partial(check_recipe, loaded, recipe, changes=overrides or ()), render.format_check, as_json=as_json)
        return
    if as_json:
        _print_json({"recipe": loaded.model_dump(mode="json")})
    else:
        typer.echo(dump_recipe(loaded), nl=False)
    typer.echo(f"{recipe} is valid", err=True)


@app.command("schema")
def print_schema() -> None:
    """Print the JSON Schema of recipes, for use in editors.

    Example: gdetkd recipe schema
    """
    from gdetkd_cli.recipe.load import build_json_schema

    typer.echo(json.dumps(build_json_schema(), indent=2))


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps({"schema": 1, **content}, indent=2, allow_nan=False))
