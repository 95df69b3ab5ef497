"""Which combinations of parts train, and why the others are refused."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from tqdm import tqdm

from pyro_vae.app.defaults import CHOICES
from pyro_vae.app.losses import bound as the_bound
from pyro_vae.inference.batches import seeded
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.training import fit
from pyro_vae.parts import names
from pyro_vae.programs.vae import VAE
from pyro_vae.protocols import has_density

NUM_SAMPLES = 10
_SHAPE = (1, 4, 4)


class Outcome(NamedTuple):
    """What became of one combination.

    Attributes:
        posterior: Its name.
        bound: Its name.
        estimator: Its name.
        result: "trains", "refused" or "fails".
        reason: The message of a refusal or a failure.
    """

    posterior: str
    bound: str
    estimator: str
    result: str
    reason: str = ""


def combinations(
    posteriors: Sequence[str] | None = None,
    bounds: Sequence[str] | None = None,
    estimators: Sequence[str] | None = None,
    *,
    progress: bool | None = None,
) -> list[Outcome]:
    """Train one step of every posterior x bound x estimator on a small pair.

    A combination trains if every parameter of the guide that it can move has moved and
    the loss is a number; it is refused by a ValueError; anything else fails.

    Args:
        posteriors: Names; all that have a density if None.
        bounds: Names; all if None.
        estimators: Names; all if None.
        progress: Show a bar; None shows it on a terminal only.
    Returns:
        One outcome for each.
    """
    wanted = list(_product(posteriors, bounds, estimators))
    quiet = None if progress is None else not progress
    return [_tried(*combination) for combination in tqdm(wanted, disable=quiet, unit="combination")]


def _product(*given: Sequence[str] | None) -> Iterator[tuple[str, str, str]]:
    dense = [name for name in names.PARTS["posterior"] if has_density(names.find("posterior", name))]
    known = (dense, CHOICES["bound"], CHOICES["estimator"])
    chosen = [list(k) if g is None else list(g) for g, k in zip(given, known, strict=True)]
    for posterior in chosen[0]:
        for bound in chosen[1]:
            for estimator in chosen[2]:
                yield posterior, bound, estimator


def _tried(posterior: str, bound: str, estimator: str) -> Outcome:
    tried = posterior, bound, estimator
    with seeded(0), warnings.catch_warnings(), pyro.get_param_store().scope():
        warnings.simplefilter("ignore")
        x = (torch.rand(8, *_SHAPE) < 0.5).float()
        prior = names.prior_for(posterior)
        vae = VAE.build(_SHAPE, latent_dim=3, hidden=(8,), posterior=posterior, prior=prior)
        before = {name: p.detach().clone() for name, p in vae.named_parameters()}
        try:
            loss = Objective(the_bound(bound, {}), NUM_SAMPLES, estimator=estimator)
            history = fit(vae.model, vae.guide, x, loss=loss, epochs=1, batch_size=8, progress=False)
        except ValueError as refusal:
            return Outcome(*tried, "refused", str(refusal))
        except Exception as failure:  # a table of everything shows its own holes
            return Outcome(*tried, "fails", f"{type(failure).__name__}: {failure}")
        still = [name for name, p in vae.guide.named_parameters() if torch.equal(p, before[f"guide.{name}"])]
        if still or not math.isfinite(history["loss"][-1]):
            return Outcome(*tried, "fails", f"{still[0]} did not move" if still else "the loss is not a number")
    return Outcome(*tried, "trains")


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each posterior and estimator, a column for each bound; the reasons below.

    Args:
        outcomes: From `combinations`.
    Example:
        >>> print(table([Outcome("full", "iwae", "score-function", "trains")]))
                              iwae
        full  score-function  yes
        <BLANKLINE>
        1 of 1 train, 0 are refused, 0 fail.
    """
    bounds = list(dict.fromkeys(o.bound for o in outcomes))
    found = {(o.posterior, o.estimator, o.bound): o for o in outcomes}
    reasons: dict[str, int] = {}
    rows = [["", "", *bounds]]
    for posterior, estimator in dict.fromkeys((o.posterior, o.estimator) for o in outcomes):
        cells = []
        for name in bounds:
            outcome = found.get((posterior, estimator, name))
            if outcome is None or outcome.result == "trains":
                cells.append("" if outcome is None else "yes")
            else:
                number = reasons.setdefault(f"{outcome.result}: {outcome.reason}", len(reasons) + 1)
                cells.append(f"{'no' if outcome.result == 'refused' else 'FAILS'} [{number}]")
        rows.append([posterior, estimator, *cells])
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts = {result: sum(o.result == result for o in outcomes) for result in ("trains", "refused", "fails")}
    lines += ["", *(f"[{number}] {reason}" for reason, number in reasons.items())]
    lines += [""] * bool(reasons)
    summary = f"{counts['trains']} of {len(outcomes)} train, {counts['refused']} are refused, {counts['fails']} fail."
    return "\n".join([*lines, summary])


def as_records(outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """As plain data, for ``--json``."""
    return [outcome._asdict() for outcome in outcomes]
