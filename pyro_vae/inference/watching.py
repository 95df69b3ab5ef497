"""What a captured graph rests on, of a loss (`compiled`) as of anything else (`replays`), and the noise through it.

A graph holds as long as what the programs read in Python is as it was. `Watched` is that:
what `pyro_vae.reach` finds, and the param store. Where it finds something that it cannot
compare later, the programs are *unproven*: by default they are not captured.
"""

from __future__ import annotations

import operator
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_vae.inference.capture import Capture, Uncapturable
from pyro_vae.inference.precision import bfloat16_active
from pyro_vae.reach import SCALARS, Reach
from pyro_vae.traces import Program

__all__ = [
    "CHECKS", "SCALARS", "Graph", "Watched", "first_line", "forked", "python_noise", "random_state",
    "set_random_state", "settings", "unproven", "why",
]  # fmt: skip

CHECKS = frozenset(10**n for n in range(9))  # replays at which the programs are run, too


class Watched(Reach):
    """What programs and loss read in Python, and the names in the param store.

    Args:
        programs: Pyro programs.
        loss: A Pyro ELBO, or None.
    """

    def __init__(self, programs: Sequence[Program], loss: Any = None) -> None:
        super().__init__(*programs, settings_of=loss)
        store = pyro.get_param_store()._params
        if not self.full:  # else nobody compares
            self._place(len, store, "the param store")
            for name in store:
                self._place(store.get, name, f"parameter {name!r} of the param store")
        self.before = self._now()


def settings(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What tells two calls apart that need different graphs, beside the programs: kinds of tensors, and of numbers."""
    device = tensors[0].device.type if tensors else "cpu"
    return (
        tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors), torch.is_grad_enabled(),
        torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.get_default_dtype(),
        bfloat16_active(),
    )  # fmt: skip


# A hook that appears changes gradients; those that are there are among what the programs can read.
_conditions = operator.attrgetter(
    "requires_grad", "dtype", "device", "shape", "_backward_hooks", "_post_accumulate_grad_hooks"
)


class Graph:
    """A capture and the conditions under which it holds.

    Attributes:
        replays: How often it has been replayed.
        unchecked: Whether the next replay is to be compared with the programs.
        tried: Whether a compiler has been tried on it.
    """

    def __init__(self, capture: Capture, watched: Watched) -> None:
        self.capture, self.watched = capture, watched
        self.replays, self.unchecked, self.tried = 0, False, False
        self._tensors = self._now()

    def _now(self) -> list[Any]:
        return [_conditions(c) for c in self.capture.constants]

    def fresh(self) -> bool:
        """Whether all that it rests on is as it was."""
        return self._tensors == self._now() and self.watched.fresh() and self.capture.holds()

    def due(self, check_every: int) -> bool:
        """Whether this replay is one of those that are compared with the programs."""
        doubted = bool(self.watched.unproven) and self.replays % check_every == 0
        return self.replays in CHECKS or self.unchecked or doubted


def unproven(watched: Watched) -> str:
    """What stands against a proof, in words: the first three things met."""
    more = len(watched.unproven) - 3
    return "; ".join(watched.unproven[:3]) + (f"; and {more} more" if more > 0 else "")


def why(error: Exception) -> str:
    if isinstance(error, Uncapturable):
        return str(error)
    if "data-dependent" in str(error) or "tracing tensor" in str(error):
        return "its Python code depends on the values of tensors"
    return first_line(error)


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def _cuda(tensors: Sequence[Tensor]) -> list[int]:
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


def forked(tensors: Sequence[Tensor]) -> Any:
    return torch.random.fork_rng(devices=_cuda(tensors))


def random_state(tensors: Sequence[Tensor]) -> tuple[Tensor, dict[int, Tensor]]:
    return torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in _cuda(tensors)}


def python_noise() -> Any:
    """Where Python's and NumPy's own streams of random numbers stand: code that is trusted may draw from them."""
    return random.getstate(), np.random.get_state()[1].tobytes(), np.random.get_state()[2]  # type: ignore[index]


def set_random_state(state: tuple[Tensor, dict[int, Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for index, value in state[1].items():
        torch.cuda.set_rng_state(value, index)
