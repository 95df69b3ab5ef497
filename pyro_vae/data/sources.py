"""What readers hand to `load`, and how one heap of data becomes three splits.

The order of a split is a pure function of (count, seed): every index is hashed and the
hashes are sorted. So a split is the same in every process, on every machine and under
every version of numpy or torch, none of which promise that of their permutations.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.binarization import Binarization
from pyro_vae.data.splits import Split

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True, eq=False)
class Source:
    """Raw data in three parts, before binarization, with the defaults of binarization for them.

    Parts are keyed as in `SPLITS`; pixels are uint8 or floats (N, ...), and labels integers (N,) with their names, if
    any; `split` and `origin` say for the protocol how the parts were made and where the files lie, `notes` what else;
    `zeros_and_ones` says whether the levels 0 and 255 stand for the numbers 0 and 1 of the files; and the testbed is
    the distribution that the data were drawn from, where it is known. `rows` say which of the pixels the data of a part
    are, in their order, where all parts are of one heap too large to be taken apart.
    """

    pixels: Mapping[str, Tensor]
    split: str
    origin: str
    labels: Mapping[str, Tensor] | None = None
    label_names: tuple[str, ...] | None = None
    binarization: Binarization = "none"
    dequantize: bool = False
    zeros_and_ones: bool = False
    testbed: Any = None
    notes: dict[str, Any] = field(default_factory=dict)
    rows: Mapping[str, Tensor] | None = None

    def part(self, name: str, limit: int | None = None) -> Split:
        """The first data of a part, as they are."""
        if self.rows is None:
            return Split(self.pixels[name][:limit], name=name, fixed=True)
        return Split(self.pixels[name], name=name, fixed=True, rows=self.rows[name][:limit])


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
    """Disjoint index sets for train, validation and test, of sizes that sum to count, in the order of the seed.

    With labels, (N,), every part holds each label in its overall share, to within one datum.

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
        raise ValueError(
            f"{what}: got {count} images or rows, wanted at least 3, one each to train, validate and test. Add data."
        )
    held_out = max(1, round(count / 10))
    return count - 2 * held_out, held_out, held_out


def cut(groups: Tensor, shares: Callable[[int], tuple[int, ...]], seed: int = 0) -> tuple[tuple[Tensor, ...], bool]:
    """Rows that come in groups (the frames of one file), in pieces that share no group, and whether these were kept
    whole.

    `groups` are the numbers of rows of each, (G,), and `shares` the sizes of the pieces of n things. With fewer groups
    than pieces the rows are cut in their order instead, so that only neighbours at the cuts are near-duplicates.

    Example:
        >>> cut(torch.tensor([1, 1, 1, 1]), lambda n: (n - 1, 1))
        ((tensor([2, 1, 0]), tensor([3])), True)
        >>> cut(torch.tensor([4]), lambda n: (n - 1, 1))
        ((tensor([0, 1, 2]), tensor([3])), False)
    """
    count, rows = len(groups), int(groups.sum())
    pieces = shares(rows)
    if count < len(pieces):
        return torch.arange(rows).split(list(pieces)), False
    order = shuffled(count, seed).split(list(shares(count)))
    if rows == count:
        return order, True
    return tuple(rows_of(groups, piece) for piece in order), True


def rows_of(groups: Tensor, chosen: Tensor) -> Tensor:
    """The rows of some groups, by the number of rows of each, (G,)."""
    ends = groups.cumsum(0)
    return torch.cat([torch.arange(int(ends[g] - groups[g]), int(ends[g])) for g in chosen.tolist()])


def completed(given: Mapping[str, Tensor], what: str, seed: int = 0) -> tuple[dict[str, tuple[str, Tensor]], str]:
    """Three parts out of the two or three that the files have, none of them seen by another, and what was not as given.

    Without data to validate, a tenth of the training data does. Without test data, the validation data are halved; the
    training data stay as they are. `given` holds the sizes of the groups of rows, as for `cut`, by part; each part of
    the split is named with the given part that it comes from, and has the rows of it.
    """

    def all_of(part: str) -> tuple[str, Tensor]:
        return part, torch.arange(int(given[part].sum()))

    def two(part: str, shares: Callable[[int], tuple[int, ...]], remedy: str) -> tuple[tuple[Tensor, ...], str]:
        count = int(given[part].sum())
        if count < 2:
            raise ValueError(f"{what}: got {count} {part} datum, wanted at least 2, {remedy} Add data.")
        pieces, whole = cut(given[part], shares, seed)
        frames = ", the frames of a file together" if len(given[part]) < count else ""
        return pieces, f"chosen with seed {seed}{frames}" if whole else "the last of the frames in their order"

    if "train" not in given or len(given) < 2:
        raise ValueError(
            f"{what} has the parts {', '.join(given)}, wanted train and test (or train and validation). "
            "Add the part, or point at the one part to have it split."
        )
    if len(given) == 3:
        return {part: all_of(part) for part in SPLITS}, ""
    if "test" in given:
        pieces, how = two("train", lambda n: (n - max(1, n // 10), max(1, n // 10)), "one of them to validate.")
        return (
            {"train": ("train", pieces[0]), "validation": ("train", pieces[1]), "test": all_of("test")},
            f"; validation: {len(pieces[1])} of train, {how}",
        )
    pieces, how = two("validation", lambda n: (n - n // 2, n // 2), "as half of them test where nothing else does.")
    return (
        {"train": all_of("train"), "validation": ("validation", pieces[0]), "test": ("validation", pieces[1])},
        f"; test: {len(pieces[1])} of validation, {how}",
    )
