"""The user's consent to run Python code named in a recipe, given once on the command line."""

from __future__ import annotations

_given = False


def trust_code(given: bool = True) -> None:
    """Allows recipes to name Python functions, which are imported and called in this process."""
    global _given  # per process, not per recipe: a recipe may come from anyone
    _given = given


def is_code_trusted() -> bool:
    """Whether the user has given consent."""
    return _given
