"""The rules of what goes together, one table: each is a function of a `Case` to a reason, or None. Notes are what is
allowed and should be known.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from pyro import infer, poutine
from pyro.distributions import Delta
from pyro.poutine.trace_struct import Trace
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from pyro_vae.auxiliary import auxiliary_among, feeds, undetermined
from pyro_vae.inference.cases import Case
from pyro_vae.inference.estimators import needs_path
from pyro_vae.inference.objectives import Objective
from pyro_vae.parameters import own_parameters, trainable
from pyro_vae.protocols import passes, support, support_name
from pyro_vae.randomness import forked
from pyro_vae.sites import delta, deterministic, is_masked, kind, plates, unwrapped
from pyro_vae.traces import missing_values, other_mask

# Supports of no volume: a density on one is not comparable with a density on the space around it.
_THIN = {"sphere", "simplex", "corrcholesky", "corrmatrix"}
# Scores of single samples by single networks in a step from which it takes seconds.
_MANY_PASSES = 20_000


def _no_density(case: Case) -> str | None:
    if case.point is None or isinstance(case.loss, Objective):
        return None
    return (
        f"the guide has a point site (Delta) without a density, so it has no ELBO, and {type(case.loss).__name__} does "
        "not apply. Use loss=Objective(reconstruction), or Objective(map_estimate) for maximum a posteriori."
    )


def _not_drawn(case: Case) -> str | None:
    if isinstance(case.loss, Objective):
        return None  # refuses it in its own words
    for name, site in case.model_sites.items():
        if site["is_observed"] or name in case.guide_sites or deterministic(site):
            continue
        marked = bool((site["infer"] or {}).get("enumerate"))
        if marked and isinstance(case.loss, infer.TraceEnum_ELBO | infer.TraceTMC_ELBO):
            continue
        remedy = (
            "The site is marked to be enumerated: take loss=TraceEnum_ELBO(max_plate_nesting=1), which sums it out."
            if marked
            else missing_values(name).strip()
            if name.endswith("_unobserved")
            else f"Draw {name!r} in the guide; a discrete site can be marked by pyro.infer.config_enumerate, for "
            "TraceEnum_ELBO."
        )
        return (
            f"latent site {name!r} of the model has no counterpart in the guide, which has {list(case.guide_sites)}: "
            f"{type(case.loss).__name__} would draw it from the prior and count log p without log q, which is no "
            f"bound. {remedy}"
        )
    return None


def _supports(case: Case) -> str | None:
    for name, site in case.guide_sites.items():
        prior = case.model_sites.get(name)
        if prior is None or site["is_observed"] or prior["is_observed"] or isinstance(unwrapped(site["fn"]), Delta):
            continue
        q, p = site["fn"], prior["fn"]
        who = f"guide site {name!r} ({kind(q)})"
        if tuple(q.event_shape) != tuple(p.event_shape):
            return (
                f"{who} has event_shape {tuple(q.event_shape)}, and the prior {tuple(p.event_shape)}. Give posterior "
                "and prior the same latent_dim."
            )
        try:
            (ours, theirs), (mine, other) = map(support, (q, p)), map(support_name, (q, p))
        except NotImplementedError:
            continue
        if ours.is_discrete != theirs.is_discrete:
            words = ("discrete", "continuous") if ours.is_discrete else ("continuous", "discrete")
            return f"{who} is {words[0]}, and the prior is {words[1]} ({kind(p)}). Give both the same support."
        thin = {mine, other} & _THIN
        value = site["value"]
        outside = not bool(value.isnan().any()) and not bool(p.support.check(value).all())
        if (thin and mine != other) or outside:
            return (
                f"{who} has the support {mine}, and the prior ({kind(p)}) the support {other}: the "
                "divergence between them is infinite or undefined. Give both the same support, such as VonMisesFisher "
                "with HypersphericalUniform, or DiagonalNormal with StandardNormal."
            )
    return None


def _masks(case: Case) -> str | None:
    found = (*case.model_sites.values(), *case.guide_sites.values())
    if not any(is_masked(site) for site in found if not site["is_observed"]):
        return None
    latent = {name: site for name, site in case.model_sites.items() if not site["is_observed"]}
    fed = feeds(case.guide, case.guide_sites.values(), case.batch, {})
    return other_mask(latent, case.guide_sites, case.points, fed)


def _batch_norm(case: Case) -> str | None:
    several = case.guide_modules if len(case.latents) > 1 else ()  # the first layer's network sees each datum once
    if case.together > 1 and any(isinstance(module, _BatchNorm) for module in (*case.model_modules, *several)):
        return (
            f"a network has batch normalisation, which would mix the {case.together} samples of a datum (and the data) "
            "in one mean, so that no density of a single datum is left. Use LayerNorm or GroupNorm, or one sample."
        )
    return None


def _mean_field(case: Case) -> str | None:
    """Pyro's condition: no parent of a site in the model is one of its descendants in the guide, as wherever the guide
    draws its sites in the model's order."""
    if not isinstance(case.loss, infer.TraceMeanField_ELBO):
        return None
    for name, site in case.guide_sites.items():
        inner = delta(site["fn"])
        if inner is not None and not site["is_observed"] and bool((inner.log_density != 0).any()):
            return (
                f"guide site {name!r} is a Delta that carries a density, which TraceMeanField_ELBO leaves out of the "
                "divergence. Use Trace_ELBO() or Objective(elbo)."
            )
    if len(case.latents) < 2:
        return None
    order = [name for name in case.model_sites if name in case.latents]
    if order == [name for name in case.latents if name in case.model_sites]:
        return None
    with torch.no_grad(), own_parameters(case.guide):
        one, two = (poutine.trace(case.guide).get_trace(*case.batch) for _ in range(2))
        for name in order:
            if name not in getattr(case.loss, "sites", order):
                continue  # its divergence is sampled
            later = case.latents[case.latents.index(name) + 1 :]
            for other in order[: order.index(name)]:
                # A site that the model draws before this one may not be drawn from it.
                if other in later and (moved := _depends(case, one, two, other, name)) is not False:
                    if moved is None:
                        return None
                    return (
                        "TraceMeanField_ELBO takes the divergence site by site, which is right only for independent "
                        "sites, or for a guide that draws them in the model's order, but guide site "
                        f"{other!r} depends on another ({name}), which the model draws after it. Use Trace_ELBO() or "
                        "Objective(elbo)."
                    )
    return None


def _depends(case: Case, one: Trace, two: Trace, name: str, source: str) -> bool | None:
    """Whether the distribution of a guide's site changes with the value of another, or None where it cannot tell."""
    mixed = Trace()
    for other in case.latents:
        mixed.add_node(other, **(two if other == source else one).nodes[other])
    values: list[Tensor] = []
    for given in (one, mixed):
        with forked():
            torch.manual_seed(0)  # for networks with dropout
            again = poutine.trace(poutine.replay(case.guide, trace=given)).get_trace(*case.batch)
        distribution: Any = again.nodes[name]["fn"]
        try:
            values.append(distribution.log_prob(one.nodes[name]["value"]))
        except (KeyError, NotImplementedError):
            return None
    return not torch.equal(values[0], values[1])


def _scale(case: Case) -> str | None:
    if not isinstance(case.loss, infer.RenyiELBO | infer.ReweightedWakeSleep | infer.TraceTailAdaptive_ELBO):
        return None
    for name, site in (*case.model_sites.items(), *case.guide_sites.items()):
        scale = site["scale"]
        if isinstance(scale, Tensor) or scale != 1:
            shown = float(scale) if not isinstance(scale, Tensor) or scale.numel() == 1 else tuple(scale.shape)
            return (
                f"site {name!r} carries the scale {shown} (subsampling or poutine.scale), which "
                f"{type(case.loss).__name__} would put inside the logarithm of a mean weight, where the result is no "
                "bound. Use Objective(iwae, num_samples=K), which keeps a common scale outside."
            )
    return None


def _renyi_of_joint(case: Case) -> str | None:
    """One density for all data, which Pyro would count once for each of them."""
    if not isinstance(case.loss, infer.RenyiELBO):
        return None
    shared = [{(dim, f.size) for dim, f in plates(site).items()} for site in case.model_sites.values()]
    common = set.intersection(*shared) if shared else set()
    for name in auxiliary_among(case.guide_sites.values()):
        if common - {(dim, f.size) for dim, f in plates(case.guide_sites[name]).items()}:
            return (
                f"guide site {name!r} is one density for all data, outside their plate, and RenyiELBO counts it once "
                "for each of them, so that its value is no bound. Use Objective(iwae, num_samples=K), or a guide with "
                "a density for each datum, such as AutoNormal."
            )
    return None


def _renyi_of_fixed(case: Case) -> str | None:
    if not isinstance(case.loss, infer.RenyiELBO) or case.loss.alpha != 0:
        return None
    for name in case.latents:
        if not getattr(case.guide_sites[name]["fn"], "has_rsample", False):
            return (
                f"guide site {name!r} has no reparameterised sampler, and RenyiELBO(alpha=0) gives such a guide a "
                "gradient of exactly zero. Use Objective(iwae, num_samples=K, estimator='score-function')."
            )
    return None


def _rescoring(case: Case) -> str | None:
    if case.rescoring != "impossible":
        return None
    name, loss = (case.latents or ["?"])[0], case.loss
    bound = getattr(loss.bound, "__name__", repr(loss.bound))
    which = f"estimator={loss.estimator!r}" if loss.estimator != "reparameterized" else f"the objective {bound}"
    return (
        f"guide site {name!r} ({kind(case.guide_sites[name]['fn'])}) cannot score a sample that it did not draw, which "
        f"{which} asks for. Use estimator='reparameterized' with a bound such as iwae or miwae, or a posterior with an "
        "inverse, such as a coupling flow."
    )


def _first_step(case: Case) -> str | None:
    """What only the loss itself can tell: it is evaluated once, on a copy."""
    if not isinstance(case.loss, Objective) or (case.point is not None and case.loss.estimator == "reparameterized"):
        return None
    with own_parameters(case.model, case.guide), forked(), torch.enable_grad():
        try:
            copy.copy(case.loss).differentiable_loss(case.model, case.guide, *case.batch)
        except ValueError as error:
            return str(error)
    return None


RULES: tuple[Callable[[Case], str | None], ...] = (
    _no_density,
    _not_drawn,
    lambda case: undetermined(case.guide, case.guide_sites.values(), case.batch, {}),
    _supports,
    _masks,
    _batch_norm,
    _mean_field,
    _scale,
    _renyi_of_joint,
    _renyi_of_fixed,
    _rescoring,
    _first_step,  # the last, since it evaluates the loss
)


def _slow(case: Case) -> str | None:
    if case.rescoring != "D passes":
        return None
    return (
        "this posterior scores a sample that it did not just draw in D passes, one per latent dimension, and "
        f"{case.loss!r} asks for that in every step. It will train slowly; a coupling flow needs one pass."
    )


def _many_components(case: Case) -> str | None:
    for name, site in case.model_sites.items():
        looks = passes(site["fn"])
        samples = getattr(case.loss, "num_samples", getattr(case.loss, "num_particles", 1))
        data = site["value"].shape[0] if site["value"].dim() else 1
        if looks > 1 and looks * samples * data >= _MANY_PASSES:
            return (
                f"the prior of site {name!r} is a mixture of {looks} flows, so that the {samples * data} samples of a "
                f"step are scored {looks * samples * data:,} times. It will train slowly: take fewer components "
                "(num_components), fewer samples, or a VampPrior over Gaussian posteriors."
            )
    return None


def _one_sample(case: Case) -> str | None:
    loss = case.loss
    if not isinstance(loss, Objective) or loss.estimator != "score-function" or loss.num_samples > 1:
        return None
    if not needs_path(loss.bound, "reparameterized"):
        return None
    return (
        "the score function with num_samples=1 has no leave-one-out baseline: it is unbiased, and very noisy. "
        "Take at least 2."
    )


def _guide_only(case: Case) -> str | None:
    if not isinstance(case.loss, Objective) or not case.loss.upper or not trainable(case.model):
        return None
    return (
        f"{case.loss!r} trains the guide only: it is an upper bound on log p(x), so that lowering it by the model "
        "would lower p(x). The model's parameters stay as they are."
    )


def _one_weight(case: Case) -> str | None:
    if not isinstance(case.loss, infer.ReweightedWakeSleep):
        return None
    return (
        "ReweightedWakeSleep has one weight for the whole minibatch, of which one draw takes nearly all. "
        "Objective(wake_sleep(), num_samples=K) has one per datum."
    )


NOTES: tuple[Callable[[Case], str | None], ...] = (
    _slow,
    _many_components,
    _one_sample,
    _guide_only,
    _one_weight,
)
