"""Batches of whatever people hold their data in, on the right device, in a seeded order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor


@contextlib.contextmanager
def seeded(seed: int | None) -> Iterator[None]:
    """Seed torch inside, and leave its random state outside as it was; None does nothing."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


class Batches:
    """Minibatches, each a tuple of the programs' positional arguments.

    Args:
        data: A tensor or array (N, ...), a tuple of them, a TensorDataset, anything with ``len`` that an index
            tensor turns into a batch, or an iterable of batches.
        batch_size: B.
        device: Where the batches go.
        shuffle: A fresh order in every pass.
    Attributes:
        home: Where the data lie: on a GPU that is the device, where they take little of its memory.
    Raises:
        ValueError: No data, tensors of different length, or nothing that can be batched.
    Example:
        >>> [len(x) for (x,) in Batches(torch.arange(5.0), 2, shuffle=False)]
        [2, 2, 1]
    """

    def __init__(
        self, data: Any, batch_size: int, device: torch.device | str | None = None, shuffle: bool = True
    ) -> None:
        self.device = device
        self.shuffle = shuffle
        self.batch_size = batch_size
        self.columns: tuple[Any, ...] | None = None
        self.origin: Any = data  # what two passes over the same data have in common
        self.loader: Iterable[Any] | None = None
        if isinstance(data, torch.utils.data.TensorDataset):
            data = data.tensors
        if isinstance(data, tuple):
            self.columns = data
        elif isinstance(data, torch.utils.data.DataLoader | list) or not hasattr(data, "__getitem__"):
            if not isinstance(data, Iterable) or isinstance(data, Iterator):
                raise ValueError(
                    f"got data of type {type(data).__name__}, wanted a tensor, a tuple of tensors, a dataset indexed "
                    "by tensors, or an iterable of batches that can be run through again (not a generator)."
                )
            self.loader = data
        else:
            self.columns = (data,)
        if self.columns is not None:
            self.columns = tuple(torch.from_numpy(c) if isinstance(c, np.ndarray) else c for c in self.columns)
        lengths = [len(column) for column in self.columns or ()]
        if len(set(lengths)) > 1:
            raise ValueError(f"the data have different lengths, {lengths}; wanted one row each per datum.")
        if self.columns is not None and not any(lengths):
            raise ValueError("the data are empty; wanted at least one datum.")
        self.num_data = lengths[0] if lengths else None
        self.home = torch.device("cpu")
        if device is not None and torch.device(device).type == "cuda":
            self._move_in(torch.device(device))

    def __len__(self) -> int:
        if self.num_data is not None:
            return -(-self.num_data // self.batch_size)
        try:
            return len(self.loader)  # type: ignore[arg-type]
        except TypeError:  # also a DataLoader, over a dataset of unknown length
            return sum(1 for _ in self)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for choice in self.choices():
            yield self.take(*choice)

    def choices(self) -> Iterator[tuple[Any, ...]]:
        """What `take` turns into the batches of a pass: an index each; of an iterable, the batch itself."""
        if self.columns is None:
            assert self.loader is not None
            for batch in self.loader:
                yield self._placed(tuple(batch) if isinstance(batch, list | tuple) else (batch,))
            return
        assert self.num_data is not None
        order = torch.randperm(self.num_data) if self.shuffle else torch.arange(self.num_data)
        for index in order.to(self.home).split(self.batch_size):
            yield (index,)

    def take(self, *choice: Any) -> tuple[Any, ...]:
        """The batch of a choice."""
        if self.columns is None:
            return choice
        return self._placed(tuple(column[choice[0]] for column in self.columns))

    def _move_in(self, device: torch.device) -> None:
        """Keep the data on the GPU where they take little of it: batches are then chosen and drawn there."""
        columns = self.columns or ()
        tensors = [c if isinstance(c, Tensor) else getattr(c, "pixels", None) for c in columns]
        held = [t for t, c in zip(tensors, columns, strict=True) if isinstance(t, Tensor) and hasattr(c, "to")]
        if not columns or len(held) < len(columns):
            return
        if sum(t.numel() * t.element_size() for t in held) < torch.cuda.mem_get_info(device)[0] / 4:
            self.columns = tuple(column.to(device) for column in columns)
            self.home = device

    def first(self) -> tuple[Any, ...]:
        """One batch, without touching the random state; [] data raise."""
        with torch.random.fork_rng():
            for batch in self:
                return batch
        raise ValueError("the data are empty; wanted at least one batch.")

    def _placed(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        if self.device is None:
            return batch
        return tuple(x.to(self.device, non_blocking=True) if isinstance(x, Tensor) else x for x in batch)
