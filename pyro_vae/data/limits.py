"""How much a compressed file may unpack to: a file of a megabyte can hold a gigabyte of zeros.

What a file says of its own size is read before memory is asked for it, and never more is unpacked than it said. What is
not compressed and does not fit into memory goes where there is `room`.
"""

from __future__ import annotations

import gzip
import os
import struct
import zipfile
import zlib
from pathlib import Path

OPTION = "PYRO_VAE_MOST_GB"
_DEFAULT = 8.0
_BLOCK = 2**24
_CONTAINER = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
_COMPRESSED = 15  # the type of an element of a MATLAB file


def gigabytes(option: str, default: float) -> float:
    """What an environment variable says; a ValueError where that is no positive number."""
    try:
        most = float(os.environ.get(option, default))
    except ValueError:
        raise ValueError(f"got {option}={os.environ[option]!r}, wanted a number of gigabytes.") from None
    if not most > 0:
        raise ValueError(f"got {option}={os.environ[option]!r}, wanted a positive number of gigabytes.")
    return most


def machine() -> int:
    """The bytes of memory that this process may have: of the machine, or of the container around it."""
    try:
        found = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        found = 2**34
    for path in _CONTAINER:
        try:
            found = min(found, int(path.read_text()))
        except (OSError, ValueError):  # none, or "max"
            continue
    return found


def check_size(path: Path, size: int) -> None:
    """Refuse a compressed file that would unpack to more than 8 GB, or what ``PYRO_VAE_MOST_GB`` says, or than there is
    memory."""
    most = gigabytes(OPTION, _DEFAULT)
    if size > most * 1e9:
        raise ValueError(
            f"{path} would unpack to {size / 1e9:,.1f} GB, wanted at most {most:g}: it may be a decompression bomb. If "
            f"you trust it, set the environment variable {OPTION} to more."
        )
    if size > machine():
        raise ValueError(
            f"{path} would unpack to {size / 1e9:,.1f} GB, wanted at most the {machine() / 1e9:,.1f} GB of memory that "
            "are here: archives are read whole. Save the data as a .npy file of uint8 levels or float32, which is read "
            "from where it lies."
        )


def gunzip(path: Path, begins: int) -> bytes:
    """The bytes of a gzipped IDX file whose header has so many bytes, and one more if there is more than it says.

    Raises:
        EOFError, OSError, zlib.error: It is damaged.
        ValueError: It would be too large.
    """
    with gzip.open(path) as file:
        header = file.read(begins)
        axes = header[3] if len(header) == begins else 0
        size = 1
        for (length,) in struct.iter_unpack(">I", header[4 : 4 + 4 * min(axes, (begins - 4) // 4)]):
            size *= length
        check_size(path, size)
        parts, left = [header], size + 1
        while left > 0 and (
            part := file.read(min(left, _BLOCK))
        ):  # a file that promises more than it has costs nothing
            parts.append(part)
            left -= len(part)
        return b"".join(parts)


def check_archive(path: Path) -> None:
    """Refuse a zip file (.npz) whose members would be too large."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            check_size(path, sum(member.file_size for member in archive.infolist()))


def check_mat(path: Path) -> None:
    """Refuse a MATLAB file of version 5 whose compressed elements would be too large."""
    total, length = 0, path.stat().st_size
    with path.open("rb") as file:
        file.seek(126)
        order = {b"IM": "<", b"MI": ">"}.get(file.read(2))
        while order is not None and file.tell() + 8 <= length:
            kind, size = struct.unpack(f"{order}II", file.read(8))
            after = file.tell() + size
            if kind == 0:  # what is no element is said where it is read
                break
            if kind == _COMPRESSED:
                inner, unpacker, left = b"", zlib.decompressobj(), size
                try:
                    while len(inner) < 8 and left > 0 and (part := file.read(min(left, 4096))):
                        inner += unpacker.decompress(unpacker.unconsumed_tail + part, 8 - len(inner))
                        left -= len(part)
                except zlib.error:
                    return
                total += struct.unpack(f"{order}II", inner)[1] if len(inner) == 8 else 0
            file.seek(after)
    check_size(path, total)
