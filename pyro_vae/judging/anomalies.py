"""How strange data are: scores in nats, higher for stranger, and how well they tell outliers apart.

A likelihood grows with how simple an image is (dark, flat, few strokes), so that simpler data of another kind have a
*higher* p(x) than the data of the fit, and a ROC-AUC below one half (Nalisnick et al., 2019). Two scores correct it:

    ratio     - log p(x) + log p_0(x): against a background model p_0 that knows how simple x is and not what it shows.
              Of binary data p_0 is a compressor (Serra et al., 2020); of others a second pair, fitted to the same data
              with a share of the pixels replaced by noise (Ren et al., 2019). Of grey data a compressor is not sound:
              the size of the file decides alone (ROC-AUC 0.02 for MNIST against Fashion-MNIST, log p(x) has 0.80).
    regret    max over q of ELBO(x; q) - ELBO(x; the guide's q): what refitting q to this image alone gains. An encoder
              is near its optimum only on the data that it was trained for (Xiao et al., 2020).

References: Nalisnick et al., Do deep generative models know what they don't know?, 2019. arXiv:1810.09136. Ren et al.,
Likelihood ratios for out-of-distribution detection, 2019. arXiv:1906.02845. Serra et al., Input complexity and
out-of-distribution detection with likelihood-based generative models, 2020. arXiv:1909.11480. Xiao et al., Likelihood
regret, 2020. arXiv:2003.02977
"""

from __future__ import annotations

import bz2
import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.judging.climbs import optimise, weights_at
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.judging.local import Unscaled, local_form
from pyro_vae.judging.sweeps import sweep
from pyro_vae.options import of_pair
from pyro_vae.traces import Program

SCORES = ("log-likelihood", "reconstruction", "ratio", "regret")


@of_pair
def anomaly_scores(
    model: Program,
    guide: Program,
    data: Any,
    *,
    score: str = "log-likelihood",
    num_samples: int = 100,
    background: Sequence[Program] | None = None,
    num_steps: int = 200,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
    compile: bool | str = "auto",
) -> Tensor:
    """How strange each datum is, in nats: higher is stranger.

        "log-likelihood"    - log 1/K sum_k p(x, z_k) / q(z_k | x)
        "reconstruction"    - 1/K sum_k log p(x | z_k)
        "ratio"             the first, less that of a background model, or less the compressed size of x
        "regret"            max over q of the ELBO of x, less that of the guide's q

    All but the second need a density over z; it is all that a plain autoencoder has. The last two correct for simple
    data, which have a high p(x) whatever they show (see the module).

    Args:
        score: One of these; without a background "ratio" takes binary data only.
        num_samples: K; a point guide needs only one.
        background: For "ratio", a pair (model, guide) fitted to noisier data; None for the compressed size.
        num_steps: For "regret", gradient steps on the parameters of q for each datum.
        model, guide, data, seed, device, progress, compile: As for `log_likelihood`.
    Returns:
        Scores, (N,).
    Raises:
        ValueError: Another score; a point guide where a density is needed; data that are no binary tensor.
    """
    if score not in SCORES:
        raise ValueError(f"unknown score {score!r}, wanted one of {', '.join(SCORES)}.")
    if background is not None and (score != "ratio" or len(background) != 2):
        raise ValueError(f"got a background for score={score!r}, wanted a pair (model, guide) for score='ratio'.")
    options: dict[str, Any] = {"seed": seed, "device": device, "progress": progress}
    by_weights: dict[str, Any] = {"num_samples": num_samples, "method": "importance", "compile": compile} | options
    if score in ("log-likelihood", "ratio"):
        found = -log_likelihood(model, guide, data, **by_weights).pointwise
        if score == "log-likelihood":
            return found
        if background is not None:
            return found + log_likelihood(background[0], background[1], data, **by_weights).pointwise
        with sweep(model, guide, data=data, title="compressed", **options) as run:
            return found - torch.cat(run.each(lambda batch: compressed_size(_binary(batch))))
    if score == "regret":

        def regret(batch: tuple[Any, ...]) -> Tensor:
            form = local_form(guide, batch)
            best = optimise(model, form, batch, num_steps=num_steps, window=max(1, num_steps // 8), compile=compile)
            start, end = weights_at(form, Unscaled()(model), (form.start, best.rows), batch, num_samples)
            return end.mean(0) - start.mean(0)

        with sweep(model, guide, data=data, copies=8, validate=False, title="regret", **options) as run:
            return torch.cat(run.each(regret))
    with sweep(model, guide, data=data, title="reconstruction", **options) as run:
        chunks = run.particles(num_samples)
        parts = run.each(lambda batch: torch.cat([chunk.log_likelihood for chunk in chunks(batch)]).mean(0))
    return -torch.cat(parts).double()


def compressed_size(x: Tensor) -> Tensor:
    """The length of each datum of zeros and ones in nats, (N,), losslessly compressed as bits: an upper limit of what
    describes it. The shortest counts, of zlib and bz2 on rows and on differences of neighbours.

    Example:
        >>> flat, noise = torch.zeros(1, 1, 28, 28), torch.rand(1, 1, 28, 28).round()
        >>> bool(compressed_size(flat) < compressed_size(noise) / 3)
        True
    """
    bits = x.detach().cpu().to(torch.uint8).numpy()
    return torch.tensor([_shortest(one) for one in bits], dtype=torch.float64) * 8 * math.log(2)


def _shortest(bits: np.ndarray) -> int:
    bits = np.atleast_1d(bits)
    forms = [bits, np.diff(bits, axis=-1, prepend=bits[..., :1] * 0)]
    if bits.ndim > 1:
        forms.append(np.diff(bits, axis=-2, prepend=bits[..., :1, :] * 0))
    # Differences of zeros and ones modulo 2 are zeros and ones.
    raw = [np.packbits(form & 1).tobytes() for form in forms]
    return min(len(pack(one)) for one in raw for pack in (lambda b: zlib.compress(b, 9), bz2.compress))


def _binary(batch: tuple[Any, ...]) -> Tensor:
    if len(batch) != 1 or not isinstance(batch[0], Tensor) or not bool(((batch[0] == 0) | (batch[0] == 1)).all()):
        raise ValueError(
            "score='ratio' compares log p(x) with the compressed size of x, which is sound for zeros and ones only, "
            "and these data are others. Use score='regret', or a pair fitted to noisier data: "
            "background=(model, guide)."
        )
    return batch[0]


def explained(auc: float, score: str, outliers: str = "the outliers") -> str | None:
    """What a ROC-AUC below one half says, in words, and what to do; None above it.

    Example:
        >>> explained(0.9, "log-likelihood") is None
        True
        >>> explained(0.1, "log-likelihood", "mnist")[:62]
        'ROC-AUC below 0.5: mnist has the higher p(x). Simple images (d'
    """
    if not auc < 0.5:
        return None
    if score == "log-likelihood":
        return (
            f"ROC-AUC below 0.5: {outliers} has the higher p(x). Simple images (dark, flat, few strokes) do, whatever "
            "they show. Scores that correct for it: ratio (p(x) against the compressed size), regret (what refitting q "
            "to each image gains)."
        )
    if score == "reconstruction":
        return f"ROC-AUC below 0.5: {outliers} is easier to reconstruct, as simple images are. Try ratio or regret."
    return f"ROC-AUC below 0.5: by {score}, {outliers} is less strange than the test data. Try another score."


def roc_auc(inliers: Tensor, outliers: Tensor) -> float:
    """Area under the ROC curve: P(outlier scores above inlier), ties counting half.

    Args:
        inliers: Scores of ordinary data.
        outliers: Scores of strange data.
    Returns:
        A share, one half where the scores tell nothing.
    Example:
        >>> roc_auc(torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0]))
        0.875
    """
    from sklearn.metrics import roc_auc_score

    labels = torch.cat([torch.zeros(len(inliers)), torch.ones(len(outliers))])
    return float(roc_auc_score(labels.numpy(), torch.cat([inliers, outliers]).cpu().double().numpy()))
