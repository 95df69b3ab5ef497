"""All that the page knows of a pair: its decoder, and test data with codes, posteriors, labels and references.

Everything is of the pair in evaluation mode and of data whose noise is drawn for good, so that the page shows one
truth. What is too much for a page, the draws of a flow's posterior say, is kept of the first data only, and the page
says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_vae.app.encoding import codes
from pyro_vae.app.explore.decoder import TOLERANCE, described, means, rounding
from pyro_vae.app.explore.document import Arrays
from pyro_vae.data import Split
from pyro_vae.evaluation import evaluating
from pyro_vae.judging.references import reference
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.vae import VAE
from pyro_vae.protocols import support_name

DRAWS = 40  # of a posterior without an ellipse
_PRIOR_DRAWS, _REFERENCE_DRAWS, _CHECKED = 1000, 100, 6
_BUDGET = 900_000  # bytes of posteriors


def payload(
    vae: VAE, data: Split, *, about: dict[str, Any], names: Sequence[str] | None = None, references: int = 0,
    seed: int = 0, progress: bool | None = None,
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """What the page knows of a pair and its test data, as JSON would have it, and its arrays as text.

    `about` has the words "title" and "dataset"; `references` says of how many of the first data the posterior is drawn
    by Hamiltonian Monte Carlo. Data that are no images, latents that are not in R^D, and a decoder that the page cannot
    compute are a ValueError.
    """
    if not (isinstance(vae, VAE) and hasattr(vae.model, "likelihood") and hasattr(vae.model, "prior")):
        raise ValueError(
            f"got a pair of {type(getattr(vae, 'model', vae)).__name__}, wanted p(z) p(x | z) of one latent z and one "
            "likelihood, which is what the page decodes. Draw samples of this one: pyro-vae sample."
        )
    if len(data.x_shape) != 3:
        raise ValueError(
            f"got a pair of data of shape {data.x_shape}, wanted images, (C, H, W): the page shows pictures. Look at a "
            "table's latent space by pv.plots.latent_scatter(run, run.data.test)."
        )
    prior = vae.model.prior
    if support_name(prior) not in ("real", ""):
        raise ValueError(
            f"got latents on {support_name(prior)!r}, wanted some in R^D: the page moves along straight lines. Look at "
            "this pair in Python: pv.plots.latent_scatter(run, run.data.test)."
        )
    arrays = Arrays()
    with evaluating(vae.model, vae.guide, seed=seed):
        found = codes(vae, data, seed)
        z, drawn = found.mean, prior().expand([_PRIOR_DRAWS]).sample().cpu()
        x = torch.cat([data[start : start + 1000] for start in range(0, len(data), 1000)]).cpu()
        posterior = _posterior(vae, x, found.scale, arrays)
        span = [min(0.0, float(x.min())), max(1.0, float(x.max()))]
        likelihood = vae.model.likelihood
        tried = torch.cat([z[:500], drawn[:500], drawn.mean(0) + 2 * (drawn[:500] - drawn.mean(0))])
        away = rounding(likelihood, tried.to(next(likelihood.parameters()))) / (span[1] - span[0])
        # Half of what is allowed: other latents than those that were tried may be further away.
        decoder = described(likelihood, arrays, "f2" if away <= TOLERANCE / 2 else "f4")
        checked = torch.cat([z[: _CHECKED // 2], drawn[: _CHECKED - min(len(z), _CHECKED // 2)]]).float()
        check = {"z": arrays.add(checked, "f4"), "x": arrays.add(means(likelihood, checked.to(tried)), "f4")}
    labels = None if data.labels is None else [int(label) for label in data.labels]
    shown: dict[str, Any] = {
        **about, "shape": list(data.x_shape), "latents": z.shape[1], "decoder": decoder, "rounding": away,
        "tolerance": TOLERANCE, "span": span, "check": check,
        "codes": arrays.add(z, "f4"), "images": arrays.add(_bytes(x, span), "u1"), "posterior": posterior,
        "labels": labels, "names": _names(labels, names),
        "activity": [round(float(value), 6) for value in z.double().var(0)] if len(z) > 1 else [1.0] * z.shape[1],
        "components": arrays.add(_components(z), "f4"),
        "prior": {"name": "normal"} if type(prior) is StandardNormal else {"draws": arrays.add(drawn, "f2")},
        "reference": _reference(vae, data, min(references, len(data)), seed, progress, arrays),
    }  # fmt: skip
    return shown | {"arrays": arrays.table}, arrays.packed()


def _bytes(x: Tensor, span: Sequence[float]) -> Tensor:
    return ((x - span[0]) / (span[1] - span[0]) * 255).round()


def _names(labels: list[int] | None, names: Sequence[str] | None) -> dict[str, str]:
    """What each label that occurs is called."""
    return {str(i): str(names[i]) if names and 0 <= i < len(names) else str(i) for i in sorted(set(labels or []))}


def _components(z: Tensor) -> Tensor:
    """The first two principal directions of the codes, (2, D), orthonormal; one axis where there is one latent."""
    D = z.shape[1]
    if D == 1:
        return torch.eye(2, 1)
    centred = z.double() - z.double().mean(0)
    # The axes of coordinates after them stand in where the data have fewer directions than two.
    _, s, rows = torch.linalg.svd(centred, full_matrices=False)
    found = rows[: int((s > 1e-9).sum())][:2]
    basis, _ = torch.linalg.qr(torch.cat([found, torch.eye(D, dtype=z.double().dtype)]).T)
    directions = basis.T[:2]
    # Signs are arbitrary: the largest coordinate of each is positive.
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    return directions * largest.sign()


def _posterior(vae: VAE, x: Tensor, scale: Tensor, arrays: Arrays) -> dict[str, Any]:
    """q(z | x): "ellipse" by standard deviations or covariances, "cloud" by draws, or "point"."""
    q: Any = vae.posterior(x[:1])
    base, D = getattr(q, "base_dist", q), scale.shape[1]
    if bool((scale == 0).all()):
        return {"name": "point"}
    if isinstance(base, torch.distributions.Normal):
        return {"name": "deviations", "array": arrays.add(scale, "f2"), "count": len(x)}
    full = hasattr(q, "covariance_matrix")
    count = max(1, min(len(x), _BUDGET // (2 * D * (D if full else DRAWS))))
    q = vae.posterior(x[:count])
    if full:
        return {"name": "covariances", "array": arrays.add(q.covariance_matrix, "f2"), "count": count}
    draws = torch.stack([q.sample() for _ in range(DRAWS)], 1)
    return {"name": "draws", "array": arrays.add(draws, "f2"), "count": count}


def _reference(
    vae: VAE, data: Split, count: int, seed: int, progress: bool | None, arrays: Arrays
) -> dict[str, Any] | None:  # fmt: skip
    """Draws from the exact posterior of the first data, and of which of them the chains have converged."""
    if not count:
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the chains of")  # the page says it of each datum
        found = reference(vae.model, vae.guide, data.subset(slice(0, count)), seed=seed, progress=progress)
    draws = found.draws["z"].flatten(0, 1).transpose(0, 1)  # (N, C S, D)
    kept = arrays.add(draws[:, :: max(1, draws.shape[1] // _REFERENCE_DRAWS)][:, :_REFERENCE_DRAWS], "f2")
    rhat = [round(float(value), 3) for value in found.rhat.nan_to_num(1e9).amax(1)]  # nan where nothing moved
    return {"array": kept, "count": count, "rhat": rhat, "converged": found.converged.tolist()}
