"""What a program can reach from Python: the modules it owns, and all that could change what it computes.

A Pyro program is Python code, and what it computes may depend on anything that this code
reads: numbers in attributes, dicts, closures and globals, arrays, files, the clock. `Reach`
walks the program as an object. From a function it goes to what its bytecode names (globals,
attributes of modules, imports), to its closure and defaults; from an object to its
attributes and to the methods of its class that the code met so far can call; from a
container to its items. Everything met is one of four kinds:

    immutable     a number, a text, a dtype
    trusted       code that is a function of its arguments: torch, Pyro, zuko, NumPy, math, this package
    a place       something mutable whose value can be compared later: an attribute, an item, a cell, a global
    unproven      anything else: a generator, the clock, a file, Python's random numbers, a C object

Where nothing is unproven, two runs of the program between which no place has changed compute
the same function of their tensors and of torch's noise. That is what a captured step
rests on. Tensors are places by identity only: a graph reads their values anew.

Attributes are places where the code met can name them (a name in its bytecode, or a text among its
constants); where it computes names (``getattr``, ``vars``) all of them are.
"""

from __future__ import annotations

import abc
import builtins
import collections
import collections.abc
import dis
import enum
import functools
import gc
import itertools
import numbers
import operator
import os
import pathlib
import random
import re
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from pyro.infer.autoguide import AutoGuide
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.nn.modules import module as _torch_modules

SCALARS = (bool, int, float, str, type(None))

_TRUSTED = frozenset(
    "torch torchvision pyro zuko pyro_vae numpy math cmath functools operator itertools collections typing "
    "typing_extensions abc _abc dataclasses enum contextlib copy warnings numbers types builtins reprlib "
    "_operator _functools _collections _collections_abc _weakref weakref einops opt_einsum re string".split()
)
# Of these, what reads or writes more than its arguments: parts of trusted packages by module, or by name.
_DENIED_MODULES = (
    "torch.random", "torch.cuda", "torch.hub", "torch.serialization", "torch.utils.data", "torch.distributed",
    "torch.multiprocessing", "torch.profiler", "torch.autograd.profiler", "torch.utils.tensorboard", "torch.backends",
    "torch.package", "torchvision.io", "torchvision.datasets", "numpy.random", "numpy.lib._npyio_impl",
    "numpy.lib.npyio", "pyro.contrib.examples",
)  # fmt: skip
_DENIED = frozenset(
    "torch.get_num_threads torch.get_num_interop_threads torch.get_float32_matmul_precision torch.get_default_device "
    "torch.are_deterministic_algorithms_enabled torch.is_anomaly_enabled numpy.geterr numpy.get_printoptions "
    "numpy.datetime64 torch.from_file numpy.load numpy.loadtxt numpy.genfromtxt numpy.fromfile numpy.memmap "
    "numpy.fromregex numpy.save "
    "pyro.util.set_rng_seed pyro.util.get_rng_state pyro.util.set_rng_state pyro.settings.get "
    "builtins.open builtins.input builtins.print builtins.globals builtins.locals builtins.eval builtins.exec "
    "builtins.compile builtins.__import__ builtins.breakpoint torch._C.Generator torch.Generator".split()
)
# Whose instances are code, whatever they hold.
_OPAQUE = ("torch._dynamo", "torch._inductor", "torch._ops", "torch.fx", "torch.autograd", "torch._C", "torch.library")
_COMPUTED_NAMES = frozenset(
    "getattr setattr delattr vars dir __dict__ __getattribute__ __getstate__ __reduce__ __reduce_ex__ attrgetter "
    "methodcaller inspect asdict astuple format format_map vformat Formatter".split()
)
_IMMUTABLE: tuple[type, ...] = (
    bool, int, float, complex, str, bytes, type(None), range, slice, type(Ellipsis), type(NotImplemented), torch.Size,
    torch.dtype, torch.device, torch.layout, torch.memory_format, np.generic, np.dtype, np.ufunc, pathlib.PurePath,
    re.Pattern, enum.Enum, numbers.Number, types.GenericAlias, types.UnionType, types.CodeType,
)  # fmt: skip
_C_CALLABLES = (
    types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType, type(vars(collections.namedtuple("_", "x"))["x"]),
)  # fmt: skip
# What a class keeps about itself, and nobody reads who does not name it.
_NO_VALUE = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __qualname__ __name__ __annotations__ __annotate__ __annotate_func__ "
    "__annotations_cache__ __firstlineno__ __static_attributes__ __slots__ __parameters__ __orig_bases__ "
    "__abstractmethods__ _abc_impl __dataclass_params__ __dataclass_fields__ __classdictcell__ __wrapped__".split()
)
_MAKING = frozenset(("__init__", "__new__", "__post_init__", "__init_subclass__", "__set_name__"))
# C classes whose instances hold nothing but what is looked at here.
_TRANSPARENT = frozenset(
    (object, type, dict, list, tuple, set, frozenset, int, float, complex, str, bytes, bool, collections.deque,
     collections.OrderedDict, collections.defaultdict, functools.partial, property, staticmethod, classmethod,
     weakref.ref, types.ModuleType, types.SimpleNamespace, np.ndarray, torch._C.TensorBase)
)  # fmt: skip
# Bases that read what they name through hooks of their own, which are looked at apart.
_PLAIN_BASES = (object, nn.Module, PyroModule)
_DISTRIBUTION = frozenset(name for name in dir(TorchDistribution) if not name.startswith("__"))
_FUNCTION_PARTS = tuple(operator.attrgetter(name) for name in ("__code__", "__defaults__", "__kwdefaults__"))
_FUNCTION_TEXTS = ("__doc__", "__annotations__", "__name__", "__qualname__")
# What these make anew in every run, before they read it.
_ANEW = {torch.distributions.Transform: ("_cache", "_inv", "_inter"), AutoGuide: ("plates",)}
_ENOUGH = 3  # doubts, after which installed packages are not walked any further
_MOST_PLACES = 20_000  # to look at in each step; an eager step costs less
_DEEPEST = 40  # values on the way to another, before it is put off
_CODE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in _HOOKS)
_LARGEST_ARRAY, _LARGEST_CONTAINER = 2**16, 10_000
_MISSING = object()
_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))


class _TooMuch(Exception):
    """More is reached than can be looked at in each step."""


class Reach:
    """All that some programs can reach.

    Args:
        roots: Pyro programs, and whatever else is run.
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
        self._ours = {_top(module) for root in roots for module in _modules_named(root)}
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

    def _walk(self, roots: Sequence[Any], settings_of: Any) -> None:
        for root in roots:
            self._value(root, _named(root))
        if settings_of is not None:
            self._settings(settings_of)
        while self._later:
            self._where, value, said = self._later.pop()
            self._value(value, said)

    def _start(self) -> None:
        self.unproven: list[str] = []
        self._met: list[nn.Module] = []
        self._places: list[tuple[Callable[[Any], Any], Any]] = []
        self._said: list[str] = []  # what each place is called
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

    def fresh(self) -> bool:
        """Whether no place has changed."""
        now = self._now()
        return all(map(operator.is_, self.before, now)) or self._first_change(now) is None

    def changed(self) -> str | None:
        """The name of a place that is not as it was."""
        found = self._first_change(self._now())
        return None if found is None else self._said[found]

    def values(self) -> list[tuple[str, Any]]:
        """What now stands where the programs read: plain values, code, arrays and tensors, each with its name.

        The names are the same in every process, and what is read only to compare objects is left out.
        """
        looks = (tuple, len, type, _remembered, _bytes_of)
        found = [
            (said, value)
            for (get, _), said, value in zip(self._places, self._said, self._now(), strict=True)
            if get not in looks and _is_plain(value)
        ]
        return found + self._whole

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

    def _is_others(self, module: str | None) -> bool:
        """Whether a Python module is of an installed package in which nobody looks for networks."""
        return self._owned and _top(module) not in self._ours and _is_installed(_top(module))

    def _place(self, get: Callable[[Any], Any], key: Any, said: str) -> None:
        if self._owned:
            return
        mark = (id(getattr(get, "__self__", get)), id(key))
        if mark in self._noted:
            return
        self._noted.add(mark)
        if self.full:
            raise _TooMuch(f"more than {_MOST_PLACES:,} places of Python are read, among them {said}")
        self._kept.append(key)
        self._places.append((get, key))
        self._said.append(said)

    def _doubt(self, what: str) -> None:
        sentence = f"{what} ({self._where})" if self._where else what
        if sentence not in self.unproven:
            self.unproven.append(sentence)

    def _settled(self, module: str | None) -> bool:
        """Whether more of an installed package could change nothing: what is in doubt is so already."""
        top = _top(module)
        return len(self.unproven) >= _ENOUGH and top not in self._ours and _is_installed(top)

    def _first_time(self, thing: Any) -> bool:
        if id(thing) in self._seen:
            return False
        self._seen.add(id(thing))
        return True

    # ------------------------------------------------------------------ values

    def _value(self, value: Any, said: str) -> None:
        """Take note of a value that stands at a place (the place itself is noted by who holds it)."""
        kind = type(value)
        if kind in SCALARS or (isinstance(value, _IMMUTABLE) and _is_trusted(kind.__module__)):
            return
        if self._depth > _DEEPEST:  # Python's stack has an end
            self._later.append((self._where, value, said))
            return
        self._depth += 1
        try:
            if isinstance(value, type):
                self._class(value, said)
            elif self._first_time(value):
                self._new_value(value, kind, said)
        finally:
            self._depth -= 1

    def _new_value(self, value: Any, kind: type, said: str) -> None:
        if kind in weakref.ProxyTypes:  # which hides its own class
            self._doubt(f"{said}, a weak proxy")
        elif isinstance(value, nn.Module):
            self._module(value, said)
        elif isinstance(value, types.FunctionType):
            self._function(value, said)
        elif isinstance(value, types.ModuleType):
            self._python_module(value, said)
        elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            self._builtin(value, said)
        elif isinstance(value, types.MethodType):
            self._value(value.__self__, f"{said}.__self__" if not isinstance(value.__self__, nn.Module) else said)
            self._value(value.__func__, said)
        elif isinstance(value, _C_CALLABLES):
            self._computed = self._computed or getattr(value, "__name__", "") in _COMPUTED_NAMES
        elif self._in_parts(value, kind, said):
            if getattr(value, "__dict__", None) or self._is_foreign(kind):
                self._attributes(value, said)
        else:
            self._object(value, said)

    def _in_parts(self, value: Any, kind: type, said: str) -> bool:
        """Of a value of a well-known kind, what it is made of; whether it is of such a kind."""
        if isinstance(value, Tensor):
            self._tensor(value, said)
        elif isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                self._value(getattr(value, name), f"{said}.{name}")
        elif isinstance(value, np.ndarray):
            self._array(value, said)
        elif isinstance(value, (dict, list, tuple, set, frozenset, collections.deque, types.MappingProxyType)):
            self._container(value, said)
        elif isinstance(value, property | functools.cached_property | staticmethod | classmethod):
            for name in ("fget", "fset", "func", "__func__"):
                if getattr(value, name, None) is not None:
                    self._value(getattr(value, name), said)
        elif isinstance(value, weakref.ref):
            self._value(value(), said)
        elif kind is functools._lru_cache_wrapper:
            self._cache(value, said)
        else:
            return False
        return True

    def _tensor(self, value: Tensor, said: str) -> None:
        """Not its numbers, but the hooks of its gradient, and that attributes may appear."""
        self._whole.append((said, value))
        if value._backward_hooks is not None:
            self._code_in(value._backward_hooks, f"the hooks of {said}")
        self._place(len, vars(value), said)

    def _cache(self, value: Any, said: str) -> None:
        """What ``functools.lru_cache`` wraps, and what it remembers: a result is read where it was made."""
        self._value(value.__wrapped__, said)
        if _is_trusted(getattr(value, "__module__", None)):
            return
        held = gc.get_referents(value)
        caches = [d for d in held if type(d) is dict and d is not vars(value)]
        if value.cache_info().maxsize is not None and value.cache_info().currsize:
            caches = [d for d in caches if d and all(type(v).__name__ == "_lru_list_elem" for v in d.values())]
        if len(caches) != 1 or len(caches[0]) > _LARGEST_CONTAINER:
            self._doubt(f"{said}, a cache")
            return
        self._place(_remembered, caches[0], f"the cache of {said}")
        for result in (*held, *(v for v in caches[0].values() if type(v).__name__ != "_lru_list_elem")):
            if all(result is not d for d in (caches[0], vars(value))) and type(result) is not object:
                self._value(result, f"what {said} remembers")

    def _container(self, value: Any, said: str) -> None:
        if value is sys.modules:
            self._doubt("sys.modules")
            return
        if len(value) > _LARGEST_CONTAINER:
            self._whole.append((said, value))
            self._doubt(f"{said}, a {type(value).__name__} of {len(value):,} items")
            return
        if isinstance(value, dict | types.MappingProxyType):
            self._place(tuple, value, said)
            for key, item in list(value.items()):
                self._place(value.get, key, f"{said}[{key!r}]")
                self._value(key, said)
                self._value(item, f"{said}[{key!r}]")
        elif isinstance(value, set | frozenset):
            self._place(tuple, value, said)  # in its order, which code may go by
            for item in list(value):
                self._value(item, said)
        else:
            if not isinstance(value, tuple):
                self._place(len, value, said)
            for index, item in enumerate(list(value)):
                if not isinstance(value, tuple):
                    self._place(value.__getitem__, index, f"{said}[{index}]")
                self._value(item, f"{said}[{index}]")

    def _array(self, value: np.ndarray, said: str) -> None:
        self._whole.append((said, value))
        if value.dtype.hasobject or value.nbytes > _LARGEST_ARRAY:
            self._doubt(f"{said}, a NumPy array of {value.nbytes:,} bytes, too many to compare in every step")
            return
        self._place(_bytes_of, value, said)

    def _builtin(self, value: Any, said: str) -> None:
        self._computed = self._computed or value.__name__ in _COMPUTED_NAMES
        owner = getattr(value, "__self__", None)
        bound = type(owner).__module__ or ""
        if owner is None or isinstance(owner, types.ModuleType | type) or bound.startswith("pybind11"):
            module = getattr(value, "__module__", None) or getattr(owner, "__module__", None)
            module = module or getattr(owner, "__name__", "builtins")
            name = f"{module}.{value.__name__}"
            if not _is_trusted(module) or _is_denied(module, name):
                self._doubt(name if module != "builtins" else value.__name__)
        elif isinstance(owner, random.Random):
            self._doubt(f"random.{value.__name__}")
        elif isinstance(owner, np.random.RandomState | np.random.Generator):
            self._doubt(f"numpy.random.{value.__name__}")
        else:
            self._value(owner, said.rsplit(".", 1)[0])

    def _python_module(self, module: types.ModuleType, said: str) -> None:
        """A module that the code may read by any name it knows."""
        if self._is_others(module.__name__):
            return
        self._kept.append(module)
        if self._settled(module.__name__):
            return
        if self._is_foreign(type(module)):
            self._place(type, module, said)
            self._class(type(module), said, making=False)
        for name in sorted(self._names):
            self._attribute_of(module, name, said)

    def _attribute_of(self, module: types.ModuleType, name: str, said: str) -> Any:
        space = vars(module)
        if name.startswith("__") or (name not in space and _is_trusted(module.__name__)):
            return _MISSING
        value = space.get(name, _MISSING)
        if value is _MISSING and "__getattr__" in space:
            self._doubt(f"{said}.{name}, which the module may compute")
        if value is _MISSING and type(module) is not types.ModuleType:
            self._value(module, said)
        self._place(space.get, name, f"{said}.{name}")
        if value is not _MISSING:
            if _is_denied(module.__name__, f"{module.__name__}.{name}"):
                self._doubt(f"{module.__name__}.{name}")
            else:
                self._value(value, f"{said}.{name}")
        return value

    # ------------------------------------------------------------------ objects and classes

    def _object(self, value: Any, said: str) -> None:
        kind = type(value)
        module = kind.__module__ or ""
        if isinstance(value, BaseException):
            self._doubt(f"{said}, an exception")
        elif isinstance(value, torch.Generator | random.Random | np.random.RandomState | np.random.Generator):
            self._doubt(f"{said}, a generator of random numbers")
        elif module.startswith(_OPAQUE) or module in ("typing", "typing_extensions"):
            pass
        elif not (hasattr(value, "__dict__") or any("__slots__" in vars(c) for c in kind.__mro__)):
            self._doubt(f"{said}, a {_type_name(kind)}")
        elif module.startswith(("threading", "_thread", "contextvars", "_io", "io")):
            self._doubt(f"{said}, a {_type_name(kind)}")
        else:
            self._attributes(value, said)

    def _module(self, module: nn.Module, said: str) -> None:
        if not self._met:
            for name in _GLOBAL_HOOKS:
                self._code_in(vars(_torch_modules)[name], f"torch.nn.modules.module.{name}")
        self._met.append(module)
        for path, part in module.named_modules():
            self._seen.add(id(part))
            self._module_part(part, f"{said}.{path}" if path else said)

    def _module_part(self, part: nn.Module, said: str) -> None:
        space, kind = vars(part), type(part)
        if isinstance(part, torch.jit.ScriptModule):
            self._doubt(f"{said}, a compiled TorchScript module")
            return
        self._place(type, part, said)
        self._place(len, space, said)
        if not kind.__module__.startswith(_OPAQUE):  # torch.compile's, around the module that it holds
            self._held(part, {name: value for name, value in space.items() if name not in _CODE_ATTRIBUTES}, said)
        for slots in (part._parameters, part._buffers, part._modules):
            self._place(len, slots, said)
            for name, value in slots.items():
                self._place(slots.get, name, f"{said}.{name}")
                if isinstance(value, Tensor) and (value._backward_hooks or vars(value).keys() - {"unconstrained"}):
                    self._value(value, f"{said}.{name}")
        for name in _HOOKS:
            self._code_in(space.get(name), f"{said}.{name}")
        if self._is_foreign(kind):
            self._class(kind, said, making=False)

    def _held(self, value: Any, attributes: dict[str, Any], said: str) -> None:
        """The attributes of an object that anybody may read; of the others its code alone."""
        space, kind = vars(value), type(value)
        foreign = self._is_foreign(kind)
        anew = tuple(name for base, names in _ANEW.items() if isinstance(value, base) for name in names)
        for name, held in attributes.items():
            if name.startswith(anew):
                continue
            private = name.startswith("_")
            plain = not private or isinstance(held, (*SCALARS, Tensor, np.ndarray)) or _is_list_of_scalars(held)
            if self._wanted(name, kind) or (plain and not foreign):
                self._place(space.get, name, f"{said}.{name}")
                self._value(held, f"{said}.{name}")
            elif not foreign or name.startswith("_pyro_"):
                self._code_in(held, f"{said}.{name}")

    def _code_in(self, value: Any, said: str) -> None:
        """Of what a trusted object keeps for itself the code (hooks, priors of PyroSample) and its numbers."""
        if isinstance(value, Mapping):
            self._place(tuple if value else len, value, said)
            for key, item in list(value.items()):
                self._code_in(item, f"{said}[{key!r}]")
        elif isinstance(value, tuple | list) and not _is_list_of_scalars(value):
            for item in value:
                self._code_in(item, said)
        elif isinstance(value, list | np.ndarray) or (callable(value) and not isinstance(value, type)):
            self._value(value, said)

    def _attributes(self, value: Any, said: str) -> None:
        """Of an object that is no module: its attributes, and the methods of its class."""
        kind = type(value)
        foreign = self._is_foreign(kind)
        space = getattr(value, "__dict__", None)
        if isinstance(space, dict):
            self._place(len, space, said)
            self._held(value, dict(space), said)
        for owner in kind.__mro__:
            slots = vars(owner).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and (not foreign or self._wanted(name, kind)):
                    self._place(functools.partial(_attribute, value), name, f"{said}.{name}")
                    self._value(getattr(value, name, None), f"{said}.{name}")
        if foreign:
            self._place(type, value, said)
            if any(not _made_in_python(c) and c not in _TRANSPARENT for c in kind.__mro__):
                self._doubt(f"{said}, a {_type_name(kind)}")
            self._class(kind, said, making=False)

    def _wanted(self, name: str, kind: type) -> bool:
        """Whether code may name an attribute of instances of a class: what was met, and the trusted bases' own."""
        if self._computed or name in self._names:
            return True
        if not self._is_foreign(kind):
            return False
        if name in _DISTRIBUTION and not issubclass(kind, nn.Module | Tensor):
            return True  # Pyro asks no base of a distribution
        for base in kind.__mro__:
            if base is not object and hasattr(base, name) and _is_trusted(base.__module__):
                return True
            if base not in _PLAIN_BASES and self._is_owned(base):
                names = _names_of(base)
                if names is None or name in names:
                    return True
        return False

    def _is_foreign(self, kind: type) -> bool:
        """Whether there is anything in a class that is not of a trusted package."""
        if self._owned:  # whose code it is matters for a proof, not for finding networks
            return not _is_trusted(kind.__module__) or kind is types.SimpleNamespace
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

    def _class(self, kind: type, said: str, making: bool = True) -> None:
        """What instances of a class can run and read of it; to make one, too, where the class itself is at hand."""
        if self._is_others(kind.__module__):
            return
        if not self._is_foreign(kind):
            name = f"{kind.__module__}.{kind.__qualname__}"
            self._computed = self._computed or kind.__name__ in _COMPUTED_NAMES
            if _is_denied(kind.__module__, name) or kind is torch.Generator:
                self._doubt(name)
            return
        if (kind in self._classes and self._classes[kind] >= making) or self._settled(kind.__module__):
            return
        self._classes[kind] = making
        if not _made_in_python(kind):
            if kind is not types.SimpleNamespace:
                self._doubt(f"{said}, a {_type_name(kind)}")
            return
        if isinstance(kind, abc.ABCMeta):  # what has been registered with it
            self._place(_registrations, kind, f"the classes registered with {kind.__qualname__}")
        for owner in [*type(kind).mro(type(kind)), *kind.__mro__]:
            if self._is_owned(owner):
                continue
            space, name_of = vars(owner), owner.__qualname__
            self._place(len, space, name_of)
            self._names.update(_texts([space.get("__match_args__")]))
            for name, value in list(space.items()):
                if name in _NO_VALUE and name not in self._names:
                    continue
                if name in _MAKING and not (making or "__class__" in self._names):
                    continue
                if (name.startswith("__") and name.endswith("__")) or self._wanted(name, kind):
                    self._place(space.get, name, f"{name_of}.{name}")
                    self._value(value, f"{name_of}.{name}")

    def _settings(self, loss: Any) -> None:
        foreign = self._is_foreign(type(loss))
        for name, value in list(vars(loss).items()):
            if name.startswith("_") and not foreign:
                continue
            if name == "last_bound" or (name == "beta" and isinstance(value, int | float)):
                continue  # a weight that is a number is handed to the graph
            self._place(vars(loss).get, name, f"{name} of {type(loss).__name__}")
            self._value(value, f"{name} of {type(loss).__name__}")
        if foreign:
            self._class(type(loss), type(loss).__name__, making=False)

    # ------------------------------------------------------------------ functions

    def _function(self, function: types.FunctionType, said: str) -> None:
        module, trusted = function.__globals__.get("__name__", ""), is_trusted(function)
        trusted = trusted or self._is_others(module)
        if trusted and (_is_denied(module, f"{module}.{function.__name__}")):
            self._doubt(f"{module}.{function.__name__}")
            return
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=False):
            if name != "__class__":  # it is there for super(), which makes nothing
                self._place(_contents, cell, name)
                self._value(_contents(cell), name)
        space = vars(function)
        if trusted:
            self._value(space.get("__wrapped__"), said)
            return
        if self._settled(module):
            return
        for part in _FUNCTION_PARTS:
            self._place(part, function, f"the code of {said}")
        for name in self._names.intersection(_FUNCTION_TEXTS):
            self._place(operator.attrgetter(name), function, f"{said}.{name}")
            self._value(getattr(function, name), f"{said}.{name}")
        for value in function.__defaults__ or ():
            self._value(value, f"a default of {said}")
        if function.__kwdefaults__:
            self._container(function.__kwdefaults__, f"the defaults of {said}")
        self._place(len, space, said)
        for name, value in list(space.items()):
            if name == "__wrapped__" or self._computed or name in self._names:
                self._place(space.get, name, f"{said}.{name}")
                self._value(value, f"{said}.{name}")
        self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, space: dict[str, Any]) -> None:
        """What bytecode can name. It is read without being run."""
        if not self._first_time(code):
            return
        self._names.update(code.co_names)
        self._names.update(_texts(code.co_consts))
        self._computed = self._computed or not _COMPUTED_NAMES.isdisjoint(code.co_names)
        before = self._where
        for reading in _readings(code):
            self._where = f"in {code.co_qualname}, line {reading.line} of {pathlib.PurePath(code.co_filename).name}"
            if reading.op == "read":
                self._chain(self._global(space, reading.name), reading.name, reading.attributes)
            elif reading.op == "write":
                self._place(space.get, reading.name, reading.name)
            else:
                self._import(space, reading.name, reading.level)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, space)
        self._where = before

    def _global(self, space: dict[str, Any], name: str) -> Any:
        held = space.get(name, _MISSING)
        self._place(space.get, name, name)
        if held is _MISSING:
            held = getattr(builtins, name, _MISSING)
            self._place(vars(builtins).get, name, name)
        return held

    def _chain(self, value: Any, said: str, attributes: Iterable[str]) -> None:
        """Follow ``module.module.name`` as far as it goes through modules; the rest is for the value."""
        for name in attributes:
            if not isinstance(value, types.ModuleType):
                break
            module, said = value, f"{said}.{name}"
            value = vars(module).get(name, _MISSING)
            if isinstance(value, types.ModuleType):
                if not _is_trusted(module.__name__):
                    self._place(vars(module).get, name, said)
                continue
            self._attribute_of(module, name, said.rsplit(".", 1)[0])
            return
        if value is not _MISSING:
            self._value(value, said)

    def _import(self, space: dict[str, Any], name: str, level: int) -> None:
        if level > 0:
            package = (space.get("__package__") or "").split(".")
            name = ".".join([*package[: len(package) - level + 1], name] if name else package)
        module = sys.modules.get(name)
        if module is None:
            self._doubt(f"the import of {name} while it runs")
            return
        self._value(module, name)
        top = sys.modules.get(name.partition(".")[0])
        if top is not None:
            self._value(top, name.partition(".")[0])


def modules_of(*programs: Any) -> list[nn.Module]:
    """The modules that programs own, wherever they hold them: outermost ones, each once.

    A program is a module, a method of one, or a function with modules in its closure, its
    globals, its arguments or the objects that it reads.

    Args:
        programs: Pyro programs; None among them is passed over.
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


def is_trusted(function: Any) -> bool:
    """Whether a callable is code of this package or of one that it trusts, whatever it is called with."""
    while isinstance(function, functools.partial | types.MethodType):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if isinstance(function, types.FunctionType):
        module = function.__globals__.get("__name__", "")
        # A name alone can be borrowed, as by a doctest or an exec.
        return _is_trusted(module) and any(
            vars(sys.modules.get(name, builtins)) is function.__globals__
            for name in (module, getattr(function.__globals__.get("__spec__"), "name", module))
        )
    return _is_trusted(type(function).__module__)


def _modules_named(root: Any) -> set[str]:
    """The Python modules that a program is written in, through what wraps it."""
    found, stack = {type(root).__module__}, [root]
    while stack:
        value = stack.pop()
        if isinstance(value, functools.partial):
            stack += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            found.add(type(value.__self__).__module__)
            stack.append(value.__func__)
        elif isinstance(value, types.FunctionType):
            found.add(value.__module__ or "")
            stack += [c for cell in value.__closure__ or () if isinstance(c := _contents(cell), types.FunctionType)]
    return found


def _top(module: str | None) -> str:
    return module.partition(".")[0] if isinstance(module, str) else ""


@functools.cache
def _is_installed(package: str) -> bool:
    """Whether a package came with Python or was installed, and is not somebody's own folder."""
    module = sys.modules.get(package)
    if module is None:
        return False
    files = [vars(module).get("__file__"), *list(vars(module).get("__path__") or [])]
    known = [str(file) for file in files if file]
    return known[0].startswith(_INSTALLED) if known else package in sys.builtin_module_names


def _named(value: Any) -> str:
    return getattr(value, "__qualname__", None) or type(value).__qualname__


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _is_trusted(module: str | None) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in _TRUSTED  # of a metaclass it is a descriptor


def _is_denied(module: str | None, name: str) -> bool:
    module = module or ""
    return name in _DENIED or any(module == m or module.startswith(m + ".") for m in _DENIED_MODULES)


def _is_original(kind: type) -> bool:
    module = kind.__module__
    if not _is_trusted(module):
        return False
    if not _made_in_python(kind):
        return True
    if any(isinstance(v, types.FunctionType) and not is_trusted(v) for v in vars(kind).values()):
        return False
    return module not in ("types", "builtins") or getattr(sys.modules[module], kind.__name__, None) is kind


def _made_in_python(kind: type) -> bool:
    """Whether a class statement made it: a class of C can keep its state where nobody sees it."""
    if "__module__" not in vars(kind):
        return False
    if "__firstlineno__" in vars(kind) or "__dict__" in vars(kind) or "__slots__" in vars(kind):
        return True
    return any(isinstance(v, types.FunctionType) for v in vars(kind).values()) or any(
        "__dict__" in vars(c) for c in kind.__mro__[1:]
    )


def _texts(constants: Iterable[Any]) -> set[str]:
    found: set[str] = set()
    for constant in constants:
        if isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
        elif isinstance(constant, tuple | frozenset):
            found |= _texts(constant)
    return found


@functools.cache
def _names_of(kind: type) -> frozenset[str] | None:
    """What the methods of a trusted class name; None where they compute names."""
    found: set[str] = set()
    stack: list[Any] = [getattr(v, "fget", None) or getattr(v, "__func__", v) for v in vars(kind).values()]
    while stack:
        value = stack.pop()
        code = value if isinstance(value, types.CodeType) else getattr(value, "__code__", None)
        if isinstance(code, types.CodeType):
            if not _COMPUTED_NAMES.isdisjoint(code.co_names):
                return None
            found.update(code.co_names, _texts(code.co_consts))
            stack += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(found)


def _is_list_of_scalars(value: Any) -> bool:
    return type(value) is list and bool(value) and all(type(item) in SCALARS for item in value)


def _remembered(cache: dict[Any, Any]) -> tuple[Any, ...]:
    return tuple(cache.values())


def _registrations(_: type) -> Any:
    return abc.get_cache_token()


class _Reading(NamedTuple):
    """What an instruction reads, writes or imports by name, the attributes read of it at once, and the line."""

    op: str
    name: str
    line: int
    attributes: tuple[str, ...] = ()
    level: int = 0


@functools.lru_cache(maxsize=4096)  # bytecode never changes, and to take it apart costs more than to follow it
def _readings(code: types.CodeType) -> tuple[_Reading, ...]:
    """The globals and imports that bytecode names (that of the functions inside it apart), in their order."""
    found = []
    instructions = list(dis.get_instructions(code))
    line = code.co_firstlineno
    for number, instruction in enumerate(instructions):
        if instruction.starts_line is not None:
            line = _line_of(instruction, line)
        name, op = instruction.argval, instruction.opname
        if op in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            found.append(_Reading("read", name, line, tuple(_attributes_after(instructions, number))))
        elif op in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            found.append(_Reading("write", name, line))
        elif op == "IMPORT_NAME":
            level = instructions[number - 2].argval if number > 1 else 0
            found.append(_Reading("import", name, line, level=level if isinstance(level, int) else 0))
    return tuple(found)


def _attributes_after(instructions: Sequence[Any], number: int) -> Iterator[str]:
    """The names in ``.a.b.c`` behind what an instruction loads."""
    for instruction in itertools.islice(instructions, number + 1, None):
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            yield instruction.argval
        elif instruction.opname not in ("PUSH_NULL", "CACHE", "NOP", "PRECALL"):
            return


def _line_of(instruction: Any, line: int) -> int:
    number = getattr(instruction, "line_number", None)  # from Python 3.13 on, where starts_line is a switch
    return number if number is not None else instruction.starts_line if instruction.starts_line else line


def _is_plain(value: Any) -> bool:
    """Whether a value is the same line of text in every process."""
    if type(value) is tuple:
        return all(map(_is_plain, value))
    plain = (bool, int, float, complex, str, bytes, type(None), types.CodeType, torch.dtype, np.generic)
    return isinstance(value, plain)


def _same(old: Any, new: Any) -> bool:
    """Whether two values that are not one object are alike: numbers and texts, and tuples and sets of them."""
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
        return _MISSING


def _attribute(value: Any, name: str) -> Any:
    return getattr(value, name, _MISSING)


def _bytes_of(array: np.ndarray) -> tuple[Any, ...]:
    return array.shape, str(array.dtype), array.tobytes()


def _contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _MISSING
