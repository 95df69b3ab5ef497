"""Missing pixels: the evidence of the observed part, guides that see nothing else, and imputation."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from torch import nn

from pyro_vae.data.testbeds import LinearGaussian
from pyro_vae.inference.training import fit
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.judging.imputation import impute
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.likelihoods.discrete import (
    Categorical,
    DiscretizedLogistic,
    MixtureOfDiscretizedLogistics,
    NegativeBinomial,
    Poisson,
)
from pyro_vae.parts.likelihoods.likelihood import ContinuousBernoulli, Normal
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.pair import Guide, Model, filled, full_mask, observed_part
from pyro_vae.programs.vae import VAE
from pyro_vae.traces import particles
from tests.pairs import binary, small_pair

NAN = float("nan")


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


class Bed:
    """The linear-Gaussian test bed with some pixels missing: everything about x_obs is known."""

    def __init__(self, size=8):
        whole = LinearGaussian.random(6, 3, 0.7, seed=1, dtype=torch.float64)
        self.weight, self.loc, self.scale = whole.weight, whole.loc, whole.scale
        _, self.x = whole.sample(size, generator=torch.Generator().manual_seed(2))
        self.mask = torch.rand(size, 6, generator=torch.Generator().manual_seed(3)) < 0.5
        self.mask[0], self.mask[1], self.mask[2] = True, False, torch.arange(6) == 2  # all, none, one
        # A pixel that was not observed says nothing: it has precision 0.
        weighted = self.mask.unsqueeze(-1) * self.weight / self.scale**2
        self.precision = torch.eye(3).double() + torch.einsum("bxd,xe->bde", weighted, self.weight)
        residual = torch.where(self.mask, self.x - self.loc, 0.0)
        self.mean = torch.linalg.solve(self.precision, torch.einsum("bxd,bx->bd", weighted, residual))
        self.model = Model(
            lambda: dist.Normal(torch.zeros(3).double(), 1.0).to_event(1),
            lambda z: dist.Normal(z @ self.weight.T + self.loc, self.scale).to_event(1),
        )

    def log_evidence(self):
        """log N(x_obs; b_obs, W_obs W_obs' + s^2 I) per datum, from a bed of the observed rows only."""
        values = []
        for x, seen in zip(self.x, self.mask, strict=True):
            if not seen.any():
                values.append(torch.zeros((), dtype=torch.float64))
                continue
            part = LinearGaussian(self.weight[seen], self.loc[seen], self.scale)
            values.append(part.log_evidence(x[seen].unsqueeze(0))[0])
        return torch.stack(values)

    def guide(self, stretch=1.0, shift=0.0):
        """p(z | x_obs), for these data in this order, or one that is too wide and off the mark."""
        tril = torch.linalg.cholesky(torch.linalg.inv(self.precision)) * stretch
        return Guide(lambda x: dist.MultivariateNormal(self.mean + shift, scale_tril=tril))

    def damaged(self):
        """The data with NaN where they are missing."""
        return torch.where(self.mask, self.x, NAN)


# The evidence of the observed part


def test_with_the_exact_posterior_every_weight_is_the_evidence_of_the_observed_part():
    bed = Bed()
    weight = particles(bed.model, bed.guide(), bed.damaged(), bed.mask, num_samples=7).log_weight
    assert weight.shape == (7, 8) and (weight - bed.log_evidence()).abs().max() < 1e-10


def test_importance_sampling_estimates_the_evidence_of_the_observed_part():
    bed = Bed()
    guide = bed.guide(stretch=1.3, shift=0.2)
    estimate = log_likelihood(bed.model, guide, (bed.damaged(), bed.mask), num_samples=4000, progress=False)
    assert estimate.mc_stderr < 0.01
    assert abs(estimate.value - bed.log_evidence().mean().item()) < 4 * estimate.mc_stderr
    terms = elbo_terms(bed.model, bed.guide(), (bed.damaged(), bed.mask), progress=False)
    assert abs(terms.value - bed.log_evidence().mean().item()) < 1e-10
    # Nothing is observed of the second datum: its exact guide is the prior, and log p of nothing is zero.
    assert bed.log_evidence()[1] == 0


def test_a_full_mask_is_no_mask():
    model, guide = small_pair()
    x = binary(5)
    for mask in (torch.ones_like(x, dtype=torch.bool), torch.ones(1, 1, 1, dtype=torch.bool)):
        tables = []
        for args in ((x,), (x, mask), (x, None)):
            torch.manual_seed(0)
            tables.append(particles(model, guide, *args, num_samples=3).log_weight)
        assert torch.equal(tables[0], tables[1]) and torch.equal(tables[0], tables[2])


def test_masks_broadcast_over_channels_and_batch():
    torch.manual_seed(0)
    model = Model(StandardNormal(2), Normal(MLP(2, [4], (3, 2, 2)), 0.5))
    guide = Guide(DiagonalNormal(MLP((3, 2, 2), [4], None), 2))
    x = torch.randn(5, 3, 2, 2)
    for mask in (
        torch.rand(5, 1, 2, 2) < 0.5,
        torch.rand(2, 2) < 0.5,
        torch.tensor([1, 0, 1, 0, 1]).bool().view(5, 1, 1, 1),
    ):
        tables = []
        for given in (mask, mask.expand_as(x).contiguous()):
            torch.manual_seed(0)
            tables.append(particles(model, guide, x, given, num_samples=2))
        assert torch.equal(tables[0].log_weight, tables[1].log_weight)
        seen = mask.expand_as(x)
        loc = model.likelihood.decoder(tables[0].latents["z"])
        wanted = (torch.distributions.Normal(loc, 0.5).log_prob(x) * seen).sum((-1, -2, -3))
        assert torch.allclose(tables[0].log_likelihood, wanted, rtol=1e-5, atol=1e-5)


# Nothing depends on what stands at a missing pixel

LIKELIHOODS = {
    "bernoulli": (lambda: Bernoulli(MLP(2, [4], (1, 2, 3))), lambda x: x.round()),
    "continuous": (lambda: ContinuousBernoulli(MLP(2, [4], (1, 2, 3))), lambda x: x),
    "normal": (lambda: Normal(MLP(2, [4], (1, 2, 3))), lambda x: 3 * x - 1),
    "discretized": (lambda: DiscretizedLogistic(MLP(2, [4], (2, 2, 3))), lambda x: (x * 255).round() / 255),
    "discretized mixture": (
        lambda: MixtureOfDiscretizedLogistics(MLP(2, [4], (6, 2, 3)), 2), lambda x: (x * 255).round() / 255
    ),
    "categorical": (lambda: Categorical(MLP(2, [4], (256, 2, 3))), lambda x: (x * 255).round() / 255),
    "poisson": (lambda: Poisson(MLP(2, [4], (1, 2, 3))), lambda x: (4 * x).round()),
    "negative binomial": (lambda: NegativeBinomial(MLP(2, [4], (1, 2, 3))), lambda x: (4 * x).round()),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIKELIHOODS)
@pytest.mark.parametrize("show_mask", [False, True])
def test_a_missing_pixel_changes_neither_value_nor_gradient(kind, show_mask):
    make, to_data = LIKELIHOODS[kind]
    torch.manual_seed(0)
    model = Model(StandardNormal(2), make())
    guide = Guide(DiagonalNormal(MLP((1 + show_mask, 2, 3), [4], None), 2), show_mask=show_mask)
    x = to_data(torch.rand(5, 1, 2, 3))
    mask = torch.rand(5, 1, 2, 3) < 0.6
    parameters = [*model.parameters(), *guide.parameters()]
    results = []
    for filling in (x, torch.full_like(x, NAN), torch.full_like(x, math.inf), torch.full_like(x, -1e30)):
        torch.manual_seed(1)
        table = particles(model, guide, torch.where(mask, x, filling), mask, num_samples=3)
        gradients = torch.autograd.grad(table.log_weight.sum(), parameters)
        assert all(torch.isfinite(g).all() for g in gradients) and torch.isfinite(table.log_weight).all()
        results.append((table.log_weight, table.latents["z"], *gradients))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))
    # An observed pixel does change it.
    torch.manual_seed(1)
    other = torch.where(mask & (torch.arange(6).view(1, 2, 3) == mask.flatten(1).int().argmax(1).view(5, 1, 1, 1)),
                        to_data(torch.ones(())) - x, x)  # fmt: skip
    assert not torch.equal(particles(model, guide, other.clamp(min=0), mask, num_samples=3).log_weight, results[0][0])


def test_the_posterior_sees_zeros_and_the_mask_if_it_is_to():
    x, mask = torch.tensor([[1.0, NAN, 3.0]]), torch.tensor([[True, False, True]])
    assert Guide(None).visible(x, mask).tolist() == [[1.0, 0.0, 3.0]]
    shown = Guide(None, show_mask=True)
    assert shown.visible(x, mask).tolist() == [[1.0, 0.0, 3.0, 1.0, 0.0, 1.0]]
    assert shown.visible(torch.zeros(2, 3)).tolist() == [[0.0, 0.0, 0.0, 1.0, 1.0, 1.0]] * 2
    image = torch.zeros(2, 3, 4, 4)
    seen = shown.visible(image, torch.zeros(2, 1, 4, 4, dtype=torch.bool))
    assert seen.shape == (2, 6, 4, 4) and seen.sum() == 0


@pytest.mark.parametrize("family", [
    lambda z: dist.Gamma(z.exp() + 1, 1.0),
    lambda z: dist.Beta(z.exp() + 0.5, 1.5),
    lambda z: dist.Uniform(z - 20.0, z + 20.0),
    lambda z: dist.LogNormal(z, 1.0),
    lambda z: dist.Geometric(logits=z),
    lambda z: dist.Normal(z, 1.0),
], ids=["gamma", "beta", "uniform", "log-normal", "geometric", "normal"])  # fmt: skip
def test_missing_pixels_of_any_family_are_scored_inside_its_support(family):
    z = torch.zeros(2, 3, requires_grad=True)
    mask = torch.tensor([[True, False, True], [False, False, True]])
    value = 1.0 if family(z).support.is_discrete else 0.5
    with pyro.validation_enabled(True):
        likelihood, given = observed_part(family(z).to_event(1), torch.where(mask, value, NAN), mask)
        log_p = likelihood.log_prob(given)
        wanted = (family(z).log_prob(torch.full_like(z, value)) * mask).sum(-1)
    assert torch.allclose(log_p, wanted)
    (gradient,) = torch.autograd.grad(log_p.sum(), z)
    assert torch.isfinite(gradient).all() and (gradient[~mask] == 0).all()


# As Pyro programs


def test_fit_learns_from_damaged_data_under_pyros_own_checks():
    torch.manual_seed(0)
    model, guide = small_pair()
    x = binary(96)
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(1)) < 0.7
    damaged = torch.where(mask, x, NAN)
    before = elbo_terms(model, guide, (damaged, mask), progress=False).value
    fit(model, guide, (damaged, mask), epochs=30, batch_size=32, learning_rate=0.01, seed=0, progress=False)
    after = elbo_terms(model, guide, (damaged, mask), progress=False)
    assert after.value > before + 1
    # And better than chance at what it never saw.
    torch.manual_seed(0)
    completed = impute(model, guide, (damaged, mask), num_imputations=20, num_samples=200).draws
    wrong = (completed - x).abs().mean(0)[~mask].mean()
    assert wrong < 0.4 and not completed.isnan().any()


def test_pyros_svi_takes_the_mask_too():
    model, guide = small_pair()
    x, mask = binary(8), torch.rand(8, 1, 4, 4) < 0.5
    with pyro.validation_enabled(True):
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-3}), Trace_ELBO())
        assert math.isfinite(svi.step(torch.where(mask, x, NAN), mask))


def test_draws_are_of_whole_data_with_and_without_a_mask():
    bed = Bed()
    assert bed.model(size=4).shape == (4, 6) and bed.model(None, None, size=4).shape == (4, 6)
    assert Predictive(bed.model, num_samples=3)(size=2)["x"].shape == (3, 2, 6)
    torch.manual_seed(0)
    program = Predictive(poutine.uncondition(bed.model), guide=bed.guide(), num_samples=4000)
    drawn = program(bed.damaged(), bed.mask)["x"]
    assert drawn.shape == (4000, 8, 6) and not drawn.isnan().any()
    mean = bed.mean @ bed.weight.T + bed.loc
    cov = bed.weight @ torch.linalg.inv(bed.precision) @ bed.weight.T + bed.scale**2 * torch.eye(6)
    stderr = (cov.diagonal(dim1=-2, dim2=-1) / 4000).sqrt()
    assert ((drawn.mean(0) - mean).abs() < 4 * stderr).all()


# Imputation


@pytest.mark.parametrize("exact", [True, False], ids=["exact guide", "wrong guide"])
def test_imputation_draws_from_the_exact_conditional(exact):
    """Mean and covariance of x_mis | x_obs, from draws that are independent: one for each copy of a datum."""
    bed, copies = Bed(), 3000
    index = torch.arange(8).repeat(copies)
    x, mask = bed.damaged()[index], bed.mask[index]
    stretch, shift = (1.0, 0.0) if exact else (1.4, 0.3)
    tril = torch.linalg.cholesky(torch.linalg.inv(bed.precision)) * stretch
    guide = Guide(lambda x: dist.MultivariateNormal(bed.mean[index] + shift, scale_tril=tril[index]))
    torch.manual_seed(0)
    completed, ess = impute(bed.model, guide, (x, mask), num_samples=1 if exact else 200)
    assert completed.shape == (1, 8 * copies, 6) and ess.shape == (8 * copies,)
    assert torch.equal(completed[0][mask], x[mask])  # bit for bit
    draws = completed[0].view(copies, 8, 6)
    mean = bed.mean @ bed.weight.T + bed.loc
    cov = bed.weight @ torch.linalg.inv(bed.precision) @ bed.weight.T + bed.scale**2 * torch.eye(6)
    # Resampling from K proposals is biased by about 1 / K of a standard deviation: below the standard errors.
    for b in range(8):
        missing = ~bed.mask[b]
        found, m, c = draws[:, b, missing], mean[b, missing], cov[b][missing][:, missing]
        assert ((found.mean(0) - m).abs() < 4 * (c.diagonal() / copies).sqrt()).all()
        products = (found - m).unsqueeze(-1) * (found - m).unsqueeze(-2)
        spread = ((c.diagonal().outer(c.diagonal()) + c**2) / copies).sqrt()
        assert ((products.mean(0) - c).abs() < 4 * spread).all()


def test_imputation_corrects_a_guide_that_is_off():
    """Without its weights the wrong guide would miss the conditional mean by many standard errors."""
    bed = Bed()
    torch.manual_seed(0)
    guide = bed.guide(stretch=1.4, shift=0.6)
    completed, ess = impute(bed.model, guide, (bed.damaged(), bed.mask), num_imputations=2000, num_samples=40_000)
    mean = bed.mean @ bed.weight.T + bed.loc
    cov = bed.weight @ torch.linalg.inv(bed.precision) @ bed.weight.T + bed.scale**2 * torch.eye(6)
    # The draws share their proposals, of which there are as many as ess says.
    stderr = (cov.diagonal(dim1=-2, dim2=-1) * (1 / 2000 + 1 / ess.unsqueeze(-1))).sqrt()
    error = (completed.mean(0) - mean).abs()
    assert (error < 4 * stderr)[~bed.mask].all() and ess.min() > 200
    shifted = (bed.mean + 0.6) @ bed.weight.T + bed.loc
    assert ((shifted - mean).abs() > 8 * stderr)[~bed.mask].any()
    assert torch.equal(completed[5][bed.mask], bed.x[bed.mask])


def test_the_effective_number_of_proposals_is_all_of_them_with_the_exact_posterior():
    bed = Bed()
    _, ess = impute(bed.model, bed.guide(), (bed.damaged(), bed.mask), num_samples=50)
    assert torch.allclose(ess, torch.full_like(ess, 50.0), rtol=1e-9)


def test_proposals_in_chunks_are_proposals(monkeypatch):
    bed = Bed()
    monkeypatch.setattr("pyro_vae.judging.sweeps._CHUNK", 7 * 512 * len(bed.x))
    _, ess = impute(bed.model, bed.guide(), (bed.damaged(), bed.mask), num_samples=50)
    assert torch.allclose(ess, torch.full_like(ess, 50.0), rtol=1e-9)


# What cannot be is refused by name


def test_a_mask_that_is_none_is_refused():
    model, guide = small_pair()
    x = binary(3)
    with pytest.raises(ValueError, match=r"dtype torch.float32, wanted torch.bool.*mask.bool\(\)"):
        guide(x, torch.ones_like(x))
    with pytest.raises(ValueError, match=r"mask of shape \(3,\) for data of shape \(3, 1, 4, 4\).*None, None, None"):
        model(x, torch.ones(3, dtype=torch.bool))
    with pytest.raises(ValueError, match="num_samples must be a positive integer, got 0"):
        impute(model, guide, (x, x > 0), num_samples=0)


def test_a_likelihood_of_dependent_pixels_is_refused():
    model = Model(
        lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1), lambda z: dist.MultivariateNormal(z, torch.eye(2))
    )
    with pytest.raises(ValueError, match=r"MultivariateNormal of event_shape \(2,\).* jointly.*to_event\(1\)"):
        model(torch.zeros(3, 2), torch.ones(3, 2, dtype=torch.bool))


def test_a_model_of_two_observed_sites_is_refused():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)
            pyro.sample("y", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match=r"observes the sites \['x', 'y'\], wanted one"):
        impute(model, lambda x, mask: None, (torch.zeros(3), torch.ones(3, dtype=torch.bool)))


def test_filled_keeps_the_observed_and_their_gradient():
    x = torch.tensor([[1.0, NAN]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    out = filled(x, mask, 0.25)
    assert out.tolist() == [[1.0, 0.25]] and full_mask(mask, x).shape == (1, 2)
    assert torch.autograd.grad(out.sum(), x)[0].tolist() == [[1.0, 0.0]]


def test_networks_need_no_change_for_masks():
    """A user's own pair of plain functions may take a mask as Model and Guide do."""
    encoder, decoder = nn.Linear(3, 4), nn.Linear(2, 3)

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            likelihood, x = observed_part(dist.Normal(decoder(z), 1.0).to_event(1), x, mask)
            pyro.sample("x", likelihood, obs=x)

    def guide(x, mask):
        loc, log_scale = encoder(filled(x, mask)).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = torch.tensor([[1.0, NAN, 2.0], [NAN, NAN, NAN]])
    completed, _ = impute(model, guide, (x, ~x.isnan()), num_imputations=4, num_samples=10)
    assert completed.shape == (4, 2, 3) and not completed.isnan().any()
    assert (completed[:, 0, [0, 2]] == torch.tensor([1.0, 2.0])).all()


def test_imputation_looks_at_its_data_as_a_fit_does():
    torch.manual_seed(0)
    vae = VAE.build((4,), latent_dim=2, hidden=(8,))
    x = torch.bernoulli(torch.full((20, 4), 0.5))
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[3, 2] = False
    for value, text in (
        (5.0, "row 7, column 1 of the data is 5, outside the support"),
        (NAN, "row 7, column 1 of the data is nan"),
    ):
        wrong = x.clone()
        wrong[7, 1], wrong[3, 2] = value, NAN
        with pytest.raises(ValueError, match=text):
            impute(vae.model, vae.guide, (wrong, mask), num_samples=5)
    as_integers = impute(vae.model, vae.guide, (x.long(), mask), num_samples=5).draws
    assert torch.equal(as_integers, impute(vae.model, vae.guide, (x, mask), num_samples=5).draws)


@pytest.mark.filterwarnings("ignore:the pair takes .x., and the data have 2 columns")  # said before the refusal
def test_imputation_by_a_pair_of_ones_own_never_meets_what_is_missing():
    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(z.shape + (2,)), 1.0).mask(mask).to_event(1), obs=x)

    def guide(x, mask):  # NaN times zero is NaN
        count = mask.sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x * mask).sum(-1) / (1 + count), (1 / (1.0 + count)).sqrt()))

    x = torch.tensor([[2.0, NAN], [1.0, 3.0]])
    draws, ess = impute(model, guide, (x, ~x.isnan()), num_samples=50, num_imputations=4000)
    missing = draws[:, 0, 1]  # N(1, 1 + 1/2)
    assert abs(missing.mean() - 1) < 5 * (1.5 / 50) ** 0.5 and torch.allclose(ess, torch.full_like(ess, 50.0))

    def blind(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    with pytest.raises(ValueError, match="takes no mask, wanted programs model.x, mask."):
        impute(lambda x: model(x, torch.ones_like(x, dtype=torch.bool)), blind, (x.nan_to_num(), ~x.isnan()))
