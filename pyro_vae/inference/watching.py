"""What a captured graph rests on in Python, and the noise that goes through it.

A graph holds as long as what the programs read in Python is as it was: numbers, texts,
switches, and which tensor or module stands where. `Watched` finds as much of that as can be
found in attributes, closures and globals; the rest is found out by running both at `CHECKS`.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from torch import Tensor, nn

from pyro_vae.inference.capture import Uncapturable
from pyro_vae.traces import Program

SCALARS = (bool, int, float, str, type(None))
CHECKS = frozenset(10**n for n in range(9))  # replays at which the programs are run, too
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}


class Watched:
    """What programs and loss read in Python, as far as it can be found: names in mappings."""

    def __init__(self, programs: Sequence[Program], loss: Any) -> None:
        self.modules: list[nn.Module] = []
        self._places: list[tuple[Callable[[Any], Any], Any]] = []
        self._seen: set[int] = set()
        for program in programs:
            self._program(program)
        settings = {k: v for k, v in vars(loss).items() if k not in ("last_bound", "beta") and not k.startswith("_")}
        self._places += [(vars(loss).get, name) for name in settings]
        store = pyro.get_param_store()._params
        self._places += [(store.get, name) for name in store]
        self.before = self._now()

    def _now(self) -> list[Any]:
        return [get(name) for get, name in self._places]

    def fresh(self) -> bool:
        try:
            return self.before == self._now()
        except (RuntimeError, ValueError):  # tensors that are not the same object, compared by their values
            return False

    def changed(self) -> str | None:
        """The name of one that is not as it was."""
        for (_, name), before, now in zip(self._places, self.before, self._now(), strict=True):
            if before is not now and not (isinstance(before, SCALARS) and before == now):
                return repr(getattr(name, "cell_contents", name) if not isinstance(name, str) else name)
        return None

    def _program(self, program: Any) -> None:
        if id(program) in self._seen:
            return
        self._seen.add(id(program))
        if isinstance(program, nn.Module):
            self._module(program)
        elif isinstance(program, types.MethodType):
            self._program(program.__self__)
            self._program(program.__func__)
        elif isinstance(program, types.FunctionType):
            self._function(program)
        elif hasattr(program, "func"):  # functools.partial, and Pyro's handlers around a program
            self._program(program.func)
            for value in (*getattr(program, "args", ()), *getattr(program, "keywords", {}).values()):
                if callable(value):
                    self._program(value)
        elif hasattr(program, "__dict__"):
            self._places += [(vars(program).get, name) for name in vars(program)]

    def _module(self, module: nn.Module) -> None:
        self.modules.append(module)
        for part in module.modules():
            for name, value in vars(part).items():
                if name not in _MODULE_ATTRIBUTES and isinstance(value, (*SCALARS, Tensor, types.FunctionType)):
                    self._places.append((vars(part).get, name))
            for slots in (part._parameters, part._buffers, part._modules):
                self._places += [(slots.get, name) for name in slots]

    def _function(self, function: types.FunctionType) -> None:
        for cell in function.__closure__ or ():
            self._places.append((_contents, cell))
            self._value(_contents(cell))
        for name in function.__code__.co_names:
            if name in function.__globals__:
                value = function.__globals__[name]
                if isinstance(value, (*SCALARS, Tensor, nn.Module)):
                    self._places.append((function.__globals__.get, name))
                    self._value(value)

    def _value(self, value: Any) -> None:
        if isinstance(value, (nn.Module, types.MethodType, types.FunctionType)):
            self._program(value)


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return None


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


def set_random_state(state: tuple[Tensor, dict[int, Tensor]]) -> None:
    torch.set_rng_state(state[0])
    for index, value in state[1].items():
        torch.cuda.set_rng_state(value, index)
