"""Has the posterior collapsed, which latents are dead, and is the optimum itself to blame?

That can be said for the linear model, probabilistic PCA. With the data covariance's eigenvalues l_1 >= l_2 >= ... and a
noise variance s^2, the weights of maximum likelihood have W'W = diag(max(l_d - s^2, 0)) up to a rotation of z: a
direction whose eigenvalue is below s^2 is dead at the *optimum of log p(x)*, no matter which bound is climbed, and the
linear VAE's ELBO has the same optima. A free s^2 is the mean of the others.

Reference: Tipping and Bishop, Probabilistic principal component analysis, 1999.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae.inference.trees import at
from pyro_vae.judging.components import Components
from pyro_vae.judging.latents import DEAD_KL, DEAD_VARIANCE, DimensionKL, kl_per_dimension
from pyro_vae.judging.quotes import listed
from pyro_vae.judging.results import Result, table
from pyro_vae.judging.sweeps import sweep
from pyro_vae.options import of_model, of_pair
from pyro_vae.randomness import forked
from pyro_vae.traces import Program, sites


@dataclass(frozen=True)
class LinearOptimum(Result):
    """A fitted linear-Gaussian model beside the optimum of its likelihood on the same data.

    Attributes:
        eigenvalues: Largest D of the data covariance, (D,).
        eigenvalues_data_stderr: Their standard errors, l_d sqrt(2 / N), (D,).
        signal: Squared lengths of the fitted weights' directions, the eigenvalues of W'W, (D,).
        scale: s of the fitted model.
        best_scale: s of maximum likelihood.
        optimum_active: Directions alive at the optimum for the fitted s.
        fitted_active: Directions alive in the fit.
        free_active: Directions alive at the optimum with s free.
        shortfall: log p(x) at the optimum for this s less that of the fit, per datum in nats.
    """

    eigenvalues: Tensor
    eigenvalues_data_stderr: Tensor
    signal: Tensor
    scale: float
    best_scale: float
    optimum_active: int
    fitted_active: int
    free_active: int
    shortfall: float

    @property
    def collapsed(self) -> bool:
        """Whether the optimum at the fitted scale itself leaves some directions dead."""
        return self.optimum_active < len(self.eigenvalues)

    def __str__(self) -> str:
        size = len(self.eigenvalues)
        text = (
            f"linear model with s^2 = {self.scale**2:.3g}: {self.fitted_active} of {size} directions alive, "
            f"{self.optimum_active} at the optimum of log p(x) for this s, which is {self.shortfall:.3f} nats better"
        )
        if self.fitted_active < self.optimum_active:
            text += "; the fit has collapsed further than its optimum: train on, or warm up the KL"
        elif self.collapsed:
            first = self.eigenvalues[self.optimum_active]
            error = self.eigenvalues_data_stderr[self.optimum_active]
            text += (
                f"; the optimum itself is collapsed: eigenvalue {first:.3g} ± {error:.2g} of the data is not above "
                "s^2. The ELBO is not to blame"
            )
            if self.free_active > self.optimum_active:
                text += f": learn the scale (s^2 = {self.best_scale**2:.3g} keeps {self.free_active} alive)"
        return text


@dataclass(frozen=True)
class Collapse(Result):
    """Which latents are dead, and whether all are.

    Attributes:
        names: Of the components, (C,).
        variance: Var_x(E_q[z_d | x]), (C,).
        variance_data_stderr: Its standard error, (C,).
        kl: KL per dimension (or site), with its errors.
        component_kl: The divergence of each component, nan where only its site's is known, (C,).
        dead: Variance and divergence both below their thresholds, (C,).
        variance_threshold: 0.01 by default, as for active units.
        kl_threshold: In nats.
        rate_threshold: In nats: below it the whole posterior has collapsed.
        optimum: For a linear-Gaussian model, what its optimum is; else None.
    """

    names: tuple[str, ...]
    variance: Tensor
    variance_data_stderr: Tensor
    kl: DimensionKL
    component_kl: Tensor
    dead: Tensor
    variance_threshold: float
    kl_threshold: float
    rate_threshold: float
    optimum: LinearOptimum | None = None

    @property
    def collapsed(self) -> bool:
        """Whether the whole posterior is the prior."""
        return self.kl.total < self.rate_threshold

    @property
    def dead_names(self) -> tuple[str, ...]:
        """Names of the dead components."""
        return tuple(name for name, dead in zip(self.names, self.dead.tolist(), strict=True) if dead)

    def rows(self) -> list[dict[str, Any]]:
        spread = {"variance": self.variance, "variance_data_stderr": self.variance_data_stderr}
        return table(latent=self.names, **spread, kl=self.component_kl, dead=self.dead)

    def plot(self, ax: Any = None) -> Any:
        """The divergences in falling order, as a figure."""
        return self.kl.plot(ax)

    def __str__(self) -> str:
        rule = f"variance of the mean < {self.variance_threshold:g} and KL < {self.kl_threshold:g} nats"
        found = self.dead_names
        text = f"{len(found)} of {len(self.names)} latents dead ({rule})" + (f": {listed(found, 20)}" if found else "")
        error = self.kl.data_stderr.square().sum().sqrt()
        text += f"; rate {self.kl.total:.3f} ± {error:.3f} nats over {self.kl.num_data} data"
        if self.collapsed:
            text = f"the posterior has collapsed (rate < {self.rate_threshold:g} nats): {text}"
        return text if self.optimum is None else f"{text}; {self.optimum}"


@of_pair
def collapse(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 64,
    variance_threshold: float = DEAD_VARIANCE,
    kl_threshold: float = DEAD_KL,
    rate_threshold: float = 0.05,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Collapse:
    """Find dead latents and a collapsed posterior, in any pair.

    A component is dead where Var_x(E_q[z_d | x]) and KL(q(z_d | x) || p(z_d)) are both below their thresholds. Where
    only the divergence of a whole site is known (a flow, a full covariance), the variance decides.

    Args:
        model: A Pyro program for p(x, z); a linear-Gaussian one is recognised, and its optimum reported.
        num_samples: Draws per datum, at least 2; their noise is taken off the variance.
        variance_threshold: Of the posterior mean's variance, in units of z squared.
        kl_threshold: Nats per dimension.
        rate_threshold: Nats, of all latents together.
        guide, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        What is dead, with the numbers that say so.
    Raises:
        ValueError: Fewer than two draws or data; all that `kl_per_dimension` refuses.

    Reference: Lucas et al., Don't blame the ELBO!, 2019. arXiv:1911.02469
    """
    if num_samples < 2:
        raise ValueError(f"got num_samples={num_samples}, wanted at least 2 draws per datum, whose noise can be told.")
    options: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    kl = kl_per_dimension(model, guide, data, num_samples=num_samples, **options)
    with sweep(model, guide, data=data, batch_size=200, copies=num_samples, title="collapse", **options) as run:
        components = Components(model, run.first)

        def moments(batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
            drawn = components.columns(run.draw(batch, num_samples).latents)
            return drawn.mean(0), drawn.var(0) / num_samples

        means, noise = zip(*run.each(moments), strict=True)
    mean = torch.cat(means)
    count = len(mean)
    if count < 2:
        raise ValueError(
            f"got {count} datum, wanted at least two, between which a latent could change. Give more data."
        )
    variance = mean.var(0) - torch.cat(noise).mean(0)
    fourth = (mean - mean.mean(0)).pow(4).mean(0)
    stderr = ((fourth - mean.var(0).square()).clamp(min=0) / count).sqrt()
    known = dict(zip(kl.names, kl.value.tolist(), strict=True))
    each = torch.tensor([known.get(name, math.nan) for name in components.names], dtype=torch.float64)
    dead = (variance < variance_threshold) & ~(each >= kl_threshold)
    optimum = linear_optimum(model, data, device=device, progress=progress)
    limits = variance_threshold, kl_threshold, rate_threshold
    return Collapse(components.names, variance, stderr, kl, each, dead, *limits, optimum)


@of_model
def linear_optimum(
    model: Program, data: Any, *, threshold: float = DEAD_VARIANCE, device: str | torch.device | None = None,
    progress: bool | None = None,
) -> LinearOptimum | None:  # fmt: skip
    """Compare a linear-Gaussian model with the optimum of its likelihood on data.

    A direction is alive where its share of the variance, l / (l + s^2) for a squared length l of the weights,
    exceeds the threshold: it is the variance of its exact posterior mean.

    Args:
        threshold: Share of the variance.
        device: Where it is computed: data and module go there for that time. Where the module is when not given.
        model, data, progress: As for `log_likelihood`.
    Returns:
        The comparison; None unless p(z) = N(0, I) and p(x | z) = N(W z + b, s^2 I) with one latent and one observed
        site, which the model's distributions are asked at D + 3 values of z.
    """
    with sweep(model, data=data, batch_size=500, seed=0, device=device, progress=progress, title="linear") as run:
        found = _linear(model, run.first)
        if found is None:
            return None
        weight, loc, scale, name = found

        def flat(batch: tuple[Any, ...]) -> Tensor:
            value: Tensor = sites(model, *batch)[name]["value"]
            return value.reshape(len(value), -1).double()

        rows = run.each(flat)
    x, dim = torch.cat(rows), weight.shape[1]
    covariance = torch.cov(x.T, correction=0).reshape(x.shape[1], -1)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    signal = torch.linalg.eigvalsh(weight.T @ weight).flip(0).clamp(min=0)
    variance, top = scale**2, eigenvalues[:dim]
    best = (top - variance).clamp(min=0)
    rotated = torch.eye(len(eigenvalues), dim, dtype=best.dtype) * best.sqrt()  # the optimum, in the data's own axes
    rest = eigenvalues[dim:]
    free = rest.mean().item() if len(rest) else 0.0
    mean = x.mean(0) - loc
    fitted = covariance + torch.outer(mean, mean)
    return LinearOptimum(
        eigenvalues=top,
        eigenvalues_data_stderr=top * math.sqrt(2 / len(x)),
        signal=signal,
        scale=scale,
        best_scale=math.sqrt(free),
        optimum_active=_alive(best, variance, threshold),
        fitted_active=_alive(signal, variance, threshold),
        free_active=_alive((top - free).clamp(min=0), free, threshold),
        shortfall=_log_evidence(rotated, torch.diag(eigenvalues), variance) - _log_evidence(weight, fitted, variance),
    )


def _alive(signal: Tensor, variance: float, threshold: float) -> int:
    return int((signal > threshold * (signal + variance)).sum())


def _log_evidence(weight: Tensor, second_moment: Tensor, variance: float) -> float:
    """Mean log N(x; b, W W' + s^2 I) from the second moment of x - b."""
    inner = weight.T @ weight + variance * torch.eye(weight.shape[1], dtype=weight.dtype)
    explained = torch.linalg.solve(inner, weight.T @ second_moment @ weight).trace()
    size, dim = weight.shape
    log_det = torch.logdet(inner) + (size - dim) * math.log(variance)
    quadratic = (second_moment.trace() - explained) / variance
    return -0.5 * (size * math.log(2 * math.pi) + log_det + quadratic).item()


def _linear(model: Program, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, float, str] | None:
    """W, (X, D), b, (X,), s and the data site of a linear-Gaussian model with a standard normal prior."""
    args = at(args, slice(2))
    found = sites(model, *args)
    latent = [site for site in found.values() if not site["is_observed"]]
    seen = [site for site in found.values() if site["is_observed"]]
    if len(latent) != 1 or len(seen) != 1:
        return None
    prior, name = _normal(latent[0]["fn"]), seen[0]["name"]
    value = latent[0]["value"]
    if prior is None or value.dim() != 2 or not bool((prior[0] == 0).all() and (prior[1] == 1).all()):
        return None
    dim = value.shape[-1]
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.zeros(1, dim), torch.eye(dim), 3 * torch.randn(2, dim, generator=generator)]).to(value)
    locs, scales = [], []
    with forked():
        for z in points:
            conditioned = poutine.condition(model, data={latent[0]["name"]: z.expand_as(value)})
            trace = poutine.trace(conditioned).get_trace(*args)
            given = _normal(trace.nodes[name]["fn"])
            if given is None:
                return None
            locs.append(given[0].reshape(len(given[0]), -1).double().cpu())
            scales.append(given[1].double().cpu())
    loc, scale = torch.stack(locs), torch.stack([s.expand_as(scales[0]) for s in scales])
    first = scale.flatten()[0]
    same = torch.allclose(scale, first.expand_as(scale), rtol=1e-5) and torch.equal(loc[:, :1].expand_as(loc), loc)
    loc = loc[:, 0]
    weight = loc[1 : 1 + dim] - loc[0]
    straight = torch.allclose(points[-2:].double().cpu() @ weight + loc[0], loc[-2:], rtol=1e-4, atol=1e-4)
    return (weight.T.contiguous(), loc[0], first.item(), name) if same and straight else None


def _normal(distribution: Any) -> tuple[Tensor, Tensor] | None:
    """Mean and scale of independent Gaussians, else None."""
    while isinstance(distribution, torch.distributions.Independent):
        distribution = distribution.base_dist
    if not isinstance(distribution, torch.distributions.Normal):
        return None
    return distribution.loc, distribution.scale
