"""Flows: the distribution of z = f(u), u ~ p(u), for an invertible f, and one flow per datum.

A draw knows its u, so its density costs nothing more. That of any other z needs the inverse, which may be as cheap as f
(coupling), take D passes (autoregressive flows that draw in one), or be absent.

A flow per datum is the same module: while it runs, the weights of its linear layers are exchanged for those of the
batch, y_b = W_b x_b + c_b. All else in a flow is elementwise in the batch already.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import Distribution, constraints
from torch.nn.functional import linear
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode

Map: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]
_Self = TypeVar("_Self", bound="Pushforward")


class Pushforward(TorchDistribution):
    """q(z) of z = f(u), u ~ p(u), which scores its latest draw without inverting f.

        log q(z) = log p(u) - log |det df/du|

    The density of the latest draw is kept, for that very tensor only: not for a copy of it, nor after it is changed in
    place, nor with gradients if it was drawn without. It is a function of the parameters and of u; for its derivative
    with respect to z, score a detached copy.

    Args:
        base: p(u), batch_shape (...), event_shape (D,).
        push: u, (..., D), to f(u), (..., D), and log |det df/du|, (...).
        pull: z to f^-1(z) and log |det df^-1/dz|; None where there is no inverse.
    Example:
        >>> base = torch.distributions.Normal(torch.zeros(2), 1.0)
        >>> q = Pushforward(torch.distributions.Independent(base, 1), lambda u: (u.exp(), u.sum(-1)))
        >>> z = q.rsample()
        >>> wanted = torch.distributions.LogNormal(torch.zeros(2), 1.0).log_prob(z).sum(-1)
        >>> torch.allclose(q.log_prob(z), wanted)
        True

    Reference: Rezende and Mohamed, Variational Inference with Normalizing Flows, 2015. arXiv:1505.05770
    """

    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.real_vector
    has_rsample = True
    knows_its_draw = True
    passes = 1

    def __init__(self, base: Distribution, push: Map, pull: Map | None = None) -> None:
        self.base, self.push, self.pull = base, push, pull
        self._latest: tuple[Tensor, tuple[int, bool], bool, Tensor] | None = None
        super().__init__(base.batch_shape, base.event_shape, validate_args=False)

    def expand(self: _Self, batch_shape: Any, _instance: Any = None) -> _Self:
        shape = torch.Size(batch_shape)
        if shape == self.batch_shape:
            return self
        new = copy.copy(self)
        new.base, new._batch_shape, new._latest = self.base.expand(shape), shape, None
        return new

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        u = self.base.rsample(torch.Size(sample_shape))
        z, log_det = self.push(u)
        # Bounded on purpose: one draw, replaced by the next.
        self._latest = (z, _state(z), torch.is_grad_enabled(), self.base.log_prob(u) - log_det)
        return z

    def log_prob(self, value: Tensor) -> Tensor:
        """log q(z), in nats.

        Raises:
            NotImplementedError: f has no inverse, and z is not the latest draw.
        """
        if self._latest is not None and self._latest[0] is value:
            _, state, with_gradients, log_q = self._latest
            if state == _state(value) and with_gradients >= torch.is_grad_enabled():
                return log_q if torch.is_grad_enabled() else log_q.detach()
        if self.pull is None:
            raise NotImplementedError(
                "this flow has no inverse: it can score its latest draw, as drawn, and no other sample."
            )
        u, log_det = self.pull(value)
        return self.base.log_prob(u) + log_det


def _state(z: Tensor) -> tuple[int, bool]:
    """What changes when a tensor is written to, or made a leaf to differentiate by."""
    return 0 if z.is_inference() else z._version, z.requires_grad


def zuko_flows() -> ModuleType:
    """zuko.flows, imported without its side effect: it switches off the validation of all distributions."""
    validate = Distribution._validate_args
    import zuko.flows

    Distribution.set_default_validate_args(validate)
    return zuko.flows


def pushforward(
    flow: nn.Module,
    context: Tensor | None = None,
    loc: Tensor | None = None,
    log_scale: Tensor | None = None,
    fast: str = "scoring",
) -> Pushforward:
    """z = loc + exp(log_scale) f(u; context), u of the base of a zuko flow; the context is (..., C) or None, loc and
    log_scale are (..., D), or None for 0. With fast="sampling" f is its own direction, with "scoring" its inverse.
    """
    transform = flow.transform(context)  # type: ignore[operator]
    base = flow.base(context)  # type: ignore[operator]
    if context is not None:
        base = base.expand(context.shape[:-1])
    there, back = (transform, transform.inv) if fast == "sampling" else (transform.inv, transform)
    if loc is None or log_scale is None:
        return Pushforward(base, functools.partial(_mapped, there), functools.partial(_mapped, back))

    def push(u: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = _mapped(there, u)
        return loc + log_scale.exp() * z, log_det + log_scale.sum(-1)

    def pull(z: Tensor) -> tuple[Tensor, Tensor]:
        u, log_det = _mapped(back, (z - loc) * (-log_scale).exp())
        return u, log_det - log_scale.sum(-1)

    return Pushforward(base, push, pull)


def _mapped(transform: Any, value: Tensor) -> tuple[Tensor, Tensor]:
    result, log_det = transform.call_and_ladj(value)
    return result, log_det if transform.domain.event_dim else log_det.sum(-1)


def check_flow(flow: nn.Module, latent_dim: int | None = None) -> int:
    """The D of a flow; refuses what is not an invertible map of R^D with a base on all of it."""
    name = type(flow).__name__
    if not (hasattr(flow, "transform") and hasattr(flow, "base")):
        raise ValueError(
            f"got {name}, wanted a normalizing flow of zuko, with a transform and a base. "
            "For a mixture of Gaussians use NormalMixture."
        )
    base = flow.base()  # type: ignore[operator]
    support = getattr(base.support, "base_constraint", base.support)
    found, wanted = tuple(base.event_shape), "D" if latent_dim is None else latent_dim
    if support is not constraints.real or len(found) != 1 or wanted not in ("D", *found):
        raise ValueError(
            f"got {name} with a base of event_shape {found} on {support}, wanted one on all of R^{wanted}. "
            "Use another flow, such as zuko.flows.NSF."
        )
    return found[0]


def start_near_identity(flow: nn.Module, share: float = 0.01) -> None:
    """Shrink the last layer of each conditioner, so that the flow starts close to doing nothing.

    Not to zero: the layers before it would have no gradient.
    """
    with torch.no_grad():
        for module in flow.modules():
            hyper = getattr(module, "hyper", None)
            if isinstance(hyper, nn.Sequential) and isinstance(getattr(hyper[-1], "weight", None), Tensor):
                for parameter in hyper[-1].parameters():
                    parameter.mul_(share)


class _DatumByDatum(TorchFunctionMode):
    """Linear maps whose weights have a batch dimension."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is linear and args[1].dim() == 3:
            x, weight, *bias = args
            # One product per datum, of all its samples at once.
            rows = x.reshape(-1, *x.shape[-2:]).movedim(1, 0)
            found = (rows @ weight.mT).movedim(0, 1).reshape(*x.shape[:-1], -1)
            return found if not bias or bias[0] is None else found + bias[0]
        return func(*args, **(kwargs or {}))


def own_weights(flow: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The weights and biases of a flow's linear layers, by name."""
    return [
        (f"{path}.{name}" if path else name, parameter)
        for path, module in flow.named_modules()
        if hasattr(module, "in_features") and getattr(getattr(module, "weight", None), "ndim", 0) == 2
        for name, parameter in module.named_parameters(recurse=False)
    ]


def with_weights(q: Pushforward, flow: nn.Module, weights: Mapping[str, Tensor]) -> Pushforward:
    """The distribution q of a flow, (B,), under weights per datum, (B, *shape) each, all or some of `own_weights`."""

    def exchanged(way: Map) -> Map:
        def run(value: Tensor) -> tuple[Tensor, Tensor]:
            with _reparametrize_module(flow, dict(weights)), _DatumByDatum():
                return way(value)

        return run

    return Pushforward(q.base, exchanged(q.push), None if q.pull is None else exchanged(q.pull))
