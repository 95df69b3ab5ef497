"""Distributions on the sphere against mpmath, scipy, quadrature and closed forms."""

import math

import mpmath
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import scipy.special
import scipy.stats
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.autograd import gradcheck
from torch.distributions import kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import normalize, softplus

from pyro_vae.parts.distributions import spherical
from pyro_vae.parts.distributions.spherical import VonMisesFisher as VMF
from pyro_vae.parts.distributions.spherical import log_mean_exp_cosine, mean_cosine, mean_cosine_complement
from pyro_vae.parts.posteriors.amortized import VonMisesFisher
from pyro_vae.parts.priors.standard import HypersphericalUniform
from pyro_vae.programs.pair import Guide
from pyro_vae.testing import PosteriorLaws, PriorLaws

CONCENTRATIONS = [1e-3, 1e-2, 0.1, 0.5, 1.0, 3.0, 10.0, 31.6, 100.0, 1e3, 1e4]
DIMS = [2, 3, 4, 5, 7, 10, 20, 33, 50, 100, 200]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def vmf(*leading, D=3, dtype=torch.float64):
    k = (2 * random(*leading, seed=1)).exp()
    return VMF(normalize(random(*leading, D), dim=-1).to(dtype), k.to(dtype))


class TestVonMisesFisher(PosteriorLaws):
    def make(self):
        return VonMisesFisher(nn.Sequential(nn.Flatten(-3), nn.Linear(16, 5), nn.Tanh()), latent_dim=3)


class TestVonMisesFisherOnACircle(PosteriorLaws):
    def make(self):
        return VonMisesFisher(nn.Sequential(nn.Flatten(-3), nn.Linear(16, 5), nn.Tanh()), latent_dim=2)


class TestHypersphericalUniform(PriorLaws):
    def make(self):
        return HypersphericalUniform(3)


# Bessel functions and the normaliser


def log_bessel_i(order, x):
    """log I_v(x), of what the package takes of it."""
    return log_mean_exp_cosine(order, x) + x + order * (x / 2).log() - math.lgamma(order + 1)


@pytest.mark.parametrize("D", DIMS)
def test_bessel_functions_moments_and_the_normaliser_are_mpmaths(D):
    """float64 to 1e-9 relative; float32 to what its arguments allow."""
    with mpmath.workdps(40):
        order = mpmath.mpf(D) / 2 - 1
        for value in CONCENTRATIONS:
            k = mpmath.mpf(value)
            bessel, mean = mpmath.besseli(order, k), mpmath.besseli(order + 1, k) / mpmath.besseli(order, k)
            log_c = order * mpmath.log(k) - (order + 1) * mpmath.log(2 * mpmath.pi) - mpmath.log(bessel)
            # Not log I_0(k) = log_mean + k itself: a thousandth of both for a small k, it keeps fewer digits.
            log_mean = mpmath.log(bessel) - k - order * mpmath.log(k / 2) + mpmath.loggamma(order + 1)
            surface = mpmath.log(2) + mpmath.mpf(D) / 2 * mpmath.log(mpmath.pi) - mpmath.loggamma(mpmath.mpf(D) / 2)
            point = torch.tensor(value, dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(log_bessel_i(D / 2 - 1, point), point)
            mu = torch.eye(D, dtype=torch.float64)[0]
            q = VMF(mu, point)
            wanted = {
                log_mean_exp_cosine(D / 2 - 1, point): log_mean,
                slope: mean + order / k,
                mean_cosine(D / 2 - 1, point): mean,
                mean_cosine_complement(D / 2 - 1, point): 1 - mean,
                q.log_normalizer: log_c,
                q.log_prob(mu): log_c + k,
                q.log_prob(-mu): log_c - k,
                q.mean[0]: mean,
                q.entropy(): -log_c - k * mean,
            }
            for ours, exact in wanted.items():
                assert abs(ours.item() / float(exact) - 1) < 1e-8, (value, float(exact))
            kl = kl_divergence(q, spherical.HypersphericalUniform(D)).item()
            assert abs(kl - float(surface + log_c + k * mean)) < 1e-9 and kl > 0
            single = VMF(mu.float(), point.detach().float())
            for ours, exact in (
                (single.log_normalizer, log_c),
                (single.mean[0], mean),
                (single.entropy(), -log_c - k * mean),
            ):
                assert abs(ours.item() - float(exact)) < 3e-6 * max(abs(float(exact)), 1) + 1e-6 * D


@pytest.mark.parametrize("order", [0.05, 0.2, 0.5, 0.77, 1.3, math.pi, 12.34, 60.1])
def test_orders_need_not_be_halves(order):
    x = np.array(CONCENTRATIONS[:-1])
    wanted = np.log(scipy.special.ive(order, x)) + x
    ours = log_bessel_i(order, torch.from_numpy(x)).numpy()
    usable = np.isfinite(wanted)
    assert usable.sum() > 5 and np.allclose(ours[usable], wanted[usable], rtol=1e-7, atol=1e-7)


def test_derivatives_of_the_normaliser_are_right():
    k = torch.tensor([0.01, 1.0, 30.0, 500.0], dtype=torch.float64, requires_grad=True)
    for D in (2, 3, 10):
        assert gradcheck(lambda k: VMF(torch.eye(D, dtype=torch.float64)[0], k).log_normalizer, k)  # noqa: B023
        assert gradcheck(lambda k: VMF(torch.eye(D, dtype=torch.float64)[0], k).entropy(), k)  # noqa: B023
    with pytest.raises(ValueError, match="got order=-0.5, wanted a real number >= 0"):
        log_bessel_i(-0.5, k)


# Densities


@pytest.mark.parametrize("D", [2, 3, 5])
def test_the_density_is_scipys(D):
    q = vmf(2, 4, D=D)
    z = normalize(random(6, 2, 4, D, seed=3), dim=-1)
    ours = q.log_prob(z)
    for b in range(2):
        for c in range(4):
            oracle = scipy.stats.vonmises_fisher(q.loc[b, c].numpy(), q.concentration[b, c].item())
            assert np.allclose(ours[:, b, c].numpy(), oracle.logpdf(z[:, b, c].numpy()), rtol=1e-10, atol=1e-10)
            assert np.isclose(q.entropy()[b, c].item(), oracle.entropy(), rtol=1e-9, atol=1e-9)


def test_densities_integrate_to_one_on_circle_and_sphere():
    angle = torch.arange(4000, dtype=torch.float64) * 2 * math.pi / 4000
    circle = torch.stack([angle.cos(), angle.sin()], -1).unsqueeze(1)
    nodes, weights = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(200))
    ring = circle[::10].squeeze(1)
    sphere = torch.cat([(1 - nodes**2).sqrt()[:, None, None] * ring, nodes[:, None, None].expand(-1, 400, 1)], -1)
    for q in (vmf(5, D=2), spherical.HypersphericalUniform(2).expand([5])):
        assert (q.log_prob(circle).exp().sum(0) * 2 * math.pi / 4000 - 1).abs().max() < 1e-9
    for q in (vmf(5, D=3), spherical.HypersphericalUniform(3).expand([5])):
        total = (q.log_prob(sphere.unsqueeze(2)).exp() * weights[:, None, None]).sum((0, 1)) * 2 * math.pi / 400
        assert (total - 1).abs().max() < 1e-9


def test_gradients_of_the_density_are_right_along_the_sphere():
    k, raw, z = (
        random(3).exp().requires_grad_(),
        random(3, 4).requires_grad_(),
        random(2, 3, 4, seed=2).requires_grad_(),
    )
    assert gradcheck(lambda raw, k, z: VMF(normalize(raw, dim=-1), k).log_prob(normalize(z, dim=-1)), (raw, k, z))


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (0,), (2, 0)])
def test_shapes_broadcast_and_expand(leading):
    for q in (vmf(*leading), spherical.HypersphericalUniform(3, leading, like=random(1))):
        wide = q.expand([5, *leading])
        z = wide.rsample((4,))
        assert z.shape == (4, 5, *leading, 3) and z.dtype == torch.float64 and len(z.flatten().unique()) == z.numel()
        assert wide.log_prob(z).shape == (4, 5, *leading) and torch.allclose(
            wide.log_prob(z), q.log_prob(z), rtol=1e-14
        )
        assert wide.mean.shape == (5, *leading, 3) and wide.entropy().shape == (5, *leading)
        assert wide.log_prob(torch.ones(3).double() / 3**0.5).shape == (5, *leading)
    kl = kl_divergence(vmf(*leading).expand([5, *leading]), spherical.HypersphericalUniform(3))
    assert kl.shape == (5, *leading)
    with pytest.raises((ValueError, RuntimeError)):
        vmf(3).expand([4])


# Draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("D", [2, 3, 10, 50, 200])
def test_draws_are_on_the_sphere_and_have_the_first_two_moments(D, dtype):
    torch.manual_seed(0)
    k = torch.tensor(CONCENTRATIONS)[::2].to(dtype)
    mu = normalize(random(len(k), D, dtype=dtype), dim=-1)
    q, n = VMF(mu, k), 20_000 if D <= 10 else 4_000
    z = q.expand([n, len(k)]).sample()
    assert torch.isfinite(z).all() and q.support.check(z).all()
    cosine = (z * mu).sum(-1).double()
    drop = 0.5 * (z - mu).double().square().sum(-1)  # 1 - cos, which float32 resolves
    k = k.double()
    mean, rest = mean_cosine(D / 2 - 1, k), mean_cosine_complement(D / 2 - 1, k)
    assert ((drop.mean(0) - rest).abs() < 4 * drop.std(0) / n**0.5 + 1e-6 * rest).all()
    # The equation of A(k): E[sin^2] = (D - 1) A / k.
    sine = drop * (2 - drop)
    assert ((sine.mean(0) - (D - 1) * mean / k).abs() < 4.5 * sine.std(0) / n**0.5 + 1e-6).all()
    across = (z.double() - cosine.unsqueeze(-1) * mu) * torch.ones(D)
    off = across.mean(0) / (across.std(0) / n**0.5)
    assert off.abs().max() < 5.5 and (off.abs() > 2).double().mean() < 0.15


@pytest.mark.parametrize("D", [2, 3, 20])
def test_angles_follow_their_distribution(D):
    """Kolmogorov and Smirnov's distance to the distribution function, by quadrature."""
    torch.manual_seed(0)
    for k in (1e-3, 1.0, 20.0, 1e4):
        q = VMF(torch.eye(D, dtype=torch.float64)[0], torch.tensor(k, dtype=torch.float64))
        drawn = q._angle(torch.Size([5000])).numpy()
        grid = np.linspace(0, min(math.pi, 12 * (D / k) ** 0.5 + 12 / k**0.5), 20_001)
        density = np.exp(k * (np.cos(grid) - 1) + (D - 2) * np.log(np.maximum(np.sin(grid), 1e-300)))
        level = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
        assert scipy.stats.kstest(drawn, lambda a: np.interp(a, grid, level / level[-1])).pvalue > 1e-3  # noqa: B023


def test_enough_proposals_are_drawn():
    """The chance that one is accepted, from the ratio of normalisers: 0.65 at worst."""
    worst = 1.0
    for D in (2, 3, 5, 20, 200):
        for value in CONCENTRATIONS:
            k, m = value, D - 1
            b = m / (2 * k + math.hypot(2 * k, m))
            x0 = (1 - b) / (1 + b)
            g = torch.distributions.Beta(m / 2, m / 2).expand([20_000]).sample().double()
            w = (1 - (1 + b) * g) / (1 - (1 - b) * g)
            log_ratio = k * (w - x0) + m * ((1 - x0 * w) / (1 - x0**2)).log()
            assert log_ratio.max() < 1e-4
            worst = min(worst, log_ratio.exp().mean().item())
    assert (1 - worst) ** spherical.PROPOSALS < 2e-9


def test_uniform_draws_are_uniform():
    torch.manual_seed(0)
    z = spherical.HypersphericalUniform(5, like=random(1)).sample((20_000,))
    assert (z.mean(0).abs() < 4 * (1 / 5 / 20_000) ** 0.5).all()
    products = z.unsqueeze(-1) * z.unsqueeze(-2)
    assert ((products.mean(0) - torch.eye(5) / 5).abs() < 4.2 * products.std(0) / 20_000**0.5 + 1e-12).all()
    assert z.pow(4).mean(0).sub(3 / 35).abs().max() < 4 * z.pow(4).std() / 20_000**0.5


# Gradients through draws


@pytest.mark.parametrize("k", [0.5, 10.0, 1e3])
@pytest.mark.parametrize("D", [2, 3, 10])
def test_gradients_of_the_mean_are_exact(D, k):
    """d E[z] / d(mu, k) against A_D(k) mu, for a random projection of z."""
    torch.manual_seed(0)
    raw, scale = random(D).requires_grad_(), torch.tensor(k, dtype=torch.float64, requires_grad=True)
    target, rows = random(D, seed=4), []
    for _ in range(100):
        z = VMF(normalize(raw, dim=-1), scale).expand([1000]).rsample()
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad((z @ target).mean(), (raw, scale))]))
    exact = torch.autograd.grad(VMF(normalize(raw, dim=-1), scale).mean @ target, (raw, scale))
    exact, rows = torch.cat([g.reshape(-1) for g in exact]), torch.stack(rows)
    assert ((rows.mean(0) - exact).abs() < 4 * rows.std(0) / 10).all()
    assert rows[:, -1].std() / 10 < 0.2 * rows[:, -1].mean().abs() + 1e-3  # and it says something


def test_gradients_of_a_nonlinear_function_are_those_of_the_integral():
    torch.manual_seed(0)
    angle = torch.arange(4000, dtype=torch.float64) * 2 * math.pi / 4000
    circle = torch.stack([angle.cos(), angle.sin()], -1)

    def bumpy(z):
        return torch.exp(z[..., 0]) * torch.sin(3 * z[..., 1])

    for k in (0.3, 4.0, 40.0):
        raw, scale = random(2).requires_grad_(), torch.tensor(k, dtype=torch.float64, requires_grad=True)
        rows = []
        for _ in range(100):
            z = VMF(normalize(raw, dim=-1), scale).expand([1000]).rsample()
            rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(bumpy(z).mean(), (raw, scale))]))
        q = VMF(normalize(raw, dim=-1), scale)
        exact = torch.autograd.grad((q.log_prob(circle).exp() * bumpy(circle)).sum() * 2 * math.pi / 4000, (raw, scale))
        exact, rows = torch.cat([g.reshape(-1) for g in exact]), torch.stack(rows)
        assert ((rows.mean(0) - exact).abs() < 4 * rows.std(0) / 10).all() and exact.abs().min() > 1e-3


@pytest.mark.parametrize("dtype, close", [(torch.float64, 1e-7), (torch.float32, 1e-4)])
@pytest.mark.parametrize("D", [2, 3, 10, 50, 200])
def test_the_slope_of_an_angle_keeps_its_distribution_function(D, dtype, close):
    """da/dk = -(dF/dk)/q(a) by mpmath, on both sides of the mean and in the tails."""
    with mpmath.workdps(20):
        for value in (0.125, 8.0, 512.0):  # exact in float32
            k, p = mpmath.mpf(value), D - 2
            mean = mpmath.besseli(mpmath.mpf(D) / 2, k) / mpmath.besseli(mpmath.mpf(D) / 2 - 1, k)
            centre, width = float(mpmath.acos(mean)), 1 / math.sqrt(value + p)
            angles = [a for a in (centre + s * width for s in (-3, -1, 0.1, 1.5, 4)) if 1e-3 < a < math.pi - 1e-3]
            angle = torch.tensor(angles, dtype=dtype)
            q = VMF(torch.eye(D, dtype=dtype)[0], torch.tensor(value, dtype=dtype))
            for a, ours in zip(angle.tolist(), q._slope(angle).tolist(), strict=True):

                def integrand(t, a=a, k=k, mean=mean, p=p):
                    return mpmath.exp(k * (mpmath.cos(t) - mpmath.cos(a))) * (mpmath.sin(t) / mpmath.sin(a)) ** p * (mpmath.cos(t) - mean)  # fmt: skip

                ends = (
                    [a, a - width, a - 4 * width, a - 12 * width]
                    if a < centre
                    else [a, a + width, a + 4 * width, a + 12 * width]
                )
                ends = sorted({min(max(e, 0.0), math.pi) for e in ends})
                wanted = float(mpmath.quad(integrand, ends)) * (-1 if a < centre else 1)
                assert abs(ours / wanted - 1) < close, (value, a, ours, wanted)


def test_a_step_can_be_captured():
    raw, rate = random(3, 4).requires_grad_(), random(3).requires_grad_()

    def step(raw, rate):
        q = VMF(normalize(raw, dim=-1), softplus(rate)).expand([5, 3])
        z = q.rsample()
        return torch.autograd.grad((q.log_prob(z) - z[..., 0].exp()).mean(), (raw, rate))

    captured, others = make_fx(step)(raw, rate), [(0.5 * t).detach().requires_grad_() for t in (raw, rate)]
    torch.manual_seed(1)
    wanted = step(*others)
    torch.manual_seed(1)
    for ours, theirs in zip(captured(*others), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


# The posterior and the prior


def test_the_posterior_is_what_its_head_says():
    torch.manual_seed(0)
    posterior, x = VonMisesFisher(nn.Linear(3, 5), latent_dim=4, minimum_concentration=0.2).double(), random(6, 3)
    output = posterior.head(posterior.encoder(x))
    q = posterior(x)
    assert torch.allclose(q.loc, normalize(output[:, :4], dim=-1), rtol=1e-12)
    assert torch.allclose(q.concentration, 0.2 + 4 * softplus(output[:, 4]), rtol=1e-12)


@pytest.mark.parametrize("size", [0.0, 1e-30, 1e30])
def test_a_direction_of_any_length_is_a_direction(size):
    posterior = VonMisesFisher(nn.Identity(), latent_dim=3, features=1)
    output = (size * torch.tensor([[3.0, 0.0, 4.0, 0.0]])).requires_grad_()
    q = posterior.family(output)
    wanted = [1.0, 0.0, 0.0] if size == 0 else [0.6, 0.0, 0.8]
    assert torch.allclose(q.loc, torch.tensor([wanted])) and torch.isfinite(q.rsample()).all()
    (gradient,) = torch.autograd.grad(q.log_prob(torch.tensor([0.0, 1.0, 0.0])).sum(), output)
    assert torch.isfinite(gradient[:, -1]).all() and (size != 0 or torch.equal(gradient[:, :3], torch.zeros(1, 3)))


def test_pyro_integrates_the_kl_and_a_guide_learns_the_posterior():
    """Under a likelihood exp(x'z) and a uniform prior p(z | x) is VMF(x / |x|, |x|): the bound is log M(|x|)."""
    torch.manual_seed(0)
    D, x = 4, 3 * random(8, 4)
    prior = HypersphericalUniform(D).double()
    guide = Guide(VonMisesFisher(nn.Identity(), D, features=D)).double()
    with torch.no_grad():  # the direction is linear in x, the concentration is not: give it |x| as a feature
        guide.posterior.encoder = nn.Sequential(nn.Linear(D, 32), nn.Tanh()).double()
        guide.posterior.head = nn.Linear(32, D + 1).double()

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", prior())
            pyro.factor("x", (x * z).sum(-1))

    length = x.norm(dim=-1)
    exact = (-VMF(normalize(x, dim=-1), length).log_normalizer - spherical.log_surface(D)).mean()
    loss = TraceMeanField_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=1)
    optimiser = torch.optim.Adam(guide.parameters(), 0.03)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: (1 - i / 300) ** 2)
    for _ in range(300):
        optimiser.zero_grad()
        (loss.differentiable_loss(model, guide, x) / len(x)).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        q = guide.posterior(x)
        bound = ((q.mean * x).sum(-1) - kl_divergence(q, prior())).mean()
    assert -1e-9 < exact - bound < 0.01


def test_impossible_dimensions_are_named():
    for build in (lambda: VonMisesFisher(nn.Linear(2, 2), 1), lambda: HypersphericalUniform(1)):
        with pytest.raises(ValueError, match="got latent_dim=1, wanted 2 or more: the sphere in R.1 is two points"):
            build()
    with pytest.raises(ValueError, match="got a sphere in 1 dimensions, wanted 2 or more"):
        spherical.HypersphericalUniform(1)
    with pytest.raises(ValueError, match="got minimum_concentration=0, wanted a number > 0"):
        VonMisesFisher(nn.Linear(2, 2), 3, minimum_concentration=0)
    assert list(HypersphericalUniform(3).state_dict()) == []
    with pytest.raises(NotImplementedError):
        kl_divergence(vmf(3), dist.Normal(torch.zeros(3), 1.0).to_event(1))
