"""From a file of arrays, or a folder in a known layout, to three parts.

Which array is what, and what its labels mean: `labels`. What its numbers mean: `arrays`.
Data that are given in parts keep them; one heap is split 80/10/10.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.arrays import as_parts, one_picture
from pyro_vae.data.formats import REMEDIES, Arrays, is_file_of_arrays, read_arrays, read_folder_of_arrays
from pyro_vae.data.labels import Keys, as_labels, chosen
from pyro_vae.data.sources import SPLITS, Source, completed, divide, tenths

__all__ = ["not_readable", "read_array", "read_array_folder"]


def read_array(path: Path, seed: int = 0, images: str | None = None, labels: str | None = None) -> Source:
    """The data in a file of one of the formats of `formats`.

    It holds x_train and x_test (and x_validation, y_train, ..., in many spellings), which
    are the split, or one array of data, which is split 80/10/10 in an order fixed by the seed.

    Args:
        path: The file; nothing is ever unpickled.
        seed: Of the split.
        images: The key of the data, where the file has several arrays.
        labels: The key of the labels.
    Raises:
        ValueError: Broken, or no data, or data that nobody can know the meaning of; the
            message says what to do. Labels are a reason only if they were asked for.
    """
    return _source(read_arrays(path), path, seed, images, labels)


def read_array_folder(folder: Path, seed: int = 0, images: str | None = None, labels: str | None = None
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
            return (f"It holds {len(found)} files of arrays, such as {found[0].name}. Name one of them, or stack them: "
                    f"numpy.save('all.npy', numpy.stack([numpy.load(p) for p in "
                    f"sorted(pathlib.Path({str(path)!r}).glob('*.npy'))]))")
        return f"It holds {found[0].name}: name that file." if found else ""
    for suffixes, remedy in REMEDIES.items():
        if path.suffix.lower() in suffixes:
            return "Convert it: " + remedy.format(stem=path.stem, name=path.name) \
                if "(" in remedy else remedy[0].upper() + remedy[1:] + "."
    if path.suffix.lower() in (".pkl", ".pickle", ".joblib") or not path.suffix and path.is_file() and _pickle(path):
        return ("It is a Python pickle, which can run any code when read. Where you trust it, read it yourself and "
                "save the array: numpy.save('x.npy', x)")
    return "Save arrays with numpy.save; for images name their folder."


def _pickle(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) in (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _source(loaded: Arrays, path: Path, seed: int, images: str | None, labels: str | None) -> Source:
    where, arrays = str(path), loaded.arrays
    unread = "; ".join(f"{key} is {reason}" for key, reason in loaded.left_out.items())
    for key in (images, labels):
        if key in loaded.left_out:
            raise ValueError(f"{where}: {key} is {loaded.left_out[key]}; wanted an array of numbers. "
                             "Save it as one, or name another.")
    x, y, asked = chosen(arrays, where, images, labels)
    if "train" in x and len(x) == 1:
        raise ValueError(f"{where} holds {x['train']} but no test data (its arrays: {', '.join(arrays)}), "
                         "wanted x_test beside it. Add it, or name the one array x to have it split.")
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

    def divided(data: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: _taken(data[part], index) for name, (part, index) in rows.items()}

    return Source(
        pixels=divided(pixels.parts), labels=None if numbers is None else divided(numbers),
        label_names=names or loaded.label_names if numbers else None, origin=where, split=how,
        binarization="threshold" if pixels.binary else "none", zeros_and_ones=pixels.zeros_and_ones,
        dequantize=not pixels.binary and next(iter(pixels.parts.values())).dtype == torch.uint8, notes=notes,
    )


def _rows_first(arrays: Mapping[str, np.ndarray], x: Keys, y: Keys, where: str) -> dict[str, np.ndarray]:
    """Images along the last axis, as their labels say, with the data along the first."""
    turned = dict(arrays)
    for part, key in x.items():
        data, labels = arrays[key], arrays.get(y.get(part, ""))
        count = 0 if labels is None else labels.size
        if data.ndim in (3, 4) and count == data.shape[-1] != len(data) and count > 4:
            turned[key] = np.moveaxis(data, -1, 0)
            warnings.warn(f"{where}: {key or 'the array'} has shape {data.shape} and {count} labels, so its data lie "
                          f"along the last axis; taken as {turned[key].shape}.", stacklevel=6)
    return turned


def _rows(x: Keys, parts: Mapping[str, Tensor], where: str, seed: int, keyed: bool, origin: str
          ) -> tuple[dict[str, tuple[str, Tensor]], str]:
    if None in x:
        count = len(parts["None"])
        heap = divide(count, tenths(count, where), seed)
        return ({name: ("None", index) for name, index in heap.items()},
                f"80/10/10 of the rows in the order of shuffled({count}, seed={seed})")
    rows, how = completed({part: torch.ones(len(data), dtype=torch.long) for part, data in parts.items()}, where, seed)
    given = ", ".join(x[part] for part in SPLITS if part in x) if keyed else origin
    return rows, f"the {'arrays' if keyed else 'files'} {given}{how}"


def _taken(data: Tensor, index: Tensor) -> Tensor:
    whole = len(index) == len(data) and bool((index == torch.arange(len(data))).all())
    return data if whole else data[index]


def _labels(arrays: Mapping[str, np.ndarray], x: Keys, y: Keys, counts: Mapping[str, int], named: Mapping[str, str],
            asked: bool) -> tuple[dict[str, Tensor] | None, tuple[str, ...] | None]:
    if not y:
        return None, None
    what = " and ".join(named[key] for key in dict.fromkeys(y.values()))
    for part, key in y.items():
        data, label = arrays[x[part]].shape, arrays[key].shape
        numeric = arrays[key].dtype.kind in "biuf"  # a list of class names may be as long as a row
        if numeric and len(data) == 2 and label in ((data[1],), (data[1], 1), (1, data[1])) and data[0] != data[1]:
            raise ValueError(f"{named[x[part]]} has shape {data} and {named[key]} {label}, wanted data in rows: (N, D) "
                             "and (N,). Save the data transposed, as x.T.")
    try:
        return as_labels({str(part): arrays[key] for part, key in y.items()}, counts)
    except ValueError as reason:
        if asked:
            raise ValueError(f"{what}: got labels of which {reason}; wanted one whole number or name for each datum, "
                             "(N,). Name other labels, or none.") from None
        warnings.warn(f"{what} left out: labels are one whole number or name for each datum, and {reason}.",
                      stacklevel=6)
        return None, None
