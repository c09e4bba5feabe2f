"""Recipes as trees, recipes as text, `--set`, and the command line."""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from inspect import isfunction
from pathlib import Path
from typing import Any
from unittest.mock import Mock, patch

import yaml
from fuzzing import AcceptedSilentlyError, Target
from mutate import ODD_VALUES, get, list_places, mutate_bytes, mutate_tree, replace
from typer.testing import CliRunner

from gdetkd_cli import commands
from gdetkd_cli.cli.app import app
from gdetkd_cli.errors import GDetKDError
from gdetkd_cli.recipe.builtin import list_builtin
from gdetkd_cli.recipe.load import dump_recipe, load_recipe
from gdetkd_cli.recipe.schema import Recipe

# YAML as a user could type it where a number belongs; none of them is a number that a recipe takes.
NO_NUMBERS = (
    "yes", "no", "true", "010", "1:30", ".inf", "-.inf", ".nan", "1e400", "'12'", "1_0.5", "0b11", "12px", "-1e12",
    "9" * 400, "-" + "9" * 400, "[]", "[1]", "{}", "{a: 1}", "2026-01-31", "!!str 5", "1e-", "0o17", "١٢", "1,5",
    "&a [*a]",
)  # fmt: skip
_MARK = "raw value"
_FREE = ("arguments", "config")  # the user's own; checked when the detector is built
_KEYS: tuple[Any, ...] = (None, 1, True, 1.5, "", "x", "a.b", "name", "<<")


def _prepare(folder: Path) -> list[Any]:
    recipes = [load_recipe(recipe.path) for recipe in list_builtin()]
    return [yaml.safe_load(dump_recipe(recipe)) for recipe in recipes]


def _check(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    recipe = load_recipe(path, overrides)
    text = dump_recipe(recipe)
    path.write_text(text, encoding="utf-8")
    if load_recipe(path) != recipe:
        raise AcceptedSilentlyError(f"a recipe that is not read back as it was written: {text[:200]}")
    for place in list_places(yaml.safe_load(text)):
        value = get(yaml.safe_load(text), place)
        if isinstance(value, float) and not math.isfinite(value) and not set(_FREE) & set(place):
            raise AcceptedSilentlyError(f"{place} is {value}")
    return recipe


def _is_number(tree: Any, place: tuple[Any, ...]) -> bool:
    value = get(tree, place)
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not set(_FREE) & set(place)


def run_wrong_number(rng: random.Random, folder: Path, recipes: list[Any]) -> None:
    """Writes something else where a number belongs; the recipe must be refused."""
    tree = rng.choice(recipes)
    place = rng.choice([place for place in list_places(tree) if _is_number(tree, place)])
    raw = rng.choice(NO_NUMBERS)
    path = folder / "recipe.yaml"
    if rng.random() < 0.5:
        text = yaml.safe_dump(replace(tree, place, _MARK), sort_keys=False, allow_unicode=True)
        path.write_text(text.replace(f"'{_MARK}'", raw).replace(_MARK, raw), encoding="utf-8")
        _check(path)
    else:
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        _check(path, (f"{'.'.join(map(str, place))}={raw}",))
    raise AcceptedSilentlyError(f"{'.'.join(map(str, place))}: {raw}")


def run_tree(rng: random.Random, folder: Path, recipes: list[Any]) -> None:
    tree = mutate_tree(rng, rng.choice(recipes))
    if rng.random() < 0.2 and isinstance(tree, dict):
        places = [place for place in list_places(tree) if isinstance(get(tree, place), dict)]
        block = get(tree, rng.choice([(), *places]))
        block[rng.choice(_KEYS)] = rng.choice(ODD_VALUES)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8", errors="surrogatepass")
    _check(path)


def run_text(rng: random.Random, folder: Path, recipes: list[Any]) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(mutate_bytes(rng, rng.choice(list_builtin()).path.read_bytes()))
    _check(path)


def run_set(rng: random.Random, folder: Path, recipes: list[Any]) -> None:
    tree = rng.choice(recipes)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    overrides = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        keys = [str(key) for key in rng.choice(list(list_places(tree)))]
        for _ in range(rng.choice((0, 0, 1, 2))):
            keys.insert(
                rng.randrange(len(keys) + 1), rng.choice(("0", "99", "9" * 5000, "²", "x", "", "-1", " ", "name"))
            )
        value = rng.choice((*NO_NUMBERS, *map(str, ODD_VALUES), "[" * 3000, "a: b: c", "{x: {y: [1, 2]}}", "null"))
        overrides.append(mutate_bytes(rng, f"{'.'.join(keys)}={value}".encode()).decode(errors="replace")
                         if rng.random() < 0.2 else f"{'.'.join(keys)}={value}")  # fmt: skip
    _check(path, tuple(overrides))


_NUMBERS = (
    "0",
    "-1",
    "1",
    "3",
    "010",
    "1e3",
    "nan",
    "inf",
    "9" * 30,
    "9" * 5000,
    "1:30",
    "",
    " ",
    "²",
    "0x10",
    "5,",
    ",",
)
_TEXTS = (
    "",
    " ",
    "x",
    "a,b",
    "\udcff",
    "\u202e",
    "../x",
    "/dev/null",
    "x" * 5000,
    "[red]",
    "%s",
    "{0}",
    "builtin:",
    "a:b",
)
_OPTIONS = {
    "probe": ("--size", "--range", "--mean", "--std", "--levels", "--image", "--plot", "--recipe", "--channels"),
    "train": ("--recipe", "--detector", "--set", "--output", "--resume", "--steps"),
    "distill": ("--recipe", "--set", "--output", "--profile", "--dry-run", "--resume", "--steps", "--force"),
    "compare": ("--methods", "--steps", "--seeds", "--folds", "--jobs", "--baseline", "--set", "--output"),
    "bench": ("--steps", "--set"),
    "eval": ("--data",),
    "export": ("--onnx", "--torchscript", "--output"),
    "init": ("--teacher", "--student", "--data", "--output"),
    "demo": ("--seed", "--steps", "--output"),
    "recipe": ("--set", "--deep"),
}
_COMMANDS = [name for name, value in vars(commands).items() if isfunction(value)]
_FLAGS = ("--dry-run", "--force", "--onnx", "--torchscript", "--deep")


def run_command(rng: random.Random, folder: Path, recipes: list[Any]) -> None:
    """Runs a command line; the commands themselves are stand-ins, so that only its values count."""
    name = rng.choice(list(_OPTIONS))
    arguments = [name]
    if name == "recipe":
        arguments.append(rng.choice(("validate", "show", "init", "x")))
    if name not in ("train", "distill", "demo", "init") and rng.random() < 0.9:
        arguments.append(rng.choice(("shapes/frcnn-fcos", "shapes/teacher", "nowhere.pt", *_TEXTS)))
    for option in rng.sample(_OPTIONS[name], rng.randrange(len(_OPTIONS[name]) + 1)):
        arguments.append(option)
        if option not in _FLAGS:
            values = [rng.choice((*_NUMBERS, *_TEXTS, "shapes/frcnn-fcos", "640x480", "train.steps=3"))]
            values *= 3 if option in ("--mean", "--std") else 1
            arguments += values
    stop = Mock(side_effect=GDetKDError("a stand-in"))
    with _work_in(folder / "a" / "b"), patch.multiple(commands, **dict.fromkeys(_COMMANDS, stop)):
        result = CliRunner().invoke(app, arguments, prog_name="gdetkd")
    if result.exit_code == 70 or (result.exception is not None and not isinstance(result.exception, SystemExit)):
        raise RuntimeError(f"{arguments}: {result.exception!r}: {result.output[-500:]}") from result.exception
    if result.exit_code != 0:
        raise GDetKDError(result.output[-300:])


@contextmanager
def _work_in(folder: Path) -> Iterator[None]:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    with chdir(folder):
        yield


TARGETS = [
    Target("recipe-number", 3000, _prepare, run_wrong_number),
    Target("recipe-tree", 3000, _prepare, run_tree),
    Target("recipe-text", 2000, _prepare, run_text),
    Target("recipe-set", 2000, _prepare, run_set),
    Target("command-line", 2000, _prepare, run_command),
]
