"""A function of tensors that runs many times: captured once, replayed without Pyro, compiled where that pays.

What `Compiled` is for a loss, `Replayed` is for anything that evaluates a pair of programs
again and again on tensors of the same shapes: a chunk of importance weights, a Markov
chain's move. It makes the same use of `pyro_vae.inference.capture`, so a replay draws the
noise that the function would have drawn, and reads parameters as they are.

The first call of a kind is the function's own, with Pyro's validation. The second is
written down, if enough calls lie ahead and the programs are proven to read nothing that cannot
be watched (see `pyro_vae.reach`); the third is a replay, computed both ways from the same noise, as
the 10th, 100th ... are. Inductor compiles the graph when the time that
the replays take says that the calls ahead will pay for it. A function that cannot be captured
runs on as it is, and `Replayed.reason` says why.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor

from pyro_vae.inference.capture import Capture, Uncapturable, fast_matmul
from pyro_vae.inference.watching import (
    Graph,
    Watched,
    first_line,
    python_noise,
    random_state,
    set_random_state,
    settings,
    unproven,
    why,
)
from pyro_vae.reach import is_trusted
from pyro_vae.traces import Program

# A capture costs what the programs' Python costs in about so many calls.
_CAPTURE_PAYS = 600
# Inductor's seconds, at the least and per operation, and the share of a replay that it saves.
_COMPILER_SECONDS, _PER_NODE, _SAVED = 5.0, 0.03, 0.2
_CHECK_EVERY = 100  # calls of unproven programs between two comparisons
_UNSTABLE = 2  # calls between which something may change before the function is given up
_TRIES = 4  # captures of one kind of call before giving up

Function = Callable[..., Sequence[Tensor]]


class Replayed:
    """A function of tensors without the Python in it.

    Args:
        function: From tensors to a sequence of tensors without gradient. It may call
            ``torch.autograd.grad``, draw random numbers, and read tensors that are not its arguments.
        programs: The Pyro programs that it runs, whose attributes, closures and globals are watched for
            numbers that change.
        calls: How many calls are expected in all.
        compile: "auto" captures where at least 600 calls lie ahead, and hands the graph to Inductor where
            the time ahead pays for it; True does both at once; False does neither.
    Attributes:
        reason: Why the most recent call ran uncaptured, or None.
        captures: Number of captures so far.
        compiled: Whether Inductor has compiled one of them.
    Raises:
        ValueError: compile is something else.
    Example:
        >>> scale = torch.ones(())
        >>> noisy = Replayed(lambda x: [x + scale * torch.randn(3)], calls=1000)
        >>> for _ in range(3):
        ...     (y,) = noisy(torch.zeros(3))
        >>> noisy.captures, noisy.reason
        (1, None)
        >>> _ = scale.fill_(0.0)          # nothing is frozen that lives in a tensor
        >>> noisy(torch.ones(3))
        (tensor([1., 1., 1.]),)
    """

    def __init__(
        self, function: Function, *, programs: Sequence[Program] = (), calls: int = 0, compile: bool | str = "auto"
    ) -> None:
        if compile not in (True, False, "auto"):
            raise ValueError(f'got compile={compile!r}, wanted True, False or "auto".')
        self.function, self.programs, self.calls, self.compile = function, tuple(programs), calls, compile
        self.reason: str | None = None
        self.captures = 0
        self.compiled = False
        self._done = 0
        self._graphs: dict[Any, Graph] = {}
        self._seconds: dict[Any, float] = {}  # the fastest replay of a kind so far
        self._seen: dict[Any, int] = {}
        self._refused: dict[Any, str] = {}
        self._said: set[str] = set()
        self._before: dict[Any, Watched] = {}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the function returns for these tensors."""
        self._done += 1
        if self.compile is False:
            return self._plainly(tensors, "compile is False")
        key = settings(tensors)
        graph = self._graphs.get(key)
        if graph is not None and not graph.fresh():
            del self._graphs[key]
            graph = None
        if graph is not None:
            return self._replay(key, graph, tensors)
        if key in self._refused:
            return self._plainly(tensors, self._refused[key])
        self._seen[key] = self._seen.get(key, 0) + 1
        if self.compile == "auto" and self._ahead < _CAPTURE_PAYS:
            reason = "the first call of its kind" if self._seen[key] == 1 else f"only {self._ahead} calls lie ahead"
            return self._plainly(tensors, reason)
        # What writes down its own calls is found out while it runs as it is: a capture that fails runs it twice.
        before = self._before.pop(key, None)
        changed = None if before is None else before.changed()
        if changed is not None and self._seen[key] > 1 + _UNSTABLE:
            return self._refuse(key, tensors, f"{changed} changes while the programs run")
        if before is None or changed is not None:
            if self._seen[key] == 1 or changed is not None:
                self._before[key] = self._watched()
                return self._plainly(tensors, f"{changed} has changed" if changed else "the first call of its kind")
        if self._seen[key] > 1 + _TRIES:
            reason = f"what the programs read outside their arguments has changed {_TRIES} times"
            return self._refuse(key, tensors, reason)
        return self._capture(key, tensors)

    @property
    def _ahead(self) -> int:
        return self.calls - self._done

    def _plainly(self, tensors: tuple[Tensor, ...], reason: str) -> tuple[Tensor, ...]:
        self.reason = reason
        with fast_matmul(all(t.device.type == "cpu" for t in tensors)):
            return tuple(self.function(*tensors))

    def _refuse(self, key: Any, tensors: tuple[Tensor, ...], reason: str) -> tuple[Tensor, ...]:
        self._refused[key] = reason
        if self.compile is True:
            warnings.warn(f"the calls are not compiled, since {reason}.", stacklevel=4)
        return self._plainly(tensors, reason)

    def _watched(self) -> Watched:
        # Our own functions are functions of tensors and programs; one that is handed to us need not be.
        return Watched(self.programs if is_trusted(self.function) else (self.function, *self.programs))

    def _once(self, sentence: str) -> None:
        if sentence not in self._said:
            warnings.warn(sentence, stacklevel=5)
        self._said.add(sentence)

    def _capture(self, key: Any, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Run the function and write it down."""
        state = random_state(tensors)
        watched = self._watched()
        if watched.unproven:
            found = unproven(watched)
            said = f"the programs can read what a captured call cannot watch: {found}. "
            if self.compile is not True:
                self._refused[key] = f"the programs can read {found}"
                self._once(said + "So they run for every call; compile=True captures them all the same.")
                return self._plainly(tensors, self._refused[key])
            self._once(said + f"Every {_CHECK_EVERY} calls they are run as well, and a difference raises.")
        drawn = python_noise()
        inputs = [t.detach() for t in tensors]
        try:
            with pyro.validation_enabled(False), fast_matmul(all(t.device.type == "cpu" for t in tensors)):
                capture = Capture(lambda *given: list(self.function(*given)), inputs, _no_gradients)
            if watched.changed():
                reason = f"{watched.changed()} changes while the programs run"
            elif drawn != python_noise():
                reason = "the programs draw random numbers of Python or NumPy"
            else:
                reason = None
        except Exception as error:  # whatever it is, the function itself is there
            set_random_state(state)  # the capture itself has put the tensors back
            return self._refuse(key, tensors, why(error))
        self.reason = "it was being captured"
        if reason is None:
            self.captures += 1
            self._graphs[key] = Graph(capture, watched)
        else:
            self._refused[key] = reason
        results, capture.results = tuple(capture.results), []
        return results

    def _replay(self, key: Any, graph: Graph, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        graph.replays += 1
        if self._pays(key, graph):
            self._compile(graph, tensors)
        expected = None
        doubted = graph.watched.unproven
        if graph.due(_CHECK_EVERY):
            expected, graph.unchecked = self._expected(graph, tensors), False
        start = time.perf_counter()
        try:
            results = tuple(graph.capture(tensors))
        except Exception as error:  # an operation need not take what it gave
            if expected is None:
                raise
            del self._graphs[key]
            self._refused[key] = self.reason = f"its graph cannot be replayed ({first_line(error)})"
            set_random_state(expected[1])
            return expected[0]
        seconds = time.perf_counter() - start
        self._seconds[key] = min(seconds, self._seconds.get(key, float("inf")))
        if expected is not None and not _agree(results, expected[0]):
            del self._graphs[key]
            if doubted:
                raise ValueError(
                    f"the captured calls do not give what the programs give, which can read {unproven(graph.watched)}. "
                    f'Results since the last comparison ({_CHECK_EVERY} calls) are wrong: take compile="auto" or False.'
                )
            self._refused[key] = self.reason = "the result depends on something outside the graph"
            warnings.warn(
                "a captured call did not give what the programs give although nothing that they read had changed. "
                "compile=False avoids it from the start.",
                stacklevel=4,
            )
            set_random_state(expected[1])
            return expected[0]
        self.reason = None
        return results

    def _expected(
        self, graph: Graph, tensors: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, dict[int, Tensor]]]:
        """What the function itself makes of the noise that the replay will draw, and the random state after it."""
        before = random_state(tensors)
        written = [(tensor, tensor.clone()) for tensor in graph.capture.mutated]
        with pyro.validation_enabled(False):
            found = self._plainly(tensors, "")
        after = random_state(tensors)
        set_random_state(before)
        with torch.no_grad():
            for tensor, value in written:
                tensor.copy_(value)
        return found, after

    def _pays(self, key: Any, graph: Graph) -> bool:
        """Whether it is time to compile: seconds are known after three replays."""
        if graph.capture.live_noise or graph.tried:
            return False  # Inductor may draw in another order
        if self.compile is True:
            return graph.replays == 2
        cost = _COMPILER_SECONDS + _PER_NODE * len(graph.capture.module.graph.nodes)
        return graph.replays > 3 and _SAVED * self._seconds[key] * self._ahead > cost

    def _compile(self, graph: Graph, tensors: tuple[Tensor, ...]) -> None:
        graph.tried = graph.unchecked = True
        try:
            graph.capture.compile(tensors)
            self.compiled = True
        except Exception as error:  # whatever the compiler lacks, the graph is there already
            if self.compile is True:
                said = first_line(error)
                warnings.warn(f"the graph is replayed uncompiled, since Inductor failed ({said}).", stacklevel=5)


def _no_gradients(leaves: list[Tensor], _: list[Tensor]) -> None:
    if leaves:
        raise Uncapturable("it calls backward")


def _agree(results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether they are the same but for rounding.

    A few numbers may differ: of what is accepted or rejected by comparison, rounding turns one in a million.
    """
    if [r.shape for r in results] != [e.shape for e in expected]:
        return False
    for result, wanted in zip(results, expected, strict=True):
        if not result.is_floating_point():
            close = result == wanted
        else:
            finite = wanted[wanted.isfinite()]
            scale = finite.abs().mean() if finite.numel() else 1.0
            within = (result - wanted).abs() <= 1e-3 * (wanted.abs() + scale)
            close = within | (result == wanted) | (result.isnan() & wanted.isnan())
        if result.numel() and close.double().mean() < 0.95:
            return False
    return True
