"""Text from files of strangers, made safe to show."""

from __future__ import annotations


def show_hidden(text: str, *, keep: str = "") -> str:
    r"""Replaces characters that a terminal obeys or hides by visible ones, as ``\x1b`` or ``\u202e``.

    These are all that Python calls unprintable: control characters, marks that reverse or hide text, unusual spaces,
    and bytes of file names that are not UTF-8.

    Args:
        text: for example the name of a class or a file.
        keep: unprintable characters to leave as they are, such as the line breaks of a message.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)
