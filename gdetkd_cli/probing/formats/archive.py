"""Reads the archive of a TorchScript file or exported program as torch reads it, without loading the model.

A ZIP file lists its files in several places. Python and torch can disagree about which of them counts, so a check that
reads with ``zipfile`` could see other files than torch loads. So torch's own reader reads here, and a file about which
the two disagree is refused.
"""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

from torch._C import PyTorchFileReader

from gdetkd_cli.errors import ModelError, get_first_line

_MOST_SAVED = 2**24  # bytes by compression; torch compresses code alone; torchvision's detectors have 0.5 MB of it


class Archive:
    """The files in an archive, without its top folder."""

    def __init__(self, path: Path) -> None:
        """Opens an archive.

        Raises:
            ModelError: it is incomplete or damaged, or readers could disagree about its files.
        """
        self._path = path
        try:
            self._reader = PyTorchFileReader(str(path))
            self.names = self._reader.get_all_records()
            with zipfile.ZipFile(path) as archive:
                others = [name.partition("/")[2] for name in archive.namelist()]
                size = sum(entry.file_size for entry in archive.infolist())
                plain = size <= path.stat().st_size + _MOST_SAVED
                damaged = archive.testzip() if plain else None  # torch compares no checksums
        except (RuntimeError, ValueError, IndexError, zipfile.BadZipFile, zlib.error, EOFError, OSError) as error:
            raise ModelError(f"{path} is not a whole file of torch ({get_first_line(error)}); save it anew") from error
        # torch finds a file under its name in any case, but not under a name that it lists cut off.
        distinct = len({name.casefold() for name in self.names}) == len(self.names)
        readable = all(map(self._reader.has_record, self.names))  # type: ignore[attr-defined]  # torch's stub lacks it
        if not distinct or not readable or others != self.names or not plain:
            raise ModelError(
                f"{path} is not a plain archive: it holds two files of one name, or its tables of files differ, or "
                "its files fill the memory; save it anew"
            )
        if damaged is not None:
            raise ModelError(
                f"{path} is damaged: the checksum of its file {damaged!r} does not fit; copy or save it anew"
            )

    def read(self, name: str) -> bytes:
        """Reads one file.

        Raises:
            ModelError: it is missing or damaged.
        """
        try:
            return self._reader.get_record(name)
        except RuntimeError as error:
            raise ModelError(
                f"{self._path} has no whole file {name!r} ({get_first_line(error)}); save it anew"
            ) from error
