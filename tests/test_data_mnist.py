"""IDX files and the folders they lie in: what is read, and one message for each way to be bad."""

import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_vae.data import load, mnist
from pyro_vae.data.mnist import read_idx

IMAGES = np.random.default_rng(0).integers(0, 256, (120, 5, 4), dtype=np.uint8)
LABELS = np.arange(120, dtype=np.uint8) % 10


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_mnist(folder: Path, suffix: str = "", dotted: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, array in zip(mnist.FILES, (IMAGES, LABELS, IMAGES[:30], LABELS[:30]), strict=True):
        raw = idx(array)
        name = name.replace("-idx", ".idx") if dotted else name
        (folder / (name + suffix)).write_bytes(gzip.compress(raw) if suffix else raw)
    return folder


@pytest.fixture
def nowhere(monkeypatch):
    """No system folder, no network."""
    monkeypatch.setattr(mnist, "DEBIAN", {"fashion-mnist": Path("/nowhere")})
    monkeypatch.setattr(mnist, "_download", lambda name, data_dir: "downloading failed (no network)")


def test_idx_round_trip(tmp_path):
    for name, raw in (
        ("plain", idx(IMAGES)),
        ("zipped.gz", gzip.compress(idx(IMAGES))),
        ("unnamed", gzip.compress(idx(IMAGES))),
    ):
        (tmp_path / name).write_bytes(raw)
        assert np.array_equal(read_idx(tmp_path / name, axes=3).numpy(), IMAGES)


@pytest.mark.parametrize(
    "name, raw, message",
    [
        ("f", b"", "f is empty, wanted an IDX file"),
        ("f", idx(IMAGES[:0]), "f is empty: its header says 0x5x4"),
        ("f", idx(IMAGES)[:-1], "f is truncated: its header promises 120x5x4 = 2400 bytes, got 2399"),
        ("f", idx(IMAGES)[:9], "f is truncated: its header has 9 bytes, wanted 16"),
        ("f", idx(IMAGES) + b"!", "f is too long: its header promises 2400 bytes, got 2401"),
        ("f", b"<!doctype html>", "f starts with magic number 3c21646f, wanted 00000803"),
        ("f", b"\0\0\x0d\x03" + bytes(40), "f starts with magic number 00000d03, wanted 00000803"),
        ("f", idx(LABELS), r"f has 1 axes \(labels\), wanted 3 \(images\). Were image and label files swapped"),
        ("f.gz", gzip.compress(idx(IMAGES))[:-40], "f.gz is truncated: the gzip stream breaks off"),
        ("f.gz", gzip.compress(idx(IMAGES))[:30] + b"\xff" * 3000, "f.gz is a corrupt gzip file"),
        ("f.gz", gzip.compress(idx(IMAGES))[:-8] + bytes(8), "f.gz is a corrupt gzip file .*CRC"),
        ("f.gz", idx(IMAGES), "f.gz is a corrupt gzip file .it starts with 0000, wanted 1f8b"),
    ],
)
def test_bad_idx_files(tmp_path, name, raw, message):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=message):
        read_idx(tmp_path / name, axes=3)


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("inside", ["", "mnist", "MNIST/raw"])
def test_mnist_is_found_in_every_layout(tmp_path, nowhere, suffix, dotted, inside):
    write_mnist(tmp_path / inside, suffix, dotted)
    data = load("mnist", tmp_path, binarization="none")
    assert [len(part) for part in (data.train, data.validation, data.test)] == [118, 2, 30]
    both = torch.cat([data.train.pixels, data.validation.pixels])
    assert np.array_equal(both.squeeze(1).numpy(), IMAGES)
    assert data.validation.labels.tolist() == [8, 9]
    assert np.array_equal(data.test.pixels.squeeze(1).numpy(), IMAGES[:30])
    assert data.protocol["source"] == str(tmp_path / inside)


def test_mnist_defaults_and_protocol(tmp_path, nowhere):
    data = load("mnist", write_mnist(tmp_path), limit=7, image_size=8, seed=3)
    assert json.loads(json.dumps(data.protocol)) == {
        "dataset": "mnist",
        "sizes": {"train": 7, "validation": 2, "test": 7},
        "split": "train: the first 118 training images; validation: the last 2 of them; test: the official 30 test images",
        "limit": 7,
        "binarization": "dynamic",
        "dequantize": False,
        "x_shape": [1, 8, 8],
        "image_size": 8,
        "crop": None,
        "channels": None,
        "seed": 3,
        "source": str(tmp_path),
    }
    assert data.train[:].shape == (7, 1, 8, 8) and data.label_names == tuple("0123456789")
    assert data.to("cpu").x_shape == (1, 8, 8)


def test_options_reach_the_splits(tmp_path, nowhere):
    write_mnist(tmp_path)
    assert load("mnist", tmp_path, dequantize=True).test.binarization == "none"
    assert load("mnist", tmp_path, dequantize=True).test.dequantize
    assert load("mnist", tmp_path, binarization="static").test.fixed
    assert not load("mnist", tmp_path, binarization="none").test.dequantize
    with pytest.raises(ValueError, match="got dequantize=True with binarization='static'"):
        load("mnist", tmp_path, binarization="static", dequantize=True)


def test_the_system_folder_is_used_for_fashion_only(tmp_path, monkeypatch, nowhere):
    monkeypatch.setattr(mnist, "DEBIAN", {"fashion-mnist": write_mnist(tmp_path / "system", ".gz")})
    data = load("fashion-mnist", tmp_path / "empty")
    assert data.protocol["source"] == str(tmp_path / "system") and data.label_names[9] == "Ankle boot"
    with pytest.raises(ValueError, match="no mnist in"):
        load("mnist", tmp_path / "empty")


def test_missing_files_are_told_with_folder_and_names(tmp_path, nowhere):
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(b"x")
    with pytest.raises(ValueError) as caught:
        load("fashion-mnist", tmp_path)
    text = str(caught.value)
    assert all(file in text for file in mnist.FILES) and str(tmp_path / "fashion-mnist") in text
    assert "no network" in text and "Only t10k-images-idx3-ubyte lie there now" in text
    with pytest.raises(ValueError, match="downloading was not allowed. Put these four files"):
        load("fashion-mnist", tmp_path, download=False)


def test_a_failing_download_is_no_traceback(tmp_path, monkeypatch, capfd):
    import torchvision

    def fail(root, download):
        print("Failed to download (trying next):")
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets, "MNIST", fail)
    with pytest.raises(ValueError, match=r"downloading failed \(Error downloading .*Put these four files"):
        load("mnist", tmp_path)
    assert capfd.readouterr().out == ""


def test_a_failed_download_leaves_no_empty_folders(tmp_path, monkeypatch):
    import torchvision

    def broken(root, download):
        Path(root, "MNIST", "raw").mkdir(parents=True)
        raise RuntimeError("no network")

    monkeypatch.setattr(torchvision.datasets, "MNIST", broken)
    with pytest.raises(ValueError, match="no network"):
        load("mnist", tmp_path / "some" / "where")
    assert list(tmp_path.iterdir()) == []


def test_a_download_is_used(tmp_path, monkeypatch):
    import torchvision

    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda root, download: write_mnist(Path(root, "MNIST", "raw")))
    assert len(load("mnist", tmp_path).test) == 30


@pytest.mark.parametrize(
    "file, array, message",
    [
        (
            0,
            LABELS,
            "train-images-idx3-ubyte has 1 axes .labels., wanted 3 .images.. Were image and label files swapped",
        ),
        (
            1,
            IMAGES,
            "train-labels-idx1-ubyte has 3 axes .images., wanted 1 .labels.. Were image and label files swapped",
        ),
        (1, LABELS[:-1], "train-images-idx3-ubyte holds 120 images, train-labels-idx1-ubyte 119 labels"),
        (3, LABELS[:30] + 90, "t10k-labels-idx1-ubyte holds label 99, wanted 0..9"),
        (2, IMAGES[:30, :4], r"holds images of \(1, 4, 4\), wanted \(1, 5, 4\)"),
        (3, np.array([9, 2, 1, 1, 6, 1, 4, 6, 5, 7] * 3, dtype=np.uint8), "holds fashion-mnist, wanted mnist"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, nowhere, file, array, message):
    write_mnist(tmp_path)
    (tmp_path / mnist.FILES[file]).write_bytes(idx(array))
    with pytest.raises(ValueError, match=message):
        load("mnist", tmp_path)


def test_the_cache_is_where_it_is_said(monkeypatch, tmp_path, nowhere):
    monkeypatch.setenv("PYRO_VAE_DATA", str(write_mnist(tmp_path / "cache" / "mnist").parent))
    assert load("mnist").protocol["source"] == str(tmp_path / "cache" / "mnist")
