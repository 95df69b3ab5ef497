"""What a pair wants to see of all the data before its first step.

A module anywhere in a pair may have a method ``before_fit(batches)``. `fit` calls it once with the data as an iterable
of batches (tuples of the programs' arguments, large, in their order), before anything else is run: to start at their
statistics, say. A program may have a method ``check_data(*args)``, called with its arguments, batch by batch, to refuse
what is no datum, as labels that no class has. So what can be known of the data up front costs nothing in a step, and no
step need read values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.inference.batches import Batches

_ROWS = 4096


class _Pass:
    """The data once more from the start, at each iteration; the random state stays as it was."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        batches = self.data.of(_ROWS) if isinstance(self.data, Batches) else Batches(self.data, _ROWS)
        batches.shuffle = False
        with torch.random.fork_rng():
            yield from batches


def _whole(data: Any) -> Iterable[tuple[Any, ...]]:
    """The data as few batches as may be: tensors in memory are one, so that rows have their own numbers."""
    columns = Batches(data, _ROWS, shuffle=False).columns
    return [columns] if columns is not None and all(isinstance(c, Tensor) for c in columns) else _Pass(data)


def check_data(modules: Sequence[nn.Module], data: Any) -> None:
    """Let the programs of a pair check the data, before anything is run on them.

    Args:
        modules: The pair's, from outside.
        data: As for `fit`.
    Raises:
        ValueError: What a program says against the data.
    """
    checks = [check for module in modules if callable(check := getattr(module, "check_data", None))]
    for batch in _whole(data) if checks else ():
        for check in checks:
            check(*batch)


def before_fit(modules: Sequence[nn.Module], batches: Batches) -> None:
    """Let the parts of a pair see the data, once it is known that the pair takes them.

    Args:
        modules: The pair's, from outside.
        batches: As the pair gets them.
    Raises:
        ValueError: What a part says against the data.
    """
    parts = {id(part): part for module in modules for part in module.modules()}
    for part in parts.values():
        look = getattr(part, "before_fit", None)
        if callable(look):
            look(_Pass(batches))
