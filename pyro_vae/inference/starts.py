"""What a pair wants to see of all the data before its first step.

A module anywhere in a pair that is `SeesData` is shown all data, and a program that is `ChecksData` may refuse them
(see `pyro_vae.protocols`), so that no step need read values.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from pyro_vae.inference.batches import Batches
from pyro_vae.protocols import ChecksData, SeesData
from pyro_vae.randomness import forked
from pyro_vae.reach import parts_in

_ROWS = 4096


class _Pass:
    """The data once more from the start, at each iteration; the random state stays as it was."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        batches = self.data.of(_ROWS) if isinstance(self.data, Batches) else Batches(self.data, _ROWS)
        batches.shuffle = False
        with forked():
            yield from batches


def _whole(data: Any) -> Iterable[tuple[Any, ...]]:
    """The data as few batches as may be: tensors in memory are one, so that rows have their own numbers."""
    columns = Batches(data, _ROWS, shuffle=False).columns
    return [columns] if columns is not None and all(isinstance(c, Tensor) for c in columns) else _Pass(data)


def check_data(modules: Sequence[nn.Module], data: Any) -> None:
    """Let the programs of a pair check the data, before anything is run on them; they refuse by a ValueError."""
    checks = [module.check_data for module in modules if isinstance(module, ChecksData)]
    for batch in _whole(data) if checks else ():
        for check in checks:
            check(*batch)


def before_fit(modules: Sequence[nn.Module], batches: Batches) -> None:
    """Let the parts of a pair see the data, once it is known that the pair takes them; they refuse by a ValueError."""
    for part in parts_in(modules):
        if isinstance(part, SeesData):
            part.before_fit(_Pass(batches))
