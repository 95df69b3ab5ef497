"""Whose tensors are trained: a pair's own, whatever its parameters are called.

Pyro keys every parameter by name in one global store, and a name that is already there wins over the module that asks
for it: two networks of one name would share one set of tensors. While `own_parameters` is active, a ``pyro.param`` or
``pyro.module`` statement that offers a module's own parameter gets exactly that parameter back.

A fit leaves the pair's parameters in the store, under the names that Pyro's own SVI would have given them (those of
this package's programs until the program is gone). What was loaded there reaches a module that asks for it, by
``pyro.module(..., update_module_params=True)`` or through a ``PyroParam``. A value counts as loaded where no fit has
left it there and no other module that is alive owns it.
"""

from __future__ import annotations

import gc
import sys
import warnings
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor, nn
from torch.distributions import constraints

from pyro_vae.reach import modules_of

_OWN_REFERENCES = 3  # of a tensor of the store: two of its tables, and the call that counts
_FRESH = 64  # parameters offered under one name, none of them a second time: each run makes new ones

# Tensors in the store that are other pairs': a fit left them there, or a module alive owns them. By id.
_others: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()


# Where loaded values are noted down, while somebody collects them.
_collecting: list[list[tuple[Tensor, Tensor]]] = []


# Names of programs, of which no others have them, that are gone.
_gone: list[str] = []


def leaves_with(program: Any, name: str) -> None:
    """Have the parameters of a program of a unique name leave the store when it is gone, at the next fit."""
    weakref.finalize(program, _gone.append, name).atexit = False


def _forget_the_gone() -> None:
    store = pyro.get_param_store()
    held = []
    for name in _gone:
        for key in [key for key in store._params if key.startswith((f"{name}.", f"{name}$$$"))]:
            if id(store._params[key]) in _others and sys.getrefcount(store._params[key]) <= _OWN_REFERENCES:
                del store[key]
            else:  # by a copy of the program, or a graph that is yet to go
                held.append(name)
    _gone[:] = dict.fromkeys(held)


class _Itself(weakref.ref[Tensor]):
    """The ``unconstrained`` of a module's own parameter, with the name that a program gives it."""

    name: str


class _OwnParameters(Messenger):
    """Answers param statements with the parameter offered, and keeps names apart; `keeps` enters them in the store as
    they are met, as Pyro does, but for estimates (`aside`) inside."""

    def __init__(self, keeps: bool = False, aside: bool = False) -> None:
        super().__init__()
        self.store = _Store()
        self.owner: dict[str, Tensor] = {}
        self._keeps, self._aside = keeps, aside
        self._repeated: set[str] = set()

    def _pyro_param(self, msg: Any) -> None:
        offered = msg["args"][1] if len(msg["args"]) > 1 else None
        constraint = msg["kwargs"].get("constraint", constraints.real)
        if not isinstance(offered, nn.Parameter) or constraint is not constraints.real:
            return
        if self._keeps and msg.get("aside"):
            return
        if self._aside:
            msg["aside"] = True
        own, asked = offered, msg["name"]
        name = asked
        while self.owner.get(name, own) is not own:
            name += "'"
        if name in self.owner:
            self._repeated.add(asked)
        else:
            if len(name) - len(asked) > _FRESH and asked not in self._repeated:
                raise ValueError(
                    f"pyro.param({asked!r}, ...) offers a new torch.nn.Parameter in every run, so that none is "
                    "trained. Pass a tensor, which the param store then keeps, or make the Parameter once, outside "
                    "the program."
                )
            if name == asked and "$$$" in name and (held := self.store.other(name, own)) is not None:
                if _updates_module() and _loaded(held):
                    _take_up(name, held, own)
            self.owner[name] = own
        if self._keeps:  # at every sight: an estimate in between may have put the store back
            self.store.put(name, own)
        known = getattr(own, "unconstrained", None)
        if not isinstance(known, _Itself) or known() is not own or known.name != name:
            known = _Itself(own)
            known.name = name
            # pyro.infer.SVI finds what to optimise through this attribute.
            own.unconstrained = known  # type: ignore[attr-defined]
        msg["value"] = own
        # A trace holds one parameter a name: without this, SVI would see only the last.
        msg["name"] = name

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        if not _PYRO_STACK:  # nobody is left to ask for it, and a parameter that holds a weakref cannot be pickled
            for own in self.owner.values():
                if isinstance(getattr(own, "unconstrained", None), _Itself):
                    del own.unconstrained  # type: ignore[attr-defined]


class _Store:
    """Pyro's param store, with a memory of what was changed in it."""

    def __init__(self) -> None:
        self.store = pyro.get_param_store()
        self._before: dict[str, tuple[Tensor, Any] | None] = {}

    def other(self, name: str, own: Tensor) -> Tensor | None:
        """What the store holds under a name, if that is another tensor."""
        held = self.store._params.get(name)
        return None if held is own else held

    def put(self, name: str, own: Tensor | None, constraint: Any = constraints.real) -> None:
        """Enter a tensor in place of what is there; None leaves the name free."""
        if own is not None and self.store._params.get(name) is own:
            return
        held = self._drop(name)
        self._before.setdefault(name, held)
        if own is not None:
            self._enter(name, own, constraint)

    def undo_all(self) -> None:
        """Put back what was there."""
        for name, held in self._before.items():
            self._drop(name)
            if held is not None:
                self._enter(name, *held)
        self._before.clear()

    def _enter(self, name: str, tensor: Tensor, constraint: Any) -> None:
        self.store.set_state({"params": {name: tensor}, "constraints": {name: constraint}})

    def _drop(self, name: str) -> tuple[Tensor, Any] | None:
        if name not in self.store:
            return None
        tensor, constraint = self.store._params.pop(name), self.store._constraints.pop(name)
        if self.store._param_to_name.get(tensor) == name:  # a tensor may have two names
            del self.store._param_to_name[tensor]
        return tensor, constraint


def _updates_module() -> bool:
    """Whether the param statement comes from ``pyro.module(..., update_module_params=True)``."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not pyro.module.__code__:
        frame = frame.f_back
    return frame is not None and bool(frame.f_locals["update_module_params"])


def _loaded(held: Tensor) -> bool:
    """Whether a tensor of the store is nobody's: loaded, or left by a module that is gone."""
    if _others.get(id(held)) is held:
        return False
    for thing in gc.get_objects():
        if issubclass(type(thing), nn.Module):
            slots = vars(thing).get("_parameters") or {}
            if any(p is held for p in slots.values()):
                _others[id(held)] = held
                return False
    return True


def _take_up(name: str, held: Tensor, own: Tensor) -> None:
    """Give a module's own parameter the value that the store holds."""
    if held.shape != own.shape:
        raise ValueError(
            f"the param store holds {name!r} of shape {tuple(held.shape)}, and the module's has shape "
            f"{tuple(own.shape)}. Build the networks as they were saved, or call pyro.clear_param_store()."
        )
    with torch.no_grad():
        own.copy_(held)
    for taken in _collecting:
        taken.append((own, held.detach().clone()))


@contextmanager
def loaded_values() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Note down which of the modules' parameters take which values that were loaded into the store."""
    found: list[tuple[Tensor, Tensor]] = []
    _collecting.append(found)
    try:
        yield found
    finally:
        _collecting.remove(found)


def holds_loaded() -> bool:
    """Whether the store holds a value for a module that ``get_param_store().load`` may have brought."""
    held = pyro.get_param_store().named_parameters()
    return any("$$$" in name and _others.get(id(tensor)) is not tensor for name, tensor in held)


def _constrained_parameters(program: Any) -> dict[str, tuple[Tensor, Any]]:
    """Unconstrained tensors of a program's PyroParams with their constraints, by the name Pyro gives them."""
    found: dict[str, tuple[Tensor, Any]] = {}
    owner = program if isinstance(program, nn.Module) else getattr(program, "__self__", None)
    if isinstance(owner, PyroModule):
        for path, module in owner.named_modules():
            for attribute, (constraint, _) in getattr(module, "_pyro_params", {}).items():
                root = owner._pyro_name
                name = ".".join(part for part in (root, path, attribute) if part)
                found[name] = getattr(module, attribute + "_unconstrained"), constraint
    return found


@contextmanager
def own_parameters(*programs: Any, keep: bool = False, aside: bool = False) -> Iterator[None]:
    """Run programs on their own parameters, untouched by what the param store holds of others.

    Parameters of modules leave no trace in the store, unless they are to be kept there: then under the names that Pyro
    gives them, in place of those of other pairs, unless an exception ends it. Those that plain functions declare with
    ``pyro.param`` live in the store. `aside` marks an estimate, of which contexts around that keep take no note.

    Two programs with different constrained parameters (``PyroParam``) of one name, which Pyro cannot tell apart, a
    loaded value of another shape, and a program that makes a new ``nn.Parameter`` in every run are a ValueError.

    Example:
        >>> line = nn.Linear(1, 1)
        >>> with own_parameters():
        ...     pyro.module("line", line).weight is pyro.param("line", line.weight)
        True
        >>> "line$$$weight" in pyro.get_param_store()
        False
        >>> with own_parameters(keep=True):
        ...     _ = pyro.module("line", line)
        >>> pyro.param("line$$$weight") is line.weight
        True
    """
    mine: dict[str, tuple[Tensor, Any]] = {}
    for program in programs:
        for name, (tensor, constraint) in _constrained_parameters(program).items():
            if mine.setdefault(name, (tensor, constraint))[0] is not tensor:
                raise ValueError(
                    f"two programs own a constrained parameter named {name!r}, and Pyro would "
                    "train one tensor for both. Give each root module a name of its own: "
                    "PyroModule.__init__(self, name='guide')."
                )
    if keep:
        _forget_the_gone()
    own = _OwnParameters(keep, aside)
    store = own.store
    for name, (tensor, constraint) in mine.items():
        held = store.other(name, tensor)
        if held is not None and _loaded(held):
            _take_up(name, held, tensor)
        if keep or held is not None or name not in store.store:
            store.put(name, tensor if keep else None, constraint)
    try:
        with own:
            yield
    except BaseException:
        store.undo_all()
        raise
    if not keep:
        store.undo_all()
        return
    for name, tensor in own.owner.items():  # what was first met in a run that put the store back is not there yet
        store.put(name, tensor)
    for name, (tensor, constraint) in mine.items():
        store.put(name, tensor, constraint)
    for tensor in (*own.owner.values(), *(tensor for tensor, _ in mine.values())):
        _others[id(tensor)] = tensor
    double = sorted({name.rstrip("'") for name in own.owner if name.endswith("'")})
    if double:
        warnings.warn(
            f"model and guide have different parameters of one name, such as {double[0]!r}. All were trained, but the "
            "param store is no place to save them: loaded again, both would get one value. Give the networks names of "
            "their own there, or save the modules' state_dict.",
            stacklevel=4,
        )


def plain_name(name: str) -> str:
    """The name of a parameter without what ``torch.compile`` puts around a module.

    Example:
        >>> plain_name("model.decoder._orig_mod.weight")
        'model.decoder.weight'
    """
    return name.replace("_orig_mod.", "")


def names_of(tensor: Tensor) -> list[str]:
    """The names that the param store, or a program that runs on its own parameters, has for a tensor."""
    found = [name for name, held in pyro.get_param_store().named_parameters() if held is tensor]
    known = getattr(tensor, "unconstrained", None)
    return found or ([known.name] if isinstance(known, _Itself) and known() is tensor else [])


def trainable(program: Any) -> list[nn.Parameter]:
    """Parameters with gradients of the modules that a program owns, each once; [] where it owns none."""
    return list({id(p): p for module in modules_of(program) for p in module.parameters() if p.requires_grad}.values())


def device_of(*programs: Any) -> torch.device | None:
    """The device of the first parameter or buffer found, frozen or not; None where no program owns one."""
    for module in modules_of(*programs):
        for tensor in (*module.parameters(), *module.buffers()):
            return tensor.device
    return None
