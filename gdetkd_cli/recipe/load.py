"""YAML and ``--set`` to a validated recipe, and back."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from yaml.nodes import Node

from gdetkd_cli.errors import RecipeError
from gdetkd_cli.recipe import yaml_text
from gdetkd_cli.recipe.builtin import list_builtin
from gdetkd_cli.recipe.checks import typed_recipe
from gdetkd_cli.recipe.overrides import Override, apply, parse_override
from gdetkd_cli.recipe.problems import Problem, problems
from gdetkd_cli.recipe.schema import CocoData, Data, Recipe


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads and validates a recipe.

    Paths inside a recipe (data, weights, checkpoints) stay as written: a relative one is relative to the current
    working directory, not to the recipe's folder.

    Args:
        source: a YAML file, or the name of a built-in recipe.
        overrides: ``a.b=c`` each, as after ``--set``; validated along with the rest.

    Raises:
        RecipeError: the recipe is missing, is not YAML, or does not validate. The message has one line for each
            problem and names the file's line or the ``--set`` that it comes from.
    """
    path = find_recipe(source)
    data, node = _read(path)
    changes = [parse_override(text) for text in overrides]
    data = apply(data, changes)
    try:
        return typed_recipe(Recipe.model_validate(data))
    except ValidationError as error:
        found = problems(error, data, Recipe)
        raise RecipeError("\n".join(f"{_place(p, path, node, changes)}: {_sentence(p)}" for p in found)) from error


def validate_recipe(fields: Mapping[str, Any]) -> Recipe:
    """Validates a recipe given as plain data.

    Raises:
        RecipeError: one line for each problem, with its field.
    """
    try:
        return typed_recipe(Recipe.model_validate(dict(fields)))
    except ValidationError as error:
        raise RecipeError("\n".join(map(_sentence, problems(error, dict(fields), Recipe)))) from error


def find_recipe(source: str | Path) -> Path:
    """The recipe's file; ``source`` as for :func:`load_recipe`.

    Raises:
        RecipeError: there is no such file and no built-in recipe of that name.
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
    hint = f"did you mean {' or '.join(near)}?" if near else "to see the built-in ones: gdetkd recipe list"
    raise RecipeError(f"there is no recipe file {source}, and no built-in recipe of that name; {hint}")


def load_data(source: str) -> Data:
    """The data block that ``--data`` means.

    Args:
        source: a recipe (file or built-in name), or a folder with ``val.json`` (COCO format) and ``images``.

    Raises:
        RecipeError: the recipe is not usable.
    """
    folder = Path(source)
    return CocoData(format="coco", root=folder) if folder.is_dir() else load_recipe(source).data


def dump_recipe(recipe: Recipe) -> str:
    """The whole recipe, defaults included, as YAML that :func:`load_recipe` reads back to an equal recipe."""
    return yaml_text.dump(recipe.model_dump(mode="json"))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a recipe, for editors that complete and check YAML with it."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}


def _read(path: Path) -> tuple[object, Node]:
    """The file's mapping and its node tree."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        data, node = yaml_text.parse(text)
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}); a recipe is a YAML file") from error
    except yaml_text.YamlError as error:
        place = path if error.line is None else f"{path}:{error.line}"
        raise RecipeError(f"{place}: not valid YAML: {error}") from error
    if node is None:
        raise RecipeError(f"{path} is empty; to start a recipe: gdetkd recipe init")
    if not isinstance(data, dict):
        kind = "a list" if isinstance(data, list) else "a single value"
        raise RecipeError(f"{path}: a recipe is a mapping of fields (name: ..., data: ...), got {kind}")
    return data, node


def _place(problem: Problem, path: Path, node: Node, changes: Sequence[Override]) -> str:
    """Where a problem comes from: the last ``--set`` that put the value there, else the file's line."""
    field = tuple(str(key) for key in problem.path)
    for change in reversed(changes):
        below = field[: len(change.path)] == change.path
        above = change.path[: len(field)] == field and not yaml_text.has(node, problem.path)
        if below or above:
            return f"--set {change.text}"
    return f"{path}:{yaml_text.line_of(node, problem.path)}"


def _sentence(problem: Problem) -> str:
    """``field: what is wrong``; a problem of the recipe as a whole has no field."""
    field = ".".join(str(key) for key in problem.path)
    return f"{field}: {problem.message}" if field else problem.message
