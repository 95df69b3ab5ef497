"""What a guide uses its latent space for: which units move with the data, and how many nats each carries."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae import plots
from pyro_vae.inference.batches import seeded
from pyro_vae.judging.components import Components, refuse_points
from pyro_vae.judging.quotes import listed
from pyro_vae.judging.results import Result, table
from pyro_vae.judging.sweeps import Sweep, sweep
from pyro_vae.options import of_guide, of_pair
from pyro_vae.protocols import closed_form_kl
from pyro_vae.sites import data_plate, factors, lengths, plates
from pyro_vae.traces import Particles, Program, sites

# A latent is dead where its posterior mean varies less over the data, in units of z squared, and it carries fewer nats.
DEAD_VARIANCE, DEAD_KL = 0.01, 0.01


@dataclass(frozen=True)
class ActiveUnits(Result):
    """Latent dimensions whose posterior mean moves with the data.

    Attributes:
        count: How many have Var_x(E_q[z_d | x]) above the threshold.
        latent_dim: D.
        variance: That variance per dimension, (D,).
        threshold: The threshold.
    """

    count: int
    latent_dim: int
    variance: Tensor
    threshold: float

    def __str__(self) -> str:
        if bool(self.variance.isnan().any()):
            return "units active: unknown of one datum, between which and others their means could vary"
        return f"{self.count} of {self.latent_dim} units active (variance of the posterior mean > {self.threshold:g})"


@dataclass(frozen=True)
class DimensionKL(Result):
    """KL(q(z_d | x) || p(z_d)) per latent dimension, averaged over data, in nats.

    Attributes:
        names: "z[0]", "z[1]", ... for dimensions; the site's name where its dimensions are not independent under
            model and guide, so that only the site's divergence is their sum, (M,).
        value: Mean over the data, (M,).
        mc_stderr: Monte Carlo standard error, given these data, (M,); 0 in closed form.
        data_stderr: Standard error for the population of the data, (M,).
        pointwise: Per datum, (N, M).
        exact: Whether each is in closed form, (M,).
        num_samples: K, per datum, where not.
        num_data: N.
    """

    names: tuple[str, ...]
    value: Tensor
    mc_stderr: Tensor
    data_stderr: Tensor
    pointwise: Tensor
    exact: tuple[bool, ...]
    num_samples: int
    num_data: int

    @property
    def total(self) -> float:
        """Sum over dimensions and sites: the KL of the ELBO, and the rate of the code."""
        return self.value.sum().item()

    def rows(self) -> list[dict[str, Any]]:
        errors = {"mc_stderr": self.mc_stderr, "data_stderr": self.data_stderr}
        return table(latent=self.names, value=self.value, **errors, exact=self.exact)

    def plot(self, ax: Any = None) -> Any:
        """The divergences in falling order, as a figure."""
        return plots.kl_by_dimension(self.value, self.data_stderr, threshold=DEAD_KL, names=self.names, ax=ax)

    def __str__(self) -> str:
        shown = self.value.argsort(descending=True).tolist()
        errors = ["" if math.isnan(e) else f" ± {e:.3f}" for e in self.data_stderr.tolist()]  # one datum has none
        each = listed([f"{self.names[i]} {self.value[i]:.3f}{errors[i]}" for i in shown], 20)
        how = "closed form" if all(self.exact) else f"{self.num_samples} samples where no closed form is known"
        over = "one datum" if self.num_data == 1 else f"{self.num_data} data"
        return f"KL = {self.total:.3f} nats over {over} ({how}{'; ± of the data' * (self.num_data > 1)}): {each}"


@of_pair
def kl_per_dimension(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 16,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> DimensionKL:
    """How many nats each latent dimension carries.

        KL_d = E_x KL(q(z_d | x) || p(z_d))

    In closed form where torch or Pyro has one for the two distributions, and the prior of the site depends on no other
    latent; else from samples. Of a site whose dimensions are dependent (a flow, a full covariance) the sum over them.
    Of a layer under or above another the conditional divergence, averaged over the guide's draws of the other.

    Args:
        num_samples: K, samples per datum.
        model, guide, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        The divergences with their names and errors.
    Raises:
        ValueError: A guide with a point site, and all that `particles` refuses.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.Normal(z.sum(-1), 1.0))
        >>> guide = Guide(lambda x: dist.Normal(torch.tensor([0.0, 2.0]), 1.0).to_event(1))
        >>> found = kl_per_dimension(model, guide, torch.zeros(5))
        >>> found.names, found.value.tolist()
        (('z[0]', 'z[1]'), [0.0, 2.0])
    """
    with sweep(model, guide, data=data, batch_size=200, copies=num_samples, seed=seed, device=device,
               progress=progress, title="KL") as run:  # fmt: skip
        components = Components(model, run.first)

        def divergences(batch: tuple[Any, ...]) -> dict[str, tuple[Tensor, bool]]:
            particles = run.draw(batch, num_samples)
            refuse_points(particles, ", so its divergence from the prior is infinite")
            return {site: _divergence(particles, site, components) for site in components.sites}

        parts = run.each(divergences)
    names, exact, table = _aligned(components, parts)
    mean = torch.cat([values.mean(0) for values in table])  # (N, M)
    count = len(mean)
    if num_samples > 1:
        mc = torch.cat([values.var(0) / num_samples for values in table]).sum(0).sqrt() / count
    else:
        mc = torch.where(torch.tensor(exact), mean.new_zeros(()), math.nan)
    data_stderr = mean.std(0) / math.sqrt(count) if count > 1 else torch.full_like(mean[0], math.nan)
    return DimensionKL(tuple(names), mean.mean(0), mc, data_stderr, mean, tuple(exact), num_samples, count)


def _aligned(
    components: Components, parts: list[dict[str, tuple[Tensor, bool]]]
) -> tuple[list[str], list[bool], list[Tensor]]:
    """Names of the columns, which are closed forms, and the terms of each batch, (K, B, M): as all batches could."""
    names: list[str] = []
    exact: list[bool] = []
    columns, start = [], 0
    for site, size in components.sites.items():
        found = [part[site] for part in parts]
        apart = all(values.shape[-1] == size for values, _ in found)
        columns.append([values if apart else values.sum(-1, keepdim=True) for values, _ in found])
        names += components.names[start : start + size] if apart else [site]
        start += size
        exact += [all(closed for _, closed in found)] * (size if apart else 1)
    return names, exact, [torch.cat(sites, -1).double().cpu() for sites in zip(*columns, strict=True)]


def _divergence(particles: Particles, site: str, components: Components) -> tuple[Tensor, bool]:
    """Terms whose mean over K is the divergence, (K, B, dimensions or 1), and whether each is a closed form."""
    sampled = (particles.log_q[site] - particles.log_prior[site]).unsqueeze(-1)
    if site not in particles.posteriors or site not in particles.priors:
        return sampled, False
    q, p, value = particles.posteriors[site], particles.priors[site], particles.latents[site]
    fixed = len(particles.priors) == 1 or _constant_over_samples(p, value)
    each = factors(q), factors(p)
    if None not in each and all(one.batch_shape.numel() == value.numel() for one in each):
        log_q, log_p = (one.log_prob(value.reshape(one.batch_shape)).reshape(value.shape) for one in each)
        terms = components.column(site, log_q - log_p)
        # A mask, or a plate's scale, would make the site's density another sum.
        if torch.allclose(terms.sum(-1, keepdim=True), sampled, rtol=1e-3, atol=1e-3):
            closed = closed_form_kl(*each) if fixed else None
            if closed is not None and closed.numel() == value.numel():
                return components.column(site, closed.reshape(value.shape)), True
            return terms, False
    closed = closed_form_kl(q, p) if fixed else None
    if closed is not None and closed.numel() == sampled.numel():
        return closed.reshape(sampled.shape), True
    return sampled, False


def _constant_over_samples(p: Any, value: Tensor) -> bool:
    """Whether the prior is the same for all samples, hence depends on no other latent."""
    if len(value) == 1 or (p.batch_shape + p.event_shape).numel() != value.numel():
        return False
    first = value[:1].expand_as(value).reshape(p.batch_shape + p.event_shape)
    score = p.log_prob(first).reshape(len(value), -1)
    return torch.equal(score, score[:1].expand_as(score))


@of_guide
def posterior_means(
    guide: Program,
    data: Any,
    *,
    site: str | None = None,
    num_samples: int = 64,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Tensor:
    """E_q[z | x] per datum, (N, *event), or (N, *inner plates, *event).

    Exact where the site's distribution knows its mean and depends on x alone; else from samples.

    Args:
        site: Name of the latent site; None for the only one.
        num_samples: Samples per datum where the mean is not known.
        guide, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        The means, on the CPU.
    Raises:
        ValueError: The guide has no such site, or several and none was named.
    """
    with sweep(guide, data=data, batch_size=500, seed=seed, device=device, progress=progress,
               title="posterior means") as run:  # fmt: skip
        return _moments(run, site, num_samples)[0]


def _moments(run: Sweep, site: str | None, num_samples: int) -> tuple[Tensor, Tensor]:
    """E_q[z | x], and the Monte Carlo variance of that estimate, (N, *event) each."""
    (guide,) = run.programs
    name = _only(guide, run.first) if site is None else site

    def moments(batch: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        mean, variance = _run(guide, batch, name), torch.zeros(())
        # The mean of a layer above another changes with the draw of that other, from run to run.
        if not torch.equal(mean, _run(guide, batch, name)):
            values = torch.stack([_run(guide, batch, name) for _ in range(num_samples)])
            mean, variance = values.mean(0), values.var(0) / num_samples
        return mean, variance.cpu().expand(mean.shape)

    means, variances = zip(*run.each(moments), strict=True)
    return torch.cat(means), torch.cat(variances)


def _only(guide: Program, args: tuple[Any, ...]) -> str:
    """The one latent site of a guide; those that only serve others are none."""
    with seeded(0):
        drawn = sites(guide, *args).items()
    found = [name for name, site in drawn if not site["is_observed"] and not site["infer"].get("is_auxiliary")]
    if len(found) != 1:
        raise ValueError(
            f"the guide has {len(found)} latent sites{', ' * bool(found)}{', '.join(map(repr, found))}, wanted one. "
            "Name it: site=..."
        )
    return found[0]


def _run(guide: Program, batch: tuple[Any, ...], site: str) -> Tensor:
    """The site's mean in one run of the guide, or its sample where it knows none."""
    with seeded(int(torch.randint(2**31, ()))):  # reading the sites leaves the random state as it was
        found = sites(guide, *batch)
    if site not in found:
        raise ValueError(f"the guide has no site {site!r}, wanted one of {', '.join(map(repr, found))}.")
    fn, value = found[site]["fn"], found[site]["value"]
    with contextlib.suppress(NotImplementedError):
        value = fn.mean
    shared = set.intersection(*({(dim, frame.size) for dim, frame in plates(s).items()} for s in found.values()))
    if not shared:
        return value
    return value.movedim(value.dim() - fn.event_dim + data_plate(shared, lengths(batch))[0], 0)


@of_guide
def active_units(
    guide: Program,
    data: Any,
    *,
    threshold: float = DEAD_VARIANCE,
    site: str | None = None,
    num_samples: int = 64,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> ActiveUnits:
    """Count the latent dimensions that the guide uses.

        A_d = Var_x(E_q[z_d | x]) > threshold

    Where the mean is from samples, their variance is taken off.

    Args:
        threshold: 0.01 in the reference.
        guide, data, site, num_samples, seed, device, progress: As for `posterior_means`.
    Returns:
        The count and the variances.
    Raises:
        ValueError: As for `posterior_means`.

    Reference: Burda et al., Importance Weighted Autoencoders, 2016, section 5. arXiv:1509.00519
    """
    with sweep(guide, data=data, batch_size=500, seed=seed, device=device, progress=progress,
               title="active units") as run:  # fmt: skip
        means, noise = _moments(run, site, num_samples)
    means = means.reshape(len(means), -1)
    spread = means.var(0) if len(means) > 1 else torch.full_like(means[0], torch.nan)  # one datum has none
    variance = spread - noise.reshape(len(noise), -1).mean(0)
    return ActiveUnits(int((variance > threshold).sum()), len(variance), variance, threshold)
