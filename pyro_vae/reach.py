"""What a program can reach from Python: the modules it owns, and all that could change what it computes.

`Reach` walks a program as an object. From a function it goes to what its bytecode names (globals, attributes of
modules, imports), to its closure and defaults; from an object to its attributes and to the methods of its class that
the code met so far can call; from a container to its items. Everything met is one of four kinds:

    immutable     a number, a text, a dtype
    trusted       code that is a function of its arguments: torch, Pyro, zuko, NumPy, math, this package
    a place       something mutable whose value can be compared later: an attribute, an item, a cell, a global
    unproven      anything else: a generator, the clock, a file, Python's random numbers, a C object

Where nothing is unproven, two runs between which no place has changed compute the same function of their tensors and of
torch's noise. Tensors are places by identity only. Attributes are places where the code met can name them (a name in
its bytecode, or a text among its constants); where it computes names (``getattr``, ``vars``) all of them are.
"""

from __future__ import annotations

import abc
import builtins
import collections
import functools
import gc
import operator
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn
from torch.nn.modules import module as _torch_modules

from pyro_vae import _trust as trust
from pyro_vae._trust import MISSING, SCALARS, Named, is_trusted, named_in

_FUNCTION_PARTS = tuple(operator.attrgetter(name) for name in ("__code__", "__defaults__", "__kwdefaults__"))
_FUNCTION_TEXTS = ("__doc__", "__annotations__", "__name__", "__qualname__")
# What these make anew in every run, before they read it.
_ANEW = {torch.distributions.Transform: ("_cache", "_inv", "_inter"), AutoGuide: ("plates",)}
_ENOUGH = 3  # doubts, after which installed packages are not walked any further
_MOST_PLACES = 20_000  # to look at in each step; an eager step costs less
_DEEPEST = 40  # values on the way to another, before it is put off
_CODE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LARGEST_ARRAY, _LARGEST_CONTAINER = 2**16, 10_000
_SEQUENCES = (list, collections.deque)
_MAPPINGS = (dict, types.MappingProxyType)
_CONTAINERS = (*_SEQUENCES, *_MAPPINGS, tuple, set, frozenset)
# What these hold, and nothing else of them is read.
_PARTS: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (functools.partial, ("func", "args", "keywords")),
    (property, ("fget", "fset")),
    (functools.cached_property, ("func",)),
    (staticmethod | classmethod, ("__func__",)),
)
_GENERATORS = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)


class _TooMuch(Exception):
    """More is reached than can be looked at in each step."""


class Reach:
    """All that some programs, and whatever else is run, can reach.

    Args:
        settings_of: A Pyro ELBO, of which the settings count and not what it keeps of its last call.
        owned: Look for modules alone, and not into the code of installed packages other than the roots' own:
            a program that makes one table with pandas reaches tens of thousands of functions.
    Attributes:
        modules: The outermost modules met, each once: those that the programs own.
        unproven: What was met that is neither immutable, nor trusted, nor a place, in words; empty where the
            programs are a function of tensors, noise and places.
    Example:
        >>> weight, net = {"kl": 0.5}, nn.Linear(2, 2)
        >>> reach = Reach(lambda x: weight["kl"] * net(x))
        >>> reach.modules == [net], reach.unproven, reach.changed()
        (True, [], None)
        >>> weight["kl"] = 1.0
        >>> reach.changed()
        "weight['kl']"
        >>> import random
        >>> Reach(lambda x: x * random.random()).unproven[0]
        'random.random (in <lambda>, line 1 of <doctest pyro_vae.reach.Reach[6]>)'
    """

    def __init__(self, *roots: Any, settings_of: Any = None, owned: bool = False) -> None:
        self._owned = owned
        self._ours = {trust.top(module) for root in roots for module in trust.modules_named(root)}
        self._names: set[str] = set()
        self._computed = False
        while True:  # a name met late may open an attribute that was passed over early
            known = len(self._names), self._computed
            self._start()
            try:
                self._walk(roots, settings_of)
            except _TooMuch as reason:
                self.unproven.append(str(reason))
                break
            if (len(self._names), self._computed) == known:
                break
        inside = {id(part) for module in self._met for part in module.modules() if part is not module}
        self.modules = [module for module in self._met if id(module) not in inside]
        self.before = self._now()

    @property
    def full(self) -> bool:
        """Whether there are as many places as can be looked at in each step."""
        return len(self._places) >= _MOST_PLACES

    @property
    def arrays(self) -> bool:
        """Whether numbers of arrays are compared, whose memory may be that of a tensor."""
        return any(get is _bytes_of for get, _ in self._places)

    def array_over(self, tensors: Iterable[Tensor]) -> str | None:
        """The name of an array that lies in the memory of one of some tensors: who writes to the tensor changes it."""
        arrays = [(label, value) for label, value in self._whole if isinstance(value, np.ndarray)]
        if not arrays:
            return None
        written = [_memory_of(t) for t in tensors if t.device.type == "cpu" and t.layout == torch.strided]
        return next((name for name, array in arrays if any(np.may_share_memory(array, each) for each in written)), None)

    def fresh(self) -> bool:
        """Whether no place has changed."""
        now = self._now()
        return all(map(operator.is_, self.before, now)) or self._first_change(now) is None

    def changed(self) -> str | None:
        """The name of a place that is not as it was."""
        found = self._first_change(self._now())
        return None if found is None else self._labels[found]

    def values(self) -> list[tuple[str, Any]]:
        """What now stands where the programs read: plain values, code, arrays and tensors, each with its name.

        The names are the same in every process, and what is read only to compare objects is left out.
        """
        looks = (tuple, len, type, _remembered, _bytes_of)
        found = [
            (label, value)
            for (get, _), label, value in zip(self._places, self._labels, self._now(), strict=True)
            if get not in looks and _is_plain(value)
        ]
        return found + self._whole

    def _walk(self, roots: Sequence[Any], settings_of: Any) -> None:
        for root in roots:
            self._value(root, getattr(root, "__qualname__", None) or type(root).__qualname__)
        if settings_of is not None:
            self._settings(settings_of)
        while self._later:
            self._where, value, label = self._later.pop()
            self._value(value, label)

    def _start(self) -> None:
        self.unproven: list[str] = []
        self._doubted: set[str] = set()  # the same, to look up: there can be tens of thousands
        self._met: list[nn.Module] = []
        self._places: list[tuple[Callable[[Any], Any], Any]] = []
        self._labels: list[str] = []  # what each place is called
        self._whole: list[tuple[str, Any]] = []  # arrays, tensors and long lists, by name
        self._noted: set[tuple[int, int]] = set()
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # objects made on the way, whose id must stay theirs
        self._classes: dict[type, bool] = {}  # whether with what makes an instance
        self._foreign: dict[type, bool] = {}
        self._original: dict[type, bool] = {}
        self._depth = 0
        self._later: list[tuple[str, Any, str]] = []
        self._where = ""

    def _now(self) -> list[Any]:
        try:
            return [get(key) for get, key in self._places]
        except IndexError:  # of a list that has become shorter
            return [_tried(get, key) for get, key in self._places]

    def _first_change(self, now: list[Any]) -> int | None:
        for number, (old, new) in enumerate(zip(self.before, now, strict=True)):
            if old is not new and not _same(old, new):
                return number
        return None

    # ------------------------------------------------------------------ places, doubts, and what is passed over

    def _place(self, get: Callable[[Any], Any], key: Any, label: str) -> None:
        if self._owned:
            return
        mark = (id(getattr(get, "__self__", get)), id(key))
        if mark in self._noted:
            return
        self._noted.add(mark)
        if self.full:
            raise _TooMuch(f"more than {_MOST_PLACES:,} places of Python are read, among them {label}")
        self._kept.append(key)
        self._places.append((get, key))
        self._labels.append(label)

    def _read(self, get: Callable[[Any], Any], key: Any, value: Any, label: str) -> None:
        """A place, and the value that stands there."""
        self._place(get, key, label)
        self._value(value, label)

    def _doubt(self, what: str) -> None:
        sentence = f"{what} ({self._where})" if self._where else what
        if sentence not in self._doubted:
            self._doubted.add(sentence)
            self.unproven.append(sentence)

    def _is_others(self, module: str | None) -> bool:
        """Whether a Python module is of an installed package in which nobody looks for networks."""
        return self._owned and trust.top(module) not in self._ours and trust.is_installed(trust.top(module))

    def _settled(self, module: str | None) -> bool:
        """Whether more of an installed package could change nothing: what is in doubt is so already."""
        first = trust.top(module)
        return len(self.unproven) >= _ENOUGH and first not in self._ours and trust.is_installed(first)

    def _first_time(self, thing: Any) -> bool:
        known = id(thing) in self._seen
        self._seen.add(id(thing))
        return not known

    # ------------------------------------------------------------------ values, by their kind

    def _value(self, value: Any, label: str) -> None:
        """Take note of a value that stands at a place (the place itself is noted by who holds it)."""
        kind = type(value)
        if kind in SCALARS or (isinstance(value, trust.IMMUTABLE) and trust.trusted_module(kind.__module__)):
            return
        if self._depth > _DEEPEST:  # Python's stack has an end
            self._later.append((self._where, value, label))
            return
        self._depth += 1
        try:
            if isinstance(value, type):
                self._class(value, label)
            elif self._first_time(value):
                self._new_value(value, kind, label)
        finally:
            self._depth -= 1

    def _new_value(self, value: Any, kind: type, label: str) -> None:
        if kind in weakref.ProxyTypes:  # which hides its own class
            self._doubt(f"{label}, a weak proxy")
            return
        for kinds, look, whole in _KINDS:
            if isinstance(value, kinds):
                look(self, value, label)
                if not whole and (getattr(value, "__dict__", None) or self._is_foreign(kind)):
                    self._attributes(value, label)
                return
        self._object(value, label)

    def _method(self, value: types.MethodType, label: str) -> None:
        self._value(value.__self__, label if isinstance(value.__self__, nn.Module) else f"{label}.__self__")
        self._value(value.__func__, label)

    def _descriptor(self, value: Any, label: str) -> None:
        self._computed = self._computed or getattr(value, "__name__", "") in trust.COMPUTED_NAMES

    def _parts(self, value: Any, label: str) -> None:
        for name in next(names for kinds, names in _PARTS if isinstance(value, kinds)):
            self._value(getattr(value, name), f"{label}.{name}")

    def _reference(self, value: Any, label: str) -> None:
        self._value(value(), label)

    def _tensor(self, value: Tensor, label: str) -> None:
        """Not its numbers, but the hooks of its gradient, and that attributes may appear."""
        self._whole.append((label, value))
        if value._backward_hooks is not None:
            self._code_in(value._backward_hooks, f"the hooks of {label}")
        self._place(len, vars(value), label)

    def _cache(self, value: Any, label: str) -> None:
        """What ``functools.lru_cache`` wraps, and what it remembers: a result is read where it was made."""
        self._value(value.__wrapped__, label)
        if trust.trusted_module(getattr(value, "__module__", None)):
            return
        held = gc.get_referents(value)
        caches = [d for d in held if type(d) is dict and d is not vars(value)]
        if value.cache_info().maxsize is not None and value.cache_info().currsize:
            caches = [d for d in caches if d and all(type(v).__name__ == "_lru_list_elem" for v in d.values())]
        if len(caches) != 1 or len(caches[0]) > _LARGEST_CONTAINER:
            self._doubt(f"{label}, a cache")
            return
        self._place(_remembered, caches[0], f"the cache of {label}")
        for result in (*held, *(v for v in caches[0].values() if type(v).__name__ != "_lru_list_elem")):
            if all(result is not d for d in (caches[0], vars(value))) and type(result) is not object:
                self._value(result, f"what {label} remembers")

    def _container(self, value: Any, label: str) -> None:
        if value is sys.modules or len(value) > _LARGEST_CONTAINER:
            if value is not sys.modules:
                self._whole.append((label, value))
            what = f"{label}, a {type(value).__name__} of {len(value):,} items"
            self._doubt("sys.modules" if value is sys.modules else what)
            return
        ways = ((_MAPPINGS, "get"), (_SEQUENCES, "__getitem__"))
        get = next((getattr(value, way) for kinds, way in ways if isinstance(value, kinds)), None)
        if not isinstance(value, tuple):  # of a set in its order, which code may go by
            self._place(len if isinstance(value, _SEQUENCES) else tuple, value, label)
        for key, item in list(value.items() if isinstance(value, _MAPPINGS) else enumerate(value)):
            inside = label if isinstance(value, set | frozenset) else f"{label}[{key!r}]"
            self._value(key, label)
            if get is not None:
                self._place(get, key, inside)
            self._value(item, inside)

    def _array(self, value: np.ndarray, label: str) -> None:
        self._whole.append((label, value))
        if value.dtype.hasobject or value.nbytes > _LARGEST_ARRAY:
            self._doubt(f"{label}, a NumPy array of {value.nbytes:,} bytes, too many to compare in every step")
        else:
            self._place(_bytes_of, value, label)

    def _builtin(self, value: Any, label: str) -> None:
        self._computed = self._computed or value.__name__ in trust.COMPUTED_NAMES
        owner = getattr(value, "__self__", None)
        bound = type(owner).__module__ or ""
        if owner is None or isinstance(owner, types.ModuleType | type) or bound.startswith("pybind11"):
            module = getattr(value, "__module__", None) or getattr(owner, "__module__", None)
            module = module or getattr(owner, "__name__", "builtins")
            name = f"{module}.{value.__name__}"
            if not trust.trusted_module(module) or trust.is_denied(module, name):
                self._doubt(name if module != "builtins" else value.__name__)
        elif isinstance(owner, _GENERATORS[1:]):
            self._doubt(f"{'' if isinstance(owner, random.Random) else 'numpy.'}random.{value.__name__}")
        else:
            self._value(owner, label.rsplit(".", 1)[0])

    def _object(self, value: Any, label: str) -> None:
        kind = type(value)
        module = kind.__module__ or ""
        if isinstance(value, BaseException):
            self._doubt(f"{label}, an exception")
        elif isinstance(value, _GENERATORS):
            self._doubt(f"{label}, a generator of random numbers")
        elif module.startswith(trust.OPAQUE) or module in ("typing", "typing_extensions"):
            pass
        elif not (hasattr(value, "__dict__") or any("__slots__" in vars(c) for c in kind.__mro__)) or (
            module.startswith(("threading", "_thread", "contextvars", "_io", "io"))
        ):
            self._doubt(f"{label}, a {trust.type_name(kind)}")
        else:
            self._attributes(value, label)

    # ------------------------------------------------------------------ modules, attributes and classes

    def _python_module(self, module: types.ModuleType, label: str) -> None:
        """A module that the code may read by any name it knows."""
        if self._is_others(module.__name__):
            return
        self._kept.append(module)
        if self._settled(module.__name__):
            return
        if self._is_foreign(type(module)):
            self._place(type, module, label)
            self._class(type(module), label, making=False)
        for name in sorted(self._names):
            self._attribute_of(module, name, label)

    def _attribute_of(self, module: types.ModuleType, name: str, label: str) -> None:
        space = vars(module)
        if name.startswith("__") or (name not in space and trust.trusted_module(module.__name__)):
            return
        value = space.get(name, MISSING)
        if value is MISSING and "__getattr__" in space:
            self._doubt(f"{label}.{name}, which the module may compute")
        if value is MISSING and type(module) is not types.ModuleType:
            self._value(module, label)
        self._place(space.get, name, f"{label}.{name}")
        if value is not MISSING and trust.is_denied(module.__name__, f"{module.__name__}.{name}"):
            self._doubt(f"{module.__name__}.{name}")
        elif value is not MISSING:
            self._value(value, f"{label}.{name}")

    def _module(self, module: nn.Module, label: str) -> None:
        if not self._met:
            for name in _HOOKS:
                self._code_in(vars(_torch_modules)[f"_global{name}"], f"torch.nn.modules.module._global{name}")
        self._met.append(module)
        for path, part in module.named_modules():
            self._seen.add(id(part))
            self._module_part(part, f"{label}.{path}" if path else label)

    def _module_part(self, part: nn.Module, label: str) -> None:
        space, kind = vars(part), type(part)
        if isinstance(part, torch.jit.ScriptModule):
            self._doubt(f"{label}, a compiled TorchScript module")
            return
        self._place(type, part, label)
        self._place(len, space, label)
        if not kind.__module__.startswith(trust.OPAQUE):  # torch.compile's, around the module that it holds
            self._held(part, {name: value for name, value in space.items() if name not in _CODE_ATTRIBUTES}, label)
        for slots in (part._parameters, part._buffers, part._modules):
            self._place(len, slots, label)
            for name, value in slots.items():
                self._place(slots.get, name, f"{label}.{name}")
                if isinstance(value, Tensor) and (value._backward_hooks or vars(value).keys() - {"unconstrained"}):
                    self._value(value, f"{label}.{name}")
        for name in _HOOKS:
            self._code_in(space.get(name), f"{label}.{name}")
        if self._is_foreign(kind):
            self._class(kind, label, making=False)

    def _held(self, value: Any, attributes: dict[str, Any], label: str) -> None:
        """The attributes of an object that anybody may read; of the others its code alone."""
        space, kind = vars(value), type(value)
        foreign = self._is_foreign(kind)
        anew = tuple(name for base, names in _ANEW.items() if isinstance(value, base) for name in names)
        for name, held in attributes.items():
            if name.startswith(anew):
                continue
            plain = not name.startswith("_") or isinstance(held, (*SCALARS, Tensor, np.ndarray)) or _is_numbers(held)
            if self._wanted(name, kind) or (plain and not foreign):
                self._read(space.get, name, held, f"{label}.{name}")
            elif not foreign or name.startswith("_pyro_"):
                self._code_in(held, f"{label}.{name}")

    def _code_in(self, value: Any, label: str) -> None:
        """Of what a trusted object keeps for itself the code (hooks, priors of PyroSample) and its numbers."""
        if isinstance(value, Mapping):
            self._place(tuple if value else len, value, label)
            for key, item in list(value.items()):
                self._code_in(item, f"{label}[{key!r}]")
        elif isinstance(value, tuple | list) and not _is_numbers(value):
            for item in value:
                self._code_in(item, label)
        elif isinstance(value, list | np.ndarray) or (callable(value) and not isinstance(value, type)):
            self._value(value, label)

    def _attributes(self, value: Any, label: str) -> None:
        """Of an object that is no module: its attributes, and the methods of its class."""
        kind = type(value)
        foreign = self._is_foreign(kind)
        space = getattr(value, "__dict__", None)
        if isinstance(space, dict):
            self._place(len, space, label)
            self._held(value, dict(space), label)
        for owner in kind.__mro__:
            slots = vars(owner).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and (not foreign or self._wanted(name, kind)):
                    get = functools.partial(_attribute, value)
                    self._read(get, name, getattr(value, name, None), f"{label}.{name}")
        if foreign:
            self._place(type, value, label)
            if any(not trust.made_in_python(c) and c not in trust.TRANSPARENT for c in kind.__mro__):
                self._doubt(f"{label}, a {trust.type_name(kind)}")
            self._class(kind, label, making=False)

    def _wanted(self, name: str, kind: type) -> bool:
        """Whether code may name an attribute of instances of a class: what was met, and the trusted bases' own."""
        if self._computed or name in self._names:
            return True
        if not self._is_foreign(kind):
            return False
        if name in trust.DISTRIBUTION and not issubclass(kind, nn.Module | Tensor):
            return True  # Pyro asks no base of a distribution
        for base in kind.__mro__:
            if base is not object and hasattr(base, name) and trust.trusted_module(base.__module__):
                return True
            if base not in trust.PLAIN_BASES and self._is_owned(base):
                names = trust.names_of(base)
                if names is None or name in names:
                    return True
        return False

    def _is_foreign(self, kind: type) -> bool:
        """Whether there is anything in a class that is not of a trusted package."""
        if self._owned:  # whose code it is matters for a proof, not for finding networks
            return not trust.trusted_module(kind.__module__) or kind is types.SimpleNamespace
        known = self._foreign.get(kind)
        if known is None:
            known = kind is types.SimpleNamespace or not all(self._is_owned(c) for c in kind.__mro__)
            self._foreign[kind] = known
        return known

    def _is_owned(self, kind: type) -> bool:
        """Whether a class is what a trusted package made it: its name alone can be borrowed, its methods replaced."""
        known = self._original.get(kind)
        if known is None:
            known = self._original[kind] = _is_original(kind)
        return known

    def _class(self, kind: type, label: str, making: bool = True) -> None:
        """What instances of a class can run and read of it; to make one, too, where the class itself is at hand."""
        if self._is_others(kind.__module__):
            return
        if not self._is_foreign(kind):
            name = f"{kind.__module__}.{kind.__qualname__}"
            self._computed = self._computed or kind.__name__ in trust.COMPUTED_NAMES
            if trust.is_denied(kind.__module__, name) or kind is torch.Generator:
                self._doubt(name)
            return
        if (kind in self._classes and self._classes[kind] >= making) or self._settled(kind.__module__):
            return
        self._classes[kind] = making
        if not trust.made_in_python(kind):
            if kind is not types.SimpleNamespace:
                self._doubt(f"{label}, a {trust.type_name(kind)}")
            return
        if isinstance(kind, abc.ABCMeta):  # what has been registered with it
            self._place(_registrations, kind, f"the classes registered with {kind.__qualname__}")
        for owner in [*type(kind).mro(type(kind)), *kind.__mro__]:
            if not self._is_owned(owner):
                self._class_space(owner, kind, making or "__class__" in self._names)

    def _class_space(self, owner: type, kind: type, making: bool) -> None:
        space, label = vars(owner), owner.__qualname__
        self._place(len, space, label)
        self._names.update(trust.texts([space.get("__match_args__")]))
        for name, value in list(space.items()):
            if (name in trust.NO_VALUE and name not in self._names) or (name in trust.MAKING and not making):
                continue
            if (name.startswith("__") and name.endswith("__")) or self._wanted(name, kind):
                self._read(space.get, name, value, f"{label}.{name}")

    def _settings(self, loss: Any) -> None:
        kind = type(loss)
        for name, value in list(vars(loss).items()):
            if name.startswith("_") and not self._is_foreign(kind):
                continue
            if name == "last_bound" or (name == "beta" and isinstance(value, int | float)):
                continue  # a weight that is a number is handed to the graph
            self._read(vars(loss).get, name, value, f"{name} of {kind.__name__}")
        if self._is_foreign(kind):
            self._class(kind, kind.__name__, making=False)

    # ------------------------------------------------------------------ functions

    def _function(self, function: types.FunctionType, label: str) -> None:
        module = function.__globals__.get("__name__", "")
        trusted = is_trusted(function) or self._is_others(module)
        if trusted and trust.is_denied(module, f"{module}.{function.__name__}"):
            self._doubt(f"{module}.{function.__name__}")
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if name != "__class__":  # it is there for super(), which makes nothing
                self._read(trust.contents, cell, trust.contents(cell), name)
        space = vars(function)
        if trusted:
            self._value(space.get("__wrapped__"), label)
            return
        if self._settled(module):
            return
        for part in _FUNCTION_PARTS:
            self._place(part, function, f"the code of {label}")
        for name in self._names.intersection(_FUNCTION_TEXTS):
            self._read(operator.attrgetter(name), function, getattr(function, name), f"{label}.{name}")
        for value in function.__defaults__ or ():
            self._value(value, f"a default of {label}")
        if function.__kwdefaults__:
            self._container(function.__kwdefaults__, f"the defaults of {label}")
        self._place(len, space, label)
        for name, value in list(space.items()):
            if name == "__wrapped__" or self._computed or name in self._names:
                self._read(space.get, name, value, f"{label}.{name}")
        self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, space: dict[str, Any]) -> None:
        if not self._first_time(code):
            return
        self._names.update(code.co_names, trust.texts(code.co_consts))
        self._computed = self._computed or not trust.COMPUTED_NAMES.isdisjoint(code.co_names)
        before = self._where
        for named in named_in(code):
            self._where = named.where
            if named.how == "import":
                self._import(space, named)
                continue
            self._place(space.get, named.name, named.name)
            if named.how == "load":
                value = space.get(named.name, MISSING)
                if value is MISSING:
                    value = getattr(builtins, named.name, MISSING)
                    self._place(vars(builtins).get, named.name, named.name)
                self._chain(value, named.name, named.attributes)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, space)
        self._where = before

    def _chain(self, value: Any, label: str, attributes: Sequence[str]) -> None:
        """Follow ``module.module.name`` as far as it goes through modules; the rest is for the value."""
        for name in attributes:
            if not isinstance(value, types.ModuleType):
                break
            module, space, value = value, vars(value), vars(value).get(name, MISSING)
            if not isinstance(value, types.ModuleType):
                self._attribute_of(module, name, label)
                return
            label = f"{label}.{name}"
            if not trust.trusted_module(module.__name__):
                self._place(space.get, name, label)
        if value is not MISSING:
            self._value(value, label)

    def _import(self, space: dict[str, Any], named: Named) -> None:
        name = named.name
        if named.level > 0:
            package = (space.get("__package__") or "").split(".")
            name = ".".join([*package[: len(package) - named.level + 1], name] if name else package)
        if sys.modules.get(name) is None:
            self._doubt(f"the import of {name} while it runs")
            return
        for imported in (name, trust.top(name)):
            if imported in sys.modules:
                self._value(sys.modules[imported], imported)


# A kind of value, how to look at it, and whether that is all of it; a subclass of the others may hold more.
_KINDS: tuple[tuple[Any, Callable[[Reach, Any, str], None], bool], ...] = (
    (nn.Module, Reach._module, True),
    (types.FunctionType, Reach._function, True),
    (types.ModuleType, Reach._python_module, True),
    (types.BuiltinFunctionType | types.MethodWrapperType, Reach._builtin, True),
    (types.MethodType, Reach._method, True),
    (trust.C_CALLABLES, Reach._descriptor, True),
    (Tensor, Reach._tensor, False),
    (np.ndarray, Reach._array, False),
    (_CONTAINERS, Reach._container, False),
    (tuple(kinds for kinds, _ in _PARTS), Reach._parts, False),
    (weakref.ref, Reach._reference, False),
    (functools._lru_cache_wrapper, Reach._cache, False),
)


def _is_original(kind: type) -> bool:
    module = kind.__module__
    if not trust.trusted_module(module):
        return False
    if not trust.made_in_python(kind):
        return True
    if any(isinstance(v, types.FunctionType) and not is_trusted(v) for v in vars(kind).values()):
        return False
    return module not in ("types", "builtins") or getattr(sys.modules[module], kind.__name__, None) is kind


def modules_of(*programs: Any) -> list[nn.Module]:
    """The modules that programs own, wherever they hold them: outermost ones, each once. None among programs is passed
    over.

    A program is a module, a method of one, or a function with modules in its closure, its globals, its arguments or the
    objects that it reads.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> modules_of(lambda x: net(x), None) == [net]
        True
    """
    return Reach(*(p for p in programs if p is not None), owned=True).modules


def parts_of(*programs: Any) -> list[nn.Module]:
    """The modules that programs own and all modules inside them, each once.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> parts_of(net) == [net, net[0]]
        True
    """
    return parts_in(modules_of(*programs))


def parts_in(modules: Iterable[nn.Module]) -> list[nn.Module]:
    """Modules and all that lie inside them, each once."""
    return list({id(part): part for module in modules for part in module.modules()}.values())


def _is_numbers(value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(item) in SCALARS for item in value)


def _remembered(cache: dict[Any, Any]) -> tuple[Any, ...]:
    return tuple(cache.values())


def _registrations(_: type) -> Any:
    return abc.get_cache_token()


def _is_plain(value: Any) -> bool:
    """Whether a value is the same line of text in every process."""
    if type(value) is tuple:
        return all(map(_is_plain, value))
    plain = (bool, int, float, complex, str, bytes, type(None), types.CodeType, torch.dtype, np.generic)
    return isinstance(value, plain)


def _same(old: Any, new: Any) -> bool:
    """Whether two values that are not one object are alike: numbers and trust.texts, and tuples and sets of them."""
    if type(old) is not type(new):
        return False
    if isinstance(old, float) and old == 0 == new:
        return str(old) == str(new)
    if isinstance(old, tuple) and type(old) is tuple:
        return len(old) == len(new) and all(a is b or _same(a, b) for a, b in zip(old, new, strict=True))
    if type(old) in (bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device):
        return old == new
    if isinstance(old, np.generic):
        return bool(old == new)
    if type(old) is frozenset:
        return {(type(item), item) for item in old} == {(type(item), item) for item in new}
    return False


def _tried(get: Callable[[Any], Any], key: Any) -> Any:
    try:
        return get(key)
    except IndexError:
        return MISSING


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, MISSING)


def _memory_of(tensor: Tensor) -> np.ndarray:
    """All memory that a tensor is a part of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).numpy()


def _bytes_of(array: np.ndarray) -> tuple[Any, ...]:
    return array.shape, str(array.dtype), array.tobytes()
