"""Scores of strangeness: closed forms, and what each corrects for."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae.judging.anomalies import anomaly_scores, compressed_size, explained, roc_auc

X = torch.tensor([[0.3], [2.0], [-1.0]])
QUIET = {"progress": False}


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)


def off_by(shift):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2 + shift * (x > 1), 0.5**0.5).to_event(1))

    return guide


def test_regret_is_what_the_encoder_loses_on_each_datum():
    """KL of N(m + 1/2, 1/2) from the posterior N(m, 1/2) is 1/4 nat, for the one datum above 1."""
    found = anomaly_scores(model, off_by(0.5), X, score="regret", num_samples=4000, num_steps=800, **QUIET)
    assert torch.allclose(found, torch.tensor([0.0, 0.25, 0.0]).double(), atol=0.02)
    assert found.argmax() == 1
    exact = anomaly_scores(model, off_by(0.0), X, score="regret", num_samples=4000, num_steps=800, **QUIET)
    assert exact.abs().max() < 0.02


def test_a_ratio_is_the_likelihood_less_that_of_the_background():
    def background(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 3.0).to_event(1), obs=x)

    def behind(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 10, 0.9**0.5).to_event(1))

    found = anomaly_scores(model, off_by(0.0), X, score="ratio", background=(background, behind), **QUIET)
    wanted = dist.Normal(0.0, 10**0.5).log_prob(X[:, 0]) - dist.Normal(0.0, 2**0.5).log_prob(X[:, 0])
    assert torch.allclose(found, wanted.double(), atol=1e-5)
    ones = torch.tensor([[1.0], [0.0]])
    plain = anomaly_scores(model, off_by(0.0), ones, score="ratio", **QUIET)
    wanted = -dist.Normal(0.0, 2**0.5).log_prob(ones[:, 0]).double() - compressed_size(ones)
    assert torch.allclose(plain, wanted, atol=1e-5)
    with pytest.raises(ValueError, match="sound for zeros and ones only, .* score='regret', or a pair"):
        anomaly_scores(model, off_by(0.0), X, score="ratio", **QUIET)
    with pytest.raises(ValueError, match="got a background for score='regret', wanted a pair"):
        anomaly_scores(model, off_by(0.0), X, score="regret", background=(background, behind))


def test_compressed_sizes_grow_with_what_there_is_to_say():
    generator = torch.Generator().manual_seed(0)
    flat, noise = torch.zeros(1, 1, 28, 28), (torch.rand(1, 1, 28, 28, generator=generator) < 0.5).float()
    stripes = (torch.arange(28) // 3 % 2).float().expand(1, 1, 28, 28)
    sizes = [compressed_size(x).item() for x in (flat, stripes, noise)]
    assert sizes[0] < sizes[1] < sizes[2] / 4
    # Incompressible: 784 bits, and what the container costs.
    assert 784 * math.log(2) * 0.99 <= sizes[2] < 784 * math.log(2) + 20 * 8 * math.log(2)


def simple_and_busy():
    """A pair fitted to noisy stripes, more of them, and black images, which it never saw."""
    generator = torch.Generator().manual_seed(0)
    clean = (torch.arange(64).reshape(1, 8, 8) % 2).float()
    x = (clean - (torch.rand(400, 1, 8, 8, generator=generator) < 0.25).float()).abs()
    torch.manual_seed(0)
    vae = pv.VAE.build((1, 8, 8), latent_dim=2, hidden=(16,))
    pv.fit(vae.model, vae.guide, x[:300], epochs=5, seed=0, progress=False)
    return vae, x[300:], torch.zeros(50, 1, 8, 8)


def test_simple_images_fool_a_likelihood_and_the_words_say_so():
    vae, inside, black = simple_and_busy()

    def auc(score, **options):
        return roc_auc(
            *(anomaly_scores(vae.model, vae.guide, x, score=score, **QUIET, **options) for x in (inside, black))
        )

    assert auc("ratio") > auc("log-likelihood") + 0.05
    said = explained(0.2, "log-likelihood", "black")
    assert said.startswith("ROC-AUC below 0.5: black has the higher p(x).") and "ratio" in said and "regret" in said
    assert explained(0.2, "regret", "black").endswith("Try another score.")
    assert explained(0.5, "ratio") is None
