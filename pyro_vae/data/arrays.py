"""Images and vectors in .npy and .npz files.

What an array means follows from its dtype and its axes alone:

    uint8   (N, H, W)                   grey images
            (N, C, H, W), (N, H, W, C)  images; the axis of length 1 or 3 is the channels,
                                        and the first of the two where both are
            (N, D)                      flat images, left as vectors
            only 0 and 1, or 0 and 255  binary already, on any axes
    bool    as uint8                    binary
    float   three or four axes          images in [0, 1], continuous
            (N, D)                      continuous vectors of any range
"""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.sources import SPLITS, Source, divide, shuffled, tenths

__all__ = ["as_pixels", "read_array"]

IMAGE_KEYS = ("images", "x", "data", "pixels")
LABEL_KEYS = ("labels", "y", "targets")
PART_KEYS = {"train": ("train",), "validation": ("validation", "valid", "val"), "test": ("test",)}


def as_pixels(array: np.ndarray, name: str = "array") -> Tensor:
    """An array as data: uint8 levels or float32, channels first.

    Args:
        array: See the table at the top of this module.
        name: For messages.
    Returns:
        (N, C, H, W) or (N, D). Binary arrays come as levels 0 and 255.
    Example:
        >>> as_pixels(np.zeros((5, 28, 20, 3), dtype=np.uint8)).shape
        torch.Size([5, 3, 28, 20])
    """
    if array.dtype == np.bool_:
        array = array.astype(np.uint8)
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise ValueError(f"{name} has dtype {array.dtype}, wanted uint8 levels 0..255 or floats. "
                         "Save levels with .astype(numpy.uint8), other numbers with .astype(numpy.float32).")
    if array.ndim not in (2, 3, 4) or array.size == 0:
        raise ValueError(f"{name} has shape {array.shape}, wanted data: "
                         "(N, H, W), (N, C, H, W), (N, H, W, C) or (N, D), none of them 0.")
    if array.ndim == 3:
        array = array[:, None]
    elif array.ndim == 4 and array.shape[1] not in (1, 3):
        if array.shape[3] not in (1, 3):
            raise ValueError(f"{name} has shape {array.shape}, wanted images of 1 or 3 channels: "
                             "(N, C, H, W) or (N, H, W, C). Drop or merge channels.")
        array = array.transpose(0, 3, 1, 2)
    if array.dtype == np.uint8:
        pixels = torch.from_numpy(np.ascontiguousarray(array))
        return pixels * 255 if pixels.max() == 1 else pixels
    pixels = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    bad = ~torch.isfinite(pixels).flatten(1).all(1)
    if bad.any():
        raise ValueError(f"{name} holds NaN or infinite values in {int(bad.sum())} of {len(bad)} rows, first in row "
                         f"{int(bad.nonzero()[0])}; wanted finite numbers. Remove or impute them.")
    if array.ndim == 4 and (pixels.min() < 0 or pixels.max() > 1):
        raise ValueError(f"{name} holds float images in [{pixels.min():.4g}, {pixels.max():.4g}], wanted [0, 1]. "
                         "Rescale them, save levels 0..255 as uint8, or flatten to (N, D) vectors of any range.")
    return pixels


def read_array(path: Path, seed: int = 0) -> Source:
    """The data in a .npy file, or in a .npz file under one of the usual names.

    A .npz file holds `x_train` and `x_test` (and `x_validation`, `y_train`, ...), which are
    the split, or `images`, `x`, `data`, `pixels` (with `labels`, `y`, `targets`), or
    one array of any name. One heap of data is split 80/10/10 in an order fixed by the seed.

    Args:
        path: The file; it is read without unpickling.
        seed: Of the split.
    """
    arrays = _load(path)
    if "train" in {key.removeprefix("x_") for key in arrays} and len(arrays) > 1:
        return _given_parts(path, arrays, seed)
    x_key = _first_key(arrays, IMAGE_KEYS) or (next(iter(arrays)) if len(arrays) == 1 else None)
    if x_key is None:
        raise ValueError(f"{path} holds the arrays {', '.join(arrays) or 'none'}, wanted one named "
                         f"{' or '.join(IMAGE_KEYS)} (with labels or y), or x_train and x_test. "
                         "Rename them with numpy.savez.")
    pixels = as_pixels(arrays[x_key], _named(path, x_key))
    y_key = _first_key(arrays, LABEL_KEYS)
    labels = None if y_key is None else _as_labels(arrays[y_key], len(pixels), _named(path, y_key))
    parts = divide(len(pixels), tenths(len(pixels), str(path)), seed)
    how = f"80/10/10 of the rows in the order of shuffled({len(pixels)}, seed={seed})"
    return _source(path, {name: pixels[rows] for name, rows in parts.items()},
                   None if labels is None else {name: labels[rows] for name, rows in parts.items()}, how)


def _load(path: Path) -> dict[str, np.ndarray]:
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty, wanted a NumPy file. Save it again with numpy.save or numpy.savez.")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return {"": loaded}
        with loaded:
            return {key: loaded[key] for key in loaded.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        if "Object arrays" in str(error):
            raise ValueError(f"{path} holds an object array, which would be unpickled and could run any code; "
                             "wanted numbers. Save it as uint8 or float32, all rows of one shape.") from None
        raise ValueError(f"{path} is truncated or no NumPy file ({error}). Save it again with numpy.save "
                         "or numpy.savez.") from error


def _given_parts(path: Path, arrays: Mapping[str, np.ndarray], seed: int) -> Source:
    keys = {part: _first_key(arrays, tuple(f"x_{name}" for name in names) + names) for part, names in PART_KEYS.items()}
    if keys["test"] is None:
        raise ValueError(f"{path} holds {keys['train']} but no test data (its arrays: {', '.join(arrays)}), "
                         "wanted x_test beside it. Add it, or name the one array x to have it split.")
    pixels, labels = {}, {}
    for part, key in keys.items():
        if key is None:
            continue
        pixels[part] = as_pixels(arrays[key], _named(path, key))
        y_key = _first_key(arrays, tuple(f"y_{name}" for name in PART_KEYS[part]))
        if y_key is not None:
            labels[part] = _as_labels(arrays[y_key], len(pixels[part]), _named(path, y_key))
    if len({(data.shape[1:], data.dtype) for data in pixels.values()}) > 1:
        got = ", ".join(f"{part} {tuple(data.shape[1:])} {data.dtype}" for part, data in pixels.items())
        raise ValueError(f"{path}: data of different shape or dtype ({got}), wanted the same in every part.")
    if labels and len(labels) != len(pixels):
        raise ValueError(f"{path}: got labels for {', '.join(labels)} only, wanted them for {', '.join(pixels)}. "
                         "Add or remove some.")
    how = f"the arrays {', '.join(key for key in keys.values() if key)}"
    if "validation" not in pixels:
        held_out = max(1, len(pixels["train"]) // 10)
        if held_out >= len(pixels["train"]):
            raise ValueError(f"{path}: got {len(pixels['train'])} training data, wanted at least 2. Add data.")
        order = shuffled(len(pixels["train"]), seed)
        how += f"; validation: {held_out} of train, chosen with seed {seed}"
        for data in (pixels, labels):
            if data:
                data["train"], data["validation"] = data["train"][order[:-held_out]], data["train"][order[-held_out:]]
    return _source(path, pixels, labels or None, how)


def _source(path: Path, pixels: Mapping[str, Tensor], labels: Mapping[str, Tensor] | None, how: str) -> Source:
    levels = all(data.dtype == torch.uint8 for data in pixels.values())
    binary = levels and all(bool(((data == 0) | (data == 255)).all()) for data in pixels.values())
    return Source(pixels={name: pixels[name] for name in SPLITS}, labels=labels, origin=str(path), split=how,
                  binarization="threshold" if binary else "none", dequantize=levels and not binary)


def _as_labels(array: np.ndarray, count: int, name: str) -> Tensor:
    if array.dtype.kind not in "iub" or array.shape not in ((count,), (count, 1)):
        raise ValueError(f"{name} has dtype {array.dtype} and shape {array.shape}, wanted one integer label "
                         f"for each of {count} data: ({count},).")
    return torch.from_numpy(array.reshape(count).astype(np.int64))


def _first_key(arrays: Mapping[str, np.ndarray], wanted: tuple[str, ...]) -> str | None:
    return next((key for key in wanted if key in arrays), None)


def _named(path: Path, key: str) -> str:
    return f"{path}[{key!r}]" if key else str(path)
