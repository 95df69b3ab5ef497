"""From a file of arrays, or a folder in a known layout, to three parts; what the numbers of an array mean as data.

Which array is what, and what its labels mean: `labels`. Data that are given in parts keep them; one heap is split
80/10/10. What the numbers mean follows from the axes and the values alone, and is settled for all parts of a dataset
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

Byte order and memory order do not matter; everything ends as uint8 or float32. An array that is mapped from its file
stays there if it is that already; else what is made of it, a block of rows at a time, goes where there is `room`.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data import room
from pyro_vae.data.formats import REMEDIES, Arrays, is_file_of_arrays, read_arrays, read_folder_of_arrays
from pyro_vae.data.labels import Keys, as_labels, chosen
from pyro_vae.data.sources import SPLITS, Source, completed, divide, tenths

EXACT = 2**24  # float32 holds all integers up to here


class Pixels(NamedTuple):
    """Arrays as data, all parts by one rule.

    Attributes:
        parts: uint8 levels or float32 numbers, (N, C, H, W) or (N, D).
        binary: Whether there are only two values; they are the levels 0 and 255.
        zeros_and_ones: Whether these were 0 and 1 in the arrays.
        notes: What the protocol should say of the scale.
    """

    parts: dict[str, Tensor]
    binary: bool = False
    zeros_and_ones: bool = False
    notes: Mapping[str, Any] = {}


def as_pixels(array: np.ndarray, name: str = "array") -> Tensor:
    """An array as data, uint8 levels or float32, (N, C, H, W) or (N, D). Binary arrays come as levels 0 and 255.

    Example:
        >>> as_pixels(np.zeros((5, 28, 20, 3), dtype=np.uint8)).shape
        torch.Size([5, 3, 28, 20])
    """
    return as_parts({"": array}, {"": name}, name).parts[""]


def as_parts(arrays: Mapping[str, np.ndarray], names: Mapping[str, str], where: str) -> Pixels:
    """All parts of a dataset as data on one scale; `names` and `where` are for messages.

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
        return Pixels(_made(arrays, np.uint8, lambda block: block * np.uint8(255)), True, True)
    return _floats(arrays, names) if True in floats else _integers(arrays, names)


def only(array: np.ndarray, low: int, high: int) -> bool:
    """Whether an array holds no other values than these two.

    Example:
        >>> only(np.array([[True, False]]), 0, 1), only(np.array([0.0, 0.5]), 0, 1)
        (True, False)
    """
    return all(bool(((block == low) | (block == high)).all()) for block in _blocks(array))


def one_picture(shape: tuple[int, ...], name: str) -> str:
    """Refuse an array that is one picture, or images along the last axis, of which the rows would pass for data.

    The shape is that of an array of which nothing else (labels, other parts) says the number of data. A line of doubt
    is returned where it leaves that open, else an empty string.
    """
    remedy = (
        "Stack several with numpy.stack to (N, H, W) or (N, H, W, C); for data that have this shape all the "
        "same, save labels beside them as y, one for each."
    )
    if len(shape) == 2 and 8 <= shape[0] == shape[1]:
        raise ValueError(f"{name} has shape {shape}, one picture, wanted many: its rows are no data. {remedy}")
    if len(shape) == 3 and (shape[2] in (1, 3) or shape[2] == 4 and min(shape) == 4 and sorted(shape)[1] >= 8):
        raise ValueError(
            f"{name} has shape {shape}, one picture (H, W, C), wanted many: its rows are no data. " + remedy
        )
    if len(shape) == 3 and 8 <= shape[0] == shape[1] and shape[2] >= 4 * shape[0]:
        raise ValueError(
            f"{name} has shape {shape}, images along the last axis, wanted (N, H, W). "
            "Save it as numpy.moveaxis(a, -1, 0)."
        )
    if len(shape) == 2 and min(shape) >= 16 and max(shape) <= 2 * min(shape):
        return (
            f"{name} of shape {shape} is taken for {shape[0]} vectors; one picture would be no data: stack several "
            "to (N, H, W)."
        )
    if len(shape) == 3 and shape[0] == 3:
        return (
            f"{name} of shape {shape} is taken for 3 grey images; a colour picture would be (1, 3, H, W): stack "
            "several to (N, 3, H, W)."
        )
    return ""


def _channels_first(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype.kind not in "biuf":
        raise ValueError(
            f"{name} has dtype {array.dtype}, wanted uint8 levels 0..255 or floats. "
            "Save levels with .astype(numpy.uint8), other numbers with .astype(numpy.float32)."
        )
    if array.ndim not in (2, 3, 4) or array.size == 0:
        remedy = " Reshape it, such as by a.reshape(len(a), -1)." if array.ndim == 1 or array.ndim > 4 else ""
        raise ValueError(
            f"{name} has shape {array.shape}, wanted data: "
            f"(N, H, W), (N, C, H, W), (N, H, W, C) or (N, D), none of them 0.{remedy}"
        )
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 2 or array.shape[1] in (1, 3):
        return array
    if array.shape[3] in (1, 3):
        return array.transpose(0, 3, 1, 2)
    remedy = (
        "Keep the colours and drop transparency with a[..., :3]."
        if array.shape[3] == 4
        else "Keep the colours and drop transparency with a[:, :3]."
        if array.shape[1] == 4
        else "Take two-dimensional slices of volumes with a.reshape(-1, *a.shape[2:]), vectors with "
        "a.reshape(len(a), -1), or drop or merge channels."
    )
    raise ValueError(
        f"{name} has shape {array.shape}, wanted images of 1 or 3 channels: (N, C, H, W) or (N, H, W, C). {remedy}"
    )


def _integers(arrays: Mapping[str, np.ndarray], names: Mapping[str, str]) -> Pixels:
    low = min(int(array.min()) for array in arrays.values())
    high = max(int(array.max()) for array in arrays.values())
    images = next(iter(arrays.values())).ndim == 4
    if 0 <= low and high <= 255:
        return Pixels(_made(arrays, np.uint8), all(only(array, 0, 255) for array in arrays.values()))
    if images and all(array.dtype.kind == "u" and array.dtype.itemsize == 2 for array in arrays.values()):
        deep = _made(arrays, np.float32, lambda block: block / np.float32(65535))
        scale = "v / 65535 of 16 bits"
        if high < 2**14:
            bits = high.bit_length()
            scale += f", of which at most {bits} are used"
            warnings.warn(
                f"{' and '.join(names.values())}: uint16 levels up to {high} are scaled by 1 / 65535, as all "
                f"16-bit data, and lie in [0, {high / 65535:.4g}]. For {bits}-bit data on [0, 1] save "
                f"(a / {2**bits - 1}).astype(numpy.float32).",
                stacklevel=7,
            )
        return Pixels(deep, notes={"levels": scale})
    part = max(arrays, key=lambda part: max(abs(int(arrays[part].min())), abs(int(arrays[part].max()))))
    got = f"{names[part]} has dtype {arrays[part].dtype} and whole numbers in [{low}, {high}]"
    if images:
        raise ValueError(
            f"{got}, wanted levels 0..255 (or 0..65535 as uint16). Save other images as floats in [0, 1], "
            "such as (a / a.max()).astype(numpy.float32)."
        )
    if max(-low, high) > EXACT:
        raise ValueError(f"{got}, wanted none beyond {EXACT}, which float32 holds exactly. Scale them and save floats.")
    return Pixels(_made(arrays, np.float32))


def _made(
    arrays: Mapping[str, np.ndarray], dtype: type[np.generic], of: Callable[[np.ndarray], np.ndarray] | None = None
) -> dict[str, Tensor]:
    """Arrays as tensors of a type, or what a function makes of such."""

    def one(array: np.ndarray) -> Tensor:
        if of is None and array.dtype == dtype and array.dtype.isnative and array.flags.c_contiguous:
            return room.shared(array)
        blocks = (np.ascontiguousarray(block, dtype) for block in _blocks(array))
        return room.joined((room.shared(block if of is None else of(block)) for block in blocks), len(array))

    return {part: one(array) for part, array in arrays.items()}


def _floats(arrays: Mapping[str, np.ndarray], names: Mapping[str, str]) -> Pixels:
    with np.errstate(over="ignore"):
        parts = _made(arrays, np.float32)
    for part, pixels in parts.items():
        bad, low, high = room.range_of(pixels)
        if bad is not None:
            row = int(bad.nonzero()[0])
            large = all(np.isfinite(arrays[part][i]).all() for i in bad.nonzero().flatten().tolist())
            what = "numbers beyond float32" if large else "NaN or infinite values"
            raise ValueError(
                f"{names[part]} holds {what} in {int(bad.sum())} of {len(bad)} rows, first in row "
                f"{row}; wanted finite numbers. {'Scale' if large else 'Remove or impute'} them."
            )
        if pixels.dim() == 4 and (low < 0 or high > 1):
            raise ValueError(
                f"{names[part]} holds float images in [{low:.4g}, {high:.4g}], wanted [0, 1]. "
                "Rescale them, save levels 0..255 as uint8, or flatten to (N, D) vectors of any range."
            )
    return Pixels(parts)


def _blocks(array: np.ndarray) -> Iterator[np.ndarray]:
    # Comparisons of three gigabytes of sprites would make another three.
    return (array[few] for few in room.steps(array.shape, most=2**22))


def read_array(path: Path, seed: int = 0, images: str | None = None, labels: str | None = None) -> Source:
    """The data in a file of one of the formats of `formats`.

    It holds x_train and x_test (and x_validation, y_train, ..., in many spellings), which are the split, or one array
    of data, which is split 80/10/10 in an order fixed by the seed; `images` and `labels` are keys, where it has
    several. What is broken or no data, or has a meaning that nobody can know, is a ValueError; labels are a reason only
    if they were asked for.
    """
    return _source(read_arrays(path), path, seed, images, labels)


def read_array_folder(
    folder: Path, seed: int = 0, images: str | None = None, labels: str | None = None
) -> Source | None:
    """The data of a folder in the layout of MNIST, CIFAR, Larochelle or OMNIGLOT; None if it has another."""
    loaded = read_folder_of_arrays(folder)
    return None if loaded is None else _source(loaded, folder, seed, images, labels)


def not_readable(path: Path) -> str:
    """What to do with a file or folder that holds neither arrays nor pictures that are read here.

    Example:
        >>> not_readable(Path("t.csv")).split("(", 1)[1]
        "'t.npy', pandas.read_csv('t.csv').to_numpy('float32'))"
    """
    if path.is_dir():
        found = sorted(p for p in path.iterdir() if p.is_file() and is_file_of_arrays(p))
        if len([p for p in found if p.suffix.lower() == ".npy"]) > 1:
            return (
                f"It holds {len(found)} files of arrays, such as {found[0].name}. Name one of them, or stack them: "
                f"numpy.save('all.npy', numpy.stack([numpy.load(p) for p in "
                f"sorted(pathlib.Path({str(path)!r}).glob('*.npy'))]))"
            )
        return f"It holds {found[0].name}: name that file." if found else ""
    for suffixes, remedy in REMEDIES.items():
        if path.suffix.lower() in suffixes:
            return (
                "Convert it: " + remedy.format(stem=path.stem, name=path.name)
                if "(" in remedy
                else remedy[0].upper() + remedy[1:] + "."
            )
    if path.suffix.lower() in (".pkl", ".pickle", ".joblib") or not path.suffix and path.is_file() and _pickle(path):
        return (
            "It is a Python pickle, which can run any code when read. Where you trust it, read it yourself and "
            "save the array: numpy.save('x.npy', x)"
        )
    return "Save arrays with numpy.save; for images name their folder."


def _pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _source(loaded: Arrays, path: Path, seed: int, images: str | None, labels: str | None) -> Source:
    where, arrays = str(path), loaded.arrays
    unread = "; ".join(f"{key} is {reason}" for key, reason in loaded.left_out.items())
    for key in (images, labels):
        if key in loaded.left_out:
            raise ValueError(
                f"{where}: {key} is {loaded.left_out[key]}; wanted an array of numbers. "
                "Save it as one, or name another."
            )
    x, y, asked = chosen(arrays, where, images, labels)
    if "train" in x and len(x) == 1:
        raise ValueError(
            f"{where} holds {x['train']} but no test data (its arrays: {', '.join(arrays)}), "
            "wanted x_test beside it. Add it, or name the one array x to have it split."
        )
    if unread:
        warnings.warn(f"{where}: left out what is not read: {unread}.", stacklevel=5)
    arrays = _rows_first(arrays, x, y, where)
    named = {key: f"{where}[{key!r}]" if loaded.keys and key else where for key in arrays}
    told = {str(part): arrays[key] for part, key in x.items()}
    counts = {part: len(array) for part, array in told.items() if array.ndim}
    numbers, names = _labels(arrays, x, y, counts, named, asked)
    if None in x and numbers is None:
        doubt = one_picture(arrays[x[None]].shape, named[x[None]])
        if doubt:
            warnings.warn(doubt, stacklevel=5)
    pixels = as_parts(told, {str(part): named[key] for part, key in x.items()}, where)
    notes: dict[str, Any] = dict(pixels.notes)
    others = sorted(set(arrays) - set(x.values()) - (set(y.values()) if numbers else set()) | set(loaded.left_out))
    notes |= {"left_out": others} if others else {}
    if images is not None or labels is not None:
        notes |= {"images": images, "labels": labels}
    rows, how = _rows(x, pixels.parts, where, seed, loaded.keys, loaded.origin)
    stay = not room.fits(sum(data.nbytes for data in pixels.parts.values()))

    def divided(data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _taken(data[part], index) for name, (part, index) in rows.items()}

    return Source(
        pixels={name: pixels.parts[part] for name, (part, _) in rows.items()} if stay else divided(pixels.parts),
        rows={name: index for name, (_, index) in rows.items()} if stay else None,
        labels=None if numbers is None else divided(numbers),
        label_names=names or loaded.label_names if numbers else None,
        origin=where,
        split=how,
        binarization="threshold" if pixels.binary else "none",
        zeros_and_ones=pixels.zeros_and_ones,
        dequantize=not pixels.binary and next(iter(pixels.parts.values())).dtype == torch.uint8,
        notes=notes,
    )


def _rows_first(arrays: Mapping[str, np.ndarray], x: Keys, y: Keys, where: str) -> dict[str, np.ndarray]:
    """Images along the last axis, as their labels say, with the data along the first."""
    turned = dict(arrays)
    for part, key in x.items():
        data, labels = arrays[key], arrays.get(y.get(part, ""))
        count = 0 if labels is None else labels.size
        if data.ndim in (3, 4) and count == data.shape[-1] != len(data) and count > 4:
            turned[key] = np.moveaxis(data, -1, 0)
            warnings.warn(
                f"{where}: {key or 'the array'} has shape {data.shape} and {count} labels, so its data lie "
                f"along the last axis; taken as {turned[key].shape}.",
                stacklevel=6,
            )
    return turned


def _rows(
    x: Keys, parts: Mapping[str, Tensor], where: str, seed: int, keyed: bool, origin: str
) -> tuple[dict[str, tuple[str, Tensor]], str]:
    if None in x:
        count = len(parts["None"])
        heap = divide(count, tenths(count, where), seed)
        return (
            {name: ("None", index) for name, index in heap.items()},
            f"80/10/10 of the rows in the order of shuffled({count}, seed={seed})",
        )
    rows, how = completed({part: torch.ones(len(data), dtype=torch.long) for part, data in parts.items()}, where, seed)
    given = ", ".join(x[part] for part in SPLITS if part in x) if keyed else origin
    return rows, f"the {'arrays' if keyed else 'files'} {given}{how}"


def _taken(data: Tensor, index: Tensor) -> Tensor:
    return data if (len(index) == len(data) and bool((index == torch.arange(len(data))).all())) else data[index]


def _labels(
    arrays: Mapping[str, np.ndarray], x: Keys, y: Keys, counts: Mapping[str, int], named: Mapping[str, str], asked: bool
) -> tuple[dict[str, Tensor] | None, tuple[str, ...] | None]:
    if not y:
        return None, None
    what = " and ".join(named[key] for key in dict.fromkeys(y.values()))
    for part, key in y.items():
        data, label = arrays[x[part]].shape, arrays[key].shape
        numeric = arrays[key].dtype.kind in "biuf"  # a list of class names may be as long as a row
        if numeric and len(data) == 2 and label in ((data[1],), (data[1], 1), (1, data[1])) and data[0] != data[1]:
            raise ValueError(
                f"{named[x[part]]} has shape {data} and {named[key]} {label}, wanted data in rows: (N, D) "
                "and (N,). Save the data transposed, as x.T."
            )
    try:
        return as_labels({str(part): arrays[key] for part, key in y.items()}, counts)
    except ValueError as reason:
        if asked:
            raise ValueError(
                f"{what}: got labels of which {reason}; wanted one whole number or name for each datum, "
                "(N,). Name other labels, or none."
            ) from None
        warnings.warn(
            f"{what} left out: labels are one whole number or name for each datum, and {reason}.", stacklevel=6
        )
        return None, None
