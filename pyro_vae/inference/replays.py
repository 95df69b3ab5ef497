"""A function of tensors that runs many times: captured once, replayed without Pyro, compiled where that pays.

What `Compiled` is for a loss, `Replayed` is for anything that evaluates a pair of programs again and again on tensors
of the same shapes: a chunk of importance weights, a Markov chain's move.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_vae._trust import is_trusted
from pyro_vae.inference.captured import MOMENT, Captured, Graph, Watched, set_random_state, settings
from pyro_vae.inference.graphs import Uncapturable
from pyro_vae.inference.hardware import multiplied_by
from pyro_vae.inference.products import usual
from pyro_vae.traces import Program

# A capture costs what the programs' Python costs in about so many calls.
_CAPTURE_PAYS = 600
# Inductor's seconds, at the least and per operation, and the share of a replay that it saves.
_COMPILER_SECONDS, _PER_NODE, _SAVED = 5.0, 0.03, 0.2

Function = Callable[..., Sequence[Tensor]]


class _Call(NamedTuple):
    key: Any
    tensors: tuple[Tensor, ...]

    def advance(self, calls: int) -> None:
        """Nothing counts calls of a function."""


class Replayed(Captured):
    """A function from tensors to a sequence of tensors without gradient, without the Python in it.

    Args:
        programs: The Pyro programs that it runs, whose attributes, closures and globals are watched.
        calls: How many calls are expected in all; an attribute, for whoever learns on the way how many.
        compile: "auto" captures where enough calls lie ahead, and hands the graph to Inductor where the time ahead
            pays for it; True does both at once; False does neither; anything else is a ValueError.
        enough: Calls ahead from which a capture pays; None for 600.
        fixed: So many of the first tensors, and all that the function reads besides, stand still until `renew` is
            called, so that networks that depend on nothing else run once; None where that is not known.
    Example:
        >>> import torch
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
        self, function: Function, *, programs: Sequence[Program] = (), calls: int = 0, compile: bool | str = "auto",
        enough: int | None = None, fixed: int | None = None,
    ) -> None:  # fmt: skip
        if compile not in (True, False, "auto"):
            raise ValueError(f'got compile={compile!r}, wanted True, False or "auto".')
        super().__init__(quiet=compile is not True, unproven=compile is True, check_every=100)
        self.function, self.programs, self.calls, self.compile = function, tuple(programs), calls, compile
        self.enough = _CAPTURE_PAYS if enough is None else enough
        self.compiled, self.fixed = False, fixed
        self.chooses = self.optional = compile == "auto"
        self._done = 0
        self._fresh: tuple[Graph | None, float] = (None, 0.0)  # a graph that was found to hold, and when

    def __repr__(self) -> str:
        return "Replayed()"

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """What the function returns for these tensors."""
        self._done += 1
        if self.compile is False:
            self.reason = "compile is False"
            return self._run(*tensors)
        call = _Call(settings(tensors), tensors)
        graph = self._graphs.get(call.key)
        if graph is not None and self._holds(graph):
            return self._replay(call, graph)
        if graph is not None:
            self._drop(call)
        if self.compile == "auto" and self._ahead < self.enough and call.key not in self._refused:
            self.reason = f"only {self._ahead} calls lie ahead"
        elif self._ripe(call, self._watched):
            watched = self._watched()
            if self._accepted(call, watched):
                written = self._write_down(call, watched, lambda *given: list(self._run(*given)), _no_gradients)
                if written is not None:
                    return tuple(written[0])
        return self._run(*tensors)

    def renew(self) -> None:
        """What stood still is another from now on, such as the next batch."""
        self._fresh = None, 0.0
        for graph in self._graphs.values():
            graph.capture.renew()

    def _holds(self, graph: Graph) -> bool:
        """Whether all that a graph rests on is as it was; for a moment, where nobody else's code has run since."""
        now, (known, since) = time.perf_counter(), self._fresh
        modes = torch._C._len_torch_function_stack() or torch._C._len_torch_dispatch_stack()
        if self.fixed is None or graph is not known or graph.checked or modes or now - since > MOMENT:
            self._fresh = graph if graph.fresh() else None, now
        return self._fresh[0] is graph

    @property
    def _ahead(self) -> int:
        return self.calls - self._done

    def _run(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        with multiplied_by(usual() if all(t.device.type == "cpu" for t in tensors) else None):
            return tuple(self.function(*tensors))

    def _expected(self, call: _Call, graph: Graph) -> tuple[Tensor, ...]:
        return self._run(*call.tensors)

    def _watched(self) -> Watched:
        # Our own functions are functions of tensors and programs; one that is handed to us need not be.
        return Watched(self.programs if is_trusted(self.function) else (self.function, *self.programs))

    def _replay(self, call: _Call, graph: Graph) -> tuple[Tensor, ...]:
        graph.replays += 1
        if self._pays(graph):
            self.compiled |= self._compile(graph, call)
        results, check = self._play(call, graph)
        if results is None:
            assert check is not None
            set_random_state(check.after)
            return check.expected
        return tuple(results)

    def _pays(self, graph: Graph) -> bool:
        """Whether it is time to compile: seconds are known after three replays."""
        if self.compile is True:
            return graph.replays == 2
        cost = _COMPILER_SECONDS + _PER_NODE * len(graph.capture.module.graph.nodes)
        return graph.replays > 3 and _SAVED * graph.seconds * self._ahead > cost

    def _agree(self, results: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        """Whether they are the same but for rounding, and for a few numbers that are accepted or rejected by it."""
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


def _no_gradients(leaves: list[Tensor], _: list[Tensor]) -> None:
    if leaves:
        raise Uncapturable("it calls backward")
