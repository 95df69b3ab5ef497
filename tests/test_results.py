"""Results: one protocol for numbers and tables, held by every estimate and diagnostic."""

import json
import math
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_vae.judging._calibration import sbc
from pyro_vae.judging._collapse import collapse
from pyro_vae.judging._gaps import gaps
from pyro_vae.judging.annealing import ais, bdmc
from pyro_vae.judging.distances import guide_distances
from pyro_vae.judging.estimates import elbo_terms, log_likelihood, rate_distortion
from pyro_vae.judging.gradients import gradient_lab
from pyro_vae.judging.guides import compare_guides
from pyro_vae.judging.information import mutual_information
from pyro_vae.judging.latents import active_units, kl_per_dimension
from pyro_vae.judging.references import reference
from pyro_vae.judging.results import Mean, Measured, Result, averaged

X = torch.randn(6, generator=torch.Generator().manual_seed(0))
SCALE = torch.nn.Parameter(torch.tensor(0.9))
QUIET = {"progress": False}


def model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(1), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(z[..., 0], 1.0), obs=x)


def guide(x):
    scale = pyro.param("scale", SCALE)
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x[:, None] / 2, scale).to_event(1))


MEASURED = {
    "log_likelihood": lambda: log_likelihood(model, guide, X, num_samples=50, **QUIET),
    "elbo_terms": lambda: elbo_terms(model, guide, X, num_samples=50, **QUIET),
    "ais": lambda: ais(model, guide, X, num_samples=4, num_steps=4, **QUIET),
    "rate_distortion": lambda: rate_distortion(model, guide, X, num_samples=50, **QUIET),
    "mutual_information": lambda: mutual_information(model, guide, X, num_samples=3, **QUIET),
    "gap": lambda: gaps(model, guide, X, num_samples=50, num_steps=8, window=2, **QUIET).families["guide"].inference,
}
TABLES = {
    "bdmc": lambda: bdmc(model, guide, X, num_samples=4, num_steps=4, **QUIET),
    "gaps": lambda: gaps(model, guide, X, num_samples=50, num_steps=8, window=2, **QUIET),
    "compare_guides": lambda: compare_guides(model, {"one": guide, "two": guide}, X, num_samples=50, **QUIET),
    "sbc": lambda: sbc(model, guide, X, num_samples=9, num_data=30, **QUIET),
    "gradient_lab": lambda: gradient_lab(model, guide, X, num_samples=(2, 4), repeats=10, **QUIET),
    "kl_per_dimension": lambda: kl_per_dimension(model, guide, X, **QUIET),
    "collapse": lambda: collapse(model, guide, X, **QUIET),
    "active_units": lambda: active_units(guide, X, **QUIET),
    "reference": lambda: reference(model, guide, X, num_samples=20, num_chains=2, num_warmup=20, **QUIET),
    "curve": lambda: MEASURED["log_likelihood"]().curve,
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_number_has_its_errors_and_its_parts_per_datum(name):
    found = MEASURED[name]()
    assert isinstance(found, Measured) and found.pointwise.shape == (6,) and found.num_samples > 1
    assert found.value == pytest.approx(found.pointwise.mean().item(), abs=1e-12)
    assert found.mc_stderr >= 0 and found.data_stderr > 0
    if name != "mutual_information":  # whose data are not independent terms
        assert found.data_stderr == pytest.approx(found.pointwise.std().item() / math.sqrt(6))
    each = found.to_frame(pointwise=True)
    assert each["pointwise"].tolist() == found.pointwise.tolist()


@pytest.mark.filterwarnings("ignore:the chains of")
@pytest.mark.parametrize("name", [*MEASURED, *TABLES])
def test_all_results_turn_into_data_frames_and_notebooks(name):
    found = (MEASURED | TABLES)[name]()
    assert isinstance(found, Result)
    plain = json.loads(json.dumps(found.to_dict()))
    assert set(plain) == {field for field in found.__dataclass_fields__}
    frame, rows = found.to_frame(), found.rows()
    assert len(frame) == len(rows) >= 1 and list(frame.columns) == list(dict.fromkeys(k for r in rows for k in r))
    if isinstance(found, Measured):
        assert frame["value"][0] == found.value and frame["mc_stderr"][0] == pytest.approx(found.mc_stderr, nan_ok=True)
    html, markdown = found._repr_html_(), found._repr_markdown_()
    assert html.count("<tr>") == len(rows) + 1 and html.count("<td>") == len(rows) * len(frame.columns)
    lines = markdown.split("\n\n")[1].splitlines()
    assert len(lines) == len(rows) + 2 and all(name in lines[0] for name in frame.columns)
    assert str(found)


def test_tables_have_a_row_for_each_of_what_they_compare():
    found = TABLES["compare_guides"]()
    assert [row["guide"] for row in found.rows()] == ["one", "two"]
    assert found.rows()[0]["gap"] == found.scores["one"].gap.value
    bracket = TABLES["bdmc"]()
    values = {row["bound"]: row["value"] for row in bracket.rows()}
    assert values["width"] == pytest.approx(values["upper"] - values["lower"], abs=1e-12)
    split = TABLES["gaps"]().rows()
    assert split[0]["family"] == "guide"
    assert split[0]["inference"] == pytest.approx(split[0]["approximation"] + split[0]["amortization"], abs=1e-12)
    lab = TABLES["gradient_lab"]()
    assert len(lab.rows()) == len(lab.measured) and lab.rows()[0]["snr"] == lab.measured[0].snr


def test_the_monte_carlo_error_of_the_width_is_what_seeds_vary_by():
    """The chains of both bounds are shared: the errors of both, added, would be too large."""

    def shifted(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x[:, None] / 2 + 0.4, 0.6).to_event(1))

    runs = [bdmc(model, shifted, torch.zeros(20), num_data=20, num_samples=6, num_steps=6, seed=s, **QUIET).width
            for s in range(24)]  # fmt: skip
    claimed = sum(run.mc_stderr**2 for run in runs) / 24
    values = torch.tensor([run.value for run in runs])
    population = sum(run.data_stderr**2 for run in runs) / 24
    assert claimed < population * 1.5  # new data come with new seeds
    assert values.var().item() == pytest.approx(population, rel=1.0)


def test_monte_carlo_errors_of_information_shrink_with_samples():
    few, many = (mutual_information(model, guide, X, num_samples=k, seed=1, **QUIET) for k in (4, 400))
    assert many.mc_stderr < few.mc_stderr / 5
    runs = torch.tensor([mutual_information(model, guide, X, num_samples=40, seed=s, **QUIET).value for s in range(60)])
    one = mutual_information(model, guide, X, num_samples=4000, seed=1, **QUIET).mc_stderr * 10
    assert runs.std().item() == pytest.approx(one, rel=0.35)
    assert math.isnan(mutual_information(model, guide, X, **QUIET).mc_stderr)


def test_a_mean_counts_what_remained_to_climb():
    value, variance, left = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0]), torch.tensor([0.0, 2.0])
    found = Mean.of(value, variance, 7, left)
    assert (found.value, found.mc_stderr, found.num_samples) == (2.0, math.hypot(1.0, 1.0), 7)
    assert torch.equal(found.pointwise_stderr, torch.tensor([2.0, 6.0]).sqrt())
    assert str(found) == "2.00 ± 1.41" and found.with_errors == "2.00 ± 1.41 (Monte Carlo; data ± 1.00) nats"
    assert math.isnan(averaged(value[:1], variance[:1])["data_stderr"])


def test_frames_need_pandas_and_say_so(monkeypatch):
    found = MEASURED["elbo_terms"]()
    with pytest.raises(ValueError, match="no values per datum of its own"):
        TABLES["bdmc"]().to_frame(pointwise=True)
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ValueError, match="needs pandas, which is not installed. Run: pip install pandas"):
        found.to_frame()


PLOTS = {
    "bdmc": "Bracket of log p(x), simulated data", "gaps": "Inference gap by guide", "sbc": None,
    "compare_guides": "Inference gap by guide", "gradient_lab": "Gradients of iwae by number of samples",
    "curve": "Bounds on log p(x) by number of samples", "kl_per_dimension": "KL by latent: 1 of 1 carry",
    "collapse": "KL by latent: 1 of 1 carry",
}  # fmt: skip


@pytest.mark.parametrize("name", PLOTS)
def test_tables_draw_themselves(name):
    figure = TABLES[name]().plot()
    title = PLOTS[name]
    drawn = [axes.get_title(loc="left") for axes in figure.axes]
    assert figure.axes and (title is None or any(text.startswith(title) for text in drawn))
    if name == "gradient_lab":
        assert figure.axes[0].get_ylabel() == "signal-to-noise ratio" and len(figure.axes[0].lines) >= 4
    if name == "compare_guides":
        assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["one", "two"]


@pytest.mark.filterwarnings("ignore:the chains of")  # 40 draws do not converge
def test_distances_are_a_table():
    known = reference(model, guide, X, num_samples=40, num_chains=2, num_warmup=20, **QUIET)
    found = guide_distances(model, guide, X, reference=known, num_directions=5)
    assert [row["distance"] for row in found.rows()][0] == "variance ratio" and "(null " in str(found)
