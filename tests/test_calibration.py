"""Simulation-based calibration: uniform for the exact posterior, and for no other."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.judging._calibration import calibration, sbc
from pyro_vae.judging.components import Components
from pyro_vae.programs.zoo import autoencoder
from tests.pairs import binary, linear_pair, small_pair


class Shifted:
    """The exact posterior of the linear-Gaussian bed, moved by a share of its standard deviation."""

    def __init__(self, pair, shift):
        self.pair, self.shift = pair, shift

    def guide(self, x):
        posterior = self.pair.bed.posterior(x)
        with pyro.plate("data", len(x)):
            moved = posterior.mean + self.shift * posterior.stddev
            pyro.sample("z", dist.MultivariateNormal(moved, scale_tril=posterior.scale_tril))


def uniform(size, count, num_draws, seed):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, num_draws + 1, (size, count)))


def test_the_exact_posterior_is_calibrated():
    pair, x = linear_pair()
    result = sbc(pair.model, pair.guide, x, num_data=1500)
    assert result.calibrated and result.verdicts == ("calibrated",) * 3
    assert result.names == ("z[0]", "z[1]", "z[2]") and result.ranks.shape == (1500, 3)
    assert result.ranks.min() == 0 and result.ranks.max() == 99
    assert result.coverage().inside.all() and result.ecdf().inside.all()
    share, error = result.covered(0.8)
    assert ((share - 0.8).abs() < 4 * error).all()
    assert "calibrated as far as it sees" in str(result) and "1500 simulated data, 99 draws" in str(result)


@pytest.mark.parametrize(("stretch", "verdict"), [(0.8, "too narrow"), (1.25, "too wide")])
def test_a_guide_of_the_wrong_width_is_not(stretch, verdict):
    pair, x = linear_pair(stretch=stretch)
    result = sbc(pair.model, pair.guide, x, num_data=1500)
    assert not result.calibrated and result.verdicts == (verdict,) * 3
    assert not result.coverage().inside.any() and not result.ecdf().inside.any()
    # A Gaussian's interval of +- 1.645 s covers this much of a Gaussian of another width.
    share, error = result.covered(0.9)
    expected = math.erf(stretch * 1.6449 / math.sqrt(2))
    assert ((share - expected).abs() < 4 * error + 0.005).all()  # its ends are the draws', not the quantiles
    assert "not calibrated, 3 of 3 components" in str(result) and f"] {verdict} (p = " in str(result)


def test_a_guide_of_the_wrong_place_is_not():
    pair, x = linear_pair()
    for shift, verdict in ((-0.3, "too low"), (0.3, "too high")):
        result = sbc(pair.model, Shifted(pair, shift).guide, x, num_data=1000)
        assert result.verdicts == (verdict,) * 3


def test_a_mean_field_guide_on_a_correlated_posterior_is_too_narrow():
    pair, x = linear_pair(exact=False)
    result = sbc(pair.model, pair.guide, x, num_data=1500)
    posterior = pair.bed.posterior(x[:1])
    narrow = pair.bed.best_mean_field(x[:1]).stddev / posterior.stddev
    assert narrow.min() < 0.85
    assert result.verdicts[int(narrow.argmin())] == "too narrow"


@pytest.mark.parametrize("count", [1, 8])
def test_the_false_positive_rate_is_nominal(count):
    """Of the verdict on all components together, of the bands, and of the chi-square test."""
    tries, size, num_draws, level = 250, 200, 19, 0.9
    results = [calibration(tuple("abcdefgh"[:count]), uniform(size, count, num_draws, s), num_draws, level=level)
               for s in range(tries)]  # fmt: skip
    slack = 4 * math.sqrt(0.1 * 0.9 / tries)
    for failed in (
        np.mean([not r.calibrated for r in results]),
        np.mean([not bool(r.ecdf().inside.all()) for r in results]),
        np.mean([not bool(r.coverage().inside.all()) for r in results]),
    ):
        assert failed < 0.1 + slack
        assert failed > 0.1 / 3 - slack  # discrete, and Holm's: somewhat less than nominal
    p = torch.cat([r.p_value for r in results])
    assert abs((p < 0.2).double().mean() - 0.2) < 4 * math.sqrt(0.16 / len(p)) + 0.02
    chi = torch.cat([r.chi_square for r in results])
    assert abs((chi < 0.2).double().mean() - 0.2) < 4 * math.sqrt(0.16 / len(chi)) + 0.02


def test_verdict_and_band_agree():
    for seed in range(40):
        ranks = torch.from_numpy(np.random.default_rng(seed).beta(1.15, 1.15, (300, 1)) * 20).long()
        result = calibration(("a",), ranks, 19)
        if abs(result.p_value.item() - 0.05) > 0.01:
            assert result.calibrated == bool(result.ecdf().inside.all())


def test_holm_is_that_of_the_textbook():
    ranks = uniform(300, 4, 19, 0)
    ranks[:, 2] = ranks[:, 2] // 2
    result = calibration(("a", "b", "c", "d"), ranks, 19)
    order = result.p_value.argsort()
    worst = 0.0
    for place, i in enumerate(order.tolist()):
        worst = max(worst, (4 - place) * result.p_value[i].item())
        assert result.adjusted[i].item() == pytest.approx(min(worst, 1.0))
    assert result.verdicts[2] == "too high" and result.passed.tolist() == [True, True, False, True]
    assert result.p_value[2] < 1e-10  # below the resolution of 10,000 simulations


def two_layers(x, y):
    """A scalar site above, an inner plate of two below, data in a plate to the right of it."""
    data = pyro.plate("batch", len(x), dim=-1)
    with data:
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        seen = pyro.sample("seen", dist.Normal(top + y, 1.0), obs=x)
    with data, pyro.plate("pair", 2, dim=-2):
        pyro.sample("low", dist.Normal(torch.tensor([[0.0], [5.0]]).expand(2, len(x)), 1.0))
    return seen


def two_layer_guide(x, y, wide=1.0):
    data = pyro.plate("batch", len(x), dim=-1)
    with data:
        pyro.sample("top", dist.Normal((x - y) / 2, 0.5**0.5))
    with data, pyro.plate("pair", 2, dim=-2):
        pyro.sample("low", dist.Normal(torch.tensor([[0.0], [5.0]]).expand(2, len(x)), torch.tensor([[1.0], [wide]])))


def test_several_sites_inner_plates_and_arguments():
    x, y = torch.randn(50), torch.linspace(-9, 9, 50)
    components = Components(two_layers, (x, y))
    assert components.names == ("top", "low[0]", "low[1]")
    values = {"top": torch.arange(4.0 * 50).reshape(4, 50), "low": torch.arange(4.0 * 100).reshape(4, 2, 50)}
    columns = components.columns(values)
    assert columns.shape == (4, 50, 3) and columns[1, 7].tolist() == [57.0, 107.0, 157.0]
    result = sbc(two_layers, two_layer_guide, (x, y), num_data=600)  # y stays with its datum
    assert result.calibrated, str(result)

    def wide(x, y):
        two_layer_guide(x, y, wide=1.5)

    assert sbc(two_layers, wide, (x, y), num_data=600).verdicts == ("calibrated", "calibrated", "too wide")


def test_discrete_latents_share_their_ranks():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.3))
            pyro.sample("x", dist.Normal(4.0 * z, 1.0), obs=x)

    def guide(x, shift=0.0):
        with pyro.plate("data", len(x)):
            odds = 4 * x - 8 + math.log(0.3 / 0.7) + shift
            pyro.sample("z", dist.Bernoulli(logits=odds))

    def wrong(x):
        guide(x, 3.0)

    x = torch.zeros(100)
    assert sbc(model, guide, x, num_data=1000).calibrated
    assert not sbc(model, wrong, x, num_data=2000).calibrated


def test_an_untrained_vae_and_seeds():
    model, guide = small_pair()
    first, again = (sbc(model, guide, binary(), num_data=300) for _ in range(2))
    assert torch.equal(first.ranks, again.ranks)
    assert not torch.equal(first.ranks, sbc(model, guide, binary(), num_data=300, seed=1).ranks)
    assert first.histogram().shape == (20, 3) and (first.histogram().sum(0) == 300).all()


def test_what_is_refused():
    pair, x = linear_pair()
    with pytest.raises(ValueError, match=r"got num_samples=100, wanted an odd number such as 99"):
        sbc(pair.model, pair.guide, x, num_samples=100)
    with pytest.raises(ValueError, match=r"got level=1.5, wanted a probability such as 0.95"):
        sbc(pair.model, pair.guide, x, level=1.5)
    with pytest.raises(ValueError, match=r"got num_data=1, wanted at least two"):
        sbc(pair.model, pair.guide, x, num_data=1)
    with pytest.raises(ValueError, match=r"got ranks of shape \(5, 2\) for 1 components"):
        calibration(("a",), torch.zeros(5, 2), 9)

    def hidden(x):
        pair.model(2 * x)

    with pytest.raises(ValueError, match=r"Say which it is by its position: observed=\{'x': 0\}"):
        sbc(hidden, pair.guide, x)
    torch.manual_seed(0)
    point = autoencoder((1, 4, 4), latent_dim=2, hidden=(8,))
    with pytest.raises(ValueError, match=r"'z' is a point \(Delta\).*no uncertainty"):
        sbc(point.model, point.guide, binary())
