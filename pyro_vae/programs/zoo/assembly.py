"""What the zoo is assembled with: likelihoods by class, labels; and the plain autoencoder.

All labels are looked at before a fit (`check_data` of the programs), and those of a batch when a program runs eagerly;
a captured step reads no values, and there a label of no class makes everything that depends on it nan.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from pyro.distributions import TorchDistribution
from pyro.infer.util import is_validation_enabled
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from pyro_vae.options import integer
from pyro_vae.parts import names
from pyro_vae.parts.networks import MLP
from pyro_vae.programs.vae import VAE
from pyro_vae.protocols import parameters_per_pixel

Conditional: TypeAlias = Callable[..., TorchDistribution]


def pixel_likelihood(
    family: str | Callable[[nn.Module], Any], in_shape: int, hidden: Sequence[int], x_shape: Sequence[int],
    activation: str,
) -> Any:  # fmt: skip
    """A likelihood (its class, name, or function of a decoder) on a dense decoder of as many outputs as it takes."""
    likelihood = names.made("likelihood", family, nn.Identity())  # how many outputs a pixel has is the family's to say
    n = integer("parameters_per_pixel", parameters_per_pixel(likelihood))
    likelihood.decoder = MLP(in_shape, hidden, (n * x_shape[0], *x_shape[1:]), activation)
    return likelihood


def autoencoder(x_shape: Sequence[int], **options: Any) -> VAE:
    """A plain autoencoder: the networks of `VAE.build`, with a guide that is a point, and no prior term. Train it with

        fit(pair.model, pair.guide, data, loss=Objective(reconstruction))

    It maximises log p(x | z(x)) alone, so nothing shapes its latent space: it reconstructs better than a VAE,
    compresses and scores anomalies, and its "prior" samples are decoded from places where no datum lies. It has no
    density over z: every bound and every estimate of log p(x) refuses it.

    Args:
        x_shape: Shape of one datum.
        options: The other fields of `Architecture`, except posterior.
    Returns:
        A `VAE` whose guide is a point.
    Example:
        >>> autoencoder((1, 8, 8), latent_dim=2, hidden=(32,)).reconstruct(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """
    return VAE.build(x_shape, **(options | {"posterior": "point"}))


def class_check(y: Tensor, num_classes: int, unknown: bool = False) -> None:
    """Refuse class numbers that are not 0, ..., C - 1, nor -1 if that stands for a label that is not known.

    Example:
        >>> class_check(torch.tensor([1, 2, 3]), 3)
        Traceback (most recent call last):
        ...
        ValueError: got labels from 1 to 3 (row 2 is 3), wanted classes 0, ..., 2. They count from 1: pass y - 1.
    """
    least = -1 if unknown else 0
    outside = (y < least) | (y >= num_classes)
    if not bool(outside.any()):
        return
    row = int(outside.flatten().nonzero()[0])
    known = y[y >= 0] if unknown else y
    low, high = (int(v) for v in known.aminmax()) if known.numel() else (int(y.min()), int(y.max()))
    also = ", -1 where unknown" if unknown else ""
    if low >= 1 and high == num_classes:
        remedy = "torch.where(y > 0, y - 1, -1)" if unknown else "y - 1"
        remedy = f"They count from 1: pass {remedy}."
    elif low < 0 and not unknown:
        remedy = "A class that is not known is for SemiSupervised; give each datum its class here."
    else:
        remedy = f"Number the classes from 0, or build the pair for as many as there are (num_classes={high + 1})."
    raise ValueError(
        f"got labels from {low} to {high} (row {row} is {int(y.flatten()[row])}), wanted classes 0, ..., "
        f"{num_classes - 1}{also}. {remedy}"
    )


def readable(y: Tensor) -> bool:
    """Whether values may be looked at here: not in a step that is being captured, nor where it would hold up a GPU."""
    if get_proxy_mode() is not None or torch.compiler.is_compiling():
        return False
    return y.device.type == "cpu" or is_validation_enabled()


def one_hot(y: Tensor, num_classes: int) -> Tensor:
    """Class numbers (...) as rows of zeros and a one, (..., C) of booleans; a number that is no class is refused where
    values can be read, and else a row of nan.

    Example:
        >>> one_hot(torch.tensor([2, 0]), 3).int()
        tensor([[0, 0, 1],
                [1, 0, 0]], dtype=torch.int32)
    """
    hot = y.unsqueeze(-1) == torch.arange(num_classes, device=y.device)
    if readable(y):
        class_check(y, num_classes)
        return hot
    return torch.where(hot.any(-1, keepdim=True), hot.to(torch.get_default_dtype()), torch.nan)


def is_class_numbers(y: Tensor) -> bool:
    """Whether a tensor holds whole numbers: class numbers, and not values."""
    return not y.is_floating_point() and not y.is_complex() and y.dtype != torch.bool


def rows_of(y: Tensor, num_columns: int, count: int | None) -> Tensor:
    """What is known of each datum as a row, (..., C): as it is, or of class numbers, (...), one-hot.

    `count` is how many data it goes with; None where that is not known here.

    Raises:
        ValueError: Another shape; a number that is no class.
    Example:
        >>> rows_of(torch.tensor([1, 0]), 2, 2).int().tolist(), rows_of(torch.zeros(2, 3), 3, 2).shape
        ([[0, 1], [1, 0]], torch.Size([2, 3]))
    """
    if not isinstance(y, Tensor):
        raise ValueError(f"got labels of type {type(y).__name__}, wanted a tensor. Pass torch.as_tensor(y).")
    counted, size = ("", "N") if count is None else (f" for {count} data", count)
    wanted = f"wanted one row each, ({size}, {num_columns}), or class numbers 0, ..., {num_columns - 1} as ({size},)"
    if y.dim() == 1 and (count is None or len(y) == count):
        if is_class_numbers(y) and num_columns > 1:
            return one_hot(y, num_columns)
        if num_columns == 1:
            return y.unsqueeze(-1)
        remedy = "For class numbers pass y.long(); for one row that all data share pass y.expand(len(x), -1)."
    elif y.dim() >= 2 and y.shape[-1] == num_columns and (count is None or y.shape[-2] == count):
        return y
    elif y.dim() >= 2 and y.shape[-1] == 1 and is_class_numbers(y):
        remedy = "For class numbers in a column pass y[:, 0]."
    else:
        remedy = "Pass both: model(x, y), and fit(..., (x, y))."
    raise ValueError(f"got labels y of shape {tuple(y.shape)} and dtype {y.dtype}{counted}, {wanted}. {remedy}")
