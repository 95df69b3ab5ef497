"""Guides compared: in any container, at any bound and K, several seeds pooled, with intervals that are what they say."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.stats import t

import pyro_vae as pv
from pyro_vae import Guide, Model, compare_guides

MODEL = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
X = torch.linspace(-2, 2, 40)
QUIET = {"progress": False}


def wide(scale):
    return Guide(lambda x: dist.Normal(x / 2, scale))


EXACT = wide(0.5**0.5)


def gap(scale):
    """KL(N(m, scale^2) || N(m, 1/2))."""
    return scale**2 - 0.5 - 0.5 * math.log(2 * scale**2)


def test_a_dict_a_list_a_guide_and_pairs_are_all_taken():
    named = compare_guides(MODEL, {"exact": EXACT, "wide": wide(1.0)}, X, num_samples=50, **QUIET)
    listed = compare_guides(MODEL, [EXACT, wide(1.0)], X, num_samples=50, **QUIET)
    assert list(listed.scores) == ["function 1", "function 2"]
    for one, other in zip(named.scores.values(), listed.scores.values(), strict=True):
        assert torch.equal(one.elbo.pointwise, other.elbo.pointwise)
    pair = pv.VAE(MODEL, EXACT)
    for given in (EXACT, [EXACT], pair, [pair], {"function": pair}):
        found = compare_guides(MODEL, given, X, num_samples=50, **QUIET)
        assert list(found.scores) == ["function"] and found.scores["function"].gap.value == pytest.approx(0, abs=1e-5)
    assert list(compare_guides(pair, [pair], X, num_samples=50, **QUIET).scores) == ["function"]


def test_lists_are_called_by_their_family():
    vae = pv.VAE.build((4,), latent_dim=2, hidden=(4,))
    flow = pv.VAE.build((4,), latent_dim=2, hidden=(4,), posterior="iaf")
    found = compare_guides(vae.model, [vae, flow.guide], torch.zeros(3, 4), num_samples=5, **QUIET)
    assert list(found.scores) == ["DiagonalNormal", "IAF"]


@pytest.mark.parametrize("guides, message", [
    ([], "got 0 guides"),
    ({"a": []}, "wanted at least one in each place"),
    ({"a": 3.0}, "got float as the guide 'a'"),
    ({"a": pv.VAE(Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0)), EXACT)}, "a model of its own"),
])  # fmt: skip
def test_what_is_no_guide_of_this_model_is_refused(guides, message):
    with pytest.raises(ValueError, match=message):
        compare_guides(MODEL, guides, X, **QUIET)


def test_any_bound_at_any_k_agrees_with_the_bound_itself():
    bounds = {"IWAE": (1, 20), pv.renyi(0.5): 5}
    found = compare_guides(MODEL, {"wide": wide(1.0)}, X, bounds=bounds, num_samples=400, **QUIET)
    one = found.scores["wide"]
    assert list(one.bounds) == ["iwae 1", "iwae 20", "renyi(0.5) 5"]
    assert one.bounds["iwae 1"].value == pytest.approx(one.elbo.value, abs=4 * one.bounds["iwae 1"].mc_stderr)
    pyro.set_rng_seed(7)
    for label, bound, count in (("iwae 20", pv.iwae, 20), ("renyi(0.5) 5", pv.renyi(0.5), 5)):
        draws = torch.stack([bound(pv.particles(MODEL, wide(1.0), X, num_samples=count)).mean() for _ in range(200)])
        error = math.hypot((draws.std() / 200**0.5).item(), one.bounds[label].mc_stderr)
        assert one.bounds[label].value == pytest.approx(draws.mean().item(), abs=4 * error), label
    assert one.elbo.value < one.bounds["iwae 20"].value < found.log_likelihood.value + 0.01
    for bad, message in (
        ({"iwea": 5}, "Did you mean 'iwae'"),
        ({pv.cubo(2.0): 5}, "one from above"),
        ({"iwae": 0}, "positive"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_guides(MODEL, {"wide": EXACT}, X, bounds=bad, **QUIET)


def test_seeds_are_pooled_and_the_interval_is_students():
    scales = (0.8, 1.0, 1.3)
    found = compare_guides(MODEL, {"exact": EXACT, "wide": [wide(s) for s in scales]}, X, bounds={"iwae": 5},
                           num_samples=2000, **QUIET)  # fmt: skip
    one = found.scores["wide"]
    assert one.num_guides == 3 and len(one.pareto_k) == 3 * len(X) and len(one.elbo.pointwise) == len(X)
    true = torch.tensor([gap(s) for s in scales])
    assert one.gap.value == pytest.approx(true.mean().item(), abs=4 * one.gap.mc_stderr)
    half = t.ppf(0.975, 2) * true.std().item() / 3**0.5
    low, high = one.intervals["gap"]
    assert (high - low) / 2 == pytest.approx(half, rel=0.1) and (low + high) / 2 == pytest.approx(
        one.gap.value, abs=1e-6
    )
    assert set(one.intervals) == {"elbo", "gap", "iwae 5"}
    single = found.scores["exact"]
    assert single.intervals["elbo"] == pytest.approx(
        (single.elbo.value - 2 * single.elbo.mc_stderr, single.elbo.value + 2 * single.elbo.mc_stderr)
    )
    # The pooled Monte Carlo error is that of a mean of three independent numbers.
    alone = compare_guides(MODEL, {str(s): wide(s) for s in scales}, X, num_samples=2000, **QUIET)
    errors = [each.elbo.mc_stderr for each in alone.scores.values()]
    assert one.elbo.mc_stderr == pytest.approx(sum(e**2 for e in errors) ** 0.5 / 3, rel=0.15)
    assert found.difference("exact", "wide").value == pytest.approx(one.gap.value - single.gap.value, abs=1e-6)


def test_it_is_written_as_a_table():
    found = compare_guides(
        MODEL, {"exact": EXACT, "wide": [wide(0.8), wide(1.0)]}, X, bounds={"iwae": (5, 50)}, num_samples=50, **QUIET
    )
    text = found.to_latex()
    assert (
        text.splitlines()[2].startswith(r"guide & ELBO & iwae 5 & iwae 50 & log p(x) from it & gap")
        and r"wide (of 2) & " in text
    )
    frame = found.to_frame()
    assert (
        frame.loc[1, "elbo_low"] == pytest.approx(found.scores["wide"].intervals["elbo"][0])
        and frame.loc[0, "num_guides"] == 1
    )
    assert "95 % over guides of other seeds" in str(found)
    assert [t.get_text() for t in found.plot().axes[0].get_xticklabels()] == ["exact", "wide"]
