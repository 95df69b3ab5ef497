"""Guides that improve on a guide: the right densities, the right Jacobian, and bounds that rise."""

import copy
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae.inference.bounds import elbo, iwae
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.parts.posteriors import Amortized, DiagonalNormal
from pyro_vae.parts.posteriors import Delta as Point
from pyro_vae.programs.hamiltonian import Hamiltonian, tempered_leapfrog
from pyro_vae.programs.pair import Guide, Model
from pyro_vae.programs.semi_amortized import SemiAmortized
from pyro_vae.programs.vae import VAE
from pyro_vae.traces import log_joint, log_q, particles
from pyro_vae.unconstrained import free_parameters
from tests.pairs import binary, linear_pair, small_pair

PAIR, X = linear_pair()
BED = PAIR.bed
EVIDENCE = BED.log_evidence(X)


def bad_guide(x):
    """A mean-field guide for the linear test bed, off by one and twice too wide."""
    best = BED.best_mean_field(x)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(best.mean + 0.3, best.stddev * 1.5).to_event(1))


def layered_model(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
        z = pyro.sample("z", dist.Normal(0.8 * top, 0.5).to_event(1))
        pyro.sample("x", dist.Normal(z, 0.7).to_event(1), obs=x)


def layered_guide(x):
    with pyro.plate("data", len(x)):
        top = pyro.sample("top", dist.Normal(0.2 * x + 0.3, 0.8).to_event(1))
        pyro.sample("z", dist.Normal(0.4 * top + 0.3 * x, 0.6).to_event(1))


LAYERED_X = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
LAYERED_EVIDENCE = dist.Normal(0.0, (0.64 + 0.25 + 0.49) ** 0.5).log_prob(LAYERED_X).sum(-1)


class Scaled(Amortized):
    """A family whose site is a transformed distribution: known by its head only."""

    def __init__(self, encoder, latent_dim):
        super().__init__(encoder, latent_dim, 2 * latent_dim)

    def family(self, parameters):
        loc, log_scale = parameters.chunk(2, -1)
        base = dist.Normal(torch.zeros_like(loc), 1.0).to_event(1)
        return dist.TransformedDistribution(base, dist.transforms.AffineTransform(loc, log_scale.exp(), event_dim=1))


def head_guide(family=Scaled):
    torch.manual_seed(0)
    return Guide(family(nn.Linear(6, 6), 3)).double()


def within(estimate, truth, stderr, slack=1e-9):
    assert ((estimate - truth).abs() < 4 * stderr + slack).all()


def mean_and_stderr(values):
    return values.mean(0), values.std(0) / len(values) ** 0.5


def assert_the_weights_average_to_the_evidence(model, guide, x, evidence, num_samples=4000):
    """E[w] = p(x) for every datum, and jointly: the law that a wrong density or Jacobian breaks."""
    torch.manual_seed(7)
    with torch.no_grad():
        log_weight = particles(model, guide, x, num_samples=num_samples, vectorize=True).log_weight
    share = (log_weight - evidence).exp()
    mean, stderr = mean_and_stderr(share)
    within(mean, 1.0, stderr)
    within(*(lambda pair: (pair[0], 1.0, pair[1]))(mean_and_stderr(share.mean(1))))
    return log_weight


# Hamiltonian


@pytest.mark.parametrize("tempering", ["none", "fixed", "free"])
def test_the_jacobian_is_that_of_the_whole_map(tempering):
    """(z_0, rho_0) to (z_T, rho_T) in a potential that is nowhere quadratic, step sizes per dimension."""
    step_size = torch.tensor([0.11, 0.23, 0.07], dtype=torch.float64)
    guide = Hamiltonian(PAIR.model, bad_guide, 4, step_size, tempering, beta=0.3).double()
    cooling = guide.cooling.detach()

    def flow(both):
        def gradient(at):
            z = at["z"]
            return {"z": -(z**3) + torch.sin(z.roll(1)) * z}

        z, rho = tempered_leapfrog(
            gradient, {"z": both[:3]}, {"z": both[3:]}, guide.log_step_size.exp().detach(), cooling
        )
        return torch.cat([z["z"], rho["z"]])

    both = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    jacobian = torch.autograd.functional.jacobian(flow, both)
    assert abs(torch.linalg.slogdet(jacobian).logabsdet - 3 * cooling.log().sum()) < 1e-10
    wanted = {"none": 1.0, "fixed": 0.3**0.5, "free": 0.3**0.5}[tempering]
    assert abs(cooling.prod().item() - wanted) < 1e-10
    assert cooling.shape == (4,) and (cooling <= 1).all()


def test_the_fixed_schedule_is_the_paper_s():
    cooling = Hamiltonian(PAIR.model, bad_guide, 5, tempering="fixed", beta=0.25).double().cooling
    beta = [1 / ((1 - 2) * (k / 5) ** 2 + 2) ** 2 for k in range(6)]
    assert torch.allclose(
        cooling, torch.tensor([math.sqrt(a / b) for a, b in zip(beta, beta[1:], strict=False)], dtype=torch.float64)
    )


def test_the_density_is_that_of_position_and_momentum_by_change_of_variables():
    """log q from the emitted Delta against slogdet of the program's own map."""
    guide = Hamiltonian(PAIR.model, bad_guide, 3, torch.tensor(0.08).double(), "fixed", beta=0.4)
    x, draws = X[:1], []
    original = torch.randn_like

    def recorded(value):
        draws.append(original(value))
        return draws[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn_like", recorded)
        torch.manual_seed(3)
        table = particles(PAIR.model, guide, x)
        torch.manual_seed(3)
        z0 = particles(PAIR.model, bad_guide, x).latents["z"][0, 0]
    gamma, cooling, step = draws[0][0], guide.cooling.detach(), guide.log_step_size.exp().detach()

    def flow(both):
        def gradient(at):
            z = at["z"]
            with torch.enable_grad():
                if not z.requires_grad:
                    z = z.detach().requires_grad_()
                total = log_joint(PAIR.model, {"z": z.reshape(1, 1, 3)}, x).sum()
                return {"z": torch.autograd.grad(total, z, create_graph=True)[0]}

        end = tempered_leapfrog(gradient, {"z": both[:3]}, {"z": both[3:]}, step, cooling)
        return torch.cat([part["z"] for part in end])

    start = torch.cat([z0, gamma / 0.4**0.5])
    end = flow(start)
    assert torch.allclose(end[:3], table.latents["z"][0, 0], atol=1e-12)
    log_det = torch.linalg.slogdet(torch.autograd.functional.jacobian(flow, start)).logabsdet
    normal = dist.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    log_start = log_q(bad_guide, {"z": z0.reshape(1, 1, 3)}, x) + (normal.log_prob(gamma) + 0.5 * math.log(0.4)).sum()
    wanted = log_start - log_det - normal.log_prob(end[3:]).sum()
    assert (table.log_q["z"] - wanted).abs().max() < 1e-10


@pytest.mark.parametrize("kind", [Hamiltonian, SemiAmortized])
def test_with_no_steps_it_is_its_base_guide(kind):
    model, base = small_pair()
    guide = kind(model, base, 0)
    for num_samples in (1, 5):
        tables = []
        for each in (guide, base):
            torch.manual_seed(1)
            tables.append(particles(model, each, binary(), num_samples=num_samples))
        assert torch.equal(tables[0].latents["z"], tables[1].latents["z"])
        assert torch.equal(tables[0].log_q["z"], tables[1].log_q["z"])
    assert torch.equal(log_q(guide, tables[0].latents, binary()), log_q(base, tables[0].latents, binary()))
    assert guide.rescoring == "one pass"


@pytest.mark.parametrize("tempering", ["none", "fixed", "free"])
def test_hamiltonian_weights_average_to_the_evidence_and_its_bound_lies_between(tempering):
    guide = Hamiltonian(PAIR.model, bad_guide, 4, 0.1, tempering, beta=0.7).double()
    log_weight = assert_the_weights_average_to_the_evidence(PAIR.model, guide, X, EVIDENCE)
    bound, stderr = mean_and_stderr(log_weight.mean(1))
    with torch.no_grad():
        base = particles(PAIR.model, bad_guide, X, num_samples=4000).log_weight.mean().item()
    assert bound < EVIDENCE.mean() + 4 * stderr
    assert bound > base + 4 * stderr  # better than the guide that it starts from


def test_hamiltonian_moves_every_layer_of_a_layered_guide():
    guide = Hamiltonian(layered_model, layered_guide, 3, 0.15, "fixed", beta=0.6).double()
    assert_the_weights_average_to_the_evidence(layered_model, guide, LAYERED_X, LAYERED_EVIDENCE)
    with torch.no_grad():
        table = particles(layered_model, guide, LAYERED_X, num_samples=3)
    assert set(table.log_q) == {"top", "z"} and table.points == ()


def test_hamiltonian_trains_its_guide_steps_and_tempering_up_to_the_evidence():
    model, base = linear_model(), head_guide(DiagonalNormal)
    guide = Hamiltonian(model, base, 3, 0.05, "fixed", beta=0.5).double()
    history = fit(model, guide, X, epochs=200, batch_size=30, learning_rate=0.02, seed=0)
    assert history["loss"][-1] < history["loss"][0]
    torch.manual_seed(0)
    with torch.no_grad():
        log_weight = particles(model, guide, X, num_samples=2000).log_weight
    bound, stderr = mean_and_stderr(log_weight.mean(1))
    exact = EVIDENCE.mean()
    assert exact - 3 < bound < exact + 4 * stderr
    for parameter, start in ((guide.log_step_size, math.log(0.05)), (guide.free_beta, 0.0)):
        assert abs(parameter.item() - start) > 0.05


def linear_model():
    return Model(
        lambda: dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1),
        lambda z: dist.Normal(z @ BED.weight.T + BED.loc, BED.scale).to_event(1),
    )


def test_a_hamiltonian_guide_has_no_density_of_z_and_says_so():
    guide = Hamiltonian(PAIR.model, bad_guide, 2).double()
    z = particles(PAIR.model, guide, X).latents
    with pytest.raises(ValueError, match=r"guide site 'z' is a .*Delta"):
        log_q(guide, z, X)
    assert guide.rescoring == "impossible"


# SemiAmortized


def exact_elbo(guide, x):
    """The ELBO without sampling, of the Gaussian that the guide draws from."""
    q = particles(PAIR.model, guide, x).posteriors["z"]
    return BED.elbo(x, q.mean, torch.diag_embed(q.base_dist.scale))


def test_the_elbo_rises_with_the_steps_to_the_best_of_the_family():
    best = EVIDENCE - BED.mean_field_gap()
    options = {"step_size": 0.03, "momentum": 0.0, "num_samples": 20}
    bounds = []
    for steps in (0, 1, 2, 4, 8, 30):
        with torch.no_grad():
            bounds.append(exact_elbo(SemiAmortized(PAIR.model, bad_guide, steps, **options), X).mean())
    assert all(a < b for a, b in zip(bounds, bounds[1:], strict=False))
    assert best.mean() - bounds[0] > 0.3
    assert 0 <= best.mean() - bounds[-1] < 0.04


def test_gradient_steps_leave_the_exact_posterior_where_it_is():
    """Its ELBO has zero gradient in expectation; along sampled paths the score is what is left of it."""
    options = {"step_size": 1e-3, "momentum": 0.0, "num_samples": 200, "max_change": None}
    q = BED.posterior(X)

    def exact(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(q.mean, scale_tril=q.scale_tril))

    with torch.no_grad():
        moved = particles(PAIR.model, SemiAmortized(PAIR.model, exact, 1, **options), X).posteriors["z"]
    # One step moves the mean by e times the mean of 200 scores, of covariance equal to the precision.
    wanted = 1e-3 * (BED.precision.diagonal() / 200) ** 0.5
    change = (moved.mean - q.mean) / wanted
    within(change.mean(0), 0.0, 1 / len(X) ** 0.5)
    assert abs(change.square().mean() - 1) < 0.5
    assert (moved.scale_tril - q.scale_tril).abs().max() < 2e-3


def test_the_steps_are_those_taken_by_hand():
    """Two steps with momentum on (mu, log sigma), with the noise of the seed."""
    best, noise = BED.best_mean_field(X), []
    torch.manual_seed(5)
    for _ in range(2):
        noise.append(torch.normal(torch.zeros_like(best.mean), torch.ones_like(best.mean)))
    loc, log_scale = best.mean + 0.3, (best.stddev * 1.5).log()
    speed = [torch.zeros_like(loc), torch.zeros_like(loc)]
    for eps in noise:
        scale = log_scale.exp()
        z = loc + scale * eps
        slope = (X - BED.loc - z @ BED.weight.T) @ BED.weight / BED.scale**2 - z
        speed = [0.5 * speed[0] + 0.01 * slope, 0.5 * speed[1] + 0.01 * (slope * scale * eps + 1)]
        loc, log_scale = loc + speed[0], log_scale + speed[1]
    with torch.no_grad():
        guide = SemiAmortized(PAIR.model, bad_guide, 2, 0.01, 0.5, None, seed=5)
        q = particles(PAIR.model, guide, X).posteriors["z"]
    assert (q.mean - loc).abs().max() < 1e-10 and (q.base_dist.scale - log_scale.exp()).abs().max() < 1e-10


def foreign(distribution):
    """A guide in which the distribution is made by a function of the best Gaussian."""

    def guide(x):
        best = BED.best_mean_field(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", distribution(best.mean + 0.2, best.stddev * 1.3))

    return guide


FAMILIES = {
    "normal": lambda m, s: dist.Normal(m, s).to_event(1),
    "masked": lambda m, s: dist.Normal(m, s).to_event(1).mask(True),
    "laplace": lambda m, s: dist.Laplace(m, s).to_event(1),
    "student": lambda m, s: dist.StudentT(torch.full_like(m, 5.0), m, s).to_event(1),
    "full": lambda m, s: dist.MultivariateNormal(m, scale_tril=torch.diag_embed(s)),
    "covariance": lambda m, s: dist.MultivariateNormal(m, covariance_matrix=torch.diag_embed(s**2)),
    "low rank": lambda m, s: dist.LowRankMultivariateNormal(m, 0.1 * s.unsqueeze(-1), s**2),
}
GUIDES = {name: (lambda family=family: foreign(family)) for name, family in FAMILIES.items()} | {
    "head": head_guide,
    "amortized": lambda: head_guide(DiagonalNormal),
}


@pytest.mark.parametrize("name", GUIDES)
def test_every_family_is_refined_and_its_density_is_right(name):
    base = GUIDES[name]()
    guide = SemiAmortized(PAIR.model, base, 5, 0.01, num_samples=4)
    with torch.no_grad():
        before = particles(PAIR.model, base, X, num_samples=2000).log_weight.mean()
        table = particles(PAIR.model, guide, X, num_samples=2000)
        assert table.log_weight.mean() > before + 0.05
        assert (log_q(guide, table.latents, X) - table.log_q["z"]).abs().max() < 1e-9
    # The encoders of the head guides are untrained, and after five steps still too far off for 2000 weights.
    if name not in ("head", "amortized"):
        assert_the_weights_average_to_the_evidence(PAIR.model, guide, X, EVIDENCE, 2000)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_distribution_is_rebuilt_from_its_free_parameters(name):
    fn = FAMILIES[name](torch.randn(4, 3).double(), torch.rand(4, 3).double() + 0.1)
    free, build = free_parameters(fn)
    z = torch.randn(5, 4, 3).double()
    assert torch.allclose(build(free).log_prob(z), fn.log_prob(z), atol=1e-12)
    assert build(free).event_shape == fn.event_shape and all(t.isfinite().all() for t in free.values())


def test_a_layered_guide_keeps_the_dependence_between_its_layers():
    guide = SemiAmortized(layered_model, layered_guide, 8, 0.05, num_samples=4)
    log_weight = assert_the_weights_average_to_the_evidence(layered_model, guide, LAYERED_X, LAYERED_EVIDENCE, 2000)
    with torch.no_grad():
        base = particles(layered_model, layered_guide, LAYERED_X, num_samples=2000).log_weight.mean()
        table = particles(layered_model, guide, LAYERED_X, num_samples=50)
        assert (log_q(guide, table.latents, LAYERED_X) - table.log_q["z"] - table.log_q["top"]).abs().max() < 1e-9
    assert log_weight.mean() > base + 0.02
    shift = table.posteriors["z"].mean - 0.4 * table.latents["top"]  # constant over the samples of a datum
    assert shift.std(0).max() < 1e-9


@pytest.mark.parametrize("differentiate", [True, False])
@pytest.mark.parametrize("family", [DiagonalNormal, Scaled])
def test_the_encoder_s_gradient_is_that_of_the_loss_through_the_steps_or_at_their_end(differentiate, family):
    """By finite differences of the loss, with the change left free or held."""
    guide = head_guide(family)
    model = linear_model()
    refined = SemiAmortized(model, guide, 3, 0.01, differentiate=differentiate)
    bias = guide.posterior.head.bias

    def loss(program):
        torch.manual_seed(9)
        return Trace_ELBO().differentiable_loss(model, program, X)

    got = torch.autograd.grad(loss(refined), bias)[0]
    if not differentiate:
        with torch.no_grad():
            start = head_outputs(guide)
            torch.manual_seed(9)
            table = particles(model, refined, X).posteriors["z"]
            loc = table.mean if family is DiagonalNormal else table.transforms[0].loc
            scale = table.base_dist.scale if family is DiagonalNormal else table.transforms[0].scale
            change = torch.cat([loc, scale.log()], -1) - start
        hook = guide.posterior.head.register_forward_hook(lambda module, args, out: out + change)

        def refined(x):
            torch.normal(torch.zeros(30, 3).double(), torch.ones(30, 3).double())  # the draw that finds the sites
            return guide(x)

    difference = torch.zeros_like(bias)
    with torch.no_grad():
        for i in range(len(bias)):
            values = []
            for sign in (1, -1):
                bias[i] += sign * 1e-5
                values.append(loss(refined))
                bias[i] -= sign * 1e-5
            difference[i] = (values[0] - values[1]) / 2e-5
    if not differentiate:
        hook.remove()
    assert torch.allclose(got, difference, rtol=1e-5, atol=1e-5)


def head_outputs(guide):
    return guide.posterior.head(guide.posterior.encoder(X))


# Both


def refined_small(kind, **options):
    model, base = small_pair()
    return model, kind(model, base, 2, **options)


@pytest.mark.parametrize("kind", [Hamiltonian, SemiAmortized])
def test_every_loss_trains_base_guide_and_model(kind):
    losses = [
        Trace_ELBO(),
        Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
        Objective(elbo),
        Objective(iwae, num_samples=3),
    ]
    losses += [TraceMeanField_ELBO()] if kind is SemiAmortized else []
    for loss in losses:
        pyro.clear_param_store()
        model, guide = refined_small(kind)
        before = copy.deepcopy([*model.parameters(), *guide.parameters()])
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), loss)
        assert math.isfinite(svi.step(binary()))
        after = [*model.parameters(), *guide.parameters()]
        assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True)), loss
        model, guide = refined_small(kind)
        fit(model, guide, binary(), loss=loss, epochs=1, batch_size=6)


@pytest.mark.parametrize("kind", [Hamiltonian, SemiAmortized])
def test_pyro_s_elbo_and_ours_are_one_number(kind):
    model, guide = refined_small(kind)
    values, gradients = [], []
    for loss in (Trace_ELBO(), Objective(elbo)):
        torch.manual_seed(2)
        value = loss.differentiable_loss(model, guide, binary())
        values.append(value.detach())
        gradients.append(torch.autograd.grad(value, list(guide.parameters()) + list(model.parameters())))
    assert torch.allclose(*values, rtol=1e-6)
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind, step_size", [(Hamiltonian, 0.05), (SemiAmortized, 0.002)])
def test_it_is_judged_without_gradients_outside(kind, step_size):
    # Small steps for the second: on noisy gradients longer ones leave a guide with a k-hat that is not ok, of
    # whose estimate the standard error says nothing.
    guide = kind(PAIR.model, bad_guide, 3, step_size)
    estimate = log_likelihood(PAIR.model, guide, X, num_samples=1000, progress=False)
    assert estimate.khat_ok > 0.9 and abs(estimate.value - EVIDENCE.mean().item()) < 4 * estimate.mc_stderr
    with torch.no_grad():
        table = particles(PAIR.model, guide, X, num_samples=4)
    assert not table.log_weight.requires_grad
    z = table.latents["z"]
    assert (z[0] - z[1]).abs().min() > 0  # as many samples as particles


@pytest.mark.parametrize("kind", [Hamiltonian, SemiAmortized])
def test_one_pass_and_one_by_one_are_the_same_law(kind):
    guide = kind(PAIR.model, bad_guide, 2, 0.05).double()
    with torch.no_grad():
        means = []
        for vectorize, count in ((True, 3000), (False, 150)):
            torch.manual_seed(0)
            weight = particles(PAIR.model, guide, X[:5], num_samples=count, vectorize=vectorize).log_weight
            means.append(mean_and_stderr(weight))
    within(means[0][0], means[1][0], (means[0][1] ** 2 + means[1][1] ** 2).sqrt())


@pytest.mark.parametrize("kind", [Hamiltonian, SemiAmortized])
def test_the_model_s_parameters_stay_the_model_s(kind, tmp_path):
    model, guide = refined_small(kind)
    mine = {id(p) for p in model.parameters()}
    assert not mine & {id(p) for p in guide.parameters()}
    vae = VAE(model, guide)
    twin = copy.deepcopy(vae)
    assert twin.guide.model is twin.model is not model
    vae.save(tmp_path / "vae.safetensors")
    other = VAE(*refined_small(kind))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_weights(tmp_path / "vae.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), other.parameters(), strict=True))


def test_what_cannot_be_refined_is_refused_by_name():
    model = PAIR.model
    point = Guide(Point(nn.Linear(6, 3), 3)).double()

    def discrete(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Poisson(torch.ones(len(x), 3).double()).to_event(1))

    def subsampling(x):
        with pyro.plate("data", len(x), subsample_size=5) as index:
            pyro.sample("z", dist.Normal(torch.zeros(len(index), 3).double(), 1.0).to_event(1))

    for kind in (Hamiltonian, SemiAmortized):
        with pytest.raises(
            ValueError, match=f"{kind.__name__} cannot refine guide site 'z' .Delta.*a point has no density"
        ):
            kind(model, point)(X)
        with pytest.raises(ValueError, match="'z' .Poisson.: its sampler is not reparameterised"):
            kind(model, discrete)(X)
        with pytest.raises(ValueError, match="carries a scale, as of a plate that subsamples"):
            kind(model, subsampling)(X)
        with pytest.raises(
            ValueError, match=rf"observes 'x', as models do. The order is {kind.__name__}\(model, guide\)"
        ):
            kind(bad_guide, model)(X)
        with pytest.raises(ValueError, match="steps=-1, wanted 0"):
            kind(model, bad_guide, -1)
    with pytest.raises(ValueError, match="step_size=0, momentum=0.5.*wanted a positive step_size"):
        SemiAmortized(model, bad_guide, step_size=0)
    with pytest.raises(ValueError, match="step_size=0, wanted positive"):
        Hamiltonian(model, bad_guide, step_size=0)
    with pytest.raises(ValueError, match='tempering=\'hot\', wanted "none", "fixed" or "free"'):
        Hamiltonian(model, bad_guide, tempering="hot")
    with pytest.raises(ValueError, match='beta=1.*tempering="none"'):
        Hamiltonian(model, bad_guide, beta=1)
    with pytest.raises(ValueError, match=r"'z' \(LogNormal\) out of its support"):
        Hamiltonian(model, foreign(lambda m, s: dist.LogNormal(m, s).to_event(1)))(X)
    affine = dist.transforms.AffineTransform(1.0, 2.0)
    guide = foreign(lambda m, s: dist.TransformedDistribution(dist.Normal(m, s), affine).to_event(1))
    with pytest.raises(
        ValueError, match=r"cannot rebuild the guide's sites, 'z' \(TransformedDistribution\).*Amortized"
    ):
        SemiAmortized(model, guide)(X)
    assert SemiAmortized(model, bad_guide, seed=None).rescoring == "impossible"


@pytest.mark.parametrize("name", ["head bias", "log_step_size", "free_beta"])
def test_training_a_hamiltonian_guide_differentiates_through_its_trajectory(name):
    """Finite differences of the loss: the model's second derivatives are part of the gradient."""
    base = head_guide(DiagonalNormal)
    guide = Hamiltonian(linear_model(), base, 2, 0.07, "fixed").double()
    parameter = base.posterior.head.bias if name == "head bias" else getattr(guide, name)

    def loss():
        torch.manual_seed(9)
        return Trace_ELBO().differentiable_loss(guide.model, guide, X)

    got = torch.autograd.grad(loss(), parameter)[0].reshape(-1)[0]
    values = []
    flat = parameter.data.reshape(-1)
    for change in (1e-5, -2e-5):
        flat[0] += change
        values.append(loss().detach())
    flat[0] += 1e-5
    assert abs(got - (values[0] - values[1]) / 2e-5) < 1e-5 * (1 + abs(got))


@pytest.mark.parametrize("layers", [1, 2])
def test_scalar_latents_are_refined_by_default_towards_the_evidence(layers):
    """Sites without event dimensions: z is a number for each datum, and log p(x) is known."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            if layers == 2:
                z = pyro.sample("low", dist.Normal(z, 0.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):  # off by 0.8 posterior means, of which one nat or so is lost
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x / 2 + 0.8, 0.7))
            if layers == 2:
                pyro.sample("low", dist.Normal(z, 0.5))

    x = torch.linspace(-2, 2, 40)
    evidence = dist.Normal(0.0, (2.0 if layers == 1 else 2.25) ** 0.5).log_prob(x).mean().item()
    base = elbo_terms(model, guide, x, num_samples=200)
    refined = elbo_terms(model, SemiAmortized(model, guide), x, num_samples=200)
    error = math.hypot(base.mc_stderr, refined.mc_stderr)
    assert base.value + 0.2 < refined.value < evidence + 4 * error
