"""A fit that can be broken off and taken up again, to the bit.

Tensors are stored by name, since the order in which Pyro hands parameters over differs between processes. The file is
replaced atomically and carries a digest; the one before it is kept beside it and taken where it is damaged. Reading
runs no code.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae import seals
from pyro_vae.parameters import plain_name
from pyro_vae.randomness import forked
from pyro_vae.traces import Program, traced

_METADATA = "pyro_vae.fit"
_UNKNOWN = "not written there (by another version)"
_NOT_READ = "not read"


def named_tensors(
    modules: Sequence[nn.Module], model: Program, guide: Program, batch: tuple[Any, ...]
) -> dict[str, Tensor]:
    """Everything that a fit changes, by a name that is the same in every process.

    Args:
        modules: The modules that own the programs.
        model: A Pyro program.
        guide: A Pyro program.
        batch: Arguments of both, to find the parameters of plain functions.
    Returns:
        Parameters and buffers of the modules, then what plain functions declare.
    """
    found = {
        f"{i}.{plain_name(key)}": t
        for i, m in enumerate(modules)
        for named in (m.named_parameters, m.named_buffers)
        for key, t in named(remove_duplicate=False)
    }
    known = {id(t) for t in found.values()}
    with forked(), torch.no_grad():
        traces = traced(model, guide, batch, {})
    for trace in traces:
        for name, site in trace.nodes.items():
            if site["type"] == "param":
                value: Any = site["value"]
                tensor = value.unconstrained()
                if id(tensor) not in known:
                    known.add(id(tensor))
                    found[f"param.{plain_name(name)}"] = tensor
    return found


@dataclass(frozen=True)
class Sparing(os.PathLike[str]):
    """A checkpoint that costs next to nothing: give it to `fit` as its ``checkpoint``.

    It is written after the first epoch and the last, and after those in between as long as writing takes no more than
    its share of the time; and the steps are captured and compiled as if there were none. All graphs are made before the
    first step, so that a fit of captured steps goes on to the bit; one that Inductor compiled goes on to rounding.

    Args:
        path: A .safetensors file.
        share: Of the time, for writing.
    Example:
        >>> os.fspath(Sparing("runs/a/checkpoint.safetensors"))
        'runs/a/checkpoint.safetensors'
    """

    path: str | os.PathLike[str]
    share: float = 0.01

    def __fspath__(self) -> str:
        return os.fspath(self.path)


def previous(path: Path) -> Path:
    """Where the checkpoint before the latest one is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def keep_previous(path: Path) -> None:
    """Keep a checkpoint that is to be replaced under its other name, without a moment in which there is none."""
    if not path.exists():
        return
    beside = path.with_name(f".partial-{os.getpid()}-previous-{path.name}")
    try:
        os.link(path, beside)
    except OSError:  # a file system without links
        shutil.copyfile(path, beside)
    os.replace(beside, previous(path))


def remove(path: Path) -> None:
    """Remove a checkpoint of which the fit is done, and the one before it."""
    previous(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _under(prefix: str, content: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in content.items() if name.startswith(prefix)}


def _opened(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    content, metadata = seals.read(path)
    return content, json.loads(metadata[_METADATA])


class Checkpoint:
    """The state of a fit on disk.

    Args:
        tensors: What the fit changes, from `named_tensors`.
        settings: What must be the same when the fit goes on, as plain data.
        values: Gives what the programs read from Python now, a line for each place. What stayed as it was
            until the fit was broken off must be the same when it goes on; what the fit itself moved (a
            schedule in a dict) is warned of where it does not stand where it stood.
        read_only: Another process writes it, in a folder that this one need not have.
    Raises:
        ValueError: Another ending, or no such folder.
    """

    def __init__(
        self, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], settings: Mapping[str, Any],
        values: Callable[[], dict[str, str]] = dict, read_only: bool = False,
    ) -> None:  # fmt: skip
        self.path = Path(path)
        self.share = path.share if isinstance(path, Sparing) else None
        self._written, self._cost = time.perf_counter(), 0.0
        if not read_only and (self.path.suffix != ".safetensors" or not self.path.parent.is_dir()):
            raise ValueError(f"got checkpoint={str(path)!r}, wanted NAME.safetensors in a folder that exists.")
        self.tensors = dict(tensors)
        self.settings = json.loads(json.dumps(dict(settings)))
        self.values = values
        self.first_values = values()

    def due(self) -> bool:
        """Whether to write now, so that writing takes its share of the time at most."""
        return self.share is None or time.perf_counter() - self._written >= self._cost / self.share

    def write(
        self, progress: Mapping[str, Any], moments: Mapping[str, Mapping[str, Tensor]], best: Mapping[str, Tensor]
    ) -> None:
        """Replace the file.

        Args:
            progress: Plain data: epoch, history and the like.
            moments: State of the optimiser per tensor name.
            best: Best weights so far, by tensor name.
        Raises:
            OSError: Nothing can be written there; an older file is then as it was.
        """
        started = time.perf_counter()
        content = {f"tensor/{name}": t for name, t in self.tensors.items()}
        content |= {f"moment/{key}/{name}": t for name, state in moments.items() for key, t in state.items()}
        content |= {f"best/{name}": t for name, t in best.items()}
        # One file holds each storage once, and safetensors refuses two names for one.
        content = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in content.items()}
        content["random"] = torch.get_rng_state()
        for device in {t.device for t in self.tensors.values() if t.device.type == "cuda"}:
            content[f"random/{device}"] = torch.cuda.get_rng_state(device)
        values = {"first": self.first_values, "last": self.values()}
        written = {"settings": self.settings, "values": values, "progress": dict(progress)}
        keep_previous(self.path)
        seals.save(self.path, content, {_METADATA: json.dumps(written)})
        self._written = time.perf_counter()
        self._cost = self._written - started

    def read(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], dict[str, Tensor]] | None:
        """Put tensors and random state back; what else was written, or None where there is no file.

        Raises:
            ValueError: A file that is damaged, or of another fit; nothing is then changed.
        """
        if not self.path.exists():
            return None
        content, header = self._content()
        for key, wanted in self.settings.items():
            found = header["settings"].get(key, _UNKNOWN)
            if found != wanted:
                raise ValueError(
                    f"{self.path} is the checkpoint of another fit: its {key} is {found}, this one's {wanted}. Remove "
                    "it to start afresh, or go on with the same options."
                )
        stored = _under("tensor/", content)
        shapes = {name: t.shape for name, t in stored.items()}, {name: t.shape for name, t in self.tensors.items()}
        if shapes[0] != shapes[1]:
            differing = sorted({n for n in {*shapes[0], *shapes[1]} if shapes[0].get(n) != shapes[1].get(n)})
            raise ValueError(
                f"{self.path} is the checkpoint of another pair: {differing[0]!r} differs. Remove it to start afresh."
            )
        self._compare(header.get("values", {"first": {}, "last": {}}))
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(stored[name])
        torch.set_rng_state(content["random"])
        for device, state in _under("random/", content).items():
            torch.cuda.set_rng_state(state, device)
        moments: dict[str, dict[str, Tensor]] = {}
        for name, tensor in _under("moment/", content).items():
            key, _, owner = name.partition("/")
            moments.setdefault(owner, {})[key] = tensor
        return header["progress"], moments, _under("best/", content)

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the file holds, or where it is damaged the one before it."""
        try:
            return _opened(self.path)
        except (OSError, KeyError, ValueError) as error:
            earlier, reason = previous(self.path), error
        try:
            found = _opened(earlier)
        except (OSError, KeyError, ValueError):
            raise ValueError(
                f"{self.path} is not a readable checkpoint ({reason}). Remove it to start the fit afresh."
            ) from reason
        warnings.warn(
            f"{self.path} is not a readable checkpoint ({reason}), so the fit goes on from the one before, {earlier}.",
            stacklevel=5,
        )
        return found

    def _compare(self, written: Mapping[str, dict[str, str]]) -> None:
        """Refuse other constants than the fit had; warn where what it moved itself stands elsewhere."""
        first, last, now = written["first"], written["last"], self.first_values
        moved = []
        for name in [*last, *(name for name in now if name not in last)] if last and now else ():
            was, is_now = last.get(name, _NOT_READ), now.get(name, _NOT_READ)
            if was == is_now:
                continue
            if first.get(name, _NOT_READ) != was:
                moved.append(f"{name} was {was} and is {is_now}")
                continue
            raise ValueError(
                f"{self.path} is the checkpoint of another fit: {name}, which the programs read, was {was} there and "
                f"is {is_now} now. Set it as it was, or remove the file to start afresh."
            )
        if moved:
            warnings.warn(
                f"the fit goes on from {self.path}, and what the programs moved by themselves does not stand where it "
                f"stood when that was written: {'; '.join(moved[:3])}{', ...' if len(moved) > 3 else ''}. So the end "
                "is not that of the whole fit. Set it before the fit, or let fit hold the schedule (beta=).",
                stacklevel=4,
            )
        # From here on the first values are those of the fit as it was begun.
        self.first_values = first or now
