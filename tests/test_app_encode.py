"""`pyro-vae encode` and `pyro-vae export`: tables and programs that hold what the run's networks say; and beta."""

import builtins
import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

import pyro_vae as pv
from pyro_vae.app import encoding, exporting
from pyro_vae.app.cli import main
from pyro_vae.app.defaults import resolve
from pyro_vae.app.losses import the_loss

TINY = [
    "--epochs",
    "1",
    "--hidden",
    "16",
    "--latent-dim",
    "3",
    "--evaluation-samples",
    "10",
    "--evaluation-images",
    "20",
    "--quiet",
]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve grey photographs of two sizes, in two folders."""
    path, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(12):
        folder = path / ("cats" if i % 2 else "dogs")
        folder.mkdir(exist_ok=True)
        Image.fromarray(random.integers(0, 256, (9 + i % 3, 12), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, photos):
    base = tmp_path_factory.mktemp("runs")
    made = {
        "digits": ["--limit", "100"],
        "flow": ["--limit", "100", "--posterior", "maf"],
        "photos": ["--data", str(photos), "--image-size", "8"],
    }
    for name, options in made.items():
        assert main(["fit", "--out", str(base / name), *options, *TINY]) == 0
    return {name: base / name for name in made}


def encode(run, data, out, *more):
    assert main(["encode", str(run), str(data), "--out", str(out), *more]) == 0


def test_a_folder_gives_one_row_per_file_with_the_networks_numbers(runs, photos, tmp_path, capsys):
    out = tmp_path / "z.csv"
    encode(runs["photos"], photos, out)
    assert "12 rows, mean and scale of 3 latents" in capsys.readouterr().out
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert [row["file"] for row in rows] == sorted(f"{'cats' if i % 2 else 'dogs'}/{i:02d}.png" for i in range(12))
    assert list(rows[0]) == ["file", *(f"{kind}_{d}" for kind in ("mean", "scale") for d in (1, 2, 3))]
    run = pv.open(runs["photos"])
    grey = torch.stack([encoding._framed(photos / row["file"], (1, 8, 8), run.options) for row in rows])
    q = run.vae.posterior(pv.Split(grey, dequantize=True).frozen(run.options.seed))
    for d in range(3):
        assert torch.allclose(torch.tensor([float(row[f"mean_{d + 1}"]) for row in rows]), q.mean[:, d], atol=1e-5)
        assert torch.allclose(torch.tensor([float(row[f"scale_{d + 1}"]) for row in rows]), q.stddev[:, d], atol=1e-5)


def test_the_runs_own_parts_other_data_and_arrays(runs, tmp_path):
    run = pv.open(runs["digits"])
    encode(runs["digits"], "test", tmp_path / "z.npz")
    held = np.load(tmp_path / "z.npz")
    assert held["mean"].shape == held["scale"].shape == (20, 3) and held["part"].tolist() == ["test"] * 20
    assert np.allclose(held["mean"], run.vae.encode(run.data.test).numpy(), atol=1e-6)
    assert np.allclose(held["scale"], run.vae.posterior(run.data.test).stddev.detach().numpy(), atol=1e-6)
    encode(runs["digits"], "digits", tmp_path / "all.npz")
    every = np.load(tmp_path / "all.npz")
    assert len(every["mean"]) == 1797 and every["part"].tolist().count("validation") == 180
    whole = pv.load("digits", seed=run.options.seed).test.frozen(run.options.seed)
    assert np.allclose(every["mean"][-360:], run.vae.encode(whole).numpy(), atol=1e-6) and every["row"][-1] == 359
    np.save(tmp_path / "x.npy", pv.load("digits").test.pixels[:5].numpy())
    encode(runs["digits"], tmp_path / "x.npy", tmp_path / "five.csv", "--seed", "4")
    rows = list(csv.DictReader((tmp_path / "five.csv").read_text().splitlines()))
    wanted = run.vae.encode(pv.load("digits").test.subset(slice(0, 5)).frozen(4))
    assert torch.allclose(torch.tensor([float(row["mean_2"]) for row in rows]), wanted[:, 1], atol=1e-5)


def test_a_family_without_closed_forms_is_drawn_from_and_says_so(runs, tmp_path, capsys):
    encode(runs["flow"], "test", tmp_path / "z.npz")
    assert "means and scales of 256 draws" in capsys.readouterr().out
    run, held = pv.open(runs["flow"]), np.load(tmp_path / "z.npz")
    torch.manual_seed(0)
    z = torch.stack([run.vae.posterior(run.data.test).sample() for _ in range(2000)])
    error = z.std(0) * (1 / 256 + 1 / 2000) ** 0.5
    assert ((torch.tensor(held["mean"]) - z.mean(0)).abs() < 5 * error).all()


def test_what_cannot_be_written_is_said_and_leaves_nothing(runs, photos, tmp_path, monkeypatch, capsys):
    def refused(*argv):
        assert main(["encode", *map(str, argv)]) == 2
        return capsys.readouterr().err

    assert "wanted a .csv, a .npz or a .parquet" in refused(runs["digits"], "test", "--out", tmp_path / "z.txt")
    np.save(photos / ".four.npy", np.zeros((5, 1, 4, 4), dtype=np.uint8))
    assert "wanted (1, 8, 8) as in" in refused(runs["digits"], photos / ".four.npy", "--out", tmp_path / "z.csv")
    own = builtins.__import__

    def without(name, *rest):
        if name == "pyarrow":
            raise ImportError(name)
        return own(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert "needs pandas and pyarrow, and pyarrow is not installed" in refused(
        runs["digits"], "test", "--out", tmp_path / "z.parquet"
    )
    monkeypatch.setattr(builtins, "__import__", own)
    monkeypatch.setattr(encoding, "_csv", lambda path, *_: path.write_text("half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["encode", str(runs["digits"]), "test", "--out", str(tmp_path / "z.csv")])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["digits", "flow"])
def test_exported_programs_give_what_the_networks_give(runs, kind, tmp_path, capsys):
    assert main(["export", str(runs[kind]), "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert str(tmp_path / "encoder.pt2") in said and "torch.export.load(" in said
    vae = pv.open(runs[kind]).vae
    encoder, decoder = (torch.export.load(tmp_path / f"{name}.pt2").module() for name in ("encoder", "decoder"))
    x, z = torch.rand(13, 1, 8, 8), torch.randn(13, 3)
    with torch.no_grad():
        assert torch.allclose(decoder(z)[0], vae.decode(z).mean, atol=1e-6)
        if kind == "flow":
            assert "to (parameters,)" in said
            assert torch.allclose(encoder(x)[0], vae.guide.posterior.head(vae.guide.posterior.encoder(x)), atol=1e-6)
        else:
            mean, scale = encoder(x)
            assert torch.allclose(mean, vae.posterior(x).mean, atol=1e-6) and torch.allclose(
                scale, vae.posterior(x).stddev, atol=1e-6
            )


def test_a_program_that_says_otherwise_is_not_kept(runs, tmp_path, monkeypatch, capsys):
    load = torch.export.load

    def other(path):
        program = load(path)
        for value in program.state_dict.values():
            value.data.mul_(1.001)
        return program

    monkeypatch.setattr(exporting.torch.export, "load", other)
    assert main(["export", str(runs["digits"]), "--out", str(tmp_path)]) == 2
    assert "nothing was written" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_beta_weighs_the_divergence_in_training_and_not_in_what_is_reported(tmp_path):
    found = {}
    for beta in ("1", "20"):
        path = tmp_path / beta
        assert main(["fit", "--out", str(path), "--limit", "300", "--beta", beta, *TINY, "--epochs", "15"]) == 0
        found[beta] = json.loads((path / "summary.json").read_text())
    assert found["20"]["test_kl"] < 0.5 * found["1"]["test_kl"]
    assert all(
        n["test_elbo"] == pytest.approx(n["test_reconstruction"] - n["test_kl"], abs=1e-6) for n in found.values()
    )
    assert pv.open(tmp_path / "20").options.beta == 20 and pv.open(tmp_path / "20").history["beta"][-1] == 20
    vae = pv.VAE.build((1, 8, 8), latent_dim=2, hidden=(4,))
    assert the_loss(resolve({"beta": 2.5}), vae).beta == 2.5
    for wrong in ({"beta": 2.0, "bound": "iwae"}, {"beta": 2.0, "posterior": "point"}, {"beta": -1.0}):
        with pytest.raises(ValueError, match="--beta"):
            resolve(wrong)
