"""Gradient estimators against the exact gradient of the same K-sample bound.

The pair is Gaussian with one latent dimension, so that the expectation of a K-sample bound is an
integral over K standard normals, which product quadrature does to many digits, and
autograd through the quadrature differentiates it. Each datum owns a copy of every
parameter: one backward pass gives as many independent draws of the gradient as there are data.
"""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO
from torch import nn

from pyro_vae.inference.bounds import ELBO, IWAE, ciwae, elbo, iwae, map_estimate, miwae, reconstruction, renyi, vr_max
from pyro_vae.inference.estimators import ESTIMATORS, advantage, coefficients, weight_bound
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.split_bounds import cubo, piwae, wake_sleep
from pyro_vae.parts import posteriors
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import HypersphericalUniform, StandardNormal
from pyro_vae.programs.pair import Guide, Model
from pyro_vae.traces import Cut, Particles, draw
from tests.pairs import binary, linear_pair, named, small_pair

X = 1.3
START = {"w": 0.8, "b": -0.2, "t": 0.1, "mu": -0.3, "rho": -0.1}  # the last two are the guide's
REPARAMETERIZED, LANDING, DOUBLY, SCORE = ESTIMATORS


def normal(loc, scale):
    return dist.Normal(loc, scale, validate_args=False)


class Scalars:
    """p(z) = N(0, exp(t)^2), p(x | z) = N(w z + b, 0.7^2), q(z) = N(mu, exp(rho)^2), in float64."""

    def __init__(self, size):
        self.values = {n: torch.full((size,), v, dtype=torch.float64, requires_grad=True) for n, v in START.items()}

    def model(self, x):
        v = self.values
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(0.0 * v["t"], v["t"].exp()))
            pyro.sample("x", normal(v["w"] * z + v["b"], 0.7), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(self.values["mu"], self.values["rho"].exp()))


def monte_carlo(objective, size=40_000, seed=0):
    """Mean and standard error of the gradient of the bound with respect to each parameter."""
    pair = Scalars(size)
    pyro.set_rng_seed(seed)
    sign = 1.0 if objective.upper else -1.0
    loss = objective.differentiable_loss(pair.model, pair.guide, torch.full((size,), X, dtype=torch.float64))
    assert float(loss.detach()) == pytest.approx(sign * float(objective.last_bound), rel=1e-12)
    leaves = list(pair.values.values())
    gradients = torch.autograd.grad(sign * loss, leaves, allow_unused=True)
    table = torch.stack([torch.zeros(size) if g is None else g for g in gradients])
    return table.mean(1), table.std(1) / math.sqrt(size)


def nodes(k, count):
    points, weights = np.polynomial.hermite_e.hermegauss(count)
    points, weights = torch.tensor(points), torch.tensor(weights / weights.sum())
    grid = torch.cartesian_prod(*[points] * k).reshape(-1, k).T
    return grid, torch.cartesian_prod(*[weights] * k).reshape(-1, k).prod(1)


def densities(values, noise):
    """log p(x, z) and log q(z), (K, nodes), along the reparameterised path, and at a fixed z."""
    z = values["mu"] + values["rho"].exp() * noise
    x = torch.tensor(X, dtype=torch.float64)

    def at(z):
        joint = normal(0.0, values["t"].exp()).log_prob(z) + normal(values["w"] * z + values["b"], 0.7).log_prob(x)
        return joint, normal(values["mu"], values["rho"].exp()).log_prob(z)

    return at(z), at(z.detach())


def scalars():
    return {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in START.items()}


def exact(function, k, count):
    """Gradient of E[function(log p, log q, the same at fixed z)] by quadrature over K normals."""
    noise, weights = nodes(k, count)
    values = scalars()
    along, fixed = densities(values, noise)
    total = (weights * function(along, fixed)).sum()
    gradients = torch.autograd.grad(total, list(values.values()), allow_unused=True)
    return torch.stack([torch.zeros((), dtype=torch.float64) if g is None else g for g in gradients])


def total_derivative(bound):
    return lambda along, fixed: bound(Particles(along[0], {}, {"z": along[1]}, {}))


def own_bound(particles):
    """A bound that the package does not know: the log of a median-like mean of the weights."""
    return 0.3 * torch.logsumexp(0.5 * particles.log_weight, 0) / 0.5 + 0.7 * particles.log_weight.tanh().mean(0)


# A bound, K, and of its expectation: the integrand, how many normals it takes, nodes per dimension.
SMOOTH = [
    (elbo, 1, elbo, 1, 60),
    (elbo, 2, elbo, 2, 40),
    (iwae, 2, iwae, 2, 70),
    (iwae, 3, iwae, 3, 46),
    (renyi(0.5), 2, renyi(0.5), 2, 60),
    (renyi(-1.0), 3, renyi(-1.0), 3, 46),
    (renyi(2.0), 2, renyi(2.0), 2, 70),
    (miwae(2), 4, iwae, 2, 70),  # a mean of two, each of the expectation of one
    (ciwae(0.3), 3, ciwae(0.3), 3, 46),
    (own_bound, 2, own_bound, 2, 70),
]


def close(estimate, errors, truth):
    return ((estimate - truth).abs() <= 4 * errors + 1e-9).all()


@pytest.mark.parametrize(
    "bound, k, integrand, normals, count", SMOOTH, ids=[f"{b.__name__}-{k}" for b, k, *_ in SMOOTH]
)
@pytest.mark.parametrize("estimator", [REPARAMETERIZED, DOUBLY, SCORE])
@pytest.mark.filterwarnings("ignore:the score function")
def test_unbiased_for_the_gradient_of_the_same_bound(bound, k, integrand, normals, count, estimator):
    truth = exact(total_derivative(integrand), normals, count)
    again = exact(total_derivative(integrand), normals, count - 6)
    mean, error = monte_carlo(Objective(bound, k, estimator=estimator))
    assert close(mean, error, truth), (mean - truth) / error
    assert (truth - again).abs().max() < 0.25 * error.min()  # the quadrature has converged
    assert (truth.abs() > 10 * error).sum() >= 4  # so that the comparison says something


@pytest.mark.parametrize("estimator", [REPARAMETERIZED, SCORE])
def test_vr_max_too_where_it_can(estimator):
    truth = exact(total_derivative(vr_max), 2, 300)  # the maximum has a kink, on which quadrature is slow
    mean, error = monte_carlo(Objective(vr_max, 2, estimator=estimator))
    assert (truth - exact(total_derivative(vr_max), 2, 200)).abs().max() < 0.5 * error.min()
    assert close(mean, 1.2 * error, truth), (mean - truth) / error


@pytest.mark.parametrize("bound", [elbo, iwae, renyi(0.5)], ids=named)
def test_sticking_the_landing_is_unbiased_with_one_sample(bound):
    mean, error = monte_carlo(Objective(bound, 1, estimator=LANDING))
    assert close(mean, error, exact(total_derivative(bound), 1, 60)), mean


def test_sticking_the_landing_is_unbiased_for_the_elbo_with_several():
    mean, error = monte_carlo(Objective(elbo, 3, estimator=LANDING))
    assert close(mean, error, exact(total_derivative(elbo), 1, 60))


def test_the_bias_of_sticking_the_landing_with_several_samples():
    """Its mean is what quadrature says, and that is far from the gradient of the bound."""

    def without_score(along, fixed):
        share = torch.softmax((along[0] - along[1]).detach(), 0)
        return (share * (along[0] - along[1] + fixed[1])).sum(0)

    truth, limit = exact(total_derivative(iwae), 3, 40), exact(without_score, 3, 40)
    mean, error = monte_carlo(Objective(iwae, 3, estimator=LANDING))
    assert close(mean, error, limit)
    bias = (mean - truth).abs() / error
    assert (bias[:3] < 4).all() and (bias[3:] > 10).all()  # none for the model


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_piwae_gives_each_side_its_own_bound(estimator):
    tight, loose = exact(total_derivative(iwae), 4, 20), exact(total_derivative(iwae), 2, 60)
    mean, error = monte_carlo(Objective(piwae(2), 4, estimator=estimator))
    truth = torch.cat([tight[:3], loose[3:]])
    assert close(mean[:3], error[:3], truth[:3])
    assert close(mean[3:], error[3:], truth[3:]) == (estimator != LANDING)
    assert ((tight - loose).abs() > 5 * error).all()  # so that swapping the two sides would show


def wake(along, fixed):
    share = torch.softmax((along[0] - along[1]).detach(), 0)
    return (share * fixed[1]).sum(0) + IWAE.value(fixed[0] - fixed[1].detach())


@pytest.mark.parametrize("estimator", [REPARAMETERIZED, DOUBLY, SCORE])
def test_wake_phase_follows_the_posterior(estimator):
    truth = exact(wake, 3, 40)
    mean, error = monte_carlo(Objective(wake_sleep(), 3, estimator=estimator))
    assert close(mean, error, truth), (mean - truth) / error
    assert ((truth - exact(total_derivative(iwae), 3, 40))[3:].abs() > 10 * error[3:]).all()
    # The guide climbs towards the true posterior, whose mean and scale are known.
    values = scalars()
    precision = (-2 * values["t"]).exp() + values["w"] ** 2 / 0.49
    better = values["w"] * (X - values["b"]) / 0.49 / precision
    assert (better > values["mu"]) == (mean[3] > 0)


@pytest.mark.parametrize("estimator", [REPARAMETERIZED, DOUBLY, SCORE])
def test_cubo_is_lowered_by_the_guide_and_leaves_the_model_alone(estimator):
    truth = exact(total_derivative(renyi(-1.0)), 3, 40)
    mean, error = monte_carlo(Objective(cubo(2), 3, estimator=estimator))
    assert (mean[:3] == 0).all() and (error[:3] == 0).all()
    assert close(mean[3:], error[3:], truth[3:]), (mean - truth) / error


def test_lowering_cubo_reaches_the_posterior():
    # Lowered from a guide that is near, by enough samples, it fits the exact posterior.
    values = scalars()
    pair = Scalars(1)
    with torch.no_grad():
        precision = (-2 * values["t"]).exp() + values["w"] ** 2 / 0.49
        mean, scale = values["w"] * (X - values["b"]) / 0.49 / precision, precision**-0.5
        pair.values["mu"].copy_(mean + 0.2)
        pair.values["rho"].copy_(scale.log() + 0.2)
    optimizer = torch.optim.Adam([pair.values["mu"], pair.values["rho"]], lr=0.02)
    pyro.set_rng_seed(0)
    objective = Objective(cubo(2), 100, estimator=DOUBLY)
    for _ in range(200):
        optimizer.zero_grad()
        objective.loss_and_grads(pair.model, pair.guide, torch.tensor([X], dtype=torch.float64))
        optimizer.step()
    assert abs(pair.values["mu"].item() - mean.item()) < 1e-3
    assert abs(pair.values["rho"].item() - scale.log().item()) < 1e-3
    assert all(pair.values[name].grad is None for name in "wbt")


@pytest.mark.parametrize("bound, k", [(elbo, 1), (elbo, 4), (iwae, 8), (renyi(0.5), 8), (miwae(2), 8), (ciwae(0.5), 8),
                                      (piwae(2), 8), (own_bound, 8), (cubo(2), 8)], ids=lambda v: getattr(v, "__name__", str(v)))  # fmt: skip
@pytest.mark.parametrize("estimator", [LANDING, DOUBLY])
def test_at_the_exact_posterior_the_guide_has_no_gradient(bound, k, estimator):
    pair, x = linear_pair()
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    stretch = torch.ones((), dtype=torch.float64, requires_grad=True)

    def guide(x):
        posterior = pair.bed.posterior(x)
        with pyro.plate("data", len(x)):
            tril = posterior.scale_tril * stretch
            pyro.sample("z", dist.MultivariateNormal(posterior.mean + shift, scale_tril=tril))

    def gradient(estimator):
        loss = Objective(bound, k, estimator=estimator).differentiable_loss(pair.model, guide, x)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, [shift, stretch])])

    assert gradient(estimator).abs().max() < 1e-10
    assert gradient(REPARAMETERIZED).abs().max() > 1e-3  # the total derivative vanishes on average only


def test_the_guides_signal_sinks_in_noise_under_the_total_derivative_only():
    """Signal-to-noise ratio of the guide's gradient, by K (Rainforth et al. 2018, Tucker et al. 2019)."""

    def ratios(estimator):
        found = []
        for k in (4, 64):
            mean, error = monte_carlo(Objective(iwae, k, estimator=estimator), size=10_000)
            found.append((mean / (error * 100)).abs()[3:])
        return found

    few, many = ratios(REPARAMETERIZED)
    assert (many < 0.5 * few).all()  # it falls as 1 / sqrt(K), by 4
    few, many = ratios(DOUBLY)
    assert (many > 1.5 * few).all()  # it rises as sqrt(K)


def layered(size):
    """Two latents in each of model and guide, and one parameter in all parts, per-datum copies of each."""
    names = {"a": 0.5, "b": 0.3, "c": 0.4, "s": -0.3, "both": 0.2}
    v = {n: torch.full((size,), x, dtype=torch.float64, requires_grad=True) for n, x in names.items()}

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", normal(v["both"], 1.0))
            z1 = pyro.sample("z1", normal(v["a"] * z2, 0.8))
            pyro.sample("x", normal(z1.tanh() + v["both"], 0.6), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", normal(v["b"] * x + v["both"], v["s"].exp()))
            pyro.sample("z2", normal(v["c"] * z1 + v["both"] * z1.sin(), 0.5 + 0.1 * z1.square()))

    return v, model, guide


@pytest.mark.parametrize(
    "bound, k", [(elbo, 1), (iwae, 4), (piwae(2), 4)], ids=lambda v: getattr(v, "__name__", str(v))
)
def test_layers_that_depend_on_each_other_and_shared_parameters(bound, k):
    """All unbiased estimators agree on a layered guide, for a parameter that model and guide share too."""
    size = 40_000
    found = {}
    for estimator in ESTIMATORS:
        v, model, guide = layered(size)
        pyro.set_rng_seed(1)
        x = torch.full((size,), X, dtype=torch.float64)
        loss = Objective(bound, k, estimator=estimator).differentiable_loss(model, guide, x)
        table = -torch.stack(torch.autograd.grad(loss, list(v.values())))
        found[estimator] = table.mean(1), table.std(1) / math.sqrt(size)
    reference = found[REPARAMETERIZED]  # where there is one, autograd straight through
    for estimator in (DOUBLY, SCORE, *([LANDING] if k == 1 else [])):
        mean, error = found[estimator]
        assert (error < 0.1).all()
        assert ((mean - reference[0]).abs() < 4 * (error**2 + reference[1] ** 2).sqrt()).all(), estimator


def test_the_path_of_a_layered_guide_is_the_total_one():
    """Cutting the graph and joining it again gives the total derivative, to the last digits."""
    v, model, guide = layered(7)
    x = torch.linspace(-1, 2, 7, dtype=torch.float64)
    for k, vectorize in ((1, None), (5, True), (5, False)):
        pyro.set_rng_seed(0)
        plain = draw(model, guide, (x,), {}, k, vectorize)
        truth = torch.autograd.grad(iwae(plain).sum(), list(v.values()))
        pyro.set_rng_seed(0)
        cut = Cut()
        particles = draw(model, guide, (x,), {}, k, vectorize, cut=cut)
        assert (particles.log_weight - plain.log_weight).abs().max() < 1e-12
        joint, path, score = coefficients(IWAE, REPARAMETERIZED, particles.log_weight)
        target = (path * particles.log_weight).sum()
        direct = (joint * particles.log_joint).sum() + (score * sum(particles.log_q.values())).sum()
        ours = torch.autograd.grad(direct + cut.pathwise(target), list(v.values()))
        for a, b in zip(ours, truth, strict=True):
            assert (a - b).abs().max() < 1e-12


FAMILIES = ["Coupling", "DiagonalNormal", "FullNormal", "IAF", "LowRankNormal", "MAF", "NSF", "NormalMixture", "Planar",
            "Sylvester", "VonMisesFisher"]  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_every_posterior_can_be_cut_and_joined(family):
    """Scored anew at detached samples, each family gives the total derivative back."""
    torch.manual_seed(0)
    posterior = getattr(posteriors, family)(MLP((5,), [8], None), 3).double()
    for p in posterior.parameters():
        p.data += 0.2 * torch.randn_like(p)
    decoder = nn.Linear(3, 5).double()
    prior = HypersphericalUniform(3) if family == "VonMisesFisher" else StandardNormal(3).double()
    model, guide = Model(prior, lambda z: dist.Normal(decoder(z), 1.0).to_event(1)), Guide(posterior)
    x = torch.randn(4, 5, dtype=torch.float64)
    parameters = [*posterior.parameters(), *decoder.parameters()]
    pyro.set_rng_seed(1)
    plain = draw(model, guide, (x,), {}, 3)
    truth = torch.autograd.grad(iwae(plain).sum(), parameters, materialize_grads=True, allow_unused=True)
    pyro.set_rng_seed(1)
    cut = Cut()
    particles = draw(model, guide, (x,), {}, 3, cut=cut)
    joint, path, score = coefficients(IWAE, REPARAMETERIZED, particles.log_weight)
    direct = (joint * particles.log_joint).sum() + (score * particles.log_q["z"]).sum()
    target = direct + cut.pathwise((path * particles.log_weight).sum())
    ours = torch.autograd.grad(target, parameters, materialize_grads=True, allow_unused=True)
    largest = max(g.abs().max() for g in truth)
    assert largest > 0.1 and all((a - b).abs().max() < 1e-10 * largest for a, b in zip(ours, truth, strict=True))


def test_an_encoder_shared_with_the_prior():
    """A prior made of the encoder's outputs at learned pseudo-inputs, as a VampPrior is."""
    torch.manual_seed(0)
    encoder = nn.Linear(2, 2).double()
    posterior = DiagonalNormal(encoder, 1, features=2).double()
    pseudo = nn.Parameter(torch.randn(3, 2, dtype=torch.float64))

    def prior():
        parts = posterior(pseudo)
        return dist.MixtureSameFamily(dist.Categorical(torch.ones(3, dtype=torch.float64)), parts)

    decoder = nn.Linear(1, 2).double()
    model = Model(prior, lambda z: dist.Normal(decoder(z), 0.5).to_event(1))
    guide = Guide(posterior)
    parameters = [encoder.weight, posterior.head.weight, pseudo, decoder.weight]
    x = torch.tensor([[0.5, -1.0]], dtype=torch.float64).expand(200, 2)
    found = {}
    for estimator in (REPARAMETERIZED, DOUBLY, SCORE):
        draws = []
        for seed in range(120):
            pyro.set_rng_seed(seed)
            loss = Objective(iwae, 4, estimator=estimator).differentiable_loss(model, guide, x) / len(x)
            draws.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
        table = torch.stack(draws)
        found[estimator] = table.mean(0), table.std(0) / math.sqrt(len(table))
    mean, error = found[REPARAMETERIZED]
    for estimator in (DOUBLY, SCORE):
        other, its_error = found[estimator]
        # 16 numbers are compared at once, so that four standard errors leave room for chance.
        assert ((other - mean).abs() < 4 * (error**2 + its_error**2).sqrt()).all(), estimator
        assert its_error.max() < 0.1


def test_a_run_of_the_guide_is_not_repeated_with_another_dropout_mask():
    torch.manual_seed(0)
    seen = []
    net = nn.Sequential(nn.Linear(2, 50), nn.Dropout(0.5), nn.Linear(50, 2))
    net.register_forward_hook(lambda *_: seen.append(0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.01).to_event(1))

    # A second mask would put the sample hundreds of standard deviations away.
    particles = draw(model, guide, (torch.ones(20, 2),), {}, 1, cut=Cut())
    assert len(seen) == 1 and (particles.log_q["z"] > -20).all()


def test_discrete_latents_by_the_score_function():
    """Exact by enumeration: a Bernoulli latent, K = 2, four outcomes."""
    size = 40_000
    logits = torch.full((size,), 0.4, dtype=torch.float64, requires_grad=True)
    shift = torch.full((size,), 0.7, dtype=torch.float64, requires_grad=True)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)))
            pyro.sample("x", normal(2 * z + shift, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logits))

    logit, s = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.4, 0.7))
    outcomes = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]], dtype=torch.float64)
    log_q = dist.Bernoulli(logits=logit).log_prob(outcomes)
    joint = dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)).log_prob(outcomes)
    joint = joint + normal(2 * outcomes + s, 1.0).log_prob(torch.tensor(X, dtype=torch.float64))
    for bound in (elbo, iwae, renyi(0.5), vr_max, reconstruction, map_estimate):
        value = bound(Particles(joint, {}, {"z": log_q}, {}))
        if bound is reconstruction:
            value = (joint - dist.Bernoulli(torch.tensor(0.3, dtype=torch.float64)).log_prob(outcomes)).mean(0)
        truth = torch.stack(torch.autograd.grad((log_q.sum(0).exp() * value).sum(), [logit, s], retain_graph=True))
        pyro.set_rng_seed(0)
        x = torch.full((size,), X, dtype=torch.float64)
        loss = Objective(bound, 2, estimator=SCORE).differentiable_loss(model, guide, x)
        table = -torch.stack(torch.autograd.grad(loss, [logits, shift]))
        assert close(table.mean(1), table.std(1) / math.sqrt(size), truth), bound


def test_the_leave_one_out_baseline_of_the_elbo_is_the_mean_of_the_others():
    weight = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    others = (weight.sum(0) - weight) / 4
    found = advantage(elbo, Particles(weight, {}, {}, {}))
    assert (found - (weight - others) / 5).abs().max() < 1e-14


@pytest.mark.parametrize("bound", [elbo, iwae, renyi(0.5), renyi(-2.0), renyi(3.0), miwae(2), ciwae(0.3)], ids=named)
def test_closed_forms_of_the_coefficients_are_those_of_autograd(bound):
    weight = 2 * torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    known = weight_bound(bound, 6)
    unknown = weight_bound(lambda particles: bound(particles), 6)
    for estimator in ESTIMATORS:
        ours, theirs = (coefficients(b, estimator, weight) for b in (known, unknown))
        for a, b in zip(ours, theirs, strict=True):
            assert (a is None and b is None) or (a - b).abs().max() < 1e-12


def gradients(loss, model, guide, x, seed=3):
    for p in [*model.parameters(), *guide.parameters()]:
        p.grad = None
    pyro.set_rng_seed(seed)
    value = loss.loss_and_grads(model, guide, x)
    return value, [p.grad.clone() for m in (model, guide) for p in m.parameters()]


@pytest.mark.parametrize("alpha", [0.0, 0.5, -1.0, 2.0])
def test_agrees_with_pyros_renyi(alpha):
    model, guide = (m.double() for m in small_pair())
    x = binary().double()
    pyros = RenyiELBO(alpha=alpha, num_particles=5, vectorize_particles=True, max_plate_nesting=1)
    value, ours = gradients(Objective(renyi(alpha), 5, max_plate_nesting=1), model, guide, x)
    other, theirs = gradients(pyros, model, guide, x)
    assert value == pytest.approx(other, rel=1e-12)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_agrees_with_pyros_score_function_in_expectation():
    size = 40_000
    x = torch.full((size,), X, dtype=torch.float64)

    class NoPath(dist.Normal):
        has_rsample = False

        def expand(self, batch_shape, _instance=None):
            return NoPath(self.loc.expand(batch_shape), self.scale.expand(batch_shape), validate_args=False)

    def table(loss, pair):
        pyro.set_rng_seed(0)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", NoPath(pair.values["mu"], pair.values["rho"].exp(), validate_args=False))

        value = loss.differentiable_loss(pair.model, guide, x)
        found = torch.stack(torch.autograd.grad(value, list(pair.values.values())))
        return found.mean(1), found.std(1) / math.sqrt(size)

    pyros, its_error = table(Trace_ELBO(max_plate_nesting=1), Scalars(size))
    for k in (1, 2):
        ours, error = table(Objective(elbo, k, estimator=SCORE), Scalars(size))
        assert ((ours - pyros).abs() < 4 * (error**2 + its_error**2).sqrt()).all()
        assert ((ours - pyros)[:3].abs() < 1e-9).all() == (k == 1)  # of the model the very same
    assert (error[3:] < its_error[3:] / math.sqrt(2)).all()  # the baseline gains more than two samples do


@pytest.mark.parametrize("beta", [0.3, 0.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_tempering_under_every_estimator(estimator, beta):
    noise, weights = nodes(2, 40)
    values = scalars()
    z = values["mu"] + values["rho"].exp() * noise
    (joint, log_q), _ = densities(values, noise)
    prior = normal(0.0, values["t"].exp()).log_prob(z)
    total = (weights * (joint - prior + beta * (prior - log_q)).mean(0)).sum()
    truth = torch.stack(torch.autograd.grad(total, list(values.values()), allow_unused=True))
    objective = Objective(elbo, 2, estimator=estimator, beta=beta)
    pair, size = Scalars(40_000), 40_000
    pyro.set_rng_seed(0)
    loss = objective.differentiable_loss(pair.model, pair.guide, torch.full((size,), X, dtype=torch.float64))
    table = -torch.stack(torch.autograd.grad(loss, list(pair.values.values())))
    assert close(table.mean(1), table.std(1) / math.sqrt(size), truth)
    assert float(objective.last_bound) / size == pytest.approx(
        (weights * (joint - log_q).mean(0)).sum().item(), abs=0.02
    )


def test_values_do_not_depend_on_the_estimator():
    model, guide = (m.double() for m in small_pair())
    x = binary().double()
    for bound in (elbo, iwae, renyi(0.5), piwae(2), cubo(2)):
        losses = []
        for estimator in ESTIMATORS:
            pyro.set_rng_seed(0)
            losses.append(Objective(bound, 4, estimator=estimator).loss_and_grads(model, guide, x))
        assert max(losses) - min(losses) < 1e-10
        pyro.set_rng_seed(0)
        assert abs(Objective(bound, 4).loss(model, guide, x) - losses[0]) < 1e-10


def test_what_does_not_go_together_is_refused_when_it_is_made():
    refused = [
        (vr_max, 4, DOUBLY, "vr_max jumps where another sample becomes the largest.*renyi"),
        (reconstruction, 4, DOUBLY, "function of the weights.*alone, and reconstruction is not"),
        (map_estimate, 1, LANDING, "map_estimate is not.*'score-function'"),
        (wake_sleep(), 4, LANDING, "nothing would be left"),
        (wake_sleep(), 1, REPARAMETERIZED, "num_samples=1 for wake_sleep, wanted at least 2"),
        (cubo(2), 2, REPARAMETERIZED, "num_samples=2 for cubo.2., wanted at least 3"),
        (cubo(1.5), 3, DOUBLY, "wanted at least 4"),
        (miwae(3), 4, REPARAMETERIZED, "num_samples=4 and num_groups=3.*multiple of 3"),
        (piwae(3), 4, DOUBLY, "num_groups=3"),
        (elbo, 4, "pathwise", "unknown estimator 'pathwise', wanted one of reparameterized"),
        (renyi, 4, REPARAMETERIZED, r"got the function renyi, wanted what it returns, such as renyi\(0.5\)"),
    ]
    for bound, k, estimator, text in refused:
        with pytest.raises(ValueError, match=text):
            Objective(bound, k, estimator=estimator)
    Objective(wake_sleep(sleep=0.5), 1)


def test_coefficients_of_the_paper():
    weight = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    share = torch.softmax(weight, 0)
    for bound, estimator, wanted in (
        (IWAE, REPARAMETERIZED, (share, share, -share)),
        (IWAE, LANDING, (share, share, None)),
        (IWAE, DOUBLY, (share, share**2, None)),
        (wake_sleep(), REPARAMETERIZED, (share, None, share)),
        (wake_sleep(), DOUBLY, (share, share - share**2, None)),
        (ELBO, DOUBLY, (torch.full_like(share, 0.25), torch.full_like(share, 0.25), None)),
    ):
        for a, b in zip(coefficients(bound, estimator, weight), wanted, strict=True):
            assert (a is None and b is None) or torch.allclose(a, b)
    half = torch.softmax(weight / 2, 0)
    assert torch.allclose(coefficients(renyi(0.5), DOUBLY, weight).path, 0.5 * half + 0.5 * half**2)
    assert copy.copy(Objective(iwae, 2, estimator=DOUBLY)).estimator == DOUBLY
