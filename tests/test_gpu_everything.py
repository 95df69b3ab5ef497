"""Everything on a GPU: every part fits there as by its own steps, and what is measured there is what a CPU measures.

Each test is skipped where there is no GPU; `PYRO_VAE_TEST_DEVICE=cpu` runs them on a CPU, to see that they hold there.
"""

import copy
import json
import os
from contextlib import suppress

import pyro
import pytest
import torch

import pyro_vae as pv
from pyro_vae.app.cli import main
from pyro_vae.inference.compiled import Compiled
from tests.pairs import binary, linear_pair, small_pair
from tests.test_compiled_parts import CASES

DEVICE = os.environ.get("PYRO_VAE_TEST_DEVICE", "cuda")
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no GPU")


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def fitted(name, captured):
    pair, data, make = CASES[name]
    model, guide = pair()
    for program in (model, guide):
        with suppress(AttributeError):  # a plain function owns no network
            program.to(DEVICE)
    if name.startswith("guide-discrete"):  # parameters of plain functions are made where the programs say
        pytest.skip("the programs make their parameters on the CPU")
    loss = Compiled(make(), compile_after=None) if captured else make()
    history = pv.fit(
        model,
        guide,
        data,
        loss=loss,
        epochs=8,
        batch_size=6,
        seed=0,
        device=DEVICE,
        compile=False,
        progress=False,
        data_seed=0,
    )
    assert not captured or (loss.reason is None and loss.captures)
    return history["loss"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", CASES)
def test_every_part_and_bound_fits_there_as_by_its_own_steps(name):
    ours, own = fitted(name, True), fitted(name, False)
    pyro.clear_param_store()
    assert ours == pytest.approx(own, rel=1e-3, abs=1e-3)


def measured(device):
    """What an exact pair of float64 gives: numbers without noise, and numbers with errors."""
    pair, x = linear_pair()
    pair.bed = pair.bed.to(device)
    given = (pair.model, pair.guide, x.to(device))
    options = {"device": device, "progress": False, "seed": 0}
    return given, options


def test_the_exact_posterior_gives_the_exact_evidence():
    given, options = measured(DEVICE)
    pair, x = linear_pair()
    exact = pair.bed.log_evidence(x).mean().item()
    assert pv.log_likelihood(*given, num_samples=20, **options).value == pytest.approx(exact, abs=1e-6)
    assert pv.elbo_terms(*given, num_samples=20, **options).value == pytest.approx(exact, abs=1e-6)
    for compile in (False, True):
        found = pv.ais(*given, num_samples=4, num_steps=40, start="prior", compile=compile, **options)
        assert abs(found.value - exact) <= 5 * found.mc_stderr + 0.05


@pytest.mark.filterwarnings("ignore:the chains of:UserWarning")
def test_every_diagnostic_runs_there():
    model, guide = small_pair()
    data = binary(40)
    pv.fit(model, guide, data, epochs=20, seed=0, device=DEVICE, progress=False)
    options = {"device": DEVICE, "progress": False, "seed": 0}
    bracket = pv.bdmc(model, guide, data, num_samples=4, num_data=8, num_steps=30, **options)
    assert bracket.lower.value <= bracket.upper.value + 1
    gaps = pv.gaps(model, guide, data[:8], num_steps=100, num_samples=200, **options)
    assert gaps.rows()
    assert pv.compare_guides(model, {"a": guide, "b": copy.deepcopy(guide)}, data, num_samples=50, **options).rows()
    reference = pv.reference(model, guide, data[:4], num_samples=50, num_chains=4, num_warmup=50, **options)
    assert pv.guide_distances(model, guide, data[:4], reference=reference, **options)
    assert pv.sbc(model, guide, data, num_samples=19, num_data=40, **options)
    assert pv.gradient_lab(model, guide, data[:8], repeats=10, num_samples=(1, 4), **options).rows()
    assert pv.active_units(guide, data, **options)
    assert pv.collapse(model, guide, data, **options)
    assert pv.kl_per_dimension(model, guide, data, **options)
    assert pv.mutual_information(model, guide, data, num_data=40, **options)
    assert pv.rate_distortion(model, guide, data, **options)
    labels = (torch.arange(40) % 2).long()
    assert pv.probe(guide, data, labels=labels, test_data=data, test_labels=labels, **options)
    assert pv.quadrature(model, guide, data[:4], **options)
    flat = small_pair(latent_dim=2)
    assert pv.identity(*flat, data[:8], num_samples=200, **options)
    scores = pv.anomaly_scores(model, guide, data, num_samples=20, **options)
    assert scores.shape == (40,)
    assert pv.to_arviz(model, guide, data[:4], num_samples=20, num_prior=5, num_predictive=5, **options) is not None
    linear = pv.Model(pv.priors.StandardNormal(2), pv.likelihoods.Normal(torch.nn.Linear(2, 5), scale=0.5))
    straight = pv.Guide(pv.posteriors.DiagonalNormal(torch.nn.Linear(5, 4), 2))
    assert pv.collapse(linear, straight, torch.randn(40, 5), **options).rows()
    better = pv.ex_post(model, guide, data.to(DEVICE), num_components=2, num_steps=20)
    assert torch.isfinite(torch.tensor(pv.log_likelihood(better, guide, data, num_samples=20, **options).value))


def test_a_gpu_measures_what_a_cpu_measures():
    model, guide = small_pair()
    data = binary(60)
    pv.fit(model, guide, data, epochs=60, seed=0, device="cpu", progress=False)
    found = []
    for device in ("cpu", DEVICE):
        options = {"device": device, "progress": False, "seed": 0}
        values = [
            pv.log_likelihood(model, guide, data, num_samples=500, **options),
            pv.elbo_terms(model, guide, data, num_samples=500, **options),
            pv.gaps(model, guide, data, num_steps=300, num_samples=300, **options).log_likelihood,
        ]
        found.append(values)
    for here, there in zip(*found, strict=True):
        error = (here.mc_stderr**2 + there.mc_stderr**2) ** 0.5
        assert abs(here.value - there.value) <= 5 * error + 1e-4
    assert next(model.parameters()).device.type == "cpu"  # it was there, and is


def test_a_judgement_there_is_whole():
    model, guide = small_pair()
    data = binary(60)
    history = pv.fit(model, guide, data, epochs=30, seed=0, device=DEVICE, progress=False)
    judgement = pv.judge(
        model, guide, data[:20], history=history, training=data, budget=20.0, device=DEVICE, progress=False
    )
    assert "failed" not in str(judgement).lower()


def test_a_fit_there_goes_on_from_its_checkpoint_to_the_bit(tmp_path):
    def run(epochs, path, stop=None):
        model, guide = small_pair()

        def callback(record):
            if record["epoch"] == stop:
                raise KeyboardInterrupt

        history = pv.fit(
            model,
            guide,
            binary(44),
            epochs=epochs,
            batch_size=12,
            seed=0,
            device=DEVICE,
            progress=False,
            checkpoint=path,
            callback=callback,
        )
        return [p.detach().cpu() for p in (*model.parameters(), *guide.parameters())], history

    whole, _ = run(6, tmp_path / "whole.safetensors")
    run(6, tmp_path / "cut.safetensors", stop=3)
    resumed, history = run(6, tmp_path / "cut.safetensors")
    assert len(history) == 6
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_the_commands_work_there(tmp_path, capsys):
    run = tmp_path / "run"
    options = ["--device", DEVICE, "--epochs", "2", "--evaluation-samples", "50", "--data", "digits"]
    assert main(["fit", *options, "--out", str(run)]) in (0, None)
    summary = json.loads((run / "summary.json").read_text())
    assert summary
    for command in (
        ["judge", str(run), "--budget", "5"],
        ["evaluate", str(run), "--evaluation-samples", "20"],
        ["anomalies", str(run)],
    ):
        assert main([*command, "--device", DEVICE]) in (0, None), command
    capsys.readouterr()
