"""Guides that draw in other coordinates have densities, and bounds and estimates that equal Pyro's."""

import functools
import math
import statistics

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.contrib.easyguide import EasyGuide
from pyro.distributions.torch_transform import TransformModule
from pyro.infer import RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from torch import nn

from pyro_vae import Objective, elbo_terms, fit, iwae, log_likelihood
from pyro_vae.inference.bounds import map_estimate
from pyro_vae.inference.objectives import ClosedForm
from pyro_vae.inference.regularizers import free_bits
from pyro_vae.judging.latents import kl_per_dimension
from pyro_vae.programs.zoo import Hierarchical
from pyro_vae.traces import log_q, particles
from tests.test_compatibility import reasons

X = 0.2 + 2 * torch.rand(30, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def empty_store():
    pyro.clear_param_store()


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.LogNormal(0.5, 1.0))
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z + w.sum(-1), 1.0), obs=x)


class Easy(EasyGuide):
    def guide(self, x):
        group = self.group(match="z|w")
        loc = pyro.param("loc", torch.tensor([0.3, -0.2, 0.1]))
        with self.plate("data", len(x)):
            group.sample("packed", dist.Normal(loc.expand(len(x), 3) + x.unsqueeze(-1) / 9, 0.4).to_event(1))


class Squeezed(TransformModule):
    """A transform of one's own."""

    domain, codomain = torch.distributions.constraints.real, torch.distributions.constraints.positive
    bijective, sign = True, 1

    def __init__(self):
        super().__init__()
        self.power = nn.Parameter(torch.tensor(0.7))

    def _call(self, x):
        return (x * self.power).exp()

    def _inverse(self, y):
        return y.log() / self.power

    def log_abs_det_jacobian(self, x, y):
        return self.power.abs().log() + x * self.power


def of_a_transform():
    squeezed, net = Squeezed(), nn.Linear(1, 2)

    def guide(x):
        pyro.module("squeezed", squeezed)
        pyro.module("net", net)
        loc = net(x.unsqueeze(-1))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.TransformedDistribution(dist.Normal(loc[..., 0], 0.5), [squeezed]))
            pyro.sample("w", dist.Normal(loc[..., 1:].expand(len(x), 2), 0.5).to_event(1))

    return guide


LOCAL = {"AutoNormal": lambda: AutoNormal(model), "EasyGuide": lambda: Easy(model), "transform": of_a_transform}
JOINT = {
    g.__name__: lambda g=g: g(model)
    for g in (AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoIAFNormal)
}


def made(make):
    torch.manual_seed(3)
    guide = make()
    guide(X)
    with torch.no_grad(), poutine.trace(param_only=True) as params:
        guide(X)
        for site in params.trace.nodes.values():  # away from the start, where Jacobians happen to be 0
            value = site["value"].unconstrained()
            value.add_(0.05 * torch.randn(value.shape))
    return guide


@pytest.mark.parametrize("make", (LOCAL | JOINT).values(), ids=LOCAL | JOINT)
def test_elbo_is_pyros_to_the_draw(make):
    guide = made(make)
    for count in (1, 5):
        torch.manual_seed(7)
        table = particles(model, guide, X, num_samples=count, vectorize=True)
        torch.manual_seed(7)
        many = {"num_particles": count, "vectorize_particles": count > 1, "max_plate_nesting": 1}
        theirs = -Trace_ELBO(**many).loss(model, guide, X)
        assert table.log_weight.mean(0).sum().item() == pytest.approx(theirs, rel=1e-5)
        assert table.points == () and table.num_data == 30
    torch.manual_seed(7)
    ours = Objective(num_samples=5, max_plate_nesting=1).loss(model, guide, X)
    assert ours == pytest.approx(-theirs, rel=1e-5)


@pytest.mark.parametrize("make", LOCAL.values(), ids=LOCAL)
def test_importance_weighted_bounds_are_pyros(make):
    guide = made(make)
    torch.manual_seed(7)
    ours = Objective(iwae, 5, max_plate_nesting=1).loss(model, guide, X)
    torch.manual_seed(7)
    theirs = RenyiELBO(0, num_particles=5, vectorize_particles=True, max_plate_nesting=1).loss(model, guide, X)
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("make", (LOCAL | JOINT).values(), ids=LOCAL | JOINT)
def test_estimates_are_per_datum_and_agree(make):
    guide = made(make)
    ours = elbo_terms(model, guide, X, num_samples=600)
    with torch.no_grad():
        draws = [-Trace_ELBO().loss(model, guide, X) / 30 for _ in range(300)]
    error = math.hypot(ours.mc_stderr, statistics.stdev(draws) / math.sqrt(300))
    assert abs(ours.value - statistics.mean(draws)) < 4 * error
    evidence = log_likelihood(model, guide, X, num_samples=600)
    assert ours.value < evidence.value < 0 and len(evidence.pointwise) == (1 if make in JOINT.values() else 30)


def test_a_bound_of_all_data_jointly_lies_below_the_evidence():
    """log p(x_1, ..., x_N) of a linear-Gaussian model, from one normal for all latents at the exact posterior."""
    x = X[:5]

    def linear(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoDiagonalNormal(linear)
    guide(x)
    with torch.no_grad():
        guide.loc.copy_(x / 2)
    guide.scale = torch.full((5,), 0.5**0.5)
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).mean().item()
    assert log_likelihood(linear, guide, x, num_samples=10).value == pytest.approx(exact, rel=1e-5)
    assert elbo_terms(linear, guide, x, num_samples=10).value == pytest.approx(exact, rel=1e-5)


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("loss", [None, Objective(iwae, 3)], ids=["default", "iwae"])
def test_a_delta_carries_the_density_of_what_feeds_it(positive, loss):
    start = nn.Module()
    start.loc = nn.Parameter(torch.tensor(0.1))

    def program(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.LogNormal(0.0, 1.0) if positive else dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.module("start", start)
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(start.loc, 0.3), infer={"is_auxiliary": True})
            density = -u if positive else torch.zeros_like(u)
            pyro.sample("z", dist.Delta(u.exp() if positive else u, log_density=density))

    assert particles(program, guide, X).points == ()
    before = start.loc.item()
    fit(program, guide, X, loss=loss, epochs=30, batch_size=10, learning_rate=1e-2, seed=0, progress=False)
    assert start.loc.item() != before
    table = particles(program, guide, X, num_samples=4)
    assert set(table.log_q) == {"z"} and table.partial == ()
    want = dist.Normal(start.loc, 0.3).log_prob(table.latents["u"]) - (table.latents["u"] if positive else 0)
    assert torch.allclose(table.log_q["z"], want)
    with pytest.raises(ValueError, match="'z' is a Delta that carries the density of its own draw"):
        log_q(guide, table.latents, X)


def test_a_point_beside_a_random_site_stays_a_point():
    def guide(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            u = pyro.sample("u", dist.Normal(loc, 0.3), infer={"is_auxiliary": True})
            pyro.sample("z", dist.Delta(u.exp(), log_density=-u))
            pyro.sample("w", dist.Delta(loc.expand(len(x), 2), event_dim=1))

    assert particles(model, guide, X).points == ("w",)
    with pytest.raises(ValueError, match=r"point site \(Delta\) without a density.*loss=Objective\(reconstruction\)"):
        fit(model, guide, X, epochs=1, progress=False)
    mixed = AutoGuideList(model)
    mixed.append(AutoDelta(poutine.block(model, expose=["w"])))
    mixed.append(AutoNormal(poutine.block(model, expose=["z"])))
    assert particles(model, mixed, X).points == ("w",)


def test_automatic_points_stay_refused():
    guide = AutoDelta(model)
    with pytest.raises(ValueError, match=r"point site \(Delta\) without a density.*loss=Objective\(reconstruction\)"):
        fit(model, guide, X, epochs=1, batch_size=30, progress=False)
    with pytest.raises(ValueError, match=r"is a point \(Delta\) without a density"):
        elbo_terms(model, guide, X)
    fit(model, AutoDelta(model), X, loss=Objective(map_estimate), epochs=2, batch_size=30, progress=False)


def test_parameters_for_each_row_want_each_row_in_its_place():
    """q(z_n) = N(m_n, s_n) learned for each datum: m_n = x_n / 2, which shuffled rows would not let it find."""

    def linear(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def by_hand(x):
        loc = pyro.param("by_hand", torch.zeros(len(X)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 0.5**0.5))

    options = {"epochs": 300, "batch_size": 30, "learning_rate": 5e-2, "schedule": "cosine", "progress": False}
    automatic = AutoNormal(linear)
    history = fit(linear, automatic, X, seed=0, **options)
    assert (automatic.locs.z - X / 2).abs().max() < 0.25
    assert abs(history["bound"][-1] - dist.Normal(0.0, 2**0.5).log_prob(X).mean()) < 0.1
    fit(linear, by_hand, X, seed=0, **options)
    assert (pyro.param("by_hand") - X / 2).abs().max() < 0.25
    pyro.clear_param_store()
    with pytest.raises(ValueError, match="holds parameters for each of the 10 rows of latent site 'z'.*in 3 batches"):
        fit(linear, AutoNormal(linear), X, batch_size=10, progress=False)


def test_what_one_density_for_all_data_cannot_say():
    guide = made(JOINT["AutoDiagonalNormal"])
    with pytest.raises(ValueError, match="is one density for all data.*such as AutoNormal"):
        kl_per_dimension(model, guide, X, num_samples=4)
    with pytest.raises(ValueError, match="is one density for all data.*RenyiELBO counts it once"):
        fit(model, guide, X, loss=RenyiELBO(num_particles=2), batch_size=30, epochs=1, progress=False)
    with pytest.raises(ValueError, match="free_bits is about the divergence of each site"):
        Objective(regularizers=[free_bits(1.0)]).loss(model, guide, X)
    found = reasons(model, made(LOCAL["AutoNormal"]), (X,), TraceMeanField_ELBO())
    assert found and "a Delta that carries a density, which TraceMeanField_ELBO leaves out" in found[0]


@pytest.mark.filterwarnings("ignore:Found vars in model but not guide")  # Pyro's loss, of what is a value here
def test_a_delta_of_the_model_is_no_latent():
    def recorded(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            mu = pyro.sample("mu", dist.Delta(z.unsqueeze(-1).expand(*z.shape, 2)).to_event(1))
            pyro.sample("x", dist.Normal(mu[..., 0], 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(slope * x, 0.5**0.5))

    evidence = dist.Normal(0.0, 2**0.5).log_prob(X)
    for count in (1, 3):
        weight = particles(recorded, guide, X, num_samples=count).log_weight
        assert torch.allclose(weight, evidence.expand(count, -1), atol=1e-5)
    fit(recorded, guide, X, epochs=1, learning_rate=1e-30, progress=False)
    assert log_likelihood(recorded, guide, X, num_samples=9).value == pytest.approx(evidence.mean().item(), abs=1e-5)


def test_what_was_not_observed_is_drawn_or_the_remedy_is_named():
    seen = torch.arange(30) % 3 != 0

    def masked(x, seen):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x, obs_mask=seen)

    def guide(x, seen, whole):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.where(seen, x / 2, 0.0), torch.where(seen, 0.5**0.5, 1.0)))
            if whole:
                with poutine.mask(mask=~seen):
                    pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    short, full = (functools.partial(guide, whole=whole) for whole in (False, True))

    want = torch.where(seen, dist.Normal(0.0, 2**0.5).log_prob(X), torch.zeros(30))
    found = log_likelihood(masked, full, (X, seen), num_samples=5)
    assert torch.allclose(found.pointwise.float(), want, atol=1e-5)
    for loss in (Trace_ELBO(), Objective()):
        assert "poutine.mask(mask=~obs_mask): pyro.sample('x_unobserved'" in reasons(masked, short, (X, seen), loss)[0]


def test_the_hierarchical_pair_integrates_its_last_layer_by_default():
    torch.manual_seed(0)
    pair = Hierarchical.build((1, 4, 4), latent_dims=(3, 2), hidden=((8,), (8,)))
    x = torch.bernoulli(torch.rand(12, 1, 4, 4))
    with torch.no_grad():
        plain, closed = (
            torch.tensor([loss.loss(pair.model, pair.guide, x) / 12 for _ in range(400)])
            for loss in (Trace_ELBO(), ClosedForm(pair.guide.closed_form))
        )
    error = math.hypot(plain.std(), closed.std()) / math.sqrt(400)
    assert abs(plain.mean() - closed.mean()) < 4 * error and closed.std() < plain.std()
    options = {"epochs": 2, "batch_size": 6, "seed": 0, "progress": False, "learning_rate": 1e-30}
    by_default = fit(pair.model, pair.guide, x, **options)
    assert by_default["loss"] == fit(pair.model, pair.guide, x, loss=ClosedForm(("z2",)), **options)["loss"]
    assert "guide site 'z2' depends on another" in reasons(pair.model, pair.guide, (x,), TraceMeanField_ELBO())[0]
