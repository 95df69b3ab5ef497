"""Guides compared on one and the same posterior.

With the model frozen, p(z | x) is the same for all guides, and what differs is the approximation:

    log p(x) - ELBO_q(x) = KL(q(z | x) || p(z | x))
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_vae import plots
from pyro_vae.evaluation import at_rest, unmoved
from pyro_vae.inference.capture import leaves_of
from pyro_vae.inference.records import History
from pyro_vae.inference.training import fit
from pyro_vae.inference.trees import joined
from pyro_vae.judging.contenders import bound_values, bounds_at, groups_of, interval, pooled
from pyro_vae.judging.quotes import aligned, latex
from pyro_vae.judging.results import Mean, Result, gap_bar, known, row
from pyro_vae.judging.sweeps import sweep
from pyro_vae.judging.weights import Scored, khat_ok, pool, rescores, score
from pyro_vae.options import of_model, of_pair
from pyro_vae.parameters import own_parameters
from pyro_vae.randomness import forked
from pyro_vae.reach import modules_of
from pyro_vae.sites import sample_sites
from pyro_vae.traces import Program


@of_pair  # type: ignore[arg-type]  # mypy joins no names with **options
def fit_guide(model: Program, guide: Program, data: Any, *, loss: Any = None, **options: Any) -> History:
    """Fit a guide under a frozen model, so that guides are compared on one posterior.

    The model's parameters (and what the guide shares with them) get no gradient, its modules stay in evaluation mode,
    and its flags, modes and buffers come back as they were, also after an error. (A module that model and guide are
    both methods of is left in evaluation mode, as by `fit`.)

    Args:
        loss: A Pyro ELBO or an `Objective`; those that raise a bound of the guide.
        options: Those of `fit`: epochs, learning_rate, seed, ...
        model, guide, data: As for `fit`: the model trained, the guide to be trained in place.
    Returns:
        The history.
    Raises:
        ValueError: The guide has nothing to train, and all that `fit` refuses.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro_vae import Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> net = nn.Linear(1, 1)
        >>> def guide(x):
        ...     pyro.module("net", net)
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 0.5**0.5))
        >>> x = torch.randn(256, generator=torch.Generator().manual_seed(0))
        >>> _ = fit_guide(model, guide, x, epochs=200, learning_rate=0.02, seed=0)
        >>> abs(net.weight.item() - 0.5) < 0.05   # the posterior's mean is x / 2
        True
    """
    place = options.get("device")
    for owner in modules_of(model, guide) if place is not None else []:
        owner.to(place)
    with sweep(model, guide, data=data, batch_size=min(options.get("batch_size", 128), 8), device=place) as run:
        batch = run.first
    with frozen(model, guide, batch):
        return fit(model, guide, data, loss=loss, **options)


@contextlib.contextmanager
def frozen(model: Program, guide: Program, args: tuple[Any, ...]) -> Iterator[None]:
    """The model without gradients, so that `fit` keeps its modules in evaluation mode, and its buffers as they were.

    It is run once with a batch to see what it reads. The guide may be a method of the same module.
    """
    mine, theirs = modules_of(model), _parts(modules_of(guide))
    tensors: dict[int, Tensor] = {id(p): p for module in mine if id(module) not in theirs for p in module.parameters()}
    with at_rest(mine), unmoved([]) as ran, own_parameters(model, guide), forked():
        tensors |= {id(leaf): leaf for leaf in _leaves(model, args)}
    flags = [(tensor, tensor.requires_grad) for tensor in tensors.values()]
    try:
        for tensor, _ in flags:
            tensor.requires_grad_(False)
        still = _parts(part for module in mine for part in _frozen_parts(module))
        # What has no parameters, such as dropout, belongs to the model where it alone runs it.
        alive = _parts(module for reference in ran if (module := reference()) is not None)
        rest = {k: m for k, m in alive.items() if k not in still and not any(p.requires_grad for p in m.parameters())}
        if rest:
            with unmoved(modules_of(guide)), unmoved([]) as seen, own_parameters(model, guide):
                with forked(), torch.no_grad():
                    poutine.trace(guide).get_trace(*args)
                again = _parts(module for reference in seen if (module := reference()) is not None)
            still |= {key: part for key, part in rest.items() if key not in again}
        with at_rest(still.values()):
            yield
        for module in mine:
            if id(module) not in still:  # the guide's as well, and so as `fit` leaves it
                module.eval()
    finally:
        for tensor, flag in flags:
            tensor.requires_grad_(flag)


def _parts(modules: Iterable[nn.Module]) -> dict[int, nn.Module]:
    """All modules in some, by identity."""
    return {id(part): part for module in modules for part in module.modules()}


def _frozen_parts(module: nn.Module) -> list[nn.Module]:
    """The outermost modules in it none of whose parameters learns."""
    flags = [p.requires_grad for p in module.parameters()]
    return [module] if flags and not any(flags) else [part for c in module.children() for part in _frozen_parts(c)]


def _leaves(model: Program, args: tuple[Any, ...]) -> Iterable[Tensor]:
    """The tensors with gradients that a model's log density is computed from."""
    with torch.enable_grad():
        trace = poutine.trace(model).get_trace(*args)
        scores = [site["fn"].log_prob(site["value"]).sum() for site in sample_sites(trace)]
        return leaves_of(sum(scores, torch.zeros(())))


@dataclass(frozen=True)
class GuideScore:
    """One guide on a given posterior, or several under one name, averaged over data, in nats.

    Attributes:
        elbo: The ELBO.
        log_likelihood: log p(x) by importance sampling from this guide alone.
        gap: log p(x) - ELBO = KL(q || p(z | x)), with the log p(x) common to all guides.
        pareto_k: k-hat per datum of its weights, (N,); of several guides (m N,).
        bounds: Other bounds, by name and K, such as "iwae 50".
        intervals: 95 % intervals of "elbo", "gap" and the other bounds (see `pyro_vae.judging.contenders`).
        num_guides: How many were pooled.
    """

    elbo: Mean
    log_likelihood: Mean
    gap: Mean
    pareto_k: Tensor
    bounds: dict[str, Mean] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    num_guides: int = 1


@dataclass(frozen=True)
class Comparison(Result):
    """Guides of one frozen model, side by side.

    Attributes:
        scores: Per guide, or per group of guides.
        log_likelihood: log p(x) common to all.
        source: Where it is from.
        num_samples: K.
    """

    scores: dict[str, GuideScore]
    log_likelihood: Mean
    source: str
    num_samples: int

    def difference(self, first: str, second: str) -> Mean:
        """The ELBO of the first guide minus that of the second, paired by datum."""
        a, b = (known("guide", name, self.scores).elbo for name in (first, second))
        variance = a.pointwise_stderr.square() + b.pointwise_stderr.square()
        return Mean.of(a.pointwise - b.pointwise, variance, self.num_samples)

    def rows(self) -> list[dict[str, Any]]:
        """One for each guide: the numbers with their errors, and the ends of the intervals."""
        found = []
        for name, one in self.scores.items():
            line = {"guide": name} | row(one) | {"khat_ok": khat_ok(one.pareto_k, self.num_samples)}
            for label, mean in one.bounds.items():
                line |= {label: mean.value, f"{label}_mc_stderr": mean.mc_stderr}
            for label, (low, high) in one.intervals.items():
                line |= {f"{label}_low": low, f"{label}_high": high}
            found.append(line)
        return found

    def plot(self, ax: Any = None) -> Any:
        """The gap of each guide, as a figure, or drawn into `ax`."""
        return plots.gap_bars([gap_bar(name, (None, None), one.gap) for name, one in self.scores.items()], ax)

    def to_latex(self) -> str:
        """What is printed, in LaTeX with the rules of booktabs."""
        return latex(self._lines())

    def __str__(self) -> str:
        count = len(self.log_likelihood.pointwise)
        head = f"{count} data, one frozen model: log p(x) {self.log_likelihood.signed} nats ({self.source})"
        pooled = max(one.num_guides for one in self.scores.values()) > 1
        foot = ["[ , ]: 95 % over guides of other seeds, or 2 Monte Carlo errors of one guide"] if pooled else []
        return "\n".join([head, *aligned(self._lines()), *foot])

    def _lines(self) -> list[list[str]]:
        best = max(self.scores, key=lambda name: self.scores[name].elbo.value)
        others = list(next(iter(self.scores.values())).bounds)
        several = any(one.num_guides > 1 for one in self.scores.values())
        lines = [["guide", "ELBO", *others, "log p(x) from it", "gap", "behind the best", "k̂ ok"]]
        for name, one in self.scores.items():
            behind = self.difference(best, name)
            away = "" if name == best else f"{behind.value:.2f} ± {behind.data_stderr:.2f}"
            ok = khat_ok(one.pareto_k, self.num_samples)
            shown = {"elbo": one.elbo, "gap": one.gap} | one.bounds
            cells = {key: f"{mean.value:.2f} [{one.intervals[key][0]:.2f}, {one.intervals[key][1]:.2f}]"
                     if several and not mean.bound else str(mean) for key, mean in shown.items()}  # fmt: skip
            called = name if one.num_guides == 1 else f"{name} (of {one.num_guides})"
            lines.append([called, cells["elbo"], *(cells[key] for key in others), str(one.log_likelihood),
                          cells["gap"], away, f"{100 * ok:.0f} %" if ok == ok else "?"])  # fmt: skip
        return lines


@of_model
def compare_guides(
    model: Program,
    guides: Any,
    data: Any,
    *,
    bounds: Mapping[Any, Any] | None = None,
    num_samples: int = 1000,
    log_likelihood: Any = None,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Comparison:
    """Compare guides of one model: ELBO, other bounds, log p(x) and gap of each, with paired differences.

    All gaps are measured from one log p(x): the one given, or the pooled estimate of `pyro_vae.judging.weights`.

    Args:
        guides: By name, or in a list; a guide, or a pair with this model, which stands for its guide. A list of them
            under one name, such as one family fitted from several seeds, is pooled.
        bounds: Other bounds, and the K or several at which they are wanted: ``{"iwae": (5, 50)}``, by name or bound.
        num_samples: K, samples per datum and guide.
        log_likelihood: An estimate of log p(x) of these data, such as that of `ais`.
        model, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        The scores with their intervals, printed as a table.
    Raises:
        ValueError: No guide, or K < 2; and all that `particles` refuses.
    Example:
        >>> import math, pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> exact, wide = (Guide(lambda x, s=s: dist.Normal(x / 2, s)) for s in (0.5**0.5, 1.0))
        >>> found = compare_guides(model, {"exact": exact, "wide": wide}, torch.zeros(8), num_samples=2000)
        >>> abs(found.scores["wide"].gap.value - (1 - math.log(2)) / 2) < 0.03   # KL(N(0, 1) || N(0, 1/2))
        True
    """
    groups, wanted = groups_of(guides, model), bounds_at(bounds)
    if num_samples < 2:
        raise ValueError(
            f"got {len(groups)} guides and num_samples={num_samples}, wanted at least one guide and two samples."
        )
    every = {name: guide for group in groups.values() for name, guide in group.items()}
    options: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    with sweep(model, *every.values(), data=data, title="guides", **options) as run:
        alike = [name for name, guide in every.items() if rescores(model, guide, run.first)]
        nesting = {name: run.nesting(guide) for name, guide in every.items()}
        scores, mixed = joined(run.each(lambda batch: score(model, every, alike, batch, num_samples, nesting)))
    best, source = pool(scores, mixed, alike, log_likelihood)
    others = bound_values(wanted, num_samples, model, every, data, options) if wanted else {}

    def log_p(scored: Scored, less: Tensor | float = 0.0, variance: Tensor | float = 0.0) -> Mean:
        below = scored.kind(num_samples) == "lower bound"
        return Mean.of(scored.log_p - less, scored.log_p_variance + variance, num_samples, bound=below)

    rows: dict[str, GuideScore] = {}
    for name, members in groups.items():
        own = [scores[member] for member in members]
        numbers = {
            "elbo": [Mean.of(s.elbo, s.elbo_variance, num_samples) for s in own],
            "log_likelihood": [log_p(s) for s in own],
            "gap": [log_p(best, s.elbo, s.elbo_variance) for s in own],
        } | {label: [each[member] for member in members] for label, each in others.items()}
        means = {key: each[0] if len(each) == 1 else pooled(each) for key, each in numbers.items()}
        intervals = {key: interval(each) for key, each in numbers.items() if key != "log_likelihood"}
        rows[name] = GuideScore(
            means["elbo"], means["log_likelihood"], means["gap"], torch.cat([s.pareto_k for s in own]),
            {label: means[label] for label in others}, intervals, len(own),
        )  # fmt: skip
    return Comparison(rows, log_p(best), source, num_samples)
