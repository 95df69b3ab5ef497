"""Labels as files hold them, as class numbers, and which of several arrays are labels and which data.

    whole numbers, of any type, (N,), (N, 1), (1, N)    class numbers, as they are
    rows with a single 1 among zeros, (N, C)            the column of the 1
    text, (N,)                                          its place among the sorted names

Nothing else (regression targets, several labels per datum, dates) names one class per
datum. A fit needs no labels, so such labels are left out, and a line says so.

Where an array has a name, it is a part (`train`, `val`, `test`, ...), a role (`images`, `x`, ... or `labels`, `y`,
...), or both in either order: x_train, train_images, X, testdata. Where no name tells, the shapes do if only one array
can be the data: the only one of three or four axes, else the only one of two. Else the user says it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

Labels = tuple[dict[str, Tensor], tuple[str, ...] | None]


def as_labels(arrays: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> Labels:
    """Class numbers of all parts of a dataset, by one rule: int64 (N,) for each, and the class names where they were
    text.

    `counts` are the numbers of data of the parts. Where they are no labels, the ValueError's message is a clause about
    them.

    Example:
        >>> as_labels({"train": np.array(["dog", "cat"])}, {"train": 2})
        ({'train': tensor([1, 0])}, ('cat', 'dog'))
        >>> as_labels({"train": np.eye(3)[[2, 0]]}, {"train": 2})
        ({'train': tensor([2, 0])}, None)
    """
    missing = [part for part in counts if part not in arrays]
    if missing:
        raise ValueError(f"there are none for {', '.join(missing)}")
    columns = {part: _column(array, counts[part]) for part, array in arrays.items()}
    kinds = {array.dtype.kind for array in columns.values()}
    if kinds <= set("US"):
        texts = {part: _text(array) for part, array in columns.items()}
        names, numbers = np.unique(np.concatenate(list(texts.values())), return_inverse=True)
        pieces = np.split(numbers.reshape(-1), np.cumsum([len(text) for text in texts.values()])[:-1])
        classes = {part: torch.from_numpy(piece.astype(np.int64)) for part, piece in zip(texts, pieces, strict=True)}
        return classes, tuple(str(name) for name in names)
    if not kinds <= set("biuf"):
        raise ValueError(f"their dtype is {' and '.join(sorted({str(array.dtype) for array in columns.values()}))}")
    if any(array.ndim == 2 for array in columns.values()):
        return {part: torch.from_numpy(_ones_of_rows(array)) for part, array in columns.items()}, None
    return {part: torch.from_numpy(_whole(array)) for part, array in columns.items()}, None


def _column(array: np.ndarray, count: int) -> np.ndarray:
    if array.shape in ((count,), (count, 1), (1, count)):
        return array.reshape(count)
    if array.ndim == 2 and len(array) == count and array.shape[1] > 1:
        return array
    raise ValueError(f"they have shape {array.shape} for {count} data")


def _text(array: np.ndarray) -> np.ndarray:
    if array.ndim != 1:
        raise ValueError(f"they are text of shape {array.shape}")
    return array if array.dtype.kind == "U" else np.array([word.decode("utf-8", "replace") for word in array.tolist()])


def _ones_of_rows(array: np.ndarray) -> np.ndarray:
    if array.ndim != 2 or not bool(((array == 0) | (array == 1)).all()) or not bool((array.sum(1) == 1).all()):
        raise ValueError(f"they have shape {array.shape} and are not one 1 among zeros in each row")
    return array.argmax(1).astype(np.int64)


def _whole(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind == "f" and not bool(np.isfinite(array).all()):
        raise ValueError("some are not finite")
    if array.size and max(-float(array.min()), float(array.max())) >= 2**53:
        raise ValueError("some are beyond 2^53")
    numbers = array.astype(np.int64)
    if not bool((numbers == array).all()):
        raise ValueError("they are no whole numbers")
    return numbers


# What files and folders call the parts of a split.
PART_NAMES = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
PART_NAMES |= dict.fromkeys(("val", "valid", "validation"), "validation")
IMAGE_WORDS = ("images", "image", "imgs", "img", "x", "data", "pixels", "features", "samples", "inputs")
LABEL_WORDS = ("labels", "label", "y", "targets", "target", "classes", "class")

Keys = dict[str | None, str]


def chosen(
    arrays: Mapping[str, np.ndarray], where: str, images: str | None = None, labels: str | None = None
) -> tuple[Keys, Keys, bool]:
    """The keys of data and labels by part; the part None is a heap that nobody has divided.

    `images` and `labels` are keys, or what is left of the keys without their parts ("sprites" of train_sprites,
    test_sprites). The last value says whether the labels were asked for.

    Example:
        >>> arrays = {"train_images": np.zeros((5, 4, 4)), "test_images": np.zeros((3, 4, 4)), "y_train": np.zeros(5)}
        >>> chosen(arrays, "file")[:2]
        ({'train': 'train_images', 'test': 'test_images'}, {'train': 'y_train'})
    """
    told = {key: _told(key) for key in arrays}
    if images is not None:
        x = _asked(images, told, where, "images")
    elif len(arrays) == 1:
        x = {None: next(iter(arrays))}
    else:
        x = _with_train(_named(arrays, told, ("", *IMAGE_WORDS))) or _by_shape(arrays, told)
        # An array that cannot be data is named in the message about it.
        x = x or _with_train({part: key for key, (part, role) in reversed(told.items()) if role in IMAGE_WORDS})
    if not x:
        example = next((key for key in arrays if _usable(arrays[key])), "KEY")
        raise ValueError(
            f"{where} holds the arrays {', '.join(arrays) or 'none'}, wanted one named "
            f"images or x or data or pixels (with labels or y), or x_train and x_test. "
            f"Say which by images={example!r} (--images {example}), or rename them with numpy.savez."
        )
    if labels is not None:
        y = _asked(labels, told, where, "labels")
        y = {next(iter(x)): labels} if None in y and len(x) == 1 else y
        if not set(y) & set(x):
            raise ValueError(
                f"{where}: got labels={labels!r}, wanted labels of the data {', '.join(x.values())}. "
                "Name labels of the same parts."
            )
    else:
        others = {key: array for key, array in arrays.items() if key not in x.values()}
        y = _named(others, told, LABEL_WORDS, data=False)
        if None not in x and "train" not in y and None in y:
            y["train"] = y.pop(None)
        part = told[x[None]][0] if None in x else None
        if part is not None and None not in y and part in y:
            y[None] = y[part]
    return x, {part: key for part, key in y.items() if part in x}, labels is not None


def _told(key: str) -> tuple[str | None, str]:
    """The part in a name, and what is left of it."""
    name = key.lower()
    words = [word for word in re.split(r"[\s_.\-/]+", name) if word]
    parts = [word for word in words if word in PART_NAMES]
    if len(parts) == 1:
        return PART_NAMES[parts[0]], "_".join(word for word in words if word != parts[0])
    for part in sorted(PART_NAMES, key=len, reverse=True):
        for rest in (name.removeprefix(part), name.removesuffix(part)):
            if rest != name and rest in IMAGE_WORDS + LABEL_WORDS:  # testdata, xtrain; but not latest
                return PART_NAMES[part], rest
    return None, "_".join(words)


def _asked(wanted: str, told: Mapping[str, tuple[str | None, str]], where: str, option: str) -> Keys:
    if wanted in told:
        return {None: wanted}
    found: Keys = {part: key for key, (part, rest) in told.items() if part is not None and rest == wanted.lower()}
    if not found:
        raise ValueError(
            f"{where} holds the arrays {', '.join(told) or 'none'}, got {option}={wanted!r}, "
            "wanted the name of one of them."
        )
    return found


def _named(
    arrays: Mapping[str, np.ndarray],
    told: Mapping[str, tuple[str | None, str]],
    words: tuple[str, ...],
    data: bool = True,
) -> Keys:
    found: Keys = {}
    for word in words:
        for key, array in arrays.items():
            part, rest = told[key]
            if rest == word and (part is not None or rest) and (_usable(array) or not data):
                found.setdefault(part, key)
    return found


def _with_train(found: Keys) -> Keys:
    """Data beside testdata are the training data; x beside x_train and x_test is something else."""
    if len(found) > 1 and None in found:
        rest: Keys = {part: key for part, key in found.items() if part is not None}
        rest.setdefault("train", found[None])
        return rest
    return found


def _by_shape(arrays: Mapping[str, np.ndarray], told: Mapping[str, tuple[str | None, str]]) -> Keys:
    usable = {key: array for key, array in arrays.items() if _usable(array) and told[key][1] not in LABEL_WORDS}
    for axes in ((3, 4), (2,)):
        keys = [key for key, array in usable.items() if array.ndim in axes]
        if len(keys) == 1:
            return {None: keys[0]}
        rests = {told[key][1] for key in keys}
        if keys and len(rests) == 1 and all(told[key][0] for key in keys):
            return {told[key][0]: key for key in keys}
        if keys:
            return {}
    return {}


def _usable(array: np.ndarray) -> bool:
    return array.dtype.kind in "biuf" and array.ndim >= 2
