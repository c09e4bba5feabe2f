"""Consent to run the user's own Python code: asked for once, on the command line."""

from __future__ import annotations

_given = False


def trust_code(given: bool = True) -> None:
    """Lets recipes name Python functions, which are then imported and called in this process."""
    global _given  # consent is the process's, not a recipe's: a recipe may come from anyone
    _given = given


def code_is_trusted() -> bool:
    """Whether the user agreed."""
    return _given
