"""Run folders and what is done with them: numbers that hold when computed again from Python."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import pyro_vae.data as data
from pyro_vae.app import evaluation, report
from pyro_vae.app.cli import main
from pyro_vae.app.defaults import resolve
from pyro_vae.app.runs import Run, run_folder, write_json
from pyro_vae.inference.bounds import reconstruction
from pyro_vae.inference.objectives import mean_bound
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.judging.latents import active_units
from pyro_vae.programs.vae import VAE
from tests import pictures

TINY = ["--epochs", "2", "--limit", "200", "--hidden", "16", "--latent-dim", "3", "--evaluation-samples", "30",
        "--evaluation-images", "20", "--quiet"]  # fmt: skip
PICTURES = ["interpolations.png", "latent_space.png", "reconstructions.png", "samples.png", "training_curve.png"]


def command(*argv):
    assert main([str(part) for part in argv]) == 0


def refused(capsys, *argv):
    capsys.readouterr()
    assert main([str(part) for part in argv]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("pyro-vae: error: ")
    return said[-1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run on the digits."""
    path = tmp_path_factory.mktemp("runs") / "digits"
    with pictures.drawn():
        command("fit", "--out", path, *TINY)
    return path


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """The same as a plain autoencoder."""
    path = tmp_path_factory.mktemp("runs") / "autoencoder"
    command("fit", "--out", path, "--posterior", "point", *TINY)
    return path


@pytest.fixture
def copied(run, tmp_path):
    """The run, to be damaged."""
    return shutil.copytree(run, tmp_path / "copy")


def test_a_run_has_all_its_files(run):
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json", "figures", "metrics.jsonl", "report.html", "summary.json", "weights.safetensors",
    ]  # fmt: skip
    assert set(PICTURES) <= {path.name for path in (run / "figures").iterdir()}
    for name in PICTURES:
        with Image.open(run / "figures" / name) as picture:
            assert min(picture.size) > 200
    assert [path.name for path in run.parent.iterdir()] == ["digits"]


def test_metrics_are_one_line_an_epoch(run):
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [record["epoch"] for record in records] == [1, 2]
    assert {"loss", "bound", "validation", "learning_rate", "images_per_second"} <= set(records[0])
    assert Run.load(run).metrics() == records


def test_the_summary_is_what_python_computes(run):
    summary = json.loads((run / "summary.json").read_text())
    vae = Run.load(run).vae()
    test = data.load("digits").test.frozen(0).subset(slice(0, 20))
    estimate = log_likelihood(vae.model, vae.guide, test, num_samples=30, seed=0)
    terms = elbo_terms(vae.model, vae.guide, test, num_samples=evaluation.ELBO_SAMPLES, seed=0)
    for key, value in {
        "test_log_likelihood": estimate.value,
        "test_log_likelihood_stderr": estimate.mc_stderr,
        "test_log_likelihood_data_stderr": estimate.data_stderr,
        "test_log_likelihood_bias": estimate.bias,
        "test_elbo": terms.value,
        "test_elbo_stderr": terms.mc_stderr,
        "test_reconstruction": terms.reconstruction,
        "test_kl": terms.kl,
        "active_units": active_units(vae.guide, test).count,
    }.items():
        assert summary[key] == pytest.approx(value, rel=1e-6), key
    assert summary["log_likelihood_is"] == estimate.kind
    assert summary["test_elbo"] == pytest.approx(summary["test_reconstruction"] - summary["test_kl"])
    assert summary["test_elbo"] <= summary["test_log_likelihood"] + 4 * summary["test_elbo_stderr"]
    assert summary["epochs"] == 2 and summary["interrupted"] is False
    assert summary["parameters"] == sum(p.numel() for p in vae.parameters())


def test_a_lower_bound_is_shown_as_one_in_the_terminal_and_the_table(run, capsys):
    import sys

    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    from table import row

    config, summary = (json.loads((run / f"{name}.json").read_text()) for name in ("config", "summary"))
    summary |= {"test_log_likelihood": 2216.81, "test_log_likelihood_stderr": 0.1, "test_khat_ok": 0.41}
    shown = dict(report.lines(summary))["test log p(x)"]
    assert shown.startswith(">= 2216.8 nats (data ± ") and "k-hat ok for 41.0 % (a lower bound" in shown
    assert "**>= 2216.8** (data ±" in row(run, config, summary) and "± 0.1" not in shown + row(run, config, summary)
    summary["test_khat_ok"] = 0.95
    assert dict(report.lines(summary))["test log p(x)"].startswith("2216.81 ± 0.10 (Monte Carlo")
    assert "**2216.81 ± 0.1**" in row(run, config, summary)


def test_the_protocol_says_what_belongs_to_the_numbers(run):
    protocol = json.loads((run / "summary.json").read_text())["protocol"]
    assert protocol["dataset"] == "digits" and protocol["binarization"] == "dynamic"
    assert protocol["sizes"]["train"] == protocol["limit"] == 200
    assert protocol["test_images"] == 20 and protocol["log_likelihood_samples"] == 30
    assert set(protocol["versions"]) == {"pyro_vae", "torch", "pyro", "python"}
    assert protocol["selection"] == "nothing selected on the test set"


def test_the_config_given_back_gives_the_same_weights_to_the_bit(run, tmp_path):
    command("fit", "--config", run / "config.json", "--out", tmp_path / "again", "--quiet")
    assert (tmp_path / "again" / "config.json").read_text() == (run / "config.json").read_text()
    assert (tmp_path / "again" / "weights.safetensors").read_bytes() == (run / "weights.safetensors").read_bytes()
    config = json.loads((run / "config.json").read_text())
    assert config["epochs"] == 2 and config["likelihood"] == "bernoulli" and config["binarization"] == "dynamic"


GREY = {"likelihood": "normal", "binarization": "none", "dequantize": True}


@pytest.mark.parametrize("more", [GREY, GREY | {"prior": "vamp"}, {"likelihood": "normal"}, {"prior": "vamp"}])
def test_new_weights_are_of_the_seed_alone(more):
    from pyro_vae.app.building import build
    from pyro_vae.app.defaults import resolve
    from pyro_vae.app.reading import read

    options, dataset = read(resolve({"data": "digits", "hidden": (8,), "latent_dim": 2, "limit": 200} | more))
    found = []
    for seed in (1, 2):  # of whatever was drawn before
        torch.manual_seed(seed)
        found.append(build(options, dataset).state_dict())
        assert torch.rand(()) == torch.rand((), generator=torch.Generator().manual_seed(seed))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_another_seed_gives_other_weights(run, tmp_path):
    command("fit", "--config", run / "config.json", "--seed", 1, "--out", tmp_path / "other", "--quiet")
    one, two = (Run.load(path).vae().state_dict() for path in (run, tmp_path / "other"))
    assert not all(torch.equal(one[key], two[key]) for key in one)


def test_evaluate_finds_the_same_numbers(run, tmp_path, capsys):
    before = sorted(path.name for path in run.rglob("*"))
    command("evaluate", run, "--json", "--out", tmp_path / "numbers.json")
    found, summary = json.loads(capsys.readouterr().out), json.loads((run / "summary.json").read_text())
    for key in ("test_elbo", "test_log_likelihood", "test_kl", "active_units"):
        assert found[key] == pytest.approx(summary[key], rel=1e-6)
    assert found["protocol"] == summary["protocol"]
    assert json.loads((tmp_path / "numbers.json").read_text()) == found
    assert sorted(path.name for path in run.rglob("*")) == before
    command("evaluate", run, "-K", 10, "--seed", 3)
    assert "K = 10, seed 3" in capsys.readouterr().out


@pytest.mark.pictures
def test_sample_writes_pictures_arrays_and_folders(run, tmp_path, capsys):
    command("sample", run, "-n", 4, "--seed", 5, "--out", tmp_path / "four.npy")
    command("sample", run, "-n", 4, "--seed", 5, "--out", tmp_path / "again.npy")
    four = np.load(tmp_path / "four.npy")
    assert four.shape == (4, 1, 8, 8)
    assert np.array_equal(four, np.load(tmp_path / "again.npy"))
    command("sample", run, "-n", 3, "--pixels", "draw", "--out", tmp_path / "folder")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["0.png", "1.png", "2.png"]
    with Image.open(tmp_path / "folder" / "0.png") as picture:
        assert picture.size == (8, 8) and set(np.unique(np.array(picture))) <= {0, 255}
    command("sample", run, "-n", 9, "--out", tmp_path / "nine.png")
    assert (tmp_path / "nine.png").stat().st_size > 1000
    assert "wanted a .png, a .npy, or a folder" in refused(capsys, "sample", run, "--out", tmp_path / "x.gif")


def test_reconstruct_takes_any_image_file(run, autoencoder, tmp_path, capsys):
    Image.new("RGB", (30, 20), (200, 10, 10)).save(tmp_path / "colour.jpg")
    Image.new("L", (8, 8), 255).save(tmp_path / "fits.png")
    images = (tmp_path / "colour.jpg", tmp_path / "fits.png")
    command("reconstruct", run, *images, "--out", tmp_path / "beside.png", "-K", 20)
    said = capsys.readouterr()
    assert "colour.jpg: made grey, scaled from 20x30 to 8x8 (height x width), binarized by one draw" in said.err
    rows = [line.split() for line in said.out.splitlines()]
    assert rows[1][0] == "colour.jpg" and len(rows[1]) == 5
    likelihood, kl, elbo, _ = map(float, rows[1][1:])
    assert elbo == pytest.approx(likelihood - kl, abs=0.011)
    assert (tmp_path / "beside.png").exists()
    command("reconstruct", autoencoder, images[1], "--out", tmp_path / "beside.png")
    assert len(capsys.readouterr().out.splitlines()[1].split()) == 2
    (tmp_path / "text.png").write_text("no image")
    assert "could not be decoded" in refused(capsys, "reconstruct", run, tmp_path / "text.png")
    assert "none.png" in refused(capsys, "reconstruct", run, tmp_path / "none.png")


def test_anomalies_are_ranked_and_scored(run, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "noise.npz", images=noise)
    argv = ("anomalies", run, "--top", 3, "-K", 10, "--out", tmp_path / "scores.csv", "--picture", tmp_path / "top.png")
    command(*argv, "--outliers", tmp_path / "noise.npz")
    said = capsys.readouterr().out
    auc = float(said.split("ROC-AUC ")[1].split(":")[0])
    assert auc > 0.9
    with (tmp_path / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    scores = [float(row["score"]) for row in rows if row["set"] == "test"]
    assert len(scores) == 360 and scores == sorted(scores, reverse=True)
    assert {row["set"] for row in rows} == {"test", "outliers"}
    assert said.splitlines()[1].split()[1] == rows[0]["index"]
    assert (tmp_path / "top.png").exists()


def test_a_score_that_is_fooled_says_so_and_others_are_offered(run, tmp_path, capsys):
    # The mean of the digits: what the pair expects, and no digit.
    mean = data.load("digits").train.mean().mul(255).round().to(torch.uint8).numpy()
    np.savez(tmp_path / "mean.npz", images=np.repeat((mean > 127).astype(np.uint8) * 255, 40, 0))
    argv = (
        "anomalies",
        run,
        "--top",
        1,
        "-K",
        10,
        "--picture",
        tmp_path / "top.png",
        "--outliers",
        tmp_path / "mean.npz",
    )
    command(*argv)
    said = capsys.readouterr().out
    assert float(said.split("ROC-AUC ")[1].split(":")[0]) < 0.5
    assert "ROC-AUC below 0.5: " in said and "ratio (p(x) against the compressed size), regret" in said
    command(*argv, "--score", "ratio")
    corrected = capsys.readouterr().out
    assert "-log p(x) - compressed size (nats)" in corrected
    assert "by ratio, " in corrected  # a compressor has nothing to say of 64 pixels
    command(*argv[:6], "--picture", tmp_path / "top.png", "--score", "regret")
    assert "ELBO(best q) - ELBO(q) (nats)" in capsys.readouterr().out


def test_outliers_of_another_shape_are_refused_with_the_remedy(run, tmp_path, capsys):
    np.savez(tmp_path / "large.npz", images=np.zeros((20, 12, 12), dtype=np.uint8))
    argv = ("anomalies", run, "-K", 5, "--outliers", tmp_path / "large.npz", "--picture", tmp_path / "top.png")
    line = refused(capsys, *argv)
    assert "of shape (1, 12, 12), wanted (1, 8, 8) as in the run. Pass --fit-outliers" in line
    command(*argv, "--fit-outliers")


def test_an_autoencoder_has_a_reconstruction_and_no_bound(autoencoder, tmp_path, capsys):
    summary = json.loads((autoencoder / "summary.json").read_text())
    assert not {"test_elbo", "test_kl", "test_log_likelihood", "test_log_likelihood_stderr"} & set(summary)
    assert summary["objective"] == "reconstruction"
    vae = Run.load(autoencoder).vae()
    test = data.load("digits").test.frozen(0).subset(slice(0, 20))
    wanted = mean_bound(vae.model, vae.guide, test, reconstruction, seed=0)
    assert summary["test_reconstruction"] == pytest.approx(wanted, rel=1e-6)
    command("evaluate", autoencoder)
    assert "a point has no ELBO and no log p(x)" in capsys.readouterr().out
    command("anomalies", autoencoder, "--picture", tmp_path / "top.png")
    assert "-E_q log p(x|z)" in capsys.readouterr().out
    assert "no density over z" in refused(capsys, "anomalies", autoencoder, "--score", "log-likelihood")


def test_linear_gaussian_agrees_with_its_closed_forms(tmp_path):
    command("fit", "--data", "linear-gaussian", "--epochs", 8, "--limit", 5000, "--evaluation-samples", 500,
            "--evaluation-images", 200, "--out", tmp_path / "run", "--quiet")  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    evidence = summary["fitted_log_evidence"]
    estimate = summary["test_log_likelihood"] - summary["test_log_likelihood_bias"]
    assert abs(estimate - evidence) < 4 * summary["test_log_likelihood_stderr"] + 1e-4
    assert summary["fitted_log_evidence_minus_elbo"] > 0
    assert summary["true_log_evidence"] > evidence
    vae = Run.load(tmp_path / "run").vae()
    x = torch.randn(3, 20)
    fitted = evaluation.fitted_testbed(vae)
    again = vae.decode(fitted.posterior(x.double()).mean.float()).mean
    assert torch.allclose(again, (fitted.posterior(x.double()).mean @ fitted.weight.T + fitted.loc).float(), atol=1e-5)


@pytest.mark.parametrize("network", ["mlp", "conv"])
def test_a_folder_of_colour_images(network, tmp_path, capsys):
    rng = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (12, 15, 3), dtype=np.uint8)).save(path)
    command("fit", "--data", tmp_path / "photos", "--image-size", 10, "--network", network, "--hidden", "8,8",
            "--epochs", 1, "--latent-dim", 2, "--evaluation-samples", 10, "--out", tmp_path / "run",
            "--quiet")  # fmt: skip
    run = Run.load(tmp_path / "run")
    assert run.config["likelihood"] == "normal" and run.config["dequantize"] is True
    assert "8-bit levels" in run.summary["bits_per_dimension_by"]
    wanted = data.bits_per_dimension(run.summary["test_log_likelihood"], 300)
    assert run.summary["test_bits_per_dimension"] == pytest.approx(wanted)
    command("anomalies", tmp_path / "run", "-K", 5, "--top", 2)
    command("sample", tmp_path / "run", "-n", 2, "--out", tmp_path / "two")
    with Image.open(tmp_path / "two" / "0.png") as picture:
        assert picture.mode == "RGB" and picture.size == (10, 10)


def test_vectors_have_pictures_too(tmp_path):
    np.savez(tmp_path / "vectors.npz", data=np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32))
    command("fit", "--data", tmp_path / "vectors.npz", "--epochs", 1, "--hidden", 8, "--latent-dim", 2,
            "--evaluation-samples", 10, "--out", tmp_path / "run", "--quiet")  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "run" / "figures").iterdir()) == PICTURES


@pytest.mark.parametrize("name", ["config.json", "summary.json", "weights.safetensors"])
@pytest.mark.parametrize("damage", ["missing", "corrupt", "empty"])
def test_a_damaged_run_is_one_line(name, damage, copied, capsys):
    if damage == "missing":
        (copied / name).unlink()
    else:
        (copied / name).write_bytes(b"" if damage == "empty" else b"{broken")
    line = refused(capsys, "sample", copied)
    assert name in line


def test_weights_of_another_run_are_noticed(copied, autoencoder, capsys):
    shutil.copy(autoencoder / "weights.safetensors", copied / "weights.safetensors")
    assert "the two files are of different runs" in refused(capsys, "sample", copied)


def test_a_damaged_config_value_is_one_line(copied, capsys):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"epochs": "many"}))
    assert "config.json is damaged: got epochs = 'many'" in refused(capsys, "evaluate", copied)


def test_no_run_there(tmp_path, capsys):
    assert "wanted a run folder" in refused(capsys, "evaluate", tmp_path / "nothing")
    assert "has no config.json" in refused(capsys, "evaluate", tmp_path)


def test_what_went_wrong_before_the_first_epoch_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), run_folder(tmp_path / "a" / "b") as folder:
        (folder / "some").write_text("text")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_numbers_that_are_not_finite_become_null(tmp_path):
    write_json(tmp_path / "x.json", {"a": float("nan"), "b": [float("inf"), 1.0]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": None, "b": [None, 1.0]}


@pytest.mark.parametrize("ok, bound", [(0.41, True), (0.97, False)])
def test_what_is_a_lower_bound_is_one_in_bits_and_in_the_picture_too(tmp_path, monkeypatch, ok, bound):
    """log p(x) >= L means at most -L / (D log 2) bits."""
    summary = {
        "test_log_likelihood": -20.0, "test_log_likelihood_stderr": 0.1, "test_log_likelihood_data_stderr": 0.2,
        "test_khat_ok": ok, "test_bits_per_dimension": 1.25, "test_elbo": -21.0, "test_elbo_stderr": 0.1,
        "test_reconstruction": -15.0, "test_kl": 6.0,
    }  # fmt: skip
    bits = dict(report.lines(summary))["bits per dim."]
    assert bits.startswith("<= 1.25" if bound else "1.25")
    drawn = []
    monkeypatch.setattr(report, "save", lambda figure, path: drawn.append(figure))
    options = resolve({"limit": 20})
    report.draw_curve(
        VAE.build((1, 2, 2), latent_dim=1, hidden=(2,)), [{"epoch": 1, "bound": -22.0}], summary, options, tmp_path
    )
    labels = [text.get_text() for text in drawn[0].axes[0].get_legend().get_texts()]
    assert any(text.startswith("lower bound of test log p(x)") for text in labels) is bound
