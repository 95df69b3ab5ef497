"""Is the guide's uncertainty right? Simulation-based calibration of an amortized posterior.

Draw z ~ p(z) and x ~ p(x | z): then z is a draw of the true posterior p(z | x). If q(z | x) is that posterior, z and L
draws z_1, ..., z_L ~ q(z | x) are alike, so that for each component d

    r_d = #{l : z_ld < z_d}   is uniform on 0, 1, ..., L.

What is tested is the guide *on data from the model*, averaged over them; errors that cancel over x are not seen. The
test is simultaneous over all ranks: at each of L points the number of ranks below is binomial, and the statistic is the
smallest of the L two-sided tail probabilities, whose distribution under uniformity is simulated.

References: Talts et al., Validating Bayesian inference algorithms with simulation-based calibration, 2018.
arXiv:1804.06788. Saeilynoja et al., Graphical test for discrete uniformity and its applications in goodness of fit
evaluation and multiple sample comparison, 2022. arXiv:2103.10522
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import binom, chi2
from torch import Tensor

from pyro_vae import plots
from pyro_vae.judging.components import Components, refuse_points
from pyro_vae.judging.quotes import listed
from pyro_vae.judging.results import Result, table
from pyro_vae.judging.scoring import holm
from pyro_vae.judging.sweeps import sweep
from pyro_vae.options import checked, of_pair
from pyro_vae.traces import Program

_NULL_DRAWS = 10_000


@dataclass(frozen=True)
class Bands:
    """Empirical curves, and the band that all of them stay in at the given level if all is well.

    Attributes:
        nominal: Where the curves are read, and what they are on average under calibration, (J,).
        empirical: The curves, (J, C).
        lower, upper: Edges of the band, (J,).
        level: Probability that all C curves stay within it everywhere, at least.
    """

    nominal: Tensor
    empirical: Tensor
    lower: Tensor
    upper: Tensor
    level: float

    @property
    def inside(self) -> Tensor:
        """Whether each curve stays within the band, (C,)."""
        return ((self.empirical >= self.lower[:, None]) & (self.empirical <= self.upper[:, None])).all(0)


@dataclass(frozen=True)
class Calibration(Result):
    """Ranks of true latents among the guide's draws, and what they say.

    Attributes:
        names: Of the components, (C,).
        ranks: r, (N, C), in 0, ..., L.
        num_samples: L.
        level: Of the tests: 0.95 fails a calibrated guide once in twenty.
        p_value: Of the simultaneous test of uniformity, per component, (C,).
        adjusted: The same after Holm's correction for C components, which are dependent, (C,).
        chi_square: p-value of a chi-square test of the rank histogram per component, (C,).
        seed: Of the simulations.
    """

    names: tuple[str, ...]
    ranks: Tensor
    num_samples: int
    level: float
    p_value: Tensor
    adjusted: Tensor
    chi_square: Tensor
    seed: int | None = None

    @property
    def passed(self) -> Tensor:
        """Whether each component is uniform, all judged together, (C,)."""
        return self.adjusted > 1 - self.level

    @property
    def calibrated(self) -> bool:
        """Whether no component fails: true for a calibrated guide with probability `level`, at least."""
        return bool(self.passed.all())

    @property
    def verdicts(self) -> tuple[str, ...]:
        """Per component "calibrated", or what the guide is there: too narrow, wide, low, high; or misshapen."""
        cells = self.num_samples + 1
        grid = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells - 0.5
        square, place = grid.square(), grid[self.ranks]
        shift = place.mean(0) / (square.mean() / len(place)).sqrt()
        spread = (place.square().mean(0) - square.mean()) / (square.var(correction=0) / len(place)).sqrt()
        words = []
        for good, a, b in zip(self.passed.tolist(), shift.tolist(), spread.tolist(), strict=True):
            if good:
                words.append("calibrated")
            elif max(abs(a), abs(b)) < 3:
                words.append("misshapen")
            elif abs(b) >= abs(a):
                words.append("too narrow" if b > 0 else "too wide")
            else:
                words.append("too low" if a > 0 else "too high")
        return tuple(words)

    def ecdf(self) -> Bands:
        """Share of ranks below i against i / (L + 1), i = 1, ..., L, with simultaneous bands."""
        return _bands(self.ranks, self.num_samples + 1, self.level)

    def coverage(self) -> Bands:
        """Share of data whose z lies in the central interval of the guide's draws, against its nominal level.

        Between the draws of rank (L + 1) / 2 -+ j it is 2 j / (L + 1). Above the diagonal the guide is too wide.
        """
        return _bands(self._folded(), (self.num_samples + 1) // 2, self.level)

    def covered(self, nominal: float = 0.9) -> tuple[Tensor, Tensor]:
        """Coverage of the central interval nearest to a nominal level, and its standard error, (C,) each."""
        cells = (self.num_samples + 1) // 2
        share = (self._folded() < max(1, round(nominal * cells))).double().mean(0)
        return share, (share * (1 - share) / len(self.ranks)).sqrt()

    def histogram(self, num_bins: int = 20) -> Tensor:
        """Counts of ranks in bins of equal width (as near to so many as divide L + 1), (bins, C)."""
        return _histogram(self.ranks, self.num_samples + 1, num_bins)

    def rows(self) -> list[dict[str, Any]]:
        share, error = self.covered()
        return table(
            component=self.names, verdict=self.verdicts, p_value=self.p_value, adjusted=self.adjusted,
            chi_square=self.chi_square, coverage_90=share, coverage_90_data_stderr=error,
        )  # fmt: skip

    def plot(self, ax: Any = None) -> Any:
        """The ranks of the worst components, as a figure."""
        worst = self.adjusted.argsort()[:8].tolist()
        return plots.rank_histogram(self.ranks[:, worst], self.num_samples, names=[self.names[i] for i in worst], ax=ax)

    def _folded(self) -> Tensor:
        return ((2 * self.ranks - self.num_samples).abs() - 1) // 2

    def __str__(self) -> str:
        size, count = self.ranks.shape
        head = f"SBC on {size} simulated data, {self.num_samples} draws each"
        which = f"{count} component{'s' if count > 1 else ''}, level {self.level:g}, Holm's correction"
        smallest = f"smallest adjusted p = {self.adjusted.min().item():.2g}"
        if self.calibrated:
            return f"{head}: calibrated as far as it sees ({smallest} of {which})"
        share, error = self.covered()
        worst = [i for i in self.adjusted.argsort().tolist() if not self.passed[i]]
        shown = listed([
            f"{self.names[i]} {self.verdicts[i]} (p = {self.adjusted[i]:.2g}, 90 % intervals cover "
            f"{100 * share[i]:.1f} ± {100 * error[i]:.1f} %)"
            for i in worst
        ], 5, "; ")  # fmt: skip
        return f"{head}: not calibrated, {len(worst)} of {which}: {shown}"


@of_pair
def sbc(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 99,
    num_data: int = 1000,
    level: float = 0.95,
    observed: Mapping[str, int] | None = None,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Calibration:
    """Simulation-based calibration of the guide: are true latents uniform among its draws?

    Args:
        data: Serve for their shape, and for what the model conditions on; gone through again where there are fewer.
        num_samples: L, an odd number of draws for each.
        num_data: N, how many (z, x) to simulate.
        level: Of the tests and bands.
        observed: Which argument each observed site is, by position, as {"x": 0}, where the values do not tell.
        model, guide, seed, device, progress: As for `log_likelihood`.
    Returns:
        Ranks, tests and bands, for every scalar component of every latent site.
    Raises:
        ValueError: N < 2, an even L, a level outside (0, 1); a guide with a point site; a site that equals no
            argument, or several; and all that `particles` refuses.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> guide = Guide(lambda x: dist.Normal(x / 2, 0.5**0.5))
        >>> sbc(model, guide, torch.zeros(100), num_data=500).calibrated
        True
    """
    if num_data < 2:
        raise ValueError(f"got num_data={num_data}, wanted at least two simulated data. Raise it.")
    _check(num_samples, level)
    with sweep(model, guide, data=data, batch_size=num_data, copies=num_samples, seed=seed, device=device,
               progress=progress, title="SBC") as run:  # fmt: skip
        run.expect(num_data)

        def ranked(batch: tuple[Any, ...], truth: dict[str, Tensor]) -> tuple[tuple[str, ...], Tensor]:
            drawn = run.draw(batch, num_samples)
            refuse_points(drawn, ": it claims no uncertainty that could be calibrated")
            components = Components(model, batch)
            z = components.columns({name: truth[name].unsqueeze(0) for name in components.sites})[0]
            draws = components.columns(drawn.latents)
            # Among equals, as of discrete latents, a random rank.
            among = (torch.rand(z.shape, device=z.device) * ((draws == z).sum(0) + 1)).long()
            run.tick(len(z))
            return components.names, (draws < z).sum(0) + among

        names, ranks = zip(*run.simulated(ranked, num_data, observed, again=True), strict=True)
    return calibration(names[0], torch.cat(ranks), num_samples, level=level, seed=seed)


@checked
def calibration(
    names: tuple[str, ...], ranks: Tensor, num_samples: int, *, level: float = 0.95, seed: int | None = None
) -> Calibration:
    """Test ranks for uniformity, wherever they come from.

    Args:
        names: Of the components, (C,).
        ranks: Integers in 0, ..., L, (N, C).
        num_samples: L, odd.
        level: Of the tests and bands.
        seed: Of the simulations that the ranks come from, if any.
    Returns:
        Ranks, tests and bands.
    Raises:
        ValueError: An even L, a level outside (0, 1), ranks out of range or of another shape.
    """
    _check(num_samples, level)
    ranks = ranks.long().cpu()
    if ranks.dim() != 2 or ranks.shape[1] != len(names) or ranks.min() < 0 or ranks.max() > num_samples:
        raise ValueError(
            f"got ranks of shape {tuple(ranks.shape)} for {len(names)} components, wanted (N, {len(names)}) integers "
            f"from 0 to num_samples={num_samples}."
        )
    count, cells = len(ranks), num_samples + 1
    found, null = _statistic(_below(ranks, cells), count, cells), _null(count, cells)
    # The union bound reaches below the resolution of the simulated null.
    p = np.minimum((1 + np.searchsorted(null, found, side="right")) / (1 + len(null)), (cells - 1) * found)
    counts = _histogram(ranks, cells, max(2, min(20, count // 5))).double()
    expected = count / len(counts)
    chi = ((counts - expected).square() / expected).sum(0)
    chi_square = torch.from_numpy(chi2.sf(chi.numpy(), len(counts) - 1))
    p_value, adjusted = torch.from_numpy(p), torch.from_numpy(holm(p))
    return Calibration(names, ranks, num_samples, level, p_value, adjusted, chi_square, seed)


def _histogram(ranks: Tensor, cells: int, num_bins: int) -> Tensor:
    bins = max(d for d in range(1, min(num_bins, cells) + 1) if cells % d == 0)
    return torch.stack([(ranks * bins // cells == b).sum(0) for b in range(bins)])


def _check(num_samples: int, level: float) -> None:
    if num_samples < 1 or num_samples % 2 == 0:
        raise ValueError(
            f"got num_samples={num_samples}, wanted an odd number such as 99, for which central intervals end at draws."
        )
    if not 0 < level < 1:
        raise ValueError(f"got level={level}, wanted a probability such as 0.95.")


def _below(ranks: Tensor, cells: int) -> np.ndarray:
    """How many ranks are below i = 1, ..., cells - 1, per component, (C, cells - 1)."""
    counts = torch.stack([torch.bincount(column, minlength=cells) for column in ranks.T])
    return counts.cumsum(1)[:, :-1].numpy()


def _statistic(below: np.ndarray, count: int, cells: int) -> np.ndarray:
    """Smallest two-sided binomial tail probability along the last axis."""
    lower, upper = (tail[np.arange(cells - 1), below] for tail in _tails(count, cells))
    return np.minimum(2 * np.minimum(lower, upper), 1).min(-1)


@functools.lru_cache(maxsize=4)
def _tails(count: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """P(n <= m) and P(n >= m) of n ~ Binomial(N, i / cells), (cells - 1, N + 1) each."""
    share, number = np.arange(1, cells)[:, None] / cells, np.arange(count + 1)
    return binom.cdf(number, count, share), binom.sf(number - 1, count, share)


@functools.lru_cache(maxsize=4)
def _null(count: int, cells: int) -> np.ndarray:
    """Sorted statistics of so many uniform ranks."""
    counts = np.random.default_rng(0).multinomial(count, np.full(cells, 1 / cells), size=_NULL_DRAWS)
    return np.sort(_statistic(counts.cumsum(1)[:, :-1], count, cells))


def _bands(ranks: Tensor, cells: int, level: float) -> Bands:
    """Curves of the share of ranks below each value; Bonferroni over the components."""
    count, size = ranks.shape
    alpha = (1 - level) / size
    null = _null(count, cells)
    place = math.floor(alpha * len(null)) - 1
    # Too rare for the simulated null: the union bound over the points is wider, and valid.
    tail = null[place] if place >= 10 else alpha / (cells - 1)
    share = np.arange(1, cells) / cells
    lower = binom.ppf(tail / 2, count, share)
    lower = np.where(2 * binom.cdf(lower, count, share) < tail, lower + 1, lower)
    upper = binom.isf(tail / 2, count, share)
    upper = np.where(2 * binom.sf(upper - 1, count, share) < tail, upper - 1, upper)
    curves = share, _below(ranks, cells).T / count, lower / count, upper / count
    nominal, empirical, low, high = map(torch.from_numpy, curves)
    return Bands(nominal, empirical, low, high, level)
