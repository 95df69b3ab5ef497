"""The laboratory of gradient estimators: what it measures is what is known of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.inference.bounds import elbo, iwae, vr_max
from pyro_vae.inference.estimators import ESTIMATORS
from pyro_vae.judging.distances import gradient_quality
from pyro_vae.judging.gradients import _Part, gradient_lab
from tests.pairs import binary, small_pair

REPARAMETERIZED, LANDING, DOUBLY, SCORE = ESTIMATORS


class Gaussian(nn.Module):
    """p(z) = N(m, I), p(x | z) = N(z, I), q(z | x) = N(A x + b, 2/3 I): Rainforth et al.'s example."""

    def __init__(self, dim=4, off=0.1, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.mean = nn.Parameter(torch.zeros(dim, dtype=torch.float64))
        noise = torch.randn(dim, dim + 1, generator=generator, dtype=torch.float64) * off
        self.matrix = nn.Parameter(torch.eye(dim, dtype=torch.float64) / 2 + noise[:, :-1])
        self.shift = nn.Parameter(noise[:, -1].clone())
        self.x = torch.randn(1, dim, generator=generator, dtype=torch.float64) * 2**0.5

    def model(self, x):
        mean = pyro.param("mean", self.mean)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(mean, 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

    def guide(self, x):
        loc = x @ pyro.param("matrix", self.matrix).T + pyro.param("shift", self.shift)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, (2 / 3) ** 0.5).to_event(1))


class Plain:
    """The same as two plain functions, so that nothing but their statements says whose parameters are whose."""

    def __init__(self, pair):
        self.pair = pair

    def model(self, x):
        self.pair.model(x)

    def guide(self, x):
        self.pair.guide(x)


@pytest.mark.slow
def test_the_landing_is_biased_and_the_others_are_not():
    pair = Gaussian(dim=2, off=0.4)
    plain = Plain(pair)
    lab = gradient_lab(plain.model, plain.guide, pair.x, num_samples=(1, 4), repeats=400)
    assert lab.reference == REPARAMETERIZED and lab.reference_repeats == 1600 and not lab.skipped
    assert lab.num_parameters == {"encoder": 6, "decoder": 2}
    for row in lab.measured:
        if (row.estimator, row.num_samples, row.part) == (LANDING, 4, "encoder"):
            assert row.bias_p_value < 1e-6 and row.squared_bias > 4 * row.squared_bias_stderr
            assert row.relative_bias > 0.1
        else:
            assert row.bias_p_value > 1e-3, row
            assert abs(row.squared_bias) < 4 * row.squared_bias_stderr, row
    # The decoder's gradient is one and the same in three of them, sample by sample.
    same = [lab.row(e, 4, "decoder") for e in (REPARAMETERIZED, LANDING, DOUBLY)]
    assert same[0].variance == pytest.approx(same[1].variance) == pytest.approx(same[2].variance)
    assert lab.row(REPARAMETERIZED, 4).variance > lab.row(DOUBLY, 4).variance
    assert lab.row(SCORE, 1).variance > 4 * lab.row(REPARAMETERIZED, 1).variance
    text = str(lab)
    assert "bias against 1600 of reparameterized" in text and "doubly-reparameterized" in text and "±" in text
    assert all(p.grad is None for p in pair.parameters())


def test_the_mean_gradient_and_variance_have_closed_forms():
    """For the ELBO at K = 1: d/db E log w = A x + b pulled to the posterior mean x/2, and its exact noise."""
    pair = Gaussian(dim=3, off=0.3)
    lab = gradient_lab(pair.model, pair.guide, pair.x, estimators=(REPARAMETERIZED,), num_samples=(1,), repeats=800,
                       bound=elbo, reference_repeats=800)  # fmt: skip
    x, loc = pair.x[0], (pair.x @ pair.matrix.T + pair.shift)[0].detach()
    pull = x - 2 * loc  # d/dz of -(z^2 + (x - z)^2) / 2 at the mean
    encoder, decoder = lab.row(REPARAMETERIZED, 1), lab.row(REPARAMETERIZED, 1, "decoder")
    inflow = 1 + x.square().sum()  # b and the rows of A
    # log w along z: -z + (x - z) + (z - loc) / s^2 on the path, less the same by the score: x - 2 z in all.
    norm = (pull.square().sum() * inflow).sqrt().item()
    variance = (4 * 2 / 3 * 3 * inflow / 12).item()
    assert abs(encoder.variance - variance) < 4 * encoder.variance_stderr
    assert abs(encoder.norm - norm) < 4 * math.sqrt(12 * variance / 800)
    assert abs(encoder.snr - norm / math.sqrt(12 * variance)) < 4 * encoder.snr_stderr
    # d/dm log p(z; m) = z - m.
    assert abs(decoder.variance - 2 / 3) < 4 * decoder.variance_stderr
    assert abs(decoder.norm - loc.norm().item()) < 4 * math.sqrt(2 / 800)


def test_the_signal_of_the_encoder_falls_or_rises_with_k():
    pair = Gaussian(dim=2, off=0.4)
    lab = gradient_lab(pair.model, pair.guide, pair.x, estimators=(REPARAMETERIZED, DOUBLY), num_samples=(8, 32, 128),
                       repeats=400, reference_repeats=20)  # fmt: skip
    falls, rises = lab.slope(REPARAMETERIZED), lab.slope(DOUBLY)
    assert abs(falls[0] + 0.5) < max(4 * falls[1], 0.2) and falls[0] + 2 * falls[1] < 0
    assert rises[0] - 4 * rises[1] > 0
    with pytest.raises(ValueError, match="got 0 values of K with an SNR of 'score-function'"):
        lab.slope(SCORE)
    with pytest.raises(ValueError, match=r"got \('score-function', 8, 'encoder'\), wanted one of"):
        lab.row(SCORE, 8)


def test_the_picture_has_one_curve_where_the_estimators_agree():
    pair = Gaussian()
    options = {"estimators": (REPARAMETERIZED, LANDING), "num_samples": (2, 4), "repeats": 10}
    lab = gradient_lab(pair.model, pair.guide, pair.x, **options)
    ours, theirs = (lab.row(name, 4, "decoder").snr for name in (REPARAMETERIZED, LANDING))
    assert ours == pytest.approx(theirs) and lab.row(LANDING, 4).snr != pytest.approx(lab.row(REPARAMETERIZED, 4).snr)
    axes = lab.plot().axes[0]
    words = {text.get_text() for text in axes.get_legend().get_texts()}
    assert words == {f"{REPARAMETERIZED} (encoder)", f"{LANDING} (encoder)", "all (decoder)"}
    line = next(line for line in axes.lines if line.get_label() == "all (decoder)")
    assert list(line.get_ydata()) == pytest.approx([lab.row(LANDING, k, "decoder").snr for k in (2, 4)])


def correlated(rows, seed, shift=0.0):
    """Gradients of 5 parameters with a known covariance."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.tril(torch.ones(5, 5, dtype=torch.float64))
    return torch.randn(rows, 5, generator=generator, dtype=torch.float64) @ root.T + shift


def test_the_test_of_bias_has_its_level_and_the_errors_are_errors():
    found = [gradient_quality(correlated(60, s), correlated(120, 10_000 + s)) for s in range(300)]
    p = torch.tensor([f[2] for f in found])
    for level in (0.05, 0.2, 0.5):
        assert abs((p < level).double().mean() - level) < 4 * math.sqrt(level * (1 - level) / 300) + 0.02
    shifted = [gradient_quality(correlated(60, s, 0.8), correlated(120, 10_000 + s)) for s in range(300)]
    bias = torch.tensor([f[0] for f in shifted])
    assert abs(bias.mean() - 5 * 0.8**2) < 4 * bias.std() / math.sqrt(300)  # unbiased, though means are noisy
    assert torch.tensor([f[1] for f in shifted]).mean() == pytest.approx(bias.std().item(), rel=0.15)
    variance = torch.tensor([f[4] for f in shifted])
    assert abs(variance.mean() - 3) < 4 * variance.std() / math.sqrt(300)
    assert torch.tensor([f[5] for f in shifted]).mean() == pytest.approx(variance.std().item(), rel=0.15)
    snr = torch.tensor([f[6] for f in shifted])
    assert abs(snr.mean() - math.sqrt(5 * 0.8**2 / 15)) < 0.02
    assert torch.tensor([f[7] for f in shifted]).mean() == pytest.approx(snr.std().item(), rel=0.2)


def test_discrete_latents_have_a_score_function_only():
    logit = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.tensor(0.4).double()))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=pyro.param("logit", logit).expand(len(x))))

    lab = gradient_lab(model, guide, torch.ones(2).double(), num_samples=(2,), repeats=50)
    assert lab.reference == SCORE and [r.estimator for r in lab.measured] == [SCORE]
    assert {e for e, _, _ in lab.skipped} == {REPARAMETERIZED, LANDING, DOUBLY}
    assert "left out: reparameterized at K = 2: guide site 'z' has no reparameterised sampler" in str(lab)
    assert math.isnan(lab.measured[0].cost) and lab.num_parameters == {"encoder": 1}


def test_a_vae_shared_parameters_and_seeds():
    model, guide = small_pair()
    labs = [gradient_lab(model, guide, binary(), estimators=(REPARAMETERIZED, DOUBLY), num_samples=(3,), repeats=10,
                         max_parameters=50) for _ in range(2)]  # fmt: skip
    assert labs[0].measured[0].variance == labs[1].measured[0].variance and labs[0].num_data == 12
    assert labs[0].num_parameters["encoder"] == sum(p.numel() for p in guide.parameters())
    assert labs[0].row(REPARAMETERIZED, 3).cost == 1.0
    torch.manual_seed(0)
    part = _Part([torch.zeros(30), torch.zeros(7, 10)], 20)
    assert (
        part.size == 100 and part.pick([torch.arange(30.0), torch.arange(30.0, 100.0)]).tolist() == part.index.tolist()
    )

    pair = Gaussian(dim=2)

    def shared(x):
        mean = pyro.param("mean", pair.mean)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(mean + x @ pair.matrix.T, 1.0).to_event(1))

    lab = gradient_lab(pair.model, shared, (pair.x,), estimators=(LANDING,), num_samples=(2,), repeats=10)
    # Both programs hold the module: what neither declares is of both, as of two methods of one module.
    assert lab.num_parameters == {"shared": 2 + 4 + 2}


def test_what_is_refused():
    model, guide = small_pair()
    x = binary()
    with pytest.raises(ValueError, match="unknown estimator 'magic', wanted one of reparameterized"):
        gradient_lab(model, guide, x, estimators=("magic",))
    with pytest.raises(ValueError, match="got repeats=5, wanted at least 10 gradients"):
        gradient_lab(model, guide, x, repeats=5)
    with pytest.raises(ValueError, match="sticking-the-landing', which is biased"):
        gradient_lab(model, guide, x, reference=LANDING)
    with pytest.raises(ValueError, match="got no estimator or no K"):
        gradient_lab(model, guide, x, num_samples=())
    with pytest.raises(ValueError, match="none of the estimators goes with this bound.*continuous in the weights"):
        gradient_lab(model, guide, x, estimators=(DOUBLY,), num_samples=(2,), repeats=10, bound=vr_max)

    def nothing(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x, 1.0))

    def observing(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(x, 1.0)), 1.0), obs=x)

    with pytest.raises(ValueError, match="neither model nor guide has parameters"):
        gradient_lab(observing, nothing, torch.zeros(2), bound=iwae)
