"""Likelihoods of grey values, grey levels and counts against mpmath, scipy and sums over all values."""

import math

import mpmath
import numpy as np
import pyro
import pytest
import scipy.integrate
import scipy.stats
import torch
from pyro.infer import Trace_ELBO
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_vae.data.binarization import bits_per_dimension
from pyro_vae.inference.bounds import elbo, iwae
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit
from pyro_vae.parts.distributions.bernoulli import ContinuousBernoulliLogits
from pyro_vae.parts.distributions.counts import NegativeBinomialLogMean, PoissonLogRate
from pyro_vae.parts.distributions.levels import CategoricalLevels, GreyLevels
from pyro_vae.parts.distributions.levels import DiscretizedLogistic as Rounded
from pyro_vae.parts.likelihoods.discrete import (
    Categorical,
    DiscretizedLogistic,
    MixtureOfDiscretizedLogistics,
    NegativeBinomial,
    Poisson,
)
from pyro_vae.parts.likelihoods.likelihood import ContinuousBernoulli
from pyro_vae.parts.networks.dense import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.pair import Guide, Model, observed_part
from pyro_vae.testing import LikelihoodLaws

EPS32 = torch.finfo(torch.float32).eps


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grey(levels=256, dtype=torch.float64):
    """All grey levels as the data module gives them: v / (L - 1)."""
    return torch.arange(levels, dtype=dtype) / (levels - 1)


def within_four_standard_errors(draws, mean, variance):
    """Of the mean, by the exact variance; of the variance, by the fourth moment of the draws."""
    draws, n = draws.double(), len(draws)
    assert ((draws.mean(0) - mean).abs() <= 4 * (variance / n) ** 0.5 + 1e-12).all()
    square = (draws - mean) ** 2
    common = variance > 1e-3  # a pixel that hardly ever changes has no fourth moment to speak of
    assert ((square.mean(0) - variance).abs() <= 4 * square.std(0) / n**0.5 + 1e-12)[common].all()


# Every likelihood obeys the laws


class TestContinuousBernoulliLaws(LikelihoodLaws):
    def make(self):
        return ContinuousBernoulli(MLP(2, [6], (1, 2, 2)))


class TestDiscretizedLogisticLaws(LikelihoodLaws):
    def make(self):
        return DiscretizedLogistic(MLP(2, [6], (4, 1, 2)), levels=16)


class TestMixtureOfDiscretizedLogisticsLaws(LikelihoodLaws):
    def make(self):
        return MixtureOfDiscretizedLogistics(MLP(2, [6], (18, 1, 2)), num_components=3, levels=16)


class TestCategoricalLaws(LikelihoodLaws):
    def make(self):
        return Categorical(MLP(2, [6], (10, 1, 2)), levels=5)


class TestPoissonLaws(LikelihoodLaws):
    def make(self):
        return Poisson(MLP(2, [6], (1, 2, 2)))


class TestNegativeBinomialLaws(LikelihoodLaws):
    def make(self):
        return NegativeBinomial(MLP(2, [6], (1, 2, 2)))


class TestNegativeBinomialNetworkLaws(LikelihoodLaws):
    def make(self):
        return NegativeBinomial(MLP(2, [6], (4, 1, 2)), "network", link="exp")


# The continuous Bernoulli

LOGITS = [0.0, 1e-30, 1e-9, 1e-4, 4.1e-3, 0.02, 0.3, 0.999999, 1.0, 1.000001, 3.0, 10.0, 16.0, 40.0, 200.0, 1000.0]
LOGITS = LOGITS + [-value for value in LOGITS]


def oracle(logit, x, order):
    """d^order/dl^order log p(x; l) for order 0, 1, 2 and 3, by mpmath with 100 digits."""
    with mpmath.workdps(100):
        # The k-th derivative of A: cumulants of a uniform variable tilted by l. At l = 0 a limit, from nearby.
        t, x = mpmath.mpf(logit) + (mpmath.mpf("1e-25") if abs(logit) < 1e-20 else 0), mpmath.mpf(x)
        s, c = mpmath.sinh(t / 2), mpmath.cosh(t / 2)
        if order == 0:
            return float(t * x - mpmath.log(mpmath.expm1(t) / t))
        if order == 1:
            return float(x - (c / s / 2 + mpmath.mpf(1) / 2 - 1 / t))
        if order == 2:
            return float(-(1 / t**2 - 1 / (4 * s**2)))
        return float(-(-2 / t**3 + c / (4 * s**3)))


@pytest.mark.parametrize("x", [0.0, 0.3, 0.5, 0.9991, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_and_three_derivatives_are_right_at_all_logits(x, dtype):
    """Relative to the size of the number (log p: and to 1), a few roundings of the dtype each."""
    logits = torch.tensor(LOGITS, dtype=dtype, requires_grad=True)
    given = torch.tensor(x, dtype=dtype)
    got = [ContinuousBernoulliLogits(logits).log_prob(given)]
    for _ in range(3):
        got.append(torch.autograd.grad(got[-1].sum(), logits, create_graph=True)[0])
    eps = torch.finfo(dtype).eps
    for order, values in enumerate(got):
        wanted = [oracle(logit, given.item(), order) for logit in logits.tolist()]
        wanted = torch.tensor(wanted, dtype=torch.float64)
        floor = 1.0 if order == 0 else 0.1
        error = (values.double() - wanted).abs() / wanted.abs().clamp(min=floor)
        assert error.max() < [4, 16, 100, 1000][order] * eps, (order, error.max() / eps)


def test_torchs_continuous_bernoulli_is_not_right_there():
    """What ours is for: should torch mend it, use torch's."""
    theirs = torch.distributions.ContinuousBernoulli(logits=torch.tensor(200.0), validate_args=False)
    assert abs(theirs.log_prob(torch.tensor(0.3)).item() - oracle(200.0, 0.3, 0)) > 2
    logits = torch.tensor(4.1e-3, requires_grad=True)
    theirs = torch.distributions.ContinuousBernoulli(logits=logits, validate_args=False)
    first = torch.autograd.grad(theirs.log_prob(torch.tensor(0.3)), logits, create_graph=True)[0]
    assert abs(torch.autograd.grad(first, logits)[0].item() - oracle(4.1e-3, 0.3, 2)) > 0.1


@pytest.mark.parametrize("logit", [0.0, 0.5, -0.99, 1.01, -8.0, 60.0])
def test_continuous_bernoulli_integrates_to_one_with_its_mean_variance_and_entropy(logit):
    pixel = ContinuousBernoulliLogits(torch.tensor(logit, dtype=torch.float64))

    def moment(function):
        def integrand(x):
            log_p = pixel.log_prob(torch.tensor(x, dtype=torch.float64)).item()
            return function(x, log_p) * math.exp(log_p)

        return scipy.integrate.quad(integrand, 0, 1, epsabs=1e-13, epsrel=1e-13)[0]

    assert abs(moment(lambda x, _: 1) - 1) < 1e-12
    mean = moment(lambda x, _: x)
    assert abs(pixel.mean.item() - mean) < 1e-12
    assert abs(pixel.variance.item() - moment(lambda x, _: (x - mean) ** 2)) < 1e-12
    assert abs(pixel.entropy().item() + moment(lambda _, log_p: log_p)) < 1e-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_continuous_bernoulli_mean_and_variance_keep_their_digits(dtype):
    logits = torch.tensor(LOGITS, dtype=dtype)
    pixel = ContinuousBernoulliLogits(logits)
    mean = torch.tensor([-oracle(v, 0.0, 1) for v in logits.tolist()], dtype=torch.float64)
    variance = torch.tensor([-oracle(v, 0.0, 2) for v in logits.tolist()], dtype=torch.float64)
    eps = torch.finfo(dtype).eps
    assert ((pixel.mean.double() - mean).abs() <= 4 * eps * mean).all()
    assert ((pixel.variance.double() - variance).abs() <= 40 * eps * variance).all()


@pytest.mark.parametrize("logit", [0.0, 1e-12, 0.7, -0.7, 0.9999, 1.0001, -5.0, 5.0, 30.0, -30.0])
def test_continuous_bernoulli_quantiles_and_their_derivatives(logit):
    """x(u) and dx/dl, d2x/dl2 against mpmath, through l = 0 and where the branches meet."""
    u = torch.tensor([1e-6, 0.01, 0.3, 0.5, 0.9, 0.999], dtype=torch.float64)
    logits = torch.full_like(u, logit).requires_grad_()
    got = [ContinuousBernoulliLogits(logits).icdf(u)]
    for _ in range(2):
        got.append(torch.autograd.grad(got[-1].sum(), logits, create_graph=True)[0])

    with mpmath.workdps(80):
        shift = mpmath.mpf("1e-12") if abs(logit) < 1e-3 else 0  # off 0/0 where derivatives are taken by differences

        def quantile(share):
            return lambda t: mpmath.log(1 + share * mpmath.expm1(t)) / t

        for order, values in enumerate(got):
            wanted = [mpmath.diff(quantile(mpmath.mpf(s)), mpmath.mpf(logit) + shift, order) for s in u.tolist()]
            wanted = torch.tensor([float(w) for w in wanted], dtype=torch.float64)
            # Some roundings, those of 1 - u in the last few draws of a million, and the shift where there is one.
            allowed = 1e-13 + 1e-12 * wanted.abs() + 2**-52 / u + 2e-12 * bool(shift)
            assert ((values - wanted).abs() <= allowed).all(), order


def test_continuous_bernoulli_draws_have_its_moments_and_a_path_to_the_logits():
    torch.manual_seed(0)
    logits = torch.tensor([-50.0, -3.0, -0.2, 0.0, 0.99, 4.0, 300.0], dtype=torch.float64, requires_grad=True)
    pixel = ContinuousBernoulliLogits(logits)
    draws = pixel.rsample(torch.Size([50_000]))
    assert pixel.has_rsample and ((draws >= 0) & (draws <= 1)).all()
    within_four_standard_errors(draws.detach(), pixel.mean.detach(), pixel.variance.detach())
    for i in range(len(logits)):  # d E[x] / dl is the variance
        path = torch.autograd.grad(draws[:, i].sum(), logits, retain_graph=True)[0][i] / len(draws)
        # Var(dx/dl) from a smaller set of single derivatives.
        with torch.no_grad():
            few = logits[i].expand(2000)
        few = few.clone().requires_grad_()
        singles = torch.autograd.grad(ContinuousBernoulliLogits(few).rsample().sum(), few)[0]
        assert abs(path - pixel.variance[i]) < 4 * singles.std() / len(draws) ** 0.5 + 1e-12


def test_continuous_bernoulli_in_float32_draws_finite_numbers_and_gradients():
    torch.manual_seed(0)
    logits = torch.tensor([-1e4, -90.0, 0.0, 1.0, 90.0, 1e4]).repeat(20_000, 1).requires_grad_()
    draws = ContinuousBernoulliLogits(logits).rsample()
    (gradient,) = torch.autograd.grad(draws.sum(), logits)
    assert torch.isfinite(draws).all() and torch.isfinite(gradient).all() and draws.min() >= 0 and draws.max() <= 1


def test_continuous_bernoulli_has_right_derivatives_in_both_arguments():
    logits = torch.tensor([[-4.0, -0.5, 0.2, 2.0]], dtype=torch.float64, requires_grad=True)
    x = random(3, 1).sigmoid().requires_grad_()

    def log_prob(logits, x):
        return ContinuousBernoulliLogits(logits).log_prob(x)

    assert gradcheck(log_prob, (logits, x)) and gradgradcheck(log_prob, (logits, x))


# Grey levels


def exact_level(loc, scale, v, levels=256):
    """log P(v) of a rounded logistic by mpmath, from the plain difference of sigmoids."""
    with mpmath.workdps(2500):
        top = levels - 1
        m, s = mpmath.mpf(loc) * top, mpmath.mpf(scale) * top

        def sigmoid(t):
            return 1 / (1 + mpmath.exp(-t))

        lower = 0 if v == 0 else sigmoid((v - mpmath.mpf("0.5") - m) / s)
        upper = 1 if v == top else sigmoid((v + mpmath.mpf("0.5") - m) / s)
        return float(mpmath.log(upper - lower))


@pytest.mark.parametrize("loc", [0.5, 0.0, 1.0, -0.7, 1.3, 0.2])
@pytest.mark.parametrize("scale", [5e-4, 4e-3, 0.1, 3.0, 1e4])
def test_a_rounded_logistic_is_the_difference_of_sigmoids(loc, scale):
    levels = [0, 1, 50, 51, 127, 128, 254, 255]
    wanted = torch.tensor([exact_level(loc, scale, v) for v in levels], dtype=torch.float64)
    got = Rounded(torch.tensor(loc, dtype=torch.float64), torch.tensor(scale, dtype=torch.float64))
    assert torch.allclose(got.log_prob(grey()[levels]), wanted, rtol=1e-11, atol=1e-12)
    # In float32 the location itself is known to 1e-5 levels, which the scale turns into a relative error.
    loc32, scale32 = torch.tensor(loc), torch.tensor(scale)
    wanted = torch.tensor([exact_level(loc32.item(), scale32.item(), v) for v in levels], dtype=torch.float64)
    got = Rounded(loc32, scale32).log_prob(grey(dtype=torch.float32)[levels])
    allowed = 1e-6 * wanted.abs() + 4 * EPS32 * (1 + 1 / scale)
    assert ((got.double() - wanted).abs() <= allowed).all()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_probabilities_of_all_levels_sum_to_one(dtype, tolerance):
    torch.manual_seed(0)
    loc = torch.cat([torch.tensor([0.0, 0.5, 1.0, -3.0, 4.0]), torch.rand(200)]).to(dtype)
    scale = torch.logspace(math.log10(5e-4), 2, 30, dtype=dtype).unsqueeze(-1)
    x = grey(dtype=dtype).view(256, 1, 1)
    total = Rounded(loc, scale).log_prob(x).double().exp().sum(0)
    assert total.shape == (30, 205) and (total - 1).abs().max() < tolerance
    logits = 3 * random(7, 256).to(dtype)
    total = CategoricalLevels(logits).log_prob(x[..., 0]).double().exp().sum(0)
    assert (total - 1).abs().max() < tolerance


def test_a_rounded_logistic_has_finite_derivatives_that_are_right():
    loc = torch.tensor([0.5, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor([0.002, 0.05, 0.6], dtype=torch.float64, requires_grad=True)
    x = grey()[[0, 3, 128, 255]].unsqueeze(-1)

    def log_prob(loc, scale):
        return Rounded(loc, scale).log_prob(x)

    assert gradcheck(log_prob, (loc, scale), eps=1e-8, atol=1e-4, rtol=1e-5)
    loc32 = torch.tensor([-50.0, 0.5, 50.0]).repeat(3, 1).requires_grad_()
    scale32 = torch.tensor([[5e-4], [0.1], [1e6]]).repeat(1, 3).requires_grad_()
    value = Rounded(loc32, scale32).log_prob(grey(dtype=torch.float32).view(256, 1, 1))
    gradients = torch.autograd.grad(value.sum(), (loc32, scale32))
    assert torch.isfinite(value).all() and all(torch.isfinite(g).all() for g in gradients)
    # Far below the data the log density still says which way to go: d log p / d loc is 1 / scale.
    assert torch.allclose(torch.autograd.grad(Rounded(loc32, scale32).log_prob(torch.tensor(0.2)).sum(), loc32)[0][0, 0],
                          torch.tensor(1 / 5e-4))  # fmt: skip


def test_a_decoder_that_runs_away_costs_no_number():
    """Outputs of any size, as in a step too long: log p and its gradient stay finite in float32."""
    u, t = (
        v.flatten()
        for v in torch.meshgrid(
            torch.tensor([-1e8, -3.0, 0.0, 1e8]), torch.tensor([-200.0, 0.0, 88.0, 1e4]), indexing="ij"
        )
    )
    for likelihood, output in (
        (DiscretizedLogistic(nn.Identity()), torch.stack([u, t], 1)),
        (MixtureOfDiscretizedLogistics(nn.Identity(), num_components=2), torch.stack([u, -u, u, -u, t, t], 1)),
    ):
        output.requires_grad_()
        for x in (0.0, 7 / 255, 1.0):
            value = likelihood.family(*output.chunk(likelihood.parameters_per_pixel, 1)).log_prob(torch.tensor(x))
            (gradient,) = torch.autograd.grad(value.sum(), output)
            assert torch.isfinite(value).all() and torch.isfinite(gradient).all()
        assert torch.isfinite(likelihood(output).sample()).all()


@pytest.mark.parametrize("levels", [2, 16, 256])
def test_moments_of_levels_are_those_of_the_sum_over_levels_and_of_draws(levels):
    torch.manual_seed(0)
    loc = torch.tensor([0.5, 0.03, -0.2, 1.1, 0.51], dtype=torch.float64)
    pixels = [
        Rounded(loc, torch.tensor([0.1, 0.02, 0.3, 0.05, 1e-3], dtype=torch.float64), levels),
        CategoricalLevels(2 * random(5, levels)),
    ]
    x = grey(levels).unsqueeze(-1)
    for pixel in pixels:
        p = pixel.log_prob(x).exp()
        mean = (p * x).sum(0)
        variance = (p * (x - mean) ** 2).sum(0)
        assert torch.allclose(pixel.mean, mean, atol=1e-12) and torch.allclose(pixel.variance, variance, atol=1e-12)
        draws = pixel.sample(torch.Size([40_000]))
        assert pixel.support.check(draws).all() and not pixel.has_rsample
        within_four_standard_errors(draws, mean, variance)
        counted = torch.stack([(draws == value).double().mean(0) for value in x.squeeze(-1)])
        expected = p * len(draws)
        often = expected >= 10
        chi2 = ((counted * len(draws) - expected) ** 2 / expected)[often].sum().item()
        assert chi2 < scipy.stats.chi2(int(often.sum())).isf(1e-4)


def test_the_levels_are_those_of_the_data_module():
    from pyro_vae.data.splits import Split

    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    x = Split(pixels, binarization="none")[torch.tensor([0])]
    assert GreyLevels(256).check(x).all()
    # Every level is told from its neighbours: the uniform categorical with one level favoured.
    logits = torch.zeros(256)
    logits[77] = 5.0
    log_p = CategoricalLevels(logits).log_prob(x)
    assert log_p.argmax() == 77 and (log_p > -5).sum() == 1
    # So log p is a probability's, and bits per dimension need no correction: 8 bits for the uniform.
    uniform = CategoricalLevels(torch.zeros(256, 256).view(1, 16, 16, 256)).to_event(3).log_prob(x)
    assert abs(bits_per_dimension(uniform.item(), 256, levels=1) - 8) < 1e-6


OFF = {  # data that the family gives no probability, and data that it does
    "discretized logistic": (DiscretizedLogistic, 100.5 / 256, 100 / 255),
    "mixture": (MixtureOfDiscretizedLogistics, 100.5 / 256, 100 / 255),
    "categorical": (Categorical, 100.5 / 256, 100 / 255),
    "poisson": (Poisson, 0.5, 3.0),
    "negative binomial": (NegativeBinomial, 0.5, 3.0),
    "poisson levels": (lambda d: Poisson(d, levels=256), 100.5 / 256, 100 / 255),
    "negative binomial levels": (lambda d: NegativeBinomial(d, levels=256), 100.5 / 256, 100 / 255),
    "continuous bernoulli": (ContinuousBernoulli, 1.5, 0.5),
}


@pytest.mark.parametrize("name", OFF)
def test_a_fit_refuses_data_that_the_family_cannot_have_drawn(name):
    """Inside a plate, too, where a distribution that expands to itself loses Pyro's check for good."""
    make, bad, good = OFF[name]
    torch.manual_seed(0)
    likelihood = make(nn.Linear(2, 768 * 5))
    model, guide = (
        Model(StandardNormal(2), likelihood),
        Guide(DiagonalNormal(nn.Flatten(), 2, likelihood(torch.zeros(2)).event_shape[0])),
    )
    x = torch.full((6, *likelihood(torch.zeros(2)).event_shape), good)
    for loss in (Trace_ELBO(), Objective(elbo), Objective(iwae, 3)):
        assert math.isfinite(fit(model, guide, x, loss=loss, epochs=1, progress=False)["loss"][-1])
        with pytest.raises(ValueError, match="support"):
            fit(model, guide, torch.full_like(x, bad), loss=loss, epochs=1, progress=False)


@pytest.mark.parametrize("make", [Poisson, NegativeBinomial])
def test_grey_levels_as_counts_are_the_counts_by_another_name(make):
    torch.manual_seed(0)
    counts, levels = make(nn.Identity()), make(nn.Identity(), levels=256)
    output = torch.tensor([[-3.0, -0.5, 0.0, 2.0]])
    v = torch.tensor([[0.0, 1.0, 80.0, 255.0]])
    log_mean = (255 * nn.functional.softplus(output)).log()
    same = make(nn.Identity(), link="exp")
    given_z = levels(output)
    assert torch.allclose(given_z.log_prob(v / 255), same(log_mean).log_prob(v), rtol=1e-5)
    assert torch.allclose(given_z.mean, nn.functional.softplus(output), rtol=1e-5)
    assert torch.allclose(given_z.variance, same(log_mean).variance / 255**2, rtol=1e-5)
    draws = given_z.sample(torch.Size([20_000]))
    assert ((draws * 255 - (draws * 255).round()).abs() < 1e-3).all()
    within_four_standard_errors(draws, given_z.mean.double(), given_z.variance.double())
    assert torch.allclose(counts(output).mean, nn.functional.softplus(output))


@pytest.mark.parametrize("make", [DiscretizedLogistic, Categorical, MixtureOfDiscretizedLogistics])
def test_dequantised_data_are_refused_with_the_remedy(make):
    likelihood = make(nn.Linear(2, 768 * 5))
    with pyro.validation_enabled(True):
        given_z = likelihood(torch.zeros(3, 2))
        x = torch.full((3, *given_z.event_shape), 100.5 / 256)
        with pytest.raises(ValueError, match="binarization='none' without dequantisation|support"):
            given_z.log_prob(x)
        assert torch.isfinite(given_z.log_prob(torch.full_like(x, 100 / 255))).all()


def test_a_mixture_is_the_sum_of_its_components():
    torch.manual_seed(0)
    decoder = nn.Linear(2, 3 * 4 * 6).double()
    likelihood = MixtureOfDiscretizedLogistics(decoder, num_components=4, initial_scale=0.05, minimum_scale=0.001)
    z = random(5, 2)
    c, u, t = decoder(z).view(5, 3, 4, 6).unbind(1)
    loc = torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64).view(4, 1) + u / 2
    x = grey()[torch.randint(256, (5, 6))]
    parts = Rounded(loc, 0.001 + 0.05 * t.exp()).log_prob(x.unsqueeze(1)).exp()
    wanted = (c.softmax(1) * parts).sum(1).log().sum(-1)
    given_z = likelihood(z)
    assert torch.allclose(given_z.log_prob(x), wanted, rtol=1e-12)
    draws = given_z.sample(torch.Size([20_000]))
    within_four_standard_errors(draws, given_z.mean, given_z.variance)
    assert GreyLevels(256).check(draws).all() and given_z.event_shape == (6,)


def test_the_first_channels_of_a_decoder_are_the_first_parameter():
    class Fixed(nn.Module):
        def __init__(self, output):
            super().__init__()
            self.output = output

        def forward(self, z):
            return self.output.expand(*z.shape[:-1], *self.output.shape)

    output = random(4, 3, 2, seed=3)
    given_z = DiscretizedLogistic(Fixed(output), initial_scale=0.2, minimum_scale=0.01)(torch.zeros(1, 1)).base_dist
    assert torch.allclose(given_z.loc[0], 0.5 + output[:2] / 2)
    assert torch.allclose(given_z.scale[0], 0.01 + 0.2 * output[2:].exp())
    output = random(8, 3, 2, seed=3)
    given_z = Categorical(Fixed(output), levels=4)(torch.zeros(1, 1)).base_dist
    assert torch.equal(given_z.logits[0, 1, 2, 0], output[1::2, 2, 0])


# Counts

COUNTS = torch.tensor([0.0, 1.0, 2.0, 7.0, 40.0, 1000.0, 20_000.0], dtype=torch.float64)


@pytest.mark.parametrize("mean", [1e-200, 1e-8, 0.3, 1.0, 30.0, 1e4])
def test_poisson_is_scipys(mean):
    got = PoissonLogRate(torch.tensor(mean, dtype=torch.float64).log()).log_prob(COUNTS)
    wanted = torch.from_numpy(scipy.stats.poisson(mean).logpmf(COUNTS.numpy()))
    finite = torch.isfinite(wanted)
    assert finite.any() and torch.allclose(got[finite], wanted[finite], rtol=1e-12, atol=1e-12)
    assert torch.isfinite(got).all()


def exact_negative_binomial(mean, r, x, digits=80):
    with mpmath.workdps(digits):
        m, r = mpmath.mpf(mean), mpmath.mpf(r)
        gammas = mpmath.loggamma(r + x) - mpmath.loggamma(r) - mpmath.loggamma(x + 1)
        return float(gammas - r * mpmath.log1p(m / r) + x * (mpmath.log(m) - mpmath.log(m + r)))


@pytest.mark.parametrize("mean", [1e-8, 0.3, 25.0, 1e4])
@pytest.mark.parametrize("r", [1e-3, 0.5, 29.9, 30.1, 100.0, 1e6, 1e12, 1e25])
def test_negative_binomial_is_exact_from_the_logarithmic_series_to_the_poisson(mean, r):
    log_mean, log_r = (torch.tensor(v, dtype=torch.float64).log() for v in (mean, r))
    got = NegativeBinomialLogMean(log_mean, log_r).log_prob(COUNTS)
    mean, r = mpmath.exp(mpmath.mpf(log_mean.item())), mpmath.exp(mpmath.mpf(log_r.item()))
    wanted = torch.tensor([exact_negative_binomial(mean, r, x) for x in COUNTS.tolist()], dtype=torch.float64)
    # 1e5: the size of log x! at the largest count, of which a few roundings are lost.
    scale = 1 + torch.lgamma(COUNTS + 1)
    assert ((got - wanted).abs() <= 1e-14 * scale + 1e-12 * wanted.abs()).all()
    got = NegativeBinomialLogMean(log_mean.float(), log_r.float()).log_prob(COUNTS.float())
    mean, r = (mpmath.exp(mpmath.mpf(v.float().item())) for v in (log_mean, log_r))
    wanted = torch.tensor([exact_negative_binomial(mean, r, x) for x in COUNTS.tolist()], dtype=torch.float64)
    assert ((got - wanted).abs() <= 8 * EPS32 * (scale + wanted.abs()) + 4 * EPS32 * float(mean) * 12).all()


@pytest.mark.parametrize("log_r", [-300.0, -100.0, -60.0, -20.0, 55.0, 100.0, 300.0])
@pytest.mark.parametrize("log_mean", [-100.0, 0.0, 5.0, 30.0])
def test_negative_binomial_in_float32_where_the_concentration_leaves_its_range(log_r, log_mean):
    """Value and gradient are those of exact arithmetic, from certain zeros with rare giants to the Poisson."""
    x = [0.0, 1.0, 7.0, 1000.0]
    given = [torch.full((4,), v, requires_grad=True) for v in (log_mean, log_r)]
    value = NegativeBinomialLogMean(*given).log_prob(torch.tensor(x))
    gradients = torch.autograd.grad(value.sum(), given)
    exact: list[list[float]] = [[], [], []]
    with mpmath.workdps(300):
        m, r = mpmath.exp(mpmath.mpf(log_mean)), mpmath.exp(mpmath.mpf(log_r))
        for v in map(mpmath.mpf, x):
            exact[0].append(exact_negative_binomial(m, r, v, 300))
            exact[1].append(float(r * (v - m) / (r + m)))
            slope = mpmath.digamma(r + v) - mpmath.digamma(r) - mpmath.log1p(m / r) + (m - v) / (r + m)
            exact[2].append(float(r * slope))
    for got, wanted in zip((value, *gradients), exact, strict=True):
        wanted = torch.tensor(wanted, dtype=torch.float64)
        # What a difference of terms as large as the mean, or as log x!, loses in float32.
        close = 3e-6 * (1 + wanted.abs()) + 8 * EPS32 * (torch.lgamma(torch.tensor(x) + 1) + float(m))
        assert ((got.detach().double() - wanted).abs() <= close).all()
    torch.manual_seed(0)
    draws = NegativeBinomialLogMean(*given).sample(torch.Size([5000]))
    assert torch.isfinite(draws).all()
    if log_r <= -20.0:  # P(x = 0) = (r / (r + m))^r is 1 - r log(m / r), which is one
        assert not draws.any()


@pytest.mark.parametrize("log_r", [-6.0, -2.0])
def test_draws_of_few_giants_among_zeros_have_their_probabilities(log_r):
    torch.manual_seed(0)
    pixel = NegativeBinomialLogMean(torch.tensor(2.0), torch.tensor(log_r))
    draws = pixel.sample(torch.Size([200_000]))
    for x in (0.0, 1.0, 2.0, 10.0):
        p = pixel.log_prob(torch.tensor(x)).exp().item()
        assert abs((draws == x).double().mean().item() - p) < 4 * math.sqrt(p * (1 - p) / len(draws))


@pytest.mark.parametrize("r", [0.5, 5.0, 200.0])
def test_negative_binomial_is_scipys_and_sums_to_one(r):
    x = np.arange(2000)
    got = NegativeBinomialLogMean(torch.tensor(8.0).double().log(), torch.tensor(r).double().log())
    log_p = got.log_prob(torch.from_numpy(x).double())
    wanted = torch.from_numpy(scipy.stats.nbinom(r, r / (r + 8.0)).logpmf(x))
    assert torch.allclose(log_p, wanted, rtol=1e-10, atol=1e-10) and abs(log_p.exp().sum() - 1) < 1e-12
    assert abs(got.variance - (8 + 64 / r)) < 1e-10


def test_counts_have_right_derivatives():
    log_mean = torch.tensor([-3.0, 0.5, 4.0], dtype=torch.float64, requires_grad=True)
    log_r = torch.tensor([-2.0, 1.0, math.log(30) + 1e-3, 9.0], dtype=torch.float64).unsqueeze(-1).requires_grad_()
    x = torch.tensor([0.0, 3.0, 60.0], dtype=torch.float64).view(3, 1, 1)
    assert gradcheck(lambda m: PoissonLogRate(m).log_prob(x), (log_mean,))
    assert gradcheck(lambda m, r: NegativeBinomialLogMean(m, r).log_prob(x), (log_mean, log_r))
    assert gradgradcheck(lambda m, r: NegativeBinomialLogMean(m, r).log_prob(x), (log_mean, log_r))


def test_counts_drawn_have_their_moments():
    torch.manual_seed(0)
    log_mean = torch.tensor([0.01, 0.5, 3.0, 200.0], dtype=torch.float64).log()
    for pixel in (
        PoissonLogRate(log_mean),
        NegativeBinomialLogMean(log_mean, torch.tensor(2.0).double().log()),
        NegativeBinomialLogMean(log_mean, torch.tensor(60.0).double().log()),
    ):
        draws = pixel.sample(torch.Size([60_000]))
        assert pixel.support.check(draws).all() and not pixel.has_rsample
        within_four_standard_errors(draws, log_mean.exp(), pixel.variance)


class Passed(nn.Module):
    def forward(self, z):
        return z


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_softplus_link_keeps_value_and_gradient_where_its_mean_underflows(dtype):
    output = torch.tensor([[-500.0, -80.0, -30.01, -29.99, -5.0, 0.0, 5.0, 100.0]], dtype=dtype, requires_grad=True)
    given_z = Poisson(Passed())(output)
    value = given_z.log_prob(torch.full_like(output, 2.0))
    (gradient,) = torch.autograd.grad(value, output)
    exact, slope = [], []
    with mpmath.workdps(300):
        for t in output[0].tolist():
            mean = mpmath.log1p(mpmath.exp(mpmath.mpf(t)))
            exact.append(float(2 * mpmath.log(mean) - mean - mpmath.log(2)))
            slope.append(float((2 / mean - 1) / (1 + mpmath.exp(-mpmath.mpf(t)))))
    eps = torch.finfo(dtype).eps
    assert abs(value.item() - sum(exact)) < 20 * eps * sum(map(abs, exact))
    assert torch.allclose(gradient[0].double(), torch.tensor(slope, dtype=torch.float64), rtol=20 * eps)
    assert torch.allclose(Poisson(Passed(), link="exp")(output).mean, output.exp())


@pytest.mark.parametrize("concentration", [3.0, "learned", "per-pixel", "network"])
def test_negative_binomial_takes_its_concentration_from_where_it_is_told(concentration):
    torch.manual_seed(0)
    network = concentration == "network"
    decoder = MLP(2, [5], (4 if network else 2, 3)).double()
    likelihood = NegativeBinomial(decoder, concentration, (2, 3), initial_concentration=1.5).double()
    if hasattr(likelihood, "log_concentration"):
        assert torch.allclose(likelihood.log_concentration.exp(), torch.tensor(1.5, dtype=torch.float64))
        with torch.no_grad():
            likelihood.log_concentration.add_(torch.randn_like(likelihood.log_concentration))
    z, x = random(4, 2), torch.randint(9, (4, 2, 3)).double()
    output = decoder(z)
    r = output[:, 2:].exp() if network else torch.tensor(3.0).double()
    r = likelihood.log_concentration.exp() if hasattr(likelihood, "log_concentration") else r
    mean = nn.functional.softplus(output[:, :2], threshold=50)
    oracle = scipy.stats.nbinom(r.detach().expand(4, 2, 3).numpy(), (r / (r + mean)).detach().numpy())
    got = likelihood(z)
    assert torch.allclose(got.log_prob(x), torch.from_numpy(oracle.logpmf(x.numpy())).sum((1, 2)), rtol=1e-10)
    assert torch.allclose(got.mean, mean, rtol=1e-12) and got.event_shape == (2, 3)


# As part of a captured step


@pytest.mark.parametrize("make", [
    lambda: ContinuousBernoulli(MLP(2, [4], (1, 2, 3))),
    lambda: DiscretizedLogistic(MLP(2, [4], (2, 2, 3))),
    lambda: MixtureOfDiscretizedLogistics(MLP(2, [4], (6, 2, 3)), 2),
    lambda: Categorical(MLP(2, [4], (256, 2, 3))),
    lambda: Poisson(MLP(2, [4], (1, 2, 3))),
    lambda: NegativeBinomial(MLP(2, [4], (1, 2, 3))),
])  # fmt: skip
def test_value_and_gradient_can_be_captured_with_a_mask_and_replayed(make):
    """No branch on values: a graph traced at one batch is right for another, at both sides of every where."""
    torch.manual_seed(0)
    likelihood = make()
    parameters = list(likelihood.parameters())

    def step(z, x, mask):
        masked, x = observed_part(likelihood(z), x, mask)
        log_p = masked.log_prob(x)
        return log_p, *torch.autograd.grad(log_p.sum(), parameters)

    with pyro.validation_enabled(False):
        x = torch.randint(2, (2, 4, 1, 2, 3)).float()
        mask = torch.rand(2, 4, 1, 2, 3) < 0.5
        z = torch.randn(3, 4, 2)
        captured = make_fx(step)(z, x[0], mask[0])
        for got, wanted in zip(captured(20 * z, x[1], mask[1]), step(20 * z, x[1], mask[1]), strict=True):
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-4)


# Options that cannot be


@pytest.mark.parametrize("make, match", [
    (lambda: DiscretizedLogistic(nn.Linear(2, 4), initial_scale=0.0), "initial_scale=0.0.*both positive"),
    (lambda: MixtureOfDiscretizedLogistics(nn.Linear(2, 4), num_components=0), "num_components must be.*got 0"),
    (lambda: Categorical(nn.Linear(2, 4), levels=1), "levels must be.*at least 2, got 1"),
    (lambda: Poisson(nn.Linear(2, 4), link="square"), "unknown link 'square', wanted one of softplus, exp"),
    (lambda: NegativeBinomial(nn.Linear(2, 4), -1.0), "concentration must be positive, got -1"),
    (lambda: NegativeBinomial(nn.Linear(2, 4), "free"), "concentration='free', wanted a number"),
    (lambda: NegativeBinomial(nn.Linear(2, 4), "per-pixel"), "needs x_shape"),
    (lambda: NegativeBinomial(nn.Linear(2, 4), "per-pixel", (5,))(torch.zeros(1, 2)), r"built for x_shape \(5,\)"),
    (lambda: DiscretizedLogistic(nn.Linear(2, 5))(torch.zeros(1, 2)), "takes 2 parameters for each pixel"),
])  # fmt: skip
def test_a_bad_option_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
