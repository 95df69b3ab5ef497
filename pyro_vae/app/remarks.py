"""What a run's numbers want said about them, a line each: the one place for such remarks.

A remark is a function from the numbers of a run (its summary.json) to a line, or to None where there is nothing to say
or the numbers are older than the remark. `remarks` asks them all; the terminal shows what it gives, and summary.json
keeps it.
`of_image` is the same for an image that is given to a run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_vae.data import Split

# The share of codes that may lie farther out than 999 of 1,000 draws of the prior do.
_RARE = 0.05


def remarks(numbers: Mapping[str, Any]) -> list[str]:
    """All that is to be said of a run's numbers, in order of weight."""
    return [line for remark in (_codes, _samples, _validation) if (line := remark(numbers)) is not None]


def codes_outside(means: Tensor, prior: Tensor) -> float:
    """Share of the codes, (N, ...), that lie farther from the prior's centre than 999 of 1,000 of its draws, (M, ...).

    Example:
        >>> draws = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
        >>> codes_outside(draws[:1000], draws) < 0.01, codes_outside(25 * draws[:1000], draws) > 0.9
        (True, True)
    """
    prior, means = prior.flatten(1).double().cpu(), means.flatten(1).double().cpu()
    loc, scale = prior.mean(0), prior.std(0).clamp(min=1e-12)
    far = ((prior - loc) / scale).norm(dim=1).quantile(0.999)
    return (((means - loc) / scale).norm(dim=1) > far).double().mean().item()


def levels(images: Split) -> dict[str, float]:
    """The mean, lowest and highest grey level of images, in [0, 1] where they are uint8."""
    low, high = math.inf, -math.inf
    for few in images.pieces():
        low, high = min(low, few.min().item()), max(high, few.max().item())
    unit = 255.0 if few.dtype == torch.uint8 and high > 1 else 1.0
    return {"mean": images.mean().double().mean().item(), "low": low / unit, "high": high / unit}


def of_image(x: Tensor, known: Mapping[str, float] | None) -> str | None:
    """Whether an image looks inverted or out of range beside the `levels` of the training data, if they are known.

    Example:
        >>> mnist = {"mean": 0.13, "low": 0.0, "high": 1.0}
        >>> of_image(torch.full((1, 2, 2), 0.9), mnist)[:48]
        'looks inverted: its mean level is 0.90, that of '
        >>> of_image(torch.full((1, 2, 2), 0.2), mnist) is None
        True
    """
    if known is None:
        return None
    mean, usual, low, high = x.double().mean().item(), known["mean"], known["low"], known["high"]
    room = 0.25 * max(high - low, 1e-12)
    if x.min().item() < low - room or x.max().item() > high + room:
        return (
            f"is out of range: its levels are {x.min():.2f} to {x.max():.2f}, those of the training data {low:.2f} to "
            f"{high:.2f}"
        )
    turned = low + high - mean
    if abs(mean - usual) > room and abs(turned - usual) < abs(mean - usual) / 2:
        return (
            f"looks inverted: its mean level is {mean:.2f}, that of the training data {usual:.2f}, and of its negative "
            f"{turned:.2f}"
        )
    return None


def _codes(numbers: Mapping[str, Any]) -> str | None:
    share = numbers.get("codes_outside_prior")
    if share is None or share <= _RARE:
        return None
    return (
        f"codes far from the prior: {100 * share:.0f} % lie farther out than 999 of 1,000 of its draws (KL "
        f"{numbers.get('test_kl', math.nan):.1f} nats in {numbers.get('latent_dim')} latents), so samples from the "
        "prior miss them. More latents, or a larger beta, or a flow for the prior."
    )


def _samples(numbers: Mapping[str, Any]) -> str | None:
    distance, null = numbers.get("sample_energy_distance"), numbers.get("sample_energy_distance_null")
    if distance is None or null is None:
        return None
    count, images = numbers.get("protocol", {}).get("sizes", {}).get("train"), numbers.get("test_images")
    if count is not None and count < 1000 and distance > 3 * null:
        return (
            f"few data for samples: {count:,} training data, and samples are {distance:.3g} away where halves of the "
            f"test data are {null:.3g} apart"
        )
    if images is None or images >= 1000 or abs(distance) > 2 * null:
        return None
    return (
        f"too few data to judge the samples: the energy distance {distance:.3g} is within the noise of {images:,} test "
        f"data, {null:.3g}"
    )


def _validation(numbers: Mapping[str, Any]) -> str | None:
    training, validation = numbers.get("last_bound"), numbers.get("last_validation")
    if training is None or validation is None or not validation > training + max(0.1, 0.002 * abs(training)):
        return None
    why = "training is averaged over an epoch in which the weights still moved"
    if numbers.get("dropout"):
        why = "training runs with dropout, validation without"
    elif (numbers.get("last_beta") or 1.0) < 1.0:
        why = f"the KL's weight is {numbers['last_beta']:.2g} in training, still warming up, and 1 in both numbers"
    return f"validation ({validation:.2f}) above training ({training:.2f}): {why}; no sign of a mistake"
