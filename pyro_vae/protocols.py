"""What parts and programs say of themselves. Read this first to write a part of your own.

A part is any callable that returns a distribution; it need not inherit anything. K samples, B data, D latents:

    prior        ()  -> p(z)          batch_shape (),     event_shape (D,)
    likelihood   z, (..., D) -> p(x | z)     batch_shape (...),  event_shape x_shape
    posterior    x, (..., *x_shape) -> q(z | x)   batch_shape (...),  event_shape (D,)

Whatever else a consumer wants to know of a part is a trait: a class attribute or method of the Protocols below, read
by the function beside it and nowhere else. An object without the trait gets the fallback that the function states, so
parts of other packages work as they are.

A part that the command line knows by name has one line in `pyro_vae.parts.names`.

Closed-form KL is torch's: what is registered with ``torch.distributions.register_kl`` for your class of distributions
is what `closed_form_kl` finds, and what Pyro's TraceMeanField_ELBO does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeGuard, runtime_checkable

from pyro.distributions import TorchDistribution
from torch import Tensor, nn
from torch.distributions import constraints, kl_divergence

Rescoring = Literal["one pass", "D passes", "impossible"]
_COSTS: tuple[Rescoring, ...] = ("impossible", "D passes", "one pass")  # the dearest first


Free = dict[str, Tensor]
Build = Callable[[Free], TorchDistribution]


class Local(NamedTuple):
    """A family without its encoder: free parameters per datum, and what they mean.

    Attributes:
        free: Unconstrained tensors by name, the batch shape of the distribution in front.
        build: From such tensors to the distribution.
        rates: The learning rate of a tensor relative to the others, where it is not 1
            (weights of a network want smaller steps than a mean).
    """

    free: Free
    build: Build
    rates: Mapping[str, float] = {}


class Posterior(Protocol):
    """q(z | x).

    Attributes:
        rescoring: What it takes to score a sample that the distribution did not draw (see `rescoring`).
        support: Where z lies, a constraint of torch over (D,) (see `support`).
        passes: As of `Family`.
        has_density: Whether it is more than a point (see `has_density`).
    """

    rescoring: Rescoring
    has_density: ClassVar[bool]
    passes: ClassVar[int]
    support: ClassVar[Any]

    def __call__(self, x: Tensor) -> TorchDistribution:
        """x, (..., *x_shape), to a distribution of batch_shape (...), event_shape (D,)."""


class Headed(Posterior, Protocol):
    """q(z | x) = family(head(h(x))): P numbers read off an encoder (see `has_head`).

    `Amortized` is one: a subclass writes `family` and inherits the rest.

    Attributes:
        head: Features, (..., F), to P numbers, (..., P).
    """

    head: nn.Module

    def family(self, parameters: Tensor) -> TorchDistribution:
        """Unconstrained numbers, (..., P), to the distribution, batch_shape (...)."""


@runtime_checkable
class Unamortized(Protocol):
    """A posterior that can do without its encoder: free parameters per datum (see `has_start`)."""

    def local(self, parameters: Tensor) -> Local:
        """The same family at free parameters for each datum, which start at these, (B, P)."""

    def parameters_near(self, loc: Tensor, scale: Tensor) -> Tensor:
        """Parameters, (..., P), of a member near N(loc, diag scale^2), both (..., D)."""


class Prior(Protocol):
    """p(z).

    Attributes:
        support: As of `Posterior`.
    """

    support: ClassVar[Any]

    def __call__(self) -> TorchDistribution:
        """A distribution of batch_shape (), event_shape (D,)."""


@runtime_checkable
class PriorOfPosterior(Protocol):
    """A prior that is made of the guide's posterior, as `VampPrior`; a standard VAE builds it by this class method."""

    @classmethod
    def for_posterior(cls, posterior: Any, x_shape: Sequence[int], **options: Any) -> Any:
        """A prior that shares this posterior, for data of this shape."""


class Likelihood(Protocol):
    """p(x | z).

    Attributes:
        parameters_per_pixel: n, how many numbers the decoder gives for each pixel (see `parameters_per_pixel`).
        values: What data it is a distribution of: "binary", "continuous" (a density), "levels" (grey levels
            x = v / (L - 1)) or "counts" (see `values`).
        standardize: What the guide is shown of the data in their place, x to u, (B, *x_shape); None for x itself.
    """

    parameters_per_pixel: int
    values: ClassVar[str | None]
    standardize: Any

    def __call__(self, z: Tensor) -> TorchDistribution:
        """z, (..., D), to a distribution of batch_shape (...), event_shape x_shape."""


@runtime_checkable
class OfArchitecture(Protocol):
    """A likelihood of which a standard VAE sets options that the user does not give (see `default_options`)."""

    @classmethod
    def default_options(
        cls, x_shape: tuple[int, ...], scale: float | str, standardize: bool | None, given: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Keyword arguments that follow from those of `Architecture`; what is given by the user goes before them."""


class Family(Protocol):
    """A class of distributions.

    Attributes:
        twice_differentiable: Whether samples carry second derivatives (see `twice_differentiable`).
        passes: Networks that look at a value to score it (see `passes`).
        knows_its_draw: Whether the latest draw is scored without the inverse that others need (see `knows_its_draw`).
    """

    twice_differentiable: bool
    passes: int
    knows_its_draw: bool


@runtime_checkable
class SeesData(Protocol):
    """A module anywhere in a pair that wants to see all data before the first step, to start at their statistics."""

    def before_fit(self, batches: Iterable[tuple[Any, ...]]) -> None:
        """Called once by `fit`, with batches of the programs' arguments, large, in order; may be iterated again."""


@runtime_checkable
class ChecksData(Protocol):
    """A program that refuses data up front, so that no step need read values."""

    def check_data(self, *args: Any) -> None:
        """Called by `fit` with each batch of the program's arguments; raises a ValueError."""


def rescoring(*things: object) -> Rescoring:
    """What it takes to score a sample that was not just drawn: the dearest that one of these says.

    "one pass", "D passes" (an autoregressive inverse) or "impossible" (no inverse). "one pass" where none says.

    Args:
        things: Guides, posteriors, modules.
    Raises:
        ValueError: One says something else.
    Example:
        >>> rescoring(nn.Linear(1, 1))
        'one pass'
    """
    costs = [cost for thing in things if (cost := getattr(thing, "rescoring", None)) is not None]
    for cost in costs:
        if cost not in _COSTS:
            raise ValueError(f"got rescoring={cost!r}, wanted one of {', '.join(map(repr, _COSTS))}.")
    return next((cost for cost in _COSTS if cost in costs), "one pass")


def has_density(posterior: object) -> bool:
    """Whether a posterior (or a class of them) has a density; not one that is a point, as an autoencoder's; so it has
    where it does not say.
    """
    return getattr(posterior, "has_density", True)


def support(part: object) -> Any:
    """Where the z of a posterior or prior (or a class of them) lies; None for one that does not say.

    Example:
        >>> support(nn.Linear(1, 1)) is None
        True
    """
    found = getattr(part, "support", None)
    while isinstance(found, constraints.independent):
        found = found.base_constraint
    return found


def support_name(part: object) -> str:
    """The same in a word: "real", "sphere"; "" for a part that does not say."""
    found = support(part)
    return "" if found is None else type(found).__name__.strip("_").lower()


def same_support(one: object, other: object) -> bool:
    """Whether a posterior and a prior may lie in the same set: they say the same, or one of them says nothing.

    What they do not say shows when they are run: `fit` compares their distributions.
    """
    return len({support_name(one), support_name(other)} - {""}) < 2


def parameters_per_pixel(likelihood: object) -> int:
    """How many numbers a likelihood wants from its decoder for each pixel; 1 for one that does not say."""
    return getattr(likelihood, "parameters_per_pixel", 1)


def values(likelihood: object) -> str | None:
    """What data a likelihood (or a class of them) is a distribution of; None for one that does not say."""
    return getattr(likelihood, "values", None)


def default_options(
    likelihood: Any, x_shape: tuple[int, ...], scale: float | str, standardize: bool | None, given: Mapping[str, Any]
) -> dict[str, Any]:
    """What a standard VAE hands a class of likelihoods beside what the user gives; nothing to one without the trait."""
    if isinstance(likelihood, OfArchitecture):
        return likelihood.default_options(x_shape, scale, standardize, given)
    return {}


def standardize(likelihood: object) -> Any:
    """What the guide of a standard VAE is shown of the data, x to u, (B, *x_shape); None for the data themselves."""
    return getattr(likelihood, "standardize", None)


def has_head(part: object) -> TypeGuard[Headed]:
    """Whether a module is a posterior whose distribution is a function of what its head returns."""
    return isinstance(getattr(part, "head", None), nn.Module) and callable(getattr(part, "family", None))


def has_start(part: object) -> bool:
    """Whether a posterior can be fitted for each datum without an encoder to start from."""
    return isinstance(part, Unamortized)


def passes(distribution: object) -> int:
    """How many networks look at a value to score it; 0 for a distribution or posterior that does not say."""
    return getattr(distribution, "passes", 0)


def twice_differentiable(distribution: Any) -> bool:
    """Whether samples carry second derivatives; so does every distribution that does not say otherwise, inside."""
    while hasattr(distribution, "base_dist"):
        distribution = distribution.base_dist
    return getattr(distribution, "twice_differentiable", True)


def knows_its_draw(distribution: object) -> bool:
    """Whether a distribution scores its latest draw at less cost than another value; not where it does not say."""
    return getattr(distribution, "knows_its_draw", False)


def closed_form_kl(q: Any, p: Any) -> Tensor | None:
    """KL(q || p) in nats, of the batch_shape of the two; None where torch has none registered for them.

    Example:
        >>> import torch, pyro.distributions as dist
        >>> closed_form_kl(dist.Normal(torch.tensor(1.0), 1.0), dist.Normal(torch.tensor(0.0), 1.0))
        tensor(0.5000)
    """
    try:
        return kl_divergence(q, p)
    except NotImplementedError:
        return None


def closed_form_sites(guide: object) -> tuple[str, ...]:
    """The latent sites of a guide at which `fit` takes the divergence in closed form; none where it does not say."""
    return tuple(getattr(guide, "closed_form", ()))
