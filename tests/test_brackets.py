"""Brackets of log p(x) that have not converged say so, and what it would take."""

import math

import pyro
import pyro.distributions as dist
import torch

from pyro_vae.judging.annealing import ais, bdmc
from pyro_vae.judging.evidence import Annealed, Bracket, steps_wanted, unconverged
from pyro_vae.judging.results import Mean

WEIGHT = 5 * torch.randn(30, 10, generator=torch.Generator().manual_seed(0))
X = torch.zeros(10, 30)


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(x.new_zeros(10), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z @ WEIGHT.T, 0.3).to_event(1), obs=x)


def bracket(num_steps, **options):
    return bdmc(model, None, X, num_data=10, num_steps=num_steps, start="prior", progress=False, **options)


def made(width, error, num_steps=20, weight=None):
    """A bracket of two data with these numbers."""
    weight = torch.zeros(4, 2) if weight is None else weight
    each = torch.zeros(2, dtype=torch.float64)
    lower = Annealed(0.0, 0.1, 0.1, each, 4, -0.1, each, weight, each + 4, each + 0.7, (), "prior", num_steps)
    upper, between = (Mean(width, error, error, each + width, 4, each) for _ in range(2))
    return Bracket(lower, upper, between, torch.zeros(4, 2), each + 0.7, ())


def test_a_bracket_of_too_few_steps_is_none_and_says_how_many_it_takes():
    short = bracket(80)
    assert short.reason is not None and "nats apart" in short.reason
    assert str(short).startswith("no bracket: the chains of a datum end ") and "±" not in str(short)
    assert 300 <= short.wanted_steps <= 2000  # 640 give 1.6 nats, 1,280 a third of one
    assert f"at 80 steps (about {short.wanted_steps:,})" in str(short) and short.rows()[0]["is"] == str(short)
    enough = bracket(short.wanted_steps)
    assert enough.reason is None and enough.width.value < 4 and str(enough).startswith("[")
    assert "is" not in enough.rows()[0]
    unmeasured = bracket(80, measure=False)
    assert "(how many it would take is not known)" in str(unmeasured)
    assert unmeasured.width.value == short.width.value
    single = ais(model, None, X, num_steps=20, start="prior", progress=False)
    assert str(single).startswith("log p(x) >= ") and "and no better" in str(single) and "±" not in str(single)


def test_the_reasons():
    assert "its width, 3.19e+14 nats, is known to 3.19e+14 only" in made(319160831705193.0, 319160831705140.0).reason
    assert made(0.3, 0.05).reason is None and made(40.0, 2.0).reason is None and made(0.3, 0.9).reason is None
    assert made(3.0, 1.5).reason is not None
    good, moving = torch.zeros(4, 2), torch.full((2,), 0.7)
    assert unconverged(good, moving) is None
    assert unconverged(good, moving * 0.1) == "only 7 % of the moves were accepted"
    assert unconverged(good + math.nan, moving) == "8 of 8 chains have left the numbers"
    assert unconverged(torch.tensor([[0.0], [12.0]]), moving).startswith("the chains of a datum end 8.49 nats apart")


def test_the_steps_that_it_takes_follow_the_power_law_of_two_lengths():
    # From 400 nats at 20 steps to 100 at 80 is 1 / T: 8,000 for one.
    assert steps_wanted(made(400.0, 1.0, 20), made(100.0, 1.0, 80)) == 8000
    # 1 / T^2: 160 nats at 20, 10 at 80, one at 253.
    assert steps_wanted(made(160.0, 1.0, 20), made(10.0, 1.0, 80)) == 300
    assert steps_wanted(made(100.0, 1.0, 20), made(99.0, 1.0, 80)) is None
    assert steps_wanted(made(math.inf, 1.0, 20), made(99.0, 1.0, 80)) is None
