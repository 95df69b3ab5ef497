"""The baseline of the course: it reconstructs better, generates worse, and scores anomalies."""

import pytest
import torch

import pyro_vae as pv
from pyro_vae.judging.anomalies import roc_auc
from pyro_vae.judging.distances import energy_distance


@pytest.fixture(scope="module")
def fitted():
    """A VAE and an autoencoder of the same networks, fitted to the digits, and the test images."""
    digits = pv.load("digits")
    options = {"latent_dim": 16, "hidden": (128,)}
    settings = {"epochs": 20, "batch_size": 64, "learning_rate": 3e-3, "schedule": "one-cycle", "seed": 0}
    torch.manual_seed(0)
    vae = pv.VAE.build(digits.x_shape, **options)
    torch.manual_seed(0)
    ae = pv.autoencoder(digits.x_shape, **options)
    pv.fit(vae.model, vae.guide, digits.train, **settings)
    pv.fit(ae.model, ae.guide, digits.train, loss=pv.Objective(pv.reconstruction), **settings)
    x = digits.test.frozen(0)
    return vae, ae, x[torch.arange(len(x))]


def reconstruction_of(pair, x):
    with torch.no_grad():
        q = pair.posterior(x)
        return pair.decode(q.mean).log_prob(x)


def test_it_reconstructs_better(fitted):
    vae, ae, x = fitted
    gain = reconstruction_of(ae, x) - reconstruction_of(vae, x)
    assert gain.mean() > 4 * gain.std() / len(x) ** 0.5


def test_it_generates_worse(fitted):
    vae, ae, x = fitted
    torch.manual_seed(0)
    ours = energy_distance(vae.sample(2000, pixels="draw"), x)
    theirs = energy_distance(ae.sample(2000, pixels="draw"), x)
    assert ours.value < 4 * ours.null  # hardly further from the data than one half of them from the other
    assert theirs.value > 20 * theirs.null


def test_both_score_anomalies(fitted):
    vae, ae, x = fitted
    generator = torch.Generator().manual_seed(0)
    rows = x[:, :, torch.randperm(8, generator=generator)]
    pixels = x.flatten(1)[:, torch.randperm(64, generator=generator)].reshape(x.shape)
    for pair, score in ((vae, "log-likelihood"), (ae, "reconstruction")):
        ordinary, shuffled, scrambled = (
            pv.anomaly_scores(pair.model, pair.guide, data, score=score, num_samples=50) for data in (x, rows, pixels)
        )
        assert roc_auc(ordinary, shuffled) > 0.75
        assert roc_auc(ordinary, scrambled) > 0.99


def test_its_latent_space_has_no_structure_that_the_prior_knows(fitted):
    vae, ae, x = fitted
    spread = [pair.posterior(x).mean.detach().square().mean().item() for pair in (vae, ae)]
    assert spread[0] < 1  # E|mu|^2 / D < 1 = E|z|^2 / D under the prior: the rest is the width of q
    assert spread[1] > 3


def test_it_has_no_elbo_and_no_evidence(fitted):
    _, ae, x = fitted
    with pytest.raises(ValueError, match="is a point"):
        pv.log_likelihood(ae.model, ae.guide, x, num_samples=2)
    with pytest.raises(ValueError, match=r"Objective\(reconstruction\)"):
        pv.fit(ae.model, ae.guide, x, epochs=1)
    for bound in (pv.elbo, pv.iwae):
        with pytest.raises(ValueError, match="is a point"):
            pv.fit(ae.model, ae.guide, x, loss=pv.Objective(bound), epochs=1)
