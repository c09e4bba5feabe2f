"""Images that cannot be read: left out, counted and listed, up to a limit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gdetkd_cli.errors import DataError
from gdetkd_cli.text import show_hidden


class BadImageError(DataError):
    """An image cannot be read.

    Args:
        problem: the end of a sentence about it.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(path, problem)  # loader processes pickle these
        self.path = path
        self.problem = problem

    def __str__(self) -> str:
        return f"the image {self.path} {self.problem}"


class BadImages:
    """The unreadable images of a split that this process has left out.

    Args:
        most: number of images that may be left out.

    Attributes:
        errors: one per image that is left out.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.errors: list[BadImageError] = []
        self._found: dict[str, str] = {}  # messages by file
        self._listed: set[str] = set()
        self._list: Path | None = None
        self._warn: Callable[[str], None] | None = None

    def __reduce__(self) -> tuple[type[BadImages], tuple[int]]:
        """Loader processes get an empty copy; they report to this process."""
        return BadImages, (self.most,)

    def report_to(self, warn: Callable[[str], None]) -> None:
        """Calls ``warn`` once with each image, those found already included."""
        self._warn = warn
        for number, message in enumerate(self._found.values(), start=1):
            warn(self._format(number, message))

    def list_in(self, file: Path) -> None:
        """Adds a line to ``file`` for each image that it lacks, those found already included."""
        self._list = file
        if file.exists():
            self._listed = {line.partition("\t")[0] for line in file.read_text(encoding="utf-8").splitlines()}
        for name, message in self._found.items():
            self._write(name, message)

    def add(self, error: BadImageError) -> None:
        """Notes an image that is left out, once.

        Raises:
            DataError: more than ``most`` images are left out.
        """
        name, message = show_hidden(str(error.path)), str(error)
        if name in self._found:
            return
        self._found[name] = message
        self.errors.append(error)
        self._write(name, message)
        if self._warn is not None:
            self._warn(self._format(len(self._found), message))
        if len(self._found) > self.most:
            raise DataError(
                f"{len(self._found)} images cannot be read, more than data.max_bad_samples allows ({self.most}); the "
                f"last one: {message}"
            )

    def _format(self, number: int, message: str) -> str:
        return f"warning: left out image {number} of at most {self.most}: {message}"

    def _write(self, name: str, message: str) -> None:
        if self._list is not None and name not in self._listed:
            self._listed.add(name)
            with self._list.open("a", encoding="utf-8") as file:  # one short write, as other processes add lines, too
                file.write(f"{name}\t{show_hidden(message)}\n")
