"""Remarks on a run's numbers: each where it belongs, and nowhere else."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae.app import report
from pyro_vae.app.cli import main
from pyro_vae.app.remarks import codes_outside, of_image, remarks

GOOD = {
    "codes_outside_prior": 0.01, "test_kl": 20.0, "latent_dim": 10, "test_images": 10_000, "last_bound": -90.0,
    "sample_energy_distance": 0.3, "sample_energy_distance_null": 0.1, "last_validation": -91.0, "last_beta": 1.0,
    "protocol": {"sizes": {"train": 50_000}}, "dropout": False,
}  # fmt: skip
ODD = {
    "codes far from the prior: 97 % .*KL 96.0 nats in 2 latents": {"codes_outside_prior": 0.97, "test_kl": 96.0, "latent_dim": 2},
    "few data for samples: 240 training data, and samples are 7.5 away where halves of the test data are 0.7 apart": {
        "sample_energy_distance": 7.5, "sample_energy_distance_null": 0.7, "protocol": {"sizes": {"train": 240}}},
    "too few data to judge the samples: .* 0.15 is within the noise of 40 test data, 0.1": {
        "sample_energy_distance": 0.15, "test_images": 40},
    "validation .-80.00. above training .-90.00.: training runs with dropout": {"last_validation": -80.0, "dropout": True},
    "the KL's weight is 0.4 in training, still warming up": {"last_validation": -80.0, "last_beta": 0.4},
    "averaged over an epoch in which the weights still moved": {"last_validation": -80.0},
}  # fmt: skip


def test_numbers_of_which_nothing_is_to_be_said():
    assert remarks(GOOD) == [] and remarks({}) == []


@pytest.mark.parametrize("text", ODD)
def test_each_remark_is_one_line_and_the_terminal_shows_it(text):
    found = remarks(GOOD | ODD[text])
    assert len(found) == 1 and "\n" not in found[0]
    assert re.search(text, found[0]), found[0]
    assert ("note", found[0]) in report.lines(GOOD | ODD[text])


def test_codes_are_measured_in_units_of_the_prior():
    generator = torch.Generator().manual_seed(0)
    prior = 3 + 2 * torch.randn(4000, 5, generator=generator)
    inside = 3 + 2 * torch.randn(1000, 5, generator=generator)
    assert codes_outside(inside, prior) < 0.01
    # 999 of 1,000 normal draws in five dimensions lie within 4.53 standard deviations.
    edge = torch.zeros(2, 5)
    edge[:, 0] = torch.tensor([4.0, 5.1])
    assert codes_outside(3 + 2 * edge, prior) == 0.5


def test_images_that_look_inverted_or_out_of_range():
    known = {"mean": 0.2, "low": 0.0, "high": 1.0}
    assert "looks inverted: its mean level is 0.80" in of_image(torch.full((1, 4, 4), 0.8), known)
    assert of_image(torch.full((1, 4, 4), 0.4), known) is None and of_image(torch.zeros(1, 4, 4), known) is None
    assert of_image(torch.full((1, 4, 4), 0.8), known | {"mean": 0.5}) is None
    dark = {"mean": 0.02, "low": 0.0, "high": 16 / 255}
    assert "is out of range: its levels are 0.00 to 1.00" in of_image(torch.eye(4)[None], dark)
    assert of_image(torch.ones(1, 4, 4), None) is None


def test_a_run_keeps_its_levels_and_reconstruct_says_inverted(tmp_path, capsys):
    # Digits drawn dark on light, and one of them the other way round.
    ramp = np.zeros((60, 8, 8), dtype=np.uint8)
    ramp[:, 2:4, 2:6] = np.random.default_rng(0).integers(150, 256, (60, 2, 4), dtype=np.uint8)
    np.savez(tmp_path / "dark.npz", images=ramp)
    run = tmp_path / "run"
    argv = ["fit", "--data", tmp_path / "dark.npz", "--out", run, "--epochs", 1, "--hidden", "8", "--latent-dim", 2,
            "--evaluation-samples", 30, "--binarization", "threshold", "--quiet"]  # fmt: skip
    assert main([str(word) for word in argv]) == 0
    summary = json.loads((run / "summary.json").read_text())
    levels = summary["train_levels"]
    assert levels["low"] == 0 and levels["high"] == 1 and levels["mean"] == pytest.approx(8 / 64, abs=1e-6)
    assert 0 <= summary["codes_outside_prior"] <= 1 and isinstance(summary["remarks"], list)
    assert summary["last_bound"] < 0 and summary["dropout"] is False
    for name, pixels in (("same", ramp[0]), ("negative", 255 - ramp[0])):
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    capsys.readouterr()
    argv = ["reconstruct", run, tmp_path / "same.png", tmp_path / "negative.png", "--out", tmp_path / "beside.png"]
    assert main([str(word) for word in argv]) == 0
    said = capsys.readouterr().out
    assert "negative.png looks inverted: its mean level is 0.88, that of the training data 0.12" in said
    assert "same.png looks" not in said
    shutil.rmtree(run)
