"""MNIST and Fashion-MNIST, and the IDX format of their files and their descendants, gzipped or not.

A file is a magic number (two zero bytes, a type byte that is 0x08 for unsigned bytes,
the number of axes), one big-endian 32-bit size per axis, then the bytes. A reader that
trusts the header hands over noise when a download broke off, so this one trusts nothing.

MNIST and Fashion-MNIST: four IDX files, looked for wherever they usually lie.

Both datasets give their files the same names, so a folder of one is easily read as the
other; the first test labels tell them apart.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import socket
import struct
import textwrap
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.limits import gunzip
from pyro_vae.data.sources import Source

KINDS = {1: "labels", 3: "images"}


def read_idx(path: str | Path, axes: int) -> Tensor:
    """The unsigned bytes in an IDX file, gzipped or not, of the shape in its header: 3 axes for images, 1 for labels.

    A file that is empty, cut short, too long, corrupt, of something else or of other axes is a ValueError.
    """
    raw = _read_bytes(Path(path), 4 + 4 * axes)
    if not raw:
        raise ValueError(f"{path} is empty, wanted an IDX file. Fetch it again.")
    if len(raw) < 4 or raw[:3] != b"\0\0\x08":
        raise ValueError(
            f"{path} starts with magic number {raw[:4].hex() or 'nothing'}, wanted {0x800 + axes:08x} "
            f"(IDX, unsigned bytes, {axes} axes). It is another kind of file; fetch it again."
        )
    if raw[3] != axes:
        raise ValueError(
            f"{path} has {raw[3]} axes ({KINDS.get(raw[3], 'neither images nor labels')}), wanted {axes} "
            f"({KINDS.get(axes, 'data')}). Were image and label files swapped?"
        )
    start = 4 + 4 * axes
    if len(raw) < start:
        raise ValueError(f"{path} is truncated: its header has {len(raw)} bytes, wanted {start}. Fetch it again.")
    shape = struct.unpack(f">{axes}I", raw[4:start])
    size = math.prod(shape)
    if len(raw) - start < size:
        raise ValueError(
            f"{path} is truncated: its header promises {'x'.join(map(str, shape))} = {size} bytes, "
            f"got {len(raw) - start}. Fetch it again."
        )
    if len(raw) - start > size:
        raise ValueError(
            f"{path} is too long: its header promises {size} bytes, got {len(raw) - start}. Fetch it again."
        )
    if size == 0:
        raise ValueError(f"{path} is empty: its header says {'x'.join(map(str, shape))}, wanted at least one item.")
    return torch.from_numpy(np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape).copy())


def _read_bytes(path: Path, begins: int) -> bytes:
    with path.open("rb") as file:
        first = file.read(2)
        if first != b"\x1f\x8b":
            if path.suffix == ".gz" and first:
                raise ValueError(
                    f"{path} is a corrupt gzip file (it starts with {first.hex()}, wanted 1f8b). Fetch it again."
                )
            return first + file.read()
    try:
        return gunzip(path, begins)
    except EOFError:
        size = path.stat().st_size
        raise ValueError(
            f"{path} is truncated: the gzip stream breaks off after {size} bytes. Fetch it again."
        ) from None
    except (OSError, zlib.error) as error:
        raise ValueError(f"{path} is a corrupt gzip file ({error}). Fetch it again.") from None


FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
DEBIAN = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}
TORCHVISION = {"mnist": "MNIST", "fashion-mnist": "FashionMNIST"}
LABEL_NAMES = {
    "mnist": tuple("0123456789"),
    "fashion-mnist": tuple("T-shirt/top,Trouser,Pullover,Dress,Coat,Sandal,Shirt,Sneaker,Bag,Ankle boot".split(",")),
}
FIRST_TEST_LABELS = {"mnist": [7, 2, 1, 0, 4, 1, 4, 9, 5, 9], "fashion-mnist": [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]}


def read_mnist_like(name: str, data_dir: Path, download: bool = True) -> Source:
    """MNIST or Fashion-MNIST: the last training images validate, the official test set tests.

    Looked for in data_dir (the four files themselves, or torchvision's `MNIST/raw`), then, for Fashion-MNIST, where
    Debian's package puts it, then on the network. A sixtieth (1,000 of 60,000) validates.
    """
    folder = _find(name, data_dir)
    if folder is None and download:
        reason = _download(name, data_dir)
        folder = _find(name, data_dir)
    else:
        reason = "downloading was not allowed"
    if folder is None:
        raise ValueError(_missing(name, data_dir, reason))
    found = _files_in(folder)
    assert found is not None
    train, train_labels = _read_pair(found[0], found[1])
    test, test_labels = _read_pair(found[2], found[3])
    if test.shape[1:] != train.shape[1:]:
        raise ValueError(
            f"{found[2]} holds images of {tuple(test.shape[1:])}, wanted {tuple(train.shape[1:])} "
            "as in the training images. The files are of different datasets."
        )
    for other, first in FIRST_TEST_LABELS.items():
        if other != name and test_labels[: len(first)].tolist() == first:
            raise ValueError(
                f"{folder} holds {other}, wanted {name}: their files bear the same names. "
                f"Pass data_dir=, a folder with the files of {name}."
            )
    last = max(1, len(train) // 60)
    if len(train) <= last:
        raise ValueError(f"{found[0]} holds {len(train)} images, wanted more than the {last} set aside for validation.")
    return Source(
        pixels={"train": train[:-last], "validation": train[-last:], "test": test},
        labels={"train": train_labels[:-last], "validation": train_labels[-last:], "test": test_labels},
        label_names=LABEL_NAMES[name],
        origin=str(folder),
        binarization="dynamic",
        split=f"train: the first {len(train) - last} training images; validation: the last {last} of them; "
        f"test: the official {len(test)} test images",
    )


def _read_pair(images_path: Path, labels_path: Path) -> tuple[Tensor, Tensor]:
    images, labels = read_idx(images_path, axes=3), read_idx(labels_path, axes=1)
    if len(images) != len(labels):
        raise ValueError(
            f"{images_path.name} holds {len(images)} images, {labels_path.name} {len(labels)} labels; "
            f"wanted as many of each. The files in {images_path.parent} do not belong together."
        )
    if labels.max() > 9:
        raise ValueError(f"{labels_path} holds label {int(labels.max())}, wanted 0..9. It is not of this dataset.")
    return images.unsqueeze(1), labels.long()


def _spelled(folder: Path, name: str) -> Path | None:
    """A file of MNIST under one of the names that it goes by."""
    paths = [folder / (stem + suffix) for stem in (name, name.replace("-idx", ".idx")) for suffix in ("", ".gz")]
    return next((path for path in paths if path.is_file()), None)


def _files_in(folder: Path) -> list[Path] | None:
    found = [path for name in FILES if (path := _spelled(folder, name)) is not None]
    return found if len(found) == len(FILES) else None


def _find(name: str, data_dir: Path) -> Path | None:
    # Files lying in data_dir itself bear no dataset's name: MNIST's and Fashion-MNIST's are called alike.
    folders = [data_dir / Path(TORCHVISION[name], "raw"), data_dir / name, data_dir]
    if name in DEBIAN:
        folders.append(DEBIAN[name])
    return next((folder for folder in folders if _files_in(folder)), None)


def _download(name: str, data_dir: Path) -> str:
    """Fetch through torchvision; why it failed, in words, or an empty string."""
    import torchvision

    patience = socket.getdefaulttimeout()
    raw = data_dir / TORCHVISION[name] / "raw"
    made = [folder for folder in (raw, *raw.parents) if not folder.exists()]
    try:
        socket.setdefaulttimeout(10.0)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            getattr(torchvision.datasets, TORCHVISION[name])(str(data_dir), download=True)
    except (OSError, RuntimeError) as error:
        for folder in made:
            with contextlib.suppress(OSError):  # not there, or not empty: then it is not ours to remove
                folder.rmdir()
        return f"downloading failed ({textwrap.shorten(str(error), 200, placeholder=' ...')})"
    finally:
        socket.setdefaulttimeout(patience)
    return ""


def _missing(name: str, data_dir: Path, reason: str) -> str:
    also = f" or {DEBIAN[name]} (Debian package dataset-fashion-mnist)" if name in DEBIAN else ""
    here = [file for file in FILES if _spelled(data_dir, file)]
    partly = f" Only {', '.join(here)} lie there now." if here else ""
    return (
        f"no {name} in {data_dir}{also}, and {reason}. Put these four files, gzipped (.gz) or not, "
        f"into {os.path.join(data_dir, name)}: {', '.join(FILES)}; "
        f"or pass data_dir=, a folder that has them.{partly}"
    )
