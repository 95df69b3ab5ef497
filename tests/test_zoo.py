"""Pairs beyond one latent layer: their numbers against closed forms, explicit sums and quadrature."""

import copy
import io
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceEnum_ELBO
from torch import nn

import pyro_vae as pv
from pyro_vae.data.testbeds import LinearGaussian
from pyro_vae.judging.latents import posterior_means
from pyro_vae.parts.likelihoods import Bernoulli, Normal
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.zoo import Conditional, Hierarchical, Joined, Mixture, SemiSupervised

X_SHAPE = (1, 3, 3)


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def binary(size, seed=0, dtype=torch.float64):
    return (torch.rand(size, *X_SHAPE, generator=torch.Generator().manual_seed(seed)) > 0.5).to(dtype)


def enumerated():
    return TraceEnum_ELBO(max_plate_nesting=1)


def small(kind, seed=0, dtype=torch.float64):
    """A pair of a kind, the positional arguments of its programs, and the loss that trains it."""
    torch.manual_seed(seed)
    x, y = binary(12, dtype=dtype), torch.arange(12) % 3
    if kind == "hierarchical":
        pair, args, loss = Hierarchical.build(X_SHAPE, (3, 2), ((8,), (6,))), (x,), Trace_ELBO()
    elif kind == "conditional":
        pair, args, loss = Conditional.build(X_SHAPE, 3, 2, (8,)), (x, torch.eye(3)[y].to(dtype)), Trace_ELBO()
    elif kind == "semi-supervised":
        pair, args, loss = SemiSupervised.build(X_SHAPE, 3, 2, (8,)), (x, torch.where(y == 1, -1, y)), enumerated()
    else:
        pair, args, loss = Mixture.build(X_SHAPE, 3, 2, (8,)), (x,), enumerated()
    return pair.to(dtype), args, loss


KINDS = ("hierarchical", "conditional", "semi-supervised", "mixture")


# Every pair of the zoo


@pytest.mark.parametrize("kind", KINDS)
def test_fit_trains_every_tensor_and_a_copy_trains_on_its_own(kind):
    pair, args, loss = small(kind)
    twin = copy.deepcopy(pair)
    for trained, other in ((pair, twin), (twin, pair)):
        before = {name: p.detach().clone() for name, p in trained.named_parameters()}
        frozen = [p.detach().clone() for p in other.parameters()]
        history = pv.fit(trained.model, trained.guide, args, loss=loss, epochs=60, learning_rate=1e-2, seed=0)
        assert history["loss"][-1] < history["loss"][0] - 0.5
        assert [name for name, p in trained.named_parameters() if torch.equal(p, before[name])] == []
        assert all(torch.equal(a, b) for a, b in zip(frozen, other.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_plain_svi_trains_two_of_a_kind_and_a_copy_in_one_process(kind):
    first, args, loss = small(kind, 0, torch.float32)
    for seed in (0, 1, None):
        pair = copy.deepcopy(first) if seed is None else first if seed == 0 else small(kind, seed, torch.float32)[0]
        before = {name: p.detach().clone() for name, p in pair.named_parameters()}
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            losses = [svi.step(*args) for _ in range(60)]
        assert seed is None or sum(losses[-5:]) < sum(losses[:5])
        assert [name for name, p in pair.named_parameters() if torch.equal(p, before[name])] == []


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_saved_and_loaded(kind):
    (pair, args, loss), (other, *_) = small(kind), small(kind, seed=1)
    file = io.BytesIO()
    torch.save(pair.state_dict(), file)
    file.seek(0)
    assert loss_of(loss, other, args) != loss_of(loss, pair, args)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert loss_of(loss, other, args) == loss_of(loss, pair, args)


def loss_of(loss, pair, args):
    pyro.set_rng_seed(0)
    return loss.loss(pair.model, pair.guide, *args)


def test_particles_of_every_pair_are_the_sums_of_pyros_trace():
    for kind in KINDS:
        pair, args, _ = small(kind)
        model = pair.marginal if kind == "mixture" else pair.model
        torch.manual_seed(0)
        weight = pv.particles(model, pair.guide, *args).log_weight.sum()
        torch.manual_seed(0)
        trace = poutine.trace(pair.guide).get_trace(*args)
        joint = poutine.trace(poutine.replay(model, trace)).get_trace(*args).log_prob_sum()
        assert abs(weight - (joint - trace.log_prob_sum())) < 1e-10


def test_a_guide_without_data_and_pictures_of_no_kind_are_refused():
    for kind in KINDS:
        pair, args, _ = small(kind)
        with pytest.raises(ValueError, match="without data.*Predictive"):
            pair.guide(None, *args[1:]) if kind == "conditional" else pair.guide()
        given = {"conditional": (torch.eye(3).double(),), "semi-supervised": (torch.arange(3),)}.get(kind, (3,))
        assert pair.sample(*given).shape == (3, *X_SHAPE)
        assert set(pair.sample(*given, pixels="draw").unique().tolist()) <= {0.0, 1.0}
        with pytest.raises(ValueError, match='got pixels=\'median\', wanted "mean" or "draw"'):
            pair.sample(*given, pixels="median")


# Hierarchical


def constant_scale(scale):
    return lambda loc: dist.Normal(loc, loc.new_full((), scale).expand_as(loc), validate_args=False).to_event(1)


class Linear(nn.Module):
    """z to N(W z + b, L L')."""

    def __init__(self, weight, loc, tril):
        super().__init__()
        self.weight, self.loc, self.tril = weight, loc, tril

    def forward(self, z):
        return dist.MultivariateNormal(z @ self.weight.T + self.loc, scale_tril=self.tril)


def posterior_of(mean, covariance, weight, noise):
    """v -> p(u | v) for u ~ N(mean, covariance) and v ~ N(weight u, noise), and the marginal of v, by Gaussian algebra."""
    marginal = weight @ covariance @ weight.T + noise
    gain = covariance @ weight.T @ torch.linalg.inv(marginal)
    tril = torch.linalg.cholesky(covariance - gain @ weight @ covariance)
    return Linear(gain, mean - gain @ weight @ mean, tril), weight @ mean, marginal


def chain(dims=(5, 4, 3, 2), seed=0, stretch=1.0, shift=0.0):
    """A linear-Gaussian hierarchy of dims (x, z1, ..., zL), its exact layered posterior as guide, and log p(x)."""
    generator = torch.Generator().manual_seed(seed)
    weights = [
        torch.randn(a, b, generator=generator, dtype=torch.float64) for a, b in zip(dims, dims[1:], strict=False)
    ]
    scales = [0.5, 0.8, 0.6, 0.7][: len(weights)]
    mean, covariance = torch.zeros(dims[-1]).double(), torch.eye(dims[-1]).double()
    down, up = [], []
    for weight, scale in zip(reversed(weights), reversed(scales), strict=True):
        noise = scale**2 * torch.eye(len(weight)).double()
        down.append(Linear(weight, torch.zeros(len(weight)).double(), noise.sqrt()))
        posterior, mean, covariance = posterior_of(mean, covariance, weight, noise)
        posterior.tril, posterior.loc = stretch * posterior.tril, posterior.loc + shift
        up.append(posterior)
    likelihood, *conditionals = down[::-1]
    prior = StandardNormal(dims[-1]).double()
    return Hierarchical(prior, conditionals, likelihood, up[::-1]), dist.MultivariateNormal(mean, covariance)


@pytest.mark.parametrize("dims", [(5, 3, 2), (5, 4, 3, 2), (4, 1, 3, 2, 2)])
def test_with_the_exact_layered_posterior_every_weight_is_the_evidence(dims):
    pair, evidence = chain(dims)
    x = evidence.sample((7,))
    p = pv.particles(pair.model, pair.guide, x, num_samples=20)
    assert (p.log_weight - evidence.log_prob(x)).abs().max() < 1e-10
    assert {name: tuple(z.shape) for name, z in p.latents.items()} == {
        f"z{layer}": (20, 7, dims[layer]) for layer in range(1, len(dims))
    }


def test_importance_sampling_of_a_hierarchy_finds_the_closed_form():
    pair, evidence = chain(stretch=1.2, shift=0.05)
    torch.manual_seed(0)
    x = evidence.sample((20,))
    exact = evidence.log_prob(x).mean().item()
    estimate = pv.log_likelihood(pair.model, pair.guide, x, num_samples=4000)
    assert 1e-4 < estimate.mc_stderr < 0.05
    assert abs(estimate.value - exact) < 4 * estimate.mc_stderr
    terms = pv.elbo_terms(pair.model, pair.guide, x, num_samples=4000)
    assert terms.value < exact - 20 * terms.mc_stderr
    assert abs(terms.reconstruction - terms.kl - terms.value) < 1e-10
    # KL(q || p(z | x)) layer by layer: each conditional is 1.2 times as wide and 0.05 off, per dimension whitened.
    gap = 0.0
    for q in (pair.guide.z1_given_x, pair.guide.z2_given_z1, pair.guide.z3_given_z2):
        d = len(q.loc)
        off = torch.linalg.solve_triangular(q.tril / 1.2, torch.full((d, 1), 0.05).double(), upper=False)
        gap += 0.5 * (d * (1.2**2 - 1 - 2 * math.log(1.2)) + off.square().sum().item())
    assert abs(exact - terms.value - gap) < 4 * terms.mc_stderr


def test_bounds_of_a_hierarchy_are_ordered_and_train():
    pair, evidence = chain(stretch=1.3)
    torch.manual_seed(0)
    x = evidence.sample((200,))
    values = []
    for bound, k in ((pv.elbo, 1), (pv.iwae, 4), (pv.iwae, 64)):
        values.append(bound(pv.particles(pair.model, pair.guide, x, num_samples=k)).mean().item())
    assert values[0] < values[1] < values[2] < evidence.log_prob(x).mean().item() + 0.02
    trained, args, _ = small("hierarchical")
    history = pv.fit(
        trained.model, trained.guide, args, loss=pv.Objective(pv.iwae, 5), epochs=40, learning_rate=1e-2,
        validation=args, seed=0,
    )  # fmt: skip
    assert history["bound"][-1] > history["bound"][0] + 0.3 and math.isfinite(history["validation"][-1])


def test_active_units_of_a_layer_above_another_do_not_count_its_noise():
    torch.manual_seed(0)
    x = torch.randn(600, 2, dtype=torch.float64)
    pick = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)  # the second dimension knows nothing of x
    wide = constant_scale(1.0)
    pair = Hierarchical(
        StandardNormal(2).double(), [wide], wide, [lambda x: wide(x @ pick), lambda z1: constant_scale(0.1)(z1)]
    )
    first, second = (pv.active_units(pair.guide, x, site=site) for site in ("z1", "z2"))
    assert first.count == second.count == 1
    truth = x[:, 0].var()
    assert abs(first.variance[0] - truth) < 1e-12
    # Of the average of 64 draws of z1 the variance is 1/64, known to about sqrt(2 / 600) of itself.
    assert abs(second.variance[0] - truth) < 4 * 2 * (truth / 64 / 600).sqrt() + 4 / 64 * (2 / 600) ** 0.5
    assert abs(second.variance[1]) < 4 / 64 * (2 / 600) ** 0.5
    means = posterior_means(pair.guide, x, site="z2", num_samples=400)
    assert (means[:, 0] - x[:, 0]).abs().max() < 5 / 20


def test_the_two_layer_network_of_the_reference():
    pair = Hierarchical.build((1, 28, 28))
    count = {"x": 784 * 200 + 200, "200": 200 * 200 + 200, "z1": 200 * 200 + 200, "100": 100 * 100 + 100}
    up = count["x"] + count["200"] + count["z1"] + 2 * count["100"] + 100 * 100 + 100
    down = 50 * 100 + 100 + count["100"] + 100 * 200 + 200  # z2 to the mean and scale of z1
    pixels = 100 * 200 + 200 + count["200"] + 200 * 784 + 784
    assert sum(p.numel() for p in pair.guide.parameters()) == up
    assert sum(p.numel() for p in pair.model.parameters()) == down + pixels
    assert sum(isinstance(m, nn.Tanh) for m in pair.modules()) == 8


def test_layers_are_counted():
    with pytest.raises(ValueError, match="got 0 conditionals.*and 1 posteriors, wanted.*Model"):
        Hierarchical(StandardNormal(2), [], Bernoulli(MLP(2, [], X_SHAPE)), [lambda x: None])
    with pytest.raises(ValueError, match="got 3 latent_dims and 2 lists"):
        Hierarchical.build(X_SHAPE, (4, 3, 2))
    wide = constant_scale(1.0)
    pair = Hierarchical(StandardNormal(2), [wide], wide, [wide, lambda z: dist.Normal(z, 1.0)])
    with pytest.raises(ValueError, match=r"batch_shape \(5, 2\), wanted \(5,\)"):
        pair.guide(torch.zeros(5, 2))


def test_predictive_draws_of_a_hierarchy_have_the_evidences_moments():
    pair, evidence = chain()
    torch.manual_seed(0)
    x = Predictive(pair.model, num_samples=20)(size=2000)["x"].reshape(-1, 5)
    ours = pair.sample(40_000, pixels="draw")
    for drawn in (x, ours):
        wanted = evidence.covariance_matrix
        spread = ((wanted.diagonal().outer(wanted.diagonal()) + wanted**2) / len(drawn)).sqrt()
        assert ((drawn.T.cov() - wanted).abs() < 4.5 * spread).all()  # 15 numbers, twice


# Conditional


def linear_conditional(conditional_prior=False):
    """p(z | y) = N(A y, I), p(x | z, y) = N(W z + V y, s^2 I) with its exact posterior; log p(x | y)."""
    generator = torch.Generator().manual_seed(3)
    bed = LinearGaussian.random(4, 2, 0.6, seed=3, dtype=torch.float64)
    v = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    a = torch.randn(2, 3, generator=generator, dtype=torch.float64) * conditional_prior
    scale = bed.scale * torch.eye(4).double()
    joined = Joined(Linear(torch.cat([bed.weight, v], 1), bed.loc, scale))
    prior = (lambda y: Linear(a, torch.zeros(2).double(), torch.eye(2).double())(y)) if conditional_prior else None

    def posterior(x, y):
        given = bed.posterior(x - y @ v.T - y @ a.T @ bed.weight.T)
        return dist.MultivariateNormal(given.mean + y @ a.T, scale_tril=given.scale_tril)

    pair = Conditional(prior or StandardNormal(2).double(), joined, posterior, conditional_prior)
    return pair, lambda x, y: bed.log_evidence(x - y @ v.T - y @ a.T @ bed.weight.T)


@pytest.mark.parametrize("conditional_prior", [False, True])
def test_with_the_exact_conditional_posterior_every_weight_is_the_evidence(conditional_prior):
    pair, evidence = linear_conditional(conditional_prior)
    torch.manual_seed(0)
    y = torch.randn(9, 3, dtype=torch.float64)
    x = pair.sample(y, pixels="draw")
    p = pv.particles(pair.model, pair.guide, x, y, num_samples=6)
    assert p.latents["z"].shape == (6, 9, 2)
    assert (p.log_weight - evidence(x, y)).abs().max() < 1e-10
    estimate = pv.log_likelihood(pair.model, pair.guide, (x, y), num_samples=10)
    assert (estimate.pointwise - evidence(x, y)).abs().max() < 1e-10
    wrong = pv.particles(pair.model, pair.guide, x, y.flip(0), num_samples=6).log_weight - evidence(x, y)
    assert wrong.abs().max() > 0.1


def test_joined_is_the_part_on_the_concatenation():
    torch.manual_seed(0)
    part = Normal(MLP(2 + 3, [4], (1, 2)), scale=0.5)
    z, y = torch.randn(4, 5, 2), torch.randn(5, 3)
    wanted = torch.stack([part(torch.cat([layer, y], -1)).mean for layer in z])
    assert torch.allclose(Joined(part)(z, y).mean, wanted, rtol=1e-6, atol=1e-6)
    labels = torch.tensor([0, 2, 1, 1, 0])
    assert torch.equal(Joined(part, num_classes=3)(z, labels).mean, Joined(part)(z, torch.eye(3)[labels]).mean)
    every = torch.arange(3).reshape(3, 1)  # as an enumeration gives them
    images = torch.randn(5, 1, 1, 2)
    values = Joined(part, event_dim=3, num_classes=3)(images, every).mean
    assert values.shape == (3, 5, 1, 2)
    one = Joined(part, event_dim=3, num_classes=3)(images, torch.full((5,), 2)).mean
    assert torch.allclose(values[2], one, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"shapes \(4, 5, 2\) and \(\), wanted.*num_classes"):
        Joined(part)(z, torch.tensor(1.0))


def test_a_conditional_learns_what_y_says():
    torch.manual_seed(0)
    y = torch.eye(2)[torch.randint(2, (256,))]
    x = (torch.rand(256, *X_SHAPE) < 0.1 + 0.8 * y[:, :1, None, None]).float()
    pair = Conditional.build(X_SHAPE, 2, 2, (16,))
    pv.fit(pair.model, pair.guide, (x, y), epochs=40, learning_rate=1e-2, seed=0)
    light, dark = (pair.sample(torch.eye(2)[k].expand(500, 2)).mean().item() for k in (0, 1))
    stderr = (0.09 / (128 * 9)) ** 0.5
    assert abs(light - 0.9) < 6 * stderr and abs(dark - 0.1) < 6 * stderr
    assert pair.reconstruct(x, y).shape == x.shape


def test_a_conditional_without_its_y_says_so():
    pair, args, _ = small("conditional")
    with pytest.raises(ValueError, match=r"got 12 data and None labels.*fit\(\.\.\., \(x, y\)\)"):
        pair.model(args[0], None)
    with pytest.raises(ValueError, match="got 12 data and 3 labels"):
        pair.guide(args[0], args[1][:3])


# Semi-supervised


def explicit_bound(pair, x, y, noise, classes):
    """Per datum: L(x, y), or the sum over y, at z = mu + sigma * noise[y], by hand."""
    prior, log_py = pair.model.prior(), pair.model.labels().logits
    log_q = pair.guide.classifier(x).logits
    terms = []
    for c in range(classes):
        label = torch.full((len(x),), c)
        q = pair.guide.posterior(x, label)
        z = q.mean + q.stddev * noise[c]
        terms.append(pair.model.likelihood(z, label).log_prob(x) + log_py[c] + prior.log_prob(z) - q.log_prob(z))
    joint = torch.stack(terms, -1)
    unlabelled = (log_q.exp() * (joint - log_q)).sum(-1)
    labelled = joint.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(y < 0, unlabelled, labelled)


def semi_supervised(alpha=0.0):
    """A pair of unequal label frequencies, its data, and the noise that a guide draws under seed 5."""
    pair, (x, y), _ = small("semi-supervised")
    pair.guide.alpha = alpha
    pair.model.labels.logits += torch.tensor([0.5, -0.3, 0.1])
    torch.manual_seed(5)
    noise = torch.normal(torch.zeros(3, len(x), 2).double(), 1.0)
    torch.manual_seed(5)
    return pair, x, y, noise


@pytest.mark.parametrize("known", ["mixed", "none", "all", "not given"])
def test_the_enumerated_bound_is_the_explicit_sum(known):
    pair, x, y, noise = semi_supervised()
    y = {"mixed": y, "none": torch.full_like(y, -1), "all": torch.arange(12) % 3, "not given": None}[known]
    value = -enumerated().loss(pair.model, pair.guide, x, y)
    exact = explicit_bound(pair, x, torch.full((12,), -1) if y is None else y, noise, 3).sum().item()
    assert abs(value - exact) < 1e-10
    if known == "mixed":  # the labels matter
        torch.manual_seed(5)
        assert abs(-enumerated().loss(pair.model, pair.guide, x, y.roll(1)) - exact) > 1e-2


@pytest.mark.parametrize("alpha", [0.0, 0.7])
def test_the_gradient_is_that_of_the_bound_and_alpha_times_the_classification(alpha):
    pair, x, y, noise = semi_supervised(alpha)
    parameters = list(pair.parameters())
    loss = enumerated().differentiable_loss(pair.model, pair.guide, x, y)
    ours = torch.autograd.grad(-loss, parameters)
    known = y >= 0
    log_q = pair.guide.classifier(x[known]).logits.gather(-1, y[known].unsqueeze(-1)).sum()
    bound = explicit_bound(pair, x, y, noise, 3).sum()
    assert abs(-loss.item() - bound.item()) < 1e-10  # what is reported is the bound, whatever alpha is
    wanted = torch.autograd.grad(bound + alpha * log_q, parameters)
    assert max((a - b).abs().max().item() for a, b in zip(ours, wanted, strict=True)) < 1e-10


def test_log_p_of_data_with_and_without_labels_by_quadrature():
    torch.manual_seed(0)
    pair = SemiSupervised.build(X_SHAPE, 3, 1, (8,)).double()
    x, y = binary(6), torch.tensor([0, -1, 2, -1, 1, -1])
    grid = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    with torch.no_grad():
        z = grid.reshape(-1, 1, 1).expand(-1, 6, 1)
        joint = []
        for c in range(3):
            given = pair.model.likelihood(z, torch.full((6,), c)).log_prob(x)
            joint.append(torch.logsumexp(given + pair.model.prior().log_prob(z), 0) + (grid[1] - grid[0]).log())
        joint = torch.stack(joint, -1) - math.log(3)
        exact = torch.where(y < 0, joint.logsumexp(-1), joint.gather(-1, y.clamp(min=0)[:, None])[:, 0])
    estimate = pv.log_likelihood(pair.model, pair.guide, (x, y), num_samples=20_000)
    assert 0 < estimate.mc_stderr < 0.02
    assert abs(estimate.value - exact.mean().item()) < 4 * estimate.mc_stderr
    assert pv.elbo_terms(pair.model, pair.guide, (x, y)).value < exact.mean().item()
    alone = pv.log_likelihood(pair.model, pair.guide, x, num_samples=20_000)  # no label at all
    assert abs(alone.value - joint.logsumexp(-1).mean().item()) < 4 * alone.mc_stderr


def test_a_label_that_the_latent_contradicts_has_no_density():
    pair, (x, y), _ = small("semi-supervised")
    y = torch.arange(12) % 3
    p = pv.particles(pair.model, pair.guide, x, y, num_samples=4)
    assert set(p.latents) == {"y", "z"}
    assert torch.equal(p.latents["y"], y.expand(4, 12)) and (p.log_q["y"] == 0).all()
    assert (pv.log_joint(pair.model, p.latents, x, y) - p.log_joint).abs().max() < 1e-10
    assert (pv.log_joint(pair.model, p.latents, x, (y + 1) % 3) == -math.inf).all()


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images > 7).float().unsqueeze(1)
    return x, torch.from_numpy(data.target)


def test_half_labelled_digits_are_classified():
    x, truth = digits()
    torch.manual_seed(0)
    y = torch.where(torch.rand(1000) < 0.5, truth[:1000], -1)
    pair = SemiSupervised.build((1, 8, 8), 10, latent_dim=8, hidden=(64,))
    history = pv.fit(
        pair.model, pair.guide, (x[:1000], y), loss=enumerated(), epochs=20, batch_size=100, learning_rate=5e-3,
        validation=(x[1000:1200], truth[1000:1200]), seed=0,
    )  # fmt: skip
    assert history["bound"][-1] > history["bound"][0] + 8
    accuracy = (pair.classify(x[1000:]).argmax(-1) == truth[1000:]).double().mean().item()
    assert accuracy > 0.85
    assert math.isfinite(history["validation"][-1]) and history["validation"][-1] > history["validation"][0]
    drawn = pair.sample(truth[:500])
    assert (pair.classify(drawn.round()).argmax(-1) == truth[:500]).double().mean() > 0.6  # they look like their label


def test_labels_are_integers_one_for_each_datum():
    pair, (x, y), _ = small("semi-supervised")
    for wrong in (torch.eye(3)[y], y[:5], y.double()):
        for program in (pair.model, pair.guide):
            with pytest.raises(ValueError, match=r"got labels of shape.*wanted one integer.*argmax\(-1\)"):
                program(x, wrong)
    with pytest.raises(ValueError, match="alpha must be zero or positive, got -1"):
        SemiSupervised.build(X_SHAPE, 3, 2, (8,), alpha=-1)


def test_a_bound_that_cannot_be_reparameterised_names_enumeration():
    pair, args, _ = small("semi-supervised")
    with pytest.raises(ValueError, match="guide site 'y' has no reparameterised sampler.*TraceEnum_ELBO"):
        pv.fit(pair.model, pair.guide, args, loss=pv.Objective(pv.iwae, 3), epochs=1)


# Mixture


def test_both_bounds_of_a_mixture_are_one_and_so_are_their_gradients():
    pair, (x,), _ = small("mixture")
    with torch.no_grad():
        pair.model.prior.logits += torch.tensor([0.4, -0.2, 1.0])
        pair.model.prior.components.log_scale += 0.3 * torch.randn(3, 2)
    results = []
    for model, loss in ((pair.model, enumerated()), (pair.marginal, Trace_ELBO(max_plate_nesting=1))):
        torch.manual_seed(7)
        value = loss.differentiable_loss(model, pair.guide, x)
        results.append((value.item(), torch.autograd.grad(value, list(pair.parameters()))))
    assert abs(results[0][0] - results[1][0]) < 1e-10
    assert max((a - b).abs().max().item() for a, b in zip(results[0][1], results[1][1], strict=True)) < 1e-10


def test_log_p_of_a_mixture_by_quadrature_and_responsibilities_by_bayes():
    torch.manual_seed(0)
    pair = Mixture.build(X_SHAPE, 3, 1, (8,)).double()
    x = binary(5)
    grid = torch.linspace(-12, 12, 6001, dtype=torch.float64)
    prior = pair.model.prior
    with torch.no_grad():
        prior.logits += torch.tensor([0.4, -0.2, 1.0])
        prior.components.loc *= 2
        likelihood = pair.decode(grid.reshape(-1, 1, 1)).log_prob(x)
        log_pc = prior.clusters().logits
        given_c = torch.stack([prior.components(torch.tensor(c)).log_prob(grid[:, None]) for c in range(3)], -1)
        step = (grid[1] - grid[0]).log()
        joint = torch.logsumexp(likelihood.unsqueeze(-1) + given_c.unsqueeze(1), 0) + step + log_pc
        # The guide's view of c, by quadrature: the integral of q(z | x) p(c | z).
        q = pair.posterior(x).log_prob(grid.reshape(-1, 1, 1)).exp()
        view = (q.unsqueeze(-1) * (given_c + log_pc).softmax(-1).unsqueeze(1)).sum(0) * (grid[1] - grid[0])
    exact = joint.logsumexp(-1).mean().item()
    wide = pv.Guide(
        lambda x: dist.Normal(torch.zeros(len(x), 1).double(), 3.0).to_event(1)
    )  # heavier than any component
    estimate = pv.log_likelihood(pair.marginal, wide, x, num_samples=20_000)
    assert 0 < estimate.mc_stderr < 0.02
    assert abs(estimate.value - exact) < 4 * estimate.mc_stderr
    ours = pair.responsibilities(x, num_samples=20_000)
    assert ours.shape == (5, 3) and (ours.sum(-1) - 1).abs().max() < 1e-12
    assert (ours - view).abs().max() < 4 * 0.5 / 20_000**0.5
    with torch.no_grad():  # reweighed to the exact posterior they are p(c | x)
        p = pv.particles(pair.marginal, wide, x, num_samples=20_000)
        share, given_z = p.log_weight.softmax(0).unsqueeze(-1), prior.responsibilities(p.latents["z"])
        error = (share * given_z).sum(0) - joint.softmax(-1)
        stderr = (share * (given_z - joint.softmax(-1))).square().sum(0).sqrt()
        assert stderr.max() < 0.01 and (error.abs() < 4 * stderr).all()


def test_clusters_are_found():
    torch.manual_seed(0)
    c = torch.randint(2, (300,))
    x = (torch.rand(300, *X_SHAPE) < 0.05 + 0.9 * c.reshape(-1, 1, 1, 1)).float()
    pair = Mixture.build(X_SHAPE, 2, 2, (16,))
    pv.fit(pair.model, pair.guide, x, loss=enumerated(), epochs=60, learning_rate=1e-2, seed=0)
    found = pair.responsibilities(x).argmax(-1)
    accuracy = (found == c).double().mean().item()
    assert max(accuracy, 1 - accuracy) > 0.97
    light = [pair.sample(200, cluster=k).mean().item() for k in (0, 1)]
    assert max(light) > 0.85 and min(light) < 0.15
    with pytest.raises(ValueError, match=r"got cluster 2, wanted one of 0 \.\.\. 1"):
        pair.sample(cluster=2)


def test_the_enumerated_site_is_refused_with_the_reason():
    pair, (x,), _ = small("mixture")
    for call in (
        lambda: pv.particles(pair.model, pair.guide, x),
        lambda: pv.log_likelihood(pair.model, pair.guide, x, num_samples=3),
        lambda: pv.fit(pair.model, pair.guide, x, loss=pv.Objective(pv.iwae, 3), epochs=1),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match=r"site 'c' of the model is marked to be enumerated.*pair\.marginal"):
                call()


def test_the_marginal_takes_every_bound_and_trains_the_same_modules():
    pair, (x,), _ = small("mixture")
    before = {name: p.detach().clone() for name, p in pair.named_parameters()}
    pv.fit(pair.marginal, pair.guide, x, loss=pv.Objective(pv.iwae, 5), epochs=20, learning_rate=1e-2, seed=0)
    assert [name for name, p in pair.named_parameters() if torch.equal(p, before[name])] == []


def test_predictive_draws_of_clusters_and_labels():
    torch.manual_seed(0)
    mixture, *_ = small("mixture")
    drawn = Predictive(mixture.model, num_samples=5)(size=400)
    assert drawn["x"].shape == (5, 400, *X_SHAPE) and set(drawn["c"].unique().tolist()) == {0, 1, 2}
    labelled, (x, y), _ = small("semi-supervised")
    drawn = Predictive(poutine.uncondition(labelled.model), guide=labelled.guide, num_samples=7)(x)
    assert drawn["x"].shape == (7, 12, *X_SHAPE)
    assert Predictive(labelled.model, num_samples=3)(size=4)["y"].shape == (3, 4)


def test_fit_refuses_what_would_count_the_cluster_without_drawing_it():
    pair, (x,), loss = small("mixture")
    before = copy.deepcopy(pair.state_dict())
    for options, text in (
        ({}, r"'c' of the model has no counterpart.*Trace_ELBO would draw.*take loss=TraceEnum_ELBO"),
        ({"loss": loss, "validation": x}, r"'c' of the model is marked to be enumerated.*pair\.marginal"),
    ):
        with pytest.raises(ValueError, match=text):
            pv.fit(pair.model, pair.guide, x, epochs=1, **options)
        assert all(torch.equal(value, before[name]) for name, value in pair.state_dict().items())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z2", pair.posterior(x))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pair.marginal.prior())
            pyro.sample("z2", pair.marginal.prior())
            pyro.sample("x", pair.decode(z), obs=x)

    with pytest.raises(ValueError, match="latent site 'z' of the model has no counterpart.*Draw 'z' in the guide"):
        pv.fit(model, guide, x, loss=enumerated(), epochs=1)
    with pytest.raises(ValueError, match="latent site 'z' of the model has no counterpart"):
        pv.particles(model, guide, x)
