"""Labels as files hold them, as class numbers.

    whole numbers, of any type, (N,), (N, 1), (1, N)    class numbers, as they are
    rows with a single 1 among zeros, (N, C)            the column of the 1
    text, (N,)                                          its place among the sorted names

Nothing else (regression targets, several labels per datum, dates) names one class per
datum. A fit needs no labels, so such labels are left out, and a line says so.
"""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

__all__ = ["as_labels"]

Labels = tuple[dict[str, Tensor], tuple[str, ...] | None]


def as_labels(arrays: Mapping[str, np.ndarray], counts: Mapping[str, int]) -> Labels:
    """Class numbers of all parts of a dataset, by one rule.

    Args:
        arrays: Labels of each part.
        counts: Number of data of each part.
    Returns:
        int64 (N,) for each part, and the class names where the labels were text.
    Raises:
        ValueError: They are no labels; the message is a clause about them.
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
        ends = np.cumsum([len(text) for text in texts.values()])[:-1]
        pieces = np.split(numbers.reshape(-1), ends)
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
