"""Peers in processes of their own that take turns: what every section of the suite is made of.

One process runs at a time. After their warm-up the rows go round, A B C A B C ..., so that a
machine that slows down slows all of them, and ratios are formed within a round.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import math
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from cores import distance
from peers import Problem

# Steps of training before the clock counts: captures and compilers have had their turn by then.
WARM_UP_STEPS = 30


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a table: a module, a function of it, and its options."""

    key: str
    title: str
    module: str
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    loader: bool = False  # its batches come from a DataLoader, whose workers are tuned
    needs: str | None = None
    function: str = "build"
    checkout: str | None = None  # another checkout of this package, whose code it runs


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows that take turns at one problem."""

    title: str
    problem: Problem
    rows: tuple[Row, ...]
    images: int
    rounds: int
    value: str = "ELBO"  # what a row returns beside the number of images
    steps: bool = True  # whether it trains, and is warm after so many steps

    @property
    def warm_up(self) -> int:
        """Calls of a row before the first round."""
        return max(1, math.ceil(WARM_UP_STEPS * self.problem.batch_size / self.images)) if self.steps else 2


@dataclasses.dataclass(frozen=True)
class Timing:
    """One call of one row."""

    round: int
    images: int
    seconds: float
    value: float
    memory: float  # peak of its process so far, MB
    cores: float = math.nan  # how far they were from each other before the round

    @property
    def rate(self) -> float:
        """Images per second."""
        return self.images / self.seconds


class Peer:
    """A process that builds one row and calls it whenever it is asked to.

    `error` is the one line that says why a row has no numbers, or no more; nothing raises.
    """

    def __init__(
        self,
        row: Row,
        pixels: np.ndarray,
        problem: Problem,
        threads: int,
        workers: Sequence[int] | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.row, self.workers = row, None
        self.error: str | None = None
        self.build_seconds = math.nan  # imports included
        self.timings: list[Timing] = []
        if row.needs is not None and importlib.util.find_spec(row.needs) is None:
            self.error = "not installed: pip install pyro-vae[benchmarks]"
            return
        context = multiprocessing.get_context("spawn")
        self.pipe, there = context.Pipe()
        candidates = list(workers or (0, 1, 2)) if row.loader else [None]
        self.process = context.Process(
            target=_serve, args=(there, row, pixels, problem, threads, candidates, dict(environment or {}))
        )
        self.process.start()
        there.close()
        self._ask(None)  # built, with the best number of workers

    def call(self, number: int | None, cores: float = math.nan) -> None:
        """One call of the row, kept as that of round `number`, with the cores so far apart; None is a warm-up."""
        if self.error is None:
            try:
                self.pipe.send("call")
            except OSError:
                self.error = "its process died"
                return
            self._ask(number, cores)

    def stop(self) -> None:
        """End its process."""
        if getattr(self, "process", None) is not None:
            self.pipe.close()
            self.process.join()

    def _ask(self, number: int | None, cores: float = math.nan) -> None:
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            answer = {"error": "its process died"}
        self.error = answer.get("error")
        self.workers = answer.get("workers", self.workers)
        self.build_seconds = answer.get("build_seconds", self.build_seconds)
        if number is not None and "timing" in answer:
            self.timings.append(Timing(number, *answer["timing"], cores))


def run_group(
    group: Group,
    pixels: np.ndarray,
    threads: int,
    workers: Sequence[int] | None = None,
    deadline: float = math.inf,
    say: Callable[[str], None] = lambda _: None,
) -> list[Peer]:
    """Build and warm up the rows, and let them take turns.

    Args:
        group: The rows and their problem.
        pixels: Images (N, 784), uint8, of which the group takes its first.
        threads: Cores of each process.
        workers: num_workers to try for a DataLoader.
        deadline: Of `time.monotonic`: no round but the first begins after it.
        say: Told how it goes.
    Returns:
        The rows with their timings; their processes have ended.
    """
    peers: list[Peer] = []
    try:
        for row in group.rows:
            peer = Peer(row, pixels[: group.images], group.problem, threads, workers)
            peers.append(peer)
            for _ in range(group.warm_up):
                peer.call(None)
            say(f"{row.key}: {peer.error or 'warm'}")
        for number in range(group.rounds):
            if number and time.monotonic() > deadline:
                say(f"out of time after {number} of {group.rounds} rounds")
                break
            cores = distance() if threads > 1 else math.nan
            for peer in peers:
                peer.call(number, cores)
            shown = "  ".join(f"{p.row.key} {p.timings[-1].rate:,.0f}" for p in peers if p.timings and p.error is None)
            apart = "" if math.isnan(cores) else f"cores {cores:.1f} apart  "
            say(f"round {number + 1}: {apart}{shown}")
    finally:
        for peer in peers:
            peer.stop()
    return peers


def _serve(
    pipe: Connection,
    row: Row,
    pixels: np.ndarray,
    problem: Problem,
    threads: int,
    candidates: list[int | None],
    environment: dict[str, str],
) -> None:
    """The peer's side: answer each message with one timed call, until the pipe closes."""
    # The same cores for all: torch, OpenMP and XLA all size their pools by this mask.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ.update(environment | {"OMP_NUM_THREADS": str(threads)})
    try:
        if row.checkout is not None:
            sys.path.insert(0, row.checkout)
        started = time.perf_counter()
        build = getattr(importlib.import_module(row.module), row.function)

        def fresh(pixels: np.ndarray, workers: int | None) -> Callable[[], tuple[int, float]]:
            return build(pixels, problem, **row.options, **({} if workers is None else {"workers": workers}))

        workers = candidates[0]
        if len(candidates) > 1:
            few = pixels[: max(10 * problem.batch_size, 6_400 // problem.num_samples)]
            workers = min(candidates, key=lambda n: _loader_time(fresh(few, n)))
        call = fresh(pixels, workers)
        pipe.send({"workers": workers, "build_seconds": time.perf_counter() - started})
        while pipe.recv() == "call":
            _synchronise()
            started = time.perf_counter()
            images, value = call()
            _synchronise()
            pipe.send({"timing": (images, time.perf_counter() - started, float(value), peak_memory())})
    except EOFError:
        pass
    except Exception as error:
        text = str(error).strip()
        pipe.send({"error": f"{type(error).__name__}: {text}".splitlines()[0][:200]})


def _synchronise() -> None:
    """Wait for what a GPU still has to do: only then do clocks mean anything there."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def peak_memory() -> float:
    """MB that this process has held at once, and on a GPU what torch's allocator has there on top."""
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "linux" else 1024**2)
    try:
        # ru_maxrss of a spawned process starts at what its parent held; this starts anew.
        lines = Path("/proc/self/status").read_text().splitlines()
        memory = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    except (OSError, StopIteration):
        pass
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        memory += torch.cuda.max_memory_allocated() / 1024**2
    return memory


def _loader_time(epoch: Callable[[], Any]) -> float:
    """Seconds of the faster of two epochs, after one that starts the workers."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        epoch()
        times.append(time.perf_counter() - started)
    return min(times[1:])
