"""The precision of float32 matrix products, which torch keeps in two ways at once.

``torch.backends.mkldnn.matmul.fp32_precision`` and its like can say more than ``torch.set_float32_matmul_precision``,
and make that one raise where they have. Here both are read and put back.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch


class Precision(NamedTuple):
    """What is set: the older name, None where the newer settings say something that has none; and these."""

    name: str | None
    cpu: str | None
    gpu: str | None

    def __str__(self) -> str:
        return self.name or f"cpu {self.cpu}, gpu {self.gpu}"


def _places() -> tuple[Any, Any]:
    """Where the newer settings are; an older torch has none of them."""
    return getattr(torch.backends.mkldnn, "matmul", None), torch.backends.cuda.matmul


def current() -> Precision:
    """What is set now."""
    try:
        name: str | None = torch.get_float32_matmul_precision()
    except RuntimeError:
        name = None
    return Precision(name, *(getattr(place, "fp32_precision", None) for place in _places()))


def put_back(before: Precision) -> None:
    """Set what was set before."""
    if before == current():
        return
    torch.set_float32_matmul_precision(before.name or "highest")
    for place, value in zip(_places(), before[1:], strict=True):
        if value is not None:
            place.fp32_precision = value


@contextlib.contextmanager
def kept(name: str | None = None) -> Iterator[None]:
    """Inside, this precision by its older name, if any; afterwards what was set before.

    Example:
        >>> before = current()
        >>> with kept("medium"):
        ...     str(current())
        'medium'
        >>> current() == before
        True
    """
    before = current()
    if name is not None:
        torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        put_back(before)
