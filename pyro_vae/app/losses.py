"""From the words of a configuration to the loss that `fit` minimises, and which combinations of parts train with it."""

from __future__ import annotations

import inspect
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from pyro.infer import TraceMeanField_ELBO
from tqdm import tqdm

from pyro_vae.app import serving
from pyro_vae.app.defaults import CHOICES, FitOptions, option
from pyro_vae.evaluation import evaluating
from pyro_vae.inference.batches import seeded
from pyro_vae.inference.bounds import Bound, ciwae, elbo, iwae, miwae, reconstruction, renyi, vr_max
from pyro_vae.inference.objectives import Objective, default_loss
from pyro_vae.inference.regularizers import Regularizer, free_bits, mmd, total_correlation
from pyro_vae.inference.split_bounds import cubo, piwae, wake_sleep
from pyro_vae.inference.training import fit
from pyro_vae.parameters import device_of
from pyro_vae.parts import names
from pyro_vae.programs.vae import VAE
from pyro_vae.protocols import closed_form_kl, has_density
from pyro_vae.traces import sites

_BOUNDS: dict[str, Bound] = {"elbo": elbo, "iwae": iwae, "vr-max": vr_max}
# A bound with a parameter, and the value it has where none is given.
_FACTORIES: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "renyi": (renyi, {"alpha": 0.5}),
    "miwae": (miwae, {"num_groups": 5}),
    "ciwae": (ciwae, {"beta": 0.5}),
    "piwae": (piwae, {"num_groups": 5}),
    "cubo": (cubo, {"n": 2.0}),
    "wake-sleep": (wake_sleep, {}),
}
_REGULARIZERS: dict[str, Callable[[float], Regularizer]] = {
    "mmd": mmd,
    "total-correlation": total_correlation,
    "free-bits": free_bits,
}


def the_loss(options: FitOptions, vae: Any) -> Any:
    """The loss of a configuration: Pyro's own ELBO unless something else was asked for.

    With one sample and a posterior whose KL to the prior has a closed form, that is the one which uses it: same bound,
    less noise. After 14 epochs on MNIST it is 3 nats ahead of the sampled KL. What does not go together is a
    ValueError.
    """
    if (only := serving.face(vae).loss(vae)) is not None:
        return only
    if options.model == "vae" and not has_density(vae.guide.posterior):
        return Objective(reconstruction)
    plain = options.bound == "elbo" and options.num_samples == 1 and not options.regularizers and options.beta == 1
    if plain and options.estimator == "reparameterized":
        if options.model == "hierarchical":
            return default_loss(vae.guide)  # the divergence of the last level in closed form
        if _has_closed_form(vae):
            return TraceMeanField_ELBO()
    regularizers = [_REGULARIZERS[name](weight) for name, weight in options.regularizers.items()]
    return Objective(
        the_bound(options.bound, options.bound_options), options.num_samples, estimator=options.estimator,
        beta=options.beta, regularizers=regularizers,
    )  # fmt: skip


def _has_closed_form(vae: Any) -> bool:
    """Whether torch knows KL(q(z | x) || p(z)) of the pair."""
    assert vae.architecture is not None
    x = torch.zeros(2, *vae.architecture.x_shape, device=device_of(vae))
    face = serving.face(vae)
    model, guide = face.programs(vae)
    with evaluating(model, guide):
        q, p = (sites(program, *face.batch(x))["z"]["fn"] for program in (guide, model))
        return closed_form_kl(q, p) is not None


def the_bound(name: str, options: Mapping[str, Any]) -> Bound:
    """A bound by its name on the command line, such as "renyi", with its parameters, such as {"alpha": 0.5}.

    A parameter that it does not have, or a value that it cannot have, is a ValueError.

    Example:
        >>> the_bound("iwae", {}).__name__, the_bound("renyi", {"alpha": 0.3}).__name__
        ('iwae', 'renyi(0.3)')
    """
    factory, defaults = _FACTORIES.get(name, (None, {}))
    known = [] if factory is None else list(inspect.signature(factory).parameters)
    for key in options:
        if key not in known:
            raise ValueError(
                f"got {option('bound_options')} {key} for the bound {name}, which has {', '.join(known) or 'none'}."
            )
    return _BOUNDS[name] if factory is None else factory(**defaults | dict(options))


NUM_SAMPLES = 10
_SHAPE = (1, 4, 4)


class Outcome(NamedTuple):
    """What became of one combination, by the names of its parts: "trains", "refused" or "fails", and why."""

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
    """Train one step of every posterior x bound x estimator, or of those named, on a small pair.

    One trains if every parameter of the guide that it can move has moved and the loss is a number; it is refused by a
    ValueError; anything else fails.
    """
    wanted = list(_product(posteriors, bounds, estimators))
    quiet = None if progress is None else not progress
    return [_tried(*combination) for combination in tqdm(wanted, disable=quiet, unit="combination")]


def _product(*given: Sequence[str] | None) -> Iterator[tuple[str, ...]]:
    dense = [name for name in names.PARTS["posterior"] if has_density(names.find("posterior", name))]
    known = (dense, CHOICES["bound"], CHOICES["estimator"])
    return itertools.product(*(k if g is None else g for g, k in zip(given, known, strict=True)))


def _tried(posterior: str, bound: str, estimator: str) -> Outcome:
    def outcome(result: str, reason: str = "") -> Outcome:
        return Outcome(posterior, bound, estimator, result, reason)

    with seeded(0), warnings.catch_warnings(), pyro.get_param_store().scope():
        warnings.simplefilter("ignore")
        x = (torch.rand(8, *_SHAPE) < 0.5).float()
        vae = VAE.build(_SHAPE, latent_dim=3, hidden=(8,), posterior=posterior, prior=names.prior_for(posterior))
        before = {name: p.detach().clone() for name, p in vae.named_parameters()}
        try:
            loss = Objective(the_bound(bound, {}), NUM_SAMPLES, estimator=estimator)
            history = fit(vae.model, vae.guide, x, loss=loss, epochs=1, batch_size=8, progress=False)
        except ValueError as refusal:
            return outcome("refused", str(refusal))
        except Exception as failure:  # a table of everything shows its own holes
            return outcome("fails", f"{type(failure).__name__}: {failure}")
        still = [name for name, p in vae.guide.named_parameters() if torch.equal(p, before[f"guide.{name}"])]
        if still or not math.isfinite(history["loss"][-1]):
            return outcome("fails", f"{still[0]} did not move" if still else "the loss is not a number")
    return outcome("trains")


def table(outcomes: Sequence[Outcome]) -> str:
    """A line for each posterior and estimator, a column for each bound; the reasons below.

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
