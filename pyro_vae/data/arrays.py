"""What the numbers of an array mean as data.

It follows from the axes and the values alone, and is settled for all parts of a dataset
together, so that train, validation and test are always on one scale:

    axes    (N, H, W)                    grey images
            (N, C, H, W), (N, H, W, C)   images; the axis of length 1 or 3 is the channels,
                                         and the first of the two where both are
            (N, D)                       vectors
    values  only 0 and 1, of any type    binary; so are the integers 0 and 255
            whole levels 0..255, of any  8 bits: x = v / 255 or (v + u) / 256; a likelihood
              integer type               of counts sees the v
            uint16 images                16 bits: x = v / 65535, continuous
            other integer vectors        counts or numbers, as they are
            float images                 in [0, 1], continuous
            float vectors                continuous, as they are

Byte order and memory order do not matter; everything ends as uint8 or float32.
"""

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["Pixels", "as_pixels", "as_parts", "one_picture", "only"]

EXACT = 2**24  # float32 holds all integers up to here


@dataclass(frozen=True, eq=False)
class Pixels:
    """Arrays as data, all parts by one rule.

    Attributes:
        parts: uint8 levels or float32 numbers, (N, C, H, W) or (N, D).
        binary: Whether there are only two values; they are the levels 0 and 255.
        zeros_and_ones: Whether these were 0 and 1 in the arrays.
        notes: What the protocol should say of the scale.
    """

    parts: dict[str, Tensor]
    binary: bool
    zeros_and_ones: bool
    notes: dict[str, Any]


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
    return as_parts({"": array}, {"": name}, name).parts[""]


def as_parts(arrays: Mapping[str, np.ndarray], names: Mapping[str, str], where: str) -> Pixels:
    """All parts of a dataset as data on one scale.

    Args:
        arrays: One for each part; see the table at the top of this module.
        names: Name of each for messages.
        where: The file, for messages about several.
    Raises:
        ValueError: Not numbers, no data, images of other than 1 or 3 channels, parts of
            different kinds, or numbers whose scale nobody can know.
    """
    arrays = {part: _channels_first(array, names[part]) for part, array in arrays.items()}
    floats = {array.dtype.kind == "f" for array in arrays.values()}
    binary = all(only(array, 0, 1) for array in arrays.values())
    if len({array.shape[1:] for array in arrays.values()}) > 1 or len(floats) > 1 and not binary:
        got = ", ".join(f"{part} {array.shape[1:]} {array.dtype}" for part, array in arrays.items())
        raise ValueError(f"{where}: data of different shape or dtype ({got}), wanted the same in every part.")
    if binary:
        levels = {part: torch.from_numpy(np.ascontiguousarray(array, np.uint8)) * 255 for part, array in arrays.items()}
        return Pixels(levels, True, True, {})
    return _floats(arrays, names) if True in floats else _integers(arrays, names)


def only(array: np.ndarray, low: int, high: int) -> bool:
    """Whether an array holds no other values than these two.

    Example:
        >>> only(np.array([[True, False]]), 0, 1), only(np.array([0.0, 0.5]), 0, 1)
        (True, False)
    """
    return all(bool(((block == low) | (block == high)).all()) for block in _blocks(array))


def one_picture(shape: tuple[int, ...], name: str) -> str:
    """Refuse an array that is one picture, of which the rows would pass for data.

    Args:
        shape: Of an array that nothing else (labels, other parts) says the number of data of.
        name: For the message.
    Returns:
        A line of doubt where the shape leaves it open, else an empty string.
    Raises:
        ValueError: It is one picture, or images along the last axis.
    """
    remedy = ("Stack several with numpy.stack to (N, H, W) or (N, H, W, C); for data that have this shape all the "
              "same, save labels beside them as y, one for each.")
    if len(shape) == 2 and 8 <= shape[0] == shape[1]:
        raise ValueError(f"{name} has shape {shape}, one picture, wanted many: its rows are no data. {remedy}")
    if len(shape) == 3 and (shape[2] in (1, 3) or shape[2] == 4 and min(shape) == 4 and sorted(shape)[1] >= 8):
        raise ValueError(f"{name} has shape {shape}, one picture (H, W, C), wanted many: its rows are no data. "
                         + remedy)
    if len(shape) == 3 and 8 <= shape[0] == shape[1] and shape[2] >= 4 * shape[0]:
        raise ValueError(f"{name} has shape {shape}, images along the last axis, wanted (N, H, W). "
                         "Save it as numpy.moveaxis(a, -1, 0).")
    if len(shape) == 2 and min(shape) >= 16 and max(shape) <= 2 * min(shape):
        return (f"{name} of shape {shape} is taken for {shape[0]} vectors; one picture would be no data: stack several "
                "to (N, H, W).")
    if len(shape) == 3 and shape[0] == 3:
        return (f"{name} of shape {shape} is taken for 3 grey images; a colour picture would be (1, 3, H, W): stack "
                "several to (N, 3, H, W).")
    return ""


def _channels_first(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} has dtype {array.dtype}, wanted uint8 levels 0..255 or floats. "
                         "Save levels with .astype(numpy.uint8), other numbers with .astype(numpy.float32).")
    if array.ndim not in (2, 3, 4) or array.size == 0:
        remedy = " Reshape it, such as by a.reshape(len(a), -1)." if array.ndim == 1 or array.ndim > 4 else ""
        raise ValueError(f"{name} has shape {array.shape}, wanted data: "
                         f"(N, H, W), (N, C, H, W), (N, H, W, C) or (N, D), none of them 0.{remedy}")
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 2 or array.shape[1] in (1, 3):
        return array
    if array.shape[3] in (1, 3):
        return array.transpose(0, 3, 1, 2)
    remedy = ("Keep the colours and drop transparency with a[..., :3]." if array.shape[3] == 4 else
              "Keep the colours and drop transparency with a[:, :3]." if array.shape[1] == 4 else
              "Take two-dimensional slices of volumes with a.reshape(-1, *a.shape[2:]), vectors with "
              "a.reshape(len(a), -1), or drop or merge channels.")
    raise ValueError(f"{name} has shape {array.shape}, wanted images of 1 or 3 channels: "
                     f"(N, C, H, W) or (N, H, W, C). {remedy}")


def _integers(arrays: Mapping[str, np.ndarray], names: Mapping[str, str]) -> Pixels:
    low = min(int(array.min()) for array in arrays.values())
    high = max(int(array.max()) for array in arrays.values())
    images = next(iter(arrays.values())).ndim == 4
    if 0 <= low and high <= 255:
        levels = {part: torch.from_numpy(np.ascontiguousarray(array, np.uint8)) for part, array in arrays.items()}
        return Pixels(levels, all(only(array, 0, 255) for array in arrays.values()), False, {})
    if images and all(array.dtype.kind == "u" and array.dtype.itemsize == 2 for array in arrays.values()):
        deep = {part: torch.from_numpy(np.ascontiguousarray(array, np.float32) / np.float32(65535))
                for part, array in arrays.items()}
        scale = "v / 65535 of 16 bits"
        if high < 2**14:
            bits = high.bit_length()
            scale += f", of which at most {bits} are used"
            warnings.warn(f"{' and '.join(names.values())}: uint16 levels up to {high} are scaled by 1 / 65535, as all "
                          f"16-bit data, and lie in [0, {high / 65535:.4g}]. For {bits}-bit data on [0, 1] save "
                          f"(a / {2**bits - 1}).astype(numpy.float32).", stacklevel=7)
        return Pixels(deep, False, False, {"levels": scale})
    part = max(arrays, key=lambda part: max(abs(int(arrays[part].min())), abs(int(arrays[part].max()))))
    got = f"{names[part]} has dtype {arrays[part].dtype} and whole numbers in [{low}, {high}]"
    if images:
        raise ValueError(f"{got}, wanted levels 0..255 (or 0..65535 as uint16). Save other images as floats in [0, 1], "
                         "such as (a / a.max()).astype(numpy.float32).")
    if max(-low, high) > EXACT:
        raise ValueError(f"{got}, wanted none beyond {EXACT}, which float32 holds exactly. "
                         "Scale them and save floats.")
    return Pixels({part: torch.from_numpy(np.ascontiguousarray(array, np.float32)) for part, array in arrays.items()},
                  False, False, {})


def _floats(arrays: Mapping[str, np.ndarray], names: Mapping[str, str]) -> Pixels:
    with np.errstate(over="ignore"):
        parts = {part: torch.from_numpy(np.ascontiguousarray(array, np.float32)) for part, array in arrays.items()}
    for part, pixels in parts.items():
        bad = ~torch.isfinite(pixels).flatten(1).all(1)
        if bad.any():
            row = int(bad.nonzero()[0])
            large = bool(np.isfinite(arrays[part][bad.numpy()]).all())
            what = "numbers beyond float32" if large else "NaN or infinite values"
            raise ValueError(f"{names[part]} holds {what} in {int(bad.sum())} of {len(bad)} rows, first in row "
                             f"{row}; wanted finite numbers. {'Scale' if large else 'Remove or impute'} them.")
        low, high = pixels.min().item(), pixels.max().item()
        if pixels.dim() == 4 and (low < 0 or high > 1):
            raise ValueError(f"{names[part]} holds float images in [{low:.4g}, {high:.4g}], wanted [0, 1]. "
                             "Rescale them, save levels 0..255 as uint8, or flatten to (N, D) vectors of any range.")
    return Pixels(parts, False, False, {})


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    # Comparisons of three gigabytes of sprites would make another three.
    step = max(1, 2**24 * len(array) // max(1, array.size))
    return (array[start : start + step] for start in range(0, len(array), step))
