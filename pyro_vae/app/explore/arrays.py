"""Arrays for a page: one after another in one block of bytes, compressed, each known by its number."""

from __future__ import annotations

import base64
import zlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

KINDS = {"f2": "<f2", "f4": "<f4", "u1": "u1"}


class Arrays:
    """Arrays in one block, each at a multiple of four bytes.

    Attributes:
        table: Of each its kind, its shape and where it begins, in bytes.
    Example:
        >>> arrays = Arrays()
        >>> arrays.add(torch.tensor([1.0, 2.0, 3.0]), "f2"), arrays.add(torch.zeros(2, 2), "f4")
        (0, 1)
        >>> arrays.table[1]
        {'kind': 'f4', 'shape': [2, 2], 'start': 8}
        >>> unpacked(arrays.packed(), arrays.table)[0].tolist()
        [1.0, 2.0, 3.0]
    """

    def __init__(self) -> None:
        self.table: list[dict[str, Any]] = []
        self._parts: list[bytes] = []
        self._size = 0

    def add(self, values: Tensor, kind: str) -> int:
        """Keep an array as "f2" (float16), "f4" (float32) or "u1" (bytes); its number."""
        with np.errstate(over="ignore"):  # what float16 cannot hold is found where its decoder is compared
            array = values.detach().cpu().numpy().astype(KINDS[kind])
        data = array.tobytes()
        self.table.append({"kind": kind, "shape": list(array.shape), "start": self._size})
        self._parts += [data, bytes(-len(data) % 4)]
        self._size += len(data) + -len(data) % 4
        return len(self.table) - 1

    def packed(self) -> str:
        """The block, deflated without a header, in base64."""
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        return base64.b64encode(b"".join([deflate.compress(b"".join(self._parts)), deflate.flush()])).decode("ascii")


def unpacked(packed: str, table: list[dict[str, Any]]) -> list[Tensor]:
    """What the page makes of it: the arrays, floats as float32."""
    block = zlib.decompress(base64.b64decode(packed), -15)
    found = []
    for entry in table:
        count = int(np.prod(entry["shape"], dtype=int))
        flat = np.frombuffer(block, KINDS[entry["kind"]], count, entry["start"]).reshape(entry["shape"])
        found.append(torch.from_numpy(flat.copy() if entry["kind"] == "u1" else flat.astype(np.float32)))
    return found
