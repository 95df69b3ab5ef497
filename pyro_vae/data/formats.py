"""Files of arrays: NumPy's, MATLAB's, Larochelle's, MNIST's and CIFAR's formats, read as named arrays.

    .npy, .npz                  NumPy, never unpickled; object arrays are left alone
    .mat                        MATLAB up to 7.2; OMNIGLOT's `chardata.mat` and SVHN's files, whose
                                data lie along the last axis, column by column
    .amat                       Larochelle's text, one datum a line: 784 columns are 28x28 images,
                                a 785th is the label; others are vectors
    IDX                         `*train-images-idx3-ubyte` with its labels and test files, gzipped
                                or not: MNIST, FashionMNIST, KMNIST, EMNIST (as torchvision has
                                it: letters lie on their side)
    .bin                        CIFAR-10 and CIFAR-100, the binary version

Nothing here can run code. Of a file whose name says train, those that say validation
or test instead are read with it: `binarized_mnist_train.amat`, `_valid`, `_test`.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pyro_vae.data.labels import PART_NAMES
from pyro_vae.data.limits import check_archive, check_mat
from pyro_vae.data.mnist import read_idx
from pyro_vae.data.room import fits

SIDE = 28
CIFAR = {3073: ("CIFAR-10", 1, "batches.meta.txt"), 3074: ("CIFAR-100", 2, "fine_label_names.txt")}
IDX_IMAGES = re.compile(r"(.*?)(train|t10k|test)([-.].*)?images[-.]idx3[-.]ubyte(\.gz)?", re.IGNORECASE)
# What to do with the files that people have instead, one line of code each.
REMEDIES = {
    (".csv", ".tsv"): "numpy.save('{stem}.npy', pandas.read_csv('{name}').to_numpy('float32'))",
    (".parquet",): "numpy.save('{stem}.npy', pandas.read_parquet('{name}').to_numpy('float32'))",
    (".feather",): "numpy.save('{stem}.npy', pandas.read_feather('{name}').to_numpy('float32'))",
    (".xlsx", ".xls"): "numpy.save('{stem}.npy', pandas.read_excel('{name}').to_numpy('float32'))",
    (".txt", ".dat", ".data"): "numpy.save('{stem}.npy', numpy.loadtxt('{name}'))",
    (".pt", ".pth"): "numpy.save('{stem}.npy', torch.load('{name}', weights_only=True).numpy())",
    (".h5", ".hdf5", ".hdf"): "with h5py.File('{name}') as f: numpy.save('{stem}.npy', f['images'][:])",
    (".h5ad",): "numpy.save('{stem}.npy', anndata.read_h5ad('{name}').X.toarray())",
    (".safetensors",): "numpy.savez('{stem}.npz', **safetensors.numpy.load_file('{name}'))",
    (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"): "unpack it, and name the folder or file in it",
}


_OBJECTS = "an object array, which would be unpickled and could run any code"


class Arrays(NamedTuple):
    """What a file or folder holds: arrays by key, why others were left out, and whether the keys are names in the file.

    And the name of each label, if they have names, and the files, in words.
    """

    arrays: dict[str, np.ndarray]
    left_out: dict[str, str] = {}
    keys: bool = False
    label_names: tuple[str, ...] | None = None
    origin: str = ""


def is_file_of_arrays(path: Path) -> bool:
    """Whether a file is one that `read_arrays` reads, by its name."""
    return path.suffix.lower() in _READERS or IDX_IMAGES.fullmatch(path.name) is not None


def read_arrays(path: Path) -> Arrays:
    """The arrays in a file, with those of the files that belong to it; a ValueError where it is not what it says."""
    if path.stat().st_size == 0:
        numpy_ = path.suffix.lower() in (".npy", ".npz")
        kind = "a NumPy file. Save it again with numpy.save or numpy.savez" if numpy_ else "data. Fetch it again"
        raise ValueError(f"{path} is empty, wanted {kind}.")
    if IDX_IMAGES.fullmatch(path.name):
        return _read_idx(path)
    suffix = path.suffix.lower()
    if suffix in (".amat", ".mat") and (files := _siblings(path)):
        return _together(files, _READERS[suffix])
    return _READERS[suffix](path)


def read_folder_of_arrays(folder: Path) -> Arrays | None:
    """The arrays of a folder in the layout of MNIST, CIFAR, Larochelle or OMNIGLOT, or of the folder that torchvision
    makes around it; None if it has none of them. Several datasets, or pickles, are a ValueError.
    """
    here = _files(folder)  # a folder of 200,000 photographs is listed once
    for files in (here, _files(folder / "raw")):
        if trains := _unzipped_once(
            path for path in files if (m := IDX_IMAGES.fullmatch(path.name)) and m[2].lower() == "train"
        ):
            return read_arrays(_the_one(trains, folder))
    for place in (folder, folder / "cifar-10-batches-bin", folder / "cifar-100-binary"):
        names = {path.name for path in (here if place == folder else _files(place))}
        if {"data_batch_1.bin", "test_batch.bin"} <= names or {"train.bin", "test.bin"} <= names:
            return _read_cifar_folder(place)
    for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-100-python"):
        names = {path.name for path in (here if place == folder else _files(place))}
        if "data_batch_1" in names or {"train", "test", "meta"} <= names:
            raise ValueError(_pickled(place, "meta" in names))
    mats = [path for path in here if path.suffix.lower() in (".amat", ".mat")]
    trains = [path for path in mats if _part_of(path) == "train"] or mats
    return read_arrays(_the_one(trains, folder)) if trains else None


def _read_npy(path: Path) -> Arrays:
    # Whatever a damaged header makes NumPy raise (also out of memory), the file is what is wrong.
    left_out: dict[str, str] = {}
    objects = f"{path} holds {_OBJECTS}; wanted numbers. Save it as uint8 or float32, all rows of one shape."
    try:
        check_archive(path)
        if path.suffix.lower() == ".npy" and not fits(path.stat().st_size):
            return Arrays({"": np.load(path, mmap_mode="r", allow_pickle=False)}, keys=True)
        with path.open("rb") as file:  # which NumPy leaves open where it is no archive
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return Arrays({"": loaded}, keys=True)
            arrays: dict[str, np.ndarray] = {}
            with loaded:
                for key in loaded.files:
                    try:
                        arrays[key] = loaded[key]
                    except ValueError as error:
                        if "Object arrays" not in str(error):
                            raise
                        left_out[key] = _OBJECTS
    except Exception as error:
        if "bomb" in str(error):
            raise
        if "Object arrays" in str(error) or "Python objects" in str(error):
            raise ValueError(objects) from None
        reason = str(error) or type(error).__name__
        if "pickle" in reason:  # what NumPy takes any other file for, with an advice that nobody should follow
            reason = "it does not begin like one"
        raise ValueError(
            f"{path} is truncated or no NumPy file ({reason}), wanted one. Save it again with numpy.save "
            "or numpy.savez."
        ) from error
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError(f"{path} holds files that are no arrays, wanted a .npz file. Save it again with numpy.savez.")
    if left_out and not arrays:
        raise ValueError(objects)
    return Arrays(arrays, left_out, keys=True)


def _read_mat(path: Path) -> Arrays:
    import scipy.io

    check_mat(path)
    try:
        loaded = scipy.io.loadmat(path)
    except NotImplementedError:
        raise ValueError(
            f"{path} is a MATLAB 7.3 file, wanted version 7 or older. Save it with -v7, or convert it: "
            f"with h5py.File('{path.name}') as f: numpy.save('{path.stem}.npy', f['data'][:])"
        ) from None
    except Exception as error:
        raise ValueError(
            f"{path} is truncated or no MATLAB file ({error or type(error).__name__}), wanted one. "
            "Fetch or save it again."
        ) from error
    arrays, left_out = {}, {}
    for key, value in loaded.items():
        if key.startswith("__"):
            continue
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufSU":
            arrays[key] = value
        else:
            left_out[key] = "a cell, structure or sparse matrix"
    return Arrays(_rows_first(arrays), left_out, keys=True)


def _rows_first(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """MATLAB's arrays with the data along the first axis, where it is sure that they lie along the last.

    MATLAB stores columns first, so a column of 784 is an image whose columns follow each other.
    """
    counts = {max(array.shape) for array in arrays.values() if array.ndim == 2 and min(array.shape) == 1}
    counts |= {array.shape[1] for key, array in arrays.items() if array.ndim == 2 and "target" in key.lower()}
    shapes = [arrays[key].shape for key in ("data", "testdata") if key in arrays]
    if len(shapes) == 2 and all(len(shape) == 2 and shape[0] == SIDE * SIDE for shape in shapes):
        counts |= {shape[1] for shape in shapes}  # OMNIGLOT without its targets
    turned = {}
    for key, array in arrays.items():
        last = array.ndim > 1 and array.shape[-1] in counts and array.shape[0] not in counts and min(array.shape) > 1
        if last and array.ndim == 2 and len(array) == SIDE * SIDE:
            turned[key] = array.T.reshape(-1, SIDE, SIDE).transpose(0, 2, 1)
        elif last:
            turned[key] = np.moveaxis(array, -1, 0)
        else:
            turned[key] = array
    return turned


def _read_amat(path: Path) -> Arrays:
    table = _binary_table(path.read_bytes())
    if table is None:
        try:
            table = np.loadtxt(path, dtype=np.float32, ndmin=2)
        except Exception as error:
            raise ValueError(
                f"{path} is no table of numbers ({error}), wanted one datum a line. Fetch it again."
            ) from error
    images, columns = table, table.shape[1]
    if columns == SIDE * SIDE + 1:
        return Arrays({"x": images[:, :-1].reshape(-1, SIDE, SIDE), "y": images[:, -1]})
    return Arrays({"x": images.reshape(-1, SIDE, SIDE) if columns == SIDE * SIDE else images})


def _binary_table(raw: bytes) -> np.ndarray | None:
    """Single digits 0 and 1 in lines of one length, a hundred times as fast as parsing numbers."""
    characters = np.frombuffer(raw, dtype=np.uint8)
    digits = (characters == ord("0")) | (characters == ord("1"))
    blank = (characters == ord(" ")) | (characters == ord("\t")) | (characters == ord("\r"))
    breaks = characters == ord("\n")
    if not bool((digits | blank | breaks).all()) or bool((digits[1:] & digits[:-1]).any()) or not digits.any():
        return None
    seen = digits.cumsum(dtype=np.int64 if len(raw) > 2**31 else np.int32)
    sizes = np.diff(np.concatenate([[0], seen[breaks], seen[-1:]]))
    sizes = sizes[sizes > 0]
    if (sizes != sizes[0]).any():
        return None
    return (characters[digits] - ord("0")).reshape(len(sizes), -1)


def _read_idx(path: Path) -> Arrays:
    match = IDX_IMAGES.fullmatch(path.name)
    assert match is not None
    found = {"x": path}
    for other in ("t10k", "test") if match[2].lower() == "train" else ():
        tests = _unzipped_once(
            p
            for p in _files(path.parent)
            if (m := IDX_IMAGES.fullmatch(p.name)) and (m[1], m[2].lower(), m[3]) == (match[1], other, match[3])
        )
        if tests:
            found = {"x_train": path, "x_test": tests[0]}
            break
    arrays: dict[str, np.ndarray] = {}
    for key, images in found.items():
        arrays[key] = read_idx(images, axes=3).numpy()
        stem = re.sub(r"(?i)images([-.])idx3", r"labels\1idx1", images.name).removesuffix(".gz")
        labels = next((p for p in (images.with_name(stem), images.with_name(stem + ".gz")) if p.is_file()), None)
        if labels is not None:
            arrays[key.replace("x", "y", 1)] = read_idx(labels, axes=1).numpy()
    return Arrays(arrays, origin=", ".join(images.name for images in found.values()))


def _read_bin(path: Path) -> Arrays:
    data = np.fromfile(path, dtype=np.uint8)
    size = next((size for size in CIFAR if len(data) % size == 0), None)
    if size is None:
        raise ValueError(
            f"{path} has {len(data)} bytes, wanted a batch of CIFAR-10 (a multiple of 3073: a label and "
            "3072 levels) or CIFAR-100 (3074). It is truncated or another kind of file; save arrays "
            "with numpy.save."
        )
    records, labels = data.reshape(-1, size), CIFAR[size][1]
    names = path.with_name(CIFAR[size][2])
    words = tuple(names.read_text(errors="replace").split()) if names.is_file() else None
    numbers = records[:, labels - 1]
    return Arrays(
        {"x": records[:, labels:].reshape(-1, 3, 32, 32), "y": numbers},
        label_names=words if words and int(numbers.max()) < len(words) else None,
    )


def _read_cifar_folder(folder: Path) -> Arrays:
    trains = sorted(p for p in _files(folder) if re.fullmatch(r"data_batch_\d+\.bin|train\.bin", p.name))
    tests = [p for p in _files(folder) if p.name in ("test_batch.bin", "test.bin")]
    for path in (*trains, *tests):
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty, wanted a batch of CIFAR. Fetch it again.")
    parts = {"train": [_read_bin(path) for path in trains], "test": [_read_bin(path) for path in tests]}
    arrays = {
        f"{axis}_{part}": np.concatenate([piece.arrays[axis] for piece in pieces])
        for part, pieces in parts.items()
        for axis in ("x", "y")
    }
    return Arrays(
        arrays, label_names=parts["train"][0].label_names, origin=", ".join(path.name for path in (*trains, *tests))
    )


def _pickled(folder: Path, hundred: bool) -> str:
    number, binary = (100, "cifar-100-binary") if hundred else (10, "cifar-10-batches-bin")
    return (
        f"{folder} holds Python pickles, which can run any code when read; wanted the binary version: cifar-{number}-"
        f"binary.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html, unpacked to {binary}. Or convert what you "
        f"trust: a, b = torchvision.datasets.CIFAR{number}(root, True), torchvision.datasets.CIFAR{number}(root, "
        f"False); numpy.savez('cifar{number}.npz', x_train=a.data, y_train=a.targets, x_test=b.data, y_test=b.targets)"
    )


def _part_of(path: Path) -> str | None:
    words = [PART_NAMES[word] for word in re.split(r"[\s_.\-]+", path.stem.lower()) if word in PART_NAMES]
    return words[0] if len(words) == 1 else None


def _siblings(path: Path) -> dict[str, Path]:
    """The files whose names differ in the part only, if this one is the training data and there are others."""

    def rest(other: Path) -> list[str]:
        return [word for word in re.split(r"[\s_.\-]+", other.name.lower()) if word not in PART_NAMES]

    if _part_of(path) != "train":
        return {}
    found: dict[str, Path] = {}
    for other in _files(path.parent):
        part = _part_of(other)
        if part is not None and rest(other) == rest(path):
            if part in found and path not in (found[part], other):
                raise ValueError(f"{found[part]} and {other} are both {part} data, wanted one of them. Move one away.")
            found[part] = path if path in (found.get(part), other) else other
    return found if len(found) > 1 else {}


def _together(files: Mapping[str, Path], read: Callable[[Path], Arrays]) -> Arrays:
    arrays: dict[str, np.ndarray] = {}
    left_out: dict[str, str] = {}
    for part, path in files.items():
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty, wanted data. Fetch it again.")
        one = read(path)
        arrays |= {f"{key}_{part}": array for key, array in one.arrays.items()}
        left_out |= {f"{key}_{part}": reason for key, reason in one.left_out.items()}
    return Arrays(arrays, left_out, origin=", ".join(path.name for path in files.values()))


def _the_one(paths: list[Path], folder: Path) -> Path:
    if len(paths) > 1:
        raise ValueError(
            f"{folder} holds several datasets ({', '.join(path.name for path in paths)}), wanted one. "
            f"Name its file, such as {paths[0]}."
        )
    return paths[0]


def _unzipped_once(paths: Iterable[Path]) -> list[Path]:
    """One path for each name, the file that is unpacked before the one that is gzipped."""
    found: dict[str, Path] = {}
    for path in sorted(paths, key=lambda p: p.name):
        found.setdefault(path.name.removesuffix(".gz"), path)
    return list(found.values())


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")) if folder.is_dir() else []


_READERS: dict[str, Callable[[Path], Arrays]] = {
    ".npy": _read_npy,
    ".npz": _read_npy,
    ".mat": _read_mat,
    ".amat": _read_amat,
    ".bin": _read_bin,
}
