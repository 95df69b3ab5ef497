"""Unamortized posteriors: the best member of a family for each datum, by gradient steps.

    q*(z | x_n) = q(z; lambda_n),   lambda_n = argmax ELBO(x_n; lambda)

A guide's local form has the same distributions at its sites, with free parameters in rows, one row per datum, and no
network between. An `Amortized` posterior says what its family is made of (`Amortized.local`), a flow's own weights
included; of any other distribution the parameters are taken and their constraints lifted; where a later site depends on
the draw of an earlier one, the guide is run, and what is free is added to what it gives. `climbs` finds the rows.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta, TorchDistribution
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from pyro_vae.protocols import Free, Local, Rescoring, has_start, knows_its_draw, rescoring
from pyro_vae.sites import Frame, data_frame, depth, kind, sample_sites, unwrapped
from pyro_vae.traces import Program
from pyro_vae.unconstrained import Heads, Moved, free_parameters, heads_of, local_of


class LocalForm(NamedTuple):
    """A family for a batch of data, with a row of free parameters each."""

    start: Tensor  # where the rows start, (B, P)
    relative_rates: Tensor  # relative learning rate of each column, (P,)
    guide: Callable[..., Program]  # from rows (B', P) to a guide of as many data
    origin: Any  # the guide or the posterior that it was made of, and whose code runs in it
    rescoring: Rescoring = "one pass"  # what it takes to score a draw that it did not make, as of a posterior


def local_form(guide: Program, args: tuple[Any, ...], start: str = "guide") -> LocalForm:
    """The local form of a guide at a batch, from the guide's own values, or "fresh" near mean 0 and variance 1.

    Raises:
        ValueError: It has none, and why: a point, an auxiliary or unreparameterised site, or a distribution that is
            not made of parameters.
    """
    with torch.no_grad():
        with Heads(heads_of(guide)) as first:
            sites, frame = _run(guide, args)
        with Heads(first.posteriors) as second:
            again, _ = _run(guide, args)
    for site in sites.values():
        _check(site)
    pieces = _pieces(list(sites.values()), first, frame)
    elsewhere = _pieces([again[name] for name in sites], second, frame)
    free, others = ([piece.local.free for piece in found] for found in (pieces, elsewhere))
    if not all(torch.equal(one[key], two[key]) for one, two in zip(free, others, strict=True) for key in one):
        if start == "fresh":
            raise ValueError("its sites depend on each other's draws, so its networks stay and there is no fresh start")
        return _dependent(guide, pieces, first)
    if start == "fresh":
        pieces = [piece.fresh() for piece in pieces]
    return _independent(guide, pieces)


def family_form(posterior: Any, model: Program, args: tuple[Any, ...], loc: Tensor, scale: Tensor) -> LocalForm:
    """The local form of a family (`Amortized`) that no encoder was trained for, of a model's only latent site, in the
    data plate, at a batch: it starts at loc, as wide as scale, (B, D)."""
    with torch.no_grad():
        sites, frame = _run(model, args)
        site: Any = next(iter(sites.values()), None)
        if len(sites) != 1 or site["fn"].event_dim != 1 or len(site["fn"].batch_shape) != 1:
            raise ValueError(
                f"got a family for a model of latent sites {list(sites)}, wanted one "
                "site of event_shape (D,). Give a guide of all its sites instead, fitted by fit_guide."
            )
        local = posterior.local(posterior.parameters_near(loc, scale))
    return _independent(posterior, [_Piece(site, local, 0, frame.data_dim, posterior)])


def by_name(own: Program, families: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Program]]:
    """The guide's own first, under its own name where it is among the families; and those that are guides."""
    name = next((name for name, value in families.items() if value is own or value == own), "guide")
    named = {name: own} | {other: value for other, value in families.items() if other != name}
    return named, {name: value for name, value in named.items() if is_guide(value)}


def is_guide(value: Any) -> bool:
    """Whether a family is given by a fitted guide."""
    return callable(value) and not _is_class(value) and not has_start(value)


def _is_class(value: Any) -> bool:
    return isinstance(value.func if isinstance(value, functools.partial) else value, type)


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
    if not _is_class(value):
        return value
    z = latent()
    posterior = value(_NoEncoder(), z.shape[-1])
    if not has_start(posterior):
        raise ValueError(
            f"families[{name!r}] makes a {type(posterior).__name__}, which has no local form. Derive it from "
            "Amortized, or give a guide fitted by fit_guide."
        )
    return posterior.to(dtype=z.dtype, device=z.device).eval()


class Unscaled(Messenger):
    """Takes scales off all sites, as a bound per datum is without them."""

    def _pyro_sample(self, msg: Any) -> None:
        msg["scale"] = 1.0


def _run(program: Program, args: tuple[Any, ...]) -> tuple[dict[str, Any], Frame]:
    """The latent sites of one run, and where their data lie."""
    trace = poutine.trace(program).get_trace(*args)
    sites = {site["name"]: site for site in sample_sites(trace) if not site["is_observed"]}
    return sites, data_frame([trace], 1, depth(trace), args=args)


def _check(site: Any) -> None:
    name, found = site["name"], kind(site["fn"])
    if isinstance(unwrapped(site["fn"]), Delta):
        raise ValueError(f"guide site {name!r} is a Delta, which is not a family of distributions")
    if not getattr(site["fn"], "has_rsample", False):
        raise ValueError(f"guide site {name!r} ({found}) is not reparameterised")
    if (site["infer"] or {}).get("is_auxiliary"):
        raise ValueError(f"guide site {name!r} is auxiliary, so it is no part of z")


class _Piece(NamedTuple):
    """One site's family, and where its data lie."""

    site: Any
    local: Local
    axis: int
    data_dim: int
    posterior: Any = None
    head: str | None = None

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the free tensors without their data."""
        return {k: tuple(v.movedim(self.axis, 0).shape[1:]) for k, v in self.local.free.items()}

    @property
    def width(self) -> int:
        """P, of a row."""
        return sum(map(math.prod, self.shapes.values()))

    def pack(self, free: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([v.movedim(self.axis, 0).reshape(v.shape[self.axis], -1) for v in free.values()], 1)

    def unpack(self, rows: Tensor) -> Free:
        sizes = [math.prod(shape) for shape in self.shapes.values()]
        parts = zip(self.shapes.items(), rows.split(sizes, 1), strict=True)
        return {k: part.reshape(len(rows), *shape).movedim(0, self.axis) for (k, shape), part in parts}

    def relative_rates(self) -> Tensor:
        rates, some = self.local.rates, next(iter(self.local.free.values()))
        return torch.cat([some.new_full((math.prod(s),), rates.get(k, 1.0)) for k, s in self.shapes.items()])

    def fresh(self) -> _Piece:
        if self.posterior is None:
            return self._replace(local=self.local._replace(free={k: v * 0 for k, v in self.local.free.items()}))
        parameters = self.local.free["parameters"]
        loc = parameters.new_zeros(*parameters.shape[:-1], self.posterior.latent_dim)
        return self._replace(local=self.posterior.local(self.posterior.parameters_near(loc, loc + 1)))


def _pieces(sites: list[Any], outputs: Heads, frame: Frame) -> list[_Piece]:
    """The family of each site: as its posterior offers it, or as its distribution is made."""
    offered: list[tuple[str, Any, Tensor]] = []
    if outputs.cover(sites):
        offered = [(name, outputs.posteriors[name], out) for name, out in outputs.returned.items()]
        shapes = [tuple(posterior.family(out).batch_shape) for _, posterior, out in offered]
        if shapes != [tuple(site["fn"].batch_shape) for site in sites]:
            offered = []
    pieces = []
    for number, site in enumerate(sites):
        axis = len(site["fn"].batch_shape) + frame.data_dim
        if offered:
            name, posterior, out = offered[number]
            pieces.append(_Piece(site, local_of(posterior, out), axis, frame.data_dim, posterior, name))
        else:
            pieces.append(_Piece(site, Local(*free_parameters(site["fn"])), axis, frame.data_dim))
    return pieces


def _independent(origin: Any, pieces: list[_Piece]) -> LocalForm:
    """Sites whose distributions depend on x only: no network runs."""
    widths = [piece.width for piece in pieces]

    def guide(rows: Tensor, still: Tensor | None = None) -> Program:
        def program(*_: Any, **__: Any) -> None:
            plates: dict[str, Any] = {}
            for number, (piece, part) in enumerate(zip(pieces, rows.split(widths, 1), strict=True)):
                q = piece.local.build(piece.unpack(part))
                if still is not None and not knows_its_draw(q):
                    held = still.split(widths, 1)[number]
                    q = _Landing(q, piece.local.build(piece.unpack(held)))
                with _plates(piece, len(rows), plates):
                    pyro.sample(piece.site["name"], q)

        return program

    start = torch.cat([piece.pack(piece.local.free) for piece in pieces], 1)
    return _form(origin, pieces, start.detach().clone(), guide)


def _dependent(guide: Program, pieces: list[_Piece], outputs: Heads) -> LocalForm:
    """Sites that depend on earlier draws: what is free is added to what the guide gives."""
    by_head = all(piece.head is not None for piece in pieces)
    if by_head:  # of a flow the numbers of the head only
        found = outputs.returned
        pieces = [p._replace(local=Local({"parameters": found[p.head or ""]}, p.local.build)) for p in pieces]
    widths = [piece.width for piece in pieces]

    def local(rows: Tensor, still: Tensor | None = None) -> Program:
        parts = zip(pieces, rows.split(widths, 1), strict=True)
        changes = {piece.head or piece.site["name"]: piece.unpack(part) for piece, part in parts}
        if not by_head:
            return Unscaled()(Moved(changes)(guide))

        def program(*args: Any, **kwargs: Any) -> Any:
            with Heads(outputs.posteriors, {name: free["parameters"] for name, free in changes.items()}):
                return guide(*args, **kwargs)

        return Unscaled()(program)

    start = torch.cat([torch.zeros_like(piece.pack(piece.local.free)) for piece in pieces], 1)
    return _form(guide, pieces, start, local)


def _form(origin: Any, pieces: list[_Piece], start: Tensor, guide: Callable[..., Program]) -> LocalForm:
    rates = torch.cat([piece.relative_rates() for piece in pieces])
    return LocalForm(start, rates, guide, origin, rescoring(*(piece.posterior for piece in pieces)))


@contextlib.contextmanager
def _plates(piece: _Piece, size: int, made: dict[str, Any]) -> Iterator[None]:
    """The plates that a site lay in, opened again for so many data."""
    with contextlib.ExitStack() as stack:
        for frame in piece.site["cond_indep_stack"]:
            if frame.name not in made:
                count = size if frame.dim == piece.data_dim else frame.size
                made[frame.name] = pyro.plate(frame.name, count, dim=frame.dim)
            stack.enter_context(made[frame.name])
        yield


class _Landing(TorchDistribution):
    """Draws from one distribution and scores by the same one at still parameters, so that the gradient of the ELBO goes
    through the sample alone. The part left out is zero on average; without it the noise vanishes at the posterior.

    Reference: Roeder, Wu and Duvenaud, Sticking the Landing, 2017. arXiv:1703.09194
    """

    has_rsample = True

    def __init__(self, live: Any, still: Any) -> None:
        self.live, self.still = live, still
        super().__init__(live.batch_shape, live.event_shape, validate_args=False)

    @property
    def support(self) -> Any:
        return self.live.support

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Landing:
        return _Landing(self.live.expand(batch_shape), self.still.expand(batch_shape))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.live.rsample(sample_shape)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        with torch.no_grad():
            return self.rsample(sample_shape)

    def log_prob(self, value: Tensor) -> Tensor:
        return self.still.log_prob(value)
