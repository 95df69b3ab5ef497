"""Room for data: in memory, and in a file where they are more than a quarter of it.

A tensor over a file is like any other: what is read of it are pages, which the kernel takes back when it needs them.
A file of arrays that can be used as it is stays where it is. What has to be made first (pictures that are decoded,
numbers of another type, a draw for good) goes to a temporary file without a name, which is gone with the process.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.limits import gigabytes, machine

OPTION = "PYRO_VAE_MEMORY_GB"
_SHARE = 4
_AT_ONCE = 2**22  # numbers


def fits(size: int) -> bool:
    """Whether so many bytes of data go into memory: a quarter of this machine's, or what ``PYRO_VAE_MEMORY_GB`` says.

    Example:
        >>> fits(10_000), fits(2**60)
        (True, False)
    """
    return size <= gigabytes(OPTION, machine() / _SHARE / 1e9) * 1e9


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """A tensor to be filled; on the CPU it lies in a temporary file where it is large.

    The file is in $TMPDIR, else in /var/tmp, which lies on a disk where /tmp may be memory.

    Raises:
        ValueError: The disk has no room for it.
    """
    size = math.prod(shape) * dtype.itemsize
    if torch.device(device).type != "cpu" or fits(size):
        return torch.empty(shape, dtype=dtype, device=device)
    folder = os.environ.get("TMPDIR") or ("/var/tmp" if os.path.isdir("/var/tmp") else tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    if size > free:
        raise ValueError(
            f"data of {size / 1e9:,.1f} GB are too large for memory and for {folder}, which has {free / 1e9:,.1f} GB "
            f"left; wanted room for a temporary file. Set TMPDIR to a folder on a disk that has it, or {OPTION} to as "
            "many GB as may be in memory. A .npy file of uint8 levels or of float32 is read from where it lies."
        )
    with tempfile.TemporaryFile(dir=folder) as file:
        if hasattr(os, "posix_fallocate"):  # a disk that fills up later would end the process
            os.posix_fallocate(file.fileno(), 0, size)
        array = np.memmap(file, mode="r+", shape=(size,), dtype=np.uint8)
    return torch.from_numpy(np.asarray(array)).view(dtype).view(shape)


def joined(pieces: Iterable[Tensor], count: int) -> Tensor:
    """Pieces of `count` rows in all, one after the other, as one tensor where there is room for it.

    Example:
        >>> joined((torch.full((2, 1), float(i)) for i in range(2)), 4).flatten()
        tensor([0., 0., 1., 1.])
    """
    whole, start = torch.empty(0), 0
    for piece in pieces:
        if not start:
            whole = empty((count, *piece.shape[1:]), piece.dtype, piece.device)
        whole[start : start + len(piece)] = piece
        start += len(piece)
    return whole


def steps(shape: tuple[int, ...], most: int = 4096) -> Iterator[slice]:
    """All rows of data of some shape, so many at a time as take little memory: at most `most`, by fours.

    Example:
        >>> list(steps((10, 2**20)))[-1]
        slice(8, 12, None)
    """
    rows = min(most, max(4, _AT_ONCE // max(1, math.prod(shape[1:])) // 4 * 4))
    return (slice(start, start + rows) for start in range(0, shape[0], rows))


def in_file(array: Any) -> bool:
    """Whether an array is a memory map, or a view of one."""
    return isinstance(array, np.ndarray) and getattr(array, "_mmap", None) is not None


def shared(array: np.ndarray) -> Tensor:
    """An array as a tensor of the same memory, or the same file, that nobody writes to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(np.asarray(array))


def range_of(data: Tensor) -> tuple[Tensor | None, float, float]:
    """Which rows of floats hold NaN or infinities, (N,), None where all are finite; and the least and largest number.

    Example:
        >>> range_of(torch.tensor([[0.5, 2.0], [1.0, float("nan")]]))[0]
        tensor([False,  True])
    """
    bad, ends = [], []
    for few in steps(tuple(data.shape)):
        part = data[few]
        bad.append(~torch.isfinite(part).flatten(1).all(1))
        ends += [float(part.min()), float(part.max())]
    found = torch.cat(bad)
    return (found if bool(found.any()) else None), min(ends), max(ends)
