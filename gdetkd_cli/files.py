"""Files are written whole or not at all, so that no crash and no full disk leaves half a file under its final name.

Only regular files are read: a pipe, a socket or a device could wait for ever, or never end.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from gdetkd_cli.errors import DiskError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_URL = re.compile(r"(^|/)[a-z][a-z0-9+.-]+:/")
_ARCHIVES = {".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar"}


def name_kind(path: str | Path) -> str:
    """What stands where something else was expected, in brackets and with advice; empty for nothing or a file."""
    path = Path(path)
    if _URL.search(path.as_posix()):
        return " (a URL: download it first)"
    if any(place.suffix.lower() in _ARCHIVES and os.path.isfile(place) for place in (path, *path.parents)):
        return " (an archive: unpack it first)"
    if os.path.isdir(path):  # unlike Path, os.path also accepts impossible names
        return " (a folder)"
    if os.path.exists(path) and not os.path.isfile(path):
        return " (a pipe, a socket or a device: copy its content to a file first)"
    return ""


def walk_files(folder: Path) -> Iterator[Path]:
    """Yields the files in a folder and its subfolders, also behind links to folders.

    A link to a folder that is searched anyway, or to one above it, is not followed, so no file comes twice.
    """
    searched = [Path(os.path.realpath(folder))]
    for place, folders, names in os.walk(folder, followlinks=True):
        followed = []
        for name in sorted(folders):
            real = Path(os.path.realpath(os.path.join(place, name)))
            if os.path.islink(os.path.join(place, name)):
                if any(real.is_relative_to(other) or other.is_relative_to(real) for other in searched):
                    continue
                searched.append(real)
            followed.append(name)
        folders[:] = followed
        yield from (path for name in sorted(names) if os.path.isfile(path := Path(place, name)))


def write_file(path: Path, write: Callable[[BinaryIO], object], *, size: int | None = None) -> None:
    """Writes a file under a temporary name, flushes it to the disk, and renames it.

    Args:
        path: the file; its folder exists.
        write: writes the content into an open file.
        size: expected bytes, for the error message.

    Raises:
        DiskError: the disk or a quota is full. A file that existed at ``path`` is unchanged.
    """
    fresh = path.with_name(path.name + ".new")
    try:
        with fresh.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except (OSError, RuntimeError) as error:
        fresh.unlink(missing_ok=True)
        # torch.save raises a RuntimeError of its own while it handles the file's error.
        reason = error if isinstance(error, OSError) else error.__context__
        if isinstance(reason, OSError) and reason.errno in FULL:
            raise DiskError(_describe_full_disk(path, size)) from error
        raise


def write_encoded(path: Path, encode: Callable[[BinaryIO], object]) -> None:
    """Writes a file as ``write_file`` does, encoded in memory first.

    For Pillow, which writes a JPEG past Python: a full disk cuts the file off without an error.

    Args:
        path: the file; its folder exists.
        encode: writes the content into a buffer.
    """
    buffer = BytesIO()
    encode(buffer)
    write_file(path, lambda file: file.write(buffer.getbuffer()), size=buffer.tell())


def write_text(path: Path, text: str) -> None:
    """Writes a text file in UTF-8, as ``write_file`` does; bytes of file names that are not UTF-8 are kept."""
    content = text.encode(errors="surrogateescape")
    write_file(path, lambda file: file.write(content), size=len(content))


def _describe_full_disk(path: Path, size: int | None) -> str:
    free = shutil.disk_usage(path.parent).free
    needed = f"it needs {_format_bytes(size)}, and " if size else ""
    kept = "the file of that name is unchanged" if path.exists() else "no part of the file was left"
    return (
        f"{path} could not be written: {needed}{_format_bytes(free)} are free (a quota may allow less); {kept}. "
        "Free some space, then run the command again"
    )


def _format_bytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
