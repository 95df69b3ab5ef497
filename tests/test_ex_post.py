"""Priors fitted after training, where the aggregated posterior is known."""

import pyro.distributions as dist
import pytest
import torch
import zuko
from torch import nn

from pyro_vae.judging.distances import energy_distance
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.parts.posteriors import Delta
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.parts.priors.mixture import NormalMixture
from pyro_vae.parts.priors.standard import Flow
from pyro_vae.programs._ex_post import aggregated_posterior, ex_post
from pyro_vae.programs.pair import Guide, Model

MEANS = torch.tensor([[6.0, 0.0], [-2.0, 3.0]], dtype=torch.float64)


def clusters(size, seed=0):
    """Two clusters of standard deviation 0.5, a quarter of the data in the first."""
    generator = torch.Generator().manual_seed(seed)
    which = (torch.rand(size, generator=generator) > 0.25).long()
    return MEANS[which] + 0.5 * torch.randn(size, 2, generator=generator, dtype=torch.float64)


def pair(noise=0.3):
    """p(x | z) = N(z, noise^2), and the guide with the posterior under a flat prior."""
    model = Model(StandardNormal(2).double(), lambda z: dist.Normal(z, noise).to_event(1))
    return model, Guide(lambda x: dist.Normal(x, noise).to_event(1))


def truth():
    """The aggregated posterior: the clusters widened by the guide's noise."""
    components = dist.Normal(MEANS, (0.25 + 0.09) ** 0.5).to_event(1)
    return dist.MixtureSameFamily(dist.Categorical(torch.tensor([0.25, 0.75], dtype=torch.float64)), components)


PRIORS = {
    "gaussian-mixture": lambda: "gaussian-mixture",
    "flow": lambda: Flow(2, zuko.flows.NSF, transforms=2, hidden_features=[32, 32]),
    "module": lambda: NormalMixture(2, 8),
}


@pytest.mark.parametrize("name", ["gaussian-mixture", "module", pytest.param("flow", marks=pytest.mark.slow)])
def test_the_new_prior_is_the_aggregated_posterior(name):
    model, guide = pair()
    torch.manual_seed(0)
    fitted = ex_post(model, guide, clusters(4000), prior=PRIORS[name](), num_components=2, num_steps=600)
    torch.manual_seed(1)
    z = truth().sample((4000,))
    lost = truth().log_prob(z) - fitted.prior().log_prob(z)
    stderr = lost.std() / len(z) ** 0.5
    limit = {"gaussian-mixture": 0.01, "flow": 0.1, "module": 0.1}[name]
    assert -4 * stderr < lost.mean() < limit + 4 * stderr
    assert (truth().log_prob(z) - model.prior().log_prob(z)).mean() > 5  # what the old one lost
    assert fitted.likelihood is model.likelihood and isinstance(model.prior, StandardNormal)
    assert not any(p.requires_grad for p in fitted.prior.parameters())


def test_samples_and_evidence_improve():
    model, guide = pair()
    fitted = ex_post(model, guide, clusters(4000))
    held_out = clusters(500, seed=1)
    torch.manual_seed(0)
    old, new = (energy_distance(m(size=500), held_out) for m in (model, fitted))
    assert old.value > 1 > 0.1 > new.value
    evidence = [log_likelihood(m, guide, held_out, num_samples=200, progress=False).value for m in (model, fitted)]
    assert evidence[1] > evidence[0] + 5


def test_an_autoencoder_gets_a_prior_where_its_points_lie():
    torch.manual_seed(0)
    guide = Guide(Delta(nn.Linear(2, 2), 2)).double()
    model = Model(StandardNormal(2).double(), lambda z: dist.Normal(z, 0.1).to_event(1))
    data = clusters(3000)
    z = aggregated_posterior(model, guide, data, batch_size=700)
    assert torch.allclose(z, guide.posterior(data).mean)
    fitted = ex_post(model, guide, data, num_components=2)
    points = guide.posterior(clusters(500, seed=2)).mean.detach()
    torch.manual_seed(0)
    near = energy_distance(fitted.prior().sample((500,)), points)
    assert near.value < 4 * near.null < energy_distance(model.prior().expand([500]).sample(), points).value


def test_it_takes_batches_and_leaves_random_state_and_modes_alone():
    model, guide = pair()
    data = clusters(300)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    model.train()
    guide.eval()
    first = ex_post(model, guide, data, batch_size=100)
    assert torch.equal(torch.get_rng_state(), before) and model.training and not guide.training
    second = ex_post(model, guide, [(part,) for part in data.split(100)])
    assert torch.equal(first.prior.locs, second.prior.locs)


def test_what_has_no_prior_to_fit_is_refused():
    model, guide = pair()
    with pytest.raises(ValueError, match="type function, wanted a Model"):
        ex_post(lambda x: None, guide, clusters(30))
    with pytest.raises(ValueError, match="unknown prior 'kde'"):
        ex_post(model, guide, clusters(30), prior="kde")
    with pytest.raises(ValueError, match="got no data"):
        ex_post(model, guide, [])
    with pytest.raises(ValueError, match="10 data to fit NormalMixture to, wanted at least 20"):
        ex_post(model, guide, clusters(10), prior=NormalMixture(2))
