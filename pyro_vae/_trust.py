"""Whose code is a function of its arguments, by name: what `pyro_vae.reach` need not look into, and what it may not;
and what the bytecode of other functions can name, read without being run.

Of trusted packages (torch, Pyro, NumPy, this one ...) some modules and functions read or write more than their
arguments: these are denied.
"""

from __future__ import annotations

import builtins
import collections
import dis
import enum
import functools
import numbers
import os
import pathlib
import re
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from pyro.distributions import TorchDistribution
from pyro.nn import PyroModule
from torch import nn

MISSING = object()
SCALARS = (bool, int, float, str, type(None))

TRUSTED = frozenset(
    "torch torchvision pyro zuko pyro_vae numpy math cmath functools operator itertools collections typing "
    "typing_extensions abc _abc dataclasses enum contextlib copy warnings numbers types builtins reprlib "
    "_operator _functools _collections _collections_abc _weakref weakref einops opt_einsum re string".split()
)
# Of these, what reads or writes more than its arguments: parts of trusted packages by module, or by name.
DENIED_MODULES = (
    "torch.random", "torch.cuda", "torch.hub", "torch.serialization", "torch.utils.data", "torch.distributed",
    "torch.multiprocessing", "torch.profiler", "torch.autograd.profiler", "torch.utils.tensorboard", "torch.backends",
    "torch.package", "torchvision.io", "torchvision.datasets", "numpy.random", "numpy.lib._npyio_impl",
    "numpy.lib.npyio", "pyro.contrib.examples",
)  # fmt: skip
DENIED = frozenset(
    "torch.get_num_threads torch.get_num_interop_threads torch.get_float32_matmul_precision torch.get_default_device "
    "torch.are_deterministic_algorithms_enabled torch.is_anomaly_enabled numpy.geterr numpy.get_printoptions "
    "numpy.datetime64 torch.from_file numpy.load numpy.loadtxt numpy.genfromtxt numpy.fromfile numpy.memmap "
    "numpy.fromregex numpy.save "
    "pyro.util.set_rng_seed pyro.util.get_rng_state pyro.util.set_rng_state pyro.settings.get "
    "builtins.open builtins.input builtins.print builtins.globals builtins.locals builtins.eval builtins.exec "
    "builtins.compile builtins.__import__ builtins.breakpoint torch._C.Generator torch.Generator".split()
)
# Whose instances are code, whatever they hold.
OPAQUE = ("torch._dynamo", "torch._inductor", "torch._ops", "torch.fx", "torch.autograd", "torch._C", "torch.library")
COMPUTED_NAMES = frozenset(
    "getattr setattr delattr vars dir __dict__ __getattribute__ __getstate__ __reduce__ __reduce_ex__ attrgetter "
    "methodcaller inspect asdict astuple format format_map vformat Formatter".split()
)
IMMUTABLE: tuple[type, ...] = (
    bool, int, float, complex, str, bytes, type(None), range, slice, type(Ellipsis), type(NotImplemented), torch.Size,
    torch.dtype, torch.device, torch.layout, torch.memory_format, np.generic, np.dtype, np.ufunc, pathlib.PurePath,
    re.Pattern, enum.Enum, numbers.Number, types.GenericAlias, types.UnionType, types.CodeType,
)  # fmt: skip
C_CALLABLES = (
    types.WrapperDescriptorType, types.MethodDescriptorType, types.ClassMethodDescriptorType,
    types.GetSetDescriptorType, types.MemberDescriptorType, type(vars(collections.namedtuple("_", "x"))["x"]),
)  # fmt: skip
# What a class keeps about itself, and nobody reads who does not name it.
NO_VALUE = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __qualname__ __name__ __annotations__ __annotate__ __annotate_func__ "
    "__annotations_cache__ __firstlineno__ __static_attributes__ __slots__ __parameters__ __orig_bases__ "
    "__abstractmethods__ _abc_impl __dataclass_params__ __dataclass_fields__ __classdictcell__ __wrapped__".split()
)
MAKING = frozenset(("__init__", "__new__", "__post_init__", "__init_subclass__", "__set_name__"))
# C classes whose instances hold nothing but what is looked at here.
TRANSPARENT = frozenset(
    (object, type, dict, list, tuple, set, frozenset, int, float, complex, str, bytes, bool, collections.deque,
     collections.OrderedDict, collections.defaultdict, functools.partial, property, staticmethod, classmethod,
     weakref.ref, types.ModuleType, types.SimpleNamespace, np.ndarray, torch._C.TensorBase)
)  # fmt: skip
# Bases that read what they name through hooks of their own, which are looked at apart.
PLAIN_BASES = (object, nn.Module, PyroModule)
DISTRIBUTION = frozenset(name for name in dir(TorchDistribution) if not name.startswith("__"))
INSTALLED = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_SITES = {"site-packages", "dist-packages"}  # of the user, of the system, of another environment on the path, too


def is_trusted(function: Any) -> bool:
    """Whether a callable is code of this package or of one that it trusts, whatever it is called with."""
    while isinstance(function, functools.partial | types.MethodType):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if isinstance(function, types.FunctionType):
        module = function.__globals__.get("__name__", "")
        # A name alone can be borrowed, as by a doctest or an exec.
        return trusted_module(module) and any(
            vars(sys.modules.get(name, builtins)) is function.__globals__
            for name in (module, getattr(function.__globals__.get("__spec__"), "name", module))
        )
    return trusted_module(type(function).__module__)


def modules_named(root: Any) -> set[str]:
    """The Python modules that a program is written in, through what wraps it."""
    found, stack = {type(root).__module__}, [root]
    met: set[int] = set()  # a function that calls itself is in a cell of its own
    while stack:
        value = stack.pop()
        if id(value) in met:
            continue
        met.add(id(value))
        if isinstance(value, functools.partial):
            stack += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, types.MethodType):
            found.add(type(value.__self__).__module__)
            stack.append(value.__func__)
        elif isinstance(value, types.FunctionType):
            found.add(value.__module__ or "")
            stack += [c for cell in value.__closure__ or () if isinstance(c := contents(cell), types.FunctionType)]
    return found


def top(module: str | None) -> str:
    return module.partition(".")[0] if isinstance(module, str) else ""


@functools.cache
def is_installed(package: str) -> bool:
    """Whether a package came with Python or was installed, and is not somebody's own folder."""
    module = sys.modules.get(package)
    if module is None:
        return False
    files = [vars(module).get("__file__"), *list(vars(module).get("__path__") or [])]
    known = [str(file) for file in files if file]
    if not known:
        return package in sys.builtin_module_names
    return known[0].startswith(INSTALLED) or not _SITES.isdisjoint(pathlib.Path(known[0]).parts)


def type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def trusted_module(module: str | None) -> bool:
    return isinstance(module, str) and module.partition(".")[0] in TRUSTED  # of a metaclass it is a descriptor


def is_denied(module: str | None, name: str) -> bool:
    module = module or ""
    return name in DENIED or any(module == m or module.startswith(m + ".") for m in DENIED_MODULES)


def made_in_python(kind: type) -> bool:
    """Whether a class statement made it: a class of C can keep its state where nobody sees it."""
    if "__module__" not in vars(kind):
        return False
    if "__firstlineno__" in vars(kind) or "__dict__" in vars(kind) or "__slots__" in vars(kind):
        return True
    return any(isinstance(v, types.FunctionType) for v in vars(kind).values()) or any(
        "__dict__" in vars(c) for c in kind.__mro__[1:]
    )


def texts(constants: Iterable[Any]) -> set[str]:
    found: set[str] = set()
    for constant in constants:
        if isinstance(constant, str) and constant.isidentifier():
            found.add(constant)
        elif isinstance(constant, tuple | frozenset):
            found |= texts(constant)
    return found


@functools.cache
def names_of(kind: type) -> frozenset[str] | None:
    """What the methods of a trusted class name; None where they compute names."""
    found: set[str] = set()
    stack: list[Any] = [getattr(v, "fget", None) or getattr(v, "__func__", v) for v in vars(kind).values()]
    while stack:
        value = stack.pop()
        code = value if isinstance(value, types.CodeType) else getattr(value, "__code__", None)
        if isinstance(code, types.CodeType):
            if not COMPUTED_NAMES.isdisjoint(code.co_names):
                return None
            found.update(code.co_names, texts(code.co_consts))
            stack += [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return frozenset(found)


def contents(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return MISSING


_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS")
_STORES = ("STORE_GLOBAL", "DELETE_GLOBAL")
_NOTHING = ("PUSH_NULL", "CACHE", "NOP", "PRECALL")


class Named(NamedTuple):
    """One name that code takes from outside of itself, and where: the function, line and file.

    `how` is "load" or "store" of a global, or "import" of a module; attributes are what is read off a loaded global
    right away, ``name.first.second``; the level of a relative import is the number of its dots.
    """

    where: str
    how: str
    name: str
    attributes: tuple[str, ...] = ()
    level: int = 0


@functools.lru_cache(maxsize=4096)  # bytecode never changes, and to take it apart costs more than to follow it
def named_in(code: types.CodeType) -> tuple[Named, ...]:
    """The globals and imports of code, in its order, without those of the code inside it.

    Example:
        >>> [(name.how, name.name, name.attributes) for name in named_in((lambda x: torch.nn.Linear(x, y)).__code__)]
        [('load', 'torch', ('nn', 'Linear')), ('load', 'y', ())]
    """
    found: list[Named] = []
    instructions = list(dis.get_instructions(code))
    file = pathlib.PurePath(code.co_filename).name
    line = code.co_firstlineno
    for number, instruction in enumerate(instructions):
        # From Python 3.13 on starts_line is a switch, and the number stands beside it.
        line = getattr(instruction, "line_number", instruction.starts_line) or line
        where = f"in {code.co_qualname}, line {line} of {file}"
        if instruction.opname in _LOADS:
            found.append(Named(where, "load", instruction.argval, _attributes(instructions, number + 1)))
        elif instruction.opname in _STORES:
            found.append(Named(where, "store", instruction.argval))
        elif instruction.opname == "IMPORT_NAME":
            level = instructions[number - 2].argval if number > 1 else 0
            found.append(Named(where, "import", instruction.argval, level=level if isinstance(level, int) else 0))
    return tuple(found)


def _attributes(instructions: list[Any], start: int) -> tuple[str, ...]:
    names = []
    for instruction in instructions[start:]:
        if instruction.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            names.append(instruction.argval)
        elif instruction.opname not in _NOTHING:
            break
    return tuple(names)
