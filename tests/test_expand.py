"""A distribution that is expanded stays of its class: a subclass keeps its methods, its own numbers, and its density."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Independent, Normal

from pyro_vae.parts import distributions
from pyro_vae.parts.likelihoods.likelihood import StandardizedNormal

ONES, ZEROS = torch.ones(3), torch.zeros(3)


def normal(loc, scale):
    return dist.Normal(loc, scale).to_event(1)


def pushed(u):
    return u.exp(), u.sum(-1)


def pulled(z):
    return z.log(), -z.log().sum(-1)


LINE = torch.linspace(-1.0, 1.0, 3)
CASES = {
    "BernoulliLogits": (distributions.BernoulliLogits, (LINE,)),
    "ContinuousBernoulliLogits": (distributions.ContinuousBernoulliLogits, (LINE,)),
    "PoissonLogRate": (distributions.PoissonLogRate, (LINE,)),
    "NegativeBinomialLogMean": (distributions.NegativeBinomialLogMean, (LINE, ONES)),
    "LevelsAsCounts": (distributions.LevelsAsCounts, (distributions.PoissonLogRate(LINE), 4)),
    "CategoricalLevels": (distributions.CategoricalLevels, (torch.randn(3, 4),)),
    "DiscretizedLogistic": (distributions.DiscretizedLogistic, (LINE, 0.3 * ONES, 4)),
    "Pushforward": (distributions.Pushforward, (normal(torch.zeros(3, 2), 1.0), pushed, pulled)),
    "CholeskyNormal": (distributions.CholeskyNormal, (torch.randn(3, 2), torch.eye(2))),
    "LowRankNormal": (distributions.LowRankNormal, (torch.randn(3, 2), torch.ones(3, 2), torch.ones(3, 2, 1))),
    "DiagonalNormalMixture": (
        distributions.DiagonalNormalMixture,
        (torch.randn(3, 2, 1), torch.ones(3, 2, 1), torch.zeros(3, 2)),
    ),
    "SharedMixture": (distributions.SharedMixture, (torch.zeros(3), normal(LINE[:, None], 1.0))),
    "HypersphericalUniform": (distributions.HypersphericalUniform, (3, (3,))),
    "VonMisesFisher": (distributions.VonMisesFisher, (torch.eye(3), ONES)),
    "StandardizedNormal": (StandardizedNormal, (LINE, ONES, torch.tensor(5.0), torch.tensor(2.0))),
}


def subclass(kind):
    class Own(kind):
        """With a density that is half as deep, and a number of its own."""

        power = 1.0

        def log_prob(self, value):
            return self.power * super().log_prob(value)

    return Own


def test_all_distributions_are_tried():
    assert set(distributions.__all__) <= set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_an_expanded_subclass_is_what_it_was(name):
    torch.manual_seed(0)
    kind, args = CASES[name]
    made = subclass(kind)(*args)
    made.power = 0.5
    shape = torch.Size((5, *made.batch_shape))
    value = made.sample((5,))
    wanted = 0.5 * kind(*args).log_prob(value)
    found = made.expand(shape)
    assert type(found) is type(made) and found.batch_shape == shape and found.event_shape == made.event_shape
    torch.testing.assert_close(found.log_prob(value), wanted)
    assert made.batch_shape == shape[1:]  # the one before is as it was
    torch.testing.assert_close(made.log_prob(value), wanted)
    again = found.expand((2, *shape))
    assert type(again) is type(made) and again.sample().shape == (2, *shape, *made.event_shape)
    torch.testing.assert_close(again.log_prob(value), wanted.expand(2, *wanted.shape))


@pytest.mark.parametrize("name", CASES)
def test_a_plate_that_expands_a_subclass_asks_its_density(name):
    kind, args = CASES[name]
    made = subclass(kind)(*args)
    made.power = 0.5
    value = made.sample((5,))

    def model():
        with pyro.plate("rows", 5, dim=-1 - len(made.batch_shape)):
            pyro.sample("x", made, obs=value)

    trace = pyro.poutine.trace(model).get_trace()
    wanted = 0.5 * kind(*args).log_prob(value).sum()
    torch.testing.assert_close(trace.log_prob_sum(), wanted)


def test_a_flow_that_is_expanded_does_not_know_the_draws_before():
    flow = distributions.Pushforward(Independent(Normal(torch.zeros(2), 1.0), 1), pushed, pulled)
    z = flow.rsample()
    wide = flow.expand((3,))
    assert wide.log_prob(z).shape == (3,)
    torch.testing.assert_close(wide.log_prob(z), flow.log_prob(z).expand(3))


def test_pixels_of_a_subclass_keep_its_density_under_a_mask():
    kind = subclass(distributions.BernoulliLogits)
    made = kind(torch.randn(4, 6))
    made.power = 0.5
    value, mask = torch.bernoulli(torch.full((2, 4, 6), 0.5)), torch.rand(4, 6) < 0.5
    for wrapped in (made.mask(mask).to_event(1), made.expand((2, 4, 6)).mask(mask).to_event(1)):
        each = torch.where(mask, distributions.BernoulliLogits(made.logits).log_prob(value), 0.0)
        torch.testing.assert_close(wrapped.log_prob(value), 0.5 * each.sum(-1))
        expanded = wrapped.expand((2, 4))
        torch.testing.assert_close(expanded.log_prob(value), 0.5 * each.sum(-1))
