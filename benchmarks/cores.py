"""How far two cores are from each other.

The host of a virtual machine may put its cores on one chiplet or on two, and move them while one measures. What one
core has written reaches the other some three times slower then, and steps of two threads take half as long again:
a number without this belongs to neither.
"""

from __future__ import annotations

import os
import threading
import time

import numpy as np

_BYTES, _TIMES, _PATIENCE = 2**21, 15, 5.0


def distance() -> float:
    """Seconds for 2 MB that another core has just written, over those for its own: about 1 nearby, 2.5 and more afar.

    The fastest of 15 of each. NaN where this process has one core, the system does not say which,
    or a thread may not choose.
    """
    if not hasattr(os, "sched_setaffinity"):
        return float("nan")
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        return float("nan")
    data, copy = np.zeros(_BYTES, np.uint8), np.zeros(_BYTES, np.uint8)
    turn = [threading.Semaphore(0), threading.Semaphore(0)]
    own, others = [], []

    def read() -> float:
        start = time.perf_counter()
        np.copyto(copy, data)
        return time.perf_counter() - start

    def writer() -> None:
        os.sched_setaffinity(0, {cores[1]})  # of this thread alone
        for _ in range(_TIMES):
            if not turn[1].acquire(timeout=_PATIENCE):
                return
            np.add(data, 1, out=data)
            turn[0].release()

    def reader() -> None:
        os.sched_setaffinity(0, {cores[0]})
        for _ in range(_TIMES):
            turn[1].release()
            if not turn[0].acquire(timeout=_PATIENCE):
                return
            others.append(read())
            np.add(data, 1, out=data)
            own.append(read())

    threads = [threading.Thread(target=each) for each in (writer, reader)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return min(others) / min(own) if len(own) == _TIMES else float("nan")


if __name__ == "__main__":
    print(f"{distance():.2f}")
