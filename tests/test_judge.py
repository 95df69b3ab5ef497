"""The verdict: its rules on numbers, three planted faults from end to end, the budget, the report, the command."""

import json
import math
import time
from html.parser import HTMLParser

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_vae.app import html
from pyro_vae.app.cli import main
from pyro_vae.app.commands import judge_run
from pyro_vae.app.judge import SHARES, Judgement, judge
from pyro_vae.app.verdicts import Finding, material, nats, verdict
from pyro_vae.judging.estimates import log_likelihood
from tests.pairs import binary, linear_pair, small_pair


class Ticks:
    """A clock that runs on by a thousandth whenever it is looked at, as at each sample statement."""

    def __init__(self, step=1e-3):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def culprits(**numbers):
    return {f.culprit for f in verdict(numbers) if f.culprit}


def said(**numbers):
    return " ".join(str(f) for f in verdict(numbers))


def split(approximation, amortization, error=0.02, **more):
    total = approximation + amortization
    return {
        "images": 50, "inference": total, "inference_stderr": error, "approximation": approximation,
        "approximation_stderr": error, "amortization": amortization, "amortization_stderr": error, "remaining": 0.0,
        "stopped": 1.0, **more,
    }  # fmt: skip


BOUNDS = {
    "num_samples": 10, "log_p": -80.0, "log_p_stderr": 0.1, "short": 0.4, "short_stderr": 0.05, "enough": 500,
    "short_source": "that at K = 1000", "reference_khat_ok": 1.0, "elbo": -81.0, "elbo_stderr": 0.02,
    "reference_log_p": -79.6, "reference_stderr": 0.02,
}  # fmt: skip
ALIVE = {"active": 3, "latent_dim": 3, "rate": 5.0, "dead": []}
DEAD = {"active": 0, "latent_dim": 3, "rate": 0.0, "dead": ["z[0]", "z[1]", "z[2]"]}


def test_a_number_counts_when_it_is_above_its_error_and_of_a_size_that_matters():
    assert material(0.2, 0.05) and not material(0.2, 0.11) and not material(0.04, 0.001)
    assert not material(0.2, None) and not material(0.2, math.nan) and not material(None, 0.1)
    assert nats(1.234, 0.05) == "1.23 ± 0.05" and nats(1.23456, 0.002) == "1.235 ± 0.002" and nats(None) == "unknown"


def test_the_gap_is_the_familys_the_encoders_or_both():
    assert culprits(gaps=split(0.5, 0.01)) == {"family"}
    assert culprits(gaps=split(0.01, 0.5)) == {"encoder"}
    assert culprits(gaps=split(0.5, 0.8)) == {"family", "encoder"}
    assert "1.30 ± 0.02 nats between ELBO and log p(x)" in said(gaps=split(0.5, 0.8))
    assert culprits(gaps=split(5.0, 0.4)) == {"family"}  # less than a tenth of the gap
    assert culprits(gaps=split(0.02, 0.02)) == set() and "costs nothing that matters" in said(gaps=split(0.02, 0.02))
    assert "too uncertain" in said(gaps=split(0.2, 0.1, error=0.3))
    assert "within the errors" in said(gaps=split(0.2, 0.2, error=0.15))
    assert "may still have risen by 0.4" in said(gaps=split(0.5, 0.01, remaining=0.4))


def test_a_fault_is_one_of_the_pair_and_not_of_the_few_data_at_hand():
    few = {"inference_data_stderr": 0.2, "approximation_data_stderr": 0.01, "amortization_data_stderr": 0.2}
    assert culprits(gaps=split(0.5, 0.3, **few)) == {"family"}
    assert culprits(gaps=split(0.5, 0.5, **few)) == {"family", "encoder"}
    assert "(50 data; ± 0.20 for others)" in said(gaps=split(0.5, 0.3, **few))


def test_what_could_not_be_split_is_said_to_be():
    gaps = {"images": 5, "inference": 0.7, "inference_stderr": 0.1, "approximation": None, "reason": "it is a Delta"}
    assert "cannot be told apart: it is a Delta" in said(gaps=gaps) and "0.70 ± 0.10" in said(gaps=gaps)
    assert "Whose fault that is was not found out" in said(bounds=BOUNDS)
    assert said() == "Nothing could be judged: see the stages for the reasons."
    late = [{"name": "bounds", "status": "skipped", "reason": "it did not fit"}]
    assert said(stages=late) == "Nothing could be judged: see the stages for the reasons. Give more time (budget)."


def test_the_remedy_is_what_was_tried():
    gained = {"gain": 0.48, "gain_stderr": 0.02, "approximation_before": 0.5}
    assert "Try FullNormal." in said(gaps=split(0.5, 0.0), remedy=gained)
    assert "Try a flow (IAF, NSF), which bends" in said(gaps=split(0.5, 0.0), remedy=gained | {"gain": 0.2})
    assert "0.01 ± 0.02 nats only" in said(gaps=split(0.5, 0.0), remedy=gained | {"gain": 0.01})
    assert "FullNormal or IAF" in said(gaps=split(0.5, 0.0))


def test_a_dead_encoder_and_a_collapsed_optimum_are_told_apart():
    assert culprits(gaps=split(0.01, 0.9), latents=DEAD) == {"dead encoder"}
    assert "failed training" in said(gaps=split(0.01, 0.9), latents=DEAD)
    assert "failed training" in said(gaps=split(9.0, 0.4), latents=DEAD)
    assert culprits(gaps=split(0.0, 0.0), latents=DEAD) == {"collapse"}
    assert "makes no use of z" in said(gaps=split(0.0, 0.0), latents=DEAD)
    assert culprits(bounds=BOUNDS, latents=DEAD) == {"dead encoder"}
    close = BOUNDS | {"reference_log_p": -81.0, "short": 0.0}
    assert culprits(bounds=close, latents=DEAD) == {"collapse"} and "could not be told" in said(latents=DEAD)
    assert "within the errors" in said(gaps=split(0.1, 0.1, error=0.4), latents=DEAD)
    some = said(latents=ALIVE | {"active": 2, "dead": ["z[1]"]})
    assert "2 of 3 latents move" in some and "unused: z[1]" in some


def test_the_estimator_is_at_fault_where_more_samples_would_mend_it():
    assert culprits(bounds=BOUNDS) == {"estimator"}
    assert "0.40 ± 0.05 short of that at K = 1000: K = 10 is too small. Increase it to K = 500." in said(bounds=BOUNDS)
    assert "tenfold" in said(bounds=BOUNDS | {"enough": None})
    heavy = BOUNDS | {"reference_khat_ok": 0.6, "enough": None}
    assert "too large for 40 %" in said(bounds=heavy) and culprits(bounds=heavy) == {"estimator"}
    assert culprits(bounds=heavy | {"short": 0.0}) == set() and "may be too low" in said(bounds=heavy | {"short": 0.0})
    assert "can be relied upon" in said(bounds=BOUNDS | {"short": 0.01})
    assert "not known" in said(bounds=BOUNDS | {"short": None})
    noisy = BOUNDS | {"short": 0.09, "short_stderr": 0.06}
    assert culprits(bounds=noisy) == set() and "0.09 ± 0.06 nats, is within the errors" in said(bounds=noisy)
    assert culprits(bounds=BOUNDS, gaps=split(0.0, 0.9), latents=DEAD) == {"dead encoder"}
    assert "consequence of the dead encoder" in said(bounds=BOUNDS, gaps=split(0.0, 0.9), latents=DEAD)


def test_bracket_and_calibration_in_words():
    tight = {"num_data": 30, "width": 0.03, "width_stderr": 0.01, "short_of_lower": 0.0, "short_of_upper": 0.02,
             "short_stderr": 0.01}  # fmt: skip
    fine = BOUNDS | {"short": 0.0}
    assert "brackets log p(x) to 0.03 ± 0.01" in said(bounds=fine, bracket=tight)
    assert "too wide" in said(bounds=fine, bracket=tight | {"width": 0.5})
    assert "at least 0.30 ± 0.01 nats too low" in said(bounds=fine, bracket=tight | {"short_of_lower": 0.3})
    ranks = {"num_data": 100, "calibrated": False, "names": ["a", "b"], "verdicts": ["too narrow", "calibrated"],
             "coverage_worst": 0.7}  # fmt: skip
    assert "too narrow in a (90 % intervals cover down to 70 %)" in said(calibration=ranks)
    assert "is calibrated" in said(calibration=ranks | {"calibrated": True})
    assert "says nothing here" in said(calibration=ranks | {"calibrated": True}, latents=DEAD)


def run(model, guide, x, **options):
    return judge(model, guide, x, **({"images": 8, "budget": 30.0, "num_samples": 500, "clock": Ticks()} | options))


def test_planted_a_mean_field_guide_on_a_correlated_posterior():
    pair, x = linear_pair(exact=False)
    found = run(pair.model, pair.guide, x)
    assert found.culprits == ("family",)
    assert "Try FullNormal." in str(found)
    gaps, truth = found.numbers["gaps"], pair.bed.mean_field_gap().item()
    assert abs(gaps["approximation"] - truth) < 4 * gaps["approximation_stderr"]
    assert [s["status"] for s in found.numbers["stages"]] == ["done"] * len(SHARES)
    again = Judgement.from_json(found.to_json())
    assert again.findings == found.findings and again.to_json() == found.to_json()
    assert run(pair.model, pair.guide, x).numbers["gaps"] == gaps


def test_planted_a_dead_encoder():
    pair, x = linear_pair()
    head = nn.Linear(6, 6).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)

    def guide(x):
        loc, log_scale = head(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    found = run(pair.model, guide, x, num_samples=1000)
    assert "dead encoder" in found.culprits and "encoder" not in found.culprits and "estimator" not in found.culprits
    assert found.numbers["latents"]["active"] == 0
    assert found.findings[0].culprit == "dead encoder"


@pytest.mark.parametrize("count", [3, 5])
def test_planted_too_small_a_number_of_samples(count):
    pair, x = linear_pair(stretch=1.8)
    few = run(pair.model, pair.guide, x, num_samples=count, images=24)
    assert "estimator" in few.culprits and "family" not in few.culprits
    assert f"K = {count} is too small" in str(few)
    bounds = few.numbers["bounds"]
    truth = pair.bed.log_evidence(x[: bounds["images"]]).mean().item()
    many = [log_likelihood(pair.model, pair.guide, x[: bounds["images"]], num_samples=count, seed=s) for s in range(400)]
    values = torch.tensor([e.value for e in many])
    lacks, noise = truth - values.mean().item(), values.std().item() / 400**0.5
    assert abs(lacks - bounds["short"]) < 4 * math.hypot(bounds["short_stderr"], noise)
    assert abs(truth - bounds["reference_log_p"]) < 0.02
    assert bounds["short_stderr"] < lacks / 3
    many = run(pair.model, pair.guide, x, num_samples=1000, images=24, budget=1.0)
    assert "estimator" not in many.culprits


def test_the_exact_posterior_is_acquitted():
    pair, x = linear_pair()
    found = run(pair.model, pair.guide, x, budget=8.0)
    assert found.culprits == () and "costs nothing that matters" in str(found)


def test_without_a_larger_number_of_samples_the_jackknife_says_what_is_lacking():
    pair, x = linear_pair(stretch=1.3)
    found = run(pair.model, pair.guide, x, num_samples=5000)
    bounds = found.numbers["bounds"]
    assert bounds["num_samples"] == bounds["reference_samples"] == 5000
    assert bounds["short"] == -bounds["bias"] and bounds["short_source"] == "its limit, by the jackknife"
    assert bounds["short_stderr"] == bounds["log_p_stderr"]
    truth = pair.bed.log_evidence(x[: bounds["images"]]).mean().item()
    assert abs(truth - bounds["log_p"] - bounds["short"]) < 4 * bounds["short_stderr"]


@pytest.mark.parametrize("budget", [0.01, 0.3, 3.0])
def test_the_budget_is_kept_and_what_does_not_fit_is_said(budget):
    model, guide = small_pair()
    clock = Ticks()
    found = judge(model, guide, binary(12), budget=budget, num_samples=100, clock=clock)
    assert clock.now <= budget + 0.1  # some looks at the clock in passing
    status = {s["name"]: s for s in found.numbers["stages"]}
    assert list(status) == list(SHARES)
    assert any(s["status"] == "skipped" and "did not fit" in s["reason"] for s in status.values())
    assert found.verdict


def test_a_plain_pair_that_cannot_be_annealed_or_climbed_is_judged_as_far_as_it_goes():
    def model(x):
        with pyro.plate("rows", len(x)):
            kind = pyro.sample("kind", dist.Bernoulli(0.5))
            pyro.sample("seen", dist.Normal(kind, 1.0), obs=x)

    def guide(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("kind", dist.Bernoulli(torch.full_like(x, 0.4)))

    found = run(model, guide, torch.linspace(-1, 2, 10), budget=5.0)
    status = {s["name"]: s for s in found.numbers["stages"]}
    assert status["bounds"]["status"] == "done" and status["bracket"]["status"] == "impossible"
    assert "not reparameterised" in str(found)


class Strict(HTMLParser):
    """Every tag closed in its order; what it refers to."""

    void = {"meta", "img", "br", "link"}

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_well_formed_escaped_and_needs_nothing_else():
    model, guide = small_pair()
    found = judge(model, guide, binary(8), images=8, budget=4.0, num_samples=50, clock=Ticks())
    evil = Judgement(found.numbers, (*found.findings, Finding("x", "<script>alert(1)</script>")), found.arrays)
    text = html.page(evil, "a <b> & c")
    parser = Strict()
    parser.feed(text)
    assert parser.open == [] and "script" not in parser.tags and "link" not in parser.tags
    assert parser.sources and all(source.startswith("data:image/png;base64,") for source in parser.sources)
    assert "<script" not in text and "a &lt;b&gt; &amp; c" in text
    assert "log p(x)" in text and "Verdict" in text
    asked = iter([False, False, True])
    short = html.page(found, "x", late=lambda: next(asked))
    assert short.count("<img") == 2 and "left out for want of time" in short and "left out" not in text
    assert "torch" not in html.page(Judgement(found.numbers | {"protocol": {"seed": 0}}, found.findings), "x", {})
    told = found.numbers | {"protocol": {"num_samples": 5, "versions": {"torch": "2.0"}}}
    assert "num samples 5, torch 2.0." in html.page(Judgement(told, found.findings), "x", {})


def test_the_worst_ranks_are_shown_first_under_their_names():
    ranks = torch.arange(300).reshape(100, 3) % 100
    arrays = {"ranks": ranks, "num_draws": 99}
    numbers = {"calibration": {"names": ["z[0]", "z[1]", "w"], "p_value": [0.5, 0.9, 0.01]}}
    figure, _ = html.draw(Judgement(numbers, (), arrays))["ranks"]
    assert [axes.get_title() for axes in figure.axes] == ["w", "z[0]", "z[1]"]
    first = figure.axes[0].patches[1:]
    assert [bar.get_height() for bar in first] == [((ranks[:, 2] // 5) == b).sum() for b in range(len(first))]


def test_options_out_of_range_are_refused():
    model, guide = small_pair()
    for options, message in (({"images": 1}, "images=1"), ({"num_samples": 1}, "num_samples=1"), ({"budget": 0}, "budget=0")):
        with pytest.raises(ValueError, match=message):
            judge(model, guide, binary(4), **options)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = ["--epochs", "1", "--limit", "60", "--hidden", "8", "--latent-dim", "2", "--evaluation-samples", "20",
            "--evaluation-images", "10", "--quiet"]  # fmt: skip
    assert main(["fit", "--out", "run", *tiny]) == 0
    before = {p.name for p in (tmp_path / "run").iterdir()}
    assert main(["judge", "run", "--images", "6", "--budget", "4"]) == 0
    printed = capsys.readouterr().out
    assert "verdict" in printed and "judgement.html" in printed
    assert {p.name for p in (tmp_path / "run").iterdir()} - before == {"judgement.json", "judgement.html"}
    saved = json.loads((tmp_path / "run" / "judgement.json").read_text())
    assert saved["protocol"]["seconds"] < 60 and saved["findings"]
    assert main(["judge", "run", "--images", "6", "--budget", "2", "--json", "--out", "other"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["num_samples"] == 20
    assert (tmp_path / "other" / "judgement.html").is_file()
    # What went by before the work began, imports above all, is part of the budget.
    late = judge_run(tmp_path / "run", budget=50.0, started=time.monotonic() - 49.9)
    assert {s["status"] for s in late.numbers["stages"]} == {"skipped"} and "Give more time" in str(late)
    assert late.numbers["protocol"]["seconds"] > 49.9
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert main(["judge", "run", "--out", "file/there"]) == 2  # at once, and not after the work
    assert "wanted a folder to write to" in capsys.readouterr().err
    for arguments, message in (
        (["judge", "nowhere"], "wanted a run folder"),
        (["judge", "run", "--images", "1"], "1 is not in the range x>=2"),
        (["judge", "run", "--budget", "0"], "0 is not in the range x>=1"),
    ):
        assert main(arguments) == 2 and message in capsys.readouterr().err
    assert main(["fit", "--out", "points", "--posterior", "point", *tiny]) == 0
    capsys.readouterr()
    assert main(["judge", "points"]) == 2
    assert "plain autoencoder" in capsys.readouterr().err
