"""A pair's own tensors are trained, whatever they are called."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.nn import PyroModule, PyroParam
from torch import nn
from torch.distributions import constraints

from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.parameters import own_parameters


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


class NetModel(PyroModule):
    """A model whose network is called net, under no name of its own."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, x):
        net = self.net
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 0.3).to_event(1), obs=x)


class NetGuide(PyroModule):
    """A guide whose network is called net, of the same shape."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)

    def forward(self, x):
        net = self.net
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 0.3).to_event(1))


class PublishedShape(nn.Module):
    """The shape of Pyro's own example: two methods and pyro.module."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(2, 2), nn.Linear(2, 2)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("latent", dist.Normal(x.new_zeros(x.shape[0], 2), 1.0).to_event(1))
            pyro.sample("obs", dist.Normal(self.decoder(z), 0.3).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("latent", dist.Normal(self.encoder(x), 0.3).to_event(1))


def data():
    torch.manual_seed(1)
    return torch.randn(64, 2) @ torch.tensor([[1.0, 0.5], [0.0, 0.4]]) + 1


def snapshot(*modules):
    return [p.detach().clone() for m in modules for p in m.parameters()]


def moved(before, *modules):
    return [not torch.equal(a, p) for a, p in zip(before, (p for m in modules for p in m.parameters()), strict=True)]


def test_pyro_itself_shares_the_nets_and_fit_does_not():
    torch.manual_seed(0)
    model, guide = NetModel(), NetGuide()
    before = snapshot(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(5):
        svi.step(data())
    assert not any(moved(before, model)), "if this fails, Pyro has mended the trap"
    pyro.clear_param_store()
    model, guide = NetModel(), NetGuide()
    before = snapshot(model, guide)
    history = fit(model, guide, data(), epochs=60, learning_rate=0.05, seed=0)
    assert all(moved(before, model, guide))
    assert history["loss"][-1] < history["loss"][0] - 1
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), guide.parameters(), strict=True))


@pytest.mark.parametrize("loss", [None, Objective()], ids=["trace", "objective"])
def test_two_pairs_in_one_process_both_learn(loss):
    losses = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        vae = PublishedShape()
        before = snapshot(vae)
        history = fit(vae.model, vae.guide, data(), loss=loss, epochs=60, learning_rate=0.05, seed=0)
        assert all(moved(before, vae))
        losses.append(history["loss"][-1])
    assert losses[0] == pytest.approx(losses[1], rel=0.1)
    assert len(pyro.get_param_store()) == 0


def test_stale_entries_of_the_store_do_not_reach_an_estimate():
    torch.manual_seed(0)
    one, two = PublishedShape(), PublishedShape()
    clean = log_likelihood(two.model, two.guide, data(), num_samples=20).value
    one.model(data())  # registers one's tensors under the names that two will ask for
    assert "decoder$$$weight" in pyro.get_param_store()
    assert log_likelihood(two.model, two.guide, data(), num_samples=20).value == clean
    assert pyro.param("decoder$$$weight") is one.decoder.weight


class ScaleModel(PyroModule):
    """A constrained parameter under a common name."""

    def __init__(self, name=""):
        super().__init__(name)
        self.scale = PyroParam(torch.tensor(1.0), constraint=constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, self.scale), obs=x)


class ScaleGuide(ScaleModel):
    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, self.scale))


def test_constrained_parameters_of_one_name_are_refused_and_named_ones_learn():
    x = 2 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="parameter named 'scale'.*PyroModule.__init__"):
        fit(ScaleModel(), ScaleGuide(), x, epochs=1)
    model, guide = ScaleModel(), ScaleGuide("guide")
    fit(model, guide, x, epochs=40, learning_rate=0.05, seed=0)
    assert model.scale.item() > 1.15 and guide.scale.item() < 0.95
    again = ScaleModel()
    fit(again, ScaleGuide("guide"), x, epochs=40, learning_rate=0.05, seed=0)
    assert again.scale.item() == model.scale.item()  # not the first one's tensor, trained on


def test_parameters_of_plain_functions_stay_in_the_store():
    pyro.param("other", torch.tensor(5.0))
    with own_parameters():
        pyro.param("w", torch.tensor(2.0), constraint=constraints.positive)
    assert pyro.param("w").item() == pytest.approx(2.0)
    assert pyro.param("other").item() == 5.0
