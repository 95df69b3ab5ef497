"""What the latents say: closed forms of the linear-Gaussian bed, planted dead latents."""

import math
from operator import attrgetter

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from pyro_vae.data.testbeds import LinearGaussian
from pyro_vae.judging._collapse import collapse, linear_optimum
from pyro_vae.judging.estimates import rate_distortion
from pyro_vae.judging.information import mutual_information, probe
from pyro_vae.judging.latents import kl_per_dimension
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import NSF, FullNormal
from pyro_vae.programs.pair import Guide
from pyro_vae.programs.zoo import autoencoder
from tests.pairs import LinearPair, binary, linear_pair, small_pair


def bed_pair(size=600, latent_dim=2, scale=1.0, **options):
    bed = LinearGaussian.random(4, latent_dim, scale, seed=3, dtype=torch.float64)
    _, x = bed.sample(size, generator=torch.Generator().manual_seed(4))
    return LinearPair(bed, **options), x


class Scaled:
    """q(z | x) = N(a m(x), c^2 V), whose aggregate is a Gaussian."""

    def __init__(self, bed, a, c):
        self.bed, self.a, self.c = bed, a, c

    def guide(self, x):
        posterior = self.bed.posterior(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.MultivariateNormal(self.a * posterior.mean, scale_tril=self.c * posterior.scale_tril))

    def aggregate(self):
        """Covariance of q(z), and of q(z | x)."""
        own = self.c**2 * torch.linalg.inv(self.bed.precision)
        moved = torch.eye(self.bed.latent_dim, dtype=torch.float64) - torch.linalg.inv(self.bed.precision)
        return self.a**2 * moved + own, own


def test_kl_per_dimension_is_the_closed_form():
    pair, x = linear_pair(exact=False)
    found = kl_per_dimension(pair.model, pair.guide, x)
    q = pair.bed.best_mean_field(x).base_dist
    expected = kl_divergence(Normal(q.mean, q.stddev), Normal(0.0, 1.0))
    assert found.names == ("z[0]", "z[1]", "z[2]") and all(found.exact) and found.num_data == 30
    assert torch.allclose(found.value, expected.mean(0), rtol=1e-12)
    assert torch.allclose(found.data_stderr, expected.std(0) / math.sqrt(30), rtol=1e-10)
    assert (found.mc_stderr < 1e-12).all() and found.total == pytest.approx(expected.sum(1).mean().item())
    assert "closed form" in str(found) and "z[0]" in str(found)


def test_a_dependent_site_has_one_divergence():
    pair, x = linear_pair()
    found = kl_per_dimension(pair.model, pair.guide, x, num_samples=400)
    posterior = pair.bed.posterior(x)
    prior = MultivariateNormal(torch.zeros(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64))
    expected = kl_divergence(MultivariateNormal(posterior.mean, posterior.covariance_matrix), prior).mean().item()
    assert found.names == ("z",)
    assert abs(found.total - expected) < max(4 * found.mc_stderr.item(), 1e-10)
    model, _ = small_pair()
    full = Guide(FullNormal(MLP((1, 4, 4), [16], None), 3))
    closed = kl_per_dimension(model, full, binary(), num_samples=2)
    assert closed.names == ("z",) and closed.exact == (True,) and closed.mc_stderr.item() < 1e-6
    flow = Guide(NSF(MLP((1, 4, 4), [16], None), 3))
    sampled = kl_per_dimension(model, flow, binary(), num_samples=8)
    assert sampled.exact == (False,) and sampled.mc_stderr.item() > 0


def layered_model(x):
    with pyro.plate("batch", len(x)):
        top = pyro.sample("top", dist.Normal(0.0, 1.0))
        low = pyro.sample("low", dist.Normal(top, 1.0))
        pyro.sample("seen", dist.Normal(low, 1.0), obs=x)


def layered_guide(x):
    with pyro.plate("batch", len(x)):
        low = pyro.sample("low", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
        pyro.sample("top", dist.Normal(low / 2, 0.5**0.5))


def test_layers_are_averaged_over_each_other():
    """The prior of `low` depends on `top`, drawn after it by the guide: no closed form given a draw of top."""
    x = torch.tensor([0.5, -1.0, 2.0])
    found = kl_per_dimension(layered_model, layered_guide, x, num_samples=4000)
    assert found.names == ("top", "low") and found.exact == (True, False)
    low = torch.stack([2 * x / 3, torch.full_like(x, 2 / 3)])  # mean and variance
    # KL(N(low / 2, 1/2) || N(0, 1)), averaged over low.
    top = 0.5 * (0.5 + (low[0].square() + low[1]) / 4 - 1 - math.log(0.5))
    # E log q(low) - E log N(low; top, 1), with top = low / 2 + noise of variance 1/2.
    entropy = 0.5 * torch.log(2 * math.pi * math.e * low[1])
    cross = 0.5 * math.log(2 * math.pi) + 0.5 * ((low[0].square() + low[1]) / 4 + 0.5)
    for i, expected in enumerate((top, cross - entropy)):
        assert abs(found.value[i] - expected.mean()) < 4 * found.mc_stderr[i]
    total = rate_distortion(layered_model, layered_guide, x, num_samples=4000)
    assert abs(total.rate.value - (top + cross - entropy).mean()) < 4 * total.rate.mc_stderr


def test_pairs_that_do_not_broadcast_have_a_kl_too():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            assert z.dim() == 2
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.stack([x, 0 * x], -1), torch.tensor([0.5, 1.0])).to_event(1))

    x = torch.tensor([0.0, 1.0])
    with pytest.warns(UserWarning, match="one by one"):
        found = kl_per_dimension(model, guide, x, num_samples=500)
    expected = kl_divergence(Normal(x, torch.tensor(0.5)), Normal(0.0, 1.0)).mean()
    assert abs(found.total - expected) < 4 * found.mc_stderr.sum()
    information = mutual_information(model, guide, torch.linspace(-2, 2, 20))
    assert 0 < information.value < information.limit


def test_rate_and_distortion_make_the_elbo():
    pair, x = linear_pair(exact=False)
    found = rate_distortion(pair.model, pair.guide, x, num_samples=2000)
    q = pair.bed.best_mean_field(x).base_dist
    rate = kl_divergence(Normal(q.mean, q.stddev), Normal(0.0, 1.0)).sum(1)
    elbo = (pair.bed.log_evidence(x) - pair.bed.mean_field_gap()).mean().item()
    assert abs(found.rate.value - rate.mean().item()) < 4 * found.rate.mc_stderr
    assert found.rate.data_stderr == pytest.approx(rate.std().item() / math.sqrt(30), rel=0.05)
    assert abs(found.distortion.value + elbo + rate.mean().item()) < 4 * found.distortion.mc_stderr
    assert abs(found.value - elbo) < 4 * found.mc_stderr
    assert "rate" in str(found) and "2000 samples" in str(found)


@pytest.mark.parametrize(("a", "c"), [(1.0, 1.0), (1.5, 0.8), (0.5, 1.2)])
def test_mutual_information_of_a_gaussian_channel(a, c):
    pair, x = bed_pair(size=900)
    guide = Scaled(pair.bed, a, c)
    whole, own = guide.aggregate()
    exact = 0.5 * (torch.logdet(whole) - torch.logdet(own)).item()
    mismatch = 0.5 * (whole.trace() - 2 - torch.logdet(whole)).item()
    found = mutual_information(pair.model, guide.guide, x, num_samples=2)
    assert found.value - 4 * found.data_stderr < exact < found.upper.value + 4 * found.upper.data_stderr
    assert abs(found.value - exact) < 4 * found.data_stderr + 0.06 and found.value <= found.upper.value
    assert found.upper.value - found.value < 0.12
    assert abs(found.marginal_kl.value - mismatch) < 4 * found.marginal_kl.data_stderr + 0.06
    assert abs(found.rate.value - exact - mismatch) < 4 * found.rate.data_stderr
    assert found.limit == pytest.approx(math.log(900)) and not found.saturated


def test_the_jackknife_leaves_each_datum_out(monkeypatch):
    """By running the estimate again without it."""
    import pyro_vae.judging.sweeps as module

    pair, x = bed_pair(size=25)
    z = pair.bed.posterior(x).sample()

    class Given:
        """Draws that do not depend on who else is there."""

        @staticmethod
        def draw(model, guide, batch, kwargs, num_samples, **options):
            places = [int((x == row).all(1).nonzero()) for row in batch[0]]
            trace = pyro.poutine.trace(pyro.poutine.condition(pair.guide, data={"z": z[places]})).get_trace(batch[0])
            joint = pyro.poutine.trace(pyro.poutine.condition(pair.model, data={"z": z[places]})).get_trace(batch[0])
            for one in (trace, joint):
                one.compute_log_prob()
            return module.Particles(
                joint.nodes["x"]["log_prob"][None], {"z": joint.nodes["z"]["log_prob"][None]},
                {"z": trace.nodes["z"]["log_prob"][None]}, {"z": z[places][None]},
            )  # fmt: skip

    monkeypatch.setattr(module, "draw", Given.draw)
    monkeypatch.setattr(module, "_CHUNK", 10 * 512)  # batches of ten
    whole = mutual_information(pair.model, pair.guide, x)
    keep = [[j for j in range(25) if j != left] for left in range(25)]
    parts = [mutual_information(pair.model, pair.guide, x[index]) for index in keep]
    for number in (lambda found: found, *(attrgetter(name) for name in ("upper", "rate", "marginal_kl"))):
        values = torch.tensor([number(part).value for part in parts], dtype=torch.float64)
        assert number(whole).data_stderr == pytest.approx(math.sqrt(24 * values.var(correction=0).item()), rel=1e-6)


def test_information_stops_at_log_n():
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(100 * torch.arange(len(x)).double(), 1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(()).double(), 1000.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    found = mutual_information(model, guide, torch.zeros(20).double())
    assert found.value == pytest.approx(math.log(20)) and found.saturated and found.upper.value > 100
    assert "at its limit" in str(found)
    few = mutual_information(model, guide, torch.zeros(20).double(), num_data=7)
    assert len(few.pointwise) == 7 and few.limit == pytest.approx(math.log(7))


def test_information_refuses_what_it_cannot_score():
    model, _ = small_pair()
    layers = nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.Dropout(0.5))
    drop = Guide(FullNormal(layers, 3))
    assert mutual_information(model, drop, binary()).limit == pytest.approx(math.log(12)) and layers.training

    class Noisy(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, training=True)

    layers[2] = Noisy()
    with pytest.raises(ValueError, match="differently a second time, though its networks are in evaluation mode.*site"):
        mutual_information(model, drop, binary())
    torch.manual_seed(0)
    point = autoencoder((1, 4, 4), latent_dim=2, hidden=(8,))
    for function in (kl_per_dimension, mutual_information, rate_distortion, collapse):
        with pytest.raises(ValueError, match=r"'z' is a point \(Delta\)"):
            function(point.model, point.guide, binary())
    with pytest.raises(ValueError, match="got 2 data, wanted at least three"):
        mutual_information(*small_pair(), binary(2))

    def auxiliary(x):
        with pyro.plate("batch", len(x)):
            pyro.sample("helper", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
            low = pyro.sample("low", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
            pyro.sample("top", dist.Normal(low / 2, 0.5**0.5))

    with pytest.raises(ValueError, match="guide site 'helper' is none of the model's latent sites: it is auxiliary"):
        mutual_information(layered_model, auxiliary, torch.zeros(5))


def test_several_sites_have_their_information_jointly():
    x = torch.randn(300, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 3**0.5
    found = mutual_information(layered_model, layered_guide, x)
    exact = 0.5 * math.log(3)  # z -> x has the signal 2 and the noise 1; top adds nothing
    assert abs(found.value - exact) < 4 * found.data_stderr + 0.03


def planted(x):
    """Four latents: alive, alive by a hair, dead at the prior, and a constant off the prior."""
    with pyro.plate("data", len(x)):
        loc = torch.stack([x, 0.15 * x, 0 * x, 0 * x + 1], -1)
        pyro.sample("z", dist.Normal(loc, torch.tensor([0.5, 0.98, 1.0, 1.0])).to_event(1))


def planted_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0].tanh(), 1.0), obs=x)


def test_the_dead_are_found():
    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    found = collapse(planted_model, planted, x)
    assert found.dead.tolist() == [False, False, True, False] and found.dead_names == ("z[2]",)
    expected = x.var() * torch.tensor([1.0, 0.0225, 0.0, 0.0])
    assert ((found.variance - expected).abs() < 4 * found.variance_data_stderr + 1e-3).all()
    assert not found.collapsed and found.optimum is None
    assert "1 of 4 latents dead (variance of the mean < 0.01 and KL < 0.01 nats): z[2]; rate" in str(found)

    def ignoring(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))

    gone = collapse(planted_model, ignoring, x[:200])
    assert gone.collapsed and gone.dead.all() and str(gone).startswith("the posterior has collapsed")
    with pytest.raises(ValueError, match="got num_samples=1, wanted at least 2 draws"):
        collapse(planted_model, planted, x, num_samples=1)
    pair, data = bed_pair(200)  # a full covariance: only the site's divergence is known
    assert collapse(pair.model, pair.guide, data).component_kl.isnan().all()
    assert not collapse(pair.model, pair.guide, data).dead.any()


def principal(eigenvalues, scale, dim, shrink=1.0):
    """Data of exactly these covariance eigenvalues, and the maximum-likelihood model at a scale."""
    size = 400
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(size, len(eigenvalues), generator=generator, dtype=torch.float64)
    x = x - x.mean(0)
    white = x @ torch.linalg.inv(torch.linalg.cholesky(x.T @ x / size)).T
    basis = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator).double())[0]
    values = torch.tensor(eigenvalues, dtype=torch.float64)
    x = white * values.sqrt() @ basis.T + 2.0
    weight = basis[:, :dim] * (values[:dim] - scale**2).clamp(min=0).sqrt() * shrink
    turn = torch.linalg.qr(torch.randn(dim, dim, generator=generator).double())[0]
    bed = LinearGaussian(weight @ turn, torch.full((len(eigenvalues),), 2.0, dtype=torch.float64), scale)
    return LinearPair(bed), x


def test_a_collapsed_optimum_is_told_from_a_collapsed_fit():
    spectrum = [5.0, 3.0, 0.8, 0.3, 0.2]
    pair, x = principal(spectrum, 1.0, 3)
    best = linear_optimum(pair.model, x)
    assert torch.allclose(best.eigenvalues, torch.tensor(spectrum[:3], dtype=torch.float64), rtol=1e-9)
    assert (best.optimum_active, best.fitted_active, best.free_active) == (2, 2, 3) and best.collapsed
    assert torch.allclose(best.signal, torch.tensor([4.0, 2.0, 0.0]).double(), atol=1e-6)
    assert best.best_scale == pytest.approx(0.5) and best.scale == pytest.approx(1.0)
    assert abs(best.shortfall) < 1e-6
    assert "the optimum itself is collapsed: eigenvalue 0.8" in str(best) and "learn the scale (s^2 = 0.25" in str(best)

    free, _ = principal(spectrum, 0.5, 3)
    good = linear_optimum(free.model, x)
    assert (good.optimum_active, good.fitted_active) == (3, 3) and not good.collapsed

    lazy, _ = principal(spectrum, 0.5, 3, shrink=torch.tensor([1.0, 1.0, 0.0]))
    short = linear_optimum(lazy.model, x)
    assert (short.optimum_active, short.fitted_active) == (3, 2)
    assert "collapsed further than its optimum" in str(short)
    exact = (free.bed.log_evidence(x) - lazy.bed.log_evidence(x)).mean().item()
    assert short.shortfall == pytest.approx(exact, rel=1e-6) and exact > 0.05
    report = collapse(pair.model, pair.guide, x)
    assert report.optimum is not None and "optimum itself" in str(report)


def test_only_a_linear_gaussian_model_has_that_optimum():
    assert linear_optimum(planted_model, torch.randn(10)) is None
    assert linear_optimum(layered_model, torch.randn(10)) is None
    assert linear_optimum(small_pair()[0], binary()) is None
    pair, x = linear_pair()

    def skewed(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ pair.bed.weight.T, torch.arange(1.0, 7.0).double()).to_event(1), obs=x)

    def wide(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3).double(), 2.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ pair.bed.weight.T, 1.0).to_event(1), obs=x)

    assert linear_optimum(skewed, x) is None and linear_optimum(wide, x) is None


@pytest.mark.parametrize("method", ["knn", "linear"])
def test_probes_know_what_the_means_know(method):
    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("code", dist.Normal(x, 1.0).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            code = pyro.sample("code", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(code, 1.0).to_event(1), obs=x)

    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (3000,), generator=generator)
    x = torch.randn(3000, 2, generator=generator) + 2 * torch.stack([y, 0 * y], -1)
    found = probe(
        guide, x[:2000], labels=y[:2000], test_data=x[2000:], test_labels=y[2000:], method=method,
        num_neighbours=50,
    )  # fmt: skip
    bayes = 0.5 * (1 + math.erf(1 / math.sqrt(2)))  # two unit Gaussians 2 apart
    assert abs(found.value - bayes) < 4 * found.data_stderr and found.value > found.baseline + 4 * found.data_stderr
    assert found.data_stderr == pytest.approx(math.sqrt(found.value * (1 - found.value) / 1000), rel=0.01)
    assert (found.num_test, found.num_train) == (1000, 2000) and "1000 test labels" in str(found)
    with pytest.raises(ValueError, match=r"got test_labels of shape \(5,\) for 1000 data"):
        probe(guide, x[:2000], labels=y[:2000], test_data=x[2000:], test_labels=y[:5], site="code")
    with pytest.raises(ValueError, match="unknown method 'svm', wanted one of 'knn', 'linear'"):
        probe(guide, x, labels=y, test_data=x, test_labels=y, method="svm")
