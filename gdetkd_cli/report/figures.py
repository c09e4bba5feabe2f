"""Writes matplotlib's figures to files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from matplotlib.figure import Figure

from gdetkd_cli.errors import OutputError
from gdetkd_cli.files import write_encoded


def check_drawable(path: Path) -> None:
    """Checks the suffix before an image is drawn.

    Raises:
        OutputError: matplotlib has no such format.
    """
    known = Figure().canvas.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise OutputError(f"{path}: cannot draw a file with this suffix; expected one of {', '.join(sorted(known))}")


def save_figure(figure: Figure, path: Path, *, dpi: int = 100) -> None:
    """Writes a figure whole, in the format that the suffix selects; makes the folder.

    Raises:
        DiskError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    write_encoded(path, partial(figure.savefig, format=path.suffix.removeprefix(".").lower(), dpi=dpi))
