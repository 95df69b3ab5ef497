"""One flow per datum: the linear layers of a flow with weights that have a batch dimension.

    y_b = W_b x_b + c_b,   W of (B, out, in), x of (..., B, in)

The flow is the same module: while it runs, its weights are exchanged for those of the
batch, and the products that they enter are taken datum by datum. All else in a flow is
elementwise in the batch already.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from torch.nn.utils.stateless import _reparametrize_module
from torch.overrides import TorchFunctionMode

from pyro_vae.parts.distributions.flow import Pushforward


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
    """The distribution of a flow under weights per datum, (B, *shape) each by name.

    Args:
        q: Of batch_shape (B,), whose maps run the flow each time.
        flow: The flow.
        weights: Of `own_weights`, all or some.
    """

    @contextlib.contextmanager
    def exchanged() -> Iterator[None]:
        with _reparametrize_module(flow, dict(weights)), _DatumByDatum():
            yield

    def push(u: Tensor) -> tuple[Tensor, Tensor]:
        with exchanged():
            return q.push(u)

    def pull(z: Tensor) -> tuple[Tensor, Tensor]:
        assert q.pull is not None
        with exchanged():
            return q.pull(z)

    return Pushforward(q.base, push, None if q.pull is None else pull)
