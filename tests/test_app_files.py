"""Files of one's own through the command: what they are decides the likelihood, and a run finds them again."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae.app.cli import main
from pyro_vae.app.defaults import resolve
from pyro_vae.app.reading import read

TINY = ["--epochs", "1", "--hidden", "8", "--latent-dim", "2", "--evaluation-samples", "20", "--batch-size", "16", "--compile", "off",
        "--quiet"]  # fmt: skip
RANDOM = np.random.default_rng(0)
BITS = RANDOM.random((60, 4, 4)) < 0.4


def settled(path, **options):
    return read(resolve({"data": str(path), **options}))


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64, np.uint8, bool])
def test_binary_files_take_the_bernoulli(tmp_path, dtype):
    np.save(tmp_path / "a.npy", BITS.astype(dtype))
    for likelihood in (None, "bernoulli"):
        options, data = settled(tmp_path / "a.npy", **({} if likelihood is None else {"likelihood": likelihood}))
        assert (options.likelihood, options.binarization, data.train.fixed) == ("bernoulli", "threshold", True)
    with pytest.raises(ValueError, match="a density of zeros and ones has no upper limit"):
        settled(tmp_path / "a.npy", likelihood="normal")


@pytest.mark.parametrize("dtype", [np.float32, np.int64, np.uint8])
def test_counts_of_zero_and_one_are_counts(tmp_path, dtype):
    np.save(tmp_path / "a.npy", BITS.reshape(60, 16).astype(dtype))
    options, data = settled(tmp_path / "a.npy", likelihood="poisson")
    assert data.train[:].unique().tolist() == [0, 1] and options.likelihood_options == {}


def test_grey_files_are_drawn_afresh_for_a_bernoulli(tmp_path):
    np.save(tmp_path / "a.npy", np.full((60, 4, 4), 0.5, dtype=np.float32))
    options, data = settled(tmp_path / "a.npy", likelihood="bernoulli")
    assert options.binarization == data.protocol["binarization"] == "dynamic" and not options.dequantize
    assert data.test[:].unique().tolist() == [0, 1] and not torch.equal(data.train[:], data.train[:])


def test_keys_are_kept_with_the_run(tmp_path, capsys):
    np.savez(tmp_path / "a.npz", one=BITS, two=RANDOM.random((60, 4, 4)), kind=np.arange(60) % 3)
    run = tmp_path / "run"
    said = ["fit", "--data", str(tmp_path / "a.npz"), "--images", "one", "--labels", "kind", "--out", str(run), *TINY]
    assert main(said) == 0
    config, protocol = (json.loads((run / name).read_text()) for name in ("config.json", "summary.json"))
    assert (config["images"], config["labels"], config["likelihood"]) == ("one", "kind", "bernoulli")
    assert protocol["protocol"]["images"] == "one"
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["test_log_likelihood"] == pytest.approx(protocol["test_log_likelihood"], rel=1e-4)
    assert main(["fit", "--data", str(tmp_path / "a.npz"), "--out", str(tmp_path / "other"), *TINY]) == 2
    assert "--images one" in capsys.readouterr().err


def test_the_background_is_kept_with_the_run_and_used_by_reconstruct(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    levels = RANDOM.integers(0, 256, (20, 4, 4, 4), dtype=np.uint8)
    levels[..., 3] = 0
    levels[:, 0, 0, 3] = 255
    for number, image in enumerate(levels):
        Image.fromarray(image).save(tmp_path / "photos" / f"{number}.png")
    said = ["fit", "--data", "photos", "--background", "black", "--out", "run", *TINY]
    assert main(said) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["background"] == "black"
    _, data = read(resolve(json.loads((tmp_path / "run" / "config.json").read_text())))
    assert data.train.pixels[:, :, 1:].max() == 0
    seen = []
    monkeypatch.setattr("pyro_vae.plots.reconstructions", lambda x, _: seen.append(x))
    monkeypatch.setattr("pyro_vae.app.report.save", lambda *_: None)
    assert main(["reconstruct", "run", "photos/3.png"]) == 0
    assert seen[0][:, :, 1:].max() < 1 / 255 and capsys.readouterr()
    assert main(["fit", "--data", "photos", "--background", "red", "--out", "other", *TINY]) == 2
    assert "wanted white, black or a grey level" in capsys.readouterr().err
