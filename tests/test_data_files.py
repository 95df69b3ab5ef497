"""Datasets as they lie on disks: which array is what, which file belongs to which, and that nothing is unpickled."""

import gzip
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch

from pyro_vae.data import load

RANDOM = np.random.default_rng(0)
GREY = RANDOM.integers(0, 256, (40, 28, 28), dtype=np.uint8)
CLASSES = np.arange(40) % 10


def sizes(data):
    return tuple(data.protocol["sizes"].values())


class Trap:
    """Unpickling one leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_dsprites_and_its_pickled_metadata(tmp_path):
    sprites = (RANDOM.random((30, 64, 64)) < 0.2).astype(np.uint8)
    np.savez(
        tmp_path / "a.npz",
        imgs=sprites,
        latents_values=RANDOM.random((30, 6)),
        latents_classes=np.ones((30, 6), int),
        metadata=np.array(Trap(tmp_path / "trapped"), dtype=object),
    )
    with pytest.warns(
        UserWarning, match="left out what is not read: metadata is an object array, which would be unpickled"
    ):
        data = load(tmp_path / "a.npz")
    assert not (tmp_path / "trapped").exists()
    assert data.train.binarization == "threshold" and data.x_shape == (1, 64, 64) and sizes(data) == (24, 3, 3)
    assert sum(part[:].sum() for part in (data.train, data.validation, data.test)) == sprites.sum()
    assert data.protocol["left_out"] == ["latents_classes", "latents_values", "metadata"]


@pytest.mark.parametrize("names", [("train", "val", "test"), ("training", "validation", "testing")])
def test_medmnist(tmp_path, names):
    arrays = {}
    for part, count in zip(names, (40, 10, 12), strict=True):
        arrays |= {
            f"{part}_images": GREY[:1].repeat(count, 0) + np.arange(count, dtype=np.uint8)[:, None, None],
            f"{part}_labels": np.arange(count, dtype=np.uint8)[:, None] % 3,
        }
    np.savez(tmp_path / "a.npz", **arrays)
    data = load(tmp_path / "a.npz")
    for name, part in zip(names, (data.train, data.validation, data.test), strict=True):
        assert np.array_equal(part.pixels[:, 0].numpy(), arrays[f"{name}_images"])
        assert part.labels.tolist() == arrays[f"{name}_labels"][:, 0].tolist()


@pytest.mark.parametrize("arrays, options, chosen", [
    ({"sprites": (9, 4, 4), "table": (9, 5)}, {}, (1, 4, 4)), ({"table": (9, 5), "weights": (9,)}, {}, (5,)),
    ({"X": (9, 5), "y": (9,)}, {}, (5,)), ({"x": (9,), "y": (9,), "frames": (9, 4, 4)}, {}, (1, 4, 4)),
    ({"cats": (9, 5), "dogs": (9, 6)}, {"images": "dogs"}, (6,)), ({"images": (9, 4, 4), "other": (9, 5)}, {"images": "other"}, (5,)),
    ({"train_a": (9, 5), "test_a": (4, 5), "train_b": (9, 6), "test_b": (4, 6)}, {"images": "b"}, (6,)),
    ({"train_a": (9, 5, 2), "test_a": (4, 5, 2), "latest": (9, 2)}, {}, (1, 5, 2)),
])  # fmt: skip
@pytest.mark.filterwarnings("ignore:.* left out. labels are one whole number")  # two of the cases
def test_the_data_are_found_by_name_by_shape_or_as_told(tmp_path, arrays, options, chosen):
    np.savez(tmp_path / "a.npz", **{key: RANDOM.random(shape) for key, shape in arrays.items()})
    data = load(tmp_path / "a.npz", **options)
    assert data.x_shape == chosen and (data.protocol.get("images") == options.get("images"))


def test_labels_as_told(tmp_path):
    rows = np.arange(9, dtype=np.uint8)[:, None].repeat(3, 1)
    np.savez(tmp_path / "a.npz", x=rows, y=np.zeros(9, int), kind=np.arange(9) * 2)
    assert load(tmp_path / "a.npz").train.labels.unique().tolist() == [0]
    data = load(tmp_path / "a.npz", labels="kind")
    assert torch.equal(data.train.labels, data.train.pixels[:, 0].long() * 2) and data.protocol["labels"] == "kind"


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, r"holds the arrays cats, dogs, wanted one named .*Say which by images='cats' \(--images cats\)"),
        ({"images": "apes"}, "got images='apes', wanted the name of one of them"),
        (
            {"images": "cats", "labels": "dogs"},
            r"\['dogs'\]: got labels of which .*; wanted one whole number or name for each datum",
        ),
        (
            {"images": "cats", "background": "black"},
            "got background='black' for .* wanted it for files of pictures only",
        ),
    ],
)
def test_what_cannot_be_told_is_asked(tmp_path, options, message):
    np.savez(tmp_path / "a.npz", cats=np.zeros((5, 7)), dogs=np.zeros((5, 7)))
    with pytest.raises(ValueError, match=message):
        load(tmp_path / "a.npz", **options)


def write_amat(path, rows, form="%d"):
    np.savetxt(path, rows, fmt=form)


@pytest.mark.parametrize("place", ["", "binarized_mnist_train.amat"])
def test_larochelle_binarised(tmp_path, place):
    parts = {
        name: (RANDOM.random((count, 784)) < 0.3).astype(int)
        for name, count in (("train", 12), ("valid", 4), ("test", 5))
    }
    for name, rows in parts.items():
        write_amat(tmp_path / f"binarized_mnist_{name}.amat", rows)
    data = load(tmp_path / place)
    assert data.x_shape == (1, 28, 28) and data.train.binarization == "threshold" and sizes(data) == (12, 4, 5)
    for part, rows in zip((data.train, data.validation, data.test), parts.values(), strict=True):
        assert np.array_equal(part[:].reshape(-1, 784).numpy(), rows)
    assert "binarized_mnist_train.amat" in data.protocol["split"]


def test_larochelle_grey_with_labels_and_vectors(tmp_path):
    rows = np.c_[RANDOM.random((12, 784)), np.arange(12) % 10]
    write_amat(tmp_path / "mnist_train.amat", rows, "%.6f")
    write_amat(tmp_path / "mnist_test.amat", rows[:5], "%.6f")
    data = load(tmp_path)
    assert data.test.labels.tolist() == [0, 1, 2, 3, 4] and data.train.binarization == "none"
    assert np.allclose(data.test[:].reshape(5, 784), rows[:5, :-1], atol=1e-6)
    write_amat(tmp_path / "other.amat", RANDOM.integers(0, 2, (9, 5)))
    assert load(tmp_path / "other.amat").x_shape == (5,)
    with pytest.raises(ValueError, match="is no table of numbers"):
        (tmp_path / "other.amat").write_text("a b c\n")
        load(tmp_path / "other.amat")


@pytest.mark.parametrize("targets", [True, False])
@pytest.mark.parametrize("place", ["", "chardata.mat"])
def test_omniglot(tmp_path, targets, place):
    upright = RANDOM.random((30, 28, 28))
    columns = np.stack([image.ravel(order="F") for image in upright], 1)  # as MATLAB lays an image out
    arrays = {"data": columns[:, :20], "testdata": columns[:, 20:]}
    if targets:
        arrays |= {"target": np.eye(50)[CLASSES[:20]].T, "testtarget": np.eye(50)[CLASSES[20:30]].T}
    scipy.io.savemat(tmp_path / "chardata.mat", arrays)
    data = load(tmp_path / place)
    assert sizes(data) == (18, 2, 10) and data.x_shape == (1, 28, 28)
    assert np.allclose(data.test[:][:, 0], upright[20:])
    assert not targets or data.test.labels.tolist() == CLASSES[20:30].tolist()


def test_svhn(tmp_path):
    images = RANDOM.integers(0, 256, (7, 32, 32, 3), dtype=np.uint8)
    for part, rows in (("train", slice(0, 4)), ("test", slice(4, 7))):
        scipy.io.savemat(
            tmp_path / f"{part}_32x32.mat", {"X": np.moveaxis(images[rows], 0, -1), "y": np.arange(7)[rows, None]}
        )
    data = load(tmp_path)
    assert np.array_equal(data.test.pixels.permute(0, 2, 3, 1).numpy(), images[4:]) and data.test.labels.tolist() == [
        4,
        5,
        6,
    ]


def records(count, labels=1):
    return RANDOM.integers(0, 10, (count, 3072 + labels), dtype=np.uint8)


def test_cifar_ten_binary(tmp_path):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    train, test = records(20), records(6)
    for batch in range(2):
        train[10 * batch : 10 * batch + 10].tofile(folder / f"data_batch_{batch + 1}.bin")
    test.tofile(folder / "test_batch.bin")
    (folder / "batches.meta.txt").write_text("\n".join(f"class{i}" for i in range(10)))
    for place in (folder, tmp_path):
        data = load(place)
        assert sizes(data) == (18, 2, 6) and data.x_shape == (3, 32, 32) and data.label_names[3] == "class3"
        assert np.array_equal(data.test.pixels.reshape(6, -1).numpy(), test[:, 1:])
        assert data.test.labels.tolist() == test[:, 0].tolist() and data.train.dequantize
    assert sizes(load(folder / "data_batch_1.bin")) == (8, 1, 1)
    (folder / "test_batch.bin").write_bytes(test.tobytes()[:-5])
    with pytest.raises(ValueError, match="test_batch.bin has 18433 bytes, wanted a batch of CIFAR-10"):
        load(folder)


def test_cifar_hundred_binary(tmp_path):
    train, test = records(9, labels=2), records(4, labels=2)
    train.tofile(tmp_path / "train.bin")
    test.tofile(tmp_path / "test.bin")
    data = load(tmp_path)
    assert data.test.labels.tolist() == test[:, 1].tolist()
    assert np.array_equal(data.test.pixels.reshape(4, -1).numpy(), test[:, 2:])


@pytest.mark.parametrize("inside", ["", "cifar-10-batches-py"])
def test_cifar_pickles_are_not_read(tmp_path, inside):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "test_batch", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "trapped")))
    with pytest.raises(ValueError, match=r"Python pickles.*cifar-10-binary.tar.gz.*cifar-10-batches-bin.*numpy.savez"):
        load(tmp_path / inside)
    with pytest.raises(ValueError, match="a Python pickle, which can run any code"):
        load(folder / "data_batch_1")
    assert not (tmp_path / "trapped").exists()


def write_idx(path, array, zipped=False):
    raw = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inside", ["KMNIST/raw", "KMNIST", "KMNIST/raw/train-images-idx3-ubyte"])
def test_torchvision_folders_of_idx(tmp_path, zipped, inside):
    end = ".gz" if zipped else ""
    for name, rows in (("train", slice(0, 30)), ("t10k", slice(30, 40))):
        write_idx(tmp_path / "KMNIST/raw" / f"{name}-images-idx3-ubyte{end}", GREY[rows], zipped)
        write_idx(tmp_path / "KMNIST/raw" / f"{name}-labels-idx1-ubyte{end}", CLASSES[rows], zipped)
    data = load(tmp_path / (inside + end if inside.endswith("ubyte") else inside))
    assert sizes(data) == (27, 3, 10) and np.array_equal(data.test.pixels[:, 0].numpy(), GREY[30:])
    assert data.test.labels.tolist() == CLASSES[30:].tolist()


def test_emnist_has_several_sets_in_one_folder(tmp_path):
    for kind, count in (("letters", 20), ("digits", 30)):
        write_idx(tmp_path / f"emnist-{kind}-train-images-idx3-ubyte", GREY[:count])
        write_idx(tmp_path / f"emnist-{kind}-test-images-idx3-ubyte", GREY[:5])
    with pytest.raises(ValueError, match="holds several datasets .*emnist-digits-train.*wanted one. Name its file"):
        load(tmp_path)
    assert sizes(load(tmp_path / "emnist-letters-train-images-idx3-ubyte")) == (18, 2, 5)


@pytest.mark.parametrize(
    "name, remedy",
    [
        ("t.csv", r"numpy.save\('t.npy', pandas.read_csv\('t.csv'\)"),
        ("t.pt", r"torch.load\('t.pt', weights_only=True\)"),
        ("t.h5", r"with h5py.File\('t.h5'\)"),
        ("t.txt", "numpy.loadtxt"),
        ("t.pkl", "a Python pickle"),
        ("t.zip", "Unpack it"),
        ("t.parquet", "pandas.read_parquet"),
        ("t.xyz", "Save arrays with numpy.save"),
    ],
)
def test_other_files_say_what_to_do(tmp_path, name, remedy):
    (tmp_path / name).write_bytes(b"1,2\n3,4\n")
    with pytest.raises(
        ValueError, match=rf"got the file .*{name}, wanted a .npy or .npz file or a folder of images.*{remedy}"
    ):
        load(tmp_path / name)


def test_a_folder_of_arrays_says_what_to_do(tmp_path):
    for number in range(4):
        np.save(tmp_path / f"{number}.npy", RANDOM.random((8, 8)))
    with pytest.raises(ValueError, match=r"holds no images.*It holds 4 files of arrays, such as 0.npy.*numpy.stack"):
        load(tmp_path)
