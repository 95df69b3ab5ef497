"""A decoder as data: the layers of a likelihood's network and the link to E[x | z], for a page that computes by itself.

Only what is known exactly is written down: each layer and each likelihood by its class, never by what it resembles, so
that whatever a page shows is what the model says. Anything else is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyro_vae.app.explore.document import Arrays
from pyro_vae.parts import likelihoods
from pyro_vae.parts.networks import MLP, ConvDecoder, GatedMLP, ResidualDecoder, Softplus
from pyro_vae.parts.networks.convolutional import ResidualBlock
from pyro_vae.parts.networks.dense import GatedLinear
from pyro_vae.protocols import standardize

TOLERANCE = 1e-3  # of the range of a pixel: how far a decoded one may be from that of torch

Layers = list[dict[str, Any]]
Keep = Callable[[Tensor | None], int | None]  # where a tensor is kept
_NETWORKS = (MLP, GatedMLP, ConvDecoder, ResidualDecoder)
_ACTIVATIONS: dict[type, str] = {
    nn.SiLU: "silu", nn.ReLU: "relu", nn.GELU: "gelu", nn.ELU: "elu", nn.Tanh: "tanh", Softplus: "softplus",
    nn.Identity: "identity",
}  # fmt: skip


def layers(network: nn.Module, keep: Keep) -> Layers:
    """The layers of a decoder of this package, each a name and its numbers; `keep` keeps a tensor, and says where.

    A layer that the page does not know is a ValueError.

    Example:
        >>> [layer["op"] for layer in layers(ConvDecoder(2, (1, 8, 8), channels=[4]), lambda tensor: 0)]
        ['linear', 'silu', 'linear', 'reshape', 'silu', 'transposed', 'reshape']
    """
    kind = type(network)
    module: Any = network
    if kind in _NETWORKS:
        return [*layers(module.layers, keep), {"op": "reshape", "shape": list(module.out_shape)}]
    if kind is nn.Sequential:
        return [layer for part in module for layer in layers(part, keep)]
    if kind is nn.Linear:
        return [{"op": "linear", "weight": keep(module.weight), "bias": keep(module.bias)}]
    if kind is GatedLinear:
        (name,) = layers(module.activation, keep)
        return [*layers(module.linear, keep), {"op": "gate", "activation": name["op"]}]
    if kind is nn.Unflatten:
        return [{"op": "reshape", "shape": list(module.unflattened_size)}]
    if kind in (nn.Conv2d, nn.ConvTranspose2d) and _plain(module):
        numbers = {"weight": keep(module.weight), "bias": keep(module.bias), "stride": list(module.stride),
                   "padding": list(module.padding)}  # fmt: skip
        if kind is nn.Conv2d:
            return [{"op": "convolution", **numbers}]
        return [{"op": "transposed", **numbers, "extra": list(module.output_padding)}]
    if kind is nn.GroupNorm:
        return [{"op": "norm", "groups": module.num_groups, "eps": module.eps, "weight": keep(module.weight),
                 "bias": keep(module.bias)}]  # fmt: skip
    if kind is ResidualBlock:
        resize: Layers = [] if module.size is None else [{"op": "resize", "size": list(module.size)}]
        main = [*layers(module.enter, keep), *resize, *layers(module.first, keep), *layers(module.second, keep)]
        return [{"op": "sum", "branches": [[*layers(module.skip, keep), *resize], main]}]
    if kind in _ACTIVATIONS and getattr(module, "approximate", "none") == "none" and getattr(module, "alpha", 1) == 1:
        return [{"op": _ACTIVATIONS[kind]}]
    raise ValueError(
        f"got a decoder with the layer {network}, which the page cannot compute, wanted one of "
        f"{', '.join(c.__name__ for c in _NETWORKS)}. Look at this pair in Python: pv.plots.latent_grid(run)."
    )


def _plain(convolution: Any) -> bool:
    same = convolution.groups == 1 and set(convolution.dilation) == {1} and convolution.padding_mode == "zeros"
    return same and not isinstance(convolution.padding, str)


def link(likelihood: nn.Module, keep: Keep) -> dict[str, Any]:
    """How E[x | z] follows from what the decoder gives; `keep` as of `layers`. Another likelihood than ours is a
    ValueError.
    """
    kind = type(likelihood)
    own: Any = likelihood
    scaled = standardize(own)
    moved = {} if scaled is None else {"shift": keep(scaled.loc), "stretch": keep(scaled.scale)}
    plain = {likelihoods.Bernoulli: "sigmoid", likelihoods.ContinuousBernoulli: "continuous-bernoulli"}
    if kind in plain:
        return {"name": plain[kind]}
    if kind is likelihoods.Normal:
        return {"name": "identity", **moved}
    if kind in (likelihoods.Poisson, likelihoods.NegativeBinomial):
        # With levels the mean is multiplied by L - 1 and divided by it again.
        return {"name": own.link} | {key: value for key, value in moved.items() if key == "stretch"}
    if kind is likelihoods.Categorical:
        return {"name": "levels", "levels": own.parameters_per_pixel}
    if kind in (likelihoods.DiscretizedLogistic, likelihoods.MixtureOfDiscretizedLogistics):
        return {"name": "logistics", "components": getattr(own, "num_components", 1), "levels": own.levels,
                "initial": own.initial_scale, "minimum": own.minimum_scale}  # fmt: skip
    raise ValueError(
        f"got the likelihood {kind.__name__}, whose mean the page cannot compute, wanted one of this package: "
        f"{', '.join(likelihoods.__all__)}. Look at this pair in Python: pv.plots.latent_grid(run)."
    )


@torch.no_grad()
def means(likelihood: nn.Module, z: Tensor) -> Tensor:
    """E[x | z] of N latents, (N, *x_shape), a part at a time."""
    return torch.cat([likelihood(part).mean for part in z.split(100)])


@torch.no_grad()
def rounding(likelihood: Any, z: Tensor) -> float:
    """How far float16 weights bring E[x | z] away, at most, over N latents; infinite where float16 overflows."""
    rounded = copy.deepcopy(likelihood)
    for parameter in rounded.decoder.parameters():
        parameter.copy_(parameter.half())
    away = (means(rounded, z) - means(likelihood, z)).abs().max()
    return float(away) if bool(away.isfinite()) else float("inf")


def described(likelihood: Any, arrays: Arrays, kind: str) -> dict[str, Any]:
    """Layers and link of a likelihood, its weights kept as "f2" or "f4"; what the link needs is float32 always.

    A layer or a likelihood that the page does not know is a ValueError.
    """
    found = layers(likelihood.decoder, lambda tensor: None if tensor is None else arrays.add(tensor, kind))
    last = link(likelihood, lambda tensor: None if tensor is None else arrays.add(tensor, "f4"))
    return {"layers": found, "link": last, "weights": kind}
