"""What was found so far, in a file, so that work that is broken off is gone on with and not done again.

A piece of work has a name, and what came of it is kept under that name as soon as it is done: numbers and words as JSON
in the header of a safetensors file, tensors beside them. The file is replaced atomically, carries a digest of its
bytes, and names all that its numbers depend on. A file of anything else (other options or weights, another version, a
damaged one) is not read: the work begins anew. Reading it runs no code: results are of the classes below.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_vae import seals
from pyro_vae.inference.ranks import by_first, world
from pyro_vae.judging._calibration import Calibration
from pyro_vae.judging.estimates import ElboTerms
from pyro_vae.judging.evidence import Annealed, Bracket, Curve, Estimate
from pyro_vae.judging.hamiltonian import Kernels
from pyro_vae.judging.results import Mean, Nats
from pyro_vae.judging.stages import Bounds, Bracketed, Calibrated, GapSplit, Latents
from pyro_vae.judging.trials import Remedy, Training

T = TypeVar("T")
VERSION = 1
_METADATA = "pyro_vae.kept"
_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (Annealed, Bounds, Bracket, Bracketed, Calibrated, Calibration, Curve, ElboTerms, Estimate, GapSplit,
                 Kernels, Latents, Mean, Nats, Remedy, Training)
}  # fmt: skip


class Kept:
    """Pieces of work by name, in a file where there is one.

    Args:
        path: A .safetensors file; None keeps nothing.
        key: What the numbers depend on, as plain data: with another one the file is not read.
    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "part.safetensors")
        ...     first = Kept(path, {"seed": 0}).piece("sum", lambda: torch.ones(2) * 3)
        ...     again = Kept(path, {"seed": 0}).piece("sum", lambda: 1 / 0)
        ...     other = Kept(path, {"seed": 1}).piece("sum", lambda: "begun anew")
        >>> first, again, other
        (tensor([3., 3.]), tensor([3., 3.]), 'begun anew')
    """

    def __init__(self, path: str | os.PathLike[str] | None = None, key: Mapping[str, Any] | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.key: dict[str, Any] = json.loads(json.dumps({"version": VERSION, **(key or {})}))
        self.clock: Callable[[], float] = time.monotonic
        self._ours = world()[0] == 0  # of several processes the first one has the file
        self._pieces: dict[str, Any] | None = None
        self._tensors: dict[str, Tensor] = {}
        self._inside = 0.0  # seconds of the pieces inside of the one at work

    def also(self, key: Mapping[str, Any]) -> Kept:
        """The same file, of numbers that depend on more."""
        return Kept(self.path, {**self.key, **key})

    @property
    def seconds(self) -> float:
        """Those that went into what is kept."""
        return math.fsum(entry["seconds"] for entry in self._read().values())

    def piece(self, name: str, make: Callable[[], T]) -> T:
        """What is kept under a name, or what `make` gives, which is kept from then on.

        What `make` raises is no result. Where nothing can be written, or the result is of a kind that is not kept, the
        result is returned all the same, and only done again by whoever begins anew. Processes that share their work
        ask for the same pieces in the same order, and skip those that the first of them has kept.
        """
        if self.path is None:
            return make()
        for found in by_first(lambda: self._found(name)):
            return found
        began, outside, self._inside = self.clock(), self._inside, 0.0
        try:
            value = make()
        finally:
            took = self.clock() - began
            seconds, self._inside = took - self._inside, outside + took
        if not self._ours:
            return value
        tensors: dict[str, Tensor] = {}
        with contextlib.suppress(_Strange, OSError):
            packed = _packed(value, name, tensors)
            self._read()[name] = {"seconds": seconds, "value": packed}
            self._tensors |= tensors
            written = json.dumps({"key": self.key, "pieces": self._read()})
            seals.save(self.path, self._tensors, {_METADATA: written})
        return value

    def remove(self) -> None:
        """Remove the file, once what it was for is written."""
        if self.path is not None and self._ours:
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)

    def _found(self, name: str) -> list[Any]:
        """What is kept under a name, if anything."""
        entry = self._read().get(name)
        if entry is not None:
            with contextlib.suppress(KeyError, TypeError, ValueError, RuntimeError):
                return [_unpacked(entry["value"], self._tensors)]
        return []

    def _read(self) -> dict[str, Any]:
        if self._pieces is None:
            self._pieces = {}
            if self.path is not None and self._ours and self.path.is_file():
                with contextlib.suppress(ValueError, KeyError, OSError, TypeError):
                    tensors, metadata = seals.read(self.path)
                    content = json.loads(metadata[_METADATA])
                    if content["key"] == self.key:
                        self._pieces, self._tensors = dict(content["pieces"]), tensors
        return self._pieces


class _Strange(Exception):
    """Something of a kind that is not kept."""


def _packed(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A value as JSON; its tensors by names."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise _Strange
        key = f"{name}/{len(tensors)}"
        tensors[key] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        return {"tensor": key, "device": str(value.device)}
    if type(value) is list:
        return [_packed(each, name, tensors) for each in value]
    if type(value) is tuple:
        return {"tuple": [_packed(each, name, tensors) for each in value]}
    if type(value) is dict and all(isinstance(key, str | int) for key in value):
        return {"dict": [[key, _packed(each, name, tensors)] for key, each in value.items()]}
    if _KINDS.get(type(value).__name__) is not type(value):
        raise _Strange
    fields = value._asdict() if hasattr(value, "_asdict") else {f.name: getattr(value, f.name) for f in
                                                                 dataclasses.fields(value)}  # fmt: skip
    return {"kind": type(value).__name__, "fields": {k: _packed(v, name, tensors) for k, v in fields.items()}}


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpacked(each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]].to(value["device"])
    if "tuple" in value:
        return tuple(_unpacked(each, tensors) for each in value["tuple"])
    if "dict" in value:
        return {key: _unpacked(each, tensors) for key, each in value["dict"]}
    return _KINDS[value["kind"]](**{name: _unpacked(each, tensors) for name, each in value["fields"].items()})
