"""Data with known labels, or any other known covariate y.

    model   p(z | y) p(x | z, y)        p(z | y) = p(z) where the prior does not look at y
    guide   q(z | x, y)

Everything is conditional on y: a bound is one on log p(x | y). Both programs take (x, y): fit(pair, (x, y)).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro
import torch
from pyro.distributions import TorchDistribution
from torch import Tensor, nn

from pyro_vae.options import checked
from pyro_vae.parts import names
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.parts.priors import StandardNormal
from pyro_vae.programs.architecture import Architecture
from pyro_vae.programs.pair import Named, batch_check, data_check, observe
from pyro_vae.programs.vae import Answers, pixels_of
from pyro_vae.programs.zoo import assembly
from pyro_vae.programs.zoo.assembly import class_check, is_class_numbers, one_hot, pixel_likelihood, rows_of
from pyro_vae.randomness import noise
from pyro_vae.tensors import data_of


class Joined(nn.Module):
    """A conditional on two things, of a conditional on one vector: the two, joined.

        Joined(part)(a, y) = part([a, y])

    Leading dimensions broadcast, so that K samples of z, (K, B, D), go with one y for
    each datum, (B, C), and B data with the C labels that an enumeration tries, (C, 1).

    Args:
        part: (..., F + C) to a distribution of batch_shape (...), F the size of one a.
        event_dim: Dimensions of one a: 1 for a latent, 3 for an image.
        num_classes: C where y holds class labels 0, ..., C - 1, (...), which become
            one-hot; None where y is (..., C) itself.
    Raises:
        ValueError: a or y has fewer dimensions than that; one vector y beside many a; a class number that is none.
    Example:
        >>> part = Joined(DiagonalNormal(nn.Linear(2 + 3, 8), 4), num_classes=3)
        >>> part(torch.zeros(7, 5, 2), torch.tensor([0, 1, 2, 0, 1])).batch_shape
        torch.Size([7, 5])
    """

    @checked
    def __init__(
        self, part: Callable[[Tensor], TorchDistribution], event_dim: int = 1, num_classes: int | None = None
    ) -> None:
        super().__init__()
        self.part, self.event_dim, self.num_classes = part, event_dim, num_classes

    def forward(self, a: Tensor, y: Tensor) -> TorchDistribution:
        """The distribution given a, (..., *event), and y, (..., C), or class labels (...)."""
        if self.num_classes is not None:
            if not is_class_numbers(y):
                raise ValueError(
                    f"got labels of dtype {y.dtype} and shape {tuple(y.shape)}, wanted class numbers, integers from 0 "
                    f"to {self.num_classes - 1}. Of one-hot labels take y.argmax(-1), of whole numbers y.long()."
                )
            y = one_hot(y, self.num_classes)
        elif y.dim() == 1 and a.dim() > self.event_dim:
            raise ValueError(
                f"got y of shape {tuple(y.shape)} beside {tuple(a.shape)}, wanted a row for each, (..., C): a vector "
                "would be one row for all. For class labels pass num_classes to Joined; for one row that all share "
                "y.expand(len(x), -1)."
            )
        if a.dim() < self.event_dim or y.dim() < 1:
            raise ValueError(
                f"got tensors of shapes {tuple(a.shape)} and {tuple(y.shape)}, wanted {self.event_dim} dimensions or "
                "more of the first, and y of shape (..., C). For class labels pass num_classes to Joined."
            )
        a = a.reshape(*a.shape[: a.dim() - self.event_dim], -1)
        leading = torch.broadcast_shapes(a.shape[:-1], y.shape[:-1])
        return self.part(torch.cat([a.expand(*leading, -1), y.to(a).expand(*leading, -1)], -1))


class ConditionalModel(Named):
    """p(x, z | y), over a plate "data" of the sites "z" and "x"; the arguments are those of `Conditional`."""

    def __init__(
        self, prior: assembly.Conditional, likelihood: assembly.Conditional, conditional_prior: bool, y_dim: int | None
    ) -> None:
        super().__init__()
        self.prior, self.likelihood, self.conditional_prior, self.y_dim = prior, likelihood, conditional_prior, y_dim

    def check_data(self, x: Any = None, y: Any = None, *_: Any) -> None:
        """Refuse labels that are none, before anything is trained on them (see `pyro_vae.inference.starts`)."""
        _data_check(y, self.y_dim, self.likelihood)

    def given_y(self, y: Tensor) -> TorchDistribution:
        """p(z | y), batch_shape (B,)."""
        y = _rows(self, y)
        return self.prior(y) if self.conditional_prior else self.prior().expand([len(y)])

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        """Observe x, (B, *x_shape), or draw it where it is None, given what is known of each datum, y (B, ...)."""
        _rows_check(x, y)
        y = _rows(self, y, None if x is None else len(x))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", self.given_y(y))
            return observe(self.likelihood(z, y), x)


class ConditionalGuide(Named):
    """q(z | x, y), over a plate "data" of the site "z"; the arguments are those of `Conditional`."""

    def __init__(self, posterior: assembly.Conditional, y_dim: int | None) -> None:
        super().__init__()
        self.posterior, self.y_dim = posterior, y_dim

    def check_data(self, x: Any = None, y: Any = None, *_: Any) -> None:
        """Refuse labels that are none, before anything is trained on them (see `pyro_vae.inference.starts`)."""
        _data_check(y, self.y_dim, self.posterior)

    def forward(self, x: Tensor | None, y: Tensor) -> Tensor:
        """Draw z ~ q(z | x, y), (B, D)."""
        x = data_check(x)
        _rows_check(x, y)
        y = _rows(self, y, len(x))
        with pyro.plate("data", len(x)):
            posterior = self.posterior(x, y)
            batch_check(posterior, len(x))
            return pyro.sample("z", posterior)


class Conditional(Answers):
    """A conditional VAE, ``pair.model`` and ``pair.guide``, both programs of (x, y).

    Args:
        prior: () to p(z), batch_shape (); or, with conditional_prior, y to p(z | y), batch_shape (B,).
        likelihood: (z, y) to p(x | z, y); `Joined` makes one of any likelihood.
        posterior: (x, y) to q(z | x, y), batch_shape (B,); `Joined` makes one of any posterior.
        conditional_prior: Whether the prior takes y.
        y_dim: C where all three take y as rows (B, C): class numbers (B,) are then taken too, and become one-hot.
    Example:
        >>> pair = Conditional.build((1, 8, 8), 10, latent_dim=2, hidden=(16,))
        >>> pair.sample(torch.eye(10)).shape
        torch.Size([10, 1, 8, 8])

    Reference: Sohn et al., Learning Structured Output Representation using Deep
        Conditional Generative Models, 2015.
    """

    def __init__(
        self, prior: assembly.Conditional, likelihood: assembly.Conditional, posterior: assembly.Conditional,
        conditional_prior: bool = False, y_dim: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = ConditionalModel(prior, likelihood, conditional_prior, y_dim)
        self.guide = ConditionalGuide(posterior, y_dim)

    @classmethod
    @checked
    def build(
        cls,
        x_shape: Sequence[int],
        y_dim: int,
        latent_dim: int = 50,
        hidden: Sequence[int] = (400, 400),
        *,
        activation: str = "silu",
        likelihood: str | Callable[[nn.Module], Any] = Bernoulli,
        posterior: str | Callable[[nn.Module, int], Any] = DiagonalNormal,
        conditional_prior: bool = False,
    ) -> Conditional:
        """Dense networks with new weights.

        Args:
            x_shape: Shape of one datum.
            y_dim: C; y is (B, C), or class numbers 0, ..., C - 1, (B,).
            latent_dim: D.
            hidden: Widths of the hidden layers, from the data to the latent.
            activation: Name of the activation.
            likelihood: A class of `pyro_vae.parts.likelihoods`, its name, or a function of the decoder.
            posterior: A class of `pyro_vae.parts.posteriors`, or its name.
            conditional_prior: p(z | y), a diagonal Gaussian linear in y, instead of p(z).
        """
        features = MLP(x_shape, (), None).out_features
        decoder = pixel_likelihood(likelihood, latent_dim + y_dim, hidden[::-1], x_shape, activation)
        encoder = MLP(features + y_dim, hidden, None, activation)
        prior = DiagonalNormal(MLP(y_dim, (), None), latent_dim) if conditional_prior else StandardNormal(latent_dim)
        joined = Joined(names.made("posterior", posterior, encoder, latent_dim), event_dim=len(x_shape))
        return cls(prior, Joined(decoder), joined, conditional_prior, y_dim)

    @classmethod
    def _of(cls, architecture: Architecture) -> Self:
        classes, dims = architecture.option("num_classes"), architecture.latent_dim
        conditional_prior = bool(architecture.model_options.get("conditional_prior", False))
        prior = DiagonalNormal(MLP(classes, (), None), dims) if conditional_prior else StandardNormal(dims)
        likelihood = Joined(architecture.a_likelihood(classes))
        posterior = Joined(architecture.a_posterior(classes), event_dim=len(architecture.x_shape))
        return cls(prior, likelihood, posterior, conditional_prior, classes)

    def posterior(self, x: Any, *y: Any) -> TorchDistribution:
        """q(z | x, y), batch_shape (B,)."""
        x = data_of(x, self.guide)
        return super().posterior(x, *(_rows(self.guide, data_of(one, name="y"), len(x)) for one in y))

    def decode(self, z: Any, *y: Any) -> TorchDistribution:
        """p(x | z, y), batch_shape (...)."""
        return super().decode(z, *(_rows(self.model, data_of(one, name="y")) for one in y))

    @torch.no_grad()
    @checked
    def sample(self, y: Any, *, pixels: str = "mean", seed: int | None = None) -> Tensor:
        """New data, one for each y: z ~ p(z | y), then x from p(x | z, y).

        Args:
            y: (B, C), or class numbers (B,).
            pixels: "mean" for E[x | z, y]; "draw" for a sample of p(x | y).
            seed: As for `VAE.sample`.
        Returns:
            (B, *x_shape).
        """
        y = data_of(y, name="y")
        with noise(seed):
            return pixels_of(self.decode(self.model.given_y(y).sample(), y), pixels)


def _rows_check(x: Tensor | None, y: Tensor | None) -> None:
    if y is None or x is not None and (not len(y.shape) or len(x) != len(y)):
        labels = None if y is None else len(y) if len(y.shape) else "no row of"
        sizes = f"{None if x is None else len(x)} data and {labels} labels"
        raise ValueError(f"got {sizes}, wanted one y for each x. Pass both: model(x, y), and fit(..., (x, y)).")


def _rows(program: ConditionalModel | ConditionalGuide, y: Tensor, count: int | None = None) -> Tensor:
    """y as the program's parts take it: rows of their dtype where it was built for C columns."""
    if program.y_dim is None:
        return y
    like = next((p for p in program.parameters() if p.is_floating_point()), None)
    y = rows_of(y, program.y_dim, count)
    return y if like is None else y.to(like.dtype)


def _data_check(y: Any, y_dim: int | None, part: Any) -> None:
    if not isinstance(y, Tensor):
        return  # the programs say what is missing
    if y_dim is not None:
        if y.dim() == 1 and is_class_numbers(y) and y_dim > 1:
            class_check(y, y_dim)
        else:
            rows_of(y, y_dim, len(y))
    elif isinstance(part, Joined) and part.num_classes is not None and is_class_numbers(y):
        class_check(y, part.num_classes)
