"""The probabilities of the draws, and the change of variables in bits per dimension."""

import math

import pytest
import torch

from pyro_vae.data import binarization, binarize, bits_per_dimension, dequantize, threshold


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LEVELS = torch.arange(256, dtype=torch.uint8)


def test_every_grey_level_has_its_probability():
    draws = 40_000
    ones = sum(binarize(LEVELS.expand(4_000, -1), generator(seed)).sum(0, dtype=torch.float64) for seed in range(10))
    p = LEVELS.double() / 255
    # Four standard errors, over 256 levels: five would be exceeded by chance once in 7,000 runs.
    error = (ones / draws - p).abs()
    assert (error <= 5 * (p * (1 - p) / draws).sqrt() + 2e-5).all()
    assert error.mean() < (p * (1 - p) / draws).sqrt().mean()


def test_black_is_never_and_white_always_one():
    ends = torch.tensor([0, 255], dtype=torch.uint8).expand(1_000_000, 2)
    assert binarize(ends, generator()).sum(0).tolist() == [0, 1_000_000]


def test_probabilities_are_exact_to_a_ten_thousandth(monkeypatch):
    # Instead of random lanes each of the 2^16 once, so that means are probabilities.
    lanes = torch.arange(-(2**15), 2**15).to(torch.int16)[:, None]
    monkeypatch.setattr(binarization, "_random_lanes", lambda pixels, generator: lanes.repeat(1, pixels.shape[1]))
    p = binarize(LEVELS.expand(2**16, -1)).mean(0, dtype=torch.float64)
    assert (p - LEVELS.double() / 255).abs().max() < 2e-5
    assert (p[0], p[255]) == (0, 1)


def test_all_four_lanes_of_a_word_are_fair_and_independent():
    x = binarize(torch.full((200_000, 4), 51, dtype=torch.uint8), generator()).double()
    p, n = 0.2, len(x)
    assert ((x.mean(0) - p).abs() < 4 * math.sqrt(p * (1 - p) / n)).all()
    assert (torch.corrcoef(x.T) - torch.eye(4)).abs().max() < 4 / math.sqrt(n)


@pytest.mark.parametrize("shape", [(), (1,), (2,), (3,), (5,), (7, 3), (0,), (2, 1, 5, 3)])
def test_sizes_that_fill_no_whole_word(shape):
    pixels = torch.full(shape, 255, dtype=torch.uint8)
    assert torch.equal(binarize(pixels), torch.ones(shape))
    assert dequantize(pixels).shape == shape


def test_memory_layout_does_not_matter():
    pixels = torch.zeros(4, 6, dtype=torch.uint8)
    pixels[:, 2] = 255
    assert torch.equal(binarize(pixels.T), (pixels.T > 0).float())


def test_draws_follow_the_global_or_the_given_generator():
    pixels = torch.full((1000,), 128, dtype=torch.uint8)
    torch.manual_seed(3)
    first, second = binarize(pixels), binarize(pixels)
    torch.manual_seed(3)
    assert torch.equal(binarize(pixels), first) and not torch.equal(first, second)
    state = torch.get_rng_state()
    assert torch.equal(binarize(pixels, generator(1)), binarize(pixels, generator(1)))
    assert torch.equal(torch.get_rng_state(), state)


def test_float_probabilities_keep_their_dtype():
    p = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    x = binarize(p.expand(100_000, 3), generator())
    assert x.dtype == torch.float64
    assert x.mean(0)[0] == 0 and x.mean(0)[2] == 1
    assert abs(x.mean(0)[1] - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 100_000)


def test_dequantized_levels_stay_in_their_bins_and_fill_them():
    n = 20_000
    x = dequantize(LEVELS.expand(n, -1), generator())
    assert torch.equal((x * 256).floor(), LEVELS.float().expand(n, -1))
    assert x.min() > 0 and x.max() < 1
    u = (x.double() * 256 - LEVELS).flatten()
    assert abs(u.mean() - 0.5) < 4 * math.sqrt(1 / 12 / u.numel())
    assert abs(u.var() - 1 / 12) < 4 * math.sqrt((1 / 80 - 1 / 144) / u.numel())


def test_threshold_turns_at_half():
    assert threshold(LEVELS).tolist() == [0.0] * 128 + [1.0] * 128
    assert threshold(torch.tensor([0.49, 0.5])).tolist() == [0.0, 1.0]


def test_uniform_density_costs_eight_bits_and_fair_coins_one():
    uniform = torch.distributions.Uniform(0.0, 1.0).log_prob(torch.rand(5, 784)).sum(-1)
    assert torch.equal(bits_per_dimension(uniform, 784), torch.full((5,), 8.0))
    coins = torch.distributions.Bernoulli(torch.tensor(0.5)).log_prob(torch.ones(784)).sum().item()
    assert bits_per_dimension(coins, 784, levels=1) == pytest.approx(1.0)


def test_bits_are_those_of_the_levels():
    # A density that is constant in each bin gives the level v the probability density / 256.
    p = torch.softmax(torch.randn(256, generator=generator(), dtype=torch.float64), 0)
    v = torch.tensor([3, 200, 17])
    density_of_x = (256 * p[v]).log().sum()
    assert bits_per_dimension(density_of_x, 3).item() == pytest.approx(-p[v].log2().mean().item())


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: binarize(torch.zeros(3, dtype=torch.int64)),
            r"binarize got pixels of dtype torch.int64, wanted torch.uint8",
        ),
        (lambda: binarize(torch.tensor([0.5, 2.0])), r"lie in \[0.5, 2\], wanted \[0, 1\]. Divide by 255"),
        (lambda: binarize(torch.tensor([float("nan")])), r"lie in \[nan, nan\], wanted \[0, 1\]"),
        (lambda: threshold(torch.tensor([-1.0])), r"lie in \[-1, -1\], wanted \[0, 1\]"),
        (lambda: dequantize(torch.zeros(3)), r"dequantize got pixels of dtype torch.float32, wanted torch.uint8"),
        (lambda: bits_per_dimension(-1.0, 0), r"got num_dims=0 and levels=256, wanted both >= 1"),
    ],
)
def test_errors_say_got_wanted_remedy(call, message):
    with pytest.raises(ValueError, match=message):
        call()
