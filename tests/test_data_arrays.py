"""Arrays in files: what their axes and dtypes mean, and one message for each way to be bad."""

import numpy as np
import pytest
import torch

from pyro_vae.data import load
from pyro_vae.data.arrays import as_pixels

RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (120, 5, 4), dtype=np.uint8)
LABELS = np.arange(120, dtype=np.uint8) % 10


@pytest.mark.parametrize(
    "shape, x_shape",
    [
        ((9, 5, 4), (1, 5, 4)),
        ((9, 5, 4, 3), (3, 5, 4)),
        ((9, 5, 4, 1), (1, 5, 4)),
        ((9, 3, 5, 4), (3, 5, 4)),
        ((9, 1, 5, 4), (1, 5, 4)),
        ((9, 3, 5, 3), (3, 5, 3)),
        ((9, 20), (20,)),
    ],
)
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


@pytest.mark.parametrize(
    "array", [IMAGES > 128, (IMAGES > 128).astype(np.uint8), (IMAGES > 128).astype(np.uint8) * 255]
)
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


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"x": np.array([[1], [2, 3]], dtype=object)}, "holds an object array, which would be unpickled"),
        ({"x": np.full((4, 5, 5), np.nan)}, r"\['x'\] holds NaN or infinite values in 4 of 4 rows, first in row 0"),
        ({"x": np.array([[0.0], [1.0], [np.inf]])}, "holds NaN or infinite values in 1 of 3 rows, first in row 2"),
        ({"x": np.full((4, 5, 5), 255.0)}, r"holds float images in \[255, 255\], wanted \[0, 1\]"),
        ({"x": np.zeros((4, 5), dtype=np.complex64)}, "has dtype complex64, wanted uint8 levels 0..255 or floats"),
        ({"x": np.full((4, 5, 5), 256)}, r"has dtype int64 and whole numbers in \[256, 256\], wanted levels 0..255"),
        ({"x": np.full((4, 5), 2**24 + 1)}, "wanted none beyond 16777216, which float32 holds exactly"),
        ({"x": np.full((4, 5), 1e300)}, "holds numbers beyond float32 in 4 of 4 rows, first in row 0"),
        ({"x": np.zeros((4, 5, 6, 6, 7))}, r"has shape \(4, 5, 6, 6, 7\), wanted data.* Reshape it"),
        (
            {"x": np.zeros((5, 9)), "y": np.zeros(9)},
            r"wanted data in rows: \(N, D\) and \(N,\). Save the data transposed",
        ),
        ({"x": np.zeros((4, 5, 6, 7), dtype=np.uint8)}, r"has shape \(4, 5, 6, 7\), wanted images of 1 or 3 channels"),
        ({"x": np.zeros(7)}, r"has shape \(7,\), wanted data"),
        ({"x": np.zeros((0, 7))}, r"has shape \(0, 7\), wanted data"),
        ({"x": np.zeros((2, 7))}, "got 2 images or rows, wanted at least 3"),
        (
            {"cats": np.zeros((5, 7)), "dogs": np.zeros((5, 7))},
            "holds the arrays cats, dogs, wanted one named images or x",
        ),
        ({"x_train": np.zeros((5, 7)), "y_train": np.zeros(5, dtype=int)}, "holds x_train but no test data"),
        ({"x_train": np.zeros((5, 7)), "x_test": np.zeros((5, 6))}, "data of different shape or dtype"),
        ({"x_test": np.zeros((5, 7)), "x_val": np.zeros((5, 7))}, "has the parts .*, wanted train and test"),
        ({"x_train": np.zeros((5, 7)), "x_val": np.zeros((1, 7))}, "got 1 validation datum, wanted at least 2"),
    ],
)
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
    for raw, message in (
        (b"", "is empty, wanted a NumPy file"),
        (whole[:-100], "is truncated or no NumPy file"),
        (b"hello", "is truncated or no NumPy file"),
    ):
        path.write_bytes(raw)
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.mark.parametrize(
    "labels, reason",
    [
        ({"y": np.zeros(4, dtype=int)}, r"\['y'\] left out: .* they have shape \(4,\) for 5 data"),
        ({"y": np.full(5, 0.5)}, "left out: .* they are no whole numbers"),
        ({"y": np.full(5, np.inf)}, "left out: .* some are not finite"),
        ({"labels": np.ones((5, 3))}, "left out: .* are not one 1 among zeros in each row"),
        ({"target": np.zeros(5, dtype="M8[D]")}, "left out: .* their dtype is datetime64"),
        ({"y": np.array(list("abcde"), dtype=object)}, "left out what is not read: y is an object array"),
    ],
)
def test_labels_that_name_no_class_are_left_out_with_a_line(tmp_path, labels, reason):
    np.savez(tmp_path / "a.npz", x=IMAGES[:5], **labels)
    with pytest.warns(UserWarning, match=reason):
        data = load(tmp_path / "a.npz")
    assert data.train.labels is None and len(data.train) == 3
    with pytest.raises(ValueError, match="wanted"):
        load(tmp_path / "a.npz", labels=next(iter(labels)))


def test_labels_of_some_parts_only_are_left_out_with_a_line(tmp_path):
    np.savez(tmp_path / "a.npz", x_train=IMAGES, x_test=IMAGES[:9], y_train=LABELS)
    with pytest.warns(UserWarning, match="left out: .* there are none for test"):
        assert load(tmp_path / "a.npz").train.labels is None


@pytest.mark.parametrize(
    "labels",
    [LABELS, LABELS[:, None], LABELS[None], LABELS.astype(float), np.eye(10)[LABELS], np.eye(10, dtype=bool)[LABELS]],
)
def test_labels_that_mean_class_numbers(tmp_path, labels):
    np.savez(tmp_path / "a.npz", x=np.arange(120, dtype=np.uint8)[:, None].repeat(3, 1), y=labels)
    data = load(tmp_path / "a.npz")
    for part in (data.train, data.validation, data.test):
        assert torch.equal(part.labels, part.pixels[:, 0].long() % 10) and part.labels.dtype == torch.int64


def test_names_as_labels_are_numbered_alike_in_all_parts(tmp_path):
    np.savez(
        tmp_path / "a.npz",
        x_train=IMAGES[:4],
        x_test=IMAGES[:2],
        y_train=np.array(["owl", "ape", "owl", "cat"]),
        y_test=np.array(["cat", "owl"]),
    )
    data = load(tmp_path / "a.npz", seed=1)
    assert data.label_names == ("ape", "cat", "owl") and data.test.labels.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", ">i2", "i4", "u8", "f2", ">f4", "f8", "g"])
@pytest.mark.parametrize("shape", [(12, 5), (12, 5, 4), (12, 5, 4, 3)])
def test_zeros_and_ones_of_any_type_are_binary(tmp_path, dtype, shape):
    ones = RANDOM.random(shape) < 0.5
    np.save(tmp_path / "a.npy", ones.astype(dtype))
    data = load(tmp_path / "a.npy")
    assert data.train.binarization == "threshold" and not data.train.dequantize
    assert sum(part[:].sum() for part in (data.train, data.validation, data.test)) == ones.sum()
    counts = load(tmp_path / "a.npy", binarization="none").train  # the numbers themselves, not levels of 255
    assert counts.pixels.dtype == torch.float32 and counts[:].unique().tolist() == [0, 1]


@pytest.mark.parametrize("dtype", ["u1", "i2", ">u2", "i4", "i8", "u8"])
def test_whole_levels_of_any_integer_type_are_eight_bits(tmp_path, dtype):
    np.save(tmp_path / "a.npy", IMAGES.astype(dtype))
    np.save(tmp_path / "b.npy", IMAGES)
    got, wanted = load(tmp_path / "a.npy"), load(tmp_path / "b.npy")
    assert got.train.dequantize and torch.equal(got.train.pixels, wanted.train.pixels)


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    deep = RANDOM.integers(0, 65536, (120, 5, 4)).astype(np.uint16)
    np.save(tmp_path / "a.npy", deep)
    data = load(tmp_path / "a.npy")
    levels = torch.cat([part[:] for part in (data.train, data.validation, data.test)]).double() * 65535
    assert sorted(levels.round().long().flatten().tolist()) == sorted(deep.flatten().tolist())
    assert data.protocol["levels"] == "v / 65535 of 16 bits" and not data.train.dequantize


def test_all_parts_are_scaled_alike(tmp_path):
    train, test = RANDOM.poisson(0.3, (200, 10)), np.minimum(RANDOM.poisson(0.1, (20, 10)), 1)
    assert train.max() > 1
    for dtype in ("u1", "i8", "f4"):
        np.savez(tmp_path / "a.npz", x_train=train.astype(dtype), x_val=test.astype(dtype), x_test=test.astype(dtype))
        data = load(tmp_path / "a.npz", dequantize=False)
        scale = 1 if dtype == "f4" else 255
        assert np.allclose(data.train[:].numpy() * scale, train) and np.allclose(data.test[:].numpy() * scale, test)
    # Counts beyond a byte are counts, whichever part has them.
    np.savez(tmp_path / "a.npz", x_train=train, x_val=test, x_test=test * 300)
    assert np.array_equal(load(tmp_path / "a.npz").train[:].numpy(), train)


@pytest.mark.parametrize("shape", [(28, 28), (28, 20, 3), (28, 20, 1), (28, 20, 4)])
def test_one_picture_is_no_heap_of_rows(tmp_path, shape):
    np.save(tmp_path / "a.npy", RANDOM.integers(0, 256, shape).astype(np.uint8))
    with pytest.raises(ValueError, match="one picture.*, wanted many: its rows are no data. Stack several"):
        load(tmp_path / "a.npy")
    np.savez(tmp_path / "b.npz", x=RANDOM.random(shape), y=np.zeros(28, dtype=int))
    if len(shape) == 2:  # where labels say how many data there are, they are that many
        assert load(tmp_path / "b.npz").x_shape == (28,)


def test_shapes_that_leave_it_open_are_said(tmp_path):
    np.save(tmp_path / "a.npy", RANDOM.random((30, 40)))
    with pytest.warns(UserWarning, match="is taken for 30 vectors"):
        load(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", RANDOM.random((3, 8, 9)))
    with pytest.warns(UserWarning, match="is taken for 3 grey images"):
        load(tmp_path / "b.npy")
    np.save(tmp_path / "c.npy", RANDOM.random((9, 9, 50)))
    with pytest.raises(ValueError, match=r"images along the last axis, wanted \(N, H, W\)"):
        load(tmp_path / "c.npy")


@pytest.mark.parametrize(
    "shape, remedy",
    [
        ((6, 8, 8, 4), r"drop transparency with a\[..., :3\]"),
        ((6, 4, 8, 8), r"a\[:, :3\]"),
        ((6, 9, 9, 9), r"slices of volumes with a.reshape"),
    ],
)
def test_other_channels_are_refused_with_what_to_do(tmp_path, shape, remedy):
    np.save(tmp_path / "a.npy", RANDOM.random(shape))
    with pytest.raises(ValueError, match=remedy):
        load(tmp_path / "a.npy")
