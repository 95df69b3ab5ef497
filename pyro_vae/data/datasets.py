"""Datasets by name, by folder or by file, with the protocol that belongs to their numbers.

    digits           1,797 images of 8x8 that come with scikit-learn; dynamic binarization
    mnist            60,000 + 10,000 images of 28x28; dynamic binarization
    fashion-mnist    the same, of clothes; dynamic binarization
    frey             1,965 frames of 28x20 of one face; dequantized
    celeba           202,599 faces, cropped to 148 and scaled to 64; dequantized
    linear-gaussian  24,000 vectors of 20, drawn from a model with exact answers
    a folder         of PNG, JPEG, ... images, of any depth; dequantized. Or the files of MNIST
                     and its like, CIFAR, OMNIGLOT or Larochelle; see `formats`
    a file           .npy, .npz, .mat, .amat, IDX, ...; see `formats`, and `arrays` for what the
                     numbers mean. Or a stack of images, such as a TIFF

A name goes before a folder of the same name: write "./digits" for the folder. Data that
are binary already are read as such ("threshold"); float data are handed on as they are.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pyro_vae.data.arrays import as_pixels, not_readable, read_array, read_array_folder
from pyro_vae.data.binarization import BINARIZATIONS, Binarization
from pyro_vae.data.decoding import Framing, grey_level, suffixes
from pyro_vae.data.formats import is_file_of_arrays
from pyro_vae.data.limits import check_archive
from pyro_vae.data.mnist import read_mnist_like
from pyro_vae.data.photographs import read_celeba, read_folder
from pyro_vae.data.room import joined
from pyro_vae.data.sources import SPLITS, Source, divide
from pyro_vae.data.splits import Dataset, Split, check_numbers
from pyro_vae.data.testbeds import LinearGaussian
from pyro_vae.words import did_you_mean, spelled

DATASETS = ("digits", "mnist", "fashion-mnist", "frey", "celeba", "linear-gaussian")


def load(
    name: str | Path,
    data_dir: str | Path | None = None,
    *,
    binarization: Binarization | None = None,
    dequantize: bool | None = None,
    image_size: int | None = None,
    crop: int | None = None,
    channels: int | None = None,
    background: str | int | None = None,
    images: str | None = None,
    labels: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    download: bool = True,
) -> Dataset:
    """Load a dataset, into memory where it takes no more than a quarter of it: what is larger stays in its file, or
    goes to a temporary one, and the numbers that come of it are the same (`room`; the environment variable
    PYRO_VAE_MEMORY_GB sets another limit).

    Args:
        name: One of `DATASETS`, or the path of a folder of images, or of a file of arrays.
        data_dir: Where the files of a named dataset lie, or are downloaded to;
            $PYRO_VAE_DATA or ~/.cache/pyro_vae if omitted. Not used for paths.
        binarization: "dynamic", "static", "threshold" or "none"; the dataset's own if omitted.
        dequantize: Whether levels get uniform noise; the dataset's own if omitted.
            True by itself means binarization "none".
        image_size: Scale the shorter side to this and crop the longer one. A folder of images of several sizes is
            brought to one, of 64 pixels at most, if neither it nor crop is given, and a line says so.
        crop: Cut out a centred square of this side first.
        channels: 1 to make images grey, 3 to make them colour.
        background: What transparent pixels of picture files lie on: "white", which they do if
            omitted, "black", or a grey level 0..255.
        images: Which array of a file is the data, where its names and shapes leave it open.
        labels: Which array of a file is the labels; of celeba which attribute, "Smiling" if omitted.
        limit: Keep at most this many data of each split, the first ones.
        seed: Of the static binarization, of the split of folders and files, and of the
            weights and draws of "linear-gaussian". The other splits are fixed.
        download: Whether the network may be tried when files are missing.
    Returns:
        Train, validation and test splits with their protocol.
    Raises:
        ValueError: What was got, what is wanted, and what to do. Nothing is ever unpickled.
    Example:
        >>> digits = load("digits")
        >>> len(digits.train), len(digits.validation), len(digits.test), digits.x_shape
        (1257, 180, 360, (1, 8, 8))
        >>> digits.train[:128].unique()
        tensor([0., 1.])
    """
    if binarization is not None:
        binarization = _known(binarization)
    if isinstance(name, str) and not Path(name).expanduser().exists():
        name = spelled(name, DATASETS) or name
    if limit is not None and limit < 1:
        raise ValueError(f"got limit={limit}, wanted a number of data >= 1, or None for all.")
    framing = Framing(crop, image_size, channels, grey_level(background))
    told = {"background": background, "images": images, "labels": labels}
    if isinstance(name, str) and name in DATASETS:
        allowed = {"background": None, "labels": None} if name == "celeba" else {}
        _refuse({**told, **allowed}, name, "or folders of one's own")
    folder = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    source, framing = _read(name, folder, framing, limit, seed, download, told)
    if binarization is None:
        binarization = "none" if dequantize else source.binarization
    if dequantize is None:
        dequantize = source.dequantize and binarization == "none"
    if source.rows is not None and binarization != "none":
        for pixels in {id(each): each for each in source.pixels.values()}.values():
            check_numbers(pixels, str(name), binarization)
    splits = {part: _split(source, part, limit, binarization, dequantize, seed) for part in SPLITS}
    protocol = {
        "dataset": str(name),
        "sizes": {part: len(splits[part]) for part in SPLITS},
        "split": source.split,
        "limit": limit,
        "binarization": binarization,
        "dequantize": dequantize,
        "x_shape": list(splits["train"].x_shape),
        "image_size": framing.image_size,
        "crop": framing.crop,
        "channels": framing.channels,
        "seed": seed,
        "source": source.origin,
        **source.notes,
    }
    return Dataset(str(name), **splits, protocol=protocol, label_names=source.label_names, testbed=source.testbed)


def default_data_dir() -> Path:
    """$PYRO_VAE_DATA, or ~/.cache/pyro_vae."""
    return Path(os.environ.get("PYRO_VAE_DATA") or Path("~", ".cache", "pyro_vae")).expanduser()


def _known(binarization: str) -> Binarization:
    """The binarization of that name, however it is spelled."""
    known = spelled(str(binarization), BINARIZATIONS)
    if known is None:
        raise ValueError(
            f"got binarization {binarization!r}, wanted one of {', '.join(BINARIZATIONS)}."
            + did_you_mean(str(binarization), BINARIZATIONS)
        )
    return known  # type: ignore[return-value]


def _split(
    source: Source, part: str, limit: int | None, binarization: Binarization, dequantize: bool, seed: int
) -> Split:
    """One part of a source, as it is looked at."""
    read = source.part(part, limit)
    if source.zeros_and_ones and binarization == "none" and not dequantize:
        # The numbers 0 and 1 themselves, also to a likelihood of counts.
        read = Split(joined((few.to(torch.float32) / 255 for few in read.pieces()), len(read)))
    classes = None if source.labels is None else source.labels[part][:limit]
    return Split(
        read.pixels, classes, name=part, binarization=binarization, dequantize=dequantize, seed=seed, rows=read.rows
    )


def _read(
    name: str | Path,
    folder: Path,
    framing: Framing,
    limit: int | None,
    seed: int,
    download: bool,
    told: Mapping[str, Any],
) -> tuple[Source, Framing]:
    """The source with its frames applied, and the framing that was applied."""
    if name == "celeba":
        framing = replace(framing, crop=framing.crop or 148, image_size=framing.image_size or 64)
        return read_celeba(folder, framing, limit, told["labels"]), framing
    readers: dict[str, Callable[[], Source]] = {
        "digits": _digits,
        "mnist": lambda: read_mnist_like("mnist", folder, download),
        "fashion-mnist": lambda: read_mnist_like("fashion-mnist", folder, download),
        "frey": lambda: _frey(folder),
        "linear-gaussian": lambda: _linear_gaussian(seed),
    }
    if isinstance(name, str) and name in readers:
        source = readers[name]()
    else:
        path = Path(name).expanduser()
        keys = {option: told[option] for option in ("images", "labels")}
        found = read_array_folder(path, seed, **keys) if path.is_dir() else None
        if found is None and (path.is_dir() or path.is_file() and path.suffix.lower() in suffixes()):
            _refuse(keys, f"{path}, which has pictures", "of several arrays")
            return read_folder(path, framing, limit, seed), framing
        if found is None and not path.is_file():
            raise ValueError(
                f"got dataset {str(name)!r}, wanted one of {', '.join(DATASETS)}, or the path of a folder "
                "of images or of a .npy or .npz file that exists." + did_you_mean(str(name), DATASETS)
            )
        if found is None and not is_file_of_arrays(path):
            raise ValueError(
                f"got the file {path}, wanted a .npy or .npz file or a folder of images. " + not_readable(path)
            )
        _refuse({"background": told["background"]}, f"{path}, which has no transparency", "of pictures")
        source = found or read_array(path, seed, **keys)
    if not framing.is_identity:
        # The limit goes first, so that nothing is scaled in vain.
        framed = {}
        for part in SPLITS:
            read = source.part(part, limit)
            framed[part] = joined((framing(few, name=str(name)) for few in read.pieces()), len(read))
        source = replace(source, pixels=framed, rows=None)
    return source, framing


def _refuse(told: Mapping[str, Any], what: str, wanted: str) -> None:
    for option, value in told.items():
        if value is not None:
            raise ValueError(f"got {option}={value!r} for {what}, wanted it for files {wanted} only. Leave it out.")


def _digits() -> Source:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The levels are 0..16; 255 / 16 of them, rounded, keeps both ends exact.
    levels = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(bunch.target.astype(np.int64))
    parts = divide(len(levels), (1257, 180, 360), seed=0, labels=labels)
    return Source(
        pixels={name: levels[rows] for name, rows in parts.items()},
        labels={name: labels[rows] for name, rows in parts.items()},
        label_names=tuple("0123456789"),
        origin="scikit-learn load_digits",
        binarization="dynamic",
        split="pyro_vae digits split: 1257/180/360, stratified by label, the same for every seed",
    )


def _frey(folder: Path) -> Source:
    path = next(
        (place / "frey_faces.npz" for place in (folder, folder / "frey") if (place / "frey_faces.npz").is_file()), None
    )
    if path is None:
        raise ValueError(
            f"no frey_faces.npz in {folder} or {folder / 'frey'}, wanted it with the key images: "
            "uint8 (1965, 28, 20). Put it there or pass data_dir=."
        )
    try:
        check_archive(path)
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            images = arrays["images"]
    except Exception as error:
        raise ValueError(
            f"{path} could not be read ({error}), wanted a .npz file with the key images. Fetch it again."
        ) from error
    if images.shape != (1965, 28, 20) or images.dtype != np.uint8:
        raise ValueError(
            f"{path} holds images of shape {images.shape} and dtype {images.dtype}, wanted uint8 "
            "(1965, 28, 20). Load other arrays by their path."
        )
    pixels = as_pixels(images, str(path))
    parts = divide(len(pixels), (1565, 200, 200), seed=0)
    return Source(
        pixels={name: pixels[rows] for name, rows in parts.items()},
        origin=str(path),
        dequantize=True,
        split="pyro_vae frey split: 1565/200/200 frames at random, the same for every seed",
    )


def _linear_gaussian(seed: int) -> Source:
    testbed = LinearGaussian.random(x_dim=20, latent_dim=4, scale=0.5, seed=seed)
    sizes = (20_000, 2_000, 2_000)
    _, x = testbed.sample(sum(sizes), torch.Generator().manual_seed(seed + 1))
    return Source(
        pixels=dict(zip(SPLITS, x.split(sizes), strict=True)),
        testbed=testbed,
        origin=f"drawn from {testbed!r}",
        split="independent draws, 20000/2000/2000",
    )
