"""Normalizing flows of zuko as posteriors, conditioned on x through a context.

    z = mu(x) + sigma(x) f(u; c(x)),   u ~ N(0, I)

f starts close to the identity, so that a flow starts as a diagonal normal. An autoregressive flow computes one
direction in one pass and the other in D. Training needs draws, so f is the quick one; the price falls on samples that
the flow did not draw itself. Coupling flows are quick both ways.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.parts.distributions import flow as flows
from pyro_vae.parts.distributions.flow import own_weights, pushforward, zuko_flows
from pyro_vae.parts.posteriors.amortized import Amortized
from pyro_vae.protocols import Free, Local

_MANY = 16  # latents from which D passes a draw hurt


class Flow(Amortized):
    """q(z | x) of any flow of zuko: z = mu(x) + sigma(x) f(u; c(x)).

    Args:
        encoder, latent_dim, features: As of `Amortized`.
        flow: A class of zuko, or any callable that takes ``features`` and ``context`` and returns a flow.
        context: Number of features C that the flow reads.
        fast: The direction that takes one pass. "sampling" takes f in the direction in
            which zuko scores, "scoring" as zuko means it.
        options: What the flow takes, such as transforms=5, hidden_features=(64, 64).
    Attributes:
        rescoring: "one pass" where both directions are quick, or with fast="scoring". Flows without a closed-form
            inverse (NAF, UNAF, SOSPF, BPF, GF) find it by bisection to 1e-6, and CNF by integration.
    Raises:
        ValueError: Not a flow, or one that does not live on R^D, such as the circular NCSF.
    Example:
        >>> import torch, zuko
        >>> q = Flow(nn.Linear(3, 4), 2, zuko.flows.NSF, transforms=2, bins=4)(torch.zeros(5, 3))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([2]))

    Reference: Rozet et al., Zuko: Normalizing flows in PyTorch, 2022. zuko.readthedocs.io
    """

    passes = 1

    def __init__(
        self, encoder: nn.Module, latent_dim: int, flow: Callable[..., nn.Module], context: int = 32,
        fast: str = "sampling", features: int | None = None, **options: Any,
    ) -> None:  # fmt: skip
        if fast not in ("sampling", "scoring"):
            raise ValueError(f'got fast={fast!r}, wanted "sampling" or "scoring": which direction takes one pass.')
        if context < 1:
            raise ValueError(f"context must be a positive number of features, got {context}.")
        super().__init__(encoder, latent_dim, 2 * latent_dim + context, features)
        self.context, self.fast = context, fast
        self.flow = flow(features=latent_dim, context=context, **options)
        flows.check_flow(self.flow, latent_dim)
        flows.start_near_identity(self.flow)
        passes = max((getattr(module, "passes", 1) for module in self.flow.modules()), default=1)
        self.rescoring = "D passes" if fast == "sampling" and passes > 2 else "one pass"
        if fast == "scoring" and passes > 2 and latent_dim >= _MANY:
            warnings.warn(
                f"{type(self).__name__} draws in {passes} passes through each of its layers, so every training step is "
                f'about {passes} times slower than it needs to be. Use IAF, or Flow(..., fast="sampling"), which '
                "draws in one.",
                stacklevel=3,
            )

    def family(self, parameters: Tensor) -> TorchDistribution:
        loc, log_scale, context = parameters.split([self.latent_dim, self.latent_dim, self.context], -1)
        return pushforward(self.flow, context, loc, log_scale, self.fast)

    def local(self, parameters: Tensor) -> Local:
        """The same flow with weights of its own for each datum, beside the head's numbers, from the trained ones on.

        All linear layers of the flow are freed; a parameter elsewhere (a mixing matrix, the stacked layers of a NAF)
        stays as it is. Memory is that of B flows, and so is the cost of a step.
        """
        if parameters.dim() != 2:
            return super().local(parameters)
        weights = {f"flow.{name}": p.detach().expand(len(parameters), *p.shape) for name, p in own_weights(self.flow)}

        def build(free: Free) -> TorchDistribution:
            q = self.family(free["parameters"])
            return flows.with_weights(q, self.flow, {name: free[f"flow.{name}"] for name, _ in own_weights(self.flow)})

        return Local({"parameters": parameters, **weights}, build, dict.fromkeys(weights, 0.1))


class _Affine(Flow):
    """Layers u * s + m of zuko, in either direction: what `IAF`, `MAF` and `Coupling` have in common."""

    _flow, _fast = "MAF", "sampling"

    def __init__(
        self, encoder: nn.Module, latent_dim: int, transforms: int = 3, hidden_features: Sequence[int] = (64, 64),
        context: int = 32, features: int | None = None,
    ) -> None:  # fmt: skip
        options = {"transforms": transforms, "hidden_features": tuple(hidden_features), "activation": nn.SiLU}
        flow = getattr(zuko_flows(), self._flow)
        super().__init__(encoder, latent_dim, flow, context, self._fast, features, **options)


class IAF(_Affine):
    """Inverse autoregressive flow: affine layers, one pass to draw, D passes to score other samples.

        u <- u * s_i(u_<i, c) + m_i(u_<i, c),   in alternating orders of the latents

    Args:
        encoder, latent_dim, features: As of `Amortized`.
        transforms: Number of layers.
        hidden_features: Widths of each layer's (masked) network.
        context: Number of features of x that every layer reads.
    Example:
        >>> import torch
        >>> IAF(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).rsample().shape
        torch.Size([5, 2])

    Reference: Kingma et al., Improving Variational Inference with Inverse Autoregressive Flow, 2016. arXiv:1606.04934
    """


class MAF(_Affine):
    """Masked autoregressive flow: one pass to score any sample, D passes to draw. Takes what `IAF` takes.

    The direction for density estimation. As a posterior each training step draws, hence
    a warning where D is large; `IAF` is the same family the other way round.

    Example:
        >>> import torch
        >>> MAF(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    Reference: Papamakarios et al., Masked Autoregressive Flow for Density Estimation, 2017. arXiv:1705.07057
    """

    _fast = "scoring"


class Coupling(_Affine):
    """Affine coupling layers (RealNVP): one pass to draw and one to score any sample. Takes what `IAF` takes.

        (u_a, u_b) <- (u_a, u_b * s(u_a, c) + m(u_a, c)),   a: every other latent, in turn

    Example:
        >>> import torch
        >>> Coupling(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).log_prob(torch.zeros(5, 2)).shape
        torch.Size([5])

    Reference: Dinh et al., Density estimation using Real NVP, 2017. arXiv:1605.08803
    """

    _flow = "RealNVP"

    def __init__(
        self, encoder: nn.Module, latent_dim: int, transforms: int = 4, hidden_features: Sequence[int] = (64, 64),
        context: int = 32, features: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(encoder, latent_dim, transforms, hidden_features, context, features)


class NSF(Flow):
    """Neural spline flow: rational-quadratic splines in coupling layers, quick to draw and to score.

        (u_a, u_b) <- (g(u_a; c), g(u_b; u_a, c)),   g monotone and elementwise, halves in turn

    Each layer bends [-5, 5] and leaves the rest alone, on a u that is standard normal:
    one in 1.7 million falls outside. The scale sigma(x) takes it where it is needed.

    Args:
        bins: Number of pieces of each spline.
        passes: 2 couples two halves; None makes every latent depend on all before it, which
            takes one pass to draw and D passes to score samples drawn elsewhere.
        encoder, latent_dim, transforms, hidden_features, context, features: As of `IAF`.
    Example:
        >>> import torch
        >>> NSF(nn.Linear(3, 4), latent_dim=2)(torch.zeros(5, 3)).rsample().shape
        torch.Size([5, 2])

    Reference: Durkan et al., Neural Spline Flows, 2019. arXiv:1906.04032
    """

    def __init__(
        self, encoder: nn.Module, latent_dim: int, transforms: int = 3, bins: int = 8,
        hidden_features: Sequence[int] = (64, 64), context: int = 32, passes: int | None = 2,
        features: int | None = None,
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {"transforms": transforms, "hidden_features": tuple(hidden_features)}
        options |= {"bins": bins, "passes": passes, "activation": nn.SiLU}
        super().__init__(encoder, latent_dim, zuko_flows().NSF, context, "sampling", features, **options)
