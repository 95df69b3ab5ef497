"""What a fit shows and keeps on its way: the history, the bar, the best weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from pyro_vae.words import did_you_mean

BAR = "{desc} {percentage:3.0f}%|{bar}| {left} left{postfix}"  # within 80 columns

# What a record may hold.
COLUMNS = ("epoch", "loss", "bound", "validation", "learning_rate", "beta", "seconds", "images_per_second")


@dataclass
class History:
    """What a fit did, one record per epoch.

    Attributes:
        records: Per epoch: ``epoch``, ``loss`` (what was minimised, nats per datum),
            ``bound`` (the untempered bound on the training batches where it is known, per
            datum too: see `pyro_vae.inference.per_datum`),
            ``validation`` (where validation data were given), ``learning_rate``,
            ``beta`` (these two of the epoch's last step), ``seconds`` since the start,
            ``images_per_second``.
        best_epoch: The epoch whose weights were kept.
        stopped_early: Patience ran out.
        interrupted: Ctrl-C ended the fit; the weights are those of that moment.
        products: The libraries that captured steps multiplied matrices by on a CPU, as they were chosen here (see
            `pyro_vae.inference.products`); empty where the steps were the programs' own.
    """

    records: list[dict[str, Any]] = field(default_factory=list)
    best_epoch: int | None = None
    stopped_early: bool = False
    interrupted: bool = False
    products: list[str] = field(default_factory=list)

    def __getitem__(self, column: str) -> list[Any]:
        """One column over the epochs, such as history["loss"]; None where a record has no such number.

        Raises:
            ValueError: No such column.
        """
        known = [*COLUMNS, *(key for record in self.records for key in record if key not in COLUMNS)]
        if column not in known:
            there = [name for name in dict.fromkeys(known) if any(name in record for record in self.records)] or COLUMNS
            raise ValueError(
                f"got the column {column!r}, wanted one of {', '.join(there)}.{did_you_mean(column, there)}"
            )
        return [record.get(column) for record in self.records]

    def to_frame(self) -> Any:
        """The records as a pandas frame, one row per epoch.

        Raises:
            ValueError: pandas is missing.
        """
        try:
            import pandas
        except ImportError as error:
            raise ValueError("to_frame needs pandas, which is not installed. Run: pip install pandas") from error
        return pandas.DataFrame(self.records)

    def plot(self, ax: Any = None) -> Any:
        """Training and validation bound by epoch, as a figure, or drawn into `ax`."""
        from pyro_vae.plots import training_curve

        return training_curve(self.records, ax=ax)

    def __len__(self) -> int:
        return len(self.records)


class Bar(tqdm):  # type: ignore[type-arg]  # generic for type checkers only
    """A bar whose time left has what comes after the fit in it."""

    ahead = 0.0

    @property
    def format_dict(self) -> dict[str, Any]:
        found = super().format_dict
        done, elapsed = found["n"] - found["initial"], found["elapsed"]
        rate = found["rate"] or (done / elapsed if elapsed else 0)
        left = tqdm.format_interval((found["total"] - found["n"]) / rate + self.ahead) if rate else "?"
        return {**found, "left": left}


class Best:
    """The best tensors so far: those of all modules, with their buffers, and all others that were trained."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.modules = modules
        self.epoch = 0
        self.value = -math.inf
        self.copies: list[tuple[Tensor, Tensor]] = []
        self._homes: dict[tuple[int, str], Tensor] = {}
        self.settle()

    def settle(self) -> None:
        """Bring home what a program put in a buffer's place, so that the buffer is the one that is kept and written."""
        for part in (part for module in self.modules for part in module.modules()):
            for name, now in part._buffers.items():
                home = now if now is None else self._homes.setdefault((id(part), name), now)
                if home is None or now is None or home is now or home.shape != now.shape or home.dtype != now.dtype:
                    continue
                with torch.no_grad():
                    home.copy_(now)
                part._buffers[name] = home

    def offer(self, value: float, epoch: int, trained: Sequence[Tensor]) -> None:
        value = -math.inf if math.isnan(value) else value
        if value > self.value or not self.epoch:
            self.value, self.epoch = value, epoch
            tensors = [t for m in self.modules for t in (*m.parameters(), *m.buffers())]
            tensors += trained  # those of plain functions: in the param store, or networks given to pyro.module
            self.copies = [(t, t.detach().clone()) for t in {id(t): t for t in tensors}.values()]

    def restore(self) -> None:
        with torch.no_grad():
            for tensor, copied in self.copies:
                tensor.copy_(copied)
