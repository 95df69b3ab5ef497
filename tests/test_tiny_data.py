"""One datum, three images, fewer data than a batch: each estimate gives a number or says what it takes."""

import math
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

import pyro_vae as pv
from pyro_vae.app.cli import main
from pyro_vae.app.runs import Run
from pyro_vae.judging._calibration import sbc
from pyro_vae.judging._gaps import gaps
from pyro_vae.judging.annealing import ais, bdmc
from pyro_vae.judging.anomalies import anomaly_scores
from pyro_vae.judging.distances import energy_distance
from pyro_vae.judging.information import mutual_information
from pyro_vae.judging.judgement import judge
from pyro_vae.judging.latents import kl_per_dimension
from pyro_vae.plots._pictures import plane


@pytest.fixture(autouse=True)
def _no_warning_of_torch():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*degrees of freedom.*")
        yield


def fitted(n: int):
    torch.manual_seed(0)
    vae, x = pv.VAE.build((5,), latent_dim=2, hidden=(8,)), torch.bernoulli(torch.full((n, 5), 0.5))
    history = pv.fit(
        vae.model, vae.guide, x, epochs=3, schedule="one-cycle", validation=x, patience=2, progress=False, seed=0
    )
    assert all(map(math.isfinite, history["bound"])) and len(history) >= 1
    return vae, x


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_bounds_of_few_data_are_their_numbers_and_no_nan_is_printed(n):
    vae, x = fitted(n)
    model, guide = vae.model, vae.guide
    terms = pv.elbo_terms(model, guide, x, num_samples=2000, progress=False)
    log_p = pv.log_likelihood(model, guide, x, num_samples=5000, progress=False)
    grid = torch.linspace(-6, 6, 201)
    z = torch.cartesian_prod(grid, grid)
    joint = vae.decode(z).log_prob(x[:, None]) + vae.model.prior().log_prob(z)
    exact = (joint.double().logsumexp(1) + 2 * math.log(0.06)).mean().item()
    assert abs(log_p.value - exact) < 4 * log_p.mc_stderr + 1e-3
    assert terms.value < exact + 4 * terms.mc_stderr
    kl = kl_per_dimension(model, guide, x)
    assert kl.total == pytest.approx(terms.kl, abs=4 * terms.mc_stderr + 0.05)
    annealed = ais(model, guide, x, num_steps=10, num_samples=4, progress=False)
    bracket = bdmc(model, guide, x, num_data=n, num_steps=5, num_samples=4, progress=False)
    split = gaps(model, guide, x, num_steps=20, num_samples=50, progress=False)
    for found in (terms, log_p, kl, annealed, bracket, split, pv.active_units(guide, x)):
        assert "nan" not in str(found), found
    assert ("one datum" in str(log_p)) is (n == 1)
    assert anomaly_scores(model, guide, x).isfinite().all()


def test_what_takes_more_than_one_datum_says_so():
    vae, x = fitted(1)
    units = pv.active_units(vae.guide, x)
    assert units.count == 0 and units.variance.isnan().all() and "unknown of one datum" in str(units)
    for call, text in (
        (lambda: mutual_information(vae.model, vae.guide, x), "got 1 data, wanted at least three.*Give more data"),
        (
            lambda: energy_distance(vae.sample(5), x),
            r"got sets of shapes \(5, 5\) and \(1, 5\), wanted.*give more data",
        ),
        (lambda: sbc(vae.model, vae.guide, x, num_data=1), "got num_data=1, wanted at least two.*Raise it"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_one_datum_is_judged():
    vae, x = fitted(1)
    found = judge(vae.model, vae.guide, x, budget=8)
    assert found.stages.bounds.status == found.stages.latents.status == "done"
    assert found.stages.latents.active is None and "collapse" not in found.culprits
    assert "nan" not in str(found) and "nan" not in found.to_json().lower()


def test_a_plane_of_one_datum_and_many_latents_has_a_point():
    points, _ = plane(torch.randn(1, 7))
    assert points.shape == (1, 2) and np.isfinite(points).all()


@pytest.mark.parametrize("n", [3, 5])
def test_a_folder_of_a_few_images_goes_through_every_command(tmp_path, capsys, monkeypatch, n):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p").mkdir()
    for i in range(n):
        levels = np.random.default_rng(i).integers(0, 255, (9, 7, 3)).astype("u1")
        Image.fromarray(levels).save(tmp_path / "p" / f"{i}.png")
    assert main(["fit", "--data", "p", "--epochs", "3", "--out", "run", "--evaluation-samples", "20"]) == 0
    out = capsys.readouterr().out
    assert "left out       active units" in out and "energy distance of samples (takes 4 test data, got 1)" in out
    assert "nan" not in out and "one datum" in out
    run = Run.load(tmp_path / "run")
    assert "active_units" not in run.summary and len(run.summary["left_out"]) == 2
    assert {path.stem for path in (tmp_path / "run" / "figures").iterdir()} == {
        "training_curve", "reconstructions", "samples", "interpolations", "latent_space",
    }  # fmt: skip
    for command in (["evaluate", "run"], ["anomalies", "run"], ["sample", "run", "-n", "1"],
                    ["reconstruct", "run", "p/0.png"], ["judge", "run", "--budget", "6"]):  # fmt: skip
        assert main(command) == 0, command
        out, err = capsys.readouterr()
        assert "warning" not in err and " nan" not in out


def test_three_rows_of_a_table_go_through(tmp_path, capsys):
    np.save(tmp_path / "rows.npy", np.random.default_rng(0).normal(5e4, 3e4, (3, 4)))
    path = str(tmp_path / "run")
    assert main(["fit", "--data", str(tmp_path / "rows.npy"), "--epochs", "2", "--out", path, "--hidden", "8",
                 "--latent-dim", "2", "--evaluation-samples", "20"]) == 0  # fmt: skip
    summary = Run.load(path).summary
    assert summary["test_elbo"] is not None and math.isfinite(summary["test_elbo"])
    assert main(["judge", path, "--budget", "6"]) == 0
    assert "nan" not in capsys.readouterr().out


def test_the_command_says_nothing_of_a_gpu_that_is_not_there(capsys):
    import logging

    from pyro_vae.app.cli._main import _warnings_as_lines
    from pyro_vae.news import no_news_of_a_gpu

    logger = logging.getLogger("torch.utils.cpp_extension")
    seen: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            seen.append(record.getMessage())

    handler = Kept()
    logger.addHandler(handler)
    try:
        with _warnings_as_lines():
            with no_news_of_a_gpu():  # a step that is compiled
                logger.warning("No CUDA runtime is found")
            logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "/usr/local/cuda")
            logger.warning("another")
        logger.warning("No CUDA runtime is found, using CUDA_HOME='%s'", "x")
    finally:
        logger.removeHandler(handler)
    assert seen == ["another", "No CUDA runtime is found, using CUDA_HOME='x'"]
