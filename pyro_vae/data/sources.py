"""What readers hand to `load`, and how one heap of data becomes three splits.

The order of a split is a pure function of (count, seed): every index is hashed and the
hashes are sorted. So a split is the same in every process, on every machine and under
every version of numpy or torch, none of which promise that of their permutations.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.binarization import Binarization

__all__ = ["SPLITS", "Source", "divide", "shuffled", "tenths"]

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Source:
    """Raw data in three parts, before binarization.

    Attributes:
        pixels: uint8 or float data (N, ...) under the keys of `SPLITS`.
        split: How the parts were made, in words, for the protocol.
        origin: Where the files lie, for the protocol.
        labels: (N,) integers under the same keys, or None.
        label_names: Name of each label, or None.
        binarization: The default for these data.
        dequantize: The default for these data.
        testbed: The distribution that the data were drawn from, where it is known.
    """

    pixels: Mapping[str, Tensor]
    split: str
    origin: str
    labels: Mapping[str, Tensor] | None = None
    label_names: tuple[str, ...] | None = None
    binarization: Binarization = "none"
    dequantize: bool = False
    testbed: Any = None
    notes: dict[str, Any] = field(default_factory=dict)


def shuffled(count: int, seed: int = 0) -> Tensor:
    """A permutation of 0..count-1 that depends on nothing but its arguments.

    Example:
        >>> shuffled(8, seed=0)
        tensor([2, 4, 6, 5, 1, 7, 0, 3])
    """
    # splitmix64, whose wrap-around of unsigned integers is intended.
    with np.errstate(over="ignore"):
        keys = np.arange(count, dtype=np.uint64) + (np.uint64(seed % 2**32) << np.uint64(32)) + np.uint64(1)
        keys = keys * np.uint64(0x9E3779B97F4A7C15)
        keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys = keys ^ (keys >> np.uint64(31))
    return torch.from_numpy(np.argsort(keys, kind="stable"))


def divide(count: int, sizes: tuple[int, int, int], seed: int = 0, labels: Tensor | None = None) -> dict[str, Tensor]:
    """Disjoint index sets for train, validation and test.

    Args:
        count: Number of data to divide.
        sizes: Number of train, validation and test data; they sum to count.
        seed: Of the order.
        labels: If given (N,), every part holds each label in its overall share, to within one datum.
    Returns:
        Indices under the keys "train", "validation", "test".
    Example:
        >>> {name: len(rows) for name, rows in divide(10, (8, 1, 1)).items()}
        {'train': 8, 'validation': 1, 'test': 1}
    """
    if sum(sizes) != count or min(sizes) < 1:
        raise ValueError(f"got split sizes {sizes} for {count} data, wanted three sizes >= 1 that sum to {count}.")
    order = shuffled(count, seed)
    if labels is not None:
        # Sorting by the rank within the own label spreads each label evenly over the order.
        rank = torch.empty(count, dtype=torch.float64)
        for label in labels.unique():
            rows = order[labels[order] == label]
            rank[rows] = (torch.arange(len(rows), dtype=torch.float64) + 0.5) / len(rows)
        order = order[rank[order].argsort(stable=True)]
    return dict(zip(SPLITS, order.split(list(sizes)), strict=True))


def tenths(count: int, what: str) -> tuple[int, int, int]:
    """Sizes of an 80/10/10 split, none of them empty.

    Example:
        >>> tenths(1000, "faces")
        (800, 100, 100)
    """
    if count < 3:
        raise ValueError(f"{what}: got {count} images or rows, wanted at least 3, one each to train, validate and "
                         "test. Add data.")
    held_out = max(1, round(count / 10))
    return count - 2 * held_out, held_out, held_out
