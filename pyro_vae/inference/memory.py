"""Memory that is freed and taken again in every step stays with the process.

A step with K particles makes a dozen tensors of tens of megabytes and frees them. By
default glibc gives each back to the kernel, which hands it out again zeroed, page by page:
with 50 particles of MNIST a good part of the step. While `reused_memory` is active such memory is
kept for the next step; the price is that the process stays at its peak until the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import platform
from collections.abc import Iterator
from typing import Any

# From malloc.h, and what glibc arrives at by itself in a process that frees large blocks.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_USUAL = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 32 * 2**20, _TRIM_THRESHOLD: 64 * 2**20}
_depth = 0


@contextlib.contextmanager
def reused_memory() -> Iterator[None]:
    """Keep freed memory for the next step; give it back to the system at the end.

    Does nothing where the C library is not glibc.

    Example:
        >>> import torch
        >>> with reused_memory():
        ...     total = sum(torch.ones(1000, 1000).sum().item() for _ in range(3))
        >>> total
        3000000.0
    """
    global _depth
    library = _glibc()
    _depth += 1
    if library is not None and _depth == 1:
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    try:
        yield
    finally:
        _depth -= 1
        if library is not None and _depth == 0:
            for name, value in _USUAL.items():
                library.mallopt(name, value)
            library.malloc_trim(0)


@functools.cache
def _glibc() -> Any:
    if platform.libc_ver()[0] != "glibc":
        return None
    try:
        library = ctypes.CDLL(None)
        return library if hasattr(library, "mallopt") and hasattr(library, "malloc_trim") else None
    except OSError:
        return None
