"""Every part goes through the laws that pyro_vae.testing ships."""


import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.parts.likelihoods import Bernoulli, Normal
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import Delta, DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.testing import LikelihoodLaws, PairLaws, PosteriorLaws, PriorLaws, check
from tests.pairs import binary, small_pair


def encoder():
    return MLP((1, 4, 4), [8], None)


class TestDiagonalNormal(PosteriorLaws):
    def make(self):
        return DiagonalNormal(encoder(), latent_dim=2)


class TestDelta(PosteriorLaws):
    def make(self):
        return Delta(encoder(), latent_dim=2)


class TestStandardNormal(PriorLaws):
    def make(self):
        return StandardNormal(2)


class TestBernoulli(LikelihoodLaws):
    def make(self):
        return Bernoulli(MLP(2, [8], (1, 2, 2)))


class TestNormal(LikelihoodLaws):
    def make(self):
        return Normal(MLP(2, [8], (2, 1, 2)), scale="network")


class TestPlainPair(PairLaws):
    def make(self):
        return *small_pair(), (binary(6),)


# The laws bite


class _Broken(PosteriorLaws):
    """A diagonal posterior with one thing wrong."""

    def __init__(self, family=None, **attributes):
        class Mine(DiagonalNormal):
            rescoring = attributes.get("rescoring", "one pass")

            def __init__(self):
                super().__init__(encoder(), 2)
                if attributes.get("idle"):
                    self.idle = nn.Parameter(torch.ones(1))

            def family(self, parameters):
                return (family or DiagonalNormal.family)(*([self] if family is None else []), parameters)

        self.make = Mine


class TooDense(dist.Normal):
    def log_prob(self, value):
        return super().log_prob(value) + 0.1


def halves(parameters):
    return parameters.chunk(2, -1)


def mixed(parameters):
    return halves(parameters)[0].mean(0, keepdim=True).expand_as(halves(parameters)[0])


@pytest.mark.parametrize(
    "battery, law",
    [
        (_Broken(lambda p: dist.Normal(halves(p)[0], halves(p)[1].exp())), "shapes_follow_the_leading"),
        (_Broken(lambda p: TooDense(halves(p)[0], halves(p)[1].exp()).to_event(1)), "density_integrates_to_one"),
        (_Broken(lambda p: dist.Normal(mixed(p), halves(p)[1].exp()).to_event(1)), "do_not_mix"),
        (_Broken(lambda p: dist.Normal(halves(p)[0].float(), halves(p)[1].float().exp()).to_event(1)), "float64"),
        (_Broken(rescoring="impossible"), "rescoring_is_as_declared"),
        (_Broken(idle=True), "every_parameter_has_a_gradient"),
    ],
)
def test_a_broken_posterior_is_caught(battery, law):
    caught = []
    for name in dir(battery):
        if name.startswith("test_"):
            try:
                getattr(battery, name)()
            except Exception as error:
                caught.append(name + type(error).__name__)
    assert any(law in name for name in caught), caught


def test_the_battery_runs_without_pytest():
    assert len(check(TestDiagonalNormal())) >= 10
