"""From a run folder to Python and back: what `pv.open` gives is what the run had, and opening runs no code of others."""

import json
import shutil
import sys

import pytest
import torch

import pyro_vae as pv
from pyro_vae.app.cli import main

TINY = ["--epochs", "2", "--limit", "200", "--hidden", "16", "--latent-dim", "3", "--evaluation-samples", "30",
        "--evaluation-images", "20", "--quiet"]  # fmt: skip
PART = """
import builtins
builtins.part_was_imported = True
from pyro_vae.parts.posteriors import DiagonalNormal
class Mine(DiagonalNormal):
    pass
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "digits"
    assert main(["fit", "--out", str(path), "--seed", "3", *TINY]) == 0
    return path


def test_the_pair_is_the_fitted_one_and_its_numbers_come_out_again(folder):
    run = pv.open(folder)
    assert run.model is run.vae.model and run.guide is run.vae.guide
    estimate = pv.log_likelihood(run, run.data.test, num_samples=30, seed=3, progress=False)
    assert estimate.value == pytest.approx(run.summary["test_log_likelihood"], abs=1e-12)
    assert len(run.data.test) == 20 and len(run.data.train) == 200
    assert not torch.equal(run.data.train[:9], run.data.train[:9]) and torch.equal(run.data.test[:9], run.data.test[:9])
    scored = pv.elbo_terms(run, run.data.validation, num_samples=1, progress=False).value
    assert run.history["validation"][-1] == pytest.approx(scored, abs=0.5)  # one sample each, other noise


def test_history_options_and_summary_are_those_of_the_files(folder):
    run = pv.open(str(folder))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert isinstance(run.history, pv.History) and run.history.records == lines and len(run.history) == 2
    assert run.history.best_epoch == run.summary["best_epoch"]
    assert run.options.latent_dim == 3 and run.options.seed == 3 and run.options.binarization == "dynamic"
    assert run.options.to_json() == json.loads((folder / "config.json").read_text())
    assert run.summary == json.loads((folder / "summary.json").read_text())


def test_it_says_what_it_is(folder):
    text = repr(pv.open(folder))
    assert f"{folder}: a run on digits, 2 epochs" in text and "--latent-dim 3" in text and "--likelihood" not in text
    assert f"log p(x) {pv.open(folder).summary['test_log_likelihood']:.2f} ±" in text


def test_parts_of_ones_own_are_imported_only_if_trusted(tmp_path, monkeypatch):
    (tmp_path / "parts_of_mine.py").write_text(PART)
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "run"
    assert main(["fit", "--out", str(path), "--posterior", "parts_of_mine:Mine", *TINY]) == 0
    for trusting in (True, ["parts_of_mine:Mine"], "parts_of_mine:Mine"):
        sys.modules.pop("parts_of_mine", None)
        import builtins

        monkeypatch.delattr(builtins, "part_was_imported", raising=False)
        for not_trusting in (False, (), ["other:Part"]):
            with pytest.raises(ValueError, match="code outside pyro_vae that loading would run"):
                pv.open(path, trust=not_trusting)
        assert not hasattr(builtins, "part_was_imported")
        assert type(pv.open(path, trust=trusting).guide.posterior).__name__ == "Mine"


def test_a_folder_that_is_no_run_or_damaged_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match="wanted a run folder"):
        pv.open(tmp_path / "none")
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "weights.safetensors").write_bytes(b"\x80\x04cos\nsystem\n")  # a pickle is no safetensors file
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        pv.open(copy)


def test_data_that_moved_are_named(folder):
    from dataclasses import replace

    run = pv.open(folder)
    other = replace(run, options=replace(run.options, image_size=6))
    with pytest.raises(ValueError, match="was fitted to \\(1, 8, 8\\)"):
        _ = other.data


def test_fit_takes_a_run_as_its_configuration(folder, tmp_path, capsys):
    out = tmp_path / "again"
    assert main(["fit", "--config", str(folder), "--out", str(out), "--quiet"]) == 0
    assert json.loads((out / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    first, second = pv.open(folder).vae.state_dict(), pv.open(out).vae.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert main(["fit", "--config", str(tmp_path), "--out", str(tmp_path / "third")]) == 2
    assert "a folder without config.json, wanted a run folder or a file" in capsys.readouterr().err
