"""Columns on scales of their own: what the networks of a pair see of them, while its densities stay those of x.

A table holds ages, incomes and flags: numbers of which some are a million times the others. Networks start for numbers
of size one, so the guide is shown u = (x - m) / s and the likelihood is one of u, with m and s the mean and the
standard deviation of each column of the training data. By the change of variables

    log p(x | z) = log p(u | z) - sum_d log s_d

which the likelihood itself accounts for: every bound, estimate and sample of the pair is of x.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

# Beyond so many standard deviations the guide sees a number grow as its logarithm: exp(.) of a network overflows soon.
_FAR = 30.0
# Columns whose root mean square is below this are left alone where nobody asked for more.
_LARGE = 5.0


class Standardize(nn.Module):
    """u = (x - m) / s, column by column, for a guide; beyond 30 it grows logarithmically, |u| = 30 + log(1 + |u| - 30).

    One object is shared by the guide, which it hands u, and the likelihood, which scores x by u - exactly, at any u. It
    starts as the identity and takes m and s from the training data of the pair's first `fit`, or from `measure`.

    Args:
        x_shape: Shape of one datum.
        automatic: Whether only data on scales of their own are standardised: those with a column whose root mean
            square is above 5. One line then says so.
    Attributes:
        loc: m, (*x_shape).
        scale: s, (*x_shape): 1 for a constant column.
        far: From where u grows logarithmically: 30, and never as long as u is x.
        moves: Whether the likelihood scores x by u, so that its own numbers are of u.
        measured: Whether m and s are settled; they are saved with the weights, and no later fit moves them.
    Example:
        >>> standardize = Standardize((2,))
        >>> standardize.measure([torch.tensor([[10.0, 3.0], [30.0, 3.0]])])
        >>> standardize(torch.tensor([[30.0, 4.0]]))
        tensor([[1., 1.]])
    """

    moves: ClassVar[bool] = True
    loc: Tensor
    scale: Tensor
    far: Tensor
    measured: Tensor

    def __init__(self, x_shape: Sequence[int], automatic: bool = False) -> None:
        super().__init__()
        self.automatic = automatic
        self.register_buffer("loc", torch.zeros(tuple(x_shape)))
        self.register_buffer("scale", torch.ones(tuple(x_shape)))
        self.register_buffer("far", torch.tensor(torch.inf))
        self.register_buffer("measured", torch.tensor(False))

    def forward(self, x: Tensor) -> Tensor:
        """What the guide is shown of the data, (..., *x_shape)."""
        u = (x - self.loc) / self.scale
        near = u.clamp(-self.far, self.far)
        return near + (u - near).sign() * (u - near).abs().log1p()

    @torch.no_grad()
    def measure(self, chunks: Iterable[Tensor | tuple[Tensor, Tensor]]) -> None:
        """Take m and s from data.

        Args:
            chunks: Data, each (B, *x_shape), or such with a mask, True where observed; all else is left out.
        Raises:
            ValueError: Data of another shape, or none.
        """
        self._settle(*self._statistics(chunks)[:2])

    @torch.no_grad()
    def before_fit(self, batches: Iterable[tuple[Any, ...]]) -> None:
        """Take m and s from the data of the first fit (see `pyro_vae.inference.starts`)."""
        if bool(self.measured):
            return
        loc, scale, count = self._statistics(_observed(batches, tuple(self.loc.shape)))
        size = (loc.square() + torch.where(scale == 1, 0.0, scale).square()).sqrt()
        if self.automatic and (count == 0 or not size.max() > _LARGE):
            self.measured.fill_(True)
            return
        if self.automatic:
            self._say(loc, scale, size)
        self._settle(loc, scale)

    def _settle(self, loc: Tensor, scale: Tensor) -> None:
        self.loc.copy_(loc)
        self.scale.copy_(scale)
        self.far.fill_(_FAR)
        self.measured.fill_(True)

    def _say(self, loc: Tensor, scale: Tensor, size: Tensor) -> None:
        column = int(size.argmax())
        index = ", ".join(str(int(i)) for i in torch.unravel_index(torch.tensor(column), loc.shape))
        warnings.warn(
            f"the data lie on scales of their own (x[:, {index}] has mean {loc.flatten()[column]:.4g} and standard "
            f"deviation {scale.flatten()[column]:.4g}), so the networks are given (x - mean) / standard deviation of "
            "these training data, column by column. Every bound, log p(x) and sample stays one of x itself. "
            "VAE.build(..., standardize=True) does it without this line, standardize=False not at all.",
            stacklevel=2,
        )

    def _statistics(self, chunks: Iterable[Tensor | tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, int]:
        """Mean, scale and the number of data, in one pass: moments of chunks, joined (Chan et al., 1979)."""
        shape = tuple(self.loc.shape)
        count = mean = squares = torch.zeros(shape, dtype=torch.float64)
        rows = 0
        for chunk in chunks:
            x, mask = chunk if isinstance(chunk, tuple) else (chunk, None)
            if tuple(x.shape[1:]) != shape:
                raise ValueError(f"got data of shape {tuple(x.shape)} to standardize, wanted (N, *{shape}).")
            x = x.detach().to("cpu", torch.float64)
            seen = x.isfinite() if mask is None else x.isfinite() & mask.to("cpu").expand_as(x)
            n = seen.sum(0).to(torch.float64)
            x = torch.where(seen, x, 0.0)
            here = x.sum(0) / n.clamp(min=1)
            spread = torch.where(seen, x - here, 0.0).square().sum(0)
            total = (count + n).clamp(min=1)
            squares = squares + spread + (here - mean).square() * count * n / total
            mean = mean + (here - mean) * n / total
            count, rows = count + n, rows + len(x)
        scale = (squares / count.clamp(min=1)).sqrt()
        # What float32 cannot tell from its mean is constant. A single datum has no spread: its size has to do.
        constant = (scale <= 1e-7 * mean.abs()) | (scale < 1e-30)
        scale = torch.where(constant, torch.ones_like(scale) if rows > 1 else mean.abs().clamp(min=1), scale)
        return mean, scale, rows


class CountScale(Standardize):
    """u = log(1 + x) for the guide of counts, and the size of each column for their likelihood: its mean is s m(z).

    A gene of 2,000 transcripts beside one of 2 asks a network that starts near one for a long way, and the first steps
    leave the floats. x itself is scored, with no change of variables: only where the networks start is another.

    Args:
        x_shape: Shape of one datum.
    Attributes:
        scale: s, (*x_shape): the mean of each column of the training data, 1 where it has none; all 1 where no column
            has a root mean square above 5, and the guide then sees x.
    Example:
        >>> counts = CountScale((2,))
        >>> counts.measure([torch.tensor([[0.0, 10.0], [0.0, 30.0]])])
        >>> counts.scale, counts(torch.tensor([[0.0, 1.0]]))
        (tensor([ 1., 20.]), tensor([[0.0000, 0.6931]]))
    """

    moves = False

    def __init__(self, x_shape: Sequence[int]) -> None:
        super().__init__(x_shape, automatic=True)

    def forward(self, x: Tensor) -> Tensor:
        """What the guide is shown of the data, (..., *x_shape)."""
        return torch.where(self.far.isinf(), x, x.clamp(min=0).log1p())

    def _settle(self, loc: Tensor, scale: Tensor) -> None:
        super()._settle(torch.zeros_like(loc), torch.where(loc > 0, loc, 1.0))

    def _say(self, loc: Tensor, scale: Tensor, size: Tensor) -> None:
        largest = float(loc.max())
        warnings.warn(
            f"the counts are large (the largest mean of a column is {largest:.4g}), so the guide is shown log(1 + x), "
            "and the decoder's means are multiples of each column's mean in these training data. Every bound, log p(x) "
            "and sample stays one of x itself. VAE.build(..., standardize=False) leaves it out.",
            stacklevel=2,
        )


def _observed(batches: Iterable[tuple[Any, ...]], shape: tuple[int, ...]) -> Iterable[tuple[Tensor, Tensor]]:
    """x and its mask in batches of a pair's arguments: the first tensor of the shape of the data, a mask after it."""
    for batch in batches:
        for place, x in enumerate(batch):
            if isinstance(x, Tensor) and tuple(x.shape[1:]) == shape and x.dtype != torch.bool:
                after = batch[place + 1] if place + 1 < len(batch) else None
                masked = isinstance(after, Tensor) and after.dtype == torch.bool
                yield x, after if masked and after is not None else torch.ones((), dtype=torch.bool)
                break
