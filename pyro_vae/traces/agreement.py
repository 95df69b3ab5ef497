"""What model and guide must agree upon: their latent sites, and the masks of these."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyro_vae.sites import delta, is_masked, masked_apart


def refuse_unmatched(latent: Mapping[str, Any], drawn: Mapping[str, Any]) -> None:
    """Refuse a pair whose guide does not draw exactly the model's latents, and auxiliary sites."""
    missing = [name for name in latent if name not in drawn]
    if missing and latent[missing[0]]["infer"].get("enumerate"):
        raise ValueError(
            f"latent site {missing[0]!r} of the model is marked to be enumerated and the guide, which has "
            f"{list(drawn)}, does not draw it, but particles hold a value of every latent. Train the pair with "
            f"Pyro's TraceEnum_ELBO, and give a model in which {missing[0]!r} is summed out (of the zoo's Mixture "
            "its pair.marginal, with a mixture as prior), or a guide that draws it."
        )
    if missing:
        raise ValueError(
            f"latent site {missing[0]!r} of the model has no counterpart in the guide, which has {list(drawn)}."
            f"{missing_values(missing[0])}"
        )
    unmatched = [site for name, site in drawn.items() if name not in latent and not site["is_observed"]]
    extra = [site["name"] for site in unmatched if not site["infer"].get("is_auxiliary")]
    if extra:
        raise ValueError(
            f"guide site {extra[0]!r} has no counterpart among the model's latent sites, {list(latent)}. "
            'Rename it, or mark it infer={"is_auxiliary": True}.'
        )


def missing_values(name: str) -> str:
    """What to do about the site that ``pyro.sample(..., obs=x, obs_mask=mask)`` makes of what was not observed."""
    if not name.endswith("_unobserved"):
        return ""
    data = name.removesuffix("_unobserved")
    return (
        f" It is what obs_mask makes of the values of {data!r} that were not observed. Draw it in the guide "
        f"under the mask's opposite, with poutine.mask(mask=~obs_mask): pyro.sample({name!r}, ...); or leave what was "
        "not observed out of the likelihood: with poutine.mask(mask=obs_mask) around "
        f"pyro.sample({data!r}, ..., obs=...)."
    )


def other_mask(
    latent: Mapping[str, Any], drawn: Mapping[str, Any], points: tuple[str, ...], fed: Mapping[str, tuple[str, ...]]
) -> str | None:
    """Why the masks of a pair make its weights no weights, as a latent counts in log p(x, z) and in log q(z | x) at
    different places; None if they do not."""
    for name, prior in latent.items():
        site = drawn.get(name)
        if site is None or site["is_observed"] or name in points:
            continue
        parts = [drawn[source] for source in fed.get(name, ()) if source in drawn]
        if not any(is_masked(part) for part in (prior, site, *parts)):
            continue
        inner = delta(site["fn"]) if parts else None
        if inner is None or bool((inner.log_density != 0).any()):
            parts.append(site)
        if masked_apart(prior, parts):
            remedy = (
                f" Draw it in the guide under the mask's opposite: with poutine.mask(mask=~obs_mask): "
                f"pyro.sample({name!r}, ...)."
                if name.endswith("_unobserved")
                else " Put the same poutine.mask(mask=...) around the site in both programs, or around none."
            )
            return (
                f"latent site {name!r} is masked in one way by the model and in another by the guide, so that one of "
                "log p(z) and log q(z | x) counts where the other does not: the result would not be a bound." + remedy
            )
    return None
