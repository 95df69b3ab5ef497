"""Arrays in files: what their axes and dtypes mean, and one message for each way to be bad."""

import numpy as np
import pytest
import torch

from pyro_vae.data import load
from pyro_vae.data.arrays import as_pixels

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (120, 5, 4), dtype=np.uint8)
LABELS = np.arange(120, dtype=np.uint8) % 10


@pytest.mark.parametrize("shape, x_shape", [
    ((9, 5, 4), (1, 5, 4)), ((9, 5, 4, 3), (3, 5, 4)), ((9, 5, 4, 1), (1, 5, 4)), ((9, 3, 5, 4), (3, 5, 4)),
    ((9, 1, 5, 4), (1, 5, 4)), ((9, 3, 5, 3), (3, 5, 3)), ((9, 20), (20,)),
])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_axes_of_arrays(tmp_path, shape, x_shape, dtype):
    array = RANDOM.integers(0, 256, shape).astype(dtype) / (1 if dtype == np.uint8 else 255)
    np.save(tmp_path / "a.npy", array.astype(dtype))
    data = load(tmp_path / "a.npy")
    assert data.x_shape == x_shape and [len(p) for p in (data.train, data.validation, data.test)] == [7, 1, 1]
    assert data.train.pixels.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    assert data.train.dequantize == (dtype == np.uint8) and data.train.binarization == "none"
    moved = array if len(shape) < 4 or shape[1] in (1, 3) else array.transpose(0, 3, 1, 2)
    everything = torch.cat([p.pixels for p in (data.train, data.validation, data.test)])
    assert everything.double().sum().item() == pytest.approx(moved.astype(np.float64).sum(), rel=1e-5)
    row = as_pixels(array.astype(dtype))[4]
    assert np.allclose(row.numpy().reshape(moved[4].shape), moved[4])


@pytest.mark.parametrize("array", [IMAGES > 128, (IMAGES > 128).astype(np.uint8), (IMAGES > 128).astype(np.uint8) * 255])
def test_binary_arrays_stay_binary(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    data = load(tmp_path / "a.npy")
    assert data.train.binarization == "threshold" and data.train[:].unique().tolist() == [0, 1]
    everything = torch.cat([data.train[:], data.validation[:], data.test[:]])
    assert everything.sum() == (IMAGES > 128).sum()


def test_float_images_can_be_binarised_but_not_vectors_of_any_range(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES / 255)
    assert load(tmp_path / "a.npy", binarization="dynamic").train[:].unique().tolist() == [0, 1]
    np.save(tmp_path / "b.npy", RANDOM.normal(size=(50, 3)))
    assert load(tmp_path / "b.npy").x_shape == (3,)
    with pytest.raises(ValueError, match=r"binarization='static' for float data in \[-.*wanted \[0, 1\]"):
        load(tmp_path / "b.npy", binarization="static")


@pytest.mark.parametrize("keys", [("images", "labels"), ("x", "y"), ("data", "targets")])
def test_npz_with_labels(tmp_path, keys):
    numbered = np.repeat(np.arange(100, dtype=np.uint8)[:, None], 4, 1)
    np.savez(tmp_path / "a.npz", **{keys[0]: numbered, keys[1]: np.arange(100)})
    data = load(tmp_path / "a.npz", seed=2)
    parts = (data.train, data.validation, data.test)
    assert all(torch.equal(part.pixels[:, 0].long(), part.labels) for part in parts)
    assert sorted(torch.cat([part.labels for part in parts]).tolist()) == list(range(100))
    assert not torch.equal(load(tmp_path / "a.npz", seed=3).test.labels, data.test.labels)


@pytest.mark.parametrize("validation", [True, False])
def test_npz_with_its_own_split(tmp_path, validation):
    arrays = {"x_train": IMAGES, "y_train": LABELS, "x_test": IMAGES[:9], "y_test": LABELS[:9]}
    if validation:
        arrays |= {"x_val": IMAGES[:6], "y_val": LABELS[:6]}
    np.savez(tmp_path / "a.npz", **arrays)
    data = load(tmp_path / "a.npz")
    assert [len(p) for p in (data.train, data.validation, data.test)] == ([120, 6, 9] if validation else [108, 12, 9])
    assert np.array_equal(data.test.pixels[:, 0].numpy(), IMAGES[:9])
    assert data.test.labels.tolist() == LABELS[:9].tolist()


@pytest.mark.parametrize("arrays, message", [
    ({"x": np.array([[1], [2, 3]], dtype=object)}, "holds an object array, which would be unpickled"),
    ({"x": np.full((4, 5, 5), np.nan)}, r"\['x'\] holds NaN or infinite values in 4 of 4 rows, first in row 0"),
    ({"x": np.array([[0.0], [1.0], [np.inf]])}, "holds NaN or infinite values in 1 of 3 rows, first in row 2"),
    ({"x": np.full((4, 5, 5), 255.0)}, r"holds float images in \[255, 255\], wanted \[0, 1\]"),
    ({"x": np.zeros((4, 5), dtype=np.int64)}, "has dtype int64, wanted uint8 levels 0..255 or floats"),
    ({"x": np.zeros((4, 5, 6, 7), dtype=np.uint8)}, r"has shape \(4, 5, 6, 7\), wanted images of 1 or 3 channels"),
    ({"x": np.zeros(7)}, r"has shape \(7,\), wanted data"),
    ({"x": np.zeros((0, 7))}, r"has shape \(0, 7\), wanted data"),
    ({"x": np.zeros((2, 7))}, "got 2 images or rows, wanted at least 3"),
    ({"x": np.zeros((5, 7)), "y": np.zeros(4, dtype=int)}, r"\['y'\] has dtype int64 and shape \(4,\), wanted one integer label"),
    ({"x": np.zeros((5, 7)), "y": np.zeros(5)}, r"has dtype float64 and shape \(5,\), wanted one integer label"),
    ({"cats": np.zeros((5, 7)), "dogs": np.zeros((5, 7))}, "holds the arrays cats, dogs, wanted one named images or x"),
    ({"x_train": np.zeros((5, 7)), "y_train": np.zeros(5, dtype=int)}, "holds x_train but no test data"),
    ({"x_train": np.zeros((5, 7)), "x_test": np.zeros((5, 6))}, "data of different shape or dtype"),
    ({"x_train": np.zeros((5, 7)), "x_test": np.zeros((5, 7)), "y_test": np.zeros(5, dtype=int)}, "got labels for test only"),
])
def test_bad_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.npz")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_broken_array_files(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    (np.save if suffix == "npy" else np.savez)(path, IMAGES)
    whole = path.read_bytes()
    assert load(path).x_shape == (1, 5, 4)
    for raw, message in ((b"", "is empty, wanted a NumPy file"), (whole[:-100], "is truncated or no NumPy file"),
                         (b"hello", "is truncated or no NumPy file")):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            load(path)
