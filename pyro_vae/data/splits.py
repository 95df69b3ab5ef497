"""Pixels in memory and the two containers around them.

A `Split` keeps uint8 pixels and makes floats of a whole batch at a time: there are no
transforms per item, and indexing costs about what torch's own does. A `Dataset` is
three splits and the protocol under which numbers about them were obtained.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.binarization import BINARIZATIONS, Binarization, binarize, dequantize, threshold

__all__ = ["Dataset", "Index", "Split"]

Index = int | slice | Tensor | Sequence[int] | np.ndarray


@dataclass(frozen=True, eq=False)
class Split:
    """N data in memory that become floats when indexed.

    `split[index]` is a float32 batch (B, C, H, W). Which numbers it holds is decided by
    `binarization`: "dynamic" draws afresh at each look, from torch's global generator, so
    that a seeded fit is reproducible; "static" and "threshold" are drawn once, here, and
    kept as uint8 zeros and ones; "none" gives v / 255, or (v + u) / 256 with `dequantize`.
    Float data are handed out as they are, unless binarised.

    Args:
        pixels: uint8 levels 0..255 (N, C, H, W) or (N, D), or floats of any (N, ...).
        labels: One integer per datum (N,), or None.
        name: For messages and protocols: "train", "validation", "test".
        binarization: "dynamic", "static", "threshold" or "none".
        dequantize: Whether uint8 levels get uniform noise; only with binarization "none".
        seed: Of the single draw of "static".
        fixed: Whether the pixels hold the final numbers already (zeros and ones as uint8).
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

    def __post_init__(self) -> None:
        _check(self)
        if self.fixed or self.binarization not in ("static", "threshold"):
            return
        if self.binarization == "static":
            ones = _drawn(self.pixels, self.seed, binarize)
        else:
            ones = _chunked(self.pixels, lambda part: threshold(part).to(torch.uint8))
        object.__setattr__(self, "pixels", ones)
        object.__setattr__(self, "fixed", True)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: Index) -> Tensor:
        batch = self._gather(index)
        if self.fixed:
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
        return replace(self, pixels=_drawn(self.pixels, seed, draw), seed=seed, fixed=True)

    def subset(self, indices: Index) -> "Split":
        """The data at these indices, in their order, with their labels."""
        rows = torch.arange(len(self))[_as_index(indices)].reshape(-1).to(self.device)
        labels = None if self.labels is None else self.labels[rows]
        return replace(self, pixels=self.pixels[rows], labels=labels)

    def to(self, device: torch.device | str) -> "Split":
        """The split with pixels and labels on another device; batches are then drawn there."""
        labels = None if self.labels is None else self.labels.to(device)
        return replace(self, pixels=self.pixels.to(device), labels=labels)

    def mean(self) -> Tensor:
        """The expected value of one datum, in the units that indexing gives (C, H, W).

        For images in [0, 1]: what a decoder's last bias is best started from.
        """
        total = sum(part.to(torch.float64).sum(0) for part in self.pixels.split(4096))
        mean = torch.as_tensor(total) / len(self)
        if not self.fixed and self.pixels.dtype == torch.uint8:
            mean = (mean + 0.5) / 256 if self.dequantize else mean / 255
        return mean.to(torch.float32 if self.pixels.dtype == torch.uint8 else self.pixels.dtype)

    def _gather(self, index: Index) -> Tensor:
        index = _as_index(index)
        if isinstance(index, Tensor) and index.dtype == torch.int64 and index.dim() == 1 and self.device.type == "cpu":
            # Copies whole rows, twenty times as fast as pixels[index], but knows no negative indices.
            try:
                return self.pixels.index_select(0, index)
            except IndexError:
                pass
        return self.pixels[index]


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
        return replace(self, train=self.train.to(device), validation=self.validation.to(device),
                       test=self.test.to(device))


def _as_index(index: Index) -> int | slice | Tensor:
    return index if isinstance(index, (int, slice, Tensor)) else torch.as_tensor(np.asarray(index))


def _chunked(pixels: Tensor, transform: Any, rows: int = 4096) -> Tensor:
    """Row blocks one after the other, since 200,000 photographs do not fit in memory as float32."""
    return torch.cat([transform(part) for part in pixels.split(rows)])


def _drawn(pixels: Tensor, seed: int, draw: Any) -> Tensor:
    # Drawn on the CPU, so that a frozen split is the same on every device.
    generator = torch.Generator().manual_seed(seed)
    keep = torch.uint8 if draw is binarize else torch.float32
    return _chunked(pixels.cpu(), lambda part: draw(part, generator).to(keep)).to(pixels.device)


def _check(split: Split) -> None:
    pixels, labels, name = split.pixels, split.labels, split.name
    if split.binarization not in BINARIZATIONS:
        raise ValueError(f"got binarization {split.binarization!r}, wanted one of {', '.join(BINARIZATIONS)}.")
    if pixels.dtype != torch.uint8 and not pixels.is_floating_point():
        raise ValueError(f"{name}: pixels have dtype {pixels.dtype}, wanted uint8 levels 0..255 or floats. "
                         "Call .to(torch.uint8) on levels.")
    if pixels.dim() < 2 or len(pixels) == 0:
        raise ValueError(f"{name}: pixels have shape {tuple(pixels.shape)}, wanted at least one datum: "
                         "(N, C, H, W) or (N, D).")
    if labels is not None and labels.shape != (len(pixels),):
        raise ValueError(f"{name}: got labels of shape {tuple(labels.shape)} for {len(pixels)} data, "
                         f"wanted ({len(pixels)},): one label per datum.")
    if split.dequantize and split.binarization != "none":
        raise ValueError(f"{name}: got dequantize=True with binarization={split.binarization!r}, "
                         "wanted one of the two. Pass binarization='none' to dequantize.")
    if split.fixed:
        return
    if split.dequantize and pixels.is_floating_point():
        raise ValueError(f"{name}: got dequantize=True for float data, wanted uint8 levels: "
                         "floats are continuous already. Pass dequantize=False.")
    if pixels.is_floating_point() and not torch.isfinite(pixels).all():
        bad = (~torch.isfinite(pixels)).flatten(1).any(1)
        raise ValueError(f"{name}: {int(bad.sum())} of {len(pixels)} data hold NaN or infinite values, first in row "
                         f"{int(bad.nonzero()[0])}; wanted finite numbers. Remove or impute them.")
    if pixels.is_floating_point() and split.binarization != "none":
        low, high = pixels.min().item(), pixels.max().item()
        if low < 0 or high > 1:
            raise ValueError(f"{name}: got binarization={split.binarization!r} for float data in "
                             f"[{low:.4g}, {high:.4g}], wanted [0, 1]. "
                             "Divide by the largest value, or pass binarization='none'.")
