"""The verdict: its rules on numbers, three planted faults from end to end, the budget, the report, the command."""

import copy
import json
import math
import shlex
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn

from pyro_vae.app import cli, html
from pyro_vae.app.cli import main
from pyro_vae.app.commands import judge_run
from pyro_vae.app.configuration import convert
from pyro_vae.app.defaults import resolve
from pyro_vae.inference.training import fit
from pyro_vae.judging import judgement, remedies
from pyro_vae.judging._calibration import calibration
from pyro_vae.judging.advice import Finding, commands
from pyro_vae.judging.budget import Budget, Examination, OutOfTime
from pyro_vae.judging.curves import records_of, trend
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.judging.judgement import Judgement, judge
from pyro_vae.judging.remedies import _MADE, _widened, paired
from pyro_vae.judging.results import Nats
from pyro_vae.judging.stages import Bounds, Bracketed, Calibrated, GapSplit, Latents, Remedy, Stages
from pyro_vae.judging.trials import Training
from pyro_vae.judging.verdicts import verdict
from pyro_vae.parts.posteriors import IAF
from pyro_vae.programs.hamiltonian import Hamiltonian
from pyro_vae.programs.semi_amortized import SemiAmortized
from pyro_vae.programs.vae import VAE
from pyro_vae.traces import particles
from tests.pairs import binary, linear_pair, small_pair
from tests.test_kept import shorten, still


class Ticks:
    """A clock that runs on by a thousandth whenever it is looked at, as at each sample statement."""

    def __init__(self, step=1e-3):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


def culprits(**stages):
    return {f.culprit for f in verdict(Stages(**stages)) if f.culprit}


def said(**stages):
    return " ".join(str(f) for f in verdict(Stages(**stages)))


def split(approximation, amortization, error=0.02, spread=(math.nan, math.nan, math.nan), remaining=0.0):
    parts = (approximation + amortization, approximation, amortization)
    total, family, encoder = (Nats(v, error, s) for v, s in zip(parts, spread, strict=True))
    return GapSplit(
        status="done", num_data=50, inference=total, approximation=family, amortization=encoder, remaining=remaining,
        stopped=1.0,
    )  # fmt: skip


BOUNDS = Bounds(
    status="done", num_samples=10, log_p=Nats(-80.0, 0.1), missing=Nats(0.4, 0.05), enough=500,
    better_samples=1000, better_khat_ok=1.0, elbo=Nats(-81.0, 0.02), better=Nats(-79.6, 0.02),
)  # fmt: skip
NAMES = ("z[0]", "z[1]", "z[2]")
ALIVE = Latents(status="done", variance=dict.fromkeys(NAMES, 1.0), rate=5.0)
DEAD = Latents(status="done", variance=dict.fromkeys(NAMES, 0.0), rate=0.0)


def test_a_number_counts_when_it_is_above_its_error_and_of_a_size_that_matters():
    assert Nats(0.2, 0.05).material() and not Nats(0.2, 0.11).material() and not Nats(0.04, 0.001).material()
    assert not Nats(0.2).material() and not Nats(0.2, math.nan).material() and not Nats().material()
    assert not Nats(math.nan, 0.1).material()
    assert [str(Nats(*v)) for v in ((1.234, 0.05), (1.23456, 0.002), ())] == ["1.23 ± 0.05", "1.235 ± 0.002", "unknown"]


def nan():
    return float("nan")  # not the same object twice


def test_numbers_that_are_not_known_are_the_same():
    assert Nats(1.0, nan()) == Nats(1.0, nan()) != Nats(1.0, 0.1) and Nats() != Nats(bound=True) and Nats() != ()
    assert len({Nats(1.0, nan()), Nats(1.0, nan()), Nats(2.0, nan())}) == 2
    kinds = {name: type(stage) for name, stage in Stages()._asdict().items()}
    assert all(kind() == kind(seconds=1.0) != kind(reason="no time") for kind in kinds.values())  # seconds do not count
    assert Bounds(curve=(nan(), 2.0)) == Bounds(curve=(nan(), 2.0)) != Bounds(curve=(nan(), 3.0))
    assert Latents(kl={"z": nan()}) == Latents(kl={"z": nan()}) != Latents(kl={"y": nan()})


def test_the_gap_is_the_familys_the_encoders_or_both():
    assert culprits(gaps=split(0.5, 0.01)) == {"family"}
    assert culprits(gaps=split(0.01, 0.5)) == {"encoder"}
    assert culprits(gaps=split(0.5, 0.8)) == {"family", "encoder"}
    assert "1.30 ± 0.02 nats between ELBO and log p(x)" in said(gaps=split(0.5, 0.8))
    assert "0.50 ± 0.02 (38 %) are the family's and 0.80 ± 0.02 (62 %) the encoder's" in said(gaps=split(0.5, 0.8))
    assert culprits(gaps=split(5.0, 0.4)) == {"family"}  # less than a tenth of the gap
    assert culprits(gaps=split(0.02, 0.02)) == set() and "costs nothing that matters" in said(gaps=split(0.02, 0.02))
    assert "too uncertain" in said(gaps=split(0.2, 0.1, error=0.3))
    assert "within the errors" in said(gaps=split(0.2, 0.2, error=0.15))
    assert "may still have risen by 0.4" in said(gaps=split(0.5, 0.01, remaining=0.4))
    # Clear of these data, and of too few to blame it: the larger is named, though the other is not sure either.
    few = split(0.06, 0.21, spread=(0.17, 0.05, 0.15))
    assert "The encoder's share is the larger, 0.21 of 0.27 nats" in said(gaps=few) and culprits(gaps=few) == set()


def test_a_fault_is_one_of_the_pair_and_not_of_the_few_data_at_hand():
    few = (0.2, 0.01, 0.2)
    assert culprits(gaps=split(0.5, 0.3, spread=few)) == {"family"}
    assert culprits(gaps=split(0.5, 0.5, spread=few)) == {"family", "encoder"}
    assert "(50 data; ± 0.20 for others)" in said(gaps=split(0.5, 0.3, spread=few))


def test_what_could_not_be_split_is_said_to_be():
    gaps = GapSplit(status="done", num_data=5, inference=Nats(0.7, 0.1), unsplit="it is a Delta")
    assert "cannot be told apart: it is a Delta" in said(gaps=gaps) and "0.70 ± 0.10" in said(gaps=gaps)
    assert "Whose fault that is was not found out" in said(bounds=BOUNDS)
    assert said() == "Nothing could be judged: see the stages for the reasons."
    late = Bounds(late=True, reason="it did not fit")
    assert said(bounds=late) == "Nothing could be judged: see the stages for the reasons. Give more time (budget)."


def tried(**gains):
    values = tuple(Nats(*gain) for gain in gains.values())
    return Remedy(status="done", num_data=100, tried=tuple(gains), gains=values, num_steps=300, num_training=1000)


def typed(**stages):
    return [(f.remedy, f.command) for f in verdict(Stages(**stages)) if f.command]


def test_a_fault_is_no_advice_and_what_helped_is_ranked_by_what_it_gained():
    fault = split(0.5, 0.4)
    assert culprits(gaps=fault) == {"family", "encoder"} and typed(gaps=fault) == []
    remedy = tried(full=(0.2, 0.05), iaf=(0.09, 0.05), train=(0.3, 0.02), wider=(-0.1, 0.02), refine=(0.04, 0.001))
    assert [name for name, _ in typed(gaps=fault, remedy=remedy)] == ["train", "full"]
    text = said(gaps=fault, remedy=remedy)
    assert "gained 0.30 ± 0.02 nats" in text and "tried under the frozen model, on 100 held-out data" in text
    assert "A joint training may behave otherwise" in text
    assert "not advised: iaf 0.09 ± 0.05, wider -0.10 ± 0.02, refine 0.040 ± 0.001" in text
    assert "not worth changing" not in text
    none = tried(full=(0.01, 0.02), wider=(-0.3, 0.1))
    assert typed(gaps=fault, remedy=none) == [] and "not worth changing" in said(gaps=fault, remedy=none)
    harmed = replace(remedy, joint=(Nats(-0.2, 0.05), Nats(), Nats(0.1, 0.05), Nats(), Nats()))
    assert [name for name, _ in typed(gaps=fault, remedy=harmed)] == ["train"]
    assert "changed by -0.20 ± 0.05 nats: not advised" in said(gaps=fault, remedy=harmed)
    assert "log p(x) of these data gained 0.10 ± 0.05" in said(gaps=fault, remedy=harmed)
    unfinished = Training(status="done", epochs=50, curve="validation", rising=Nats(0.1, 0.01))
    assert [n for n, _ in typed(gaps=fault, remedy=remedy, training=unfinished)] == ["epochs", "train", "full"]
    # A curve that is flat because the rate fell to nothing: trained on together, there was more to gain.
    flat = replace(tried(train=(0.01, 0.01), full=(0.2, 0.02)), joint=(Nats(0.4, 0.05), Nats(0.01, 0.05)))
    assert [name for name, _ in typed(gaps=fault, remedy=flat)] == ["train"]
    text = said(gaps=fault, remedy=flat)
    assert "Model and guide trained on together, log p(x) of these data gained 0.40 ± 0.05 nats" in text
    assert "data gained 0.01 ± 0.05 nats over the present pair trained on, which is within the errors" in text
    # What changes the model goes before what is for its posterior alone, however much that gains.
    both = replace(tried(refine=(0.5, 0.01), full=(0.2, 0.02)), joint=(Nats(), Nats(0.1, 0.01)))
    assert [name for name, _ in typed(gaps=fault, remedy=both)] == ["full", "refine"]
    scale = replace(tried(scale=(math.nan, math.nan)), joint=(Nats(9.0, 0.1),))
    collapsed = split(0.0, 0.0)
    assert [name for name, _ in typed(gaps=collapsed, latents=DEAD, remedy=scale)] == ["scale"]
    assert "so large that z has nothing to say" in said(gaps=collapsed, latents=DEAD, remedy=scale)
    late = Remedy(late=True, reason="wider: not enough time")
    assert "none is advised: wider: not enough time" in said(gaps=fault, remedy=late)


def test_the_larger_part_that_is_uncertain_is_named_and_the_precise_one_not_blamed():
    """Photos: 50 of 58 nats are the encoder's, on four images."""
    gaps = GapSplit(status="done", num_data=4, inference=Nats(58.5, 0.2, 28.0), approximation=Nats(8.3, 0.3, 1.0),
                    amortization=Nats(50.2, 0.4, 27.0))  # fmt: skip
    assert culprits(gaps=gaps) == set()
    text = said(gaps=gaps)
    assert "The encoder's share is the larger, 50.2 of 58.5 nats, on 4 data only: ± 27 nats" in text
    assert typed(gaps=gaps)[0] == ("data", "pyro-vae judge RUN --num-data 100 --budget 600")
    sure = replace(gaps, num_data=100, amortization=Nats(50.2, 0.4, 5.0))
    assert culprits(gaps=sure) == {"encoder", "family"}


def curve(values):
    return [{"validation": value} for value in values]


def test_overfitting_and_a_fit_that_had_not_ended_are_read_off_the_curve():
    wiggle = [0.05 * (-1) ** i for i in range(60)]
    falling = [-100.0 + min(i, 20) - 0.3 * max(i - 20, 0) + wiggle[i] for i in range(60)]
    found = trend(curve(falling))
    # The average over three epochs was highest about the twentieth; 38 epochs later it was 0.3 times that lower.
    assert abs(found["fallen"].value - 0.3 * 37.5) < 0.5 and found["fallen"].mc_stderr < 0.1
    assert found["best_epoch"] == 21 and not found["rising"].material()
    over = Training(status="done", **found)
    findings = verdict(Stages(training=over, gaps=split(0.5, 0.4), remedy=tried(train=(1.0, 0.1), refine=(0.2, 0.01))))
    assert (
        findings[0].culprit == "overfitting"
        and findings[0].command == f"pyro-vae fit --patience {max(10, found['longest_wait'] + 1)}"
    )
    assert [f.remedy for f in findings if f.command] == ["patience", "refine"]  # and no longer training
    rising = trend(curve([-100.0 + 0.1 * i + wiggle[i] for i in range(60)]))
    assert abs(rising["rising"].value - 1.1) < 0.1 and rising["fallen"].value == 0.0  # 11 steps of 0.1 in the last 12
    undone = Training(status="done", **rising)
    assert culprits(training=undone) == {"unfinished training"}
    assert typed(training=undone) == [("epochs", "pyro-vae fit --epochs 120 --patience 24")]
    flat = Training(status="done", **trend(curve([-100.0 + wiggle[i] for i in range(60)])))
    assert culprits(training=flat) == set() and typed(training=flat) == []
    early = Training(status="done", **trend(curve(falling), stopped_early=True))
    assert culprits(training=early) == set() and "Patience ended the fit" in said(training=early)
    assert trend([{"bound": 1.0, "validation": None}] * 8)["curve"] == "bound" and trend([])["epochs"] == 0
    with pytest.raises(ValueError, match="got history of type list, wanted what fit returned"):
        records_of([1.0, 2.0])


def test_training_data_beside_others():
    found = Training(status="done", epochs=50, best_epoch=50, curve="validation", train=Nats(-80.0, 0.1, 0.5),
                     held=Nats(-90.0, 0.1, 0.6), shortfall=Nats(10.0, 0.8))  # fmt: skip
    assert culprits(training=found) == set() and "10.00 ± 0.80 nats; the validation bound had not fallen" in said(
        training=found
    )
    fallen = replace(found, fallen=Nats(3.0, 0.1), best_epoch=20)
    assert culprits(training=fallen) == {"overfitting"} and "-80.00 ± 0.10 nats on training data" in said(
        training=fallen
    )


def test_each_advice_is_a_command_that_the_command_line_takes(tmp_path):
    options = {"hidden": [400, 200], "epochs": 300, "posterior": "nsf", "posterior_options": {"bins": 4}}
    (tmp_path / "config.json").write_text(json.dumps(options))
    run = str(tmp_path)
    assert commands("wider", None, run, options)[0].endswith("--hidden 800,400 --patience 60")
    assert commands("train", None, run, options)[0].endswith("--epochs 600 --patience 120")
    for remedy in (
        "train",
        "epochs",
        "wider",
        "full",
        "iaf",
        "local",
        "refine",
        "patience",
        "warm-up",
        "samples",
        "data",
    ):
        command, python = commands(remedy, 30, run, options)
        program, name, *arguments = shlex.split(command)
        assert program == "pyro-vae" and python.count("pv.")
        cli.commands.commands[name].make_context(name, arguments)  # refuses what it does not know
        if name == "fit":
            given = {
                k: v for k, v in zip(arguments, arguments[1:], strict=False) if k.startswith("--") and k != "--config"
            }
            fields = {k[2:].replace("-", "_"): v for k, v in given.items()}
            resolve(options | {k: convert(k, v, k) for k, v in fields.items()})


def test_what_widens_and_changes_the_family_starts_as_the_present_guide():
    model, guide = small_pair()
    x = binary(40)
    before = elbo_terms(model, guide, x, num_samples=50, progress=False)
    for make, same in ((_widened, True), (_MADE["full"], True)):
        other = make(guide, (x,))
        after = elbo_terms(model, other, x, num_samples=50, progress=False)
        assert same == torch.allclose(before.pointwise, after.pointwise, atol=1e-4)
        assert not {id(p) for p in other.parameters()} & {id(p) for p in guide.parameters()}
    assert _widened(guide, (x,)).posterior.head.in_features == 2 * guide.posterior.head.in_features
    assert isinstance(_MADE["iaf"](guide, (x,)).posterior, IAF)


@pytest.fixture(scope="module")
def fitted():
    """A small pair whose model is fitted and whose encoder is not: it has seen half of the epochs' work undone."""
    model, guide = small_pair()
    fit(model, guide, binary(400), epochs=15, learning_rate=5e-3, seed=0, progress=False)
    return model, guide


def test_a_spoilt_encoder_is_trained_on_and_measured_on_held_out_data(fitted):
    model, guide = fitted[0], copy.deepcopy(fitted[1])
    with torch.no_grad():
        guide.posterior.head.weight.mul_(0.3)
    held = binary(60, seed=1)
    before = [p.clone() for p in (*model.parameters(), *guide.parameters())]
    found = judge(model, guide, held, training=binary(400), num_data=40, num_samples=100, budget=20, clock=Ticks())
    after = [*model.parameters(), *guide.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))  # tried on copies
    remedy = found.stages.remedy
    assert remedy.done and not remedy.own_data and remedy.num_data == 40 and remedy.num_training == 400
    gains = dict(zip(remedy.tried, remedy.gains, strict=True))
    assert gains["train"].material() and "train" in [f.remedy for f in found.advice]
    best = [f.remedy for f in found.advice if f.about == "advice"]
    assert best == [name for name, _ in remedy.ranked]
    assert "encoder" in found.culprits or "dead encoder" in found.culprits
    shown = found.of_run("runs/a b", {"epochs": 15, "hidden": [16]})
    assert any("pyro-vae fit --config 'runs/a b'/config.json --epochs 30" in f.command for f in shown.advice)
    assert found.lines()[0][0] == "verdict" and any(line == "  type" for line, _ in found.lines())
    together = [remedy.joint_gain(name).known for name in remedy.tried if gains[name].material() and name != "refine"]
    assert together and any(together)
    assert gains["refine"].value > -2 * gains["refine"].mc_stderr


def test_one_reason_against_several_remedies_is_said_once(monkeypatch):
    model, guide = small_pair()
    stages = Stages(gaps=split(0.5, 0.4), bounds=BOUNDS)
    pair = Examination(model, guide, (binary(8),), 50, None, {"seed": 0}, Budget(1e-3, Ticks()))

    def none_left(trial, name):
        raise OutOfTime

    monkeypatch.setattr(remedies._Trial, "gain", none_left)
    late = remedies.examine_remedy(pair, stages)
    assert late.late and late.failed == ("refine, full, iaf, train, wider: not enough time",)
    for text in (str(late), " ".join(str(f) for f in verdict(stages._replace(remedy=late)))):  # the report's two places
        assert text.count("not enough time") == text.count("wider") == 1

    def some(trial, name):
        if name in ("full", "iaf"):
            raise ValueError("the latents are\nof another kind")
        return Nats(0.2, 0.01) if name == "refine" else none_left(trial, name)

    monkeypatch.setattr(remedies._Trial, "gain", some)
    found = remedies.examine_remedy(pair, stages)
    assert found.done and found.tried == ("refine",)
    assert found.failed == ("full, iaf: the latents are of another kind", "train, wider: not enough time")
    assert str(found).endswith("not tried: full, iaf: the latents are of another kind; train, wider: not enough time")


def test_a_fixed_scale_is_tried_learned_and_what_it_gains_is_log_p():
    """Two clusters far within the noise that was fixed: a learned scale must gain about log of the ratio each."""
    generator = torch.Generator().manual_seed(0)

    def drawn(count):
        side = torch.randint(0, 2, (count, 1), generator=generator).float() - 0.5
        return side.expand(count, 6) + 0.1 * torch.randn(count, 6, generator=generator)

    torch.manual_seed(0)
    vae = VAE.build((6,), latent_dim=1, hidden=(16,), likelihood="normal", scale=3.0, standardize=False)
    fit(vae.model, vae.guide, drawn(400), epochs=20, learning_rate=5e-3, seed=0, progress=False)
    before = copy.deepcopy(vae.state_dict())
    found = judge(
        vae.model, vae.guide, drawn(60), training=drawn(400), num_data=40, num_samples=50, budget=20, clock=Ticks()
    )
    gain = found.stages.remedy.joint_gain("scale")
    # Without z the spread is about 0.51, so that the scale alone gains 6 (log(3 / 0.51) - 1/2 + ...) > 6 nats.
    assert gain.value > 6 and gain.material() and "scale" in [f.remedy for f in found.advice]
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())
    assert vae.model.likelihood.scale == 3.0  # tried on a copy


@pytest.mark.parametrize("kind", [SemiAmortized, Hamiltonian])
@pytest.mark.parametrize("spoilt", [0.3, 1.0])
def test_refinement_by_default_never_lowers_the_elbo(fitted, kind, spoilt):
    """On held-out data, by paired differences: of a guide that is as good as it gets, and of one that is not."""
    model, guide = fitted[0], copy.deepcopy(fitted[1])
    with torch.no_grad():
        guide.posterior.head.weight.mul_(spoilt)
    refined = kind(model, guide)
    if kind is Hamiltonian and spoilt == 1:  # steps that were learned far too long are not taken either
        refined = Hamiltonian(model, guide, beta=0.3)
        refined.log_step_size.data.fill_(0.5)
    with refined.kept():
        both = [
            elbo_terms(model, each, binary(60, seed=1), num_samples=50, progress=False) for each in (guide, refined)
        ]
        gain = paired(both[1].pointwise - both[0].pointwise)
    assert gain.value > -2 * gain.mc_stderr
    if kind is SemiAmortized and spoilt < 1:
        assert gain.value > 0.1 and gain.material()  # and does what it is for
    if spoilt == 1:
        return
    # What is kept is what would be found anew.
    with torch.no_grad():
        x = binary(20, seed=2)
        torch.manual_seed(0)
        once = particles(model, refined.eval(), x, num_samples=3).log_weight
        with refined.kept():
            particles(model, refined, x)
            torch.manual_seed(0)
            assert torch.equal(once, particles(model, refined, x, num_samples=3).log_weight)
            torch.manual_seed(0)
            other = particles(model, refined, binary(20, seed=3), num_samples=3).log_weight
        assert not torch.equal(once, other)


def test_a_dead_encoder_and_a_collapsed_optimum_are_told_apart():
    assert culprits(gaps=split(0.01, 0.9), latents=DEAD) == {"dead encoder"}
    assert "failed training" in said(gaps=split(0.01, 0.9), latents=DEAD)
    assert "failed training" in said(gaps=split(9.0, 0.4), latents=DEAD)
    assert culprits(gaps=split(0.0, 0.0), latents=DEAD) == {"collapse"}
    assert "makes no use of z" in said(gaps=split(0.0, 0.0), latents=DEAD)
    assert culprits(bounds=BOUNDS, latents=DEAD) == {"dead encoder"}
    close = replace(BOUNDS, better=Nats(-81.0, 0.02), missing=Nats(0.0, 0.05))
    assert culprits(bounds=close, latents=DEAD) == {"collapse"} and "could not be told" in said(latents=DEAD)
    assert "within the errors" in said(gaps=split(0.1, 0.1, error=0.4), latents=DEAD)
    some = said(latents=replace(ALIVE, variance=ALIVE.variance | {"z[1]": 0.0}))
    assert "2 of 3 latents move" in some and "unused: z[1]" in some


def test_the_estimator_is_at_fault_where_more_samples_would_mend_it():
    def lacking(value, error=0.05, **more):
        return replace(BOUNDS, missing=Nats(value, error), **more)

    assert culprits(bounds=BOUNDS) == {"estimator"}
    assert "0.40 ± 0.05 short of that at K = 1000: K = 10 is too small. Increase it to K = 500." in said(bounds=BOUNDS)
    assert "tenfold" in said(bounds=replace(BOUNDS, enough=None))
    heavy = replace(BOUNDS, better_khat_ok=0.6, enough=None)
    assert "too large for 40 %" in said(bounds=heavy) and culprits(bounds=heavy) == {"estimator"}
    found = replace(heavy, missing=Nats(0.0, 0.05))
    assert culprits(bounds=found) == set() and "may be too low" in said(bounds=found)
    assert "can be relied upon" in said(bounds=lacking(0.01))
    assert "not known" in said(bounds=replace(BOUNDS, missing=Nats()))
    noisy = lacking(0.09, 0.06)
    assert culprits(bounds=noisy) == set() and "0.09 ± 0.06 nats, is within the errors" in said(bounds=noisy)
    assert culprits(bounds=BOUNDS, gaps=split(0.0, 0.9), latents=DEAD) == {"dead encoder"}
    assert "consequence of the dead encoder" in said(bounds=BOUNDS, gaps=split(0.0, 0.9), latents=DEAD)


def test_bracket_and_calibration_in_words():
    tight = Bracketed(status="done", num_data=30, width=Nats(0.03, 0.01), below_lower=Nats(0.0, 0.01),
                      below_upper=Nats(0.02, 0.01))  # fmt: skip
    fine = replace(BOUNDS, missing=Nats(0.0, 0.05))
    assert "brackets log p(x) to 0.03 ± 0.01" in said(bounds=fine, bracket=tight)
    assert "too wide" in said(bounds=fine, bracket=replace(tight, width=Nats(0.5, 0.01)))
    low = replace(tight, below_lower=Nats(0.3, 0.01))
    assert "at least 0.30 ± 0.01 nats too low" in said(bounds=fine, bracket=low)
    ranks = Calibrated(status="done", num_data=100, names=("a", "b"), verdicts=("too narrow", "calibrated"),
                       coverage_90=(0.7, 0.9))  # fmt: skip
    assert "too narrow in a (90 % intervals cover down to 70 %)" in said(calibration=ranks)
    assert "is calibrated" in said(calibration=replace(ranks, calibrated=True))
    assert "says nothing here" in said(calibration=replace(ranks, calibrated=True), latents=DEAD)


def run(model, guide, x, **options):
    return judge(model, guide, x, **({"num_data": 8, "budget": 30.0, "num_samples": 500, "clock": Ticks()} | options))


def test_planted_a_mean_field_guide_on_a_correlated_posterior(monkeypatch):
    pair, x = linear_pair(exact=False)
    found = run(pair.model, pair.guide, x, budget=10.0)
    assert found.culprits == ("family",)
    assert "Try FullNormal." in str(found) and found.advice[0].command == "pyro-vae fit --posterior full --patience 20"
    approximation, truth = found.stages.gaps.approximation, pair.bed.mean_field_gap().item()
    assert abs(approximation.value - truth) < 4 * approximation.mc_stderr
    assert [name for name, s in found.stages._asdict().items() if not s.done] == ["training"]  # nothing was given of it
    again = Judgement.from_json(found.to_json())
    assert again.findings == found.findings and again.to_json() == found.to_json() and str(again) == str(found)
    assert verdict(again.stages) == found.findings and again.stages == found.stages and again == found

    def left_out(*_):
        raise ValueError("it is not asked for again")

    for name in ("remedy", "bracket", "calibration"):  # which come later
        monkeypatch.setitem(judgement._EXAMINE, name, left_out)
    assert run(pair.model, pair.guide, x, budget=10.0).stages.gaps.to_dict() == found.stages.gaps.to_dict()
    with pytest.raises(ValueError, match="got a judgement of version 1, wanted 3. Judge the pair again"):
        Judgement.from_json(json.dumps(found.to_dict() | {"version": 1}))


def test_planted_a_dead_encoder():
    pair, x = linear_pair()
    head = nn.Linear(6, 6).double()
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)

    def guide(x):
        loc, log_scale = head(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    found = run(pair.model, guide, x, num_samples=1000, budget=8.0)
    assert "dead encoder" in found.culprits and "encoder" not in found.culprits and "estimator" not in found.culprits
    assert found.stages.latents.active == 0
    assert found.findings[0].culprit == "dead encoder"


@pytest.mark.parametrize("count", [3, pytest.param(5, marks=pytest.mark.slow)])
def test_planted_too_small_a_number_of_samples(count):
    pair, x = linear_pair(stretch=1.8)
    few = run(pair.model, pair.guide, x, num_samples=count, num_data=24)
    assert "estimator" in few.culprits and "family" not in few.culprits
    assert f"K = {count} is too small" in str(few)
    bounds = few.stages.bounds
    truth = pair.bed.log_evidence(x[: bounds.num_data]).mean().item()
    many = [log_likelihood(pair.model, pair.guide, x[: bounds.num_data], num_samples=count, seed=s) for s in range(150)]
    values = torch.tensor([e.value for e in many])
    lacks, noise = truth - values.mean().item(), values.std().item() / 150**0.5
    assert abs(lacks - bounds.missing.value) < 4 * math.hypot(bounds.missing.mc_stderr, noise)
    assert abs(truth - bounds.better.value) < 0.02
    assert bounds.missing.mc_stderr < lacks / 3
    many = run(pair.model, pair.guide, x, num_samples=1000, num_data=24, budget=1.0)
    assert "estimator" not in many.culprits


def test_the_exact_posterior_is_acquitted():
    pair, x = linear_pair()
    found = run(pair.model, pair.guide, x, budget=8.0)
    assert found.culprits == () and "costs nothing that matters" in str(found)


def test_without_a_larger_number_of_samples_the_jackknife_says_what_is_lacking():
    pair, x = linear_pair(stretch=1.3)
    found = run(pair.model, pair.guide, x, num_samples=5000)
    bounds = found.stages.bounds
    assert bounds.num_samples == bounds.better_samples == 5000
    assert bounds.missing.value == -bounds.bias and bounds.comparison == "its limit, by the jackknife"
    assert bounds.missing.mc_stderr == bounds.log_p.mc_stderr
    truth = pair.bed.log_evidence(x[: bounds.num_data]).mean().item()
    assert abs(truth - bounds.log_p.value - bounds.missing.value) < 4 * bounds.missing.mc_stderr


@pytest.mark.parametrize("budget", [0.01, 0.3, 0.6])
def test_the_budget_is_kept_and_what_does_not_fit_is_said(budget):
    model, guide = small_pair()
    clock = Ticks()
    found = judge(model, guide, binary(12), budget=budget, num_samples=100, clock=clock)
    assert clock.now <= budget + 0.1  # some looks at the clock in passing
    assert any(stage.status == "left out" and stage.late and "did not fit" in stage.reason for stage in found.stages)
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
    assert found.stages.bounds.status == "done" and found.stages.bracket.status == "not possible"
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


def test_the_page_is_well_formed_escaped_and_needs_nothing_else(monkeypatch):
    model, guide = small_pair()
    shorten(monkeypatch)
    found = judge(model, guide, binary(8), num_data=8, num_samples=50, clock=still)
    assert [name for name, stage in found.stages._asdict().items() if not stage.done] == ["training"]
    evil = replace(found, findings=(*found.findings, Finding("posterior", "<script>alert(1)</script>")))
    text = html.page(evil, "a <b> & c")
    parser = Strict()
    parser.feed(text)
    assert parser.open == [] and "script" not in parser.tags and "link" not in parser.tags
    assert parser.sources and all(source.startswith("data:image/png;base64,") for source in parser.sources)
    assert "<script" not in text and "a &lt;b&gt; &amp; c" in text
    assert "log p(x)" in text and "Verdict" in text
    asked = iter([False, False, True])
    short = html.page(found, "x", late=lambda: next(asked))
    assert short.count("<img") == 2 and "left out for want of time" in short and "left out for want of time" not in text
    assert "torch" not in html.page(replace(found, protocol={"seed": 0}), "x", ())
    protocol = {"num_samples": 5, "versions": {"torch": "2.0"}}
    assert "num samples 5, torch 2.0." in html.page(replace(found, protocol=protocol), "x", ())


def test_the_worst_ranks_are_shown_first_under_their_names():
    ranks = torch.arange(300).reshape(100, 3) % 100
    names = ("z[0]", "z[1]", "w")
    stage = Calibrated(status="done", names=names, p_value=(0.5, 0.9, 0.01), found=calibration(names, ranks, 99))
    figure, coverage = (picture.figure for picture in html.draw(Stages(calibration=stage)))
    assert [axes.get_title() for axes in figure.axes] == ["w", "z[0]", "z[1]"]
    first = figure.axes[0].patches[1:]
    assert [bar.get_height() for bar in first] == [((ranks[:, 2] // 5) == b).sum() for b in range(len(first))]
    curves = {item.get_label(): item.get_ydata() for item in coverage.axes[0].lines[1:]}
    assert list(curves) == ["w", "z[0]", "z[1]"]
    assert_allclose(curves["w"], stage.found.coverage().empirical[:, 2])


def test_options_out_of_range_are_refused():
    model, guide = small_pair()
    for options, message in (
        ({"num_data": 1}, "num_data=1"),
        ({"num_samples": 1}, "num_samples=1"),
        ({"budget": 0}, "budget=0"),
    ):
        with pytest.raises(ValueError, match=message):
            judge(model, guide, binary(4), **options)


def test_the_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shorten(monkeypatch)
    tiny = ["--epochs", "1", "--limit", "60", "--hidden", "8", "--latent-dim", "2", "--evaluation-samples", "20",
            "--evaluation-images", "10", "--quiet"]  # fmt: skip
    assert main(["fit", "--out", "run", *tiny]) == 0
    before = {p.name for p in (tmp_path / "run").iterdir()}
    assert main(["judge", "run", "--num-data", "6", "--budget", "60"]) == 0
    printed = capsys.readouterr().out
    assert "verdict" in printed and "judgement.html" in printed
    assert {p.name for p in (tmp_path / "run").iterdir()} - before == {"judgement.json", "judgement.html"}
    saved = json.loads((tmp_path / "run" / "judgement.json").read_text())
    assert saved["stages"]["training"]["status"] == "done" and saved["stages"]["training"]["epochs"] == 1
    assert saved["protocol"]["seconds"] < 60 and saved["findings"]
    assert main(["judge", "run", "--num-data", "6", "--budget", "2", "--json", "--out", "other"]) == 0
    assert json.loads(capsys.readouterr().out)["protocol"]["num_samples"] == 20
    assert (tmp_path / "other" / "judgement.html").is_file()
    # What went by before the work began, imports above all, is part of the budget.
    late = judge_run(Path("run"), budget=50.0, started=time.monotonic() - 49.9)
    status = {name: getattr(late.stages, name).status for name in late.stages._fields}
    assert status.pop("training") == "done", "a curve takes no time to be read"
    assert late.stages.training.epochs == 1 and not late.stages.training.shortfall.known
    assert set(status.values()) == {"left out"} and "Give more time" in str(late)
    assert capsys.readouterr().err.endswith("next: pyro-vae judge run --budget 600\n")
    assert late.protocol["seconds"] > 49.9
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert main(["judge", "run", "--out", "file/there"]) == 2  # at once, and not after the work
    assert "wanted a folder to write to" in capsys.readouterr().err
    for arguments, message in (
        (["judge", "nowhere"], "wanted a run folder"),
        (["judge", "run", "--num-data", "1"], "1 is not in the range 2<=x<=2147483647"),
        (["judge", "run", "--budget", "0"], "0 is not in the range x>=1"),
    ):
        assert main(arguments) == 2 and message in capsys.readouterr().err
    assert main(["fit", "--out", "points", "--posterior", "point", *tiny]) == 0
    capsys.readouterr()
    assert main(["judge", "points"]) == 2
    assert "plain autoencoder" in capsys.readouterr().err


def test_the_command_evaluates_with_a_refined_guide(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--out", "run", "--epochs", "3", "--limit", "60", "--hidden", "8", "--latent-dim", "2",
                 "--evaluation-samples", "20", "--evaluation-images", "8", "--quiet"]) == 0  # fmt: skip
    plain = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name in ("semi-amortized", "hamiltonian"):
        capsys.readouterr()
        assert main(["evaluate", "run", "--refine", name, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        about = found["protocol"]
        assert about["refined_by"] == name and about["elbo_gain"] > -2 * about["elbo_gain_stderr"]
        assert found["test_elbo"] - plain["test_elbo"] == pytest.approx(about["elbo_gain"], abs=1e-4)
    assert main(["evaluate", "run", "--refine", "newton"]) == 2
    assert "'newton' is not one of 'semi-amortized', 'hamiltonian'" in capsys.readouterr().err


def test_a_judgement_is_a_table_and_a_figure():
    parts = {"inference": Nats(0.61, 0.02), "approximation": Nats(0.6, 0.02), "amortization": Nats(0.01, 0.02)}
    gaps = GapSplit(status="done", num_data=50, **parts)
    found = Judgement(Stages(gaps=gaps), ())
    frame = found.to_frame()
    assert list(frame["stage"]) == [stage.title for stage in found.stages] and list(frame["status"]).count("done") == 1
    assert frame["num_data"][2] == 50 and frame["found"][2] == str(gaps) and "family" in found._repr_html_()
    heights = [bar.get_height() for bar in found.plot().axes[0].patches]
    assert heights == pytest.approx([0.6, 0.01])
    whole = Judgement(Stages(gaps=GapSplit(status="done", num_data=50, inference=Nats(0.61, 0.02))), ())
    assert [bar.get_height() for bar in whole.plot().axes[0].patches] == pytest.approx([0.61])
    bounds = Bounds(status="done", num_data=50, curve_samples=(1, 2), curve=(-3.0, -2.5), curve_mc_stderr=(0.1, 0.1))
    assert list(Judgement(Stages(bounds=bounds), ()).plot().axes[0].lines[0].get_ydata()) == [-3.0, -2.5]
    with pytest.raises(ValueError, match="neither gaps nor bounds were done"):
        Judgement(Stages(), ()).plot()
