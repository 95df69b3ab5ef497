"""Every part goes through the laws that pyro_vae.testing ships."""

import pyro.distributions as dist
import pytest
import torch
import zuko
from torch import nn

from pyro_vae.parts import likelihoods, names, posteriors, priors
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.testing import LikelihoodLaws, PairLaws, PosteriorLaws, PriorLaws, check
from tests.pairs import binary, small_pair


def encoder():
    return MLP((1, 4, 4), [8], None)


POSTERIORS = {
    "Delta": lambda: posteriors.Delta(encoder(), 2),
    "DiagonalNormal": lambda: DiagonalNormal(encoder(), 2),
    "FullNormal": lambda: posteriors.FullNormal(encoder(), 2),
    "LowRankNormal": lambda: posteriors.LowRankNormal(encoder(), 3, rank=2),
    "NormalMixture": lambda: posteriors.NormalMixture(encoder(), 2, num_components=3),
    "Planar": lambda: posteriors.Planar(encoder(), 2, num_flows=2),
    "OrthogonalSylvester": lambda: posteriors.Sylvester(encoder(), 3, num_flows=2, num_ortho=2),
    "HouseholderSylvester": lambda: posteriors.Sylvester(encoder(), 3, num_flows=2, kind="householder"),
    "TriangularSylvester": lambda: posteriors.Sylvester(encoder(), 2, num_flows=2, kind="triangular"),
    "IAF": lambda: posteriors.IAF(encoder(), 2, transforms=2, hidden_features=(8,), context=4),
    "MAF": lambda: posteriors.MAF(encoder(), 2, transforms=2, hidden_features=(8,), context=4),
    "NSF": lambda: posteriors.NSF(encoder(), 2, transforms=2, bins=4, hidden_features=(8,), context=4),
    "Coupling": lambda: posteriors.Coupling(encoder(), 2, transforms=2, hidden_features=(8,), context=4),
    "Flow": lambda: posteriors.Flow(encoder(), 2, zuko.flows.SOSPF, context=4, transforms=1, hidden_features=(8,)),
    "VonMisesFisher": lambda: posteriors.VonMisesFisher(encoder(), 3),
}
PRIORS = {
    "StandardNormal": lambda: priors.StandardNormal(2),
    "NormalMixture": lambda: priors.NormalMixture(2, num_components=3),
    "VampPrior": lambda: priors.VampPrior(DiagonalNormal(encoder(), 2), torch.rand(3, 1, 4, 4)),
    "VampPriorOfFlows": lambda: priors.VampPrior(POSTERIORS["NSF"](), torch.rand(3, 1, 4, 4), bounds=(0, 1)),
    "Flow": lambda: priors.Flow(2, transforms=2, hidden_features=(8,)),
    "SplineFlow": lambda: priors.Flow(2, zuko.flows.NSF, transforms=2, bins=4, hidden_features=(8,)),
    "HypersphericalUniform": lambda: priors.HypersphericalUniform(3),
}


def decoder(parameters=1):
    return MLP(2, [8], (parameters, 2, 2))


LIKELIHOODS = {
    "Bernoulli": lambda: likelihoods.Bernoulli(decoder()),
    "ContinuousBernoulli": lambda: likelihoods.ContinuousBernoulli(decoder()),
    "FixedNormal": lambda: likelihoods.Normal(decoder(), scale=0.3),
    "LearnedNormal": lambda: likelihoods.Normal(decoder(), scale="learned"),
    "PerPixelNormal": lambda: likelihoods.Normal(decoder(), scale="per-pixel", x_shape=(1, 2, 2)),
    "NetworkNormal": lambda: likelihoods.Normal(decoder(2), scale="network"),
    "DiscretizedLogistic": lambda: likelihoods.DiscretizedLogistic(decoder(2), levels=16),
    "MixtureOfDiscretizedLogistics": lambda: likelihoods.MixtureOfDiscretizedLogistics(decoder(6), 2, levels=16),
    "Categorical": lambda: likelihoods.Categorical(decoder(8), levels=8),
    "Poisson": lambda: likelihoods.Poisson(decoder()),
    "PoissonLevels": lambda: likelihoods.Poisson(decoder(), levels=16),
    "NegativeBinomial": lambda: likelihoods.NegativeBinomial(decoder(2)),
    "NegativeBinomialLevels": lambda: likelihoods.NegativeBinomial(decoder(), levels=16),
}


def battery(laws, parts):
    """One subclass of a battery for each part, as pytest collects them."""
    for name, make in parts.items():
        globals()[f"Test{laws.__name__[:5]}{name}"] = type(f"Test{name}", (laws,), {"make": lambda self, m=make: m()})


def registered(kind, parts, make):
    """The parts, and those that have a name (`pyro_vae.parts.names`) and none of their own settings here."""
    made = {type(part()) for part in parts.values()}
    missing = {family for name in names.PARTS[kind] if (family := names.find(kind, name)) not in made}
    return parts | {family.__name__: lambda family=family: make(family) for family in missing}


POSTERIORS = registered("posterior", POSTERIORS, lambda family: family(encoder(), 3))
PRIORS = registered("prior", PRIORS, lambda family: family(3))
LIKELIHOODS = registered("likelihood", LIKELIHOODS, lambda family: family(decoder(family.parameters_per_pixel)))
battery(PosteriorLaws, POSTERIORS)
battery(PriorLaws, PRIORS)
battery(LikelihoodLaws, LIKELIHOODS)


def test_no_part_is_left_out():
    for package, parts in ((posteriors, POSTERIORS), (priors, PRIORS), (likelihoods, LIKELIHOODS)):
        classes = {name for name in package.__all__ if isinstance(getattr(package, name), type)}
        made = {type(make()).__name__ for make in parts.values()}
        assert classes - {"Amortized", "Likelihood"} == made


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
    assert len(check(globals()["TestPosteDiagonalNormal"]())) >= 10
