"""What runs many times, captured: seen once as it is, written down, replayed, checked, or left as it is with one line.

The first call of a kind is the programs' own. The second is written down (see `pyro_vae.inference.capture`) if the
first has changed nothing that the programs read; all later ones are replays, of which the first, the 10th, the 100th
... are computed both ways from the same noise. Where programs read something that cannot be compared later, they are
*unproven*: captured only where asked for, and compared every `check_every` replays.
"""

from __future__ import annotations

import operator
import random
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_vae.inference.capture import Capture
from pyro_vae.inference.graphs import Uncapturable
from pyro_vae.inference.hardware import bfloat16_active, read_constants
from pyro_vae.reach import Reach
from pyro_vae.traces import Program

CHECKS = frozenset(10**n for n in range(9))  # replays at which the programs are run, too
MOMENT = 0.05  # seconds for which it holds that nothing has changed, where no code but ours runs
_MEMORY = 64  # kinds of call that are remembered
_UNSTABLE = 3  # calls of a kind between which something may change before the kind is given up
_LIMIT = 8  # captures of one kind of call, and graphs, before giving up
_TRIED = 40  # replays of a compiled graph, of which the fastest is compared with the fastest before
_KNOWN = 100  # replays after which a graph that is slower than the programs is given up

Noise = tuple[Tensor, dict[int, Tensor]]


class Watched(Reach):
    """What programs, and a Pyro ELBO if there is one, read in Python, and the names in the param store."""

    def __init__(self, programs: Sequence[Program], loss: Any = None) -> None:
        super().__init__(*programs, settings_of=loss)
        store = pyro.get_param_store()._params
        if not self.full:  # else nobody compares
            self.place(len, store, "the param store")
            for name in store:
                self.place(store.get, name, f"parameter {name!r} of the param store")
        self.before = self._now()


def settings(tensors: Sequence[Tensor]) -> tuple[Any, ...]:
    """What tells two calls apart that need different graphs, beside the programs: kinds of tensors, and of numbers."""
    device = tensors[0].device.type if tensors else "cpu"
    return (
        tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors), torch.is_grad_enabled(),
        torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.get_default_dtype(),
        bfloat16_active(),
    )  # fmt: skip


def alike(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether tensors are of the same kinds, one by one."""
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and a.device == b.device and a.stride() == b.stride()
        for a, b in zip(some, others, strict=True)
    )


# A hook that appears changes gradients; those that are there are among what the programs can read.
_conditions = operator.attrgetter(
    "requires_grad", "dtype", "device", "shape", "_backward_hooks", "_post_accumulate_grad_hooks"
)


class Graph:
    """A capture and the conditions under which it holds.

    Counts its replays; says whether the next is to be compared with the programs (`unchecked`) and whether a compiler
    was tried on it; `seconds` are those of its fastest replay, `own_seconds` those of the programs where they are
    compared.
    """

    def __init__(self, capture: Capture, watched: Watched) -> None:
        self.capture, self.watched = capture, watched
        self.replays, self.unchecked, self.tried, self.seconds = 0, False, False, float("inf")
        self.checked = False  # whether the latest replay was compared
        self.compiled_at, self.plain_seconds = 0, float("inf")  # replays, and the seconds of the fastest until then
        self.own_seconds = float("inf")
        self._tensors = self._now()

    def _now(self) -> list[Any]:
        return [_conditions(c) for c in self.capture.constants]

    def fresh(self) -> bool:
        """Whether all that it rests on is as it was."""
        return self._tensors == self._now() and self.watched.fresh() and self.capture.holds()

    def on_trial(self) -> bool:
        """Whether it is not known yet if the compiler made it faster."""
        return self.capture.compiled and self.replays <= self.compiled_at + _TRIED

    def due(self, check_every: int) -> bool:
        """Whether this replay is one of those that are compared with the programs."""
        doubted = bool(self.watched.unproven) and self.replays % check_every == 0
        return self.replays in CHECKS or self.unchecked or doubted


class Check(NamedTuple):
    """What the programs themselves made of the noise that a replay draws: results, the state after, tensors before."""

    expected: Any
    before: Noise
    after: Noise
    written: list[tuple[Tensor, Tensor]]

    def take_back(self) -> None:
        set_random_state(self.before)
        put_back(self.written)


class Captured:
    """Graphs of calls by their kind, and what is known of kinds that have none.

    A call has ``tensors``, all else that it rests on as a ``key``, and ``advance(n)``, which counts such calls.
    `reason` says why the most recent one ran uncaptured, if it did; `captures` counts those that could be kept; the
    options are those of `Compiled`.
    """

    unit, result = "call", "result"  # what is captured, and what is compared, in messages
    kind: type[Graph] = Graph
    fixed: int | None = None  # see `Capture`

    def __init__(self, *, quiet: bool, unproven: bool, check_every: int) -> None:
        self.quiet, self.unproven, self.check_every = quiet, unproven, check_every
        self.chooses = False  # whether a compiled graph that is slower than it was is taken back
        self.optional = False  # whether a graph that is slower than the programs is given up
        read_constants()
        self._forget()

    def _forget(self) -> None:
        self.reason: str | None = None
        self.captures = 0
        self._graphs: dict[Any, Any] = {}
        self._refused: dict[Any, str] = {}
        self._tries: dict[Any, int] = {}
        self._seen: dict[Any, tuple[Watched, int]] = {}
        self._warned: set[str] = set()

    def _expected(self, call: Any, graph: Any) -> Any:
        """What the programs themselves make of a call."""
        raise NotImplementedError

    def _agree(self, results: Sequence[Tensor], expected: Any) -> bool:
        raise NotImplementedError

    def _drop(self, call: Any) -> None:
        """Forget a graph that no longer holds: a call of the programs' own comes first, which may change things."""
        del self._graphs[call.key]
        self._seen.pop(call.key, None)

    def _ripe(self, call: Any, watch: Callable[[], Watched]) -> bool:
        """Whether to capture a call that has no graph: from the second of its kind on, if the first changed nothing, as
        a capture that fails would run the programs a second time."""
        if call.key in self._refused:
            self.reason = self._refused[call.key]
            return False
        before, times = self._seen.pop(call.key, (None, 0))
        changed = None if before is None else before.changed()
        if changed is not None and times >= _UNSTABLE:
            self._refuse(call, f"{changed} changes while the programs run")
            return False
        if before is not None and changed is None:
            return True
        while len(self._seen) >= _MEMORY:
            del self._seen[next(iter(self._seen))]
        self._seen[call.key] = watch(), times + 1
        self.reason = f"the first {self.unit} of its kind" if changed is None else f"{changed} has changed"
        return False

    def _accepted(self, call: Any, watched: Watched) -> bool:
        """Whether to capture a call whose programs read this; a line says so of what cannot be watched."""
        self._tries[call.key] = self._tries.get(call.key, 0) + 1
        if self._tries[call.key] > _LIMIT:
            self._refuse(call, f"what the programs read outside their arguments has changed {_LIMIT} times")
            return False
        while len(self._graphs) >= _LIMIT:
            del self._graphs[next(iter(self._graphs))]
        if not watched.unproven:
            return True
        found, unit = in_short(watched), self.unit
        can = f"the programs can read what a captured {unit} cannot watch: {found}. "
        if self.unproven:
            self._say(
                f"{can}If that changes, so must the {self.result}: it is compared with the programs' own every "
                f"{self.check_every} {unit}s, and a difference raises",
                always=True,
            )
            return True
        self._refused[call.key] = self.reason = f"the programs can read {found}"
        self._say(
            f"the {unit}s run uncaptured, since {can}Keep what changes in a tensor or a plain attribute, or pass "
            "compile=True to capture them all the same",
            always=True,
        )
        return False

    def _write_down(
        self, call: Any, watched: Watched, function: Callable[..., list[Tensor]], finish: Callable[..., None] | None
    ) -> tuple[list[Tensor], Any] | None:
        """Run a call and keep its graph: its results and the graph, or None, with nothing done, where it cannot be."""
        state, drawn = random_state(call.tensors), python_noise()
        call.advance(1)
        try:
            with pyro.validation_enabled(False):
                capture = Capture(
                    function, [t.detach() if t.requires_grad else t for t in call.tensors], finish, self.fixed
                )
        except Exception as error:
            set_random_state(state)  # the capture itself has put the tensors back
            call.advance(-1)
            self._refuse(call, _why(error))
            return None
        graph = self.kind(capture, watched)
        changed = watched.changed()
        if changed:
            self._refuse(call, f"{changed} changes while the programs run")
        elif drawn != python_noise():
            self._refuse(call, "the programs draw random numbers of Python or NumPy")
        elif (array := watched.array_over(capture.written)) is not None:  # its numbers are fixed in the graph
            self._refuse(call, f"the programs write to the memory of {array}, which they can read in Python")
        else:
            self.captures += 1
            self._graphs[call.key], self.reason = graph, "it was being captured"
        results, capture.results = capture.results, []
        return results, graph

    def _play(self, call: Any, graph: Any) -> tuple[Sequence[Tensor] | None, Check | None]:
        """The results of a replay; or None, with nothing done, and what the programs themselves gave, which is a
        ValueError where they read what cannot be watched."""
        graph.checked = graph.due(self.check_every)
        check = self._check(call, graph) if graph.checked else None
        call.advance(1)
        start = time.perf_counter()
        try:
            results = graph.capture(call.tensors)
        except Exception as error:  # an operation need not take what it gave
            if check is None:
                raise
            reason, numbers = f"its graph cannot be replayed ({first_line(error)})", None
        else:
            graph.seconds = min(time.perf_counter() - start, graph.seconds)
            if check is None or self._agree(results, check.expected):
                self.reason = None
                if self.chooses and graph.capture.compiled and graph.replays == graph.compiled_at + _TRIED:
                    self._keep_the_faster(graph)
                if self.optional and check is not None and graph.replays >= _KNOWN:
                    self._yield_to_the_programs(call, graph)
                return results, None
            mean, wanted = (x[0].double().mean().item() for x in (results, check.expected))
            numbers = f"{mean:.6g} replayed, {wanted:.6g} by the programs, after {graph.replays} replays"
            reason = f"the {self.result} depends on something outside the graph ({numbers})"
        check.take_back()
        call.advance(-1)
        del self._graphs[call.key]
        if numbers is not None and graph.watched.unproven:
            raise ValueError(
                f"the captured {self.result} is not that of the programs ({numbers}), which can read "
                f"{in_short(graph.watched)}. Each {self.result} since the last comparison may be wrong: take "
                'compile=False (or "auto", which does not capture such programs), or keep what changes in a tensor.'
            )
        self._refuse(call, reason)
        if numbers is not None:
            self._say(f"a captured {self.result} was not that of the programs ({numbers}) although nothing that they "
                      f"read had changed. The {self.unit}s since are not captured; compile=False avoids it from the "
                      "start", always=True)  # fmt: skip
        return None, check

    def _check(self, call: Any, graph: Any) -> Check:
        written = [(tensor, tensor.clone()) for tensor in graph.capture.mutated]
        before = random_state(call.tensors)
        start = time.perf_counter()
        with pyro.validation_enabled(False):
            expected = self._expected(call, graph)
        graph.own_seconds = min(time.perf_counter() - start, graph.own_seconds)
        after = random_state(call.tensors)
        set_random_state(before)
        put_back(written)
        graph.unchecked = False
        return Check(expected, before, after, written)

    def _compile(self, graph: Any, call: Any) -> bool:
        """Hand a graph to Inductor, once; whether that was done."""
        if graph.tried or graph.capture.live_noise:
            return False  # Inductor may draw in another order
        graph.tried = True
        try:
            graph.capture.compile(call.tensors)
        except Exception as error:  # whatever the compiler lacks, the graph is there already
            self._say(f"the captured graph is replayed uncompiled, since Inductor failed ({first_line(error)})")
            return False
        graph.unchecked = True
        graph.compiled_at, graph.plain_seconds, graph.seconds = graph.replays, graph.seconds, float("inf")
        return True

    def _keep_the_faster(self, graph: Any) -> None:
        """Take back what a compiler made of a graph where it is slower here; on a GPU nobody waited for the results."""
        if graph.capture.on_cpu and graph.seconds > graph.plain_seconds:
            graph.capture.uncompile()
            graph.seconds, graph.unchecked = graph.plain_seconds, True

    def _yield_to_the_programs(self, call: Any, graph: Any) -> None:
        """Give up a graph whose fastest replay of a hundred is slower than the fastest of the programs' few; not while
        it is open whether the compiler's is kept, nor on a GPU, where nobody waited for the results."""
        if graph.capture.on_cpu and not graph.on_trial() and graph.seconds > graph.own_seconds:
            del self._graphs[call.key]
            both = " and ".join(f"{1e3 * seconds:.2g} ms" for seconds in (graph.seconds, graph.own_seconds))
            self._refuse(call, f"a replay is slower here than the programs ({both})")

    def _refuse(self, call: Any, reason: str) -> None:
        self._refused[call.key] = self.reason = reason
        self._say(f"the {self.unit}s are not compiled, since {reason}")

    def _say(self, sentence: str, always: bool = False) -> None:
        if (always or not self.quiet) and sentence not in self._warned:
            warnings.warn(f"{self!r}: {sentence}.", stacklevel=5)
        self._warned.add(sentence)


def in_short(watched: Watched) -> str:
    """What stands against a proof, in words: the first three things met."""
    more = len(watched.unproven) - 3
    return "; ".join(watched.unproven[:3]) + (f"; and {more} more" if more > 0 else "")


def _why(error: Exception) -> str:
    if isinstance(error, Uncapturable):
        return str(error)
    if "data-dependent" in str(error) or "tracing tensor" in str(error):
        return "its Python code depends on the values of tensors"
    return first_line(error)


def first_line(error: Exception) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:200]}" if text else type(error).__name__


def put_back(written: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Write back what stood in tensors."""
    with torch.no_grad():
        for tensor, before in written:
            tensor.copy_(before)


def _cuda(tensors: Sequence[Tensor]) -> list[int]:
    return sorted({t.device.index or 0 for t in tensors if t.device.type == "cuda"})


def random_state(tensors: Sequence[Tensor]) -> Noise:
    return torch.get_rng_state(), {i: torch.cuda.get_rng_state(i) for i in _cuda(tensors)}


def set_random_state(state: Noise) -> None:
    torch.set_rng_state(state[0])
    for index, value in state[1].items():
        torch.cuda.set_rng_state(value, index)


def python_noise() -> Any:
    """Where Python's and NumPy's own streams of random numbers stand: code that is trusted may draw from them."""
    numpy = np.random.get_state(legacy=False)["state"]
    return random.getstate(), numpy["key"].tobytes(), numpy["pos"]
