"""A laboratory for gradient estimators: bias, variance, signal-to-noise and cost at a frozen state.

At fixed parameters and data, an estimator's gradient g of a K-sample bound L_K is a random vector. With R independent
draws of it, and a reference r of the mean gradient of the *same* L_K,

    bias^2 = |E g - E r|^2     variance = mean over parameters of Var(g_p)     SNR = |E g| / sqrt(tr Cov(g))

The trace of its covariance, by which a square of a noisy mean is too large, is taken off. Whether there is a bias is a
test: the squared distance of the means is then a sum of chi-squares, approximated by a scaled one of its two moments.

References: Rainforth et al., Tighter variational bounds are not necessarily better, 2018.
arXiv:1802.04537. Tucker et al., Doubly reparameterized gradient estimators, 2019. arXiv:1810.04152
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from pyro_vae import plots
from pyro_vae.inference.batches import seeded
from pyro_vae.inference.bounds import Bound, iwae
from pyro_vae.inference.estimators import ESTIMATORS
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.per_datum import Counting, Unit
from pyro_vae.judging.distances import gradient_quality
from pyro_vae.judging.results import Result, row
from pyro_vae.judging.sweeps import Sweep, sweep
from pyro_vae.options import of_pair
from pyro_vae.parameters import trainable
from pyro_vae.randomness import forked
from pyro_vae.sites import lengths
from pyro_vae.traces import Program


@dataclass(frozen=True)
class GradientQuality:
    """One estimator of one bound's gradient, for the encoder's or the decoder's parameters.

    Gradients are those of the bound per datum, in nats per unit of a parameter.

    Attributes:
        estimator: Its name.
        num_samples: K.
        part: "encoder" (the guide's parameters), "decoder" (the model's) or "shared".
        squared_bias: |E g - E r|^2, unbiased, so that it can be slightly negative, and its standard error.
        bias_p_value: Probability of as large a distance from the reference without a bias.
        norm: |E r| of the reference.
        variance: Mean over the parameters of Var(g_p); its standard error is by the bootstrap, as of all that follow.
        snr: |E g| / sqrt(tr Cov(g)).
        parameter_snr: Mean over the parameters of |E g_p| / sd(g_p); without any signal it is sqrt(2 / (pi R)).
        seconds: Median time for one gradient.
        cost: That time, relative to the reparameterised gradient of the same K; nan where that was not run.
    """

    estimator: str
    num_samples: int
    part: str
    squared_bias: float
    squared_bias_stderr: float
    bias_p_value: float
    norm: float
    variance: float
    variance_stderr: float
    snr: float
    snr_stderr: float
    parameter_snr: float
    seconds: float
    cost: float

    @property
    def relative_bias(self) -> float:
        """Size of the bias as a share of the gradient's; 0 where none is seen."""
        return math.sqrt(max(self.squared_bias, 0.0)) / self.norm if self.norm > 0 else math.nan


@dataclass(frozen=True)
class GradientLab(Result):
    """All that was measured, and how.

    Attributes:
        measured: For each K, estimator and part.
        skipped: (estimator, K, reason) of what the bound or the pair does not allow.
        bound: Name of the bound.
        repeats, reference_repeats: R, gradients drawn of each, and of the reference.
        reference: The estimator of the reference.
        num_data: B.
        num_parameters: By part.
        seed: Of the draws.
    """

    measured: tuple[GradientQuality, ...]
    skipped: tuple[tuple[str, int, str], ...]
    bound: str
    repeats: int
    reference: str
    reference_repeats: int
    num_data: int
    num_parameters: dict[str, int]
    seed: int | None

    def rows(self) -> list[dict[str, Any]]:
        return [row(each) | {"relative_bias": each.relative_bias} for each in self.measured]

    def plot(self, ax: Any = None) -> Any:
        """The SNR of each estimator and part against K, a figure; what all estimators have in common is drawn once."""
        counts = sorted({each.num_samples for each in self.measured})
        found = {(f"{each.estimator} ({each.part})", each.num_samples): each for each in self.measured}
        names = dict.fromkeys(name for name, _ in found)
        rows = {name: [found.get((name, count)) for count in counts] for name in names}
        for part in dict.fromkeys(each.part for each in self.measured):
            first, *others = [name for name in rows if name.endswith(f"({part})")]
            pairs = [pair for name in others for pair in zip(rows[first], rows[name], strict=True)]
            if others and all(a and b and math.isclose(a.snr, b.snr, rel_tol=1e-4) for a, b in pairs):
                # The decoder's gradient is the same for all at one noise: one curve, not several over one another.
                rows[f"all ({part})"], *_ = [rows.pop(name) for name in (first, *others)]
        values = {name: [math.nan if r is None else r.snr for r in row] for name, row in rows.items()}
        errors = {name: [math.nan if r is None else r.snr_stderr for r in row] for name, row in rows.items()}
        figure = plots.bounds_by_samples(counts, values, errors, ax=ax)
        ax = figure.axes[0] if ax is None else ax
        ax.set(ylabel="signal-to-noise ratio", yscale="log")
        ax.legend(frameon=False, fontsize=9, loc="best")
        ax.set_title(f"Gradients of {self.bound} by number of samples", loc="left", fontsize=11)
        return figure

    def row(self, estimator: str, num_samples: int, part: str = "encoder") -> GradientQuality:
        """One of what was measured; a ValueError where it was not."""
        known = {(each.estimator, each.num_samples, each.part): each for each in self.measured}
        if (estimator, num_samples, part) not in known:
            raise ValueError(f"got ({estimator!r}, {num_samples}, {part!r}), wanted one of {sorted(known)}.")
        return known[estimator, num_samples, part]

    def slope(self, estimator: str, part: str = "encoder") -> tuple[float, float]:
        """Exponent of K in the SNR by weighted least squares on logarithms, and its error; of two K with a signal."""
        of = [r for r in self.measured if (r.estimator, r.part) == (estimator, part) and r.snr > 0 < r.snr_stderr]
        rows = [(math.log(r.num_samples), math.log(r.snr), (r.snr / r.snr_stderr) ** 2) for r in of]
        if len(rows) < 2:
            raise ValueError(f"got {len(rows)} values of K with an SNR of {estimator!r} ({part}), wanted two or more.")
        x, y, weight = torch.tensor(rows, dtype=torch.float64).T
        centred = x - (weight * x).sum() / weight.sum()
        spread = (weight * centred.square()).sum()
        return ((weight * centred * y).sum() / spread).item(), spread.rsqrt().item()

    def __str__(self) -> str:
        lines = [
            f"gradients of {self.bound} per datum on {self.num_data} data, {self.repeats} draws each; bias against "
            f"{self.reference_repeats} of {self.reference} at the same K",
            f"{'part':8} {'K':>5}  {'estimator':24} {'bias/norm':>9} {'p':>7}  {'variance':>18}  {'SNR':>17}  cost",
        ]
        for r in sorted(self.measured, key=lambda r: (r.part != "encoder", r.part, r.num_samples)):
            lines.append(
                f"{r.part:8} {r.num_samples:5d}  {r.estimator:24} {r.relative_bias:9.3f} {r.bias_p_value:7.2g}  "
                f"{r.variance:8.2e} ± {r.variance_stderr:7.1e}  {r.snr:7.3f} ± {r.snr_stderr:7.3f}  {r.cost:.2f}"
            )
        return "\n".join([*lines, *(f"left out: {name} at K = {k}: {reason}" for name, k, reason in self.skipped)])


@of_pair
def gradient_lab(
    model: Program,
    guide: Program,
    data: Any,
    *,
    estimators: Sequence[str] = ESTIMATORS,
    num_samples: Sequence[int] = (1, 4, 16, 64),
    repeats: int = 100,
    bound: Bound = iwae,
    reference: str | None = None,
    reference_repeats: int | None = None,
    max_parameters: int = 10_000,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> GradientLab:
    """Measure gradient estimators of a bound at the pair's present parameters, which stay as they are.

    The networks are in evaluation mode: what dropout adds to the variance of a training step is no estimator's fault.

    Args:
        data: As for `fit`; all of them are one batch.
        estimators, bound: As for `Objective`; the bound is one that all of them estimate.
        num_samples: Values of K.
        repeats: R, gradients drawn of each; at least 10.
        reference: The unbiased estimator that the others are compared with; None for "reparameterized", or
            "score-function" where samples cannot be reparameterised.
        reference_repeats: Gradients drawn for it; None for four times as many.
        max_parameters: Of a part with more, so many are looked at, picked at random.
        model, guide, seed, device, progress: As for `log_likelihood`.
    Returns:
        Bias, variance, SNR and cost of each estimator for each K, encoder and decoder apart.
    Raises:
        ValueError: An option out of range, a pair without parameters, or no estimator that goes with bound and pair.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vae import Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> encoder = torch.nn.Linear(1, 1)
        >>> def guide(x):
        ...     pyro.module("encoder", encoder)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(encoder(x.unsqueeze(-1)).squeeze(-1), 1.0))
        >>> lab = gradient_lab(model, guide, torch.ones(3), num_samples=(1, 2), repeats=10)
        >>> lab.row("doubly-reparameterized", 2).part
        'encoder'
    """
    _check(estimators, num_samples, repeats, reference)
    far = 4 * repeats if reference_repeats is None else reference_repeats
    with sweep(model, guide, data=data, batch_size=None, seed=seed, device=device, progress=progress,
               title="gradients") as run:  # fmt: skip
        bench = _Bench(run, bound, max_parameters)
        run.expect(len(num_samples) * (len(estimators) * repeats + far))
        truth = reference
        for count in num_samples:
            with seeded(None if seed is None else seed + 1_000_003):
                truth, expected = bench.reference(truth, count, far)
            bench.measure(estimators, count, repeats, expected, seed)
    if not bench.measured:
        raise ValueError("none of the estimators goes with this bound and pair. {0}: {2}".format(*bench.skipped[0]))
    assert truth is not None
    sizes = {name: part.size for name, part in bench.parts.items()}
    found = tuple(bench.measured), tuple(bench.skipped), getattr(bound, "__name__", repr(bound))
    return GradientLab(*found, repeats, truth, far, bench.unit.rows, sizes, seed)


def _check(estimators: Sequence[str], num_samples: Sequence[int], repeats: int, reference: str | None) -> None:
    unknown = [name for name in (*estimators, reference or "reparameterized") if name not in ESTIMATORS]
    if unknown:
        raise ValueError(f"unknown estimator {unknown[0]!r}, wanted one of {', '.join(ESTIMATORS)}.")
    if reference == "sticking-the-landing":
        raise ValueError(f"got reference={reference!r}, which is biased for K > 1, wanted one as 'reparameterized'.")
    if repeats < 10:
        raise ValueError(f"got repeats={repeats}, wanted at least 10 gradients, between which there is a variance.")
    if not estimators or not num_samples:
        raise ValueError("got no estimator or no K, wanted at least one of each.")


class _Part:
    """Parameters of one side, and which of their entries are looked at."""

    def __init__(self, parameters: list[Tensor], most: int) -> None:
        self.parameters, self.size = parameters, sum(p.numel() for p in parameters)
        some = torch.randperm(self.size)[:most].sort().values if self.size > most else None
        self.index = None if some is None else some.to(parameters[0].device)

    def pick(self, gradients: list[Tensor]) -> Tensor:
        flat = torch.cat([g.flatten() for g in gradients])
        return (flat if self.index is None else flat[self.index]).double().cpu()


def _parts(model: Program, guide: Program, args: tuple[Any, ...]) -> dict[str, list[Tensor]]:
    """Trainable tensors by part, as the programs declare and own them."""
    declared = [_declared(guide, args), _declared(model, args)]
    known = {id(p) for side in declared for p in side}
    # A module that holds both programs as methods owns the parameters of both: what they declare comes first.
    guides, models = (
        {id(p): p for p in [*side, *(p for p in trainable(program) if id(p) not in known)]}
        for side, program in zip(declared, (guide, model), strict=True)
    )
    found = {
        "encoder": [p for i, p in guides.items() if i not in models],
        "decoder": [p for i, p in models.items() if i not in guides],
        "shared": [p for i, p in guides.items() if i in models],
    }
    if not any(found.values()):
        raise ValueError(
            "neither model nor guide has parameters, so there is no gradient. Declare them with pyro.param or "
            "pyro.module, or pass modules."
        )
    return {name: side for name, side in found.items() if side}


def _declared(program: Program, args: tuple[Any, ...]) -> list[Tensor]:
    with forked(), torch.no_grad(), poutine.trace(param_only=True) as capture:
        program(*args)
    nodes: Any = capture.trace.nodes.values()
    found = [site["value"].unconstrained() for site in nodes if site["type"] == "param"]
    return list({id(p): p for p in found if p.requires_grad}.values())


class _Bench:
    """A pair at one batch, whose gradients are drawn."""

    def __init__(self, run: Sweep, bound: Bound, max_parameters: int) -> None:
        (self.model, self.guide), self.args, self.bound, self.run = run.programs, run.whole(), bound, run
        self.measured: list[GradientQuality] = []
        self.skipped: list[tuple[str, int, str]] = []
        with seeded(0):
            found = _parts(self.model, self.guide, self.args)
            self.parts = {name: _Part(parameters, max_parameters) for name, parameters in found.items()}
        with forked(), Counting() as counting:  # what a loss of this batch is a multiple of
            trace = poutine.trace(self.guide).get_trace(*self.args)
            poutine.replay(self.model, trace=trace)(*self.args)
        self.unit: Unit = counting.unit(lengths(self.args))

    def reference(self, wanted: str | None, count: int, repeats: int) -> tuple[str, dict[str, Tensor]]:
        """The unbiased estimator, and its gradients."""
        reasons = []
        for name in ("reparameterized", "score-function") if wanted is None else (wanted,):
            try:
                return name, self.draws(name, count, repeats)[0]
            except ValueError as error:
                reasons.append(str(error))
        raise ValueError(f"no unbiased reference gradient exists for this bound and pair: {reasons[0]}")

    def measure(
        self, estimators: Sequence[str], count: int, repeats: int, expected: dict[str, Tensor], seed: int | None
    ) -> None:
        """All estimators at one K, beside the gradients of the reference, each at the same noise."""
        drawn: dict[str, tuple[dict[str, Tensor], float]] = {}
        for estimator in estimators:
            try:
                with seeded(seed):
                    drawn[estimator] = self.draws(estimator, count, repeats)
            except ValueError as error:
                self.skipped.append((estimator, count, str(error)))
        base = drawn["reparameterized"][1] if "reparameterized" in drawn else math.nan
        for estimator, (gradients, seconds) in drawn.items():
            for part, table in gradients.items():
                found = gradient_quality(table, expected[part])
                cost = {"seconds": seconds, "cost": seconds / base}
                self.measured.append(GradientQuality(estimator, count, part, *found, **cost))

    def draws(self, estimator: str, count: int, repeats: int) -> tuple[dict[str, Tensor], float]:
        """Gradients of the bound per datum, (R, P) by part, and the median time of one."""
        objective = Objective(self.bound, count, estimator=estimator)
        leaves = [p for part in self.parts.values() for p in part.parameters]
        found: dict[str, list[Tensor]] = {name: [] for name in self.parts}
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            with torch.enable_grad():
                loss = objective.differentiable_loss(self.model, self.guide, *self.args)
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            given = iter(torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True))
            for name, part in self.parts.items():
                # Bounds go up and losses down; the copy to the CPU waits for the device.
                found[name].append(part.pick([next(given) for _ in part.parameters]) / -self.unit.whole)
            times.append(time.perf_counter() - start)
            self.run.tick()
        return {name: torch.stack(rows) for name, rows in found.items()}, sorted(times)[len(times) // 2]
