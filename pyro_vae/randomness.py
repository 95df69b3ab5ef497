"""Random states that are put back: torch's on the CPU and on every device, Python's and NumPy's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch


def forked(devices: Iterable[int] | None = None) -> contextlib.AbstractContextManager[None]:
    """Put torch's random states back afterwards: of the CPU, and of GPUs by their numbers, of all where none are named.

    Of all, since ``torch.manual_seed`` seeds all. ``torch.random.fork_rng()`` warns where there are several, as nobody
    told it that they are meant.

    Example:
        >>> before = torch.get_rng_state()
        >>> with forked():
        ...     _ = torch.manual_seed(5)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    found = range(torch.cuda.device_count()) if devices is None else devices
    return torch.random.fork_rng(devices=found)  # by its name in torch, which a capture replaces to note it


@contextlib.contextmanager
def noise(seed: int | None) -> Iterator[None]:
    """Seed torch's, Python's and NumPy's global generators inside, and put their states back; None does nothing."""
    if seed is None:
        yield
        return
    with noise_kept():
        start_noise(seed)
        yield


def start_noise(seed: int) -> None:
    """Start torch's (of all devices), Python's and NumPy's global generators at a seed."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def noise_kept() -> Iterator[None]:
    """Put the states of torch's, Python's and NumPy's global generators back afterwards."""
    python, numpy = random.getstate(), np.random.get_state()
    with forked():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
