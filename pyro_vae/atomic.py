"""Files that are there whole or not at all: written beside their place, then renamed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: str | os.PathLike[str], write: Callable[[Path], Any], *, new: bool = False) -> None:
    """Have a file written beside its place and renamed, so that readers never see half of it.

    `write` gets a path of the same suffix; the file's folder must exist. Where nothing can be written there, it is an
    OSError, and an older file is as it was; so it is, without an error, where the file is to be a `new` one.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     replace_file(Path(folder, "a.txt"), lambda partial: partial.write_text("whole"))
        ...     [path.name for path in Path(folder).iterdir()]
        ['a.txt']
    """
    path = Path(path)
    partial = path.with_name(f".partial-{os.getpid()}-{path.name}")
    try:
        write(partial)
        _to_disk(partial)
        if new:
            with contextlib.suppress(FileExistsError):
                os.link(partial, path)
        else:
            os.replace(partial, path)
        _to_disk(path.parent)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _to_disk(path: Path) -> None:
    """Have what was written outlast a power cut, where the system can."""
    with contextlib.suppress(OSError):
        place = os.open(path, os.O_RDONLY)
        try:
            os.fsync(place)
        finally:
            os.close(place)


def write_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """As `replace_file`, for a user who named the file: its folder is made, and what goes wrong is a ValueError."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, write)
    except OSError as error:
        raise ValueError(f"got {path}, wanted a file to write to: {reason_of(error)}.") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """As `write_file`, of a text in UTF-8."""
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def reason_of(error: OSError) -> str:
    """What the system says, in lower case."""
    return (error.strerror or str(error)).lower()
