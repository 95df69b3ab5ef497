"""Run a pair to learn about it, and leave it as it was.

`evaluating` has all networks of the programs in evaluation mode, wherever the programs hold them, on their own
parameters (see `pyro_vae.parameters`), without gradients. Afterwards the modes, every parameter and buffer, the
parameter store, the random states, the matmul precision, the default dtype and Pyro's validation are what they were,
also after an error. What a first run sets up for good (an AutoGuide that builds itself, a lazy layer that learns its
width) stays set up; Python numbers that a program counts up for itself are its own affair.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import infer, poutine
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy

from pyro_vae.parameters import own_parameters
from pyro_vae.precision import current, put_back
from pyro_vae.randomness import noise, noise_kept
from pyro_vae.reach import modules_of


@contextlib.contextmanager
def evaluating(*programs: Any, seed: int | None = None) -> Iterator[None]:
    """Run programs for an estimate: networks in evaluation mode, no gradients, nothing left changed.

    Enter it once for an estimate, outside its loops. It may be nested. Gradients may be switched
    on inside.

    Args:
        programs: The Pyro programs that will run; None among them is passed over.
        seed: Seed of the noise inside, whose states come back afterwards; None goes on with the
            random states as they are, and leaves them where the programs have brought them.
    Raises:
        ValueError: What `own_parameters` refuses.
    Example:
        >>> net = nn.Sequential(nn.BatchNorm1d(1), nn.Dropout())
        >>> with evaluating(lambda x: net(x)):
        ...     net.training, net(torch.tensor([[2.0], [2.0]])).round().flatten().tolist()
        (False, [2.0, 2.0])
        >>> net.training, net[0].num_batches_tracked.item()
        (True, 0)
    """
    given = [program for program in programs if program is not None]
    with (
        _settings_kept(), store_kept(), at_rest(modules_of(*given), others=True), own_parameters(*given, aside=True),
        noise(seed), torch.no_grad(),
    ):  # fmt: skip
        yield


@contextlib.contextmanager
def unmoved(modules: Iterable[nn.Module]) -> Iterator[list[weakref.ref[nn.Module]]]:
    """Run modules in the modes that they are in, and put the parameters and buffers of all that run back.

    Yields the outermost of those that ran and are not among them or their children, by references, dead if a program
    made it on the way.

    Example:
        >>> net, other = nn.BatchNorm1d(1), nn.Linear(1, 1)
        >>> with unmoved([net]) as met:
        ...     _ = net(other(torch.tensor([[1.0], [3.0]])))
        >>> net.running_mean.item(), met[0]() is other
        (0.0, True)
    """
    standing, met = _Standing(), []
    try:
        for module in modules:
            standing.note(module)

        def meet(module: nn.Module) -> None:
            if standing.note(module):
                met.append(weakref.ref(module))

        with _meeting(standing, meet):
            yield met
    finally:
        standing.put_back()


@contextlib.contextmanager
def at_rest(modules: Iterable[nn.Module], *, others: bool = False) -> Iterator[None]:
    """Modules, with all their children, in evaluation mode, and afterwards as they were; so all `others` that run."""
    standing = _Standing()
    _here.resting.append(standing)
    try:
        for module in modules:
            standing.rest(module)
        with _meeting(standing, standing.rest) if others else contextlib.nullcontext():
            yield
    finally:
        _here.resting.remove(standing)
        standing.put_back()


def rests(module: nn.Module) -> bool:
    """Whether a module is to stay in evaluation mode, since somebody outside holds it `at_rest`."""
    return any(module in standing for standing in _here.resting)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Look at something: no gradients, and random states and the parameter store as they were afterwards."""
    # Handlers outside, such as the `own_parameters` of a fit, do not hear of parameters that are taken out again.
    with store_kept(), noise_kept(), torch.no_grad(), poutine.block():
        yield


def slots_of(module: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """Which tensors a module holds where; a ScriptModule makes new objects of them at every look."""
    tables = () if isinstance(module, torch.jit.ScriptModule) else (module._parameters, module._buffers)
    return [(table, name, tensor) for table in tables for name, tensor in table.items() if tensor is not None]


class _Standing:
    """How modules stood, to be put back."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[weakref.ref[nn.Module], bool, Any, list[int]]] = {}  # as they were
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def modules(self) -> list[nn.Module]:
        """Those that are still alive."""
        return [module for reference, *_ in self._parts.values() if (module := reference()) is not None]

    def __contains__(self, module: nn.Module) -> bool:
        return id(module) in self._parts

    def note(self, module: nn.Module) -> list[nn.Module]:
        """Take note of a module and all below it; those that were not known yet."""
        new = [part for part in module.modules() if part not in self]
        for part in new:
            # Weakly, as a program may make modules anew in every run; an id is then free for another one.
            forget = functools.partial(_forget, weakref.ref(self), id(part))
            tensors = (*part.parameters(recurse=False), *part.buffers(recurse=False))
            copied = [id(tensor) for tensor in tensors if self._copy(tensor)]
            self._parts[id(part)] = weakref.ref(part, forget), part.training, slots_of(part), copied
        return new

    def _copy(self, tensor: Tensor) -> bool:
        known = id(tensor) in self._copies or is_lazy(tensor) or tensor.is_meta
        # A parameter hardly ever moves without an optimiser: where someone outside has a copy, one is enough. Buffers
        # are put back by each, so that an estimate inside another is what it would be alone.
        outside = (
            isinstance(tensor, nn.Parameter)
            and tensor.requires_grad
            and any(id(tensor) in other._copies for other, _ in _here.meeting)
        )
        if known or outside:
            return False
        self._copies[id(tensor)] = tensor, tensor.detach().clone()
        return True

    def rest(self, module: nn.Module) -> None:
        """Take note of a module, and put it and all below it into evaluation mode."""
        new = self.note(module)
        for part in new:
            if part.training and _has_own_modes(part):
                part.eval()
        for part in new:
            part.training = False

    def put_back(self) -> None:
        """Modes where they were changed, tensors to where they were and to what they were."""
        parts = [(module, *rest) for reference, *rest, _ in self._parts.values() if (module := reference()) is not None]
        for module, training, _ in parts:
            if _has_own_modes(module) and module.training != training:
                module.train(training)
        for module, training, held in parts:
            if module.training != training:
                module.training = training
            for slots, name, tensor in held:
                if slots.get(name) is not tensor:
                    slots[name] = tensor
        for tensor, before in self._copies.values():
            _write(tensor, before)


def _forget(standing: weakref.ref[_Standing], key: int, _: Any) -> None:
    owner = standing()
    if owner is not None and key in owner._parts:
        for tensor in owner._parts.pop(key)[3]:
            del owner._copies[tensor]


def _write(tensor: Tensor, value: Tensor) -> None:
    """Give a tensor back its value, without a trace in its version where it has it still."""
    if (tensor.dtype, tensor.device, tensor.shape) != (value.dtype, value.device, value.shape):
        tensor.data = value
    elif tensor.layout != torch.strided or not torch.equal(tensor.detach(), value):
        with torch.no_grad():
            tensor.copy_(value)


def _has_own_modes(module: nn.Module) -> bool:
    """Whether going from mode to mode is more than a flag, as for layers that merge their weights for use."""
    kind = type(module)
    return kind.train is not nn.Module.train or kind.eval is not nn.Module.eval


class _Here(threading.local):
    """Who is at work in this thread: what trains in another is let alone."""

    def __init__(self) -> None:
        self.meeting: list[tuple[_Standing, Callable[[nn.Module], Any]]] = []
        self.resting: list[_Standing] = []
        self.covered: list[set[int]] = []  # tensors of which somebody outside holds a copy


_here = _Here()


def _met(module: nn.Module, _: Any) -> None:
    """A module is about to run, perhaps one that no program was seen to own."""
    if torch.compiler.is_compiling():
        return
    for standing, meet in _here.meeting:
        if module not in standing:
            meet(module)


@contextlib.contextmanager
def _meeting(standing: _Standing, meet: Callable[[nn.Module], Any]) -> Iterator[None]:
    """Tell of all modules that run and do not stand there yet."""
    hook, entry = None, (standing, meet)
    # A compiled module is compiled anew under a global hook, and warns of it.
    if not any("_orig_mod" in part._modules for part in standing.modules()):
        hook = register_module_forward_pre_hook(_met)
    _here.meeting.append(entry)
    try:
        yield
    finally:
        _here.meeting.remove(entry)
        if hook is not None:
            hook.remove()


@contextlib.contextmanager
def store_kept() -> Iterator[None]:
    """Pyro's parameter store: the names that it holds, their order, their tensors and constraints, their values."""
    store = pyro.get_param_store()
    kept = [(name, getattr(store, name)) for name in ("_params", "_param_to_name", "_constraints")]
    items = [dict(held) for _, held in kept]
    covered = {id(t) for standing, _ in _here.meeting for t, _ in standing._copies.values()}.union(*_here.covered)
    copies = [(t, t.detach().clone()) for t in items[0].values() if id(t) not in covered]
    try:
        yield
    finally:
        for (name, held), before in zip(kept, items, strict=True):
            if getattr(store, name) is not held:
                setattr(store, name, held)
            if len(held) != len(before) or any(
                a is not b or held[a] is not before[b] for a, b in zip(held, before, strict=True)
            ):
                held.clear()
                held.update(before)
        for tensor, value in copies:
            _write(tensor, value)


@contextlib.contextmanager
def others_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Copy once what the parameter store holds and some modules do not own, such as the networks of earlier fits.

    What is looked at inside would otherwise copy it each time.
    """
    own = {id(t) for module in modules for t in module.parameters()}
    held = pyro.get_param_store()._params.values()
    copies = [(t, t.detach().clone()) for t in held if isinstance(t, nn.Parameter) and id(t) not in own]
    known = {id(t) for t, _ in copies}
    _here.covered.append(known)
    try:
        yield
    finally:
        _here.covered.remove(known)
        for tensor, value in copies:
            _write(tensor, value)


@contextlib.contextmanager
def _settings_kept() -> Iterator[None]:
    """Settings of torch and Pyro that a program may switch and forget."""
    precision, dtype = current(), torch.get_default_dtype()
    checks = [(part, part.is_validation_enabled()) for part in (dist, infer, poutine)]
    try:
        yield
    finally:
        put_back(precision)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        for part, enabled in checks:
            part.enable_validation(enabled)
