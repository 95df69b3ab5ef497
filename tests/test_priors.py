"""Learned priors against brute force, and what sharing an encoder with the guide takes."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO
from torch import nn

from pyro_vae.inference.bounds import iwae
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit
from pyro_vae.parameters import own_parameters
from pyro_vae.parts.distributions import mixture as mixtures
from pyro_vae.parts.distributions.mixture import SharedMixture, normals
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import NSF, Amortized, Delta, DiagonalNormal, FullNormal
from pyro_vae.parts.priors.mixture import NormalMixture, VampPrior
from pyro_vae.programs.pair import Guide, Model
from pyro_vae.programs.vae import VAE
from pyro_vae.traces import particles
from tests.pairs import binary

LEADING = [(), (4,), (3, 4), (0,), (2, 1, 4)]


class Full(Amortized):
    """A posterior whose components are not diagonal."""

    def __init__(self, encoder, latent_dim):
        super().__init__(encoder, latent_dim, latent_dim + latent_dim**2)

    def family(self, parameters):
        loc, square = parameters[..., : self.latent_dim], parameters[..., self.latent_dim :]
        square = square.unflatten(-1, (self.latent_dim, self.latent_dim))
        tril = square.tril(-1) + torch.diag_embed(square.diagonal(dim1=-2, dim2=-1).exp())
        return dist.MultivariateNormal(loc, scale_tril=tril, validate_args=False)


def random_mixture(covariance="diagonal", latent_dim=2, num_components=5, seed=0):
    torch.manual_seed(seed)
    prior = NormalMixture(latent_dim, num_components, covariance).double()
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.7)
    return prior


def random_vamp(family=DiagonalNormal, learned_weights=False, bounds=None):
    torch.manual_seed(0)
    posterior = family(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8)), 2).double()
    prior = VampPrior(posterior, torch.rand(6, 3, dtype=torch.float64), bounds, learned_weights)
    if learned_weights:
        with torch.no_grad():
            prior.logits.normal_()
    return prior


PRIORS = {
    "diagonal mixture": lambda: random_mixture(),
    "full mixture": lambda: random_mixture("full"),
    "vamp": lambda: random_vamp(),
    "vamp, weights": lambda: random_vamp(learned_weights=True, bounds=(0, 1)),
    "vamp, full": lambda: random_vamp(Full),
}


def components(prior):
    """Weights, means and covariances in plain numbers, by another way than the code's."""
    if isinstance(prior, NormalMixture):
        scale = prior.log_scales.exp()
        tril = torch.diag_embed(scale) + (prior.lower.tril(-1) if prior.lower is not None else 0)
        return prior.logits.softmax(-1), prior.locs, tril @ tril.mT
    q = prior.posterior(prior.pseudo_inputs)
    full = isinstance(prior.posterior, Full)
    return prior.logits.softmax(-1), q.mean, q.covariance_matrix if full else torch.diag_embed(q.variance)


def brute_force(prior, z):
    weights, means, covariances = components(prior)
    return sum(
        w * torch.distributions.MultivariateNormal(m, covariance_matrix=c, validate_args=False).log_prob(z).exp()
        for w, m, c in zip(weights, means, covariances, strict=True)
    ).log()


def grid(half, points):
    axis = torch.linspace(-half, half, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), (axis[1] - axis[0]).item() ** 2


@pytest.mark.parametrize("name", PRIORS)
@pytest.mark.parametrize("leading", LEADING, ids=str)
def test_the_density_is_that_of_the_sum_over_components(name, leading):
    prior = PRIORS[name]()
    z = 2 * torch.randn(*leading, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = prior().log_prob(z)
    assert got.shape == leading
    assert (got - brute_force(prior, z)).abs().sum() < 1e-10
    expanded = prior().expand([4]).log_prob(z) if leading[-1:] in [(4,), ()] else got
    assert torch.equal(expanded, got.expand(expanded.shape))


@pytest.mark.parametrize("name", PRIORS)
def test_the_density_integrates_to_one(name):
    z, cell = grid(14, 701)
    assert abs(PRIORS[name]()().log_prob(z).exp().sum().item() * cell - 1) < 1e-6


@pytest.mark.parametrize("name", PRIORS)
def test_samples_have_the_density_s_moments(name):
    prior = PRIORS[name]()
    p = prior()
    weights, means, covariances = components(prior)
    mean = weights @ means
    variance = weights @ (covariances.diagonal(dim1=-2, dim2=-1) + (means - mean) ** 2)
    assert torch.allclose(p.mean, mean, atol=1e-12) and torch.allclose(p.variance, variance, atol=1e-12)
    torch.manual_seed(3)
    z = p.expand([100]).sample((200,))
    assert z.shape == (200, 100, 2) and not z.requires_grad
    z = z.reshape(-1, 2)
    assert ((z.mean(0) - mean).abs() < 4 * z.std(0) / len(z) ** 0.5).all()
    squares = (z - mean) ** 2
    assert ((squares.mean(0) - variance).abs() < 4 * squares.std(0) / len(z) ** 0.5).all()
    # Where the density says they should be, jointly: the share above a diagonal line.
    points, cell = grid(14, 351)
    share = (p.log_prob(points).exp() * (points.sum(-1) > 0.3)).sum() * cell
    found = (z.sum(-1) > 0.3).double()
    assert abs(found.mean() - share) < 4 * found.std() / len(z) ** 0.5 + 0.02


@pytest.mark.parametrize("name", PRIORS)
def test_every_parameter_has_the_gradient_of_the_brute_force(name):
    prior = PRIORS[name]()
    z = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    wanted = [*prior.parameters(), z]
    got = torch.autograd.grad(prior().log_prob(z).sum(), wanted)
    true = torch.autograd.grad(brute_force(prior, z).sum(), wanted)
    for a, b in zip(got, true, strict=True):
        assert torch.allclose(a, b, atol=1e-10) and (a.abs().sum() > 0 or a.numel() == 0)


def test_the_matrix_products_are_exact_in_float32_where_the_terms_cancel():
    torch.manual_seed(0)
    loc, scale = 1.5 * torch.randn(200, 50) + 5, (0.5 * torch.randn(200, 50) - 2.5).exp()
    z = loc[:40] + scale[:40] * torch.randn(40, 50)
    got = SharedMixture(torch.zeros(200), normals(loc, scale)).log_prob(z)
    table = dist.Normal(loc.double(), scale.double()).to_event(1).log_prob(z.double().unsqueeze(-2))
    assert got.dtype == torch.float32
    assert (got - (table.logsumexp(-1) - math.log(200))).abs().max() < 2e-5


def test_it_never_holds_a_table_of_values_components_and_dimensions():
    p = SharedMixture(torch.zeros(500), normals(torch.randn(500, 50), torch.ones(500, 50)))
    largest = 0
    with torch.profiler.profile(record_shapes=True) as profile:
        p.expand([20, 10]).log_prob(torch.randn(20, 10, 50))
    for event in profile.events():
        largest = max([largest, *(math.prod(shape) for shape in event.input_shapes if shape)])
    assert largest == 20 * 10 * 500


def flows(count, latent_dim=2):
    """A mixture of splines, as of a VampPrior, in float64."""
    torch.manual_seed(0)
    posterior = NSF(MLP(4, [8], None), latent_dim, transforms=2, bins=4, hidden_features=(8,), context=4).double()
    with torch.no_grad():
        for parameter in posterior.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return VampPrior(posterior, torch.randn(count, 4, dtype=torch.float64))


def test_parts_of_a_table_give_its_value_and_first_and_second_derivatives(monkeypatch):
    prior = flows(5)
    z = torch.randn(3, 7, 2, dtype=torch.float64, requires_grad=True)
    wanted = [*prior.parameters(), z]
    found = []
    for pairs in (10**6, 20):  # all at once, and four values at a time
        monkeypatch.setattr(mixtures, "_PAIRS", pairs)
        value = prior().log_prob(z)
        first = torch.autograd.grad(value.square().sum(), wanted, create_graph=True)
        second = torch.autograd.grad(first[-1].square().sum(), wanted)
        with torch.no_grad():
            assert torch.allclose(prior().log_prob(z), value, rtol=1e-13)
        found.append([value, *first, *second])
    assert found[0][0].shape == (3, 7)
    for whole, parts in zip(*found, strict=True):
        assert torch.allclose(whole, parts, rtol=1e-9, atol=1e-12) and whole.abs().sum() > 0


def test_many_values_under_a_mixture_of_splines_fit_into_memory(monkeypatch):
    """What is kept for the way back: a few numbers a value, where all at once it is thousands for each component."""
    prior, z, kept = flows(50).float(), torch.randn(2000, 2), 0

    def pack(tensor):
        nonlocal kept
        kept += tensor.numel()
        return tensor

    found = []
    for pairs in (mixtures._PAIRS, 10**9):
        monkeypatch.setattr(mixtures, "_PAIRS", pairs)
        kept = 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            prior().log_prob(z).sum()
        found.append(kept / len(z))
    assert found[0] < 10 and found[1] > 1000 * 50


def test_an_objective_over_parts_is_captured_if_they_are_few(monkeypatch):
    monkeypatch.setattr(mixtures, "_PAIRS", 45)  # two parts
    torch.manual_seed(0)
    prior = VampPrior(FullNormal(MLP(4, [4], None), 2).double(), torch.randn(5, 4, dtype=torch.float64))
    model = Model(prior, Bernoulli(MLP(2, [4], 4).double()))
    guide, x = Guide(prior.posterior), (torch.rand(6, 4) < 0.5).double()
    loss = Objective(iwae, 3, estimator="doubly-reparameterized", max_plate_nesting=1)
    results = []
    replayed = Compiled(loss, compile_after=None)
    for objective in (loss, replayed):
        with own_parameters(model, guide):
            for _ in range(3):  # the second and third are replays
                torch.manual_seed(1)
                for parameter in (*model.parameters(), *guide.parameters()):
                    parameter.grad = None
                value = objective.loss_and_grads(model, guide, x)
        results.append([torch.tensor(value), *(p.grad.clone() for p in (*model.parameters(), *guide.parameters()))])
    assert replayed.captures == 1 and replayed.reason is None
    for eager, again in zip(*results, strict=True):
        assert torch.allclose(eager.double(), again.double(), rtol=1e-9, atol=1e-11)
    monkeypatch.setattr(mixtures, "_PAIRS", 5)
    many = Compiled(loss, compile_after=None)
    with (
        own_parameters(model, guide),
        pytest.warns(UserWarning, match="parts of a mixture of 5.*down takes longer than it saves"),
    ):
        assert [math.isfinite(many.loss_and_grads(model, guide, x)) for _ in range(3)] == [
            True
        ] * 3 and not many.captures


def test_normal_mixture_starts_spread_out_with_the_moments_of_the_standard_normal():
    torch.manual_seed(0)
    p = NormalMixture(3, 5000, spread=0.8)()
    assert (p.mean.abs() < 4 * 0.8 / 5000**0.5).all()
    assert (p.variance - 1).abs().max() < 4 * 0.64 * (2 / 5000) ** 0.5
    assert p.components.mean.std(0).min() > 0.75


def test_expectation_maximisation_finds_two_clusters():
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(3000, 2, generator=generator) * 0.1 + torch.tensor([30.0, 0.0])
    second = torch.randn(1000, 2, generator=generator) @ torch.tensor([[1.0, 0.9], [0.0, 0.3]])
    for covariance in ("diagonal", "full"):
        prior = NormalMixture.fitted(torch.cat([first, second]), 2, covariance)
        order = prior().log_weights.argsort(descending=True)
        weights, means, covariances = (part[order] for part in components(prior))
        assert torch.allclose(weights, torch.tensor([0.75, 0.25]), atol=1e-4)
        assert torch.allclose(means, torch.stack([first.mean(0), second.mean(0)]), atol=1e-3)
        for found, points in zip(covariances, (first, second), strict=True):
            wanted = points.T.cov()
            wanted = wanted if covariance == "full" else wanted.diagonal().diag()
            # scikit-learn divides by N, and puts 1e-6 of the variance of all under every variance.
            assert torch.allclose(found, wanted, atol=1e-3, rtol=1e-2)


# Under Pyro


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diagonal mixture", "vamp, full"])
def test_it_is_a_prior_under_plates_predictive_and_nuts(name):
    prior = PRIORS[name]().requires_grad_(False).eval()
    model = Model(prior, lambda z: dist.Normal(z, 1.0).to_event(1)).eval()
    assert Predictive(model, num_samples=3)(size=5)["z"].shape == (3, 5, 2)
    x = torch.ones(1, 2, dtype=torch.float64)
    torch.manual_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=400, warmup_steps=100, disable_progbar=True)
    mcmc.run(x)
    z = mcmc.get_samples()["z"].reshape(-1, 2)
    points, _ = grid(10, 401)
    posterior = (prior().log_prob(points) + dist.Normal(points, 1.0).to_event(1).log_prob(x)).softmax(0)
    mean = posterior @ points
    stderr = (posterior @ (points - mean) ** 2).sqrt() / mcmc.diagnostics()["z"]["n_eff"].reshape(2).clamp(
        max=400
    ) ** 0.5
    assert ((z.mean(0) - mean).abs() < 4 * stderr).all()


def vamp_pair(seed=0, family=DiagonalNormal, **options):
    torch.manual_seed(seed)
    posterior = family(MLP((1, 4, 4), [16], None), 2)
    prior = VampPrior.from_data(posterior, binary(40), 8, bounds=(0, 1), **options)
    return Model(prior, Bernoulli(MLP(2, [16], (1, 4, 4)))), Guide(posterior)


def test_it_is_the_guide_s_posterior_at_the_pseudo_inputs_whatever_the_number_of_particles():
    model, guide = vamp_pair()
    calls = []
    guide.posterior.encoder.register_forward_hook(lambda module, args, out: calls.append(args[0].shape))
    table = particles(model, guide, binary(), num_samples=7)
    assert table.log_prior["z"].shape == (7, 12)
    assert [shape[0] for shape in calls].count(8) == len(calls) // 2  # once per run of the model
    q = guide.posterior(model.prior.pseudo_inputs)
    wanted = q.log_prob(table.latents["z"].unsqueeze(-2)).logsumexp(-1) - math.log(8)
    assert torch.allclose(table.log_prior["z"], wanted, atol=1e-5)


def test_pseudo_inputs_start_at_the_data_and_stay_inside_the_bounds():
    data = binary(40)
    free = VampPrior.from_data(DiagonalNormal(MLP((1, 4, 4), [4], None), 2), data, 40, seed=3)
    assert sorted(map(tuple, free.pseudo_inputs.flatten(1).tolist())) == sorted(map(tuple, data.flatten(1).tolist()))
    model, guide = vamp_pair()
    start = model.prior.pseudo_inputs.detach()
    assert start.shape == (8, 1, 4, 4)
    assert all((data - u).flatten(1).abs().amax(1).min() < 0.011 for u in start)
    fit(model, guide, data, epochs=30, learning_rate=0.3, seed=0)
    moved = model.prior.pseudo_inputs.detach()
    assert (moved - start).abs().max() > 0.5 and 0 <= moved.min() and moved.max() <= 1


def test_plain_svi_and_fit_move_the_shared_encoder_once():
    data = binary(40)
    moved = {}
    for way in ("svi", "fit"):
        model, guide = vamp_pair()
        if way == "svi":
            pyro.clear_param_store()
            svi = SVI(model, guide, pyro.optim.SGD({"lr": 1e-3}), Trace_ELBO())
            torch.manual_seed(5)
            svi.step(data)
        else:
            twin, twin_guide = vamp_pair()
            torch.manual_seed(5)
            Trace_ELBO().differentiable_loss(twin, twin_guide, data).backward()
            with torch.no_grad():
                for parameter in VAE(twin, twin_guide).parameters():
                    parameter.sub_(1e-3 * parameter.grad)
            model, guide = twin, twin_guide
        moved[way] = VAE(model, guide)
    stepped, by_hand = (dict(moved[way].named_parameters()) for way in ("svi", "fit"))
    fresh = dict(VAE(*vamp_pair()).named_parameters())
    assert "model.prior.free_inputs" in fresh and "model.prior.posterior.head.weight" in fresh
    assert not any(name.startswith("guide.") for name in fresh)  # all of the guide's are the prior's
    for name, value in fresh.items():
        assert not torch.equal(stepped[name], value)
        assert torch.allclose(stepped[name], by_hand[name], atol=1e-6), name


def test_fit_trains_it_by_any_bound_and_beats_the_start():
    model, guide = vamp_pair(learned_weights=True)
    history = fit(model, guide, binary(200), loss=Objective(iwae, num_samples=3), epochs=15, learning_rate=0.01, seed=0)
    assert history["bound"][-1] > history["bound"][0] + 1
    assert model.prior.logits.abs().min() > 0 and model.prior.posterior is guide.posterior


def test_copies_and_files_keep_the_sharing(tmp_path):
    vae = VAE(*vamp_pair(learned_weights=True))
    twin = copy.deepcopy(vae)
    assert twin.model.prior.posterior is twin.guide.posterior is not vae.guide.posterior
    vae.save(tmp_path / "vae.safetensors")
    other = VAE(*vamp_pair(seed=1, learned_weights=True))
    x = binary()
    assert not torch.equal(other.posterior(x).mean, vae.posterior(x).mean)
    other.load_weights(tmp_path / "vae.safetensors")
    assert other.model.prior.posterior is other.guide.posterior
    assert torch.equal(other.posterior(x).mean, vae.posterior(x).mean)
    z = torch.randn(5, 2)
    assert torch.equal(other.model.prior().log_prob(z), vae.model.prior().log_prob(z))


def test_the_model_alone_draws_from_the_mixture_of_posteriors():
    model, guide = vamp_pair()
    torch.manual_seed(0)
    z = poutine.trace(model).get_trace(size=2000).nodes["z"]["value"]
    q = guide.posterior(model.prior.pseudo_inputs)
    assert ((z.mean(0) - q.mean.mean(0)).abs() < 4 * z.std(0) / 2000**0.5).all()


def test_what_cannot_be_a_prior_is_refused():
    encoder = MLP((1, 4, 4), [4], None)
    with pytest.raises(ValueError, match="Delta cannot score a sample that it did not draw.*DiagonalNormal"):
        VampPrior.from_data(Delta(encoder, 2), binary(), 3)
    posterior = DiagonalNormal(encoder, 2)
    with pytest.raises(ValueError, match=r"num_components=13 for 12 data, wanted 1 to 12"):
        VampPrior.from_data(posterior, binary(12), 13)
    with pytest.raises(ValueError, match=r"from -1 to 1 for bounds=\(0, 1\).*bounds=None"):
        VampPrior(posterior, torch.tensor([[-1.0], [1.0]]), (0, 1))
    with pytest.raises(ValueError, match=r"shape \(3,\), wanted \(C, \*x_shape\)"):
        VampPrior(posterior, torch.zeros(3))
    with pytest.raises(ValueError, match='covariance=\'tied\', wanted "diagonal" or "full"'):
        NormalMixture(2, covariance="tied")
    with pytest.raises(ValueError, match="spread=0, wanted a number between 0 and 1"):
        NormalMixture(2, spread=0)
    with pytest.raises(ValueError, match="must be positive integers, got 2 and 0"):
        NormalMixture(2, 0)
    with pytest.raises(ValueError, match=r"shape \(3, 2\) for 4 components"):
        NormalMixture.fitted(torch.zeros(3, 2), 4)
    with pytest.raises(ValueError, match=r"batch_shape \(5, 2\) and event_shape \(\).*to_event\(1\)"):
        SharedMixture(torch.zeros(5), dist.Normal(torch.zeros(5, 2), 1.0))
