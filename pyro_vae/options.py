"""Options are what their annotations say, or are refused before any time is spent.

    whole numbers   ``int``: Python's, NumPy's, a tensor of one integer; no bool, no 2.0
    numbers         ``float``: these, and floats of all three; no nan
    switches        ``bool``: True and False, Python's or NumPy's
    functions       ``Callable[...]`` and ``Program``: whatever can be called
    devices         ``str | torch.device``: one that is here and takes a tensor
    words           ``str`` where the name is in `SPELLED`: "One_Cycle" is "one-cycle"

each with ``| None`` where None is an answer. The ranges that hold wherever a name occurs are in one table below; what
depends on the function is the function's to say.

A pair in one piece, such as a `VAE`, a run or an object of one's own with the two programs as its attributes ``model``
and ``guide``, may stand in the place of both, f(vae, data), or of the one that a function takes. An object that is a
program itself is taken as that program.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload

import numpy as np
import torch
from torch import Tensor

from pyro_vae.turns import turn
from pyro_vae.words import did_you_mean

P = ParamSpec("P")
R = TypeVar("R")
M = TypeVar("M")
G = TypeVar("G")
R_co = TypeVar("R_co", covariant=True)
M_contra = TypeVar("M_contra", contravariant=True)
G_contra = TypeVar("G_contra", contravariant=True)
Kind = Callable[[str, Any, bool], Any]
Rule = Callable[[str, Any], Any]

# The least that a whole number may be, by its name.
LEAST = dict.fromkeys(
    ("batch_size", "check_every", "epochs", "halvings", "images", "most", "num_groups", "num_neighbours", "num_samples",
     "num_directions", "num_imputations", "num_components",
     "x_shape", "hidden", "latent_dim", "latent_dims", "y_dim", "num_clusters"), 1
) | dict.fromkeys(("seed", "data_seed", "pilot_seed", "pilot_steps", "max_plate_nesting", "size"), 0)  # fmt: skip
# What is not among all the whole numbers that there are, in words that say more.
WORDS = {"kl_warmup_steps": "a number of steps"}
FINITE = {"learning_rate", "beta"}
FILLED = {"x_shape"}
# Options that are one of a few words: neither case nor hyphens and underscores count.
SPELLED = {"estimator", "kernel", "matmul_precision", "method", "per", "pixels", "schedule", "score", "start"}
_MOST = 2**63


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """A function whose options are looked at before it runs, by its annotations (see the module); whole numbers, and
    floats of NumPy, reach it as Python's own.

    Example:
        >>> @checked
        ... def draw(data: Any, num_samples: int = 1, seed: int | None = 0) -> int:
        ...     return num_samples
        >>> draw(None, np.int64(3)), draw(None, seed=None)
        (3, 1)
        >>> draw(None, num_samples=1.5)
        Traceback (most recent call last):
        ...
        ValueError: num_samples must be a positive integer, got 1.5. Pass a whole number, such as num_samples=1.
    """
    given = inspect.signature(function).parameters.values()
    rules = {p.name: rule for p in given if (rule := _rule(p)) is not None}
    places = [p.name for p in given if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    programs = [name for name in places if name in _PROGRAMS]
    title = function.__qualname__.removesuffix(".__init__")
    known = None if any(p.kind is p.VAR_KEYWORD for p in given) else frozenset(p.name for p in given)
    unpacked = functools.partial(_unpacked, title, places, programs)

    @functools.wraps(function)
    def looked_at(*args: Any, **kwargs: Any) -> R:
        if programs:
            args, kwargs = unpacked(args, kwargs)
        if known is not None and not known.issuperset(kwargs):
            name = next(name for name in kwargs if name not in known)
            raise TypeError(f"{title}() got an unexpected keyword argument {name!r}.{did_you_mean(name, known)}")
        for name in kwargs:
            if name in rules:
                kwargs[name] = rules[name](name, kwargs[name])
        if any(name in rules for name in places[: len(args)]):
            found = [rules[n](n, a) if n in rules else a for n, a in zip(places, args, strict=False)]
            args = (*found, *args[len(found) :])
        if not programs:
            return function(*args, **kwargs)
        with turn():
            return function(*args, **kwargs)

    looked_at.option_rules = rules  # type: ignore[attr-defined]
    return looked_at


class Pair(Protocol):
    """One thing that holds both programs, for type checkers; `is_pair` is what is asked of a value."""

    @property
    def model(self) -> Callable[..., Any]: ...
    @property
    def guide(self) -> Callable[..., Any]: ...


class OfPair(Protocol[M_contra, G_contra, P, R_co]):
    """How a function of (model, guide, ...) may be called."""

    @overload
    def __call__(self, pair: Pair, /, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, model: M_contra, guide: G_contra, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class OfModel(Protocol[M_contra, P, R_co]):
    """How a function of (model, ...) may be called."""

    @overload
    def __call__(self, pair: Pair, /, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, model: M_contra, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


class OfGuide(Protocol[G_contra, P, R_co]):
    """How a function of (guide, ...) may be called."""

    @overload
    def __call__(self, pair: Pair, /, *args: P.args, **kwargs: P.kwargs) -> R_co: ...
    @overload
    def __call__(self, guide: G_contra, *args: P.args, **kwargs: P.kwargs) -> R_co: ...


def of_pair(function: Callable[Concatenate[M, G, P], R]) -> OfPair[M, G, P, R]:
    """`checked` for a function of (model, guide, ...): a type checker knows the call with what holds both, too."""
    return cast("OfPair[M, G, P, R]", checked(function))


def of_model(function: Callable[Concatenate[M, P], R]) -> OfModel[M, P, R]:
    """`checked` for a function of (model, ...), likewise."""
    return cast("OfModel[M, P, R]", checked(function))


def of_guide(function: Callable[Concatenate[G, P], R]) -> OfGuide[G, P, R]:
    """`checked` for a function of (guide, ...), likewise."""
    return cast("OfGuide[G, P, R]", checked(function))


def integer(name: str, value: Any, optional: bool = False) -> Any:
    """A whole number as Python's; a ValueError for another type, or less than its name allows.

    Example:
        >>> integer("epochs", torch.tensor(3))
        3
    """
    found = _scalar(value)
    least = LEAST.get(name)
    if isinstance(found, numbers.Integral) and not isinstance(found, bool | np.bool_):
        whole = int(found)
        if (least is None or whole >= least) and abs(whole) < _MOST:
            return whole
    wanted = {None: "an integer", 1: "a positive integer", 0: "an integer that is not negative"}[least]
    wanted = WORDS.get(name, wanted)
    raise ValueError(
        f"{name} must be {wanted}, got {_shown(value)}. Pass a whole number, such as "
        f"{name}={1 if least is None else least}{', or None' * optional}."
    )


def number(name: str, value: Any, optional: bool = False) -> Any:
    """A number as Python's; a ValueError for another type, nan, or infinite where its name does not allow it.

    Example:
        >>> number("tolerance", np.float32(0.5))
        0.5
    """
    found = _scalar(value)
    if isinstance(found, numbers.Real) and not isinstance(found, bool | np.bool_):
        if not math.isnan(found) and not (name in FINITE and math.isinf(found)):
            # A tensor stays one: it may be a weight that changes in place.
            return value if isinstance(value, int | float | Tensor) else float(found)
    finite = "finite " if name in FINITE else ""
    raise ValueError(
        f"{name} must be a {finite}number, got {_shown(value)}. Pass one, such as {name}=0.1{', or None' * optional}."
    )


def function_of(name: str, value: Any, optional: bool = False) -> Any:
    """Something that can be called; a ValueError for anything else."""
    if callable(value):
        return value
    of_pair = name in _PROGRAMS
    wanted = "a Pyro program, a function or module of the data" if of_pair else "a function"
    order = " The order is (model, guide, data), or (vae, data) with a pair in one piece." * of_pair
    raise ValueError(
        f"{name} must be {wanted}, got {_shown(value)}. Pass what can be called{', or None' * optional}.{order}"
    )


_PROGRAMS = ("model", "guide")
_Given = tuple[tuple[Any, ...], dict[str, Any]]


def is_pair(value: Any) -> bool:
    """Whether an object has the two programs of a pair, ``model`` and ``guide``, and is none itself.

    Example:
        >>> from types import SimpleNamespace
        >>> is_pair(SimpleNamespace(model=print, guide=print)), is_pair(print)
        (True, False)
    """
    return _has_both(value) and not _is_program(value)


def _has_both(value: Any) -> bool:
    return not isinstance(value, Tensor | type) and all(callable(getattr(value, name, None)) for name in _PROGRAMS)


def _is_program(value: Any) -> bool:
    """Whether it can be called; a module can where its class says what that does."""
    if isinstance(value, torch.nn.Module):
        return type(value).forward is not torch.nn.Module.forward
    return callable(value)


def _unpacked(
    function: str, places: Sequence[str], programs: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> _Given:
    """The arguments of a call, with a pair in one piece as the programs that the function takes (see the module)."""
    at = places.index(programs[0])
    by_name = len(args) <= at
    first = kwargs.get(programs[0]) if by_name else args[at]
    if not _has_both(first):
        return args, kwargs
    before, rest = args[:at], args[at + 1 :]
    both = len(programs) == 2
    beside = both and ("guide" in kwargs or bool(rest) and callable(rest[0]))
    kind = type(first).__name__
    if _is_program(first):
        if beside or not both:
            return args, kwargs
        raise ValueError(
            f"got a {kind} and no guide, wanted a pair: it has a model and a guide, but is a program itself. Say which "
            f"is meant: {function}(model, guide, ...) with its model, and it or its guide."
        )
    if beside:
        raise ValueError(
            f"got a {kind}, which holds a model and a guide, and another guide beside it, wanted one pair. Call "
            f"{function}(vae, ...), or with the guide {function}(vae.model, guide, ...)."
        )
    if "data" in places and not rest and "data" not in kwargs:
        raise ValueError(f"got a {kind} and no data, wanted both. Call {function}(vae, data, ...).")
    own = tuple(getattr(first, name) for name in programs)
    if by_name:
        return args, kwargs | dict(zip(programs, own, strict=True))
    return (*before, *own, *rest), kwargs


def device(name: str, value: Any, optional: bool = False) -> Any:
    """A device that is here; a ValueError for one that this machine or this torch does not have."""
    reason = "which is none that torch knows"
    try:
        found = torch.device(value)
        reason = "which is not on this machine"
        if found.type == "meta":
            reason = "which holds no numbers"
        elif found.type == "cpu" or torch.empty(0, device=found) is not None:
            return value if isinstance(value, str | torch.device) else found
    except (RuntimeError, TypeError, ValueError, AssertionError, NotImplementedError, ImportError):
        pass
    known = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
    raise ValueError(f"got {name}={_shown(value)}, {reason}; wanted one of {known}{', or None' * optional}.")


def _flag(name: str, value: Any, optional: bool = False) -> Any:
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ValueError(f"{name} must be True or False{' or None' * optional}, got {_shown(value)}.")


def integers(name: str, value: Any, optional: bool = False, one: Callable[[str, Any], Any] = integer) -> Any:
    """Whole numbers as a tuple of Python's; a ValueError for no sequence, or where one is not what its name allows.

    Example:
        >>> integers("hidden", np.array([400, 200]))
        (400, 200)
    """
    try:
        if not isinstance(value, str | bytes | dict | set):
            found = tuple(one(name, each) for each in tuple(value))
            if found or name not in FILLED:
                return found
    except (TypeError, ValueError):
        pass
    least = LEAST.get(name)
    wanted, many = f"a list of {'positive ' * (least == 1)}integers", (8, 4) if type(value) is not int else (value,)
    shown: Any = many if least is None or min(many) >= least else (8, 4)
    if one is not integer:
        wanted, shown = f"lists of {'positive ' * (least == 1)}integers", ((8, 8), (4,))
    raise ValueError(f"{name} must be {wanted}, got {_shown(value)}. Pass {name}={shown}, say.")


def _name(name: str, value: Any) -> Any:
    """One of a few words, in whatever spelling; which there are is the function's to say."""
    return value.casefold().replace("_", "-") if isinstance(value, str) else value


def _path(name: str, value: Any, optional: bool = False) -> Any:
    if isinstance(value, str | os.PathLike):
        return value
    raise ValueError(f"{name} must be a path, got {_shown(value)}. Pass a string or a Path{', or None' * optional}.")


_KINDS: dict[frozenset[str], Kind] = {
    frozenset({"int"}): integer,
    frozenset({"float"}): number,
    frozenset({"bool"}): _flag,
    frozenset({"Program"}): function_of,
    frozenset({"Bound"}): function_of,
    frozenset({"Bound", "str"}): lambda name, value, _: value if isinstance(value, str) else function_of(name, value),
    frozenset({"str", "torch.device"}): device,
    frozenset({"Sequence[int]"}): integers,
    frozenset({"Sequence[Sequence[int]]"}): lambda name, value, none: integers(name, value, none, integers),
    frozenset({"str", "os.PathLike[str]"}): _path,
}


def _rule(parameter: inspect.Parameter) -> Rule | None:
    """What an annotation asks for; None for what it does not tell."""
    text = parameter.annotation
    text = text if isinstance(text, str) else inspect.formatannotation(text)
    if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
        return None
    if parameter.name in SPELLED and "str" in re.findall(r"[\w.]+", text):
        return _name
    optional = text.endswith(" | None")
    text = text.removesuffix(" | None")
    called = text.startswith("Callable[") and "] | " not in text
    kind = function_of if called else _KINDS.get(frozenset(text.split(" | ")))
    if kind is None:
        return None
    return lambda name, value: None if optional and value is None else kind(name, value, optional)


def _scalar(value: Any) -> Any:
    """A tensor or array without dimensions as the number that it holds."""
    if isinstance(value, Tensor) and not value.dim() and not value.is_meta:
        return value.detach().item()
    return value[()] if isinstance(value, np.ndarray) and not value.ndim else value


def _shown(value: Any) -> str:
    text = repr(value)
    if isinstance(value, Tensor | np.ndarray) and value.ndim:
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    return text if len(text) <= 80 else f"{text[:77]}..."
