"""The divergence in closed form at some sites, by its sample at the others.

``TraceMeanField_ELBO`` replaces log q(z_l) - log p(z_l) by its expectation over z_l, given the
sites that z_l was drawn from. That leaves the ELBO unbiased only where p(z_l | ...) does not depend
on what the guide drew *from* z_l. A guide that draws in the model's order meets that everywhere. One that
climbs from the data, q(z_1 | x) q(z_2 | z_1), under a model that comes down, p(z_2) p(z_1 | z_2), meets
it at its last layer only:

    E_q[log q(z_2 | z_1) - log p(z_2)] = E_q(z_1)[KL(q(z_2 | z_1) || p(z_2))].
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from pyro.infer import Trace_ELBO, TraceMeanField_ELBO

from pyro_vae.protocols import closed_form_sites


class ClosedForm(TraceMeanField_ELBO):
    """Pyro's ``TraceMeanField_ELBO`` at the sites that are named, its ``Trace_ELBO`` at all others.

    `fit` takes it by default where a guide says so (`closed_form_sites`), as the zoo's
    `Hierarchical` does. Where a pair of distributions has no closed form, the sample stays; a guide
    with a site that is not reparameterised gets Pyro's ``Trace_ELBO`` throughout.

    Args:
        sites: Names of latent sites.
        options: Those of ``TraceMeanField_ELBO``.
    Example:
        >>> ClosedForm(["z2"]).sites
        ('z2',)
    """

    def __init__(self, sites: Collection[str], **options: Any) -> None:
        super().__init__(**options)
        self.sites = tuple(sites)

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> Any:
        # Pyro's own warns of a guide in another order than the model's, wherever it integrates.
        return Trace_ELBO._get_trace(self, model, guide, args, kwargs)

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> Any:
        drawn = [site for site in guide_trace.nodes.values() if site["type"] == "sample" and not site["is_observed"]]
        if not all(getattr(site["fn"], "has_rsample", True) for site in drawn):
            return Trace_ELBO._differentiable_loss_particle(self, model_trace, guide_trace)
        sampled = [site for site in drawn if site["name"] not in self.sites]
        kept = [site["fn"] for site in sampled]
        for site in sampled:
            site["fn"] = _NoClosedForm()
        try:
            return super()._differentiable_loss_particle(model_trace, guide_trace)
        finally:
            for site, fn in zip(sampled, kept, strict=True):
                site["fn"] = fn


class _NoClosedForm:
    """What has no divergence from anything, so that Pyro takes the sample's."""

    has_rsample = True


def default_loss(guide: Any) -> Any:
    """The loss of a fit to which none was given."""
    sites = closed_form_sites(guide)
    return ClosedForm(sites) if sites else Trace_ELBO()
