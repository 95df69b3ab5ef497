"""What a fit says of its steps where it is asked to."""

import re

import pytest
import torch

import pyro_vae as pv
from pyro_vae.inference.capture import Capture
from pyro_vae.inference.explanation import explained


def fitted(**options):
    torch.manual_seed(0)
    vae = pv.VAE.build((1, 8, 8), latent_dim=3, hidden=(16,))
    x = torch.rand(96, 1, 8, 8).round()
    pv.fit(vae.model, vae.guide, x, batch_size=16, seed=0, progress=False, **options)


def test_the_products_are_all_there():
    weight = torch.randn(7, 5)
    x = torch.randn(4, 3, 8, 8)
    kernel = torch.randn(2, 3, 3, 3)

    def function(a, x):
        return [(a @ weight).sum() + torch.nn.functional.conv2d(x, kernel).sum() + torch.bmm(x[:, 0], x[:, 1]).sum()]

    capture = Capture(function, [torch.randn(6, 7), x])
    assert len(capture.choice.products) == 3
    assert capture.choice.operations == 2 * 6 * 7 * 5 + 2 * 4 * 2 * 6 * 6 * 3 * 9 + 2 * 4 * 8 * 8 * 8
    assert all(p.times == 1 and min(p.seconds.values()) > 0 for p in capture.choice.products)


def test_a_fit_says_what_was_captured(monkeypatch, capsys):
    monkeypatch.setenv("PYRO_VAE_EXPLAIN", "1")
    fitted(epochs=90)
    said = capsys.readouterr().err
    assert "explained: 540 steps on" in said
    assert re.search(
        r"a batch of \(16, 1, 8, 8\): \d+ operations recorded, 53\d replays, replayed without a compiler", said
    )
    # Two layers each: forward, and two backward but for the data's.
    assert re.search(r"11 products by (torch's default|oneDNN)", said)
    assert re.search(r"the fastest step: [\d,]+ us, \d+% of it", said)
    assert re.search(r"1 x addmm\(16 float32, 16x64 float32, 64x16 by \(1, 64\) float32\): [\d,]+ us by torch's", said)


@pytest.mark.parametrize("value", ["", "0", None])
def test_nothing_where_nobody_asks(monkeypatch, capsys, value):
    if value is None:
        monkeypatch.delenv("PYRO_VAE_EXPLAIN", raising=False)
    else:
        monkeypatch.setenv("PYRO_VAE_EXPLAIN", value)
    fitted(epochs=1)
    assert "explained" not in capsys.readouterr().err


def test_a_short_fit_says_that_it_ran_as_it_is(monkeypatch, capsys):
    monkeypatch.setenv("PYRO_VAE_EXPLAIN", "1")
    fitted(epochs=1)
    assert "explained: 6 steps by the programs themselves; compile=True captures them." in capsys.readouterr().err
    assert "since none was captured" in explained(pv.Compiled(pv.Objective(pv.elbo)), 5)
