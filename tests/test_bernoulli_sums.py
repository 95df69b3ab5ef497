"""Pixels scored together, where no gradient is wanted: the sum of their own log densities."""

import pytest
import torch

from pyro_vae.parts.distributions.bernoulli import BernoulliLogits


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [1, 12, 16, 64, 67, 784, 3072])
def test_the_sum_is_that_of_float64_by_torch(size, masked):
    generator = torch.Generator().manual_seed(size)
    logits = 6 * torch.randn(5, 3, size, generator=generator)
    x = torch.rand(3, size, generator=generator).round()
    mask = torch.rand(3, size, generator=generator) < 0.7
    each = torch.distributions.Bernoulli(logits=logits.double()).log_prob(x.double().expand(5, 3, size))
    pixels = BernoulliLogits(logits)
    found = (pixels.mask(mask) if masked else pixels).to_event(1).log_prob(x)
    wanted = (each * mask if masked else each).sum(-1)
    # A rounding of each factor and of each term, which are of some units.
    assert ((found - wanted).abs() <= 1e-7 * (size + 10 * each.abs().sum(-1))).all()
