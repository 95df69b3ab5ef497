"""What a program owns, wherever it holds it, and what of an ordinary program is proven."""

import dataclasses
import functools
import importlib
import time
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, config_enumerate
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn

import pyro_vae as pv
from pyro_vae.inference.objectives import Objective
from pyro_vae.programs.zoo import Conditional, Hierarchical, SemiSupervised
from pyro_vae.reach import Reach, modules_of, places
from tests.pairs import small_pair

at_module_level = nn.Linear(2, 3)
in_a_dict = {"decoder": [nn.Linear(1, 1)]}
settings = types.SimpleNamespace(net=nn.Linear(4, 4), unused=nn.Linear(5, 5))


def in_a_closure():
    net = nn.Linear(2, 2)
    return (lambda x: net(x)), [net]


def in_a_global():
    def program(x):
        return at_module_level(x)

    return program, [at_module_level]


def in_a_container():
    def program(x):
        return in_a_dict["decoder"][0](x)

    return program, [in_a_dict["decoder"][0]]


def in_an_attribute_of_an_object():
    def program(x):
        return settings.net(x)

    return program, [settings.net]  # and not the one that it does not name


def in_a_helper():
    net = nn.Linear(2, 2)

    def helper(x):
        return net(x)

    def program(x):
        return helper(x)

    return program, [net]


def in_a_partial():
    net = nn.Linear(2, 2)
    return functools.partial(lambda x, net: net(x), net=net), [net]


def in_a_default():
    net = nn.Linear(2, 2)

    def program(x, decode=net):
        return decode(x)

    return program, [net]


def in_an_object():
    class Pair:
        def __init__(self):
            self.net = nn.Linear(2, 2)

        def model(self, x):
            return self.net(x)

    pair = Pair()
    return pair.model, [pair.net]


def in_a_handler():
    net = nn.Linear(2, 2)
    return poutine.block(poutine.scale(lambda x: net(x), scale=2.0)), [net]


def as_a_method():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 2)

        def model(self, x):
            return self.net(x)

    pair = Pair()
    return pair.model, [pair]


def by_itself():
    net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return net, [net]


PLACES = (
    in_a_closure, in_a_global, in_a_container, in_an_attribute_of_an_object, in_a_helper, in_a_partial, in_a_default,
    in_an_object, in_a_handler, as_a_method, by_itself,
)  # fmt: skip


@pytest.mark.parametrize("make", PLACES)
def test_a_program_owns_the_modules_that_it_can_reach_wherever_they_are(make):
    program, wanted = make()
    assert [id(m) for m in modules_of(program)] == [id(m) for m in wanted]


def test_a_module_inside_another_counts_once():
    outer = nn.Sequential(nn.Linear(1, 1))
    assert modules_of(lambda x: outer[0](x) + outer(x), outer[0], None) == [outer]


class Networks(nn.Module):
    def __init__(self):
        super().__init__()
        with open(__file__) as file:  # what a constructor does is done
            self.encoder, self.decoder, self.size = nn.Linear(6, 4), nn.Linear(2, 6), len(file.read(10))

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        loc, log_scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    def save(self, path):
        torch.save(self.state_dict(), path)


@dataclasses.dataclass
class Settings:
    scale: float = 0.5
    sizes: tuple = (2, 3)


chosen = Settings()


@config_enumerate
def enumerated(x):
    weight = pyro.param("w", lambda: torch.ones(()), constraint=dist.constraints.positive)
    with pyro.plate("data", len(x)):
        c = pyro.sample("c", dist.Categorical(torch.ones(2) / 2))
        z = pyro.sample("z", dist.Normal(c.float(), weight * chosen.scale))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).to_event(1), obs=x)


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.net = PyroModule[nn.Linear](2, 1)
        self.net.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.scale = PyroParam(torch.ones(()), constraint=dist.constraints.positive)

    def forward(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(self.net(x)[..., 0], self.scale))


ORDINARY = {
    "methods": lambda: (Networks().model, Networks().guide),
    "the package's own": small_pair,
    "spline flow": lambda: (pv.VAE.build((4,), latent_dim=2, hidden=(8,), posterior="nsf").guide,),
    "vamp": lambda: (pv.VAE.build((4,), latent_dim=2, hidden=(8,), prior="vamp").model,),
    "convolutions": lambda: (pv.VAE.build((1, 8, 8), latent_dim=2, hidden=(4, 8), network="conv"),),
    "hierarchical": lambda: (Hierarchical.build((6,), (3, 2), hidden=((8,), (8,))).model,),
    "conditional": lambda: (Conditional.build((6,), 3, latent_dim=2, hidden=(8,)).guide,),
    "semi-supervised": lambda: (SemiSupervised.build((6,), 3, latent_dim=2, hidden=(8,)).model,),
    "functions, enumerated": lambda: (enumerated,),
    "Bayesian": lambda: (Bayesian(), AutoNormal(Bayesian())),
    "handlers": lambda: (poutine.scale(Networks().model, scale=0.5),),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_programs_are_proven(name):
    reach = Reach(*ORDINARY[name](), settings_of=Objective(pv.iwae, 5))
    assert reach.unproven == [] and reach.fresh() and reach.changed() is None


def test_a_bound_of_ones_own_is_walked_too():
    weight = [1.0]
    reach = Reach(settings_of=Objective(lambda particles: weight[0] * particles.log_weight.mean(0)))
    assert reach.fresh()
    weight[0] = 2.0
    assert not reach.fresh() and reach.changed() == "weight[0]"


def test_what_a_loss_keeps_of_its_last_call_is_no_setting():
    loss = Objective(pv.elbo)
    reach, trace = Reach(settings_of=loss), Trace_ELBO()
    loss.last_bound, loss.beta = torch.ones(()), 0.5
    assert reach.fresh()
    reach = Reach(settings_of=trace)
    trace.num_particles = 3
    assert reach.changed() == "num_particles of Trace_ELBO"


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        (1.0, 1.0, True),
        (1, 1.0, False),
        (True, 1, False),
        (0.0, -0.0, False),
        ("a", "a", True),
        (float("nan"), 1.0, False),
    ],
)
def test_values_are_compared_with_their_types(old, new, same):
    held = [old]
    reach = Reach(lambda x: held[0])
    held[0] = new
    assert reach.fresh() is same


def test_an_equal_tensor_is_another_place():
    held = {"w": torch.ones(1)}
    reach = Reach(lambda x: x * held["w"])
    held["w"].fill_(3.0)  # read anew by a graph
    assert reach.fresh()
    held["w"] = held["w"].clone()
    assert not reach.fresh()


def test_what_reaches_too_much_is_given_up_and_not_walked_for_ever():
    chain = None
    for _ in range(places.MOST_PLACES):
        chain = types.SimpleNamespace(after=chain, weight=[1.0])

    def program(x):
        return chain.after.weight[0] * x

    found = Reach(program)
    assert len(found._places) <= places.MOST_PLACES
    assert "more than 20,000 places of Python are read" in found.unproven[-1]
    assert Reach(lambda x: x).unproven == []


def test_what_is_in_doubt_is_looked_up_in_no_time():
    lazy = types.ModuleType("lazy")
    lazy.__getattr__ = lambda name: 0
    names = tuple(f"name_{i}" for i in range(16_000))
    space = {"lazy": lazy}
    exec(f"def program(x):\n    lazy\n    return x, {names}", space)
    began = time.process_time()
    found = Reach(space["program"], owned=True)
    assert len(set(found.unproven)) == len(found.unproven) >= len(names)
    assert time.process_time() - began < 1  # 0.04 s; 2.5 s where each is compared with all before it


@pytest.mark.parametrize(
    ("place", "number"),
    [("local/lib/python3.11/site-packages", 0), ("usr/lib/python3/dist-packages", 0), ("projects/site_packages", 1)],
)
def test_nobody_looks_for_networks_in_what_is_installed_for_the_user_or_the_system(
    tmp_path, monkeypatch, place, number
):
    folder, name = tmp_path / place, "package_in_" + place.rpartition("/")[2].replace("-", "")
    folder.mkdir(parents=True)
    (folder / f"{name}.py").write_text("import torch\nnet = torch.nn.Linear(1, 1)\ndef run(x):\n    return net(x)\n")
    monkeypatch.syspath_prepend(str(folder))
    package = importlib.import_module(name)
    assert len(modules_of(lambda x: package.run(x))) == number
    assert len(modules_of(package.run)) == 1  # but where it is the program


def test_a_function_that_calls_itself_is_met_once():
    net = nn.Linear(2, 2)

    def layers(x, depth=2):
        return x if depth == 0 else layers(net(x), depth - 1)

    def other(x):
        return layers(x) if x.sum() > 0 else another(x)

    def another(x):
        return other(-x)

    assert Reach(layers).modules == [net]
    assert Reach(other).modules == [net]
