"""Names, options and the readers of single datasets."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae.data import DATASETS, load

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (("mnits",), {}, "got dataset 'mnits', wanted one of digits, mnist, .*Did you mean 'mnist'"),
        (("fashon_mnist",), {}, "Did you mean 'fashion-mnist'"),
        (("/no/such/folder",), {}, "got dataset '/no/such/folder', wanted one of .* that exists"),
        (("digits",), {"binarization": "dynamc"}, "got binarization 'dynamc', wanted one of .*Did you mean 'dynamic'"),
        (("digits",), {"limit": 0}, "got limit=0, wanted a number of data >= 1"),
        (("digits",), {"crop": 9}, "digits: got crop=9 for an image of 8x8"),
        ((__file__,), {}, "wanted a .npy or .npz file or a folder of images"),
        (("frey", "/nowhere"), {}, "no frey_faces.npz in /nowhere or /nowhere/frey"),
    ],
)
def test_bad_names_and_options(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        load(*arguments, **options)


def test_names_are_complete():
    assert DATASETS == ("digits", "mnist", "fashion-mnist", "frey", "celeba", "linear-gaussian")


@pytest.mark.parametrize("options", [{}, {"image_size": 4}])
def test_limit_keeps_the_first_of_each_split(options):
    full, limited = load("digits", **options), load("digits", limit=200, **options)
    assert [len(p) for p in (limited.train, limited.validation, limited.test)] == [200, 180, 200]
    assert torch.equal(limited.train.pixels, full.train.pixels[:200])
    assert torch.equal(limited.test.labels, full.test.labels[:200])


def test_frey_split_and_errors(tmp_path):
    images = RANDOM.integers(0, 256, (1965, 28, 20), dtype=np.uint8)
    np.savez(tmp_path / "frey_faces.npz", images=images)
    data = load("frey", tmp_path)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [1565, 200, 200] and data.train.dequantize
    everything = torch.cat([p.pixels for p in (data.train, data.validation, data.test)])
    assert sorted(map(bytes, everything.numpy())) == sorted(map(bytes, images))
    np.savez(tmp_path / "frey_faces.npz", images=images[:5])
    with pytest.raises(ValueError, match=r"shape \(5, 28, 20\) and dtype uint8, wanted uint8 \(1965, 28, 20\)"):
        load("frey", tmp_path)
    (tmp_path / "frey_faces.npz").write_bytes(b"junk")
    with pytest.raises(ValueError, match="frey_faces.npz could not be read"):
        load("frey", tmp_path)


REAL = os.environ.get("PYRO_VAE_TEST_DATA", "")


@pytest.mark.skipif(
    not Path(REAL, "mnist").is_dir() or not REAL, reason="PYRO_VAE_TEST_DATA names no folder with mnist"
)
def test_real_mnist():
    data = load("mnist", REAL)
    assert [len(p) for p in (data.train, data.validation, data.test)] == [59_000, 1_000, 10_000]
    assert data.x_shape == (1, 28, 28) and data.test.labels[:5].tolist() == [7, 2, 1, 0, 4]
    assert data.train.mean().mean().item() * 255 == pytest.approx(33.3, abs=0.2)
