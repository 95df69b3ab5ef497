"""A pair in one piece, `vae`, stands in the place of `model, guide` in everything that takes a pair: one rule, one mechanism."""

import inspect

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.inference.objectives import mean_bound
from pyro_vae.options import checked, is_pair
from pyro_vae.programs._ex_post import aggregated_posterior
from tests.pairs import binary
from tests.test_signatures import PAIRS

OTHERS = {name: getattr(pv, name) for name in ("fit", "ex_post", "particles", "log_joint", "log_q", "simulate")} | {
    "mean_bound": mean_bound, "aggregated_posterior": aggregated_posterior, "SemiAmortized": pv.SemiAmortized.__init__,
    "Hamiltonian": pv.Hamiltonian.__init__,
}  # fmt: skip
ALL = PAIRS | OTHERS


class Refined(nn.Module):
    def __init__(self, model, guide):
        super().__init__()
        self.model, self.guide = model, guide

    def forward(self, x):
        return self.guide(x)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    return pv.VAE.build((1, 4, 4), latent_dim=2, hidden=(8,))


def caught(function, monkeypatch):
    """What the function itself is called with, where its own body is replaced."""
    got = []
    cell = function.__closure__[function.__code__.co_freevars.index("function")]
    monkeypatch.setattr(cell, "cell_contents", lambda *args, **kwargs: got.append((args, kwargs)))
    return got


def test_all_public_functions_that_take_a_pair_are_among_them():
    for name in pv.__all__:
        thing = getattr(pv, name)
        if inspect.isfunction(thing) and {"model", "guide"} & set(inspect.signature(thing).parameters):
            assert name in ALL, name


@pytest.mark.parametrize("name", sorted(ALL))
def test_every_function_takes_it(name, vae, monkeypatch):
    function, x, called = ALL[name], binary(4), "data"
    if name in ("SemiAmortized", "Hamiltonian"):
        x, called = 3, "num_steps"
    got = caught(function, monkeypatch)
    places = [p for p in inspect.signature(function).parameters if p in ("model", "guide")]
    own = tuple(getattr(vae, place) for place in places)
    before = ("self",) if "__init__" in function.__qualname__ else ()
    function(*before, vae, x)
    assert got.pop() == ((*before, *own, x), {})
    function(*before, *own, x)  # and the documented way is as it was
    assert got.pop() == ((*before, *own, x), {})
    function(*before, **{places[0]: vae, called: x})
    assert got.pop() == (before, dict(zip(places, own, strict=True)) | {called: x})


@pytest.mark.parametrize("name", sorted(ALL))
def test_what_may_be_meant_in_two_ways_is_refused(name, vae, monkeypatch):
    function = ALL[name]
    parameters = inspect.signature(function).parameters
    got = caught(function, monkeypatch)
    before = ("self",) if "__init__" in function.__qualname__ else ()
    if {"model", "guide"} <= set(parameters):
        with pytest.raises(ValueError, match="another guide beside it"):
            function(*before, vae, vae.guide, binary(4))
        with pytest.raises(ValueError, match="another guide beside it"):
            function(*before, vae, binary(4), guide=vae.guide)
        refined = Refined(vae.model, vae.guide)  # has a model and a guide, and is a program itself
        last = 3 if before else binary(4)
        with pytest.raises(ValueError, match="is a program itself"):
            function(*before, refined, last)
        function(*before, vae.model, refined, last)
        assert got.pop()[0][: len(before) + 2] == (*before, vae.model, refined)
    if "data" in parameters:
        with pytest.raises(ValueError, match="no data, wanted both"):
            function(*before, vae)


def test_the_numbers_are_those_of_the_two_programs(vae):
    x = binary(12)
    one, two = (
        pv.log_likelihood(*pair, x, num_samples=20, progress=False) for pair in ((vae,), (vae.model, vae.guide))
    )
    assert torch.equal(one.pointwise, two.pointwise)
    assert pv.active_units(vae, x).to_dict() == pv.active_units(vae.guide, x).to_dict()
    torch.manual_seed(0)
    first = pv.particles(vae, x, num_samples=3)
    torch.manual_seed(0)
    assert torch.equal(first.log_weight, pv.particles(vae.model, vae.guide, x, num_samples=3).log_weight)
    history = pv.fit(vae, x, epochs=1, seed=0, progress=False)
    assert len(history) == 1


def test_objects_of_ones_own_are_pairs_by_their_attributes():
    class Mine(nn.Module):
        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(()), 1.0))
                pyro.sample("x", dist.Normal(z, 1.0), obs=x)

        def guide(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    mine, x = Mine(), torch.tensor([0.0, 1.0])
    assert is_pair(mine) and not is_pair(mine.model) and not is_pair(Mine) and not is_pair(torch.zeros(2))
    exact = dist.Normal(0.0, 2**0.5).log_prob(x)
    assert torch.allclose(pv.log_likelihood(mine, x, num_samples=5, progress=False).pointwise.float(), exact, atol=1e-5)
    with pytest.raises(ValueError, match="got a Mine and no data"):
        pv.judge(mine)


def test_functions_that_take_no_pair_are_left_alone():
    @checked
    def load(data: object, size: int = 1) -> tuple[object, int]:
        return data, size

    thing = pv.VAE.build((4,), latent_dim=1, hidden=(4,))
    assert load(thing, 2) == (thing, 2)
