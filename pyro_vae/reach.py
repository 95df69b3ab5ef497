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

import builtins
import collections
import collections.abc
import dis
import enum
import functools
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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
    "torch.package", "numpy.random", "numpy.lib._npyio_impl", "numpy.lib.npyio", "pyro.contrib.examples",
)  # fmt: skip
_DENIED = frozenset(
    "torch.from_file numpy.load numpy.loadtxt numpy.genfromtxt numpy.fromfile numpy.memmap numpy.fromregex numpy.save "
    "pyro.util.set_rng_seed pyro.util.get_rng_state pyro.util.set_rng_state pyro.settings.get "
    "builtins.open builtins.input builtins.print builtins.globals builtins.locals builtins.eval builtins.exec "
    "builtins.compile builtins.__import__ builtins.breakpoint torch._C.Generator torch.Generator".split()
)
# Whose instances are code, whatever they hold.
_OPAQUE = ("torch._dynamo", "torch._inductor", "torch._ops", "torch.fx", "torch.autograd", "torch._C", "torch.library")
_COMPUTED_NAMES = frozenset(
    "getattr setattr delattr vars dir __dict__ __getattribute__ attrgetter methodcaller inspect asdict astuple".split()
)
_IMMUTABLE: tuple[type, ...] = (
    bool, int, float, complex, str, bytes, type(None), range, slice, type(Ellipsis), type(NotImplemented), torch.Size,
    torch.dtype, torch.device, torch.layout, torch.memory_format, np.generic, np.dtype, np.ufunc, pathlib.PurePath,
    re.Pattern, enum.Enum, numbers.Number, types.GenericAlias, types.UnionType, types.CodeType, np.random.SeedSequence,
)  # fmt: skip
_C_CALLABLES = (
    types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType,
)  # fmt: skip
_NO_VALUE = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __qualname__ __name__ __annotations__ __annotate__ __annotate_func__ "
    "__annotations_cache__ __firstlineno__ __static_attributes__ __slots__ __match_args__ __parameters__ "
    "__orig_bases__ __abstractmethods__ __reduce__ __reduce_ex__ __getstate__ __setstate__ __del__ __sizeof__ __dir__ "
    "__copy__ __deepcopy__ __init_subclass__ __subclasshook__ __class_getitem__ __set_name__ __replace__ _abc_impl "
    "__dataclass_params__ __dataclass_fields__ __classdictcell__ __wrapped__".split()
)
_MAKING = frozenset(("__init__", "__new__", "__post_init__"))
_CODE_ATTRIBUTES = frozenset(vars(nn.Module())) - {"training"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_LARGEST_ARRAY, _LARGEST_CONTAINER = 2**16, 10_000
_MISSING = object()
_INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))


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
        self._ours = {_top(module) for root in roots for module in _modules_named(root)} if owned else set()
        self._names: set[str] = set()
        self._computed = False
        while True:  # a name met late may open an attribute that was passed over early
            known = len(self._names), self._computed
            self._start()
            for root in roots:
                self._value(root, _named(root))
            if settings_of is not None:
                self._settings(settings_of)
            if (len(self._names), self._computed) == known:
                break
        inside = {id(part) for module in self._met for part in module.modules() if part is not module}
        self.modules = [module for module in self._met if id(module) not in inside]
        self.before = self._now()

    def _start(self) -> None:
        self.unproven: list[str] = []
        self._met: list[nn.Module] = []
        self._places: list[tuple[Callable[[Any], Any], Any]] = []
        self._said: list[str] = []  # what each place is called
        self._noted: set[tuple[int, int]] = set()
        self._seen: set[int] = set()
        self._kept: list[Any] = []  # objects made on the way, whose id must stay theirs
        self._classes: dict[type, bool] = {}  # whether with what makes an instance
        self._where = ""

    def fresh(self) -> bool:
        """Whether no place has changed."""
        now = self._now()
        return all(map(operator.is_, self.before, now)) or self._first_change(now) is None

    def changed(self) -> str | None:
        """The name of a place that is not as it was."""
        found = self._first_change(self._now())
        return None if found is None else self._said[found]

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
        self._kept.append(key)
        self._places.append((get, key))
        self._said.append(said)

    def _doubt(self, what: str) -> None:
        sentence = f"{what} ({self._where})" if self._where else what
        if sentence not in self.unproven:
            self.unproven.append(sentence)

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
        if isinstance(value, type):
            self._class(value, said)
            return
        if not self._first_time(value):
            return
        if isinstance(value, Tensor):
            if not _is_trusted(kind.__module__):
                self._attributes(value, said)
        elif isinstance(value, nn.Module):
            self._module(value, said)
        elif isinstance(value, types.FunctionType):
            self._function(value, said)
        elif isinstance(value, types.MethodType):
            self._value(value.__self__, f"{said}.__self__" if not isinstance(value.__self__, nn.Module) else said)
            self._value(value.__func__, said)
        elif isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                self._value(getattr(value, name), f"{said}.{name}")
        elif isinstance(value, types.BuiltinFunctionType | types.MethodWrapperType):
            self._builtin(value, said)
        elif isinstance(value, types.ModuleType):
            self._python_module(value, said)
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
        elif isinstance(value, _C_CALLABLES):
            pass
        elif kind is functools._lru_cache_wrapper:
            self._value(value.__wrapped__, said)
        else:
            self._object(value, said)

    def _container(self, value: Any, said: str) -> None:
        if value is sys.modules:
            self._doubt("sys.modules")
            return
        if len(value) > _LARGEST_CONTAINER:
            self._doubt(f"{said}, a {type(value).__name__} of {len(value):,} items")
            return
        if isinstance(value, dict | types.MappingProxyType):
            self._place(tuple, value, said)
            for key, item in list(value.items()):
                self._place(value.get, key, f"{said}[{key!r}]")
                self._value(key, said)
                self._value(item, f"{said}[{key!r}]")
        elif isinstance(value, set | frozenset):
            self._place(frozenset, value, said)
            for item in list(value):
                self._value(item, said)
        else:
            if not isinstance(value, tuple):
                self._place(len, value, said)
            for index, item in enumerate(list(value)):
                if not isinstance(value, tuple):
                    self._place(value.__getitem__, index, f"{said}[{index}]")
                self._value(item, f"{said}[{index}]")
        if hasattr(value, "__dict__") or not _is_trusted(type(value).__module__):
            self._attributes(value, said)

    def _array(self, value: np.ndarray, said: str) -> None:
        if value.dtype.hasobject or value.nbytes > _LARGEST_ARRAY:
            self._doubt(f"{said}, a NumPy array of {value.nbytes:,} bytes, too many to compare in every step")
            return
        self._place(_bytes_of, value, said)
        if not _is_trusted(type(value).__module__):
            self._attributes(value, said)

    def _builtin(self, value: Any, said: str) -> None:
        owner = getattr(value, "__self__", None)
        if owner is None or isinstance(owner, types.ModuleType | type):
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
        for name in sorted(self._names):
            self._attribute_of(module, name, said)

    def _attribute_of(self, module: types.ModuleType, name: str, said: str) -> Any:
        space = vars(module)
        if name.startswith("__") or (name not in space and _is_trusted(module.__name__)):
            return _MISSING
        value = space.get(name, _MISSING)
        if value is _MISSING and "__getattr__" in space:
            self._doubt(f"{said}.{name}, which the module may compute")
        if not _is_trusted(module.__name__):
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
        if isinstance(value, torch.Generator | random.Random | np.random.RandomState | np.random.Generator):
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
        self._met.append(module)
        for path, part in module.named_modules():
            self._seen.add(id(part))
            self._module_part(part, f"{said}.{path}" if path else said)

    def _module_part(self, part: nn.Module, said: str) -> None:
        space, foreign = vars(part), not _is_trusted(type(part).__module__)
        if isinstance(part, torch.jit.ScriptModule):
            self._doubt(f"{said}, a compiled TorchScript module")
            return
        self._place(len, space, said)
        for name, value in list(space.items()):
            if name in _CODE_ATTRIBUTES:
                continue
            if not foreign and name.startswith("_") and not isinstance(value, (*SCALARS, Tensor)):
                self._code_in(value, f"{said}.{name}")
            elif not foreign or self._wanted(name):
                self._place(space.get, name, f"{said}.{name}")
                self._value(value, f"{said}.{name}")
        for slots in (part._parameters, part._buffers, part._modules):
            self._place(len, slots, said)
            for name in slots:
                self._place(slots.get, name, f"{said}.{name}")
        for name in _HOOKS:
            self._code_in(space.get(name), f"{said}.{name}")
        if foreign:
            self._class(type(part), said, making=False)

    def _code_in(self, value: Any, said: str) -> None:
        """Only the code that a trusted object keeps for itself: hooks, priors of PyroSample."""
        if isinstance(value, Mapping):
            self._place(tuple if value else len, value, said)
            for key, item in list(value.items()):
                self._code_in(item, f"{said}[{key!r}]")
        elif isinstance(value, tuple | list):
            for item in value:
                self._code_in(item, said)
        elif isinstance(value, types.FunctionType | types.MethodType | functools.partial | nn.Module):
            self._value(value, said)
        elif callable(value) and not isinstance(value, type):
            self._value(value, said)

    def _attributes(self, value: Any, said: str) -> None:
        """Of an object that is no module: its attributes, and the methods of its class."""
        kind = type(value)
        foreign = not _is_trusted(kind.__module__) or kind is types.SimpleNamespace
        space = getattr(value, "__dict__", None)
        if isinstance(space, dict):
            self._place(len, space, said)
            for name, held in list(space.items()):
                if isinstance(value, torch.distributions.Transform) and name.startswith(("_cached", "_inv", "_inter")):
                    continue  # made anew by every run
                if not foreign and name.startswith("_"):
                    self._code_in(held, f"{said}.{name}")
                elif not foreign or self._wanted(name):
                    self._place(space.get, name, f"{said}.{name}")
                    self._value(held, f"{said}.{name}")
        for owner in kind.__mro__:
            slots = vars(owner).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if name not in ("__dict__", "__weakref__") and (not foreign or self._wanted(name)):
                    self._place(functools.partial(_attribute, value), name, f"{said}.{name}")
                    self._value(getattr(value, name, None), f"{said}.{name}")
        if foreign:
            self._class(kind, said, making=False)

    def _wanted(self, name: str) -> bool:
        return self._computed or name in self._names

    def _class(self, kind: type, said: str, making: bool = True) -> None:
        """What instances of a class can run and read of it; to make one, too, where the class itself is at hand."""
        if self._is_others(kind.__module__):
            return
        if _is_trusted(kind.__module__):
            name = f"{kind.__module__}.{kind.__qualname__}"
            if _is_denied(kind.__module__, name) or kind is torch.Generator:
                self._doubt(name)
            return
        if kind in self._classes and self._classes[kind] >= making:
            return
        self._classes[kind] = making
        trusted = [c for c in kind.__mro__ if _is_trusted(c.__module__) and c is not object]
        if not _made_in_python(kind):
            self._doubt(f"{said}, a {_type_name(kind)}")
            return
        for owner in (type(kind), *kind.__mro__):
            if _is_trusted(owner.__module__):
                continue
            space, name_of = vars(owner), owner.__qualname__
            self._place(len, space, name_of)
            for name, value in list(space.items()):
                if name in _NO_VALUE or (name in _MAKING and not (making or "__class__" in self._names)):
                    continue
                special = name.startswith("__") and name.endswith("__")
                if special or self._wanted(name) or any(hasattr(c, name) for c in trusted):
                    self._place(space.get, name, f"{name_of}.{name}")
                    self._value(value, f"{name_of}.{name}")

    def _settings(self, loss: Any) -> None:
        foreign = not _is_trusted(type(loss).__module__)
        for name, value in list(vars(loss).items()):
            if name in ("last_bound", "beta") or (name.startswith("_") and not foreign):
                continue
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
        self._place(functools.partial(_attribute, function), "__defaults__", f"the defaults of {said}")
        for value in function.__defaults__ or ():
            self._value(value, f"a default of {said}")
        if function.__kwdefaults__:
            self._container(function.__kwdefaults__, f"the defaults of {said}")
        self._place(len, space, said)
        for name, value in list(space.items()):
            if name == "__wrapped__" or self._wanted(name):
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
        instructions = list(dis.get_instructions(code))
        line = code.co_firstlineno
        for number, instruction in enumerate(instructions):
            if instruction.starts_line is not None:
                line = _line_of(instruction, line)
                self._where = f"in {code.co_qualname}, line {line} of {pathlib.PurePath(code.co_filename).name}"
            name, op = instruction.argval, instruction.opname
            if op in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
                self._chain(self._global(space, name), name, instructions[number + 1 :])
            elif op in ("STORE_GLOBAL", "DELETE_GLOBAL"):
                self._place(space.get, name, name)
            elif op == "IMPORT_NAME":
                self._import(space, instruction, instructions[:number])
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, space)
        self._where = before

    def _global(self, space: dict[str, Any], name: str) -> Any:
        held = space.get(name, _MISSING)
        if held is _MISSING:
            return getattr(builtins, name, _MISSING)
        self._place(space.get, name, name)
        return held

    def _chain(self, value: Any, said: str, following: Iterable[Any]) -> None:
        """Follow ``module.module.name`` as far as it goes through modules; the rest is for the value."""
        for instruction in following:
            if not isinstance(value, types.ModuleType):
                break
            if instruction.opname in ("PUSH_NULL", "CACHE", "NOP", "PRECALL"):
                continue
            if instruction.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                break
            module, said = value, f"{said}.{instruction.argval}"
            value = vars(module).get(instruction.argval, _MISSING)
            if isinstance(value, types.ModuleType):
                if not _is_trusted(module.__name__):
                    self._place(vars(module).get, instruction.argval, said)
                continue
            self._attribute_of(module, instruction.argval, said.rsplit(".", 1)[0])
            return
        if value is not _MISSING:
            self._value(value, said)

    def _import(self, space: dict[str, Any], instruction: Any, before: list[Any]) -> None:
        name = instruction.argval
        level = next((i.argval for i in reversed(before[-2:-1])), 0)
        if isinstance(level, int) and level > 0:
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


def is_trusted(function: Any) -> bool:
    """Whether a callable is code of this package or of one that it trusts, whatever it is called with."""
    while isinstance(function, functools.partial | types.MethodType):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if isinstance(function, types.FunctionType):
        module = function.__globals__.get("__name__", "")
        # A name alone can be borrowed, as by a doctest or an exec.
        return _is_trusted(module) and vars(sys.modules.get(module, builtins)) is function.__globals__
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


def _line_of(instruction: Any, line: int) -> int:
    number = getattr(instruction, "line_number", None)  # from Python 3.13 on, where starts_line is a switch
    return number if number is not None else instruction.starts_line if instruction.starts_line else line


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
    return isinstance(old, frozenset) and old == new


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
