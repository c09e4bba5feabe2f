"""Writes archives that torch did not write."""

from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path

_END = b"PK\x05\x06"


def read_files(path: Path) -> dict[str, bytes]:
    """Reads the files in an archive."""
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def write_files(path: Path, files: dict[str, bytes]) -> None:
    """Writes an archive."""
    path.write_bytes(_pack(files))


def write_with_two_tables(path: Path, *, hostile: dict[str, bytes], benign: dict[str, bytes]) -> None:
    """Writes an archive with two tables of the same file names: torch reads ``hostile``, ``zipfile`` reads ``benign``.

    The end of a ZIP file states where its table begins. ``zipfile`` takes the bytes right before the end instead, and
    counts the difference as bytes that were put before the archive.
    """
    (first, table, end), (second, other, _) = map(_split, map(_pack, (hostile, benign)))
    assert len(table) == len(other)
    shift, at, moved = len(first) - len(second), 0, bytearray(other)
    while at < len(moved):
        lengths = struct.unpack_from("<3H", moved, at + 28)
        (offset,) = struct.unpack_from("<i", moved, at + 42)
        struct.pack_into("<i", moved, at + 42, offset + shift)
        at += 46 + sum(lengths)
    end = end[:12] + struct.pack("<2I", len(table), len(first)) + end[20:]
    path.write_bytes(first + table + second + moved + end)


def _pack(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return content.getvalue()


def _split(archive: bytes) -> tuple[bytes, bytes, bytes]:
    """Splits an archive into its files, its table of files and its end."""
    at = archive.rindex(_END)
    size, offset = struct.unpack_from("<2I", archive, at + 12)
    return archive[:offset], archive[offset : offset + size], archive[at:]
