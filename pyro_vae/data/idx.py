"""The IDX format of MNIST and its descendants, gzipped or not, read with every check.

A file is a magic number (two zero bytes, a type byte that is 0x08 for unsigned bytes,
the number of axes), one big-endian 32-bit size per axis, then the bytes. A reader that
trusts the header hands over noise when a download broke off, so this one trusts nothing.
"""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

__all__ = ["read_idx"]

KINDS = {1: "labels", 3: "images"}


def read_idx(path: str | Path, axes: int) -> Tensor:
    """The unsigned bytes in an IDX file.

    Args:
        path: The file; one that begins like gzip is decompressed, whatever its name.
        axes: Number of axes wanted: 3 for images (N, H, W), 1 for labels (N,).
    Returns:
        uint8 of the shape in the file's header.
    Raises:
        ValueError: If the file is empty, cut short, too long, corrupt, no IDX file of
            unsigned bytes, or one of another number of axes.
    """
    raw = _read_bytes(Path(path))
    if not raw:
        raise ValueError(f"{path} is empty, wanted an IDX file. Fetch it again.")
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} starts with magic number {raw[:4].hex() or 'nothing'}, wanted {0x800 + axes:08x} "
                         f"(IDX, unsigned bytes, {axes} axes). It is another kind of file; fetch it again.")
    if raw[3] != axes:
        raise ValueError(f"{path} has {raw[3]} axes ({KINDS.get(raw[3], 'neither images nor labels')}), wanted {axes} "
                         f"({KINDS.get(axes, 'data')}). Were image and label files swapped?")
    start = 4 + 4 * axes
    if len(raw) < start:
        raise ValueError(f"{path} is truncated: its header has {len(raw)} bytes, wanted {start}. Fetch it again.")
    shape = struct.unpack(f">{axes}I", raw[4:start])
    size = math.prod(shape)
    if len(raw) - start < size:
        raise ValueError(f"{path} is truncated: its header promises {'x'.join(map(str, shape))} = {size} bytes, "
                         f"got {len(raw) - start}. Fetch it again.")
    if len(raw) - start > size:
        raise ValueError(
            f"{path} is too long: its header promises {size} bytes, got {len(raw) - start}. Fetch it again."
        )
    if size == 0:
        raise ValueError(f"{path} is empty: its header says {'x'.join(map(str, shape))}, wanted at least one item.")
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape).copy())


def _read_bytes(path: Path) -> bytes:
    raw = path.read_bytes()
    if raw[:2] != b"\x1f\x8b":
        if path.suffix == ".gz" and raw:
            raise ValueError(f"{path} is a corrupt gzip file (it starts with {raw[:2].hex()}, wanted 1f8b). "
                             "Fetch it again.")
        return raw
    try:
        return gzip.decompress(raw)
    except EOFError:
        raise ValueError(f"{path} is truncated: the gzip stream breaks off after {len(raw)} bytes. "
                         "Fetch it again.") from None
    except (OSError, zlib.error) as error:
        raise ValueError(f"{path} is a corrupt gzip file ({error}). Fetch it again.") from None
