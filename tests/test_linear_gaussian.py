"""The linear-Gaussian VAE against its closed forms: the whole chain, from data to estimate."""

import math

import pytest
import torch

import pyro_vae as pv
from pyro_vae.data.testbeds import LinearGaussian

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fitted():
    """A linear VAE fitted by `fit`'s default loss, and the test data."""
    dataset = pv.load("linear-gaussian")
    torch.manual_seed(0)
    vae = pv.VAE.build(dataset.x_shape, latent_dim=dataset.testbed.latent_dim, network="linear", likelihood="normal")
    settings = {"epochs": 100, "batch_size": 200, "learning_rate": 0.05, "schedule": "one-cycle", "seed": 0}
    pv.fit(vae.model, vae.guide, dataset.train[torch.arange(len(dataset.train))], **settings)
    likelihood = vae.model.likelihood
    layer = likelihood.decoder.layers[0]
    scale = (likelihood.minimum_scale + likelihood.log_scale.exp()).item()
    bed = LinearGaussian(layer.weight.detach().double(), layer.bias.detach().double(), scale)
    return dataset, vae, bed, dataset.test[torch.arange(len(dataset.test))]


def test_the_elbo_reaches_the_evidence_of_the_fitted_model(fitted):
    _, vae, bed, x = fitted
    terms = pv.elbo_terms(vae.model, vae.guide, x, num_samples=1000)
    gap = bed.log_evidence(x.double()).mean().item() - terms.value
    assert -4 * terms.mc_stderr < gap < 0.01
    assert bed.mean_field_gap() < 0.01  # the columns have become orthogonal
    assert terms.mc_stderr < 0.001


def test_the_fitted_model_is_as_good_as_sampling_error_allows(fitted):
    dataset, _, bed, x = fitted
    truth = dataset.testbed
    lost = truth.log_evidence(x).double() - bed.log_evidence(x.double())
    stderr = lost.std().item() / math.sqrt(len(x))
    expected = truth.expected_excess(len(dataset.train))
    # The loss is half a chi-square over n, so its own spread is sqrt(2 / parameters) of its mean.
    spread = expected * math.sqrt(2 / truth.num_parameters)
    assert abs(lost.mean().item() - expected) < 4 * math.hypot(stderr, spread)
    assert lost.mean() > -4 * stderr


def test_importance_sampling_agrees_with_the_closed_form(fitted):
    _, vae, bed, x = fitted
    estimate = pv.log_likelihood(vae.model, vae.guide, x, num_samples=1000)
    assert abs(estimate.value - bed.log_evidence(x.double()).mean().item()) < max(
        4 * estimate.mc_stderr, 1e-5
    )  # float32
    assert estimate.khat_ok == 1
