"""Bounds: limits, order, and exact expectations by quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp

from pyro_vae.inference.bounds import ciwae, elbo, iwae, miwae, renyi, vr_max
from pyro_vae.inference.split_bounds import cubo, piwae, wake_sleep
from pyro_vae.traces import Particles, particles
from tests.pairs import linear_pair


def table(k=6, b=5, scale=3.0, dtype=torch.float64):
    weight = scale * torch.randn(k, b, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 90
    return Particles(weight.to(dtype), {}, {}, {})


def test_renyi_is_the_power_mean_and_has_the_right_limits():
    p = table()
    weight = p.log_weight.numpy()
    for alpha in (-3.0, -0.5, 0.3, 0.9, 1.5, 4.0):
        oracle = logsumexp((1 - alpha) * weight, axis=0, b=1 / len(weight)) / (1 - alpha)
        assert np.abs(renyi(alpha)(p).numpy() - oracle).max() < 1e-12
    assert (renyi(0.0)(p) - iwae(p)).abs().max() == 0
    assert (renyi(1.0)(p) - elbo(p)).abs().max() == 0
    assert (renyi(-1e6)(p) - vr_max(p)).abs().max() < 1e-5
    assert (renyi(1e6)(p) - p.log_weight.amin(0)).abs().max() < 1e-5


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 1e-4)])
def test_renyi_near_one_keeps_its_digits(dtype, tolerance):
    p = table(dtype=dtype)
    # To first order below alpha = 1: the mean plus half the variance times (1 - alpha).
    spread = p.log_weight.var(0, unbiased=False) / 2
    for distance in (1e-7, -1e-7):
        assert (renyi(1 + distance)(p) - (elbo(p) - distance * spread)).abs().max() < tolerance


def test_the_order_of_the_bounds():
    p = table()
    ladder = [renyi(2.0), elbo, renyi(0.7), renyi(0.3), iwae, renyi(-1.0), renyi(-5.0), vr_max]
    values = [bound(p) for bound in ladder]
    assert all((low < high).all() for low, high in zip(values, values[1:], strict=False))
    for between in (miwae(2), miwae(3), ciwae(0.4)):
        assert (elbo(p) < between(p)).all() and (between(p) < iwae(p)).all()
    assert (miwae(2)(p) != miwae(3)(p)).all()


def test_ends_of_the_families():
    p = table()
    for ours, wanted in ((miwae(1), iwae), (miwae(6), elbo), (ciwae(0.0), iwae), (ciwae(1.0), elbo)):
        assert (ours(p) - wanted(p)).abs().max() < 1e-12
    for reported in (piwae(3), wake_sleep(), wake_sleep(0.5)):
        assert torch.equal(reported(p), iwae(p))
    assert torch.equal(cubo(2)(p), renyi(-1.0)(p))
    halves = [Particles(part, {}, {}, {}) for part in p.log_weight.split(3)]
    assert (miwae(2)(p) - (iwae(halves[0]) + iwae(halves[1])) / 2).abs().max() < 1e-12


def gaussian_power(mean, scale, order):
    """log E_q[(p/q)^order] / order by quadrature for p = N(0, 1), q = N(mean, scale^2)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(200)
    z = mean + scale * nodes
    log_weight = -(z**2) / 2 + nodes**2 / 2 + math.log(scale)
    return logsumexp(order * log_weight, b=weights / weights.sum()) / order


def test_cubo_is_above_the_evidence_and_its_estimate_is_biased_downwards():
    """p(z, x) = N(z; 0, 1), so that log p(x) = 0, and q wide enough for second moments."""
    mean, scale, size = 0.4, 1.3, 200_000
    exact = gaussian_power(mean, scale, 2.0)
    assert exact > 0.01
    assert gaussian_power(0.0, 1.0, 2.0) == pytest.approx(0, abs=1e-12)  # tight at the posterior
    assert gaussian_power(mean, scale, 3.0) > exact  # and looser with n
    z = mean + scale * torch.randn(4, size // 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_q = -(((z - mean) / scale) ** 2) / 2 - math.log(scale)
    p = Particles(-(z**2) / 2, {}, {"z": log_q}, {})
    estimates = cubo(2)(p)
    stderr = estimates.std() / math.sqrt(estimates.numel())
    assert estimates.mean() < exact - 4 * stderr
    long = Particles(p.log_likelihood.reshape(-1, 1), {}, {"z": log_q.reshape(-1, 1)}, {})
    squares = (2 * long.log_weight).exp()
    its_stderr = (squares.std() / squares.mean() / math.sqrt(size) / 2).item()
    assert abs(cubo(2)(long).item() - exact) < 4 * its_stderr
    assert gaussian_power(mean, scale, 1 - 2.0) < 0 < exact  # the same mean of order below 1 is a lower bound


def test_renyi_expectations_bracket_the_evidence():
    pair, x = linear_pair(stretch=1.3)
    torch.manual_seed(0)
    p = particles(pair.model, pair.guide, x, num_samples=4000)
    gap = {name: (bound(p) - pair.bed.log_evidence(x)).mean() for name, bound in
           {"elbo": elbo, "half": renyi(0.5), "iwae": iwae, "cubo": cubo(2)}.items()}  # fmt: skip
    assert gap["elbo"] < gap["half"] < -1e-3 and abs(gap["iwae"]) < 5e-3 and gap["cubo"] > 0.05


def test_at_the_exact_posterior_all_are_the_evidence():
    pair, x = linear_pair()
    p = particles(pair.model, pair.guide, x, num_samples=6)
    for bound in (elbo, iwae, renyi(0.5), renyi(-2.0), renyi(3.0), vr_max, miwae(3), ciwae(0.5), piwae(2), cubo(2)):
        assert (bound(p) - pair.bed.log_evidence(x)).abs().max() < 1e-10


def test_names_and_bad_numbers():
    named = [renyi(0.5), renyi(-1.0), miwae(8), ciwae(0.25), piwae(8), cubo(2), wake_sleep(), wake_sleep(0.5)]
    wanted = [
        "renyi(0.5)",
        "renyi(-1)",
        "miwae(8)",
        "ciwae(0.25)",
        "piwae(8)",
        "cubo(2)",
        "wake_sleep",
        "wake_sleep(0.5)",
    ]
    assert [repr(b) for b in named] == [b.__name__ for b in named] == wanted
    for make, text in (
        (lambda: renyi(-math.inf), "alpha must be a finite number, got -inf.*vr_max"),
        (lambda: miwae(0), "num_groups must be a positive integer, got 0"),
        (lambda: miwae(4)(table()), "num_samples=6 and num_groups=4.*multiple of 4"),
        (lambda: ciwae(1.5), r"beta must lie in \[0, 1\], got 1.5"),
        (lambda: cubo(1.0), "n must be above 1, got 1.0"),
        (lambda: wake_sleep(2.0), r"sleep must lie in \[0, 1\], got 2.0"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
