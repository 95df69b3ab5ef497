"""What data, losses and functions are, in a line that is the same in every process.

Arrays are told apart by a hash of their content (of rows in between where they are large), functions by one of their
code, objects by their class and public attributes.
"""

from __future__ import annotations

import functools
import hashlib
import re
import types
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pyro_vae._trust import MISSING, contents
from pyro_vae.parameters import plain_name
from pyro_vae.reach import Reach

_WHOLE = 100 * 2**20  # bytes that are hashed whole: a tenth of a second
_ROWS = 4096  # of larger ones
_DEPTH = 6
_ITEMS = 20  # that are written out
_OURS = ("torch", "pyro", "pyro_vae")  # whose code is told by its name
# What torch and Pyro note down on modules and parameters for themselves.
_BOOKS = re.compile(r"\.(training|unconstrained\.name|_(pyro|dynamo|super_module|is_torch)_\w+)$")
_PASSING = frozenset({"last_bound", "max_plate_nesting", "training"})  # attributes that runs change


def fingerprint(value: Any) -> str:
    """A line for a value, for comparison and for reading.

    Args:
        value: Data of any kind that `fit` takes, a loss, a bound, a schedule, plain data.
    Example:
        >>> fingerprint(torch.zeros(3, 2))
        'float32 (3, 2) #8691c643'
        >>> fingerprint({"lr": 0.1, "betas": (0.9, 0.999)})
        '{lr=0.1, betas=(0.9, 0.999)}'
    """
    return _described(value, ())


def program_fingerprint(program: Any) -> str:
    """A line for a program: its code and the kinds of its modules, not their weights."""
    if isinstance(program, nn.Module):
        return _module(program)
    if isinstance(program, types.MethodType) and isinstance(program.__self__, nn.Module):
        return f"{program.__name__} #{_code(program.__func__)} of {_module(program.__self__)}"
    function = getattr(program, "func", program)
    return f"{_name(function)} #{_code(function)}" if isinstance(function, types.FunctionType) else _name(type(program))


def program_values(*roots: Any, but: Iterable[Tensor] = ()) -> dict[str, str]:
    """What programs, and functions that shape a fit, read from Python, by the name of the place, such as
    ``state['beta']``.

    `but` are tensors that are told apart otherwise. Empty where more is reached than can be looked at.
    """
    reach = Reach(*roots)
    if reach.full:
        return {}
    known, found = {id(tensor) for tensor in but}, {}
    for name, value in reach.values():
        if id(value) in known or _BOOKS.search(name):
            continue
        place, several = plain_name(name), 1
        key = place
        while key in found:
            several += 1
            key = f"{place} ({several})"
        found[key] = f"code #{_digest(_bytes(value))}" if isinstance(value, types.CodeType) else fingerprint(value)
    return found


def _described(value: Any, path: tuple[int, ...]) -> str:
    if isinstance(value, np.bool_ | np.number):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | complex):
        return repr(value)
    if isinstance(value, str | bytes):
        return repr(value) if len(value) <= 80 else f"{value[:20]!r}... #{_digest([repr(value).encode()])}"
    if id(value) in path or len(path) > _DEPTH:
        return _name(type(value))
    path = (*path, id(value))
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray | np.generic):
        return _array(np.asanyarray(value), path)
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if isinstance(value, type):
        return _name(value)
    if isinstance(value, functools.partial):
        return f"{_described(value.func, path)} with {_items(value.args, path)} {_pairs(value.keywords, path)}"
    if isinstance(value, types.MethodType):
        return f"{_described(value.__func__, path)} of {_described(value.__self__, path)}"
    if isinstance(value, types.FunctionType):
        return _function(value, path)
    if isinstance(value, nn.Module):
        return _module(value)
    if isinstance(value, Mapping):
        return "{" + _pairs(value, path) + "}"
    if isinstance(value, list | tuple | set | frozenset | range):
        ordered = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return f"({_items(ordered, path)})"
    if isinstance(value, torch.utils.data.DataLoader):
        batches = f"batch_size={value.batch_size}, drop_last={value.drop_last}, sampler={_name(type(value.sampler))}"
        return f"DataLoader({_described(value.dataset, path)}, {batches})"
    return _object(value, path)


def _object(value: Any, path: tuple[int, ...]) -> str:
    """By what holds the numbers of the usual containers, else by public attributes."""
    if hasattr(value, "to_numpy"):  # a DataFrame or one of its columns
        columns = _described(list(map(str, getattr(value, "columns", ()))), path)
        return f"{_name(type(value))}({columns}, {_described(value.to_numpy(), path)})"
    if hasattr(value, "tocsr"):
        rows = value.tocsr()
        parts = (_array(part, path) for part in (rows.data, rows.indices, rows.indptr))
        return f"{_name(type(value))}({', '.join(parts)})"
    if hasattr(value, "X") and hasattr(value, "n_obs"):  # AnnData
        return f"{_name(type(value))}({_described(value.X, path)})"
    if hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__getitem__"):  # of HDF5 or zarr
        name = _name(type(value))
        return _array(value, path) if name.startswith("_") else f"{name}({_array(value, path)})"
    slots = getattr(type(value), "__slots__", ())
    slots = (slots,) if isinstance(slots, str) else slots
    state = getattr(value, "__dict__", None) or {name: getattr(value, name, None) for name in slots}
    if callable(getattr(value, "identity", None)):  # a split, whose numbers are the same wherever they lie
        state = value.identity()
    public = {key: part for key, part in state.items() if not key.startswith("_") and key not in _PASSING}
    length = [f"len={len(value)}"] if hasattr(value, "__len__") else []
    return f"{_name(type(value))}({', '.join([*length, *([_pairs(public, path)] if public else [])])})"


def _pairs(mapping: Mapping[Any, Any], path: tuple[int, ...]) -> str:
    return ", ".join(f"{key}={_described(value, path)}" for key, value in mapping.items())


def _items(values: Any, path: tuple[int, ...]) -> str:
    texts = [_described(value, path) for value in values]
    if len(texts) <= _ITEMS:
        return ", ".join(texts)
    return f"{texts[0]}, ... {len(texts)} in all #{_digest(text.encode() for text in texts)}"


def _tensor(value: Tensor) -> str:
    kind = str(value.dtype).removeprefix("torch.")
    if value.layout != torch.strided:
        value = value.to_sparse_coo().coalesce()
        return f"sparse {kind} {tuple(value.shape)} of {_tensor(value.indices())}, {_tensor(value.values())}"
    flat = value.detach()
    if flat.numel() * flat.element_size() > _WHOLE and flat.dim():
        rows = min(_ROWS, len(flat))
        flat = flat[torch.arange(rows, device=flat.device) * (len(flat) - 1) // max(rows - 1, 1)]
    content = flat.cpu().contiguous().reshape(-1).view(torch.uint8).numpy() if flat.numel() else np.empty(0)
    return f"{kind} {tuple(value.shape)} #{_digest([content.tobytes()])}"


def _array(value: Any, path: tuple[int, ...]) -> str:
    kind = f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, np.ma.MaskedArray):
        return f"masked {_array(value.filled(), path)}, {_array(np.ma.getmaskarray(value), path)}"
    size = int(np.prod(value.shape)) * getattr(value.dtype, "itemsize", 1)
    if size > _WHOLE and len(value.shape):
        rows = min(_ROWS, len(value))
        value = value[np.arange(rows) * (len(value) - 1) // max(rows - 1, 1)]
    content = np.ascontiguousarray(value[...] if not isinstance(value, np.ndarray) else value)
    if content.dtype == object:
        return f"{kind} of {_items(content.reshape(-1).tolist(), path)}"
    return f"{kind} #{_digest([content.tobytes()])}"


def _module(module: nn.Module) -> str:
    kinds, codes = [], {}
    for name, part in module.named_modules():
        if type(part).__name__ == "OptimizedModule":  # torch.compile's, around what follows
            continue
        kinds.append(f"{plain_name(name + '.')}:{_name(type(part))}")
        if type(part).__module__.partition(".")[0] not in _OURS:
            codes[_name(type(part))] = _code(type(part).forward)
    text = [*kinds, *(f"{name} {code}" for name, code in sorted(codes.items()))]
    return f"{kinds[0].rpartition(':')[2]} of {len(kinds) - 1} modules #{_digest(line.encode() for line in text)}"


def _function(value: types.FunctionType, path: tuple[int, ...]) -> str:
    cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    held = ((name, contents(cell)) for name, cell in cells)
    bound = [f"{name}={_described(part, path)}" for name, part in held if part is not MISSING]
    defaults = [_described(default, path) for default in value.__defaults__ or ()]
    named = [f"{key}={_described(part, path)}" for key, part in (value.__kwdefaults__ or {}).items()]
    ours = value.__module__.partition(".")[0] in _OURS
    inner = ", ".join([*bound, *defaults, *named])
    return _name(value) + ("" if ours else f" #{_code(value)}") + (f" ({inner})" if inner else "")


def _code(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return _digest(_bytes(code)) if code is not None else "built-in"


def _bytes(code: types.CodeType) -> Iterable[bytes]:
    yield code.co_code
    yield repr((code.co_names, code.co_varnames, code.co_freevars)).encode()
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _bytes(constant)
        elif isinstance(constant, frozenset):
            yield repr(sorted(constant, key=repr)).encode()
        else:
            yield repr(constant).encode()


def _name(value: Any) -> str:
    module = getattr(value, "__module__", None) or ""
    name = getattr(value, "__qualname__", None) or type(value).__qualname__
    return name if module in ("builtins", "__main__", "") or module.partition(".")[0] in _OURS else f"{module}.{name}"


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=4)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
