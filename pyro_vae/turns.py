"""One thread at a time: Pyro keeps one stack of handlers and one parameter store for the whole process.

Two threads inside it at once give wrong numbers, mostly without an error. A fit within a fit (in a callback) is of the
same thread and goes on at once.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

_PATIENCE = 30.0  # seconds that a callback may last before who waits for the end of its fit is told
_lock = threading.RLock()
_lent: list[float] = []  # when the callbacks began that the thread at work is in


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Have the process to oneself; a ValueError where the thread whose turn it is has long been in a callback, which
    may wait for this one."""
    lock = _lock  # in a process that is forked inside, this one is given back
    while not lock.acquire(timeout=0.2):
        if _lent and time.monotonic() - _lent[-1] > _PATIENCE:
            raise ValueError(
                f"another thread has been in the callback of a fit for {_PATIENCE:.0f} seconds, and this one would "
                "wait until that fit is done. Pyro's handlers are one stack for all threads: call this in the callback "
                "itself, or in another process."
            )
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def callback() -> Iterator[None]:
    """Code of the user's inside a fit, which may wait for other threads."""
    _lent.append(time.monotonic())
    try:
        yield
    finally:
        _lent.pop()


def _afresh() -> None:
    global _lock
    _lock = threading.RLock()
    _lent.clear()


if hasattr(os, "register_at_fork"):  # a process that was forked has one thread, whose turn it is
    os.register_at_fork(after_in_child=_afresh)
