"""The page as one file: markup, style and script with the payload in them, arrays as one compressed block of text.

The page may run this script, known by its hash, and use this style; it may load nothing, from anywhere. What comes
from data stands in an element of type application/json, which runs nothing and in which no "<" is left, and the script
writes it as text only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import zlib
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

LIMIT = 5_000_000  # bytes that a page of the default run has at most
_PARTS = Path(__file__).parent

KINDS = {"f2": "<f2", "f4": "<f4", "u1": "u1"}


class Arrays:
    """Arrays in one block, each at a multiple of four bytes.

    Attributes:
        table: Of each its kind, its shape and where it begins, in bytes.
    Example:
        >>> import torch
        >>> arrays = Arrays()
        >>> arrays.add(torch.tensor([1.0, 2.0, 3.0]), "f2"), arrays.add(torch.zeros(2, 2), "f4")
        (0, 1)
        >>> arrays.table[1]
        {'kind': 'f4', 'shape': [2, 2], 'start': 8}
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


def page(shown: dict[str, Any], arrays: str) -> str:
    """The file's text, from what `payload` gives."""
    parts = {name: (_PARTS / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    data = json.dumps(shown, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        data = data.replace(character, f"\\u{ord(character):04x}")
    policy = (
        f"default-src 'none'; script-src {_hash(parts['js'])}; style-src {_hash(parts['css'])}; base-uri 'none'; "
        "form-action 'none'"
    )
    filled = {
        "title": escape(str(shown["title"])), "policy": policy, "style": parts["css"], "script": parts["js"],
        "data": data, "arrays": arrays,
    }  # fmt: skip
    # In one pass: what is put in is not looked through again.
    return re.sub(r"\{\{(\w+)\}\}", lambda match: filled[match[1]], parts["html"])


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
