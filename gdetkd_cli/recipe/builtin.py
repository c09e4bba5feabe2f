"""The recipes that ship with gdetkd."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class BuiltinRecipe:
    """A built-in recipe. ``name`` is its path below the recipes folder, without ``.yaml``."""

    name: str
    path: Path
    title: str


def find_recipes_folder() -> Path:
    """Returns the folder of built-in recipes, in the installed package or at the top of a source checkout."""
    installed = PACKAGE / "builtin_recipes"
    return installed if installed.is_dir() else PACKAGE.parent / "recipes"


def list_builtin() -> list[BuiltinRecipe]:
    """Lists all built-in recipes, sorted by name."""
    folder = find_recipes_folder()
    return [
        BuiltinRecipe(path.relative_to(folder).with_suffix("").as_posix(), path, _read_title(path))
        for path in sorted(folder.rglob("*.yaml"))
    ]


def _read_title(path: Path) -> str:
    """Returns the second comment line; the first holds the command that runs the recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[1].lstrip("# ") if len(lines) > 1 and lines[1].startswith("#") else ""
