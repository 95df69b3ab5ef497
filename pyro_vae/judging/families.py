"""What a family of posteriors is given by: a fitted guide, a class of posteriors, or a posterior."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from pyro_vae.protocols import has_start
from pyro_vae.traces import Program


def by_name(own: Program, families: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Program]]:
    """The guide's own first, under its own name where it is among the families; and those that are guides."""
    name = next((name for name, value in families.items() if value is own or value == own), "guide")
    named = {name: own} | {other: value for other, value in families.items() if other != name}
    return named, {name: value for name, value in named.items() if is_guide(value)}


def is_class(value: Any) -> bool:
    return isinstance(value.func if isinstance(value, functools.partial) else value, type)


def is_guide(value: Any) -> bool:
    return callable(value) and not is_class(value) and not has_start(value)


class _NoEncoder(nn.Module):
    """Stands where an encoder would; it is never run."""

    out_features = 1


def family_of(name: str, value: Any, latent: Callable[[], Tensor]) -> Any:
    """A guide or a posterior as it is; of a class, a posterior without an encoder, of such a latent."""
    if not callable(value):
        raise ValueError(
            f"got families[{name!r}] of type {type(value).__name__}, wanted a fitted guide, a class of posteriors such "
            "as FullNormal, functools.partial(IAF, transforms=2), or a posterior."
        )
    if not is_class(value):
        return value
    z = latent()
    posterior = value(_NoEncoder(), z.shape[-1])
    if not has_start(posterior):
        raise ValueError(
            f"families[{name!r}] makes a {type(posterior).__name__}, which has no local form. Derive it from "
            "Amortized, or give a guide fitted by fit_guide."
        )
    return posterior.to(dtype=z.dtype, device=z.device).eval()
