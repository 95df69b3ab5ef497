"""Distributions on the unit sphere {z in R^D: |z| = 1}, of D - 1 dimensions.

Densities are with respect to the sphere's surface measure, whose total is

    S_D = 2 pi^(D/2) / Gamma(D/2):        2 pi for the circle D = 2, 4 pi for D = 3.

The von Mises-Fisher distribution, with mean direction mu and concentration k > 0,

    p(z) = C_D(k) exp(k mu'z),   C_D(k) = k^(D/2 - 1) / ((2 pi)^(D/2) I_{D/2-1}(k)),

depends on z through its angle a to mu only: z = cos(a) mu + sin(a) v, with v uniform among the directions at right
angles to mu, and a of density q(a) prop. to exp(k cos a) sin(a)^(D-2).

Sampling. a is drawn by Ulrich's rejection (as mended by Wood). A loop until acceptance could not be captured in a
graph: an accepted one of a fixed number of proposals is taken. Each is accepted with probability 0.65 or more, so that
none is with probability 1e-9, when the last proposal stands in.

Gradients. The distribution function of the accepted angle, F(a; k), is free of the proposals. Keeping it fixed gives
the angle's total derivative, path and correction (Naesseth et al.) in one, without noise:

    da/dk = -(dF/dk) / q(a) = -1/q(a) int_0^a (cos t - A) q(t) dt,   A = E[cos a]

The integral is taken from the side on which the integrand is, by quadrature to about 1e-9. mu is carried by parallel
transport of v, a derivative without singular points.

Bessel functions. Poisson's integral, for a real order v >= 0 and x > 0,

    I_v(x) = (x / 2)^v / (sqrt(pi) Gamma(v + 1/2)) int_0^pi exp(x cos a) sin(a)^(2v) da

has the log-concave integrand of the angle above for D = 2v + 2, with a known mode and a width of at most
1 / sqrt(x + 2v). Gauss and Legendre's rule on ten widths about the mode is right to about 1e-11 for all x > 0 and v up
to 100. A polynomial change of variables that slows down at the ends takes care of the branch points of sin(a)^(2v)
where 2v is no integer. The moments follow from the same sum.

Reference: Davidson et al., Hyperspherical Variational Auto-Encoders, 2018. arXiv:1804.00891; Naesseth et al.,
    Reparameterization Gradients through Acceptance-Rejection Sampling Algorithms, 2017. arXiv:1610.05683; Ulrich,
    Computer generation of distributions on the m-sphere, 1984; Wood, Simulation of the von Mises Fisher distribution,
    1994.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from pyro.distributions import constraints
from torch import Tensor
from torch.distributions import register_kl

from pyro_vae.parts.distributions.normal import Kept, Whole

PROPOSALS = 20
SLOPE_NODES = 40
SLOPE_WIDTHS = 8.0
NODES = 80
WIDTHS = 10.0


@functools.cache
def legendre(num_nodes: int) -> tuple[list[float], list[float]]:
    """Nodes and weights of Gauss and Legendre's rule on [0, 1]."""
    nodes, weights = np.polynomial.legendre.leggauss(num_nodes)
    return ((nodes + 1) / 2).tolist(), (weights / 2).tolist()


def polar(power: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Angles a_i and log weights, (..., 80) each, of a rule for int exp(x (cos a - 1)) sin(a)^power f(a) da, power >= 0
    and x > 0, (...): sum_i exp(log weight_i) f(a_i). The log weights carry the derivative in x."""
    nodes, weights = (x.new_tensor(values) for values in legendre(NODES))
    weights, nodes = weights * 6 * nodes * (1 - nodes), nodes.square() * (3 - 2 * nodes)
    with torch.no_grad():
        # The mode solves x sin(a)^2 = p cos(a): tan(a/2)^2 = (r + p - 2x) / (r + p + 2x), r^2 = p^2 + 4 x^2.
        root = torch.hypot(2 * x, torch.full_like(x, power))
        rest = power**2 / (root + 2 * x)  # r - 2x, which cancels
        mode = 2 * torch.atan(torch.sqrt((rest + power) / (root + power + 2 * x)))
        width = WIDTHS * torch.rsqrt(x + power)
        low, high = (mode - width).clamp(min=0), (mode + width).clamp(max=math.pi)
        angle = low.unsqueeze(-1) + (high - low).unsqueeze(-1) * nodes
        fixed = ((high - low).unsqueeze(-1) * weights).log() + power * torch.sin(angle).log()
        drop = -2 * torch.sin(angle / 2).square()
    return angle, fixed + x.unsqueeze(-1) * drop


def log_mean_exp_cosine(order: float, x: Tensor) -> Tensor:
    """log of the mean of exp(x (cos a - 1)), x > 0, (...), under a density proportional to sin(a)^(2 order):

    Gamma(v + 1) (2 / x)^v exp(-x) I_v(x), 0 at x = 0 and about -(v + 1/2) log x for large x; the order v is >= 0."""
    if not order >= 0:
        raise ValueError(f"got order={order}, wanted a real number >= 0.")
    _, log_weight = polar(2 * order, x)
    log_total = 0.5 * math.log(math.pi) + math.lgamma(order + 0.5) - math.lgamma(order + 1)
    return log_weight.logsumexp(-1) - log_total


def mean_cosine(order: float, x: Tensor) -> Tensor:
    """A(x) = I_{v+1}(x) / I_v(x), the mean of cos a, accurate relative to itself for every x.

    Integration by parts, (2v + 1) E[cos a] = x E[sin(a)^2], leaves positive terms only.
    """
    angle, log_weight = polar(2 * order, x)
    return x * (log_weight.softmax(-1) * torch.sin(angle).square()).sum(-1) / (2 * order + 1)


def mean_cosine_complement(order: float, x: Tensor) -> Tensor:
    """1 - A(x), accurate relative to itself also where A(x) is close to one, (...)."""
    angle, log_weight = polar(2 * order, x)
    return (log_weight.softmax(-1) * 2 * torch.sin(angle / 2).square()).sum(-1)


def log_surface(dim: int) -> float:
    """log S_D, the surface of the unit sphere in R^D.

    Example:
        >>> round(math.exp(log_surface(3)) / math.pi, 6)
        4.0
    """
    if dim < 2:
        raise ValueError(f"got a sphere in {dim} dimensions, wanted 2 or more: in R^1 it is two points.")
    return math.log(2) + dim / 2 * math.log(math.pi) - math.lgamma(dim / 2)


class HypersphericalUniform(Kept):
    """The uniform distribution on the unit sphere in R^D: log p(z) = -log S_D.

    Args:
        dim: D >= 2, the dimension of the space, not of the sphere.
        batch_shape: Independent copies.
        like: A tensor whose dtype and device the samples have; torch's defaults if None.
    Raises:
        ValueError: D < 2.
    Example:
        >>> HypersphericalUniform(2).log_prob(torch.tensor([0.0, 1.0]))     # -log 2 pi
        tensor(-1.8379)
    """

    arg_constraints: dict[str, Any] = {}
    support = constraints.sphere
    has_rsample = True  # it has no parameters, so that its samples have all of their derivatives

    def __init__(self, dim: int, batch_shape: Any = (), like: Tensor | None = None) -> None:
        self._log_surface = log_surface(dim)
        self._like = torch.zeros(()) if like is None else like.detach()
        super().__init__(torch.Size(batch_shape), torch.Size((dim,)), validate_args=False)

    @property
    def mean(self) -> Tensor:
        return self._like.new_zeros(self.batch_shape + self.event_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return _unit(self._like.new_empty(self._extended_shape(torch.Size(sample_shape))).normal_())

    def log_prob(self, value: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(self.batch_shape, value.shape[:-1])
        return value.new_full(shape, -self._log_surface)

    def entropy(self) -> Tensor:
        """log S_D in nats, (...)."""
        return self._like.new_full(self.batch_shape, self._log_surface)


class VonMisesFisher(Kept):
    """The von Mises-Fisher distribution on the unit sphere in R^D, see the module.

        log p(z) = log C_D(k) + k mu'z

    Right for D = 2 ... 200 and k = 1e-3 ... 1e4 in float32 and float64. `rsample` carries the
    first derivatives in mu, along the sphere, and in k. Arguments are trusted.

    Args:
        loc: mu, unit vectors, (..., D).
        concentration: k > 0, (...).
    Raises:
        ValueError: D < 2.
    Example:
        >>> q = VonMisesFisher(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(2.0))
        >>> q.mean                                               # coth(2) - 1/2 along mu
        tensor([0.0000, 0.0000, 0.5373])
    """

    arg_constraints = {"loc": constraints.sphere, "concentration": constraints.positive}
    support = constraints.sphere
    has_rsample = True
    twice_differentiable = False  # samples carry first derivatives only: see rsample
    loc = Whole(1)  # mu, (..., D)
    concentration = Whole(0)  # k, (...)

    def __init__(self, loc: Tensor, concentration: Tensor) -> None:
        self._loc, self._concentration = loc, concentration
        self._log_surface = log_surface(loc.shape[-1])
        batch_shape = torch.broadcast_shapes(loc.shape[:-1], concentration.shape)
        super().__init__(batch_shape, loc.shape[-1:], validate_args=False)

    @property
    def mean(self) -> Tensor:
        """A_D(k) mu, with A_D = I_{D/2} / I_{D/2-1}: inside the sphere, not on it."""
        length = mean_cosine(self._order, self._concentration)
        return self._whole(length.unsqueeze(-1) * self._loc)

    @property
    def log_normalizer(self) -> Tensor:
        """log C_D(k), (...)."""
        return self._whole(self._log_peak(), 0) - self._concentration

    def log_prob(self, value: Tensor) -> Tensor:
        # k (mu'z - 1) is -k |z - mu|^2 / 2 on the sphere, where k mu'z would cancel with log C_D(k).
        distance = (value - self._loc).square().sum(-1)
        return self._whole(self._log_peak(), 0) - 0.5 * self._concentration * distance

    def entropy(self) -> Tensor:
        """The entropy in nats, (...)."""
        drop = self._concentration * mean_cosine_complement(self._order, self._concentration)
        return (drop - self._log_peak()).expand(self.batch_shape)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        shape = self._extended_shape(torch.Size(sample_shape))
        with torch.no_grad():
            angle = self._angle(shape[:-1])
            across = self._loc.new_empty(shape).normal_()
            # Twice, since what the first leaves of mu counts where little else is left (D = 2).
            for _ in range(2):
                across = _unit(across - (across * self._loc).sum(-1, keepdim=True) * self._loc)
        if torch.is_grad_enabled() and self._concentration.requires_grad:
            angle = angle + self._slope(angle) * (self._concentration - self._concentration.detach())
        if torch.is_grad_enabled() and self._loc.requires_grad:
            across = across - (across * self._loc).sum(-1, keepdim=True) * self._loc
        angle = angle.unsqueeze(-1)
        return torch.cos(angle) * self._loc + torch.sin(angle) * across

    @property
    def _order(self) -> float:
        return self.event_shape[0] / 2 - 1

    def _log_peak(self) -> Tensor:
        """log p(mu), of the shape of the concentration."""
        return -log_mean_exp_cosine(self._order, self._concentration) - self._log_surface

    def _angle(self, shape: torch.Size) -> Tensor:
        """Angles to mu, by rejection from a fixed number of proposals."""
        k, m = self._concentration, self.event_shape[0] - 1
        proposed = (PROPOSALS,) + tuple(shape)
        first, second = torch._standard_gamma(k.new_full((2,) + proposed, m / 2)).unbind(0)
        b = m / (2 * k + torch.hypot(2 * k, torch.full_like(k, m)))
        # Everything by its distance from one: drop = 1 - cos(a), and x0 = (1 - b) / (1 + b).
        drop = 2 * b * first / (second + b * first)
        x0, x0_drop = (1 - b) / (1 + b), 2 * b / (1 + b)
        gain = k * (x0_drop - drop) + m * ((x0_drop + x0 * drop) * (1 + b).square() / (4 * b)).log()
        accepted = gain + torch.empty_like(gain).exponential_() >= 0
        chosen = accepted.to(torch.uint8).argmax(0, keepdim=True)
        angle = 2 * torch.atan2((b * first).sqrt(), second.sqrt()).gather(0, chosen).squeeze(0)
        # Away from the poles by no more than rounding: there sin(a) would be zero or below.
        tiny = 4 * torch.finfo(k.dtype).eps
        return angle.clamp(tiny, math.pi - tiny)

    @torch.no_grad()
    def _slope(self, angle: Tensor) -> Tensor:
        """da/dk at fixed F(a; k): negative, since the samples gather around mu."""
        k, power = self._concentration, self.event_shape[0] - 2
        nodes, weights = (angle.new_tensor(values) for values in legendre(SLOPE_NODES))
        mean_drop = mean_cosine_complement(self._order, k)
        drop = 2 * torch.sin(angle / 2).square()
        near = drop < mean_drop
        # From the angle to the pole on its side of the mean, or as far as q(t) / q(a) counts.
        reach = SLOPE_WIDTHS * torch.rsqrt(k + power)
        reach = -torch.minimum(reach, angle) * near + torch.minimum(reach, math.pi - angle) * ~near
        step = reach.unsqueeze(-1) * nodes
        at = angle.unsqueeze(-1)
        t = at + step
        log_ratio = -2 * k.unsqueeze(-1) * torch.sin(at + step / 2) * torch.sin(step / 2)
        if power:
            log_ratio = log_ratio + power * (torch.sin(t) / torch.sin(at)).log()
        excess = mean_drop.unsqueeze(-1) - 2 * torch.sin(t / 2).square()
        # The integral to the right of a is minus the one to its left: the sign of reach does that.
        return (log_ratio.exp() * excess * weights).sum(-1) * reach


def _unit(vector: Tensor) -> Tensor:
    return vector / vector.norm(dim=-1, keepdim=True)


@register_kl(VonMisesFisher, HypersphericalUniform)
def _kl_to_uniform(q: VonMisesFisher, p: HypersphericalUniform) -> Tensor:
    """log S_D - H(q), without adding and subtracting log S_D."""
    k = q._concentration
    kl = -k * mean_cosine_complement(q._order, k) - log_mean_exp_cosine(q._order, k)
    return kl.expand(torch.broadcast_shapes(q.batch_shape, p.batch_shape))
