"""Estimates of log p(x): closed forms, errors that are errors, bounded memory."""

import math
import resource
import subprocess
import sys
import textwrap
import types

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.judging.anomalies import anomaly_scores, roc_auc
from pyro_vae.judging.distances import energy_distance
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.judging.evidence import Estimate
from pyro_vae.judging.latents import active_units, posterior_means
from pyro_vae.judging.quotes import lower_bound
from pyro_vae.judging.results import Nats, plain, typed
from pyro_vae.judging.weights import khat_limit, pareto_k, pareto_smoothed
from pyro_vae.programs.pair import Guide
from pyro_vae.programs.zoo import autoencoder
from tests.pairs import binary, linear_pair, small_pair

assert resource  # not on Windows: the memory test needs it in its child


def test_the_exact_posterior_gives_the_evidence_without_error():
    pair, x = linear_pair()
    estimate = log_likelihood(pair.model, pair.guide, x, num_samples=50)
    assert (estimate.pointwise - pair.bed.log_evidence(x)).abs().max() < 1e-10
    assert estimate.mc_stderr < 1e-6 and abs(estimate.bias) < 1e-10
    assert torch.allclose(estimate.ess, torch.full_like(estimate.ess, 50.0))
    assert (estimate.pareto_k == -math.inf).all() and estimate.khat_ok == 1


def test_a_wider_guide_gives_it_within_its_standard_error():
    pair, x = linear_pair(stretch=1.3)
    estimate = log_likelihood(pair.model, pair.guide, x, num_samples=4000)
    error = estimate.value - pair.bed.log_evidence(x).mean().item()
    assert abs(error) < 4 * estimate.mc_stderr
    assert 1e-4 < estimate.mc_stderr < 1e-2
    assert (estimate.pareto_k < 0.5).all()
    assert estimate.value == estimate.pointwise.mean().item()
    assert estimate.data_stderr == pytest.approx(estimate.pointwise.std().item() / math.sqrt(30))


def test_the_monte_carlo_error_is_the_spread_over_seeds():
    pair, x = linear_pair(stretch=1.4)
    runs = [log_likelihood(pair.model, pair.guide, x, num_samples=200, seed=s) for s in range(60)]
    spread = np.std([r.value for r in runs], ddof=1)
    claimed = np.mean([r.mc_stderr for r in runs])
    assert abs(claimed / spread - 1) < 4 / math.sqrt(2 * 59)


def test_the_jackknife_sees_the_bias():
    pair, x = linear_pair(stretch=1.4)
    evidence = pair.bed.log_evidence(x).mean().item()
    runs = [log_likelihood(pair.model, pair.guide, x, num_samples=20, seed=s) for s in range(200)]
    errors = np.array([r.value - evidence for r in runs])
    biases = np.array([r.bias for r in runs])
    bias, stderr = errors.mean(), errors.std(ddof=1) / math.sqrt(len(errors))
    assert bias < -4 * stderr  # there is one
    assert abs(biases.mean() - bias) < 4 * stderr
    assert abs((errors - biases).mean()) < abs(bias) / 3


def test_k_hat_knows_a_narrow_guide_and_is_per_datum():
    narrow, x = linear_pair(stretch=0.45)
    estimate = log_likelihood(narrow.model, narrow.guide, x, num_samples=2000, method="importance")
    assert estimate.pareto_k.median() > 0.7
    assert "(a lower bound: the weights of the others miss mass" in str(estimate)
    weights = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    alone = torch.cat([pareto_k(weights[:, i : i + 1]) for i in range(3)])
    assert torch.equal(pareto_k(weights), alone)
    heavy = -0.9 * torch.log(torch.rand(20000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    assert pareto_k(heavy).item() == pytest.approx(0.9, abs=0.1)  # Pareto weights with shape 0.9


def test_k_hat_at_its_edges():
    assert pareto_k(torch.zeros(10, 2)).isnan().all()
    assert (pareto_k(torch.full((100, 2), -80.0)) == -math.inf).all()
    assert khat_limit(5000) == 0.7
    assert khat_limit(100) == pytest.approx(0.5)
    # Weights that have reached their maximum: bounded, with as many moments as one likes.
    generator = torch.Generator().manual_seed(0)
    two = torch.where(torch.rand(1000, 2, generator=generator) < torch.tensor([0.5, 0.9]), -80.0, -85.0)
    assert (pareto_k(two) == -math.inf).all() and (pareto_smoothed(two)[0] == two.double()).all()
    assert (pareto_k(torch.randn(1000, 2, generator=generator)) > -1).all()


def test_a_discrete_latent_has_an_estimate_and_a_k_hat():
    def model(x):
        with pyro.plate("rows", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("seen", dist.Normal(kind, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("kind", dist.Bernoulli(torch.full_like(x, 0.4)))

    x = torch.linspace(-1, 2, 7)
    found = log_likelihood(model, guide, x, num_samples=2000)
    truth = (dist.Normal(0.0, 1.0).log_prob(x).exp() / 2 + dist.Normal(1.0, 1.0).log_prob(x).exp() / 2).log()
    stderr = ((2000 / found.ess - 1) / 1999).sqrt()
    assert ((found.pointwise - truth).abs() < 4 * stderr).all()
    assert (found.pareto_k == -math.inf).all() and found.khat_ok == 1


def test_the_printed_line_carries_both_errors():
    pointwise = torch.tensor([-86.0, -87.0], dtype=torch.float64)
    estimate = Estimate(-86.41, 0.0123, 0.24, pointwise, 5000, -0.001, pointwise, torch.tensor([0.1, 0.2]))
    assert str(estimate) == "log p(x) = -86.41 ± 0.01 (Monte Carlo; data ± 0.24) nats, k̂ ok for 100.0 %"


def with_shapes(good: int, of: int) -> Estimate:
    """An estimate of so many data, of which so many have a good k-hat."""
    pointwise = torch.linspace(2216.0, 2217.62, of, dtype=torch.float64)
    k = torch.where(torch.arange(of) < good, 0.3, 0.9).double()
    return Estimate(2216.81, 0.1, 3.14, pointwise, 5000, -0.43, pointwise, k, smoothed_stderr=0.77)


def test_where_the_weights_miss_mass_the_number_is_a_lower_bound_everywhere():
    bound, estimate = with_shapes(8, 10), with_shapes(9, 10)
    assert (bound.kind, estimate.kind) == ("lower bound", "estimate")
    assert str(bound).startswith("log p(x) >= 2216.8 nats (data ± 3.14), k̂ ok for 80.0 % (a lower bound")
    assert str(estimate).startswith("log p(x) = 2216.81 ± 0.10 (Monte Carlo; data ± 3.14) nats, k̂ ok for 90.0 %")
    for shown in (str(bound), bound._repr_html_(), bound._repr_markdown_(), bound.advice(), str(bound.to_frame())):
        assert "0.43" not in shown and "± 0.1" not in shown and "0.77" not in shown
    assert bound.rows()[0]["is"] == "lower bound" and bound.rows()[0]["mc_stderr"] is None
    assert estimate.rows()[0]["bias"] == -0.43 and "-0.43" in estimate._repr_html_()
    kept = Nats.of(bound)
    assert str(kept) == ">= 2216.8" and str(Nats.of(estimate)) == "2216.81 ± 0.10"
    assert str(kept.minus(Nats(2210.0, 0.02))) == ">= 6.80" and typed(Nats, plain(kept, finite=True)) == kept
    unknown = Estimate(1.0, 0.1, 0.2, bound.pointwise, 5, 0.1, bound.pointwise, torch.full((10,), math.nan))
    assert unknown.kind == "unchecked" and "k̂ unknown at K = 5" in str(unknown)


def test_quadrature_takes_over_where_the_weights_miss_mass():
    narrow, x = linear_pair(stretch=0.3)
    truth = narrow.bed.log_evidence(x)
    sampled = log_likelihood(narrow.model, narrow.guide, x, num_samples=1000, method="importance", progress=False)
    assert sampled.kind == "lower bound" and sampled.method == "importance"
    found = log_likelihood(narrow.model, narrow.guide, x, num_samples=1000, progress=False)
    assert found.method == "quadrature" and found.kind == "estimate"
    assert (found.pointwise - truth).abs().max() < 1e-6 and found.mc_stderr < 1e-6
    assert str(found) == f"log p(x) = {truth.mean():.2f} nats (data ± {found.data_stderr:.2f}), by quadrature"
    assert "K plays no part" in found.advice()
    # Too few samples for so many points of a grid, or good weights: importance sampling stays.
    few = log_likelihood(narrow.model, narrow.guide, x, num_samples=700, progress=False)
    assert few.method == "importance" and few.kind == "lower bound"
    good, _ = linear_pair(stretch=1.2)
    kept = log_likelihood(good.model, good.guide, x, num_samples=1000, progress=False)
    asked = log_likelihood(good.model, good.guide, x, method="quadrature", progress=False)
    assert kept.method == "importance" and asked.method == "quadrature"
    assert ((kept.pointwise - asked.pointwise).abs() < 5 * ((1000 / kept.ess - 1) / 999).sqrt()).all()
    assert abs(kept.value - asked.value) < 4 * kept.mc_stderr


def test_a_grid_that_has_not_converged_is_not_taken():
    """A prior of heavy tails under data that say nothing: no grid of eight standard deviations holds its mass."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.StudentT(1.5, x.new_zeros(1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(torch.tanh(z), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0 * x, 0.3).to_event(1))

    x = torch.tensor([[0.3], [1.0]], dtype=torch.float64)
    found = log_likelihood(model, guide, x, num_samples=1000, progress=False)
    assert found.method == "importance" and found.kind == "lower bound"
    with pytest.raises(ValueError, match=r"the grids of 2 of 2 data have not converged .* Use method='importance'"):
        log_likelihood(model, guide, x, method="quadrature", progress=False)
    with pytest.raises(ValueError, match="got method='exact', wanted one of 'auto', 'importance', 'quadrature'"):
        log_likelihood(model, guide, x, method="exact")


def test_comparisons_and_gaps_from_a_lower_bound_are_lower_bounds():
    from pyro_vae.judging._gaps import gaps
    from pyro_vae.judging.guides import compare_guides

    narrow, x = linear_pair(stretch=0.45)
    found = compare_guides(narrow.model, {"narrow": narrow.guide}, x, num_samples=1000, progress=False)
    score = found.scores["narrow"]
    assert score.log_likelihood.kind == score.gap.kind == found.log_likelihood.kind == "lower bound"
    head, _, line = str(found).split("\n")
    assert f"log p(x) {lower_bound(found.log_likelihood.value)} nats" in head and line.count(">=") == 2
    wide, _ = linear_pair(stretch=1.2)
    both = compare_guides(wide.model, {"narrow": narrow.guide, "wide": wide.guide}, x, num_samples=1000, progress=False)
    assert both.log_likelihood.kind == both.scores["narrow"].gap.kind == "estimate"
    assert both.scores["narrow"].log_likelihood.kind == "lower bound"
    split = gaps(wide.model, wide.guide, x, num_samples=200, num_steps=8, window=2, progress=False)
    assert ">=" not in str(split) and split.families["guide"].inference.kind == "estimate"


def test_elbo_terms_add_up_to_the_closed_form():
    pair, x = linear_pair(exact=False)
    terms = elbo_terms(pair.model, pair.guide, x, num_samples=2000)
    expected = (pair.bed.log_evidence(x).mean() - pair.bed.mean_field_gap()).item()
    assert abs(terms.value - expected) < 4 * terms.mc_stderr
    assert terms.value == pytest.approx(terms.reconstruction - terms.kl, abs=1e-9)
    q = pair.bed.best_mean_field(x).base_dist
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(q.mean, q.stddev), dist.Normal(0.0, 1.0))
    assert terms.kl == pytest.approx(kl.sum(-1).mean().item(), abs=0.05)
    assert "nats = reconstruction" in str(terms)


def test_chunks_do_not_change_the_estimate(monkeypatch):
    import pyro_vae.judging.sweeps as module

    pair, x = linear_pair(stretch=1.2)
    whole = log_likelihood(pair.model, pair.guide, x, num_samples=3000)
    monkeypatch.setattr(module, "_CHUNK", 2**19)
    pieces = log_likelihood(pair.model, pair.guide, x, num_samples=3000)
    assert abs(whole.value - pieces.value) < 4 * math.hypot(whole.mc_stderr, pieces.mc_stderr)
    assert whole.value != pieces.value
    again = log_likelihood(pair.model, pair.guide, x, num_samples=3000)
    assert again.value == pieces.value


@pytest.mark.slow
def test_memory_is_bounded_whatever_k():
    code = """
        import resource, torch
        import pyro_vae as pv
        torch.manual_seed(0)
        vae = pv.VAE.build((1, 28, 28), latent_dim=50, hidden=(64,))
        x = (torch.rand(200, 1, 28, 28) < 0.2).float()
        pv.log_likelihood(vae.model, vae.guide, x[:2], num_samples=2)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        pv.log_likelihood(vae.model, vae.guide, x, num_samples=5000)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20)
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 1.0  # GiB


def test_a_point_guide_has_no_estimate():
    torch.manual_seed(0)
    pair = autoencoder((1, 4, 4), latent_dim=2, hidden=(8,))
    for estimate in (log_likelihood, elbo_terms):
        with pytest.raises(ValueError, match=r"'z' is a point \(Delta\)"):
            estimate(pair.model, pair.guide, binary())
    with pytest.raises(ValueError, match="is a point"):
        anomaly_scores(pair.model, pair.guide, binary())


def test_several_sites_of_any_name():
    def model(x):
        with pyro.plate("batch", len(x)):
            top = pyro.sample("top", dist.Normal(0.0, 1.0))
            low = pyro.sample("low", dist.Normal(top, 1.0))
            pyro.sample("seen", dist.Normal(low, 1.0), obs=x)

    def guide(x):
        with pyro.plate("batch", len(x)):
            low = pyro.sample("low", dist.Normal(2 * x / 3, (2 / 3) ** 0.5))
            pyro.sample("top", dist.Normal(low / 2, 0.5**0.5))

    x = torch.tensor([0.0, 1.0])
    estimate = log_likelihood(model, guide, x, num_samples=100)
    expected = dist.Normal(0.0, 3**0.5).log_prob(x)
    assert (estimate.pointwise - expected).abs().max() < 1e-5


def test_anomaly_scores_are_minus_the_densities():
    pair, x = linear_pair()
    scores = anomaly_scores(pair.model, pair.guide, x, num_samples=10)
    assert torch.allclose(scores, -pair.bed.log_evidence(x))
    strange = anomaly_scores(pair.model, pair.guide, x + 5, num_samples=10)
    assert roc_auc(scores, strange) > 0.95
    with pytest.raises(ValueError, match="unknown score 'density'.*log-likelihood, reconstruction"):
        anomaly_scores(pair.model, pair.guide, x, score="density")
    terms = elbo_terms(pair.model, pair.guide, x, num_samples=3000)
    errors = anomaly_scores(pair.model, pair.guide, x, score="reconstruction", num_samples=3000)
    assert errors.mean().item() == pytest.approx(-terms.reconstruction, abs=0.05)


def test_active_units_counts_the_moving_means():
    def guide(x):
        with pyro.plate("data", len(x)):
            loc = torch.stack([x, 0.2 * x, 0.05 * x, torch.zeros_like(x)], -1)
            pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(4), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0), obs=x)

    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    units = active_units(guide, x)
    assert (units.count, units.latent_dim) == (2, 4)
    assert torch.allclose(units.variance, x.var() * torch.tensor([1.0, 0.04, 0.0025, 0.0]), rtol=1e-4, atol=1e-7)
    assert torch.equal(posterior_means(guide, x)[:, 0], x)
    with pytest.raises(ValueError, match="no site 'w', wanted one of 'z'"):
        active_units(guide, x, site="w")
    decoder, encoder = small_pair()
    assert posterior_means(Guide(encoder.posterior), binary()).shape == (12, 3)


def test_active_units_of_scalar_sites_and_inner_plates():
    weight = torch.tensor([1.0, 0.0, 0.3])

    def guide(x):
        rows, cells = pyro.plate("rows", len(x), dim=-1), pyro.plate("cells", 3, dim=-2)
        with rows:
            pyro.sample("one", dist.Normal(0.5 * x, 1.0))
            with cells:
                pyro.sample("many", dist.Normal(weight[:, None] * x, 1.0))

    def model(x):
        with pyro.plate("rows", len(x), dim=-1):
            one = pyro.sample("one", dist.Normal(0.0, 1.0))
            with pyro.plate("cells", 3, dim=-2):
                pyro.sample("many", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(one, 1.0), obs=x)

    x = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    one, many = (active_units(guide, x, site=name) for name in ("one", "many"))
    assert (one.count, one.latent_dim, many.count, many.latent_dim) == (1, 1, 2, 3)
    assert torch.allclose(one.variance, 0.25 * x.var()) and torch.allclose(many.variance, weight.square() * x.var())
    assert torch.allclose(posterior_means(guide, x, site="many"), weight * x[:, None])
    with pytest.raises(ValueError, match="2 latent sites, 'one', 'many', wanted one. Name it: site="):
        active_units(guide, x)


def test_energy_distance_of_two_normals():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, 1, generator=generator, dtype=torch.float64)
    y = torch.randn(1500, 1, generator=generator, dtype=torch.float64)
    shift = 1.0
    # E|X - Y| of N(0, 2) and of its shift, in closed form.
    folded = 2 / math.sqrt(math.pi)
    moved = math.sqrt(2) * math.sqrt(2 / math.pi) * math.exp(-(shift**2) / 4) + shift * math.erf(shift / 2)
    assert energy_distance(x, y).value == pytest.approx(0, abs=0.01)
    assert energy_distance(x + shift, y).value == pytest.approx(2 * (moved - folded), abs=0.06)
    assert abs(energy_distance(x, y).null) < 0.02
    with pytest.raises(ValueError, match="of one shape"):
        energy_distance(x, y.expand(-1, 2))


def gaussian_weights(size, *spreads, seed=0):
    """Log weights s e - s^2 / 2, whose true mean weight is 1."""
    noise = torch.randn(size, len(spreads), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    spread = torch.tensor(spreads, dtype=torch.float64)
    return spread * noise - spread.square() / 2


def test_smoothing_keeps_the_scale_and_all_but_the_tail():
    weights = gaussian_weights(2000, 0.3, 1.0, 3.0) - 700.0  # far below what exp can hold
    smooth, k = pareto_smoothed(weights)
    assert torch.equal(k, pareto_k(weights))
    tail = math.ceil(min(0.2 * 2000, 3 * math.sqrt(2000)))
    order = weights.sort(0).indices
    for column in range(3):
        body, top = order[: 2000 - tail, column], order[2000 - tail :, column]
        assert torch.allclose(smooth[body, column], weights[body, column], rtol=0, atol=1e-9)
        assert (smooth[top, column].diff() >= -1e-12).all()  # in the order of the raw weights
        assert (smooth[top, column] != weights[top, column]).any()
    assert (smooth.amax(0) <= weights.amax(0) + 1e-9).all()
    short = weights[:24]
    assert torch.equal(pareto_smoothed(short)[0], short)
    mixed = torch.cat([weights[:, :1], torch.full((2000, 1), -3.0, dtype=torch.float64)], 1)
    assert (pareto_smoothed(mixed)[0][:, 1] == -3.0).all() and pareto_smoothed(mixed)[1][1] == -math.inf
    heavy = [pareto_smoothed(gaussian_weights(500, 2.5, seed=s))[0].logsumexp(0) - math.log(500) for s in range(40)]
    plain = [gaussian_weights(500, 2.5, seed=s).logsumexp(0) - math.log(500) for s in range(40)]
    assert torch.cat(heavy).var() < torch.cat(plain).var()


@pytest.mark.parametrize("sign", [-1.0, 1.0], ids=["log likelihoods", "log weights"])
def test_either_version_of_arviz_gives_the_same(monkeypatch, sign):
    """ArviZ 1.x keeps psislw elsewhere, and takes log likelihoods."""
    try:
        from arviz_stats.base import array_stats

        def of_weights(a):
            return array_stats.psislw(-a, axis=-1)
    except ImportError:
        from arviz import psislw as of_weights

    weights = gaussian_weights(300, 0.5, 2.0)
    expected = pareto_smoothed(weights)
    module = types.ModuleType("arviz_stats.base")
    module.array_stats = types.SimpleNamespace(psislw=lambda a, axis: of_weights(np.array(sign * a)))
    monkeypatch.setitem(sys.modules, "arviz_stats", types.ModuleType("arviz_stats"))
    monkeypatch.setitem(sys.modules, "arviz_stats.base", module)
    for one, other in zip(pareto_smoothed(weights), expected, strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-9)


def test_the_smoothed_estimate_stands_beside_the_plain_one():
    pair, x = linear_pair(stretch=1.3)
    estimate = log_likelihood(pair.model, pair.guide, x, num_samples=2000)
    evidence = pair.bed.log_evidence(x).mean().item()
    assert estimate.smoothed.shape == (30,)
    assert abs(estimate.smoothed_value - evidence) < 4 * estimate.smoothed_stderr
    assert estimate.smoothed_stderr == pytest.approx(estimate.mc_stderr, rel=0.1)
    assert not torch.equal(estimate.smoothed, estimate.pointwise)
    exact, x = linear_pair()
    constant = log_likelihood(exact.model, exact.guide, x, num_samples=50)
    assert torch.equal(constant.smoothed, constant.pointwise) and (constant.pareto_k == -math.inf).all()


def test_the_curve_is_that_of_fresh_runs():
    pair, x = linear_pair(stretch=1.4)
    whole = log_likelihood(pair.model, pair.guide, x, num_samples=1000)
    curve = whole.curve
    assert curve.num_samples == (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
    assert curve.value[-1].item() == pytest.approx(whole.value, abs=1e-12)
    assert curve.mc_stderr[-1].item() == pytest.approx(whole.mc_stderr, rel=1e-9)
    # At one sample it is the ELBO, whose gap is known: KL(N(m, s^2 V) || N(m, V)) in three dimensions.
    gap = 1.5 * (1.4**2 - 1 - 2 * math.log(1.4))
    elbo = pair.bed.log_evidence(x).mean().item() - gap
    assert abs(curve.value[0].item() - elbo) < 4 * curve.mc_stderr[0].item()
    assert (curve.value.diff()[:5] > 0).all()
    for place, size in ((1, 2), (3, 10)):
        runs = torch.tensor([log_likelihood(pair.model, pair.guide, x, num_samples=size, seed=s).value
                             for s in range(1, 41)])  # fmt: skip
        error = math.hypot(runs.std().item() / math.sqrt(40), curve.mc_stderr[place].item())
        assert abs(runs.mean().item() - curve.value[place].item()) < 4 * error
        # 1000 / K' blocks have the error of as many runs.
        claimed = curve.mc_stderr[place].item() * math.sqrt(1000 // size)
        assert abs(claimed / runs.std().item() - 1) < 4 / math.sqrt(2 * 39)
    assert "K = 1000   " in str(curve) and "±" in str(curve)


def test_advice_on_k():
    pair, x = linear_pair(stretch=1.3)
    good = log_likelihood(pair.model, pair.guide, x, num_samples=1000)
    enough = good.enough()
    assert enough is not None and enough < 1000
    place = good.curve.num_samples.index(enough)
    assert good.value - good.curve.value[place] + abs(good.bias) <= good.data_stderr / 10
    assert (
        f"K = 1000 is enough: the bias of {good.bias:.2g}" in good.advice() and f"K = {enough} would" in good.advice()
    )
    strict = good.advice(tolerance=abs(good.bias) / 10)
    assert good.enough(abs(good.bias) / 10) is None and good.enough(1e-15) is None
    assert "falls like 1/K, K = 10000 would do." in strict
    narrow, x = linear_pair(stretch=0.45)
    bad = log_likelihood(narrow.model, narrow.guide, x, num_samples=1000, method="importance")
    assert "misses mass of the posterior" in bad.advice() and "enrich the guide" in bad.advice()
    assert "too small to judge" in log_likelihood(pair.model, pair.guide, x, num_samples=5).advice()
    with pytest.raises(ValueError, match=r"got tolerance=-1, wanted a positive number of nats"):
        good.advice(-1)
    one = log_likelihood(pair.model, pair.guide, x[:1], num_samples=1000)
    assert "is enough" in one.advice() and "within 0.1 nats" in one.advice()


def test_k_hat_does_not_know_its_batch():
    pair, x = linear_pair(stretch=1.2)
    weights = gaussian_weights(1000, 0.3, 1.0, 4.0, 0.0)
    alone = torch.cat([pareto_smoothed(weights[:, i : i + 1])[0] for i in range(4)], 1)
    assert torch.equal(pareto_smoothed(weights)[0], alone)
    estimate = log_likelihood(pair.model, pair.guide, x, num_samples=1000)
    assert (estimate.pareto_k < 0.5).all()
