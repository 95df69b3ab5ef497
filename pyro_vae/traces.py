"""Log densities read from Pyro programs: for K samples z_k ~ q(z | x) and B data the table

    log p(x, z_k)   and   log q(z_k | x)        each (K, B), in nats.

Inner plates are summed out, masks applied, and a constant scale common to all sites, as subsampling gives, is handed on
beside the table; any other is refused by name.

A ``Delta`` of the model is a value that is recorded, not a latent. A ``Delta`` of the guide that auxiliary sites feed
(Pyro's automatic guides, see `pyro_vae.auxiliary`) has its density there: where an auxiliary site u feeds one latent z
alone, log q(z | x) is that of u and of the ``Delta`` together. Where all data share one auxiliary site
(``AutoDiagonalNormal`` and its kin draw one vector for the whole data set), q(z_1, ..., z_N) does not fall apart into
data. The table then has a single column, which stands for all N data together (`Particles.num_data`): log of a mean
weight is a bound on log p(x_1, ..., x_N).

Programs run here as they are: their networks in the mode that they are in, and batch statistics move where they would.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import pyro
import torch
from pyro import poutine
from pyro.distributions import Delta
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_vae.auxiliary import feeds, points_among
from pyro_vae.options import integer, of_guide, of_model, of_pair
from pyro_vae.parameters import own_parameters
from pyro_vae.randomness import forked
from pyro_vae.refusals import in_words, wrong_site
from pyro_vae.sites import (
    PARTICLES,
    Frame,
    common_scale,
    data_frame,
    delta,
    depth,
    deterministic,
    is_masked,
    is_subsample,
    kind,
    masked_apart,
    plates,
    sample_sites,
    site_log_prob,
    site_value,
    unwrapped,
)

Program: TypeAlias = Callable[..., Any]

_AS_DRAWN = "Use estimator='reparameterized' or particles(), which score as they draw"


class Particles(NamedTuple):
    """K samples of the latents for each of B data, as log densities in nats.

    Attributes:
        log_likelihood: log p(x | z_k), (K, B), summed over observed sites.
        log_prior: log p(z_k) per latent site, (K, B) each.
        log_q: log q(z_k | x) per latent site, (K, B) each; none for point sites.
        latents: The samples, (K, *plates, *event) each: (K, B, D) in a plain VAE.
        scale: A constant scale common to all sites (N / B under subsampling). It
            multiplies a bound per datum, outside any logsumexp.
        points: Guide sites that are points (``Delta``) and carry no density.
        fixed: Guide sites whose sampler is not reparameterised.
        posteriors: The distributions at the guide's sites, as the program gave them
            (batch_shape with the K samples in front where K > 1); empty where the
            samples were drawn one by one.
        priors: Those at the model's latent sites.
        joint: How many data the one column stands for, where the guide has one density
            for all of them; 0 where each column is a datum.
        partial: Latent sites whose log_q is only a part of their density, since an auxiliary
            site that holds the rest feeds others too.
    """

    log_likelihood: Tensor
    log_prior: dict[str, Tensor]
    log_q: dict[str, Tensor]
    latents: dict[str, Tensor]
    scale: float = 1.0
    points: tuple[str, ...] = ()
    fixed: tuple[str, ...] = ()
    posteriors: Mapping[str, Any] = {}
    priors: Mapping[str, Any] = {}
    joint: int = 0
    partial: tuple[str, ...] = ()

    @property
    def num_data(self) -> int:
        """How many data the columns stand for."""
        return self.joint or self.log_likelihood.shape[1]

    @property
    def log_joint(self) -> Tensor:
        """log p(x, z_k), (K, B)."""
        return functools.reduce(torch.add, self.log_prior.values(), self.log_likelihood)

    @property
    def log_weight(self) -> Tensor:
        """log w_k = log p(x, z_k) - log q(z_k | x), (K, B).

        Raises:
            ValueError: The guide has a point site, so there is no q(z | x).
        """
        if self.points:
            raise ValueError(
                f"guide site {self.points[0]!r} is a point (Delta) without a density: it has no ELBO, no "
                "importance weights and no log p(x) estimate. Train it with Objective(reconstruction), "
                "or give the site a distribution such as Guide(DiagonalNormal(...))."
            )
        return functools.reduce(torch.sub, self.log_q.values(), self.log_joint)


class Simulation(NamedTuple):
    """A draw from a model: its latent and its observed sites, by name."""

    latents: dict[str, Tensor]
    observations: dict[str, Tensor]


class Cut(Messenger):
    """Cuts the graph at every latent that a guide draws, and keeps both of its ends, per run of the guide (`passes`).

    The draw z, live in the guide's parameters, is kept aside; the rest of the guide and the model see a detached copy
    of it that asks for a gradient: log densities become functions of (z, parameters) as two independent things.
    """

    def __init__(self) -> None:
        super().__init__()
        self.passes: list[list[tuple[Tensor, Tensor]]] = []

    def __enter__(self) -> Cut:
        self.passes.append([])
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        drawn_already = msg["done"] or msg["is_observed"] or msg["value"] is not None
        if drawn_already or is_subsample(msg["fn"]):
            return
        live = msg["fn"](*msg["args"], **msg["kwargs"])
        msg["value"] = live.detach()
        if live.requires_grad:
            msg["value"].requires_grad_()
            self.passes[-1].append((live, msg["value"]))

    def pathwise(self, target: Tensor) -> Tensor:
        """A scalar whose gradient is that of the target, a function of the copies, along the samples, and nowhere else.

        With G the gradient of the target at the copies, sum <G, z> over the live z; zero where none has a gradient. A
        later site of a layered guide was drawn given the copies of earlier ones, so what reaches it is carried on to
        them, from the last site to the first.
        """
        copies = [copy for drawn in self.passes for _, copy in drawn]
        total = target.new_zeros(())
        if not copies or not target.requires_grad:
            return total
        found = iter(torch.autograd.grad(target, copies, retain_graph=True, allow_unused=True))
        for drawn in self.passes:
            gradients = [next(found) for _ in drawn]
            for last in reversed(range(len(drawn))):
                if gradients[last] is None:
                    continue
                term = (gradients[last] * drawn[last][0]).sum()
                total = total + term
                earlier = [copy for _, copy in drawn[:last]]
                if earlier:
                    for i, extra in enumerate(torch.autograd.grad(term, earlier, retain_graph=True, allow_unused=True)):
                        if extra is not None:
                            gradients[i] = extra if gradients[i] is None else gradients[i] + extra
        return total


@of_pair  # type: ignore[arg-type]  # mypy joins no names with **kwargs
def particles(
    model: Program,
    guide: Program,
    *args: Any,
    num_samples: int = 1,
    vectorize: bool | None = None,
    max_plate_nesting: int | None = None,
    **kwargs: Any,
) -> Particles:
    """Draw z_1, ..., z_K ~ q(z | x) and score them under model and guide.

    All K are drawn in one pass under a particle plate where the pair broadcasts over
    leading dimensions, one by one where it does not (a warning says so once).

    Args:
        model: A Pyro program for p(x, z).
        guide: A Pyro program for q(z | x).
        args: What both take, usually the batch.
        num_samples: K.
        vectorize: True or False to insist; None to try.
        max_plate_nesting: Depth of the pair's plates; None runs the pair once to see
            (without touching the random state).
        kwargs: Keyword arguments that both take.
    Returns:
        The table of log densities, each (K, B).
    Raises:
        ValueError: No plate is shared by all sites; a latent lies outside it; model
            and guide disagree on the latents; a batch dimension belongs to no plate;
            the sites carry different scales; model and guide mask a latent differently; a
            latent is to be enumerated (summed out); the model observes nothing, as where the pair is swapped.
    Example:
        >>> import pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> weights = particles(model, guide, torch.zeros(2), num_samples=3).log_weight
        >>> torch.allclose(weights, dist.Normal(0.0, 2**0.5).log_prob(torch.zeros(3, 2)))
        True
    """
    with own_parameters(model, guide):
        with contextlib.nullcontext() if vectorize else _taking(args):
            found = draw(model, guide, args, kwargs, num_samples, vectorize, max_plate_nesting)
        if not _recording():
            if bool(found.log_likelihood.isnan().any()) or any(bool(v.isnan().any()) for v in found.log_q.values()):
                reason = wrong_site((guide, model), args, kwargs)
                raise ValueError(reason or "a log density of the pair is nan. Look at its data and its weights.")
            if not bool(found.log_likelihood.any()):  # of nothing observed, as of a guide in the model's place
                with forked(), torch.no_grad():
                    observed = [name for name, site in sites(model, *args, **kwargs).items() if site["is_observed"]]
                if not observed:
                    raise ValueError(
                        "the model observes nothing, so there is no p(x): wanted pyro.sample(name, distribution, "
                        "obs=x). The order is (model, guide, data)."
                    )
        return found


def draw(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int = 1,
    vectorize: bool | None = None,
    max_plate_nesting: int | None = None,
    cut: Cut | None = None,
) -> Particles:
    """As `particles`, leaving parameters to the surrounding handlers (for Pyro's ELBOs).

    With a `Cut`, the log densities are functions of detached samples.
    """
    num_samples = integer("num_samples", num_samples)
    if num_samples == 1:
        return _one_pass(model, guide, args, kwargs, 1, 0, cut)
    if vectorize is not False:
        if max_plate_nesting is None:
            max_plate_nesting = nesting_of(model, guide, args, kwargs)
        try:
            return _one_pass(model, guide, args, kwargs, num_samples, max_plate_nesting, cut)
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            if vectorize:
                raise
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if cut is not None:
            cut.passes.clear()
    singles = [_one_pass(model, guide, args, kwargs, 1, 0, cut) for _ in range(num_samples)]
    if vectorize is None:
        warnings.warn(
            f"drawing {num_samples} samples one by one, since the pair does not broadcast over a leading "
            f"dimension ({reason}). It takes longer, and estimates the same. Write networks and programs for (..., D) "
            "instead of (B, D); or silence this by warnings.filterwarnings('ignore', 'drawing .* one by one').",
            stacklevel=4,
        )
    return _stack(singles)


@of_model
def log_joint(model: Program, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """log p(x, z_k) of given latents.

    Args:
        model: A Pyro program for p(x, z).
        latents: Values per latent site, (K, *plates, *event), as `Particles.latents`.
        args: What the model takes.
        kwargs: Keyword arguments that the model takes.
    Returns:
        Log densities in nats, (K, B), without the constant scale that all sites share.
    Raises:
        ValueError: A latent site has no value, or the sites carry different scales.
    """
    with own_parameters(model), _taking(args), in_words((model,), args, kwargs):
        trace, frame = _replayed(model, latents, args, kwargs)
        common_scale([trace])
        return sum((site_log_prob(site, frame) for site in sample_sites(trace)), torch.zeros(()))


@of_guide
def log_q(guide: Program, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """log q(z_k | x) of given latents, also of samples that the guide did not draw.

    Args:
        guide: A Pyro program for q(z | x).
        latents: Values per latent site, (K, *plates, *event), as `Particles.latents`.
        args: What the guide takes.
        kwargs: Keyword arguments that the guide takes.
    Returns:
        Log densities in nats, (K, B), without the constant scale that all sites share.
    Raises:
        ValueError: A latent has no value, the guide has a point site, its distribution cannot
            score a sample that it did not draw, or the sites carry different scales.
    """
    with own_parameters(guide), _taking(args), in_words((guide,), args, kwargs):
        look = functools.partial(_refuse_points, guide, args, kwargs)
        trace, frame = _replayed(guide, latents, args, kwargs, look=look)
        common_scale([trace])
        return sum((_log_q_of(site, frame, True) for site in sample_sites(trace)), torch.zeros(()))


def _refuse_points(guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any], trace: Trace) -> None:
    for name in points_among(guide, sample_sites(trace), args, kwargs):
        raise ValueError(f"guide site {name!r} is a point (Delta) without a density.")
    for site in sample_sites(trace):
        if not site["is_observed"] and delta(site["fn"]) is not None:
            raise _carries_its_own(site["name"])


@of_model
def simulate(model: Program, *args: Any, **kwargs: Any) -> Simulation:
    """Draw latents and data from a model, whatever it was observing.

    The data are the sites that it observes with these arguments; where it observes
    none, as `Model` with size=n, the last site.

    Args:
        model: A Pyro program for p(x, z).
        args: What the model takes (a batch serves for its shape only).
        kwargs: Keyword arguments, such as size=100 for `Model`.
    Returns:
        The latent and the observed sites.
    """
    with own_parameters(model), torch.no_grad(), _taking(args), in_words((model,), args, kwargs):
        observed = poutine.trace(model).get_trace(*args, **kwargs)
        trace = poutine.trace(poutine.uncondition(model)).get_trace(*args, **kwargs)
    # Run as a prior, a model that takes no data says which site is the data by its name.
    data = [s["name"] for s in sample_sites(observed) if s["is_observed"]]
    data = data or [[s for s in sample_sites(observed) if not deterministic(s)][-1]["name"]]
    values = {site["name"]: site["value"] for site in sample_sites(trace) if not deterministic(site)}
    return Simulation(
        {name: value for name, value in values.items() if name not in data},
        {name: value for name, value in values.items() if name in data},
    )


def predict(model: Program, latents: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """Draw data x_k ~ p(x | z_k) at given latents, one for each: (K, *plates, *event) per observed site.

    `latents` have values per latent site, (K, *plates, *event), as `Particles.latents`; one without is a ValueError.
    The model's arguments serve for their shape only.
    """
    with own_parameters(model), torch.no_grad():
        data = [name for name, site in sites(model, *args, **kwargs).items() if site["is_observed"]]
        trace, frame = _replayed(poutine.uncondition(model), latents, args, kwargs, free=data)
        return {name: site_value(trace.nodes[name], frame) for name in data}


def plate_nesting(model: Program, guide: Program, *args: Any, **kwargs: Any) -> int:
    """How many batch dimensions the pair's plates occupy, without touching the random state; a guide of one density for
    all data is a ValueError."""
    with forked(), torch.no_grad():
        guide_trace, model_trace = traced(model, guide, args, kwargs)
        fed = feeds(guide, sample_sites(guide_trace), args, kwargs)
    inside = set.intersection(*({*plates(site)} for site in sample_sites(model_trace)), {*range(-9, 0)})
    for name in {source for sources in fed.values() for source in sources}:
        if inside - {*plates(guide_trace.nodes[name])}:
            raise ValueError(
                f"guide site {name!r} is one density for all data, outside their plate, so that nothing is known of "
                "single data. elbo_terms and log_likelihood take it as it is; for the rest use a guide with a density "
                "for each datum, such as AutoNormal."
            )
    return max(depth(guide_trace), depth(model_trace))


def nesting_of(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """As `plate_nesting`, for whoever takes densities of all data together too."""
    with forked(), torch.no_grad():
        return max(depth(trace) for trace in traced(model, guide, args, kwargs))


def traced(model: Program, guide: Program, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Trace, Trace]:
    """One run of the guide, and one of the model at its draws."""
    with in_words((guide, model), args, kwargs):
        guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
        return guide_trace, poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)


class Layout(NamedTuple):
    """Where a pair's data lie, as one run of it showed: how many batch dimensions the plates occupy, how many data one
    density is of (as `Particles.joint`), and B, where the data plate picks B of N rows at random by itself; else 0.
    """

    nesting: int
    joint: int
    subsampled: int


def layout(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Layout:
    """Run and score a pair once for its plates, without touching the random state; it raises as `particles`, and what
    torch or Pyro raise where the pair does not take these data."""
    with forked(), torch.no_grad():
        guide_trace, model_trace = traced(model, guide, args, kwargs)
        fed = feeds(guide, sample_sites(guide_trace), args, kwargs)
        shared = {source for sources in fed.values() for source in sources}
        nesting = max(depth(guide_trace), depth(model_trace))
        frame = data_frame([guide_trace, model_trace], 1, nesting, joint=shared, args=args)
        for site in (*sample_sites(guide_trace), *sample_sites(model_trace)):
            site_log_prob(site, frame)  # what was drawn for other data shows here
    fns: list[Any] = [site.get("fn") for site in guide_trace.nodes.values()]
    picks = [fn for fn in fns if is_subsample(fn)]
    random = any(fn.subsample_size == frame.data_size < fn.size for fn in picks)
    return Layout(nesting, frame.data_size if frame.joint else 0, frame.data_size if random else 0)


def sites(program: Program, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The sample sites of a program by name, as Pyro's trace holds them, from one run."""
    with own_parameters(program), forked(), torch.no_grad(), in_words((program,), args, kwargs):
        return {site["name"]: site for site in sample_sites(poutine.trace(program).get_trace(*args, **kwargs))}


def _one_pass(
    model: Program,
    guide: Program,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    num_samples: int,
    nesting: int,
    cut: Cut | None = None,
) -> Particles:
    """The table of one run of the pair, under a particle plate where there are several samples."""
    with in_words((guide, model), args, kwargs):
        given = guide
        if num_samples > 1:
            plate = functools.partial(pyro.plate, PARTICLES, num_samples, dim=-1 - nesting)
            guide, model = plate()(guide), plate()(model)
        if cut is not None:
            guide = cut(guide)  # outside the plate, so that it sees distributions already expanded
        guide_trace, model_trace = traced(model, guide, args, kwargs)
        drawn = {s["name"]: s for s in sample_sites(guide_trace)}
        unobserved = {s["name"]: s for s in sample_sites(model_trace) if not s["is_observed"]}
        latent = {name: s for name, s in unobserved.items() if name in drawn or not deterministic(s)}
        _refuse_unmatched(latent, drawn)
        points = points_among(given, drawn.values(), args, kwargs)
        fed = feeds(given, drawn.values(), args, kwargs)
        shared = {source for sources in fed.values() for source in sources}
        if not _recording() and (reason := other_mask(latent, drawn, points, fed)):
            raise ValueError(reason)
        frame = data_frame([guide_trace, model_trace], num_samples, nesting, joint=shared, args=args)
        scored = [site_log_prob(s, frame) for s in sample_sites(model_trace) if s["name"] not in latent]
        zero = torch.zeros((num_samples, frame.columns))
        log_q = {name: _log_q_of(site, frame, cut is not None) for name, site in drawn.items() if name not in points}
        log_q, partial = _merged(log_q, fed)
        return Particles(
            log_likelihood=functools.reduce(torch.add, scored) if scored else zero,
            log_prior={name: site_log_prob(site, frame) for name, site in latent.items()},
            log_q=log_q,
            latents={name: site_value(site, frame) for name, site in drawn.items() if not site["is_observed"]},
            scale=common_scale([guide_trace, model_trace]),
            points=points,
            fixed=tuple(name for name, site in drawn.items() if not getattr(site["fn"], "has_rsample", False)),
            posteriors={name: site["fn"] for name, site in drawn.items()},
            priors={name: site["fn"] for name, site in latent.items()},
            joint=frame.data_size if frame.joint else 0,
            partial=partial,
        )


def _recording() -> bool:
    """Whether the run is being recorded, so that values may not be looked at."""
    if get_proxy_mode() is not None or torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def other_mask(
    latent: Mapping[str, Any], drawn: Mapping[str, Any], points: tuple[str, ...], fed: Mapping[str, tuple[str, ...]]
) -> str | None:
    """Why the masks of a pair make its weights no weights, as a latent counts in log p(x, z) and in log q(z | x) at
    different places; None if they do not."""
    for name, prior in latent.items():
        site = drawn.get(name)
        if site is None or site["is_observed"] or name in points:
            continue
        parts = [drawn[source] for source in fed.get(name, ()) if source in drawn]
        if not any(is_masked(part) for part in (prior, site, *parts)):
            continue
        inner = delta(site["fn"]) if parts else None
        if inner is None or bool((inner.log_density != 0).any()):
            parts.append(site)
        if masked_apart(prior, parts):
            remedy = (
                f" Draw it in the guide under the mask's opposite: with poutine.mask(mask=~obs_mask): "
                f"pyro.sample({name!r}, ...)."
                if name.endswith("_unobserved")
                else " Put the same poutine.mask(mask=...) around the site in both programs, or around none."
            )
            return (
                f"latent site {name!r} is masked in one way by the model and in another by the guide, so that one of "
                "log p(z) and log q(z | x) counts where the other does not: the result would not be a bound." + remedy
            )
    return None


def _refuse_unmatched(latent: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
    """Refuse a pair whose guide does not draw exactly the model's latents, and auxiliary sites."""
    missing = [name for name in latent if name not in drawn]
    if missing and latent[missing[0]]["infer"].get("enumerate"):
        raise ValueError(
            f"latent site {missing[0]!r} of the model is marked to be enumerated and the guide, which has "
            f"{list(drawn)}, does not draw it, but particles hold a value of every latent. Train the pair with "
            f"Pyro's TraceEnum_ELBO, and give a model in which {missing[0]!r} is summed out (of the zoo's Mixture "
            "its pair.marginal, with a mixture as prior), or a guide that draws it."
        )
    if missing:
        raise ValueError(
            f"latent site {missing[0]!r} of the model has no counterpart in the guide, which has {list(drawn)}."
            f"{missing_values(missing[0])}"
        )
    unmatched = [site for name, site in drawn.items() if name not in latent and not site["is_observed"]]
    extra = [site["name"] for site in unmatched if not site["infer"].get("is_auxiliary")]
    if extra:
        raise ValueError(
            f"guide site {extra[0]!r} has no counterpart among the model's latent sites, {list(latent)}. "
            'Rename it, or mark it infer={"is_auxiliary": True}.'
        )


@contextlib.contextmanager
def _taking(args: tuple[Any, ...]) -> Iterator[None]:
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


def missing_values(name: str) -> str:
    """What to do about the site that ``pyro.sample(..., obs=x, obs_mask=mask)`` makes of what was not observed."""
    if not name.endswith("_unobserved"):
        return ""
    data = name.removesuffix("_unobserved")
    return (
        f" It is what obs_mask makes of the values of {data!r} that were not observed. Draw it in the guide "
        f"under the mask's opposite, with poutine.mask(mask=~obs_mask): pyro.sample({name!r}, ...); or leave what was "
        "not observed out of the likelihood: with poutine.mask(mask=obs_mask) around "
        f"pyro.sample({data!r}, ..., obs=...)."
    )


def _merged(log_q: dict[str, Tensor], fed: Mapping[str, tuple[str, ...]]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The density of an auxiliary site counted at the latent that it feeds, where that is one; and the others."""
    users = {source: [name for name, sources in fed.items() if source in sources] for source in log_q}
    moved = {source: names[0] for source, names in users.items() if len(names) == 1}
    merged = {name: value for name, value in log_q.items() if name not in moved}
    for source, name in moved.items():
        merged[name] = merged[name] + log_q[source]
    partial = {name for names in users.values() if len(names) > 1 for name in names}
    return merged, tuple(name for name in fed if name in partial)


def _log_q_of(site: Any, frame: Frame, foreign: bool) -> Tensor:
    """log q of a guide's site; where it is foreign, of a sample that its distribution does not know."""
    name = site["name"]
    if foreign and isinstance(unwrapped(site["fn"]), Delta):
        raise _carries_its_own(name)
    try:
        return site_log_prob(site, frame)
    except (KeyError, NotImplementedError) as error:
        if not foreign:
            raise
        raise ValueError(
            f"guide site {name!r} ({kind(site['fn'])}) cannot score a sample that it did not draw: its transform has "
            f"no inverse. {_AS_DRAWN}, or a posterior with an inverse, such as a coupling flow."
        ) from error


def _carries_its_own(name: str) -> ValueError:
    return ValueError(
        f"guide site {name!r} is a Delta that carries the density of its own draw, so it cannot score a sample that it "
        f"did not draw. {_AS_DRAWN}."
    )


def _stack(singles: list[Particles]) -> Particles:
    def joined(field: str) -> dict[str, Tensor]:
        return {name: torch.cat([getattr(p, field)[name] for p in singles]) for name in getattr(singles[0], field)}

    tables: Any = {field: joined(field) for field in ("log_prior", "log_q", "latents")}
    log_likelihood = torch.cat([p.log_likelihood for p in singles])
    return singles[0]._replace(posteriors={}, priors={}, log_likelihood=log_likelihood, **tables)


def _replayed(
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
