"""Fully connected networks, plain and gated, and what all networks need: activations by name, shapes, a start."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from pyro_vae.options import integers
from pyro_vae.words import one_of


class _SoftplusFunction(torch.autograd.Function):
    """max(x, 0) + log(1 + exp(-|x|)): torch's softplus goes through ``log1p``, which may be slow on a CPU (see
    `read_constants`), for a gain below 1e-7."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.abs().neg_().exp_().add_(1).log_().add_(x.clamp(min=0))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * torch.sigmoid(x)


class Softplus(nn.Module):
    """log(1 + exp(x)), to 1e-7.

    Example:
        >>> Softplus()(torch.tensor([0.0, 100.0]))
        tensor([  0.6931, 100.0000])
    """

    def forward(self, x: Tensor) -> Tensor:
        return _SoftplusFunction.apply(x)


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "tanh": nn.Tanh,
    "softplus": Softplus,
}
ACTIVATIONS = tuple(_ACTIVATIONS)


def make_activation(name: str) -> nn.Module:
    """The activation of a name of `ACTIVATIONS`; any other is refused."""
    return _ACTIVATIONS[one_of("activation", name, ACTIVATIONS)]()


Shape: TypeAlias = int | Sequence[int]


def as_shape(shape: Shape) -> tuple[int, ...]:
    """A number is the shape of a vector."""
    found = integers("shape", shape if hasattr(shape, "__len__") else (shape,))
    if not all(size > 0 for size in found):
        raise ValueError(f"got shape {found}, wanted positive sizes.")
    return found


def _to_shape(x: Tensor, shape: tuple[int, ...]) -> str:
    """What to do with data of another shape."""
    given = tuple(x.shape)
    if len(shape) == 3 and given[-3:] == (*shape[1:], shape[0]) and len(given) == 4:
        return "Put the channels first: x.permute(0, 3, 1, 2) of a tensor, x.transpose(0, 3, 1, 2) of an array."
    if given and math.prod(given[1:]) == math.prod(shape):
        return f"Reshape the data: x.reshape(-1, {', '.join(map(str, shape))})."
    if len(given) > 1:
        return f"Build the network for such data, of shape {given[1:]} each, or resize the data."
    return "Build the network for such data, or reshape the data."


def leading_shape(x: Tensor, shape: tuple[int, ...], name: str) -> tuple[int, ...]:
    """The leading dimensions of x before the event shape, checked."""
    split = x.dim() - len(shape)
    if split < 0 or tuple(x.shape[split:]) != shape:
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{name} got shape {tuple(x.shape)}, wanted (..., {wanted}). {_to_shape(x, shape)}")
    return tuple(x.shape[:split])


def as_image(shape: Sequence[int]) -> tuple[int, int, int]:
    """A shape of (channels, height, width), checked."""
    if len(shape) != 3:
        raise ValueError(f"got shape {tuple(shape)}, wanted (channels, height, width). For vectors use MLP.")
    return (shape[0], shape[1], shape[2])


def halvings(size: tuple[int, int], times: int) -> list[tuple[int, int]]:
    """Heights and widths from the full size down, halved so many times, rounded up."""
    sizes = [size]
    for _ in range(times):
        sizes.append(((sizes[-1][0] + 1) // 2, (sizes[-1][1] + 1) // 2))
    return sizes


class MLP(nn.Module):
    """Fully connected network from one shape to another, over any leading dimensions.

    Args:
        in_shape: Shape of one input.
        hidden: Widths of the hidden layers, each followed by the activation.
        out_shape: Shape of one output, by a last linear layer; None ends with the
            last hidden layer (features for a posterior's head).
        activation: Name of the activation.
    Attributes:
        out_features: Number of outputs.
    Example:
        >>> MLP((1, 8, 8), [32], None)(torch.zeros(5, 3, 1, 8, 8)).shape
        torch.Size([5, 3, 32])
        >>> MLP(2, [32], (1, 8, 8))(torch.zeros(5, 3, 2)).shape
        torch.Size([5, 3, 1, 8, 8])
    """

    def __init__(
        self, in_shape: Shape, hidden: Sequence[int], out_shape: Shape | None, activation: str | None = "silu"
    ) -> None:
        super().__init__()
        self.in_shape = as_shape(in_shape)
        widths = [math.prod(self.in_shape), *integers("hidden", hidden)]
        layers: list[nn.Module] = []
        for before, after in zip(widths[:-1], widths[1:], strict=True):
            layers += self._hidden(before, after, activation)
        self.out_shape = (widths[-1],) if out_shape is None else as_shape(out_shape)
        self.out_features = math.prod(self.out_shape)
        if out_shape is not None:
            layers.append(nn.Linear(widths[-1], self.out_features))
        self.layers = nn.Sequential(*layers)

    def _hidden(self, before: int, after: int, activation: Any) -> list[nn.Module]:
        return [nn.Linear(before, after), make_activation(activation)]

    def forward(self, x: Tensor) -> Tensor:
        leading = leading_shape(x, self.in_shape, type(self).__name__)
        return self.layers(x.reshape(*leading, math.prod(self.in_shape))).reshape(*leading, *self.out_shape)


class GatedLinear(nn.Module):
    """h = act(W1 x + b) * sigmoid(W2 x + c), over any leading dimensions.

    The activation is that of the ungated half; None for none, as in the paper.

    Example:
        >>> GatedLinear(3, 4)(torch.zeros(5, 2, 3)).shape
        torch.Size([5, 2, 4])

    Reference: Dauphin et al., Language modeling with gated convolutional networks, 2017. arXiv:1612.08083
    """

    def __init__(self, in_features: int, out_features: int, activation: str | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, 2 * out_features)  # both halves in one product
        self.activation = nn.Identity() if activation is None else make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.linear(x).chunk(2, -1)
        return self.activation(value) * torch.sigmoid(gate)


class GatedMLP(MLP):
    """An `MLP` whose hidden layers are gated.

    Args:
        in_shape, hidden, out_shape: As of `MLP`.
        activation: Name of the activation of the ungated half of each layer; None for none, as in the paper.
    Example:
        >>> GatedMLP((1, 8, 8), [32], None)(torch.zeros(5, 3, 1, 8, 8)).shape
        torch.Size([5, 3, 32])

    Reference: Tomczak and Welling, VAE with a VampPrior, 2018. arXiv:1705.07120
    """

    def __init__(
        self, in_shape: Shape, hidden: Sequence[int], out_shape: Shape | None, activation: str | None = None
    ) -> None:
        super().__init__(in_shape, hidden, out_shape, activation)

    def _hidden(self, before: int, after: int, activation: Any) -> list[nn.Module]:
        return [GatedLinear(before, after, activation)]


def set_output_mean(decoder: nn.Module, mean: Tensor, floor: float = 1e-3) -> None:
    """Start a decoder of logits at the mean image, as Burda et al. (2016) do.

    The bias of the last layer becomes logit(mean), with the mean clipped to [floor, 1 - floor]; a convolutional layer,
    whose bias is per channel, gets that of the channel means.

    Args:
        decoder: A network whose last layer with a bias gives the logits.
        mean: Mean of the training data in [0, 1], of the shape of one datum.
        floor: Distance kept from 0 and 1.
    Raises:
        ValueError: No layer with a bias, or one of another size than the mean.
    """
    biased = [m for m in decoder.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    if not biased:
        raise ValueError("the decoder has no layer with a bias to start at the mean of the data.")
    bias = biased[-1].bias
    assert isinstance(bias, Tensor)
    start = mean.flatten() if bias.numel() == mean.numel() or mean.dim() < 2 else mean.flatten(1).mean(-1)
    if start.shape != bias.shape:
        raise ValueError(f"the decoder's last bias has {bias.numel()} entries, the mean has shape {tuple(mean.shape)}.")
    with torch.no_grad():
        bias.copy_(torch.logit(start.clamp(floor, 1 - floor)))


class Networks(NamedTuple):
    """An encoder and a decoder that go together: what a name of `pyro_vae.parts.names.NETWORKS` stands for."""

    encoder: Callable[..., nn.Module]  # (x_shape, hidden widths, activation=name) to a network from data to features
    decoder: Callable[..., nn.Module]  # (latent_dim, out_shape, hidden widths, activation=name) to one from latents
    layers: bool = True  # whether it has hidden layers


def _dense(network: Callable[..., nn.Module], **fixed: Any) -> Networks:
    """Both of one class; `fixed` holds whatever is not to be chosen by name."""

    def made(in_shape: Shape, out_shape: Shape | None, hidden: Sequence[int], activation: str) -> nn.Module:
        return network(in_shape, out_shape=out_shape, **{"hidden": hidden, "activation": activation} | fixed)

    return Networks(lambda x_shape, hidden, activation: made(x_shape, None, hidden, activation), made)


MLPS = _dense(MLP)
GATED = _dense(GatedMLP, activation=None)
LINEAR = _dense(MLP, hidden=())._replace(layers=False)
