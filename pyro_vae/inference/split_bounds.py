"""Objectives under which model and guide follow different functions of the weights.

The model climbs a tight bound. For the guide a looser one may give a clearer signal (`piwae`), it may fit itself to the
posterior's samples (`wake_sleep`), or lower an upper bound (`cubo`), by which the model would lower p(x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from pyro.distributions import Unit
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_vae.inference.bounds import IWAE, OfWeights, WeightBound, miwae, renyi
from pyro_vae.options import checked
from pyro_vae.traces import Particles, Program, log_q, simulate, sites


@dataclass(frozen=True)
class Wake:
    """The guide's side of the wake phase: sum_k v_k grad log q(z_k | x), v = normalised weights: the negative gradient
    of KL(p(z | x) || q(z | x)), by self-normalised importance sampling, and of no bound.
    """

    share: OfWeights = partial(torch.softmax, dim=0)

    def path(self, log_weight: Tensor) -> Tensor:
        """Coefficients c_k = d v_k / d log w_k = v_k - v_k^2 of the same gradient along the samples."""
        share = self.share(log_weight)
        return share - share.square()


@dataclass(frozen=True, repr=False)
class SplitBound:
    """A number to report, what the model climbs, and what the guide climbs.

    Attributes:
        name: Such as "piwae(8)".
        report: The bound that is reported.
        model: What the model climbs; None leaves it alone.
        guide: What the guide climbs.
        upper: The guide goes *down* instead, since its bound is one from above.
        sleep: Share of the guide's gradient that comes from the model's own draws.
        at_least: The smallest K that makes sense for training.
        reason: Why a smaller one does not.
    """

    name: str
    report: WeightBound
    model: WeightBound | None  # None leaves it alone
    guide: WeightBound | Wake
    upper: bool = False  # the guide goes *down* instead, since its bound is one from above
    sleep: float = 0.0  # share of the guide's gradient that comes from the model's own draws
    at_least: int = 1  # the smallest K that makes sense for training
    reason: str = ""  # why a smaller one does not

    def __call__(self, particles: Particles) -> Tensor:
        return self.report(particles)

    def __repr__(self) -> str:
        return self.name

    @property
    def __name__(self) -> str:
        return self.name


@checked
def piwae(num_groups: int) -> SplitBound:
    """The model climbs the importance-weighted bound, the guide M bounds of K / M samples.

        reported: IWAE_K      model: IWAE_K      guide: MIWAE_{M, K/M}

    The decoder keeps the tight bound, while the encoder's gradient keeps its signal as K
    grows. Not the gradient of any one function; the same as `iwae` at M = 1.

    Args:
        num_groups: M, a divisor of K.
    Returns:
        The objective; called on particles, the IWAE bound in nats, (B,).
    Raises:
        ValueError: M < 1; on use, M does not divide K.
    Example:
        >>> piwae(8)
        piwae(8)

    Reference: Rainforth et al., Tighter Variational Bounds are Not Necessarily Better, 2018.
        arXiv:1802.04537
    """
    return SplitBound(f"piwae({num_groups})", IWAE, IWAE, miwae(num_groups))


@checked
def cubo(n: float = 2.0) -> SplitBound:
    """Chi upper bound on log p(x), per datum, for the guide to lower.

        CUBO_n(x) = 1/n log E_q[w^n] >= log p(x),   n > 1

    It exceeds log p(x) by 1/n log E_q[(p(z | x) / q(z | x))^n], which is zero at the posterior.
    What is computed is 1/n log 1/K sum_k w_k^n. The logarithm of a mean is biased downwards,
    so this is a *lower* estimate of the upper bound, and brackets log p(x) only as K grows.

    Direction: the guide *minimises* it, and the model is left alone (it gets no gradient),
    since lowering an upper bound on log p(x) would lower p(x). Train the model by a lower
    bound, and the guide by this one on top. At finite K the minimum at the posterior is a
    local one: it needs K > n / (n - 1), which is enforced, and a guide that is already near, for
    a guide far off lowers the estimate by missing the mass altogether. `wake_sleep` also
    covers the posterior's mass, and has no such trap.

    Args:
        n: The order, above 1.
    Returns:
        The objective; called on particles, the estimate in nats, (B,).
    Raises:
        ValueError: n <= 1; in an `Objective`, K <= n / (n - 1).
    Example:
        >>> p = Particles(torch.tensor([[0.0], [2.0]]), {}, {}, {})
        >>> bool(cubo(2)(p) > IWAE(p))
        True

    Reference: Dieng et al., Variational Inference via chi Upper Bound Minimization, 2017.
        arXiv:1611.00328
    """
    if not n > 1:
        raise ValueError(f"n must be above 1, got {n}: 1/n log E[w^n] bounds log p(x) from above for n > 1 only.")
    power = renyi(1.0 - n)
    reason = (
        "with fewer the estimate of the upper bound has no minimum at the posterior (with one it is the ELBO), and "
        "lowering it would drive the guide away"
    )
    least = math.floor(n / (n - 1)) + 1
    return SplitBound(f"cubo({n:g})", power, None, power, upper=True, at_least=least, reason=reason)


@checked
def wake_sleep(sleep: float = 0.0) -> SplitBound:
    """Reweighted wake-sleep with weights per datum.

        reported, and the model's:  IWAE_K
        guide, wake phase:   sum_k v_k grad log q(z_k | x),   v_k = w_k / sum_j w_j
        guide, sleep phase:  grad log q(z | x) at (z, x) ~ p(z, x)

    The wake phase lowers KL(p(z | x) || q(z | x)), which spreads q over all of the posterior's
    mass where the ELBO lets it sit on one mode, and needs no reparameterised samples. (Pyro's
    ``ReweightedWakeSleep`` has one weight for the whole minibatch, of which one datum's
    samples then take all.)

    Args:
        sleep: Share of the sleep phase in the guide's gradient, in [0, 1].
    Returns:
        The objective; called on particles, the IWAE bound in nats, (B,).
    Raises:
        ValueError: sleep outside [0, 1]; in an `Objective`, K = 1 without sleep phase (a single
            normalised weight is 1, and the guide learns nothing).
    Example:
        >>> wake_sleep(), wake_sleep(sleep=0.5)
        (wake_sleep, wake_sleep(0.5))

    Reference: Bornschein and Bengio, Reweighted Wake-Sleep, 2015. arXiv:1406.2751
    """
    if not 0 <= sleep <= 1:
        raise ValueError(f"sleep must lie in [0, 1], got {sleep}. It is the share of the sleep phase.")
    name = "wake_sleep" + (f"({sleep:g})" if sleep else "")
    reason = "a single normalised weight is 1, and without a sleep phase the guide learns nothing"
    return SplitBound(name, IWAE, IWAE, Wake(), sleep=sleep, at_least=1 if sleep else 2, reason=reason)


def sleep_phase(model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
    """log q(z | x) at a draw (z, x) ~ p(z, x), per datum, (B,) in nats, with a gradient for the guide.

    To climb it lowers E_{p(x)} KL(p(z | x) || q(z | x)) without any importance weight, or derivative of the model or of
    the samples, so both may be discrete.

    All that the model observes is replaced by the draws, wherever it stands in the arguments (also in a dict or a
    tuple, as a column of a tensor, in another shape or type); what it does not observe is kept. An observed site that
    is none of the arguments, or may be several, or that cannot be drawn (``pyro.factor``), is a ValueError; so is
    nothing observed.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))
        >>> sleep_phase(model, guide, torch.zeros(5)).shape
        torch.Size([5])

    Reference: Hinton et al., The wake-sleep algorithm for unsupervised neural networks, 1995.
    """
    observed = {name: site for name, site in sites(model, *args, **kwargs).items() if site["is_observed"]}
    leaves, structure = pytree.tree_flatten((args, kwargs))
    if not observed:
        raise ValueError(
            f"the sleep phase replaces the data by draws from the model, but none of the {len(leaves)} arguments is "
            "what the model observes (nothing). Pass the data by position, or leave sleep at 0."
        )
    for name, site in observed.items():
        if isinstance(site["fn"], Unit):
            raise ValueError(
                f"the sleep phase draws from the model, but its site {name!r} is a pyro.factor, which cannot be drawn. "
                "Leave sleep at 0."
            )
    drawn = simulate(model, *args, **kwargs)
    replaced = list(leaves)
    for name, site in observed.items():
        _put(name, site["value"], drawn.observations[name], leaves, replaced)
    latents = {name: value.unsqueeze(0) for name, value in drawn.latents.items()}
    args, kwargs = pytree.tree_unflatten(replaced, structure)
    return log_q(guide, latents, *args, **kwargs).squeeze(0)


def _put(name: str, value: Tensor, drawn: Tensor, leaves: list[Any], replaced: list[Any]) -> None:
    """Write what was drawn for a site to where its data were in the arguments."""
    parts = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf is value]
    parts = parts or [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _part(leaf, value)]
    for i, leaf in parts:  # the same data, however often they are passed
        part = _part(leaf, value)
        if leaf is value or part is None:
            replaced[i] = drawn.to(leaf.dtype)
            continue
        if replaced[i] is leaf:
            replaced[i] = leaf.detach().clone()
        offset, size, stride = part
        replaced[i].as_strided(size, stride, offset).copy_(drawn)
    if parts:
        return
    found = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and _equal(leaf, value)]
    if len(found) != 1:
        which = "none of the" if not found else "more than one of the"
        raise ValueError(
            f"the sleep phase replaces the data by draws from the model, but {which} {len(leaves)} arguments is what "
            f"the model observes ({name}), so that the guide would see it as it was. Pass the data of {name!r} as an "
            "argument of its own, as the model observes them, or leave sleep at 0."
        )
    replaced[found[0]] = drawn.reshape(leaves[found[0]].shape).to(leaves[found[0]].dtype)


def _part(whole: Tensor, value: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    """Where a view lies in a contiguous tensor: offset, size and stride; None where it is no view of it."""
    if not whole.is_contiguous() or whole.dtype != value.dtype or not whole.numel() or not value.numel():
        return None
    if whole.device != value.device or whole.untyped_storage().data_ptr() != value.untyped_storage().data_ptr():
        return None
    offset = value.storage_offset() - whole.storage_offset()
    last = offset + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return (int(offset), tuple(value.shape), value.stride()) if (offset >= 0 and last < whole.numel()) else None


def _equal(leaf: Tensor, value: Tensor) -> bool:
    """Whether an argument has the values of a site, in another shape or type."""
    if leaf.numel() != value.numel() or leaf.device != value.device:
        return False
    return bool((leaf.reshape(-1).to(value.dtype) == value.reshape(-1)).all())
