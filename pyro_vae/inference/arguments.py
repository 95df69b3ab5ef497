"""Which columns of the data are arguments of a pair.

A pair takes its data by position. A column beyond what both programs take is no argument (the labels that a loader
hands out with its images), and is left out after one line that says so; labels are never taken for a mask.
"""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.inference.trees import described
from pyro_vae.traces import Program


@dataclass(frozen=True)
class Arguments:
    """What a pair takes by position: names of the arguments, of the program that takes fewest; how many have no
    default, in the program that needs most; how many can be given, infinite with ``*args``; positions of arguments
    called ``mask``; defaults by position; and names that have no default and can only be given by keyword.
    """

    names: tuple[str, ...]
    required: int
    most: float
    masks: frozenset[int]
    defaults: dict[int, Any]
    keywords: tuple[str, ...] = ()

    def kept(self, batch: tuple[Any, ...], warn: bool = True, columns: bool = True) -> int:
        """How many columns of a batch are arguments; with `warn`, a warning of those that are left out.

        `columns` says whether somebody put these together for the pair, as a tuple; a loader has its own. A ValueError
        where there are fewer columns than arguments, a boolean one that is no mask of the data, one that would be
        handed to an option, an argument that is keyword-only, or whole numbers first and floats of their shape left
        out.
        """
        if self.keywords:
            named = ", ".join((*self.names, *self.keywords))
            raise ValueError(
                f"the pair takes {', '.join(map(repr, self.keywords))} as a keyword-only argument, and data are given "
                f"by position; wanted model({named}), guide({named}). Drop the * before {self.keywords[0]!r} in both, "
                f"and pass the data as columns, ({named}{',' * (len(self.names) + len(self.keywords) == 1)})."
            )
        count = len(batch)
        takes = ", ".join(self.names) + (", ..." if self.most == math.inf else "")
        if count < self.required:
            hint = " A dict is one argument." if any(isinstance(x, dict) for x in batch) else ""
            raise ValueError(
                f"got data of {count} column{'s' * (count != 1)} ({described(batch)}), and the pair takes "
                f"{self.required} arguments ({takes}); wanted one column for each: fit(model, guide, "
                f"({', '.join(self.names[: self.required])})).{hint}"
            )
        keep = int(min(count, self.most))
        for i in range(1, keep):
            if i in self.masks and not self._is_mask(batch, i):
                keep = i
                break
            option = i >= self.required and not isinstance(self.defaults.get(i), Tensor | None)
            if not columns and option:
                raise ValueError(
                    f"got batches of {count} columns ({described(batch)}), and column {i} would be the argument "
                    f"{self.names[i]!r} of the pair, whose default is {self.defaults[i]!r}; wanted data only. If they "
                    "are labels, leave them out of the batches; if they are meant, pass the data as a tuple."
                )
        if not keep:
            raise ValueError(f"got data ({described(batch)}) for a pair without arguments; wanted model(x), guide(x).")
        if keep < count and warn:
            self._refuse_labels_first(batch, keep)
            warnings.warn(
                f"the pair takes ({takes}), and the data have {count} columns: took "
                f"{_placed(batch, keep)}; left out {described(batch[keep:])}, such as labels, since "
                f"{'they are' if count - keep > 1 else 'it is'} no argument of the pair.",
                stacklevel=2,
            )
        return keep

    def _refuse_labels_first(self, batch: tuple[Any, ...], keep: int) -> None:
        """Whole numbers before floats of the same shape are likely labels, as wide as the data."""
        first = batch[0]
        if not isinstance(first, Tensor) or first.is_floating_point():
            return
        for i, other in enumerate(batch[keep:], keep):
            if isinstance(other, Tensor) and other.is_floating_point() and other.shape == first.shape:
                raise ValueError(
                    f"got columns of which the pair would take {_placed(batch, keep)}, and leave out column {i}, "
                    f"{described(other)}, which has the same shape; wanted the data first, and labels after them. Put "
                    f"column {i} first, or pass column 0 alone if it is what the pair is to see."
                )

    def _is_mask(self, batch: tuple[Any, ...], i: int) -> bool:
        x, mask = batch[0], batch[i]
        if not isinstance(mask, Tensor) or not isinstance(x, Tensor):
            return not isinstance(x, Tensor) and not isinstance(mask, str | list)
        if mask.dtype != torch.bool:
            return mask.shape == x.shape and x.dim() > 1  # of x's shape: the program says that it wants booleans
        if mask.shape != x.shape:
            raise ValueError(
                f"got a boolean column of shape {tuple(mask.shape)} beside data of shape {tuple(x.shape)}, which the "
                f"pair would take as its {self.names[i]!r}; wanted a mask of the shape of the data. Labels: "
                "leave them out; a mask that broadcasts: mask.expand_as(x)."
            )
        return True


def _placed(batch: tuple[Any, ...], keep: int) -> str:
    """The first columns of a batch, with their numbers."""
    return ", ".join(f"column {i} ({described(part)})" for i, part in enumerate(batch[:keep]))


def arguments_of(*programs: Program) -> Arguments:
    """What programs take by position, together: functions, modules, methods, partials or handlers around them.

    Example:
        >>> found = arguments_of(lambda x, mask=None: None, lambda x, mask=None, **_: None)
        >>> found.names, found.required, found.most, sorted(found.masks)
        (('x', 'mask'), 1, 2, [1])
    """
    each = [_positional(program) for program in programs]
    known = [(names, defaults, most) for names, defaults, most, _ in each if names is not None]
    keywords = tuple(dict.fromkeys(name for *_, only in each for name in only))
    if not known:
        return Arguments((), 0, math.inf, frozenset(), {}, keywords)
    names, defaults, most = min(known, key=lambda found: (found[2], len(found[0])))
    required = max(sum(i not in d for i in range(len(n))) for n, d, _ in known)
    masks = {i for n, _, _ in known for i, name in enumerate(n) if name == "mask" or name.endswith("_mask")}
    return Arguments(
        tuple(names if len(names) >= required else max((n for n, _, _ in known), key=lambda n: len(list(n)))),
        required,
        most,
        frozenset(masks),
        dict(defaults),
        keywords,
    )


def _positional(program: Any) -> tuple[Sequence[str] | None, dict[int, Any], float, Sequence[str]]:
    """Names of what a program takes by position, the defaults, how many, and what it needs by keyword.

    None in place of the names where it does not say.
    """
    taken = 0
    keywords: set[str] = set()
    while True:
        if isinstance(program, functools.partial):
            if type(program) is not functools.partial and isinstance(program.func, functools.partial):
                program = program.func  # Pyro's partial of a partial shows the inner one's arguments as its own
            if getattr(program.func, "__name__", "") == "_context_wrap":  # a handler of Pyro around a program
                program = program.args[1]
                continue
            taken, keywords = taken + len(program.args), keywords | set(program.keywords)
            program = program.func
        elif hasattr(program, "_orig_mod"):  # torch.compile
            program = program._orig_mod
        elif isinstance(program, nn.Module):
            program = program.forward
        elif inspect.isfunction(program) and hasattr(program, "__wrapped__"):
            program = program.__wrapped__
        else:
            break
    try:
        parameters = list(inspect.signature(program).parameters.values())
    except (TypeError, ValueError):
        return None, {}, math.inf, ()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][taken:]
    positional = positional[: next((i for i, p in enumerate(positional) if p.name in keywords), len(positional))]
    endless = any(p.kind == p.VAR_POSITIONAL for p in parameters)
    defaults = {i: p.default for i, p in enumerate(positional) if p.default is not p.empty}
    only = [p.name for p in parameters if p.kind == p.KEYWORD_ONLY and p.default is p.empty and p.name not in keywords]
    return [p.name for p in positional], defaults, math.inf if endless else len(positional), only
