"""Reads and validates recipes from YAML and ``--set``, and writes them back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from yaml.nodes import Node

from gdetkd_cli import yaml_text
from gdetkd_cli.errors import RecipeError
from gdetkd_cli.files import name_kind
from gdetkd_cli.recipe.builtin import list_builtin
from gdetkd_cli.recipe.checks import narrow_recipe
from gdetkd_cli.recipe.overrides import Override, apply_overrides, parse_override
from gdetkd_cli.recipe.problems import Problem, describe_problems
from gdetkd_cli.recipe.schema import CocoData, Data, Recipe


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and validates a recipe.

    Relative paths inside a recipe (data, weights, checkpoints) start from the working directory, not from the
    recipe's folder.

    Args:
        source: a YAML file, or the name of a built-in recipe.
        overrides: ``--set`` values of the form ``a.b=c``.

    Raises:
        RecipeError: the recipe is missing, is not YAML, or is invalid. The message has one line per problem, with
            the line in the file or the ``--set`` that causes it.
    """
    path = find_recipe(source)
    data, node = _read(path)
    changes = [parse_override(text) for text in overrides]
    data = apply_overrides(data, changes)
    try:
        return narrow_recipe(Recipe.model_validate(data))
    except ValidationError as error:
        lines = (
            f"{_locate(problem, path, node, changes)}: {_format_problem(problem)}"
            for problem in describe_problems(error, data, Recipe)
        )
        raise RecipeError("\n".join(lines)) from error


def validate_recipe(fields: Mapping[str, Any]) -> Recipe:
    """Validates a recipe given as plain data.

    Raises:
        RecipeError: the recipe is invalid. The message has one line per problem, with its field.
    """
    try:
        return narrow_recipe(Recipe.model_validate(dict(fields)))
    except ValidationError as error:
        lines = map(_format_problem, describe_problems(error, dict(fields), Recipe))
        raise RecipeError("\n".join(lines)) from error


def find_recipe(source: str | Path) -> Path:
    """Returns the recipe's file; ``source`` as for :func:`load_recipe`.

    Raises:
        RecipeError: neither a file nor a built-in recipe has this name.
    """
    path = Path(source)
    if path.is_file():
        return path
    builtin = {recipe.name: recipe.path for recipe in list_builtin()}
    name = str(source)
    if name in builtin:
        return builtin[name]
    if path.is_dir():
        raise RecipeError(f"{source} is a folder; expected a recipe file (YAML), or a name from: gdetkd recipe list")
    near = difflib.get_close_matches(name.removesuffix(".yaml"), builtin, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "to list the built-in recipes, run: gdetkd recipe list"
    raise RecipeError(f"no recipe file or built-in recipe is named {source}{name_kind(path)}; {hint}")


def load_data(source: str) -> Data:
    """Returns the data block for ``--data``.

    Args:
        source: a recipe (file or built-in name), or a folder with ``val.json`` (COCO) and ``images``.

    Raises:
        RecipeError: the recipe is not usable.
    """
    folder = Path(source)
    if folder.is_dir():
        return CocoData(format="coco", root=folder)
    try:
        return load_recipe(source).data
    except RecipeError as error:
        if folder.exists() or str(source) in {recipe.name for recipe in list_builtin()}:
            raise
        raise RecipeError(f"there is no folder {source}, and {error}") from error


def dump_recipe(recipe: Recipe) -> str:
    """Returns the recipe as YAML with all defaults; :func:`load_recipe` reads it back to an equal recipe."""
    return yaml_text.dump(recipe.model_dump(mode="json"))


def build_json_schema() -> dict[str, Any]:
    """Returns the JSON Schema of recipes, with which editors complete and check YAML."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _read(path: Path) -> tuple[object, Node]:
    """Reads the file's mapping and node tree."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        data, node = yaml_text.parse(text)
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"{path}{name_kind(path)} is not UTF-8 text (byte {error.start}); a recipe is a YAML file"
        ) from error
    except yaml_text.YamlError as error:
        place = path if error.line is None else f"{path}:{error.line}"
        raise RecipeError(f"{place}: not valid YAML: {error}") from error
    if node is None:
        raise RecipeError(f"{path} is empty; to create a recipe, run: gdetkd recipe init")
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "a single value"
        raise RecipeError(f"{path}: expected a mapping of fields (name: ..., data: ...), got {kind}")
    return data, node


def _locate(problem: Problem, path: Path, node: Node, changes: Sequence[Override]) -> str:
    """Returns the source of a problem: the last ``--set`` that changed the value, else the line in the file."""
    field = tuple(str(key) for key in problem.path)
    for change in reversed(changes):
        below = field[: len(change.path)] == change.path
        above = change.path[: len(field)] == field and not yaml_text.has_field(node, problem.path)
        if below or above:
            return f"--set {change.text}"
    return f"{path}:{yaml_text.find_line(node, problem.path)}"


def _format_problem(problem: Problem) -> str:
    """Returns ``field: message``, without a field for a problem of the whole recipe."""
    field = ".".join(str(key) for key in problem.path)
    return f"{field}: {problem.message}" if field else problem.message
