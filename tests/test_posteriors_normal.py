"""Gaussian and mixture posteriors against closed forms, quadrature, torch and the linear-Gaussian test bed."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import TraceMeanField_ELBO
from torch import nn
from torch.autograd import gradcheck
from torch.distributions import LowRankMultivariateNormal, MixtureSameFamily, MultivariateNormal, kl_divergence
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.data.testbeds import LinearGaussian
from pyro_vae.parts.distributions.mixture import DiagonalNormalMixture
from pyro_vae.parts.distributions.normal import CholeskyNormal
from pyro_vae.parts.distributions.normal import LowRankNormal as LowRank
from pyro_vae.parts.posteriors.amortized import DiagonalNormal, FullNormal, LowRankNormal, NormalMixture
from pyro_vae.programs.pair import Guide
from pyro_vae.testing import PosteriorLaws
from pyro_vae.traces import particles

LEADING = [(), (3,), (2, 3), (1, 1)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cholesky_normal(*leading, D=3, dtype=torch.float64):
    tril = 0.6 * random(*leading, D, D, seed=1, dtype=dtype).tril(-1) + torch.diag_embed(
        (0.4 * random(*leading, D, seed=2, dtype=dtype)).exp()
    )
    return CholeskyNormal(random(*leading, D, dtype=dtype), tril)


def low_rank_normal(*leading, D=3, R=2, dtype=torch.float64):
    scale = (0.4 * random(*leading, D, seed=2, dtype=dtype)).exp()
    return LowRank(random(*leading, D, dtype=dtype), scale, random(*leading, D, R, seed=1, dtype=dtype))


def mixture(*leading, C=3, D=2, dtype=torch.float64):
    scale = (0.3 * random(*leading, C, D, seed=2, dtype=dtype)).exp()
    return DiagonalNormalMixture(
        1.2 * random(*leading, C, D, dtype=dtype), scale, random(*leading, C, seed=1, dtype=dtype)
    )


def oracle(q):
    """The same distribution as torch has it."""
    if isinstance(q, CholeskyNormal):
        return MultivariateNormal(q.loc, scale_tril=q.scale_tril)
    if isinstance(q, LowRank):
        return LowRankMultivariateNormal(q.loc, q.scale.unsqueeze(-1) * q.factor, q.scale**2)
    parts = torch.distributions.Independent(torch.distributions.Normal(q.loc, q.scale), 1)
    return MixtureSameFamily(torch.distributions.Categorical(logits=q.logits), parts)


FAMILIES = {"full": cholesky_normal, "low rank": low_rank_normal, "mixture": mixture}


class Laws(PosteriorLaws):
    encoder = staticmethod(lambda: nn.Sequential(nn.Flatten(-3), nn.Linear(16, 5), nn.Tanh()))


class TestFullNormal(Laws):
    def make(self):
        return FullNormal(self.encoder(), latent_dim=3)


class TestLowRankNormal(Laws):
    def make(self):
        return LowRankNormal(self.encoder(), latent_dim=3, rank=2)


class TestNormalMixture(Laws):
    def make(self):
        return NormalMixture(self.encoder(), latent_dim=2, num_components=3)


class TestNormalMixtureOnALine(Laws):
    def make(self):
        return NormalMixture(self.encoder(), latent_dim=1, num_components=2)


# Distributions against torch's


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("leading", LEADING)
@pytest.mark.parametrize("name", FAMILIES)
def test_densities_and_moments_are_torchs(name, leading, dtype):
    q = FAMILIES[name](*leading, dtype=dtype)
    wanted = oracle(FAMILIES[name](*leading))
    D, close = (
        q.event_shape[0],
        {"rtol": 1e-10, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-4},
    )
    for shape in (leading, (4, *leading), (4, 1, *leading), (1,) * len(leading)):
        z = 2 * random(*shape, D, seed=5)
        ours, theirs = q.log_prob(z.to(dtype)), wanted.log_prob(z)
        assert ours.dtype == dtype and ours.shape == theirs.shape
        assert torch.allclose(ours.double(), theirs, **close)
    assert torch.allclose(q.mean.double(), wanted.mean, **close)
    assert torch.allclose(q.variance.double(), wanted.variance, **close)
    if name != "mixture":
        assert torch.allclose(q.entropy().double(), wanted.entropy(), **close)
        assert torch.allclose(q.covariance_matrix.double(), wanted.covariance_matrix, **close)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("name", FAMILIES)
def test_no_data_give_no_numbers(name, leading):
    q = FAMILIES[name](*leading)
    z = q.expand([4, *leading]).rsample()
    assert z.shape == (4, *leading, q.event_shape[0]) and q.log_prob(z).shape == (4, *leading)
    assert q.mean.shape == q.variance.shape == z.shape[1:]


@pytest.mark.parametrize("name", FAMILIES)
def test_expanded_distributions_score_draw_and_differentiate_as_copies_do(name):
    q = FAMILIES[name](3)
    wide = q.expand([4, 2, 3])
    z = random(4, 2, 3, q.event_shape[0], seed=5)
    assert wide.batch_shape == (4, 2, 3) and wide.mean.shape == z.shape and wide.variance.shape == z.shape
    assert torch.allclose(wide.log_prob(z), oracle(q).expand([4, 2, 3]).log_prob(z), rtol=1e-12, atol=1e-12)
    assert wide.log_prob(z[0, 0]).shape == (4, 2, 3)
    draw = wide.expand([5, 4, 2, 3]).rsample((6,))
    assert draw.shape == (6, 5, 4, 2, 3, q.event_shape[0]) and len(draw.flatten().unique()) == draw.numel()
    one = FAMILIES[name]().expand([3, 1]).expand([3, 2])
    assert one.log_prob(z[0, 0, 0]).shape == one.rsample().shape[:-1] == (3, 2)
    with pytest.raises((ValueError, RuntimeError)):
        q.expand([4])


@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_of_densities_are_right(name):
    q = FAMILIES[name](3)
    arguments = [getattr(q, "_" + field).clone().requires_grad_() for field in q.arg_constraints]
    z = random(2, 3, q.event_shape[0], seed=5).requires_grad_()
    assert gradcheck(lambda z, *a: type(q)(*a).expand([2, 3]).log_prob(z), (z, *arguments))


@pytest.mark.parametrize("name", FAMILIES)
def test_draws_have_the_mean_and_covariance(name):
    torch.manual_seed(0)
    q = FAMILIES[name](2)
    z = q.expand([40_000, 2]).sample()
    centred = z - q.mean
    assert ((z.mean(0) - q.mean).abs() < 4 * (q.variance / len(z)).sqrt()).all()
    products = centred.unsqueeze(-1) * centred.unsqueeze(-2)
    if name == "mixture":
        weight, between = q.logits.exp()[..., None, None], (q.loc - q.mean.unsqueeze(-2))
        each = torch.diag_embed(q.scale**2) + between.unsqueeze(-1) * between.unsqueeze(-2)
        wanted = (weight * each).sum(-3)
    else:
        wanted = q.covariance_matrix
    assert ((products.mean(0) - wanted).abs() < 4 * products.std(0) / len(z) ** 0.5).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_densities_integrate_to_one_in_two_dimensions(name):
    q = FAMILIES[name](2, D=2)
    line = torch.linspace(-14, 14, 561, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line).unsqueeze(1)
    assert (q.log_prob(grid).exp().sum(0) * (line[1] - line[0]) ** 2 - 1).abs().max() < 1e-8


@pytest.mark.parametrize("name", ["full", "low rank"])
def test_the_kl_to_a_factorised_normal_is_that_of_full_covariances(name):
    q = FAMILIES[name](4)
    prior = dist.Normal(random(3, seed=7), random(3, seed=8).exp()).to_event(1)
    wanted = kl_divergence(oracle(q), MultivariateNormal(prior.mean, torch.diag(prior.variance)).expand([4]))
    assert torch.allclose(kl_divergence(q, prior), wanted, rtol=1e-12)
    assert torch.allclose(kl_divergence(q.expand([5, 4]), prior.expand([5, 4])), wanted.expand(5, 4), rtol=1e-12)
    with pytest.raises(NotImplementedError):
        kl_divergence(q, dist.Laplace(torch.zeros(3), 1.0).to_event(1))


def test_a_large_factor_does_not_cancel():
    """Along V nothing is far, so log p is moderate; |y|^2 - y'Va would lose it all in float32."""
    q = low_rank_normal(D=4, R=1)
    q = LowRank(q.loc, q.scale, 1e4 * q.factor)
    z = q.loc + 3e4 * q.scale * random(4, 1, seed=1)[:, 0]
    single = LowRank(q.loc.float(), q.scale.float(), q.factor.float()).log_prob(z.float())
    covariance = q.covariance_matrix
    residual = (z - q.loc).unsqueeze(-1)
    exact = -0.5 * (
        (residual.mT @ torch.linalg.solve(covariance, residual)).squeeze()
        + covariance.logdet()
        + 4 * math.log(2 * math.pi)
    )
    assert abs(single.item() - exact.item()) < 1e-2 * max(1, abs(exact.item()))


# The posteriors


@pytest.mark.parametrize("family", [FullNormal, lambda e, d: LowRankNormal(e, d, 2)])
def test_posteriors_are_what_their_head_says(family):
    torch.manual_seed(0)
    D, encoder, x = 4, nn.Linear(3, 5), random(6, 3)
    posterior = family(encoder, D).double()
    with torch.no_grad():
        posterior.head.weight.normal_(0, 0.3)
    q, output = posterior(x), posterior.head(encoder(x))
    loc, scale, rest = output[:, :D], output[:, D : 2 * D].exp(), output[:, 2 * D :]
    assert torch.equal(q.mean, loc)
    for b in range(6):
        shape = torch.eye(D, dtype=torch.float64)
        if family is FullNormal:
            i = 0
            for row in range(D):
                for column in range(row):
                    shape[row, column] = rest[b, i] / D**0.5
                    i += 1
            shape = shape @ shape.T
        else:
            shape = shape + rest[b].reshape(D, 2) @ rest[b].reshape(D, 2).T
        assert torch.allclose(q.covariance_matrix[b], scale[b, :, None] * shape * scale[b], rtol=1e-12, atol=1e-14)


def test_the_full_normal_starts_as_the_diagonal_one():
    torch.manual_seed(0)
    encoder, x = nn.Linear(3, 5), random(6, 3)
    full, diagonal = FullNormal(encoder, 4).double(), DiagonalNormal(encoder, 4).double()
    with torch.no_grad():
        for ours, theirs in zip(full.head.parameters(), diagonal.head.parameters(), strict=True):
            theirs.copy_(ours[:8])
    z = random(2, 6, 4, seed=1)
    assert torch.allclose(full(x).log_prob(z), diagonal(x).log_prob(z), rtol=1e-12)


def test_a_step_of_adam_bends_the_full_normal_as_much_at_any_number_of_latents():
    """What a row of the Cholesky factor adds to the one beside the diagonal; 4.8 times as much if left unscaled."""

    def bent(D):
        torch.manual_seed(0)
        posterior, x = FullNormal(nn.Linear(3, 20), D), torch.randn(200, 3)
        optimiser = torch.optim.Adam(posterior.head.parameters(), 1e-2)
        (
            posterior.head(posterior.encoder(x)) * torch.randn(posterior.head.out_features)
        ).sum().backward()  # gradients of random sign
        optimiser.step()
        q = posterior(x)
        return ((q.scale_tril / q.scale_tril.diagonal(dim1=-2, dim2=-1).unsqueeze(-1))[:, -1, :-1]).norm(dim=-1).mean()

    assert 0.8 < bent(70) / bent(4) < 1.25


@pytest.mark.parametrize("log_scale", [-80.0, -20.0, 40.0])
def test_the_full_normal_keeps_its_numbers_at_extreme_scales(log_scale):
    """Its own draws and their gradients in float32: entries of L that differ by tens of orders of magnitude."""
    torch.manual_seed(0)
    posterior = FullNormal(nn.Identity(), 4, features=3)
    start = torch.zeros(5, 14)
    start[:, 4], start[:, 5:8], start[:, 8:] = 0.0, log_scale, torch.randn(5, 6)
    parameters = start.requires_grad_()
    q = posterior.family(parameters)
    z = q.rsample(torch.Size([50]))
    log_q = q.log_prob(z)
    (gradient,) = torch.autograd.grad(log_q.sum(), parameters)
    assert torch.isfinite(log_q).all() and torch.isfinite(gradient).all()
    # log q(z) = -|eps|^2 / 2 - log |L| - 2 log 2 pi of normal eps, and its total derivative is that of -log |L|.
    wanted = -2 - 3 * log_scale - 2 * math.log(2 * math.pi)
    assert abs(log_q.mean() - wanted) < 4 * log_q.std() / log_q.numel() ** 0.5 + 1e-5 * abs(wanted)
    assert torch.allclose(gradient[:, 4:8], torch.tensor(-50.0), rtol=1e-3)
    assert gradient[:, 8:].abs().max() < 0.05


def test_components_start_apart_and_the_low_rank_factor_off_zero():
    torch.manual_seed(0)
    x = torch.zeros(1, 3)
    loc = NormalMixture(nn.Linear(3, 5), 4, num_components=3)(x).loc[0]
    assert torch.pdist(loc).min() > 0.5
    factor = LowRankNormal(nn.Linear(3, 5), 4, rank=2)(x).factor
    assert 0.01 < factor.square().mean().sqrt() < 0.5


def test_impossible_sizes_are_named():
    with pytest.raises(ValueError, match="got rank=0, wanted 1 to latent_dim=3: rank 0 is DiagonalNormal"):
        LowRankNormal(nn.Linear(3, 5), 3, rank=0)
    with pytest.raises(ValueError, match="got rank=4, wanted 1 to latent_dim=3"):
        LowRankNormal(nn.Linear(3, 5), 3, rank=4)
    with pytest.raises(ValueError, match="got num_components=0, wanted 1 or more"):
        NormalMixture(nn.Linear(3, 5), 3, num_components=0)


# The linear-Gaussian test bed, whose model is frozen at the truth

BED = LinearGaussian.random(6, 3, 0.7, seed=1, dtype=torch.float64)
X = BED.sample(30, generator=torch.Generator().manual_seed(2))[1]
GUIDES = {
    "diagonal": lambda encoder: DiagonalNormal(encoder, 3, features=6),
    "full": lambda encoder: FullNormal(encoder, 3, features=6),
    "low rank": lambda encoder: LowRankNormal(encoder, 3, rank=3, features=6),
}


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(BED.weight.new_zeros(3), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ BED.weight.T + BED.loc, BED.scale).to_event(1), obs=x)


def gaps(guide):
    """KL(q(z | x) || p(z | x)) of each datum, exactly."""
    q = guide.posterior(X)
    covariance = torch.diag_embed(q.variance) if isinstance(q, dist.Independent) else q.covariance_matrix
    return kl_divergence(MultivariateNormal(q.mean, covariance), BED.posterior(X)), covariance


@pytest.mark.parametrize("name", GUIDES)
def test_guides_fitted_to_the_true_model_reach_the_best_of_their_family(name):
    """Without noise: L-BFGS on the ELBO in closed form, then the weights of real draws."""
    torch.manual_seed(0)
    guide = Guide(GUIDES[name](nn.Identity())).double()
    optimiser = torch.optim.LBFGS(guide.parameters(), max_iter=400, history_size=30, tolerance_grad=1e-9,
                                  tolerance_change=0, line_search_fn="strong_wolfe")  # fmt: skip

    def loss():
        optimiser.zero_grad()
        gap, covariance = gaps(guide)
        value = -BED.elbo(X, guide.posterior(X).mean, torch.linalg.cholesky(covariance)).mean()
        value.backward()
        return value

    optimiser.step(loss)
    with torch.no_grad():
        lost = gaps(guide)[0]
        best = BED.mean_field_gap() if name == "diagonal" else torch.tensor(0.0)
        assert BED.mean_field_gap() > 0.1
        assert (lost - best).abs().max() < 1e-4
        weights = particles(model, guide, X, num_samples=2000).log_weight
        missing = BED.log_evidence(X) - weights
        if name == "diagonal":
            assert abs(missing.mean() - best) < 4 * missing.mean(1).std() / 2000**0.5
        else:
            assert missing.abs().max() < 0.1  # every weight is the evidence


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_guides_get_there_by_pyros_own_objective(name):
    """Stochastic gradients of TraceMeanField_ELBO, which finds our KL."""
    torch.manual_seed(0)
    guide = Guide(GUIDES[name](nn.Identity())).double()
    loss = TraceMeanField_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=1)
    steps = 1500
    optimiser = torch.optim.Adam(guide.parameters(), 0.05, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda i: (1 - i / steps) ** 2)
    for _ in range(steps):
        optimiser.zero_grad()
        (loss.differentiable_loss(model, guide, X) / len(X)).backward()
        optimiser.step()
        schedule.step()
    with torch.no_grad():
        lost = gaps(guide)[0].mean()
        best = BED.mean_field_gap() if name == "diagonal" else 0.0
        assert -1e-9 < lost - best < 0.005


@pytest.mark.parametrize("name", ["full", "low rank"])
def test_pyro_integrates_the_kl_of_correlated_guides(name):
    """With no likelihood in the model TraceMeanField_ELBO is minus the KL, free of noise."""
    torch.manual_seed(0)
    guide = Guide(GUIDES[name](nn.Identity())).double()

    def prior_only(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(BED.weight.new_zeros(3), 1.0).to_event(1))

    q, standard = guide.posterior(X), dist.Normal(torch.zeros(3), 1.0).to_event(1)
    value = TraceMeanField_ELBO().loss(prior_only, guide, X)
    assert abs(value - kl_divergence(q, standard).sum().item()) < 1e-9
    wide = TraceMeanField_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=1)
    assert abs(wide.loss(prior_only, guide, X) - value) < 1e-9


# Gradients through draws


def within_four_standard_errors(estimates, exact):
    """Independent estimates of one vector of numbers, (S, P), against their exact values, (P,)."""
    stderr = estimates.std(0) / len(estimates) ** 0.5
    assert (stderr > 0).all()
    assert ((estimates.mean(0) - exact).abs() < 4 * stderr).all(), ((estimates.mean(0) - exact) / stderr).tolist()


def path_gradients(q, f, draws, repeats=50):
    """Gradients of E[f(z)] in all arguments, from `repeats` independent batches."""
    arguments = [getattr(q, "_" + field).detach().clone().requires_grad_() for field in q.arg_constraints]
    rows = []
    for _ in range(repeats):
        z = type(q)(*arguments).expand([draws, *q.batch_shape]).rsample()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(f(z).mean(0).sum(), arguments)]))
    return arguments, torch.stack(rows)


def quadrature_gradient(q, arguments, f):
    """The gradient of the integral of f times the density over a grid, in the same order."""
    line = torch.linspace(-11, 11, 401, dtype=torch.float64)
    D = q.event_shape[0]
    grid = torch.cartesian_prod(*[line] * D).reshape(-1, *[1] * len(q.batch_shape), D)
    value = (type(q)(*arguments).log_prob(grid).exp() * f(grid)).sum() * (line[1] - line[0]) ** D
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, arguments)])


def bumpy(z):
    return torch.sin(2 * z[..., 0]) + z.square().sum(-1) / 3 + torch.tanh(z[..., 0] * z[..., -1])


@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_through_draws_are_those_of_the_integral(name, D):
    torch.manual_seed(0)
    q = low_rank_normal(2, D=D, R=1) if name == "low rank" else FAMILIES[name](2, D=D)
    arguments, rows = path_gradients(q, bumpy, draws=2000)
    exact = quadrature_gradient(q, arguments, bumpy)
    moving = exact.abs() > 1e-9  # what lies above the diagonal of L does not count
    assert moving.sum() >= len(exact) - 2 * (name == "full") * D * (D - 1) // 2
    within_four_standard_errors(rows[:, moving], exact[moving])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mixture_in_fifty_dimensions_has_right_and_finite_gradients(dtype):
    """E[|z|^2 + (sum z)^2 / 2] is known; component densities reach from e^-200 to e^60."""
    torch.manual_seed(0)
    C, D = 3, 50
    loc, scale = 0.15 * random(C, D), 0.5 * (0.1 * random(C, D, seed=1)).exp()
    q = DiagonalNormalMixture(loc.to(dtype), scale.to(dtype), random(C, seed=2, dtype=dtype))
    _, rows = path_gradients(q, lambda z: z.square().sum(-1) + z.sum(-1).square() / 2, draws=400, repeats=60)
    assert torch.isfinite(rows).all() and rows.dtype == dtype
    arguments = [t.clone().requires_grad_() for t in (loc, scale, random(C, seed=2))]
    loc, scale, weight = arguments[0], arguments[1], arguments[2].softmax(0)
    exact = (weight * ((loc**2 + scale**2).sum(-1) + (loc.sum(-1) ** 2 + (scale**2).sum(-1)) / 2)).sum()
    exact = torch.cat([g.flatten() for g in torch.autograd.grad(exact, arguments)])
    # 303 numbers at four standard errors each: 60 repeats make a Student's t, of whom 303 reach 4.6.
    stderr = rows.double().std(0) / 60**0.5
    off = ((rows.double().mean(0) - exact) / stderr).abs()
    assert off[-C:].max() < 4 and off.max() < 5 and (off > 2).double().mean() < 0.1


def test_the_tails_of_a_mixture_keep_their_derivatives():
    """Five standard deviations out, on either side: the same numbers mirrored, also in float32."""
    loc, scale, logits = torch.tensor([[0.0], [1.0]]), torch.tensor([[1.0], [1.1]]), torch.tensor([0.2, 0.0])
    rows = []
    for sign, dtype in ((1, torch.float32), (-1, torch.float32), (1, torch.float64)):
        parameters = logits.to(dtype).requires_grad_()
        q = DiagonalNormalMixture(sign * loc.to(dtype), scale.to(dtype), parameters)
        z = q._attached(sign * torch.tensor([5.5], dtype=dtype))
        rows.append(sign * torch.autograd.grad(z.sum(), parameters)[0].double())
    assert torch.allclose(rows[0], rows[1], rtol=1e-5) and torch.allclose(rows[0], rows[2], rtol=1e-4)
    assert rows[0].abs().min() > 0.1


def test_a_draw_has_the_same_value_with_and_without_gradients():
    q = mixture(3)
    live = DiagonalNormalMixture(*[t.clone().requires_grad_() for t in (q.loc, q.scale, q.logits)])
    values = []
    for draw in (q.rsample, live.sample, live.rsample):
        torch.manual_seed(0)
        values.append(draw((4,)).detach())
    assert torch.allclose(values[0], values[1], rtol=1e-14) and torch.equal(values[1], values[2])
    assert not live.sample().requires_grad and live.rsample().requires_grad


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_can_be_captured(name):
    """Nothing branches on values: one graph serves other parameters."""
    q = FAMILIES[name](3)
    arguments = [getattr(q, "_" + field).clone().requires_grad_() for field in q.arg_constraints]

    def step(*arguments):
        distribution = type(q)(*arguments).expand([4, 3])
        z = distribution.rsample()
        loss = (distribution.log_prob(z) - z.square().sum(-1)).mean()
        return torch.autograd.grad(loss, arguments)

    captured = make_fx(step)(*arguments)
    others = [(0.9 * a).detach().requires_grad_() for a in arguments]
    torch.manual_seed(1)
    wanted = step(*others)
    torch.manual_seed(1)
    for ours, theirs in zip(captured(*others), wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)
