"""Regularizers: what they estimate, and that no reported bound knows of them."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.inference.bounds import elbo, iwae
from pyro_vae.inference.estimators import ESTIMATORS
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.regularizers import free_bits, imq, mmd, rbf, total_correlation
from pyro_vae.inference.training import fit
from pyro_vae.traces import draw
from tests.pairs import binary, linear_pair, small_pair


def pair(loc, scale, k=1):
    """A guide N(loc, scale^2), (B, D), under a standard normal prior, and particles of it."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros_like(loc[0]), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    x = loc.new_zeros(len(loc))
    return model, guide, x, draw(model, guide, (x,), {}, k)


def gaussian_kernel(squared, dim):
    return torch.exp(-squared / 2)


def test_mmd_is_unbiased():
    """For q(z) = N(m, s^2) and a Gaussian kernel of width 1 all three means are known."""
    m, s, draws = 0.3, 0.7, []

    def mean_kernel(variance, shift):
        return math.exp(-(shift**2) / (2 * (1 + variance))) / math.sqrt(1 + variance)

    exact = mean_kernel(2 * s**2, 0) + mean_kernel(2, 0) - 2 * mean_kernel(1 + s**2, m)
    pyro.set_rng_seed(0)
    loc = torch.full((8, 1), m, dtype=torch.float64)
    for k in (1, 3):
        for _ in range(400):
            model, guide, x, p = pair(loc, torch.tensor(s, dtype=torch.float64), k)
            draws.append(mmd(1.0, gaussian_kernel)(p, model, guide))
        values = torch.stack(draws)
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(values))
        assert values.std() / math.sqrt(len(values)) < 0.3 * exact  # so that zero would be noticed
    assert values.min() < 0  # unbiased where nothing differs, so it must be negative at times


@pytest.mark.parametrize("kernel", ["imq", "rbf"])
def test_mmd_pulls_the_guide_to_the_prior(kernel):
    loc = torch.full((64, 2), 2.0, dtype=torch.float64, requires_grad=True)
    pyro.set_rng_seed(0)
    model, guide, x, p = pair(loc, torch.tensor(0.5, dtype=torch.float64))
    value = mmd(3.0, kernel)(p, model, guide)
    assert value > 0.3
    (gradient,) = torch.autograd.grad(value, loc)
    assert (gradient.mean(0) > 0).all()  # descending lowers the mean
    twice = mmd(6.0, kernel)
    pyro.set_rng_seed(0)
    model, guide, x, p = pair(loc, torch.tensor(0.5, dtype=torch.float64))
    assert abs(twice(p, model, guide) - 2 * value) < 1e-12


def test_kernels_fall_from_one():
    squared = torch.linspace(0, 50, 20)
    for kernel in (imq, rbf):
        values = kernel(squared, 4)
        assert values[0] == 1 and (values.diff() < 0).all()
    assert imq(squared, 4)[-1] > rbf(squared, 4)[-1]


def test_total_correlation_of_a_known_aggregate():
    """Two clusters on the diagonal, far apart: q(z) has one bit of dependence, log 2 nats."""
    loc = torch.tensor([[-50.0, -50.0]] * 20 + [[50.0, 50.0]] * 20, dtype=torch.float64)
    scale = torch.tensor(0.5, dtype=torch.float64)
    for k in (1, 4):
        pyro.set_rng_seed(0)
        model, guide, x, p = pair(loc, scale, k)
        assert abs(total_correlation(1.0)(p, model, guide) - math.log(2)) < 1e-9
        assert abs(total_correlation(2.5)(p, model, guide) - 2.5 * math.log(2)) < 1e-9
        model, guide, x, p = pair(loc * torch.tensor([1.0, 0.0]), scale, k)  # one dimension tells nothing
        assert abs(total_correlation(1.0)(p, model, guide)) < 1e-9


def test_total_correlation_is_the_sum_over_all_pairs():
    loc = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scale = (0.3 * torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).exp()
    pyro.set_rng_seed(0)
    model, guide, x, p = pair(loc, scale, 2)
    total = 0.0
    for k in range(2):
        for i in range(5):
            z = p.latents["z"][k, i]
            each = dist.Normal(loc, scale).log_prob(z)  # (j, D)
            joint = each.sum(-1).exp().mean().log()
            total += (joint - each.exp().mean(0).log().sum()) / 10
    assert abs(total_correlation(1.0)(p, model, guide) - total) < 1e-12


def test_total_correlation_needs_factors():
    model_pair, x = linear_pair()
    with pytest.raises(
        ValueError, match="total_correlation needs a factorised.*'z' is MultivariateNormal.*DiagonalNormal"
    ):
        Objective(elbo, regularizers=[total_correlation(1.0)]).loss(model_pair.model, model_pair.guide, x)
    with pytest.raises(ValueError, match=r"free_bits\(per='dimension'\) needs a factorised"):
        Objective(elbo, regularizers=[free_bits(1.0, per="dimension")]).loss(model_pair.model, model_pair.guide, x)


def test_free_bits_turns_a_divergence_into_at_least_lambda():
    loc = torch.tensor([[0.1, 3.0]] * 4, dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.9, dtype=torch.float64)
    for k in (1, 3):
        pyro.set_rng_seed(0)
        model, guide, x, p = pair(loc, scale, k)
        z = p.latents["z"]
        rate = (dist.Normal(loc, scale).log_prob(z) - dist.Normal(0.0, 1.0).log_prob(z)).mean((0, 1))
        low, high = rate[0].item(), rate[1].item()
        assert low < 1.0 < high
        each = free_bits(1.0, per="dimension")(p, model, guide)
        assert abs(each.item() - (1.0 - low)) < 1e-12
        assert free_bits(1.0)(p, model, guide) == 0
        assert abs(free_bits(20.0)(p, model, guide).item() - (20.0 - low - high)) < 1e-12
        # Where the divergence is free, the elbo's gradient is that of the reconstruction alone.
        (ours,) = torch.autograd.grad(free_bits(20.0)(p, model, guide) * len(x) - elbo(p).sum(), loc, retain_graph=True)
        (wanted,) = torch.autograd.grad(-p.log_likelihood.mean(0).sum(), loc)
        assert (ours - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_added_to_the_loss_and_not_to_the_bound_under_every_estimator(estimator):
    model, guide = (m.double() for m in small_pair())
    x = binary().double()
    found = {}
    for name, extra in {"none": (), "some": (mmd(5.0), total_correlation(2.0), free_bits(9.0))}.items():
        for which in (estimator, ESTIMATORS[0]):
            for p in [*model.parameters(), *guide.parameters()]:
                p.grad = None
            pyro.set_rng_seed(0)
            objective = Objective(elbo, 2, estimator=which, regularizers=extra)
            loss = objective.loss_and_grads(model, guide, x)
            grads = torch.cat([p.grad.flatten() for m in (model, guide) for p in m.parameters()])
            found[name, which] = loss, float(objective.last_bound), grads
    assert found["some", estimator][1] == pytest.approx(found["none", estimator][1], rel=1e-12)
    assert found["none", estimator][0] == pytest.approx(-found["none", estimator][1], rel=1e-12)
    assert abs(found["some", estimator][0] - found["none", estimator][0]) > 1.0
    # What they add to the gradient is the same whatever the estimator of the bound.
    added = found["some", estimator][2] - found["none", estimator][2]
    wanted = found["some", ESTIMATORS[0]][2] - found["none", ESTIMATORS[0]][2]
    assert (added - wanted).abs().max() < 1e-10 * wanted.abs().max() and wanted.abs().max() > 0.1


def test_a_fit_with_regularizers():
    extra = [mmd(10.0), total_correlation(1.0)]
    history = fit(
        *small_pair(), binary(33), loss=Objective(iwae, 3, regularizers=extra), epochs=3, batch_size=16, seed=0
    )
    assert len(history) == 3  # the last batch of one datum too
    assert all(abs(-loss - bound) > 1e-3 for loss, bound in zip(history["loss"], history["bound"], strict=True))
    assert "regularizers=[MMD(weight=10.0" in repr(Objective(iwae, 3, regularizers=extra))


def test_bad_arguments():
    for make, text in (
        (lambda: mmd(-1.0), "weight of mmd must not be negative, got -1"),
        (lambda: mmd(1.0, "cubic"), "unknown kernel 'cubic', wanted one of imq, rbf"),
        (lambda: total_correlation(math.nan), "weight must be a number, got nan"),
        (lambda: free_bits(1.0, per="pixel"), "got per='pixel', wanted 'site' or 'dimension'"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    model, guide, x, p = pair(torch.zeros(3, 2), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"is about the site 'w', but the model has the latent sites \['z'\]"):
        mmd(1.0, site="w")(p, model, guide)
    two = p._replace(priors={"z1": p.priors["z"], "z2": p.priors["z"]})
    with pytest.raises(ValueError, match=r"latent sites \['z1', 'z2'\]: say which mmd is about"):
        mmd(1.0)(two, model, guide)
    with pytest.raises(ValueError, match="mmd needs all samples from one pass"):
        mmd(1.0)(p._replace(posteriors={}), model, guide)
