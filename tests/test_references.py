"""Reference posteriors, quadrature and distances: closed forms, ArviZ, Pyro's NUTS, planted faults."""

import math
import warnings

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS
from torch import Tensor

from pyro_vae.judging import ais, compare_guides, identity
from pyro_vae.judging.distances import guide_distances, sliced_wasserstein, squared_mmd
from pyro_vae.judging.grids import quadrature
from pyro_vae.judging.references import diagnostics, reference
from tests.pairs import binary, linear_pair, small_pair


class Banana:
    """Two latents with a curved posterior; no closed form."""

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            mean = torch.stack([z[..., 0] + z[..., 1] ** 2, z[..., 1] - 0.5 * z[..., 0]], -1)
            pyro.sample("x", dist.Normal(mean, 0.6).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.5 * x, 0.7).to_event(1))


X = torch.tensor([[0.5, 0.2], [1.5, -1.0], [-0.5, 0.7]], dtype=torch.float64)


def batch_errors(draws: Tensor) -> Tensor:
    """Standard error of the mean of correlated draws (C, S, ...): from their bulk ESS."""
    _, ess = diagnostics(draws)
    return draws.flatten(0, 1).std(0) / ess.sqrt()


def test_moments_of_the_linear_model():
    pair, x = linear_pair(exact=False, stretch=0.6)
    found = reference(pair.model, pair.guide, x, num_chains=8, num_warmup=150, num_samples=400)
    z, posterior = found.draws["z"], pair.bed.posterior(x)
    assert z.shape == (8, 400, 30, 3)
    assert found.converged.all() and "100 % converged" in str(found)
    assert ((z.mean((0, 1)) - posterior.mean).abs() < 4 * batch_errors(z)).all()
    centred = z - posterior.mean
    outer = (centred.unsqueeze(-1) * centred.unsqueeze(-2)).flatten(-2)
    error = outer.mean((0, 1)) - posterior.covariance_matrix.flatten(-2)
    assert (error.abs() < 4.5 * batch_errors(outer)).all()  # 270 of them
    assert ((found.acceptance - 0.8).abs() < 0.15).all()


def test_quadrature_is_exact_and_agrees_with_chains():
    pair = Banana()
    grid = quadrature(pair.model, pair.guide, X)
    finer = quadrature(pair.model, pair.guide, X, num_points=301, seed=3)
    assert (grid.rim < 1e-7).all()
    assert torch.allclose(grid.log_evidence, finer.log_evidence, atol=1e-6)
    assert torch.allclose(grid.covariance, finer.covariance, atol=1e-5)
    found = reference(pair.model, pair.guide, X, num_chains=16, num_warmup=200, num_samples=600)
    z = found.draws["z"]
    assert ((z.mean((0, 1)) - grid.mean).abs() < 4 * batch_errors(z)).all()
    outer = ((z - grid.mean).unsqueeze(-1) * (z - grid.mean).unsqueeze(-2)).flatten(-2)
    assert ((outer.mean((0, 1)) - grid.covariance.flatten(-2)).abs() < 4 * batch_errors(outer)).all()


def test_quadrature_of_the_linear_model():
    bed = linear_pair()[0].bed
    small = type(bed)(bed.weight[:, :2], bed.loc, bed.scale)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ small.weight.T + small.loc, small.scale).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 2.0).to_event(1))

    _, x = small.sample(20, generator=torch.Generator().manual_seed(0))
    found = quadrature(model, guide, x)
    assert torch.allclose(found.log_evidence, small.log_evidence(x), atol=1e-8)
    assert torch.allclose(found.mean, small.posterior(x).mean, atol=1e-8)
    assert torch.allclose(found.covariance, small.posterior(x).covariance_matrix, atol=1e-8)


def test_three_dimensions_to_six_digits_and_what_has_not_converged_says_so():
    pair, x = linear_pair(stretch=1.6)
    found = quadrature(pair.model, pair.guide, x[:6])
    assert (found.log_evidence - pair.bed.log_evidence(x[:6])).abs().max() < 1e-6 and found.converged.all()
    assert torch.allclose(found.covariance, pair.bed.posterior(x[:6]).covariance_matrix, atol=1e-5)
    rough = quadrature(pair.model, pair.guide, x[:6], num_points=7, refinements=0)
    off = (rough.log_evidence - pair.bed.log_evidence(x[:6])).abs()
    assert (off > 1e-3).all() and (rough.error > 1e-3).all() and not rough.converged.any()
    short = quadrature(pair.model, pair.guide, x[:6], num_points=45, width=2.0)
    assert (short.rim > 1e-3).all() and not short.converged.any()


def test_a_mode_that_the_guide_never_draws_is_found():
    """The posterior of |z| near 2 has two modes, and the guide has one: half of p(x), log 2 nats, and no more."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.abs(), 0.2).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 0.2).to_event(1))

    x = torch.tensor([[2.0], [1.5]], dtype=torch.float64)
    found = quadrature(model, guide, x)
    one_mode = dist.Normal(0.0, 1.04**0.5).log_prob(x[:, 0])  # of z > 0, but for its tail below 0
    assert torch.allclose(found.log_evidence, one_mode + math.log(2), atol=1e-6) and found.converged.all()
    assert found.mean.abs().max() < 1e-6


def test_quadrature_refuses_more_than_three_latents():
    pair, x = linear_pair()
    with pytest.raises(ValueError, match="4 unconstrained dimensions .* Use reference"):
        quadrature(*small_pair(latent_dim=4), binary())
    with pytest.raises(ValueError, match="at least 3 points"):
        quadrature(pair.model, pair.guide, x, num_points=2)


@pytest.mark.slow
def test_pyros_nuts_on_one_datum_agrees():
    pair = Banana()
    found = reference(pair.model, pair.guide, X, num_chains=8, num_warmup=150, num_samples=600)
    ours = found.draws["z"][:, :, 1]
    pyro.set_rng_seed(0)
    sampler = MCMC(NUTS(pair.model), num_samples=600, warmup_steps=150, disable_progbar=True)
    sampler.run(X[1:2])
    nuts = sampler.get_samples(group_by_chain=True)["z"][:, :, 0]
    for power in (1, 2):
        a, b = ours**power, nuts**power
        error = (batch_errors(a).square() + batch_errors(b).square()).sqrt()
        assert ((a.mean((0, 1)) - b.mean((0, 1))).abs() < 4 * error).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* one by one, since the p")  # programs for (B, D) only
def test_constrained_sites_come_back_constrained():
    def model(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(x.new_tensor(2.0), 1.0))
            pyro.sample("x", dist.Poisson(rate).expand([len(x)]), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.LogNormal(torch.zeros_like(x), 1.0))

    x = torch.tensor([0.0, 3.0, 9.0], dtype=torch.float64)
    found = reference(model, guide, x, num_chains=8, num_samples=400)
    rate = found.draws["rate"]
    assert rate.shape == (8, 400, 3) and (rate > 0).all()
    for power, truth in ((1, (x + 2) / 2), (2, (x + 2) * (x + 3) / 4)):  # Gamma(x + 2, 2)
        assert ((rate**power).mean((0, 1)) - truth).abs().max() < (4 * batch_errors(rate**power)).max()
    grid = quadrature(model, guide, x)
    truth = torch.lgamma(x + 2) - torch.lgamma(x + 1) - (x + 2) * math.log(2)
    assert torch.allclose(grid.log_evidence, truth, atol=1e-6)


@pytest.mark.parametrize("chains, samples", [(4, 300), (2, 101), (8, 40), (3, 37), (1, 200), (2, 5)])
def test_diagnostics_are_those_of_arviz(chains, samples):
    generator = torch.Generator().manual_seed(samples)
    noise = torch.randn(chains, samples, 6, generator=generator, dtype=torch.float64)
    memory = torch.tensor([0.0, 0.5, 0.9, -0.5, 0.99, -0.9], dtype=torch.float64)
    draws = noise.clone()
    for s in range(1, samples):
        draws[:, s] = memory * draws[:, s - 1] + noise[:, s]
    draws[..., 1] = draws[..., 1].round()  # ties
    draws[0, :, 2] += 1.0
    rhat, ess = diagnostics(draws)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(6):
            column = draws[..., i].numpy()
            assert np.isclose(ess[i].item(), float(arviz.ess(column, method="bulk")), rtol=1e-10)
            if chains > 1:
                assert np.isclose(rhat[i].item(), float(arviz.rhat(column)), rtol=1e-10)


def test_chains_that_have_not_converged_are_said_so():
    def model(x):  # two modes that no chain leaves
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(1), 5.0).to_event(1))
            pyro.sample("x", dist.Normal(z.abs(), 0.05).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 4.0).to_event(1))

    with pytest.warns(UserWarning, match="of 2 data have not converged.*Raise num_samples"):
        found = reference(model, guide, torch.full((2, 1), 4.0), num_warmup=50, num_samples=50)
    assert not found.converged.any()


@pytest.mark.filterwarnings("ignore:the chains of")  # short ones do
def test_adaptation_ends_with_the_warm_up():
    pair, x = linear_pair(exact=False)
    short = reference(pair.model, pair.guide, x, num_warmup=40, num_samples=200)
    longer = reference(pair.model, pair.guide, x, num_warmup=40, num_samples=210)
    assert torch.equal(short.step_size, longer.step_size)
    assert torch.equal(short.unconstrained, longer.unconstrained[:, :200])


@pytest.mark.slow
def test_distances_see_what_was_planted():
    pair, x = linear_pair()
    found = reference(pair.model, pair.guide, x, num_chains=8, num_warmup=100, num_samples=500)
    exact = guide_distances(pair.model, pair.guide, x, reference=found)
    assert abs(exact.variance_ratio.log().mean()) < 0.02 and exact.mean_error.square().mean().sqrt() < 0.06
    assert exact.sliced_wasserstein.mean() < 1.5 * exact.null_sliced_wasserstein.mean()
    assert abs(exact.mmd.mean()) < 4 * exact.mmd.std() / math.sqrt(len(x)) + 2e-4
    narrow_pair, _ = linear_pair(stretch=0.7)
    narrow = guide_distances(narrow_pair.model, narrow_pair.guide, x, reference=found)
    assert narrow.variance_ratio.mean().item() == pytest.approx(0.49, abs=0.02)
    assert narrow.null_variance_ratio.log().mean().abs() < 0.05
    assert narrow.sliced_wasserstein.mean() == pytest.approx(0.3, abs=0.05)  # |0.7 - 1| standard deviations
    assert (narrow.mmd > 5 * narrow.null_mmd.abs().mean()).all()

    def shifted(x):
        posterior = pair.bed.posterior(x)
        with pyro.plate("data", len(x)):
            spread = posterior.covariance_matrix.diagonal(dim1=-2, dim2=-1).sqrt()
            pyro.sample("z", dist.MultivariateNormal(posterior.mean + spread, scale_tril=posterior.scale_tril))

    off = guide_distances(pair.model, shifted, x, reference=found)
    assert off.mean_error.mean().item() == pytest.approx(1.0, abs=0.05)
    assert "mean error (sd) 0.99" in str(off)
    with pytest.raises(ValueError, match="got 29 data and a reference of 30"):
        guide_distances(pair.model, pair.guide, x[:29], reference=found)


def test_distances_in_closed_form():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(500, 40, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    # E k of N(0, s^2 I) pairs at distance with variance 2: (1 + 2 / U)^(-U / 2) for the width U.
    shift = torch.tensor([1.0, 0.0], dtype=torch.float64)
    truth = 2 * 0.5 - 2 * 0.5 * math.exp(-1 / (2 * (2 + 2)))
    found = squared_mmd(x, y + shift)
    assert abs(found.mean() - truth) < 4 * found.std() / math.sqrt(40)
    null = squared_mmd(x, y)
    assert abs(null.mean()) < 4 * null.std() / math.sqrt(40)
    directions = torch.eye(2, dtype=torch.float64)
    assert torch.allclose(sliced_wasserstein(x, x + shift, directions), torch.tensor(0.5).double().sqrt())
    with pytest.raises(ValueError, match="wanted the same"):
        sliced_wasserstein(x, y[:10], directions)


def test_a_vae_and_its_chunks():
    model, guide = small_pair()
    x = (torch.rand(6, 1, 4, 4, generator=torch.Generator().manual_seed(0)) < 0.5).float()
    found = reference(model, guide, x, num_chains=4, num_warmup=60, num_samples=200)
    assert found.draws["z"].shape == (4, 200, 6, 3) and found.draws["z"].dtype == torch.float32
    assert found.rhat.shape == found.ess.shape == (6, 3) and found.rhat.max() < 1.1


def test_refusals():
    pair, x = linear_pair()
    with pytest.raises(ValueError, match="num_chains=1, wanted at least 2"):
        reference(pair.model, pair.guide, x, num_chains=1)
    with pytest.raises(ValueError, match="num_warmup=3, wanted at least 20"):
        reference(pair.model, pair.guide, x, num_warmup=3)


def test_guides_are_compared_from_quadrature_and_one_that_has_not_converged_says_so():
    pair = Banana()
    exact = quadrature(pair.model, pair.guide, X)
    found = compare_guides(pair.model, {"own": pair.guide}, X, log_likelihood=exact, num_samples=4000, progress=False)
    kl = identity(pair.model, pair.guide, X, progress=False).pointwise
    gap = found.scores["own"].gap
    assert found.log_likelihood.value == pytest.approx(exact.log_evidence.mean().item(), abs=1e-9)
    assert not gap.bound and abs(gap.value - kl.mean().item()) < 4 * gap.mc_stderr
    rough = quadrature(pair.model, pair.guide, X, num_points=5, refinements=0)
    assert not rough.converged.any() and bool(rough.pointwise_stderr.isinf().all())


class Everywhere(torch.distributions.constraints.Constraint):
    """A support of somebody's own: all numbers."""

    event_dim = 0

    def check(self, value):
        return torch.ones_like(value, dtype=torch.bool)


class Stretched(torch.distributions.Transform):
    """Its bijection: it keeps what it computed, and takes no arguments, so that nobody can make it without its cache."""

    domain, codomain = torch.distributions.constraints.real, Everywhere()
    bijective, sign = True, 1

    def __init__(self):
        super().__init__(cache_size=1)

    def _call(self, x):
        return x.sinh()

    def _inverse(self, y):
        return y.asinh()

    def log_abs_det_jacobian(self, x, y):
        return x.cosh().log()


torch.distributions.biject_to.register(Everywhere)(lambda constraint: Stretched())


class Wide(dist.Normal):
    support = Everywhere()


def test_a_support_of_ones_own_goes_by_its_own_bijection():
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", Wide(x.new_zeros(()), x.new_ones(())))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", Wide(x / 2, torch.ones_like(x)))

    exact = dist.Normal(x.new_zeros(()), 2**0.5).log_prob(x)
    assert torch.allclose(quadrature(model, guide, x).pointwise, exact, atol=1e-6)
    found = ais(model, guide, x, num_steps=40, num_samples=50, seed=0, progress=False)
    assert bool(((found.pointwise - exact).abs() < 5 * found.pointwise_stderr + 1e-3).all())
