"""What is compared: guides as people hold them, by name and in groups, and any bound of each at any K.

The number of a group, such as one family fitted from several seeds, is the mean of its m guides, and its interval that
of a family fitted from another seed, mean +- t(m - 1) s / sqrt(m) with s their standard deviation. One guide alone has
the interval of its Monte Carlo error, two standard errors, which says nothing of other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.inference.bounds import Bound, named
from pyro_vae.inference.objectives import Objective
from pyro_vae.judging.results import Mean
from pyro_vae.judging.sweeps import sweep
from pyro_vae.options import integer, is_pair
from pyro_vae.traces import Program

Groups = dict[str, dict[str, Program]]  # name of the group -> name of the guide -> guide
LEVEL = 0.95
_DRAWS = (4, 100)  # at least and at most so many draws of a bound


def groups_of(guides: Any, model: Program) -> Groups:
    """Guides by the name of their group and by names of their own: of a guide (or a pair in one piece, for its guide),
    of a list of them, called by what they are, or of a mapping from names to them or to lists of them, the groups.

    Raises:
        ValueError: No guide; something that is none; a pair with a model of its own.
    Example:
        >>> def one(x): ...
        >>> def two(x): ...
        >>> groups_of([one, two], print).keys(), groups_of({"both": [one, two]}, print)["both"].keys()
        (dict_keys(['one', 'two']), dict_keys(['both #1', 'both #2']))
    """
    if not isinstance(guides, Mapping):
        listed = _list(guides)
        called = [_called(each) for each in listed]
        guides = {
            name if called.count(name) == 1 else f"{name} {called[: i + 1].count(name)}": each
            for i, (name, each) in enumerate(zip(called, listed, strict=True))
        }
    found: Groups = {}
    for name, given in guides.items():
        members = [_guide(model, f"{name}", each) for each in _list(given)]
        many = len(members) > 1
        found[str(name)] = {f"{name} #{i + 1}" if many else str(name): each for i, each in enumerate(members)}
    if not found or not all(found.values()):
        raise ValueError(f"got {len(found)} guides, wanted at least one in each place. Pass {{'name': guide}}, say.")
    return found


def _list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _called(guide: Any) -> str:
    """What a guide is called by: its family where it has one, else what it is."""
    guide = guide.guide if is_pair(guide) else guide
    family = getattr(guide, "posterior", None)
    return getattr(guide, "__name__", None) or type(guide if family is None else family).__name__


def _guide(model: Program, name: str, given: Any) -> Program:
    if is_pair(given):
        if getattr(given, "model", None) != model:
            raise ValueError(
                f"got the pair {name!r} with a model of its own, wanted guides of the one model that they are compared "
                "under. Pass its guide, vae.guide, if you mean that, fitted by fit_guide(model, vae.guide, data)."
            )
        given = given.guide
    elif not callable(given):
        raise ValueError(
            f"got {type(given).__name__} as the guide {name!r}, wanted a guide, a pair, or a list of either."
        )
    found: Program = given
    return found


def bounds_at(bounds: Any) -> dict[str, tuple[Bound, int]]:
    """Bounds at numbers of samples, ``{"iwae": (5, 50), renyi(0.5): 5}``, by what they are called.

    Raises:
        ValueError: No such bound, or no number of samples.
    Example:
        >>> list(bounds_at({"IWAE": (5, 50)}))
        ['iwae 5', 'iwae 50']
    """
    found: dict[str, tuple[Bound, int]] = {}
    for given, counts in dict(bounds or {}).items():
        for count in counts if isinstance(counts, Sequence) else [counts]:
            objective = Objective(given, integer("num_samples", count))
            if objective.upper:
                raise ValueError(
                    f"got the bound {given!r}, which is one from above, wanted one that is higher where "
                    "the guide is better, such as iwae."
                )
            bound = named(given) if isinstance(given, str) else given
            label = getattr(bound, "__name__", repr(bound))
            found[f"{label} {count}"] = (bound, count)
    return found


def bound_values(
    bounds: Mapping[str, tuple[Bound, int]], total: int, model: Program, guides: Mapping[str, Program], data: Any,
    options: Mapping[str, Any],
) -> dict[str, dict[str, Mean]]:  # fmt: skip
    """Each bound of each guide, its mean over about total / K draws of K samples, and its error: by bound, by guide."""
    most = max((count for _, count in bounds.values()), default=1)
    with sweep(model, *guides.values(), data=data, copies=most, title="bounds", **options) as run:

        def drawn(batch: tuple[Any, ...], guide: Program, bound: Bound, count: int) -> tuple[Tensor, Tensor]:
            draws = min(max(total // count, _DRAWS[0]), _DRAWS[1])
            values = torch.stack([bound(run.draw(batch, count, guide)).double() for _ in range(draws)])
            return values.mean(0), values.var(0) / draws

        parts = run.each(
            lambda batch: [[drawn(batch, guide, *each) for each in bounds.values()] for guide in guides.values()]
        )
    found: dict[str, dict[str, Mean]] = {label: {} for label in bounds}
    for i, name in enumerate(guides):
        for j, (label, (_, count)) in enumerate(bounds.items()):
            mean, variance = (torch.cat(column) for column in zip(*(part[i][j] for part in parts), strict=True))
            found[label][name] = Mean.of(mean, variance, count)
    return found


def pooled(members: Sequence[Mean]) -> Mean:
    """The mean of several guides' numbers on the same data."""
    count = len(members)
    variance = torch.stack([each.pointwise_stderr.square() for each in members]).sum(0) / count**2
    bound, values = any(each.bound for each in members), torch.stack([each.pointwise for each in members]).mean(0)
    return Mean.of(values, variance, members[0].num_samples, bound=bound)


def interval(members: Sequence[Mean]) -> tuple[float, float]:
    """The interval of a group's number (see the module)."""
    values = torch.tensor([each.value for each in members], dtype=torch.float64)
    middle, count, half = values.mean().item(), len(members), 2 * members[0].mc_stderr
    if count > 1:
        from scipy.stats import t

        half = float(t.ppf((1 + LEVEL) / 2, count - 1)) * values.std().item() / math.sqrt(count)
    return middle - half, middle + half
