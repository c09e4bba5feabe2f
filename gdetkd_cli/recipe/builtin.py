"""The recipes that ship with gdetkd."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parent.parent


@dataclass(frozen=True)
class BuiltinRecipe:
    """A recipe by its name: the path below the folder, without ``.yaml``."""

    name: str
    path: Path
    title: str


def recipes_folder() -> Path:
    """Where the built-in recipes are: inside an installed package, or at the top of a source checkout."""
    installed = _PACKAGE / "builtin_recipes"
    return installed if installed.is_dir() else _PACKAGE.parent / "recipes"


def list_builtin() -> list[BuiltinRecipe]:
    """All built-in recipes, by name."""
    folder = recipes_folder()
    return [
        BuiltinRecipe(path.relative_to(folder).with_suffix("").as_posix(), path, _title(path))
        for path in sorted(folder.rglob("*.yaml"))
    ]


def _title(path: Path) -> str:
    """The second comment line; the first is the command that runs the recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return lines[1].lstrip("# ") if len(lines) > 1 and lines[1].startswith("#") else ""
