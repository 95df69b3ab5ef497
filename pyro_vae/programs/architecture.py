"""What a pair is built of, as plain data that is saved beside its weights: a standard VAE, or a pair of the zoo."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from pyro_vae.options import integer, integers
from pyro_vae.parts import names
from pyro_vae.programs import kinds
from pyro_vae.programs.pair import Guide, Model
from pyro_vae.protocols import PriorOfPosterior, default_options, parameters_per_pixel, standardize
from pyro_vae.words import did_you_mean, one_of


@dataclass(frozen=True)
class Architecture:
    """The parts of a pair by name, and their options.

    A name of the package, or ``module:Class`` for a class of your own: a posterior is
    built by Class(encoder, latent_dim, **options), a prior by Class(latent_dim,
    **options), a likelihood by Class(decoder, **options), with its traits (`pyro_vae.protocols`).

    Attributes:
        x_shape: Shape of one datum, such as (1, 28, 28).
        latent_dim: D.
        network: "mlp", "gated", "conv", "residual", or "linear" (no hidden layer).
        hidden: Widths of the hidden layers, from the data to the latent; the decoder
            has them in reverse. For "conv" and "residual" the channels.
        activation: Name of the activation.
        posterior: A name of `pyro_vae.parts.names`; "point" for a plain autoencoder.
        posterior_options: Its keyword arguments.
        prior: A name of `pyro_vae.parts.names`.
        prior_options: Its keyword arguments; of "vamp" with num_components.
        likelihood: A name of `pyro_vae.parts.names`.
        likelihood_options: Its keyword arguments.
        scale: Of the normal likelihood: a number, "learned", "per-pixel", "network".
        standardize: Of the normal likelihood: whether guide and likelihood work on (x - m) / s, m and s the mean and
            standard deviation of the training data, column by column; densities stay those of x (see
            `pyro_vae.parts.standardize`). None does so for vectors of which a column is far from size one, when
            they are first fitted, and says it; it starts the networks of large counts at their size likewise.
        model: A name of `pyro_vae.programs.kinds`: "vae", or a pair of the zoo, which then has these parts.
        model_options: Its own options, such as num_classes of "conditional".
    Raises:
        ValueError: An unknown name, or parts that do not fit together.
    """

    x_shape: tuple[int, ...]
    latent_dim: int = 50
    network: str = "mlp"
    hidden: tuple[int, ...] = (400, 400)
    activation: str = "silu"
    posterior: str = "diagonal"
    likelihood: str = "bernoulli"
    scale: float | str = "learned"
    prior: str = "normal"
    posterior_options: dict[str, Any] = field(default_factory=dict)
    prior_options: dict[str, Any] = field(default_factory=dict)
    likelihood_options: dict[str, Any] = field(default_factory=dict)
    standardize: bool | None = None
    model: str = "vae"
    model_options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "x_shape", integers("x_shape", self.x_shape))
        object.__setattr__(self, "hidden", _widths(self.hidden))
        object.__setattr__(self, "latent_dim", integer("latent_dim", self.latent_dim))
        object.__setattr__(self, "network", one_of("network", self.network, names.NETWORKS))
        layers = names.networks(self.network).layers
        for kind in names.PARTS:
            object.__setattr__(self, kind, names.check(kind, getattr(self, kind)))
            options = getattr(self, f"{kind}_options")
            if not isinstance(options, Mapping):
                raise ValueError(f"{kind}_options must be a dict of its keyword arguments, got {options!r}.")
        if self.standardize not in (None, True, False):
            raise ValueError(f"got standardize={self.standardize!r}, wanted True, False or None.")
        if isinstance(self.scale, str) and self.scale not in ("learned", "per-pixel", "network"):
            raise ValueError(f'got scale={self.scale!r}, wanted a number, "learned", "per-pixel" or "network".')
        if layers and not (self.hidden and all(width > 0 for width in self.hidden)):
            raise ValueError(f"hidden must be one or more positive widths, got {self.hidden}.")
        names.check_supports(self.posterior, self.prior)
        object.__setattr__(self, "model", kinds.check(self.model, self.model_options))

    @classmethod
    def of(cls, x_shape: Sequence[int], **options: Any) -> Architecture:
        """An architecture from options whose names are checked.

        Raises:
            ValueError: An unknown option, or a value that it cannot have.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ValueError(f"unknown option {name!r}, wanted some of {', '.join(known[1:])}.{hint}")
        return cls(x_shape, **options)  # type: ignore[arg-type]

    @property
    def foreign(self) -> tuple[str, ...]:
        """The parts whose code lies outside this package."""
        return tuple(name for kind in names.PARTS if names.is_foreign(name := getattr(self, kind)))

    def encoder(self, beside: int = 0) -> nn.Module:
        """Data to features; with so many numbers `beside` them, the two joined as one vector."""
        shape = (math.prod(self.x_shape) + beside,) if beside else self.x_shape
        return names.networks(self.network).encoder(shape, self.hidden, self.activation)

    def decoder(self, parameters_per_pixel: int = 1, beside: int = 0) -> nn.Module:
        """Latents, and numbers `beside` them, to the parameters of the likelihood."""
        parameters_per_pixel = integer("parameters_per_pixel", parameters_per_pixel)
        out_shape = (parameters_per_pixel * self.x_shape[0], *self.x_shape[1:])
        make = names.networks(self.network).decoder
        return make(self.latent_dim + beside, out_shape, self.hidden[::-1], self.activation)

    def decoder_features(self) -> nn.Module:
        """Latents to features, by an encoder of the decoder's widths."""
        return names.networks(self.network).encoder((self.latent_dim,), self.hidden[::-1], self.activation)

    def option(self, name: str) -> Any:
        """One of the model's own options that has no default.

        Raises:
            ValueError: It is not there.
        """
        if name not in self.model_options:
            raise ValueError(f"the model {self.model} needs model_options {name}, got {self.model_options}.")
        return self.model_options[name]

    def build(self) -> Any:
        """The pair with new weights: a `VAE`, or the class of the zoo that `model` names.

        Raises:
            ValueError: Parts that cannot be built so, or do not fit together.
        """
        return kinds.find(self.model).of(self)

    def pair(self) -> tuple[Model, Guide]:
        """p(z) p(x | z) and q(z | x) with new weights.

        The two share the encoder where the prior is a mixture of posteriors ("vamp").

        Raises:
            ValueError: Parts that cannot be built so, or do not fit together.
        """
        likelihood, posterior = self.a_likelihood(), self.a_posterior()
        maker, first = None, list[Any]([self.latent_dim])
        family = names.find("prior", self.prior)
        if isinstance(family, PriorOfPosterior):
            maker, first = family.for_posterior, [posterior, self.x_shape]
        prior = names.build("prior", self.prior, first, self.prior_options, maker=maker)
        names.check_same_support(self.posterior, self.prior, posterior, prior)
        return Model(prior, likelihood), Guide(posterior, standardize=standardize(likelihood))

    def a_posterior(self, beside: int = 0) -> Any:
        """q(z | x) of the posterior's family, or of x and numbers `beside` it, joined."""
        return names.build("posterior", self.posterior, [self.encoder(beside), self.latent_dim], self.posterior_options)

    def a_likelihood(self, beside: int = 0) -> Any:
        """p(x | z) of the likelihood's family, or of z and numbers `beside` it, joined."""
        given = self.likelihood_options
        family = names.find("likelihood", self.likelihood)
        defaults = default_options(family, self.x_shape, self.scale, self.standardize, given)
        likelihood = names.build("likelihood", self.likelihood, [nn.Identity()], given, defaults)
        # How many channels the decoder has is the likelihood's to say.
        likelihood.decoder = self.decoder(parameters_per_pixel(likelihood), beside)
        if self.standardize and standardize(likelihood) is None:
            raise ValueError(
                f"got standardize=True with the likelihood {self.likelihood!r}, wanted 'normal': the values of the "
                "others lie in sets that (x - m) / s leaves. Take the normal likelihood, or leave standardize out."
            )
        return likelihood


def _widths(hidden: Any) -> tuple[int, ...]:
    try:
        return integers("hidden", hidden)
    except ValueError:
        raise ValueError(f"hidden must be one or more positive widths, got {hidden!r}. Pass (400, 400), say.") from None
