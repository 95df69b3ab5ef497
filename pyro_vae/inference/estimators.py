"""Gradient estimators: three coefficients per sample, the same for every bound.

A bound L is a function of K log weights log w_k = log p(x, z_k) - log q(z_k | x), and z_k
depends on the guide's parameters. With g_k = dL / d log w_k, all estimators have the form

    sum_k  a_k grad log p(x, z_k)  +  s_k grad log q(z_k | x)  +  c_k <d log w_k / dz, grad z_k>

where the first two gradients are taken at a fixed z_k, and the third along it:

    reparameterized            a = g    c = g                       s = -g
    sticking-the-landing       a = g    c = g                       s = 0
    doubly-reparameterized     a = g    c = g - dg_k / d log w_k    s = 0
    score-function             a = g    c = 0                       s = L - b_k - g

The first is the total derivative. Since E_q[f(z) grad log q(z)] = E[<df/dz, grad z>] for any f, its score term, f =
-g_k, can be moved onto the path: that is the third, which is unbiased, and vanishes for the guide at the exact
posterior. Leaving the score term out vanishes there too, but E[g_k grad log q(z_k)] = 0 only where g_k is constant (the
ELBO, K = 1): for K > 1 sticking the landing is biased.

The score function serves discrete latents. Its baseline b_k is the bound with log w_k replaced by the mean of the
others, which does not depend on z_k; at K = 1, b = 0.

References: Roeder et al. 2017 (sticking the landing), arXiv:1703.09194; Tucker et al. 2019
(doubly reparameterised), arXiv:1810.04152; Mnih and Rezende 2016 (VIMCO), arXiv:1602.06725;
Kool et al. 2019, Buy 4 REINFORCE samples, get a baseline for free.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_vae.inference.bounds import ELBO, IWAE, VR_MAX, Bound, WeightBound, elbo, iwae, vr_max
from pyro_vae.inference.split_bounds import SplitBound, Wake
from pyro_vae.traces import Particles
from pyro_vae.words import did_you_mean

ESTIMATORS = ("reparameterized", "sticking-the-landing", "doubly-reparameterized", "score-function")


class Coefficients(NamedTuple):
    """What multiplies the three gradients of an estimator, (K, B) each, without gradient; None is 0."""

    joint: Tensor | None  # a, on log p(x, z_k) at fixed z_k
    path: Tensor | None  # c, on log w_k along z_k
    score: Tensor | None  # s, on log q(z_k | x) at fixed z_k


def weight_bound(bound: Bound, num_samples: int) -> WeightBound | SplitBound | None:
    """A bound with its derivatives, or None where it is not a function of the log weights alone.

    Bounds of your own are differentiated by autograd (K backward passes of a (K, B) table for the
    doubly-reparameterised coefficient). One that does not take K samples is a ValueError.

    Example:
        >>> from pyro_vae.inference.bounds import reconstruction
        >>> weight_bound(reconstruction, 2) is None
        True
    """
    pairs = ((elbo, ELBO), (iwae, IWAE), (vr_max, VR_MAX))
    known = next((own for plain, own in pairs if bound is plain), bound)
    if isinstance(known, WeightBound | SplitBound):
        for side in (known.report, known.model, known.guide) if isinstance(known, SplitBound) else (bound,):
            if isinstance(side, WeightBound):
                side.value(torch.zeros(num_samples, 1))
        return known
    # The same weights, made of other densities: a function of the weights cannot tell.
    index = torch.arange(2.0 * num_samples).reshape(num_samples, 2)
    weight, part = torch.sin(1.7 * index), torch.cos(2.3 * index + 0.4)
    try:
        values = [
            bound(Particles(weight, {}, {}, {})),
            bound(Particles(weight - 2 * part, {"z": 3 * part}, {"z": part}, {})),
        ]
        same = torch.allclose(values[0], values[1], rtol=1e-4, atol=1e-4)
    except (KeyError, IndexError, AttributeError, RuntimeError):
        return None
    if not same:
        return None
    value = partial(_of_weights, bound)
    name = getattr(bound, "__name__", repr(bound))
    return WeightBound(name, value, partial(_gradient, value), partial(_gradient_less_curvature, value))


def refusal(bound: Bound, estimator: str, num_samples: int) -> str | None:
    """Why a bound and an estimator do not go together, None where they do; a bound that does not take K is a
    ValueError.

    Example:
        >>> refusal(vr_max, "doubly-reparameterized", 8)[:42]
        'doubly-reparameterized needs a bound whose'
    """
    if estimator not in ESTIMATORS:
        hint = did_you_mean(estimator, ESTIMATORS)
        return f"unknown estimator {estimator!r}, wanted one of {', '.join(ESTIMATORS)}.{hint}"
    if estimator == "reparameterized" and not isinstance(bound, WeightBound | SplitBound):
        return None
    known = weight_bound(bound, num_samples)
    name = getattr(bound, "__name__", repr(bound))
    if isinstance(known, SplitBound):
        if isinstance(known.guide, Wake) and estimator == "sticking-the-landing":
            return (
                f"{name} trains the guide by the score of its samples, which sticking-the-landing leaves out, so "
                "nothing would be left. Use estimator='reparameterized' (the plain wake phase) or "
                "'doubly-reparameterized'."
            )
        if num_samples < known.at_least:
            return (
                f"got num_samples={num_samples} for {name}, wanted at least {known.at_least}: {known.reason}. "
                "Raise num_samples."
            )
        return None
    if estimator in ("sticking-the-landing", "doubly-reparameterized") and known is None:
        return (
            f"{estimator} needs a bound that is a function of the weights log p(x, z) - log q(z | x) alone, and "
            f"{name} is not. Use estimator='reparameterized' or 'score-function'."
        )
    if estimator == "doubly-reparameterized" and isinstance(known, WeightBound) and not known.smooth:
        return (
            f"doubly-reparameterized needs a bound whose derivative is continuous in the weights, and that of {name} "
            "jumps where another sample becomes the largest: the jumps' share of the gradient would be missing. "
            "Use estimator='reparameterized', or renyi(alpha) with a low alpha."
        )
    return None


def needs_cut(bound: Bound, estimator: str) -> bool:
    """Whether the gradient differs from the total derivative, so that samples must be scored anew."""
    return estimator != "reparameterized" or isinstance(bound, SplitBound)


def needs_path(bound: Bound, estimator: str) -> bool:
    """Whether the estimator differentiates along the samples, so that these must be reparameterised."""
    if isinstance(bound, SplitBound) and isinstance(bound.guide, Wake):
        return estimator == "doubly-reparameterized"
    return estimator != "score-function"


def coefficients(
    bound: WeightBound | SplitBound, estimator: str, log_weight: Tensor, beta: float | Tensor = 1.0
) -> Coefficients:
    """The estimator's coefficients a, c and s, without gradient, for given log weights, (K, B).

    `log_weight` is tempered where beta is not 1: the weight of log q within it, to which -g belongs.

    Example:
        >>> coefficients(IWAE, "doubly-reparameterized", torch.zeros(2, 1)).path.flatten()
        tensor([0.2500, 0.2500])
    """
    log_weight = log_weight.detach()
    model = bound.model if isinstance(bound, SplitBound) else bound
    guide = bound.guide if isinstance(bound, SplitBound) else bound
    joint = None if model is None else model.gradient(log_weight)
    if estimator == "doubly-reparameterized":
        return Coefficients(joint, guide.path(log_weight), None)
    if isinstance(guide, Wake):
        return Coefficients(joint, None, guide.share(log_weight))
    gradient = guide.gradient(log_weight)
    if estimator == "sticking-the-landing":
        return Coefficients(joint, gradient, None)
    if estimator == "reparameterized":
        return Coefficients(joint, gradient, -beta * gradient)
    return Coefficients(joint, None, advantage(guide, Particles(log_weight, {}, {}, {})) - beta * gradient)


def advantage(bound: Bound, particles: Particles) -> Tensor:
    """L - b_k, (K, B): the bound less itself with sample k replaced by the mean of the others; L itself at K = 1.

    Example:
        >>> advantage(elbo, Particles(torch.tensor([[0.0], [2.0]]), {}, {}, {})).flatten()
        tensor([-1.,  1.])
    """

    def without(table: Tensor) -> Tensor:
        """(K, B) to (K, K B): column (k, b) has the mean of the others at k."""
        size = len(table)
        others = (table.sum(0) - table) / (size - 1)
        own = torch.eye(size, dtype=torch.bool, device=table.device).unsqueeze(-1)
        return torch.where(own, others.unsqueeze(0), table.unsqueeze(1)).reshape(size, -1)

    with torch.no_grad():
        value, size = bound(particles), len(particles.log_likelihood)
        if size == 1:
            return value.unsqueeze(0)
        replaced = Particles(
            without(particles.log_likelihood),
            {name: without(table) for name, table in particles.log_prior.items()},
            {name: without(table) for name, table in particles.log_q.items()},
            {},
        )
        return value - bound(replaced).reshape(size, -1)


def _of_weights(bound: Bound, log_weight: Tensor) -> Tensor:
    return bound(Particles(log_weight, {}, {}, {}))


def _gradient(value: Bound, log_weight: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = log_weight.detach().requires_grad_()
        return torch.autograd.grad(value(leaf).sum(), leaf)[0]  # type: ignore[arg-type]


def _gradient_less_curvature(value: Bound, log_weight: Tensor) -> Tensor:
    with torch.enable_grad():
        leaf = log_weight.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(value(leaf).sum(), leaf, create_graph=True)  # type: ignore[arg-type]
        if not gradient.requires_grad:  # linear in the log weights
            return gradient
        rows = [
            torch.autograd.grad(row.sum(), leaf, retain_graph=True, allow_unused=True, materialize_grads=True)[0][k]
            for k, row in enumerate(gradient)
        ]
        return (gradient - torch.stack(rows)).detach()
