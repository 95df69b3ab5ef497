"""Runs of Pyro programs, as traces: once as they are, or at given values of their sites.

Programs run here as they are: their networks in the mode that they are in, and batch statistics move where they would.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.poutine.trace_struct import Trace
from torch import Tensor

from pyro_vae.parameters import own_parameters
from pyro_vae.randomness import forked
from pyro_vae.refusals import in_words
from pyro_vae.sites import PARTICLES, Frame, data_frame, depth, deterministic, plates, sample_sites

Program: TypeAlias = Callable[..., Any]


def traced(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Trace, Trace]:
    """One run of the guide, and one of the model at its draws."""
    with in_words((guide, model), args, kwargs):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        return guide_trace, poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)


def sites(program: Program, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The sample sites of a program by name, as Pyro's trace holds them, from one run."""
    with own_parameters(program), forked(), torch.no_grad(), in_words((program,), args, kwargs):
        return {site["name"]: site for site in sample_sites(poutine.trace(program).get_trace(*args, **kwargs))}


def replayed(
    program: Program,
    latents: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    free: Sequence[str] = (),
    look: Callable[[Trace], None] | None = None,
) -> tuple[Trace, Frame]:
    """Run a program at given latents, under a particle plate where there is more than one sample.

    Sites that are free are drawn; a look at a plain run may refuse the program.
    """
    with forked(), torch.no_grad():
        plain = poutine.trace(program).get_trace(*args, **kwargs)
    if look is not None:
        look(plain)
    nesting = depth(plain)
    unobserved = [s for s in sample_sites(plain) if not s["is_observed"] and s["name"] not in free]
    wanted = [s for s in unobserved if s["name"] in latents or not deterministic(s)]
    missing = [s["name"] for s in wanted if s["name"] not in latents]
    if missing:
        raise ValueError(f"no value for latent site {missing[0]!r}; got values for {list(latents)}.")
    num_samples = len(latents[wanted[0]["name"]]) if wanted else 1
    trace = run_at(program, {site["name"]: site for site in wanted}, latents, nesting, args, kwargs)
    return trace, data_frame([trace], num_samples, nesting, args=args)


def run_at(
    program: Program,
    wanted: Mapping[str, Any],
    latents: Mapping[str, Tensor],
    nesting: int,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Trace:
    """One run of a program at given values of its sites, under a particle plate where there are several samples.

    `wanted` are the sites that are given, of a plain run, by name; `latents` their values, (K, *plates, *event) each;
    `nesting` counts the batch dimensions of all plates.
    """
    num_samples = max((len(latents[name]) for name in wanted if name in latents), default=1)
    given = Trace()
    for name, site in wanted.items():
        if name in latents:
            deepest = max((-dim for dim in plates(site)), default=0)
            head = (num_samples,) + (1,) * (nesting - deepest) if num_samples > 1 else ()
            value = latents[name].reshape(head + tuple(latents[name].shape[1:]))
            given.add_node(name, name=name, type="sample", is_observed=False, infer={}, value=value)
    plate = pyro.plate(PARTICLES, num_samples, dim=-1 - nesting) if num_samples > 1 else contextlib.nullcontext()
    with plate:
        return poutine.trace(poutine.replay(program, trace=given)).get_trace(*args, **kwargs)


@contextlib.contextmanager
def taking(args: tuple[Any, ...]) -> Iterator[None]:
    """Say of what programs raise from inside torch that they do not run on such arguments."""
    try:
        yield
    except (RuntimeError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError | NotImplementedError):
            raise
        tensors = "a tensor of shape {} and dtype {}"
        each = (
            tensors.format(tuple(x.shape), x.dtype) if isinstance(x, Tensor) else f"a {type(x).__name__}" for x in args
        )
        got = ", ".join(each) or "no data"
        raise ValueError(
            f"the programs do not run on {got}: {' '.join(str(error).split())[:200]} ({type(error).__name__}). Wanted "
            "what they take, such as a tensor (B, *x_shape) of their type."
        ) from error
