"""Networks lent to a device for a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.evaluation import slots_of


@contextlib.contextmanager
def lent(modules: Iterable[nn.Module], device: torch.device | str | None) -> Iterator[None]:
    """Modules on a device while this lasts; then every parameter and buffer is where it was, untouched.

    Raises:
        ValueError: A device whose tensors cannot take the place of those here for a time.
    Example:
        >>> net = nn.BatchNorm1d(1, affine=False)
        >>> with lent([net], "meta"):
        ...     net.running_mean.device.type
        'meta'
        >>> net.running_mean.device.type
        'cpu'
    """
    parameters: dict[int, tuple[Tensor, Tensor]] = {}
    moved: dict[int, Tensor] = {}
    buffers: list[tuple[dict[str, Any], str, Tensor]] = []
    try:
        for table, name, tensor in _placed_elsewhere(modules, device):
            if isinstance(tensor, nn.Parameter):
                if id(tensor) not in parameters:
                    parameters[id(tensor)] = tensor, tensor.data
                    _take_to(tensor, device)
            else:
                buffers.append((table, name, tensor))
                table[name] = moved[id(tensor)] = moved.get(id(tensor), tensor.to(device))
        yield
    finally:
        for parameter, data in parameters.values():
            parameter.data = data
        for table, name, tensor in buffers:
            table[name] = tensor


def _take_to(parameter: nn.Parameter, device: Any) -> None:
    try:
        parameter.data = parameter.data.to(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"got device={str(device)!r}, and networks on {parameter.device} that cannot go there and back "
            f"({' '.join(str(error).split())[:100]}). Move them first: module.to({str(device)!r})."
        ) from error


def _placed_elsewhere(
    modules: Iterable[nn.Module], device: torch.device | str | None
) -> list[tuple[dict[str, Any], str, Tensor]]:
    if device is None:
        return []
    wanted = torch.device(device)
    found = {id(part): part for module in modules for part in module.modules()}
    return [
        slot for part in found.values() for slot in slots_of(part)
        if slot[2].device.type != wanted.type or wanted.index not in (None, slot[2].device.index)
    ]  # fmt: skip
