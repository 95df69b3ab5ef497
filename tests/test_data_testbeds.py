"""The linear-Gaussian test bed against independent oracles: it judges everything else."""

import math

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_vae.data import LinearGaussian, load


def bed(x_dim: int = 6, latent_dim: int = 3, scale: float = 0.5, dtype=torch.float64) -> LinearGaussian:
    return LinearGaussian.random(x_dim, latent_dim, scale, seed=1, dtype=dtype)


def marginal(testbed: LinearGaussian) -> MultivariateNormal:
    covariance = testbed.weight @ testbed.weight.mT + testbed.scale**2 * torch.eye(testbed.x_dim).to(testbed.weight)
    return MultivariateNormal(testbed.loc, covariance)


def some_x(testbed: LinearGaussian, count: int = 7) -> torch.Tensor:
    return testbed.sample(count, torch.Generator().manual_seed(2))[1]


@pytest.mark.parametrize("x_dim, latent_dim", [(6, 3), (1, 1), (2, 5), (20, 4)])
@pytest.mark.parametrize("scale", [0.01, 0.5, 3.0])
def test_evidence_is_the_marginal_normal(x_dim, latent_dim, scale):
    testbed = bed(x_dim, latent_dim, scale)
    x = some_x(testbed)
    torch.testing.assert_close(testbed.log_evidence(x), marginal(testbed).log_prob(x), rtol=1e-8, atol=1e-8)


def test_evidence_by_quadrature():
    testbed = bed(x_dim=4, latent_dim=1)
    x = some_x(testbed)
    z = torch.linspace(-12, 12, 20_001, dtype=torch.float64)
    mean = z[:, None] * testbed.weight[:, 0] + testbed.loc
    log_joint = Normal(0.0, 1.0).log_prob(z)[:, None] + Normal(mean[:, None], testbed.scale).log_prob(x).sum(-1)
    integral = torch.logsumexp(log_joint, 0) + math.log(24 / 20_000)
    torch.testing.assert_close(testbed.log_evidence(x), integral, rtol=0, atol=1e-10)


def test_evidence_by_importance_sampling():
    testbed = bed(x_dim=3, latent_dim=2, scale=1.0)
    x, n = some_x(testbed, 3), 200_000
    z = torch.randn(n, 1, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_evidence = testbed.log_evidence(x)
    ratio = (Normal(z @ testbed.weight.mT + testbed.loc, testbed.scale).log_prob(x).sum(-1) - log_evidence).exp()
    assert ((ratio.mean(0) - 1).abs() < 4 * ratio.std(0) / math.sqrt(n)).all()


def test_bayes_rule_holds_at_every_z():
    testbed = bed()
    x = some_x(testbed)
    z = torch.randn(11, 1, 3, dtype=torch.float64)
    log_prior = Normal(0.0, 1.0).log_prob(z).sum(-1)
    log_likelihood = Normal(z @ testbed.weight.mT + testbed.loc, testbed.scale).log_prob(x).sum(-1)
    log_weight = log_prior + log_likelihood - testbed.posterior(x).log_prob(z)
    torch.testing.assert_close(log_weight, testbed.log_evidence(x).expand(11, -1), rtol=0, atol=1e-10)


def test_elbo_touches_the_evidence_only_at_the_posterior():
    testbed = bed()
    x = some_x(testbed)
    posterior = testbed.posterior(x)
    evidence = testbed.log_evidence(x)
    torch.testing.assert_close(testbed.elbo(x, posterior.loc, posterior.scale_tril), evidence, rtol=0, atol=1e-10)
    other = MultivariateNormal(posterior.loc + 0.1, scale_tril=1.2 * posterior.scale_tril)
    loss = evidence - testbed.elbo(x, other.loc, other.scale_tril)
    torch.testing.assert_close(loss, kl_divergence(other, posterior), rtol=0, atol=1e-10)
    assert (loss > 0.01).all()


def test_elbo_by_monte_carlo():
    testbed = bed()
    x, n = some_x(testbed, 4), 100_000
    q = MultivariateNormal(torch.zeros(4, 3, dtype=torch.float64), scale_tril=0.3 * torch.eye(3, dtype=torch.float64))
    torch.manual_seed(0)
    z = q.sample((n,))
    log_weight = (
        Normal(0.0, 1.0).log_prob(z).sum(-1)
        - q.log_prob(z)
        + Normal(z @ testbed.weight.mT + testbed.loc, testbed.scale).log_prob(x).sum(-1)
    )
    error = log_weight.mean(0) - testbed.elbo(x, q.loc, q.scale_tril)
    assert (error.abs() < 4 * log_weight.std(0) / math.sqrt(n)).all()


def test_mean_field_gap_is_the_divergence_and_the_loss_of_elbo():
    testbed = bed()
    x = some_x(testbed)
    q = testbed.best_mean_field(x)
    as_full = MultivariateNormal(q.mean, scale_tril=torch.diag_embed(q.stddev))
    gap = testbed.mean_field_gap()
    assert gap > 0.01
    torch.testing.assert_close(kl_divergence(as_full, testbed.posterior(x)), gap.expand(7), rtol=0, atol=1e-10)
    elbo = testbed.elbo(x, q.mean, torch.diag_embed(q.stddev))
    torch.testing.assert_close(elbo, testbed.log_evidence(x) - gap, rtol=0, atol=1e-10)


def test_no_factorised_gaussian_is_better():
    testbed = bed()
    x = some_x(testbed)
    best = testbed.best_mean_field(x)
    loc, log_scale = best.mean.clone().requires_grad_(), best.stddev.log().requires_grad_()
    elbo = testbed.elbo(x, loc, torch.diag_embed(log_scale.exp()))
    for gradient in torch.autograd.grad(elbo.sum(), (loc, log_scale)):
        assert gradient.abs().max() < 1e-10
    for _ in range(20):
        worse = testbed.elbo(
            x, loc + 0.1 * torch.randn_like(loc), torch.diag_embed((log_scale + 0.1 * torch.randn_like(loc)).exp())
        )
        assert (worse < elbo).all()


def test_orthogonal_columns_have_no_gap():
    weight = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q * torch.tensor([3.0, 1.0, 0.2])
    testbed = LinearGaussian(weight, torch.zeros(8, dtype=torch.float64), 0.3)
    assert testbed.mean_field_gap().abs() < 1e-10


@pytest.mark.parametrize("seed", range(20))
def test_the_gap_is_never_negative(seed):
    assert LinearGaussian.random(5, 1 + seed % 6, 0.1, seed, torch.float64).mean_field_gap() >= -1e-12


def test_samples_have_the_moments_of_the_model():
    testbed, n = bed(), 100_000
    z, x = testbed.sample(n, torch.Generator().manual_seed(4))
    covariance = marginal(testbed).covariance_matrix
    assert ((x.mean(0) - testbed.loc).abs() < 4 * (covariance.diagonal() / n).sqrt()).all()
    variance = covariance.diagonal()
    error = (torch.cov(x.T) - covariance).abs()
    assert (error < 4.5 * ((covariance**2 + variance[:, None] * variance) / n).sqrt()).all()
    noise = (x - z @ testbed.weight.mT - testbed.loc) / testbed.scale
    assert abs(noise.square().mean() - 1) < 4 * math.sqrt(2 / noise.numel())


def fitted(x: torch.Tensor, latent_dim: int) -> MultivariateNormal:
    """Maximum-likelihood fits in closed form (Tipping and Bishop, 1999, equations 7 and 8) to data (F, N, X)."""
    loc = x.mean(1, keepdim=True)
    values, vectors = torch.linalg.eigh((x - loc).mT @ (x - loc) / x.shape[1])
    variance = values[:, :-latent_dim].mean(1, keepdim=True)
    spectrum = torch.cat([variance.expand(-1, x.shape[2] - latent_dim), values[:, -latent_dim:]], 1)
    return MultivariateNormal(loc.squeeze(1), vectors @ torch.diag_embed(spectrum) @ vectors.mT)


def test_a_perfect_fit_loses_what_was_predicted():
    testbed, n, fits = bed(6, 2), 2000, 200
    _, x = testbed.sample(n * fits, torch.Generator().manual_seed(0))
    losses = kl_divergence(marginal(testbed), fitted(x.view(fits, n, 6), latent_dim=2))
    error = 4 * losses.std() / math.sqrt(fits)
    assert testbed.num_parameters == 6 * 2 - 1 + 1 + 6
    assert abs(losses.mean() - testbed.expected_excess(n)) < error
    # The claim is sharp enough to tell the number of parameters to within two.
    assert error < 2 / (2 * n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_that_of_the_weight(dtype):
    testbed = bed(dtype=dtype)
    x = some_x(testbed)
    q = testbed.posterior(x)
    results = (
        x,
        testbed.log_evidence(x),
        testbed.mean_field_gap(),
        testbed.best_mean_field(x).mean,
        testbed.elbo(x, q.loc, q.scale_tril),
    )
    assert {result.dtype for result in results} == {dtype}
    assert testbed.to(dtype=torch.float64).weight.dtype == torch.float64
    assert (q.batch_shape, q.event_shape, testbed.best_mean_field(x).event_shape) == ((7,), (3,), (3,))


def test_dataset_carries_its_testbed():
    data, again = load("linear-gaussian", seed=3), load("linear-gaussian", seed=3)
    assert (len(data.train), len(data.validation), len(data.test)) == (20_000, 2_000, 2_000)
    assert data.x_shape == (20,) and data.train[:2].dtype == torch.float32
    assert torch.equal(data.test[:], again.test[:])
    assert not torch.equal(data.test[:], load("linear-gaussian", seed=4).test[:])
    # The mean log evidence is minus the entropy, within four standard errors.
    scores = data.testbed.log_evidence(data.train[:])
    entropy = marginal(data.testbed).entropy()
    assert abs(scores.mean() + entropy) < 4 * scores.std() / math.sqrt(len(scores))
    assert data.testbed.mean_field_gap() > 0.05


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: LinearGaussian(torch.zeros(3, 2), torch.zeros(2), 1.0),
            r"weight of shape \(3, 2\) and loc of shape \(2,\)",
        ),
        (
            lambda: LinearGaussian(torch.zeros(3, 2), torch.zeros(3), 0.0),
            "got scale=0.0, wanted a standard deviation > 0",
        ),
        (
            lambda: bed().log_evidence(torch.zeros(2, 5, dtype=torch.float64)),
            r"got x of shape \(2, 5\), wanted \(B, 6\)",
        ),
        (lambda: bed().expected_excess(0), "got num_train=0, wanted the number of training data, >= 1"),
        (
            lambda: load("linear-gaussian", binarization="dynamic"),
            r"binarization='dynamic' for float data in .*wanted \[0, 1\]",
        ),
        (
            lambda: load("linear-gaussian", image_size=8),
            "image_size or channels for data of shape .*Leave these options out",
        ),
    ],
)
def test_errors_say_got_wanted_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
