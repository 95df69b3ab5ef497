"""The two containers of data: a split, and a dataset of three of them.

A `Split` keeps uint8 pixels, in memory or in a file, and makes floats of a whole batch at a time: there are no
transforms per item, and indexing costs about what torch's own does. A `Dataset` is
three splits and the protocol under which numbers about them were obtained.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data import room
from pyro_vae.data.binarization import BINARIZATIONS, Binarization, binarize, dequantize, threshold
from pyro_vae.tensors import tensor_of

Index = int | slice | Tensor | Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class Split:
    """N data that become floats when indexed.

    `split[index]` is a float32 batch (B, C, H, W). Which numbers it holds is decided by `binarization`: "dynamic" draws
    afresh at each look, from torch's global generator, so that a seeded fit is reproducible; "static" and "threshold"
    are drawn once, here, and kept as uint8 zeros and ones; "none" gives v / 255, or (v + u) / 256 with `dequantize`.
    Float data are handed out as they are, unless binarised.

    Args:
        pixels: uint8 levels 0..255 (N, C, H, W) or (N, D), or floats of any (N, ...); a tensor, or an array such as
            ``numpy.load("x.npy", mmap_mode="r")``.
        labels: One integer per datum (N,), or None.
        name: For messages and protocols: "train", "validation", "test".
        binarization: "dynamic", "static", "threshold" or "none".
        dequantize: Whether uint8 levels get uniform noise; only with binarization "none".
        seed: Of the single draw of "static".
        fixed: Whether the pixels hold the final numbers already (zeros and ones as uint8).
        rows: Which of the pixels are the data, in their order, (N,); all if omitted. The pixels then stay where they
            are: a part of a large file is no copy.

    A memory map stays in its file, of which the rows are read that are indexed, and so does a subset of it. What has to
    be made of all data (one draw of "static", "threshold", `frozen`) is in memory, or in a temporary file where it is
    more than a quarter of it.

    Example:
        >>> split = Split(torch.tensor([[[[0, 255]]], [[[255, 0]]]], dtype=torch.uint8), binarization="dynamic")
        >>> len(split), split.x_shape, split[:1]
        (2, (1, 1, 2), tensor([[[[0., 1.]]]]))
    """

    pixels: Tensor
    labels: Tensor | None = None
    name: str = "data"
    binarization: Binarization = "none"
    dequantize: bool = False
    seed: int = 0
    fixed: bool = False
    rows: Tensor | None = None
    _mapped: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if isinstance(self.pixels, np.ndarray):
            object.__setattr__(self, "_mapped", room.in_file(self.pixels))
            object.__setattr__(self, "pixels", _shared(self.pixels) if self._mapped else tensor_of(self.pixels))
        _check(self)
        if self.fixed or self.binarization not in ("static", "threshold"):
            return
        if self.binarization == "static":
            ones = _drawn(self, self.seed, binarize)
        elif self.rows is None:
            ones = room.joined((threshold(part).to(torch.uint8) for part in self.pieces()), len(self))
        else:
            return  # made of the rows as they come
        object.__setattr__(self, "pixels", ones)
        object.__setattr__(self, "rows", None)
        object.__setattr__(self, "fixed", True)
        object.__setattr__(self, "_mapped", False)

    @property
    def mapped(self) -> bool:
        """Whether the data are a whole file, in its order."""
        return self._mapped

    @property
    def final(self) -> bool:
        """Whether what is `held` are the final numbers."""
        return self.fixed or self.binarization == "threshold"

    def __len__(self) -> int:
        return len(self.pixels if self.rows is None else self.rows)

    def __getitem__(self, index: Index) -> Tensor:
        batch = self.held(index)
        if self.final:
            return batch if batch.is_floating_point() else batch.to(torch.float32)
        if self.binarization == "dynamic":
            return binarize(batch)
        if batch.is_floating_point():
            return batch
        return dequantize(batch) if self.dequantize else batch.to(torch.float32).div_(255)

    def __repr__(self) -> str:
        noise = ", dequantize=True" if self.dequantize else ""
        fixed = ", fixed=True" if self.fixed else ""
        return f"Split({self.name!r}, {len(self)} of {self.x_shape}, binarization={self.binarization!r}{noise}{fixed})"

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of one datum, (C, H, W) for images."""
        return tuple(self.pixels.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where the pixels lie."""
        return self.pixels.device

    def frozen(self, seed: int = 0) -> "Split":
        """The same data with one draw made for good, so that an ELBO and a log p(x) are
        evaluated on the same numbers, whatever is drawn in between.

        The first data of all have the draws that they have alone: so much need not be drawn to look at a few.

        Args:
            seed: Of a generator of its own; torch's global one is not touched.
        Returns:
            A split that holds zeros and ones as uint8, or dequantized float32. A split
            that draws nothing is returned as it is.
        Example:
            >>> grey = Split(torch.full((2, 1, 8, 8), 100, dtype=torch.uint8), binarization="dynamic")
            >>> bool((grey.frozen(seed=1)[:] == grey.frozen(seed=1)[:]).all())
            True
        """
        if self.fixed or not (self.binarization == "dynamic" or self.dequantize):
            return self
        draw = dequantize if self.dequantize else binarize
        return replace(self, pixels=_drawn(self, seed, draw), rows=None, seed=seed, fixed=True)

    def subset(self, indices: Index) -> "Split":
        """The data at these indices, in their order, with their labels."""
        chosen = torch.arange(len(self))[_as_index(indices)].reshape(-1).to(self.device)
        labels = None if self.labels is None else self.labels[chosen]
        if self.rows is not None or self.mapped or not room.fits(self.pixels[:1].nbytes * len(chosen)):
            return replace(self, rows=chosen if self.rows is None else self.rows[chosen], labels=labels)
        return replace(self, pixels=self.pixels[chosen], labels=labels)

    def to(self, device: torch.device | str) -> "Split":
        """The split with pixels and labels on another device; batches are then drawn there."""
        if torch.device(device) == self.device:
            return self
        labels = None if self.labels is None else self.labels.to(device)
        if self.rows is None:
            return replace(self, pixels=self.pixels.to(device), labels=labels)
        pixels = room.joined((part.to(device) for part in self.pieces()), len(self))
        return replace(self, pixels=pixels, labels=labels, rows=None, fixed=self.final)

    def mean(self) -> Tensor:
        """The expected value of one datum, in the units that indexing gives (C, H, W).

        For images in [0, 1]: what a decoder's last bias is best started from.
        """
        mean = torch.as_tensor(sum(part.to(torch.float64).sum(0) for part in self.pieces())) / len(self)
        kind = self.held(slice(0, 1)).dtype
        if not self.final and kind == torch.uint8:
            mean = (mean + 0.5) / 256 if self.dequantize else mean / 255
        return mean.to(torch.float32 if kind == torch.uint8 else kind)

    def held(self, index: Index) -> Tensor:
        """Data as they are kept: levels or numbers, or zeros and ones as uint8 where they are made once."""
        index = _as_index(index)
        found = _gathered(self.pixels, index if self.rows is None else self.rows[index])
        if self.rows is not None and self.binarization == "threshold" and not self.fixed:
            return threshold(found).to(torch.uint8)
        return found

    def pieces(self) -> Iterator[Tensor]:
        """All that is `held`, in order, so many data at a time as take little memory."""
        return (self.held(few) for few in room.steps((len(self), *self.x_shape)))

    def same(self, other: "Split") -> bool:
        """Whether the same is `held`, wherever it lies."""
        if (len(self), self.x_shape) != (len(other), other.x_shape):
            return False
        return all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(self.pieces(), other.pieces(), strict=True))

    def identity(self) -> dict[str, Any]:
        """What tells these data from others, for a fingerprint: the same wherever they lie."""
        pixels = self.pixels if self.rows is None else _Rows(self)
        return {key: value for key, value in vars(self).items() if key != "rows"} | {
            "pixels": pixels,
            "fixed": self.final,
        }


class _Rows:
    """What a split holds, like an array in a file."""

    def __init__(self, split: Split) -> None:
        self.split, self.shape = split, (len(split), *split.x_shape)
        self.dtype = split.held(slice(0, 1)).numpy().dtype

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: Any) -> np.ndarray:
        split = self.split
        return (room.joined(split.pieces(), len(split)) if index is Ellipsis else split.held(index)).numpy()


@dataclass(frozen=True, eq=False)
class Dataset:
    """Three splits, and what must be said with every number computed from them.

    Attributes:
        name: As given to `load`.
        train, validation, test: Disjoint splits.
        protocol: JSON-able: dataset, sizes, how they were split, binarization, dequantize,
            image_size, seed, source of the files.
        label_names: Name of each label, or None.
        testbed: The distribution that the data were drawn from, where it is known.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    protocol: dict[str, Any] = field(default_factory=dict)
    label_names: tuple[str, ...] | None = None
    testbed: Any = None

    @property
    def x_shape(self) -> tuple[int, ...]:
        """Shape of one datum, (C, H, W) for images."""
        return self.train.x_shape

    def to(self, device: torch.device | str) -> "Dataset":
        """The dataset with all splits on another device."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )


def _as_index(index: Index) -> int | slice | Tensor:
    return index if isinstance(index, (int, slice, Tensor)) else torch.as_tensor(np.asarray(index))


def _shared(array: np.ndarray) -> Tensor:
    """A memory map as a tensor that nobody writes to, without reading it."""
    if array.dtype not in (np.uint8, np.float32, np.float64) or not array.dtype.isnative or min(array.strides) < 0:
        raise ValueError(
            f"got a memory map of dtype {array.dtype}, wanted uint8 levels or floats of this machine in the order of "
            "their rows. Write it anew with numpy.lib.format.open_memmap, a block of rows at a time."
        )
    return room.shared(array)


def _gathered(pixels: Tensor, index: int | slice | Tensor) -> Tensor:
    if isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == 1 and pixels.device.type == "cpu":
        # Copies whole rows, twenty times as fast as pixels[index], but knows no negative indices.
        try:
            return pixels.index_select(0, index)
        except IndexError:
            pass
    return pixels[index]


def _drawn(split: Split, seed: int, draw: Any) -> Tensor:
    # Drawn on the CPU, so that a frozen split is the same on every device.
    generator = torch.Generator().manual_seed(seed)
    keep = torch.uint8 if draw is binarize else torch.float32
    parts = (draw(part.cpu(), generator).to(keep) for part in split.pieces())
    return room.joined(parts, len(split)).to(split.device)


def _check(split: Split) -> None:
    pixels, labels, name = split.pixels, split.labels, split.name
    if split.binarization not in BINARIZATIONS:
        raise ValueError(f"got binarization {split.binarization!r}, wanted one of {', '.join(BINARIZATIONS)}.")
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise ValueError(
            f"{name}: pixels have dtype {pixels.dtype}, wanted uint8 levels 0..255 or floats. "
            "Call .to(torch.uint8) on levels."
        )
    if pixels.dim() < 2 or len(pixels) == 0:
        raise ValueError(
            f"{name}: pixels have shape {tuple(pixels.shape)}, wanted at least one datum: (N, C, H, W) or (N, D)."
        )
    if labels is not None and labels.shape != (len(split),):
        raise ValueError(
            f"{name}: got labels of shape {tuple(labels.shape)} for {len(split)} data, "
            f"wanted ({len(split)},): one label per datum."
        )
    if split.dequantize and split.binarization != "none":
        raise ValueError(
            f"{name}: got dequantize=True with binarization={split.binarization!r}, "
            "wanted one of the two. Pass binarization='none' to dequantize."
        )
    if split.fixed:
        return
    if split.dequantize and pixels.is_floating_point():
        raise ValueError(
            f"{name}: got dequantize=True for float data, wanted uint8 levels: "
            "floats are continuous already. Pass dequantize=False."
        )
    if split.rows is None:  # they are some of what was looked at
        check_numbers(pixels, name, split.binarization)


def check_numbers(pixels: Tensor, name: str, binarization: Binarization) -> None:
    """Refuse floats, (N, ...), that are not finite, or to be binarised and not in [0, 1]."""
    if not pixels.is_floating_point():
        return
    bad, low, high = room.range_of(pixels)
    if bad is not None:
        raise ValueError(
            f"{name}: {int(bad.sum())} of {len(pixels)} data hold NaN or infinite values, first in row "
            f"{int(bad.nonzero()[0])}; wanted finite numbers. Remove or impute them."
        )
    if binarization != "none" and (low < 0 or high > 1):
        raise ValueError(
            f"{name}: got binarization={binarization!r} for float data in "
            f"[{low:.4g}, {high:.4g}], wanted [0, 1]. "
            "Divide by the largest value, or pass binarization='none'."
        )
