"""A pair's draws as ArviZ data: `InferenceData` (ArviZ 0.x) or `DataTree` (1.x), for any pair.

An amortized guide has a posterior per datum, so every group has the dimensions

    posterior          z_k ~ q(z | x)           chain, draw, datum, latent
    prior              z ~ p(z)                 chain, draw, datum, latent
    *_predictive       x ~ p(x | z)             chain, draw, datum, the data's own
    log_likelihood     log p(x | z_k)           chain, draw, datum
    sample_stats       log p(x, z_k), log q(z_k | x), log w_k per draw; k-hat, ESS, log p(x) per datum
    observed_data      x                        datum, the data's own

Draws of a guide are independent, so "chains" are but a partition of them: R-hat is defined and equals 1 up to noise,
and says nothing of how far q(z | x) is from p(z | x); k-hat does. Resampled by their importance weights, each chain
from its own weights only, they are draws from p(z | x) as far as the weights carry it, and there R-hat does tell: where
few weights dominate, the chains disagree.

ArviZ's leave-one-out score is invalid here. It needs parameters that all data share; with one latent per datum, leaving
x out leaves the prior. Held-out log p(x) is the score.
"""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor

from pyro_vae import __version__
from pyro_vae.atomic import write_file
from pyro_vae.judging.components import Scorer, placed
from pyro_vae.judging.results import at_least
from pyro_vae.judging.sweeps import Sweep, chunk_sizes, in_chunks, sweep
from pyro_vae.judging.weights import Scored, pareto_smoothed
from pyro_vae.options import checked, of_pair
from pyro_vae.sites import plates
from pyro_vae.traces import Program, predict, simulate

LOO_IS_INVALID = (
    "az.loo and az.waic are invalid here: every datum has a latent of its own, so leaving x out leaves the prior. "
    "Compare models by log p(x) of held-out data: pyro_vae.log_likelihood(model, guide, x_test)."
)
_EVENTS = {1: ("feature",), 2: ("row", "column"), 3: ("channel", "row", "column")}


@of_pair
def to_arviz(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 1000,
    num_chains: int = 4,
    num_prior: int = 100,
    num_predictive: int = 100,
    resample: bool = False,
    smooth: bool = True,
    coords: Mapping[str, Sequence[Any]] | None = None,
    protocol: Mapping[str, Any] | None = None,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Any:
    """Draws and log densities of a pair as ArviZ data.

    Of as many data as `log_likelihood` takes at a time (38 of 512 numbers or fewer, with 80 samples or more), the draws
    are its own under the same seed. Predictive draws belong to the first posterior draws of each chain.

    Args:
        data: As for `fit`; all of them are one batch, and memory grows with its size times K.
        num_samples: K, guide draws per datum in all chains together.
        num_chains: Chains that the K draws are laid out in; a divisor of K.
        num_prior: Draws from the prior, and of data from it, for each datum.
        num_predictive: Data drawn given posterior draws, in all chains together: as many as fit into it.
        resample: Posterior draws resampled with replacement by their importance weights,
            each chain from its own, instead of draws from the guide.
        smooth: Resample by Pareto-smoothed weights instead of raw ones.
        coords: Coordinates of dimensions, such as {"datum": names}.
        protocol: What the numbers depend on (data, split, binarisation), kept as an attribute.
        model, guide, seed, device, progress: As for `log_likelihood`.
    Returns:
        InferenceData (ArviZ 0.x) or DataTree (1.x). Dimensions are datum; latent (of several
        vector latents ``<site>_latent``); channel, row, column of images, feature of vectors; inner
        plates by their names. One that a site is called like gets the ending ``_index``.
    Raises:
        ValueError: A size out of range, coordinates of the wrong length, a guide without
            density, and all that `particles` refuses.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> prior = dist.Normal(torch.zeros(2), 1.0).to_event(1)
        >>> model = Model(lambda: prior, lambda z: dist.Normal(z, 1.0).to_event(1))
        >>> guide = Guide(lambda x: dist.Normal(x / 2, 0.5**0.5).to_event(1))
        >>> tree = to_arviz(model, guide, torch.zeros(3, 2), num_samples=8, num_prior=5)
        >>> dict(tree["posterior"]["z"].sizes)
        {'chain': 4, 'draw': 2, 'datum': 3, 'latent': 2}

    Reference: Vehtari et al., Pareto Smoothed Importance Sampling, 2024. arXiv:1507.02646
    """
    at_least(1, num_samples=num_samples, num_chains=num_chains, num_prior=num_prior, num_predictive=num_predictive)
    if num_samples % num_chains:
        raise ValueError(
            f"got num_samples={num_samples} in num_chains={num_chains} chains, wanted a multiple of {num_chains}."
        )
    with sweep(model, guide, data=data, batch_size=None, seed=seed, device=device, progress=progress,
               title="ArviZ") as run:  # fmt: skip
        args = run.whole()
        layout = _Layout(Scorer(model, args), coords or {}, num_chains)
        drawn, observed, stats = _drawn(run, args, num_samples, layout)
        index = _resampled(stats["log_weight"].double().cpu(), num_chains, smooth) if resample else None
        latents = {name: layout.chained(name, drawn[name], index) for name in layout.latents}
        kept = min(max(1, num_predictive // num_chains), num_samples // num_chains)
        shown = {name: z[:, :kept].flatten(0, 1).to(drawn[name].device) for name, z in latents.items()}
        predicted = _predicted(model, shown, args, chunk_sizes(args, num_samples)[0])
        simulations = [simulate(model, *args) for _ in range(num_prior)]
    groups = {
        "posterior": {name: z.cpu() for name, z in latents.items()},
        "posterior_predictive": {name: x.unflatten(0, (num_chains, kept)) for name, x in predicted.items()},
        "log_likelihood": {name: layout.chained(None, score, index) for name, score in observed.items()},
        "sample_stats": {name: layout.chained(None, stat, index) for name, stat in stats.items()},
        "prior": {name: torch.stack([s.latents[name] for s in simulations])[None] for name in layout.latents},
        "prior_predictive": {n: torch.stack([s.observations[n] for s in simulations])[None] for n in layout.data},
        "observed_data": {name: layout.sites[name]["value"] for name in layout.data},
    }
    datasets = {name: layout.dataset(name, values) for name, values in groups.items()}
    _add_diagnostics(datasets["sample_stats"], Scored.of(stats["log_weight"]), layout.datum)
    datasets["log_likelihood"].attrs["note"] = LOO_IS_INVALID
    independent = "guide q(z | x), independent: chains are a partition of them"
    resampled = f"guide draws resampled by their {'Pareto-smoothed ' * smooth}importance weights, per chain"
    datasets["posterior"].attrs["draws"] = resampled if resample else independent
    settings = {"num_samples": num_samples, "resampled": int(resample), "seed": "none" if seed is None else seed}
    return _assembled(datasets, _versions(protocol or {}) | settings)


@checked
def save_arviz(tree: Any, path: str | os.PathLike[str]) -> None:
    """Write ArviZ data to a netCDF file, atomically; `az.from_netcdf` reads it back.

    Args:
        tree: What `to_arviz` gave.
        path: The file, replaced if it is there.
    Raises:
        ValueError: No netCDF library is installed, or nothing can be written there.
    """
    # h5netcdf installs without h5py, and cannot work so.
    engines = {"h5netcdf": ("h5netcdf", "h5py"), "netcdf4": ("netCDF4",)}
    engine = next((n for n, needs in engines.items() if all(map(importlib.util.find_spec, needs))), None)
    if engine is None:
        raise ValueError(
            "saving ArviZ data needs a netCDF library, and neither h5netcdf with h5py nor netCDF4 is installed. "
            "Install one: pip install h5netcdf h5py."
        )
    write_file(path, lambda partial: tree.to_netcdf(str(partial), engine=engine))


class _Layout:
    """Which axis of which site is which dimension, and what it is called."""

    def __init__(self, scorer: Scorer, coords: Mapping[str, Sequence[Any]], num_chains: int) -> None:
        self.scorer, self.sites, self.num_chains = scorer, scorer.sites, num_chains
        # A factor has no value to show.
        shown = [name for name, site in self.sites.items() if site["value"].numel()]
        self.latents = [name for name in shown if not self.sites[name]["is_observed"]]
        self.data = [name for name in shown if self.sites[name]["is_observed"]]
        self._known: dict[str, int] = {}
        self.datum = self._name("", "datum", scorer.frame.data_size)
        vectors = [name for name in self.latents if self.sites[name]["fn"].event_dim == 1]
        self.dims: dict[str, list[str]] = {}
        self.axis: dict[str, int] = {}  # that of the data in (*plates, *event)
        for name in self.latents + self.data:
            self.axis[name], batch, event = placed(self.sites[name], scorer.frame.data_dim)
            found = []
            for dim, size in zip(range(-len(batch), 0), batch, strict=True):
                frame = plates(self.sites[name]).get(dim)
                wanted = f"{name}_plate_{-dim}" if frame is None else frame.name
                found.append(self.datum if dim == scorer.frame.data_dim else self._name(name, wanted, size))
            events = tuple(f"{name}_dim_{i}" for i in range(len(event)))
            if name in vectors:
                events = ("latent",) if len(vectors) == 1 else (f"{name}_latent",)
            elif name in self.data:
                events = _EVENTS.get(len(event), events)
            self.dims[name] = found + [self._name(name, e, n) for e, n in zip(events, event, strict=True)]
        for name, values in coords.items():
            if name not in self._known:
                raise ValueError(f"got coordinates of {name!r}, wanted one of the dimensions {list(self._known)}.")
            if len(values) != self._known[name]:
                raise ValueError(
                    f"got {len(values)} coordinates of {name!r}, which has {self._known[name]} places. Give one each."
                )
        self.coords = {name: np.asarray(values) for name, values in coords.items()}

    def _name(self, site: str, wanted: str, size: int) -> str:
        """A name for a dimension that no variable has, and no dimension of another size."""
        if wanted in self.sites or wanted in ("chain", "draw"):
            wanted += "_index"
        if self._known.get(wanted, size) != size:
            wanted = f"{site}_{wanted}"
        self._known[wanted] = size
        return wanted

    def chained(self, name: str | None, values: Tensor, index: Tensor | None) -> Tensor:
        """(K, ...) as (C, S, ...), on the CPU, resampled where there is an index (C, S, B)."""
        values, axis = values.cpu().unflatten(0, (self.num_chains, -1)), 2 if name is None else 2 + self.axis[name]
        if index is None:
            return values
        moved = values.movedim(axis, 2)
        return moved.gather(1, index[(..., *[None] * (moved.dim() - 3))].expand_as(moved)).movedim(2, axis)

    def dataset(self, group: str, values: Mapping[str, Tensor]) -> Any:
        """One group, by ArviZ's own `from_dict`."""
        az, per_datum = _arviz(), group in ("log_likelihood", "sample_stats")
        # netCDF has neither.
        known = {torch.bool: torch.uint8, torch.bfloat16: torch.float32}
        arrays = {n: x.detach().cpu().to(known.get(x.dtype, x.dtype)).numpy() for n, x in values.items()}
        dims = {name: [self.datum] if per_datum else self.dims[name] for name in values}
        with warnings.catch_warnings():
            # As was asked for; the one of ArviZ 0.x, the other of 1.x.
            warnings.filterwarnings("ignore", message="More chains|Found chain dimension to be longer")
            if _is_old(az):
                found = az.from_dict(**{group: arrays}, dims=dims, coords=self.coords)[group]
            else:
                found = az.from_dict({group: arrays}, dims=dims, coords=self.coords)[group].to_dataset()
        for name in arrays if per_datum else ():
            found[name].attrs["units"] = "nats"
        return found


def _drawn(run: Sweep, args: tuple[Any, ...], num_samples: int, layout: _Layout) -> Iterator[dict[str, Tensor]]:
    """Latents, log p(x | z_k) per observed site, and the other log densities, of all K."""
    parts, (model, guide) = [], run.programs
    for table in in_chunks(model, guide, args, num_samples, run.nesting(guide) if num_samples > 1 else 0):
        scores = {name: table.log_likelihood for name in layout.data}
        if len(scores) > 1:
            scores = layout.scorer({name: table.latents[name] for name in table.log_prior})
        stats = {"lp": table.log_joint, "log_weight": table.log_weight}  # refuses a guide without density
        stats["log_q"] = torch.stack(list(table.log_q.values())).sum(0)
        parts.append((table.latents, {name: scores[name] for name in layout.data}, stats))
    for column in zip(*parts, strict=True):
        yield {name: torch.cat([part[name] for part in column]) for name in column[0]}


def _predicted(model: Program, latents: Mapping[str, Tensor], args: tuple[Any, ...], size: int) -> dict[str, Tensor]:
    """x_k ~ p(x | z_k), (K, *plates, *event) per observed site, on the CPU."""
    count = len(next(iter(latents.values())))

    def parts(size: int) -> list[dict[str, Tensor]]:
        starts = range(0, count, size)
        return [predict(model, {name: z[i : i + size] for name, z in latents.items()}, *args) for i in starts]

    try:
        found = parts(size)
    except (RuntimeError, ValueError, IndexError, TypeError, AssertionError):
        found = parts(1)  # it does not broadcast over a leading dimension, as drawing from the guide has warned already
    return {name: torch.cat([part[name].cpu() for part in found]) for name in found[0]}


def _resampled(log_weight: Tensor, num_chains: int, smooth: bool) -> Tensor:
    """For each chain, draw and datum, which draw of that chain, (C, S, B)."""
    found = []
    for weight in log_weight.chunk(num_chains):
        share = (pareto_smoothed(weight)[0] if smooth else weight).log_softmax(0)
        found.append(torch.multinomial(share.exp().T, len(weight), replacement=True).T)
    return torch.stack(found)


def _add_diagnostics(sample_stats: Any, scored: Scored, datum: str) -> None:
    """What the importance weights say of each datum."""
    for name, values, text in (
        ("pareto_k", scored.pareto_k, "Pareto k-hat of the guide's importance weights"),
        ("ess", scored.ess, "effective number of guide draws, (sum w)^2 / sum w^2"),
        ("log_evidence", scored.log_p, "log p(x) by importance sampling, nats"),
    ):
        sample_stats[name] = (datum, values.numpy(), {"long_name": text})


def _versions(protocol: Mapping[str, Any]) -> dict[str, Any]:
    """What every group carries: where it is from, and what its numbers depend on."""
    packages = {"pyro_vae": __version__, "pyro": pyro.__version__, "torch": torch.__version__}
    return {
        "inference_library": "pyro_vae",
        "inference_library_version": __version__,
        "versions": json.dumps(packages | {"arviz": _arviz().__version__}),
        "protocol": json.dumps(dict(protocol), default=str),
        "units": "nats",
    }


def _assembled(groups: Mapping[str, Any], about: Mapping[str, Any]) -> Any:
    for dataset in groups.values():
        dataset.attrs.update(about)
    az = _arviz()
    if _is_old(az):
        return az.InferenceData(attrs=dict(about), **groups)
    import xarray

    tree = xarray.DataTree.from_dict(dict(groups))
    tree.attrs.update(about)
    return tree


def _is_old(az: Any) -> bool:
    return int(az.__version__.split(".")[0]) < 1  # 1.x still answers to the name InferenceData, with a warning


def _arviz() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announcements at import
        import arviz
    return arviz
