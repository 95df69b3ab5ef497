"""How many data a step has seen, and what its loss is a multiple of: read while the programs run.

A loss of Pyro is a sum over the data of a batch, times the scale of their plate (N / B under
subsampling), times whatever ``poutine.scale`` was put around the pair. What is reported is

    loss per datum = loss / (scale * B).

The scale is that which model and guide have in common: that of the plate and, where all sites carry it, that of
``poutine.scale``. A factor on some sites only (annealing, say) is part of what is minimised and no unit of it. Latents
outside the data plate count once in a loss: at a scale of N / B, a pass reports the loss of all N data over N.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.sites import PARTICLES, is_subsample

# What holds the samples of one datum.
_OF_SAMPLES = {PARTICLES, "num_particles_vectorized"}


class Unit(NamedTuple):
    """What a step's loss is divided by."""

    rows: int  # B, the number of data
    scale: float = 1.0  # what multiplies the loss of each of them
    even: bool = True  # whether all sites carry this scale, so that an ELBO is one, and not a tempered one
    share: float = 1.0  # the part of the scale that is N / B, of the plate of the data

    @property
    def whole(self) -> float:
        """scale * B."""
        return self.scale * self.rows


class _Seen(NamedTuple):
    plates: tuple[Any, ...]
    extra: float | None  # beside the scale of its plates; None where it differs between data
    observed: bool


class Counting(Messenger):
    """Notes the plates and scales of the sites that run inside.

    Example:
        >>> import torch, pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", 100, subsample=x):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> with Counting() as count:
        ...     _ = model(torch.zeros(5))
        >>> count.unit()
        Unit(rows=5, scale=20.0, even=True, share=20.0)
    """

    def __init__(self) -> None:
        super().__init__()
        self._sites: dict[tuple[str, bool], _Seen] = {}
        self._units: dict[Any, Unit] = {}
        self.picks: str | None = None  # a plate that picks its rows at random in each run

    def __enter__(self) -> Counting:
        self._sites, self.picks = {}, None
        return super().__enter__()

    def _pyro_sample(self, msg: Any) -> None:
        # It stands outside of all other handlers of a step, so that they have had their say.
        key = (msg["name"], msg["is_observed"])
        if is_subsample(msg["fn"]) and msg["value"] is None:
            most = msg["fn"].subsample_size
            self.picks = msg["name"] if most is not None and most < msg["fn"].size else self.picks
        if key in self._sites or is_subsample(msg["fn"]) or (msg["infer"] or {}).get("_deterministic"):
            return
        plates = tuple(frame for frame in msg["cond_indep_stack"] if frame.name not in _OF_SAMPLES)
        self._sites[key] = _Seen(plates, _extra(msg["scale"], plates), msg["is_observed"])

    def unit(self, lengths: Sequence[int] = ()) -> Unit:
        """What the loss of the programs that ran inside is to be divided by; the lengths of the batch's tensors decide
        where there is no plate, or between plates."""
        seen = tuple(self._sites.values())
        key = (seen, tuple(lengths))
        if key not in self._units:
            self._units = {key: _unit(seen, lengths)}
        return self._units[key]

    def outside(self, lengths: Sequence[int] = ()) -> list[str]:
        """Sites outside the plate of the data, factors too, which count once whatever the batch is; all of them where
        there is no plate.
        """
        frame = _data_plate(tuple(self._sites.values()), lengths)
        sites = self._sites.items()
        return [name for (name, _), site in sites if frame is None or all(f.name != frame[0] for f in site.plates)]


def _extra(scale: Any, plates: tuple[Any, ...]) -> float | None:
    if isinstance(scale, Tensor) and scale.numel() != 1:
        return None
    return float(scale) / math.prod(_share(frame) for frame in plates)


def _share(frame: Any) -> float:
    """N / B of a plate; 1 where it does not know N."""
    full = frame.full_size
    return float(full) / float(frame.size) if full is not None and full > 0 else 1.0


def _data_plate(seen: Sequence[_Seen], sizes: Sequence[int]) -> tuple[Any, ...] | None:
    """Name, dim, size and full size of the plate of the data; None where there is no plate."""
    observed = [site for site in seen if site.observed] or list(seen)
    frames = {(f.name, f.dim, f.size, f.full_size) for site in observed for f in site.plates}

    def rank(frame: tuple[Any, ...]) -> tuple[Any, ...]:
        """The plate that most observed sites share, and then most sites; the outer one."""
        name, dim, size, full = frame

        def inside(sites: Sequence[_Seen]) -> int:
            return sum(any((f.name, f.dim) == (name, dim) for f in site.plates) for site in sites)

        subsampled = full is not None and full not in (size, -1)
        return (inside(observed), inside(seen), subsampled, size in sizes, math.inf if dim is None else -dim, name)

    return max(frames, key=rank, default=None)


def _unit(seen: Sequence[_Seen], sizes: Sequence[int]) -> Unit:
    observed = [site for site in seen if site.observed] or list(seen)
    frame = _data_plate(seen, sizes)
    extras = [site.extra for site in seen]
    first = next((site.extra for site in observed), 1.0)
    even = bool(extras) and all(e is not None and math.isclose(e, extras[0] or 0.0) for e in extras)
    some_without = any(e is None or math.isclose(e, 1.0) for e in extras)
    extra = 1.0 if first is None or not first > 0 or (some_without and not even) else first
    if frame is None:
        return Unit(next(iter(sizes), 1), extra, even or not extras)
    _, _, size, full = frame
    share = float(full) / float(size) if full is not None and full > 0 and size > 0 else 1.0
    return Unit(int(size), share * extra, even, share)
