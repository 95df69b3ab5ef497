"""`pyro-vae fit --from RUN`: what is taken over from a finished run, and that going on from it can be broken off."""

import json
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pyro_vae.app import fitting, starting
from pyro_vae.app.building import build
from pyro_vae.app.cli import main
from pyro_vae.app.defaults import resolve
from pyro_vae.app.reading import read
from pyro_vae.app.runs import Run, finish, run_folder, write_json
from pyro_vae.inference import loop

TINY = ["--limit", "200", "--hidden", "16", "--latent-dim", "3", "--evaluation-samples", "20", "--evaluation-images",
        "20"]  # fmt: skip


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fitting, "second_view", lambda *_: {})
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of thirty epochs, with a KL warm-up."""
    path = tmp_path_factory.mktemp("runs") / "first"
    argv = ["fit", "--out", str(path), *TINY, "--epochs", "30", "--kl-warmup", "20", "--quiet"]
    assert main(argv) == 0
    return path


def weights(path):
    return load_file(path / "weights.safetensors")


def same(one, two):
    return all(torch.equal(weights(one)[name], value) for name, value in weights(two).items())


def records(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def number(path, name="summary"):
    return json.loads((path / f"{name}.json").read_text())


def test_it_starts_where_the_run_ended(run, here, capsys):
    still = ["--learning-rate", "1e-30", "--schedule", "constant", "--epochs", "3"]
    assert main(["fit", "--from", str(run), "--out", "on", *still]) == 0
    said = capsys.readouterr()
    assert f"going on from the weights of {run}, 30 epochs old (the networks are the same): 3 more" in said.err
    assert re.search(rf"^from +{run}: its weights, 30 epochs old, and its options$", said.out, re.M)
    assert same(run, here / "on"), "a rate of nothing leaves the weights where they were"
    first = records(here / "on")
    assert len(first) == 3 and {record["beta"] for record in first} == {1.0}, "the KL's warm-up is over"
    # the validation images and their noise are those of the run, so this is the same number, not one near it
    assert first[0]["validation"] == pytest.approx(records(run)[-1]["validation"], rel=1e-6)
    origin = number(here / "on")["from"]
    assert origin["run"] == str(run) and origin["weights"] is True and origin["epochs"] == 30
    assert number(here / "on", "config")["from"] == str(run)
    assert "its weights, 30 epochs old" in (here / "on" / "report.html").read_text()
    for name in ("limit", "hidden", "latent_dim", "evaluation_samples"):
        assert number(here / "on", "config")[name] == number(run, "config")[name]
    assert number(here / "on")["test_elbo"] == pytest.approx(number(run)["test_elbo"], rel=1e-6)


def test_more_epochs_are_better_and_a_chain_counts_them_all(run, here):
    assert main(["fit", "--from", str(run), "--out", "two", "--epochs", "10", "--quiet"]) == 0
    assert main(["fit", "--from", "two", "--out", "three", "--quiet"]) == 0
    two, three = number(here / "two"), number(here / "three")
    assert (two["epochs"], three["epochs"]) == (10, 10), "as many as the run had, if nothing is said"
    assert three["from"]["epochs"] == 40 and three["from"]["run"] == str(here / "two")
    assert number(run)["test_elbo"] < two["test_elbo"] < three["test_elbo"]


def test_another_network_starts_anew_and_is_the_fit_of_these_options(run, here, capsys):
    changed = ["--latent-dim", "4", "--epochs", "2", "--kl-warmup", "0"]
    assert main(["fit", "--from", str(run), "--out", "from", *changed]) == 0
    said = capsys.readouterr()
    assert f"new weights by the options of {run}, not its weights: --latent-dim 4 (there: 3)" in said.err
    assert main(["fit", "--config", str(run), "--out", "config", *changed, "--quiet"]) == 0
    assert same(here / "from", here / "config")
    assert number(here / "from")["from"] | {"why": ""} == {"run": str(run), "weights": False, "epochs": 30, "why": ""}
    assert "new weights, since --latent-dim 4 (there: 3)" in (here / "from" / "report.html").read_text()


def test_the_same_command_goes_on_with_it_to_the_bit(run, here, monkeypatch, capsys):
    argv = ["fit", "--from", str(run), "--epochs", "5"]
    assert main([*argv, "--out", "whole", "--quiet"]) == 0
    original, calls = loop.Stepper.epoch, []

    def killed(*arguments):
        calls.append(0)
        if len(calls) == 4:
            raise MemoryError("killed")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Stepper, "epoch", killed)
        patch.setattr("pyro_vae.inference.checkpoints.Checkpoint.due", lambda _: True)
        assert main(argv) == 2
    assert not same(run, here / "runs" / "digits-1")
    capsys.readouterr()
    assert main(argv) == 0
    said = capsys.readouterr().err
    assert "going on with runs/digits-1" in said and "after epoch 3 of 5" in said
    assert same(here / "whole", here / "runs" / "digits-1") and len(records(here / "runs" / "digits-1")) == 5
    assert main([*argv[:-1], "6", "--out", "runs/digits-1"]) == 2, "a finished run is not written over"
    # a run that goes on from another one is reproduced by its own configuration
    assert main(["fit", "--config", "whole", "--out", "again", "--quiet"]) == 0
    assert same(here / "whole", here / "again")


def options(folder, typed, **earlier):
    """What `fit --from` makes of a run of these options and what is typed."""
    settled = read(resolve(earlier))[0]
    with run_folder(folder) as path:
        for name in ("config", "summary"):
            write_json(path / f"{name}.json", settled.to_json() if name == "config" else {"epochs": 7})
        (path / "weights.safetensors").touch()
        finish(path)
    return resolve(starting.merged({"from_run": str(folder)} | typed)), settled


@pytest.mark.parametrize(
    "earlier, typed, wanted",
    [
        ({}, {"bound": "iwae"}, {"num_samples": 50, "hidden": (256, 128)}),
        ({"bound": "iwae"}, {"bound": "elbo"}, {"num_samples": 1}),
        ({"bound": "iwae", "num_samples": 7}, {"bound": "miwae"}, {"num_samples": 7}),
        ({"bound": "renyi", "bound_options": {"alpha": 0.3}}, {"bound": "iwae"}, {"bound_options": {}}),
        ({}, {"network": "conv"}, {"hidden": (32, 64, 128)}),
        ({"network": "conv", "hidden": (4, 8)}, {"latent_dim": 5}, {"hidden": (4, 8), "network": "conv"}),
        ({"posterior": "von-mises-fisher"}, {"posterior": "diagonal"}, {"prior": "normal"}),
        ({"posterior": "nsf", "posterior_options": {"bins": 4}}, {"posterior": "iaf"}, {"posterior_options": {}}),
        ({"posterior": "nsf", "posterior_options": {"bins": 4}}, {"beta": 2.0}, {"posterior_options": {"bins": 4}}),
        ({"likelihood": "poisson"}, {"likelihood": "Bernoulli"}, {"likelihood_options": {}, "binarization": None}),
        ({"likelihood": "poisson"}, {"likelihood": "Poisson"}, {"likelihood_options": {"levels": 256}}),
        ({"binarization": "static"}, {"likelihood": "normal"}, {"binarization": "none", "dequantize": True}),
        ({"likelihood": "normal"}, {"binarization": "static"}, {"likelihood": "bernoulli"}),
        ({"kl_warmup": 20}, {"epochs": 5}, {"kl_warmup": 0, "epochs": 5}),
        ({"kl_warmup": 20}, {"epochs": 5, "kl_warmup": 2}, {"kl_warmup": 2}),
        ({"kl_warmup": 20}, {"latent_dim": 5}, {"kl_warmup": 20}),
        ({"limit": 100, "seed": 3}, {"data": "linear-gaussian"}, {"limit": None, "likelihood": "normal", "seed": 3}),
    ],
)  # fmt: skip
def test_what_followed_from_a_changed_option_goes_with_it(earlier, typed, wanted, tmp_path):
    found, _ = options(tmp_path / "run", typed, **earlier)
    assert {name: getattr(found, name) for name in wanted} == wanted


@pytest.mark.parametrize("earlier", [{}, {"prior": "vamp", "limit": 300}, {"bound": "iwae", "posterior": "nsf"},
                                     {"data": "frey-less", "likelihood": "poisson"}])  # fmt: skip
def test_nothing_typed_is_the_run_again(earlier, tmp_path):
    if earlier.get("data"):
        np.save(tmp_path / "counts.npy", np.random.default_rng(0).poisson(3.0, (60, 5)).astype(np.float32))
        earlier = earlier | {"data": str(tmp_path / "counts.npy")}
    found, settled = options(tmp_path / "run", {}, **earlier)
    assert {**vars(found), "from_run": None} == vars(settled)


def refused(capsys, *argv):
    capsys.readouterr()
    assert main(["fit", *argv]) == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    return said.strip().splitlines()[-1]


def test_what_cannot_be_gone_on_from_is_refused_with_the_remedy(run, here, capsys):
    assert "got --from none, wanted a run folder" in refused(capsys, "--from", "none")
    with pytest.raises(KeyError), run_folder(here / "half", {}) as path:
        (path / "weights.safetensors").touch()
        raise KeyError
    assert (
        "--from half, an unfinished run, wanted a finished one. Go on with it first: pyro-vae fit --resume half"
        in refused(capsys, "--from", "half")
    )
    (here / "empty").mkdir()
    assert "empty has no config.json" in refused(capsys, "--from", "empty")
    said = refused(capsys, "--from", str(run), "--beta", "2", "--bound", "iwae")
    assert "got --beta 2 with --bound iwae" in said and f"What is not typed here is that of --from {run}" in said
    assert sorted(path.name for path in here.iterdir()) == ["empty", "half"]


def test_data_of_another_shape(here, capsys):
    x = np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32)
    np.save("x.npy", x)
    np.save("y.npy", x[:, :4])
    few = ["--hidden", "8", "--latent-dim", "2", "--epochs", "1", "--evaluation-samples", "20", "--quiet"]
    assert main(["fit", "--data", "x.npy", "--out", "run", *few]) == 0
    assert main(["fit", "--from", "run", "--data", "y.npy", "--out", "other"]) == 0
    assert "not its weights: the data are 4, there 5" in capsys.readouterr().err
    np.save("x.npy", x[:, :4])
    said = refused(capsys, "--from", "run", "--out", "third")
    assert "now has data of shape 4, but run, the run of --from, was fitted to 5" in said and "--config run" in said
    assert not (here / "third").exists()


def test_a_seed_that_would_test_on_what_was_trained_on_is_refused(run, here, capsys):
    np.save("x.npy", np.random.default_rng(0).normal(size=(60, 5)).astype(np.float32))
    few = ["--hidden", "8", "--latent-dim", "2", "--epochs", "1", "--evaluation-samples", "20", "--quiet"]
    assert main(["fit", "--data", "x.npy", "--out", "run", *few]) == 0
    said = refused(capsys, "--from", "run", "--seed", "1")
    assert "tested on data that they were trained on" in said and "--config" in said
    assert main(["fit", "--from", str(run), "--epochs", "1", "--seed", "1", "--quiet"]) == 0, (
        "the digits have one split"
    )


def test_code_of_ones_own_is_imported_on_trust_only(here, capsys, monkeypatch):
    (here / "parts_of_mine.py").write_text(
        "from pyro_vae.parts.posteriors import DiagonalNormal\n\n\nclass Mine(DiagonalNormal):\n    pass\n"
    )
    monkeypatch.syspath_prepend(here)
    named = ["--posterior", "parts_of_mine:Mine"]
    assert main(["fit", *TINY, "--epochs", "1", "--out", "run", *named, "--quiet"]) == 0
    said = refused(capsys, "--from", "run", "--out", "on")
    assert "parts_of_mine:Mine, code outside pyro_vae" in said and "trust" in said
    assert main(["fit", "--from", "run", "--out", "on", "--trust", "parts_of_mine:Mine", "--quiet"]) == 0


def test_a_run_goes_on_without_the_one_it_came_from(run, here):
    """Its weights are its own: nothing but the same fit needs the folder that it began with."""
    assert main(["fit", "--from", str(run), "--out", "a", "--epochs", "1", "--quiet"]) == 0
    assert main(["fit", "--from", "a", "--out", "b", "--epochs", "1", "--quiet"]) == 0
    (here / "a").rename(here / "moved")
    assert main(["evaluate", "b", "-K", "20"]) == 0
    vae = Run.load(here / "b").vae()
    fresh = build(*read(resolve(number(here / "b", "config"))))
    assert {name: value.shape for name, value in vae.state_dict().items()} == {
        name: value.shape for name, value in fresh.state_dict().items()
    }
