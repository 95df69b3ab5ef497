"""A pair's own tensors are trained, whatever they are called."""

import copy
import gc

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
from tests.pairs import binary, small_pair


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


@pytest.mark.filterwarnings("ignore:model and guide have different parameters of one name")  # as this test is about
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
    # The store has one place for a name, and the last pair that was fitted is there.
    kept = dict(pyro.get_param_store().named_parameters())
    assert kept.keys() == {f"{net}$$${name}" for net in ("encoder", "decoder") for name in ("weight", "bias")}
    assert kept["encoder$$$weight"] is vae.encoder.weight and kept["decoder$$$bias"] is vae.decoder.bias


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


def shared_names(seed, update=True):
    """A pair of functions around two networks, as Pyro's users load them again."""
    torch.manual_seed(seed)
    enc, dec = nn.Linear(2, 4), nn.Linear(2, 2)

    def model(x):
        pyro.module("dec", dec, update_module_params=update)
        scale = pyro.param("scale", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(dec(z), scale).to_event(1), obs=x)

    def guide(x):
        pyro.module("enc", enc, update_module_params=update)
        loc, log_scale = enc(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide, enc, dec


def kept_values():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().items()}


@pytest.mark.parametrize("called_first", [True, False])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_a_fit_leaves_in_the_store_is_the_pair(tmp_path, compile, called_first):
    model, guide, enc, dec = shared_names(0)
    fit(model, guide, data(), epochs=40, learning_rate=0.03, seed=0, progress=False, compile=compile)
    names = {"enc$$$weight", "enc$$$bias", "dec$$$weight", "dec$$$bias", "scale"}
    assert pyro.get_param_store().keys() == names and pyro.param("dec$$$weight") is dec.weight
    trained = log_likelihood(model, guide, data(), num_samples=20).value
    pyro.get_param_store().save(tmp_path / "pair.save")
    pyro.clear_param_store()
    model, guide, enc, dec = shared_names(1)
    start = log_likelihood(model, guide, data(), num_samples=20).value
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "pair.save")
    before = kept_values()
    if called_first:
        model(data()), guide(data())
    assert log_likelihood(model, guide, data(), num_samples=20).value == trained != start
    after = kept_values()
    assert before.keys() == after.keys() == names and all(torch.equal(before[n], after[n]) for n in names)
    # And a fit goes on from there.
    fit(model, guide, data(), epochs=1, learning_rate=1e-6, seed=0, progress=False)
    assert log_likelihood(model, guide, data(), num_samples=20).value == pytest.approx(trained, abs=1e-3)
    assert pyro.param("enc$$$weight") is enc.weight


def test_a_pair_takes_what_was_loaded_and_not_what_another_pair_left():
    one, two = shared_names(0), shared_names(1)
    fresh = snapshot(*two[2:])
    fit(*one[:2], data(), epochs=2, learning_rate=0.03, seed=0, progress=False)
    trained = snapshot(*one[2:])
    fit(*two[:2], data(), epochs=2, learning_rate=1e-9, seed=0, progress=False)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(fresh, snapshot(*two[2:]), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(trained, snapshot(*one[2:]), strict=True))
    # Pyro's own SVI leaves the tensors of a pair that is alive: they are its own, too.
    pyro.clear_param_store()
    SVI(*one[:2], pyro.optim.Adam({"lr": 1e-9}), Trace_ELBO()).step(data())
    log_likelihood(*two[:2], data(), num_samples=2)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(fresh, snapshot(*two[2:]), strict=True))


def test_networks_of_another_size_in_the_store_are_named(tmp_path):
    pyro.param("dec$$$weight", torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"store holds 'dec\$\$\$weight' of shape \(3, 3\).*shape \(2, 2\)"):
        log_likelihood(*shared_names(0)[:2], data(), num_samples=2)
    clean = shared_names(0, update=False)
    log_likelihood(*clean[:2], data(), num_samples=2)  # whoever does not ask for it is not concerned


def test_constrained_parameters_of_modules_are_kept_and_loaded(tmp_path):
    x = 2 * torch.randn(200, generator=torch.Generator().manual_seed(0))
    pair = ScaleModel(), ScaleGuide("guide")
    fit(*pair, x, epochs=20, learning_rate=0.05, seed=0, progress=False)
    assert pyro.get_param_store().keys() == {"scale", "guide.scale"}
    assert pyro.param("scale").item() == pair[0].scale.item() > 1.05
    trained = log_likelihood(*pair, x, num_samples=20).value
    pyro.get_param_store().save(tmp_path / "pair.save")
    pyro.clear_param_store()
    again = ScaleModel(), ScaleGuide("guide")
    pyro.get_param_store().load(tmp_path / "pair.save")
    assert log_likelihood(*again, x, num_samples=20).value == trained
    # An estimate changes nothing, and a fit starts from what was loaded.
    assert again[0].scale.item() == 1.0 and pyro.param("scale").item() == pair[0].scale.item()
    fit(*again, x, epochs=1, learning_rate=1e-6, seed=0, progress=False)
    assert again[0].scale.item() == pytest.approx(pair[0].scale.item(), abs=1e-4)


def test_a_fit_that_fails_leaves_the_store_as_it_was():
    one, two = shared_names(0), shared_names(1)
    fit(*one[:2], data(), epochs=1, seed=0, progress=False)
    with pytest.raises(ValueError, match="nan|finite"):
        fit(*two[:2], torch.full((8, 2), float("nan")), epochs=1, seed=0, progress=False)
    assert pyro.param("enc$$$weight") is one[2].weight


def test_two_networks_under_one_name_are_trained_and_said_not_to_be_saved():
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"different parameters of one name, such as 'net\$\$\$bias'.*state_dict"):
        fit(NetModel(), NetGuide(), data(), epochs=1, seed=0, progress=False)


def test_a_parameter_made_anew_in_each_run_is_refused():
    def model(x):
        loc = pyro.param("loc", nn.Parameter(torch.zeros(2)))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.7).to_event(1))

    with pytest.raises(ValueError, match="'loc'.* new torch.nn.Parameter in every run.*Pass a tensor"):
        fit(model, guide, data(), epochs=300, batch_size=16, seed=0, progress=False, compile=False)


def test_a_pair_can_be_pickled_after_it_was_used():
    import pickle

    torch.manual_seed(0)
    vae = PublishedShape()
    fit(vae.model, vae.guide, data(), epochs=1, seed=0, progress=False)
    log_likelihood(vae.model, vae.guide, data(), num_samples=2)
    again = pickle.loads(pickle.dumps(vae))
    assert all(torch.equal(a, b) for a, b in zip(vae.parameters(), again.parameters(), strict=True))


def plain_pair():
    """Functions whose parameters live in the store; the evidence is N(m, 1 + s^2), and the posterior is in reach."""

    def model(x):
        m = pyro.param("m", torch.tensor(0.0))
        s = pyro.param("s", torch.tensor(1.0), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(m, 1.0))
            pyro.sample("x", dist.Normal(z, s), obs=x)

    def guide(x):
        g, b = pyro.param("g", torch.tensor(0.5)), pyro.param("b", torch.tensor(0.0))
        t = pyro.param("t", torch.tensor(0.7), constraint=constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(g * x + b, t))

    return model, guide


@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_scopes_of_the_store_keep_two_fits_apart(compile):
    model, guide = plain_pair()
    net = shared_names(0)
    store, scopes = pyro.get_param_store(), []
    generator = torch.Generator().manual_seed(0)
    for mean in (4.0, -3.0):
        x = 2 * torch.randn(300, generator=generator) + mean
        with store.scope() as scope:
            fit(
                model, guide, x, epochs=120, batch_size=100, learning_rate=0.05, seed=0, progress=False, compile=compile
            )
            fit(*net[:2], data(), epochs=1, seed=0, progress=False, compile=compile)
        scopes.append((scope, x))
    assert not store
    for scope, x in scopes:
        assert scope["params"].keys() >= {"m", "s", "g", "b", "t", "enc$$$weight"}
        with store.scope(scope):
            assert pyro.param("m").item() == pytest.approx(x.mean().item(), abs=0.15)
            best = dist.Normal(x.mean(), x.std(unbiased=False)).log_prob(x).mean().item()
            assert log_likelihood(model, guide, x, num_samples=200).value == pytest.approx(best, abs=0.03)
    assert not store


def test_a_cell_that_is_run_again_with_another_size_starts_afresh():
    def cell(size, seed=0):
        torch.manual_seed(seed)
        enc, dec = nn.Linear(2, 2 * size), nn.Linear(size, 2)

        def model(x):
            pyro.module("decoder", dec, update_module_params=True)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(dec(z), 0.5).to_event(1), obs=x)

        def guide(x):
            pyro.module("encoder", enc, update_module_params=True)
            loc, log_scale = enc(x).chunk(2, -1)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

        return fit(model, guide, data(), epochs=3, learning_rate=1e-2, seed=0, progress=False)["loss"]

    first = cell(2)
    assert cell(3) != first and cell(2) == first


def test_what_is_gone_leaves_the_store_and_what_is_held_stays():
    """Programs of this package have unique names: a hundred fits would leave a hundred sets of parameters."""
    pyro.clear_param_store()
    pair = small_pair()
    other = copy.copy(pair[0]), copy.deepcopy(pair[1])
    fit(*pair, binary(), epochs=1, progress=False)
    names = set(pyro.get_param_store().keys())
    for _ in range(3):
        dead = small_pair()
        fit(*dead, binary(), epochs=1, progress=False)
        del dead
        gc.collect()
    assert len(pyro.get_param_store()) == 2 * len(names)  # the last one leaves at the next fit
    assert names < set(pyro.get_param_store().keys())
    del pair
    gc.collect()
    fit(*small_pair(), binary(), epochs=1, progress=False)
    left = names & set(pyro.get_param_store().keys())
    assert left == {name for name in names if name.startswith("Model")}  # which the shallow copy holds
    assert {id(pyro.get_param_store()._params[name]) for name in left} == {id(p) for p in other[0].parameters()}
