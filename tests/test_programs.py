"""Model and Guide are ordinary Pyro programs."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO
from torch import nn

from pyro_vae.programs.pair import Guide, Model
from pyro_vae.programs.vae import VAE
from tests.pairs import binary, small_pair


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def trained(model, guide, loss, steps=60):
    """Train by plain SVI; the loss before and after, and the tensors that did not move."""
    x = binary(64)
    before = {id(p): p.detach().clone() for m in (model, guide) for p in m.parameters()}
    pyro.set_rng_seed(0)
    start = Trace_ELBO(num_particles=20).loss(model, guide, x)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=loss)
    for _ in range(steps):
        svi.step(x)
    end = Trace_ELBO(num_particles=20).loss(model, guide, x)
    still = [n for m in (model, guide) for n, p in m.named_parameters() if torch.equal(before[id(p)], p)]
    return start, end, still


LOSSES = {
    "trace": lambda: Trace_ELBO(),
    "mean-field": lambda: TraceMeanField_ELBO(),
    "renyi": lambda: RenyiELBO(alpha=0, num_particles=4, vectorize_particles=True),
}


@pytest.mark.parametrize("loss", LOSSES, ids=list(LOSSES))
def test_plain_svi_learns_two_vaes_in_one_process_and_a_copy(loss):
    first, second = small_pair(seed=0), small_pair(seed=1)
    third = None
    for pair in (first, second):
        start, end, still = trained(*pair, LOSSES[loss]())
        assert end < start - 64 and still == []
        third = copy.deepcopy(pair)
    frozen = [p.detach().clone() for m in second for p in m.parameters()]
    start, end, still = trained(*third, LOSSES[loss]())
    assert end < start and still == []
    assert all(torch.equal(a, b) for a, b in zip(frozen, (p for m in second for p in m.parameters()), strict=True))


def test_a_copy_of_a_vae_trains_on_its_own():
    torch.manual_seed(0)
    vae = VAE.build((1, 4, 4), latent_dim=2, hidden=(8,))
    trained(vae.model, vae.guide, Trace_ELBO(), steps=3)
    twin = copy.deepcopy(vae)
    weights = copy.deepcopy(vae.state_dict())
    _, _, still = trained(twin.model, twin.guide, Trace_ELBO(), steps=3)
    assert still == []
    assert all(torch.equal(weights[name], value) for name, value in vae.state_dict().items())


def test_predictive_draws_from_the_prior_and_the_posterior():
    torch.manual_seed(0)
    model = Model(lambda: dist.Normal(torch.zeros(1), 1.0).to_event(1), lambda z: dist.Normal(z, 0.5).to_event(1))
    guide = Guide(lambda x: dist.Normal(0.8 * x, 0.2**0.5).to_event(1))
    drawn = Predictive(model, num_samples=400)(size=25)["x"]
    assert drawn.shape == (400, 25, 1)
    assert abs(drawn.var() / 1.25 - 1) < 4 * (2 / drawn.numel()) ** 0.5
    x = torch.full((25, 1), 2.0)
    repeated = Predictive(poutine.uncondition(model), guide=guide, num_samples=400)(x)["x"]
    assert not torch.equal(repeated[0], x)
    stderr = (0.45 / repeated.numel()) ** 0.5
    assert abs(repeated.mean() - 1.6) < 4 * stderr


def test_nuts_on_one_image_finds_the_exact_posterior():
    weight = torch.tensor([[1.0, 0.5], [0.0, 1.0], [0.7, -0.4]])
    model = Model(
        lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.Normal(z @ weight.T, 0.5).to_event(1)
    )
    x = torch.tensor([[1.0, -0.5, 0.3]])
    precision = torch.eye(2) + weight.T @ weight / 0.25
    mean = torch.linalg.solve(precision, weight.T @ x[0] / 0.25)
    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=400, warmup_steps=150, disable_progbar=True)
    mcmc.run(x)
    z = mcmc.get_samples()["z"][:, 0]
    ess = mcmc.diagnostics()["z"]["n_eff"][0]
    sd = torch.linalg.inv(precision).diagonal().sqrt()
    assert ((z.mean(0) - mean).abs() < 4 * sd / ess.sqrt()).all()
    assert ((z.std(0) / sd - 1).abs() < 4 / (2 * ess).sqrt()).all()


def test_a_forgotten_event_dimension_is_named():
    model = Model(
        lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.Normal(z @ torch.ones(2, 5), 1.0)
    )
    x = torch.zeros(64, 5)
    with pytest.raises(ValueError, match=r"batch_shape \(64, 5\), wanted \(64,\). Did you forget .to_event\(1\)\?"):
        poutine.trace(poutine.condition(model, {"z": torch.zeros(64, 2)})).get_trace(x)


def test_a_decoder_for_other_data_is_named():
    model, _ = small_pair()
    with pytest.raises(ValueError, match=r"event_shape \(1, 4, 4\).*shape \(1, 5, 5\)"):
        model(torch.zeros(2, 1, 5, 5))


def test_a_posterior_without_event_dimension_is_named():
    guide = Guide(lambda x: dist.Normal(torch.zeros(len(x), 3), 1.0))
    with pytest.raises(ValueError, match=r"batch_shape \(64, 3\), wanted \(64,\)"):
        guide(torch.zeros(64, 5))


def test_a_guide_without_data_says_what_to_call():
    with pytest.raises(ValueError, match="without data.*Predictive"):
        small_pair()[1]()


def test_lambdas_and_modules_are_parts_alike():
    net = nn.Linear(2, 2)
    model = Model(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.Normal(net(z), 1.0).to_event(1))
    assert model(size=4).shape == (4, 2)
