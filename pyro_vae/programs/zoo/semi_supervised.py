"""Labels known for some of the data.

    model   p(y) p(z) p(x | z, y)
    guide   q(y | x) q(z | x, y)

With L(x, y) = E_q(z|x,y)[log p(x, y, z) - log q(z | x, y)], a bound on log p(x, y), the bound for a datum is

    L(x, y)                                       where its label y is known,
    sum_y q(y | x) (L(x, y) - log q(y | x))       on log p(x), where it is not.

Both are one bound: where y is known, the guide's q(y | x) is the point at y, and the sum has one term. So one program
takes batches in which labels are missing (y = -1), and Pyro's TraceEnum_ELBO(max_plate_nesting=1) sums over y exactly.
Under anything else the guide draws y, which is as valid, noisier, and not reparameterised.

The first bound does not train q(y | x), so alpha (log q(y | x) - its own value without gradient) is added for labelled
data: zero in all that is reported, and alpha grad log q in the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import pyro
import pyro.distributions as dist
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
from pyro_vae.programs.zoo.assembly import (
    Conditional,
    class_check,
    is_class_numbers,
    pixel_likelihood,
    readable,
)
from pyro_vae.programs.zoo.conditional import Joined
from pyro_vae.randomness import noise
from pyro_vae.tensors import data_of, running


class Labels(nn.Module):
    """p(y) = 1 / C.

    Example:
        >>> Labels(4)().log_prob(torch.tensor(3)).exp()
        tensor(0.2500)
    """

    logits: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes must be 2 or more, got {num_classes}.")
        self.register_buffer("logits", torch.zeros(num_classes), persistent=False)

    def forward(self) -> TorchDistribution:
        return dist.Categorical(logits=self.logits)


class Classifier(nn.Module):
    """q(y | x) = Categorical(softmax(h(x))).

    Args:
        network: x, (..., *x_shape), to logits, (..., C).
    Example:
        >>> Classifier(nn.Linear(3, 4))(torch.zeros(5, 3)).probs.shape
        torch.Size([5, 4])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> TorchDistribution:
        return dist.Categorical(logits=self.network(x))


class SemiSupervisedModel(Named):
    """p(x, y, z), over a plate "data" of the sites "y", "z" and "x", and "label" where labels are given."""

    def __init__(self, labels: Conditional, prior: Conditional, likelihood: Conditional) -> None:
        super().__init__()
        self.labels, self.prior, self.likelihood = labels, prior, likelihood

    def check_data(self, x: Any = None, y: Any = None, *_: Any) -> None:
        """Refuse labels that are none, before anything is trained on them (see `pyro_vae.inference.starts`)."""
        if isinstance(y, Tensor):
            label_check(None, y)
            class_check(y, self.labels().logits.shape[-1], unknown=True)

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, *, size: int = 1) -> Tensor:
        """As `Model`, given labels y, (B,) of integers, -1 where unknown; None for none known."""
        labels = self.labels()
        label_check(x, y, labels)
        with pyro.plate("data", size if x is None else len(x)):
            drawn = pyro.sample("y", labels)
            if y is not None:  # a known label is seen without error: p(label | y) = 1 where they agree, else 0
                agree = (drawn == y) | (y < 0)
                pyro.factor("label", torch.where(agree, labels.logits.new_zeros(()), -torch.inf))
            z = pyro.sample("z", self.prior())
            return observe(self.likelihood(z, drawn), x)


class SemiSupervisedGuide(Named):
    """q(y | x) q(z | x, y), over a plate "data" of the sites "y" and "z"; q(y | x) a point where y is known."""

    @checked
    def __init__(self, classifier: Conditional, posterior: Conditional, alpha: float = 1.0) -> None:
        super().__init__()
        if alpha < 0:
            raise ValueError(f"alpha must be zero or positive, got {alpha}.")
        self.classifier, self.posterior, self.alpha = classifier, posterior, alpha

    def forward(self, x: Tensor | None = None, y: Tensor | None = None, **_: Any) -> Tensor:
        """Draw y ~ q(y | x) where it is not known, and z ~ q(z | x, y), (B, D)."""
        x = data_check(x)
        label_check(x, y)
        with pyro.plate("data", len(x)):
            given_x = self.classifier(x)
            batch_check(given_x, len(x))
            label_check(x, y, given_x)
            if y is not None:
                if self.alpha:
                    known = torch.where(y < 0, 0.0, given_x.log_prob(y.clamp(min=0)))
                    # A factor of the guide enters the bound with a minus.
                    pyro.factor("classification", -self.alpha * (known - known.detach()), has_rsample=True)
                # The point at the label, and q(y | x) where that is -1.
                logits = given_x.logits
                hit = y.unsqueeze(-1) == torch.arange(logits.shape[-1], device=y.device)
                point = torch.where(hit, 0.0, -torch.inf).to(logits)
                given_x = dist.Categorical(logits=torch.where((y < 0).unsqueeze(-1), logits, point))
            drawn = pyro.sample("y", given_x, infer={"enumerate": "parallel"})
            posterior = self.posterior(x, drawn)
            batch_check(posterior, len(x))
            return pyro.sample("z", posterior)


class SemiSupervised(Answers):
    """A VAE with labels for some of its data (M2), ``pair.model`` and ``pair.guide``, programs of (x, y).

    Labels are integers, -1 where unknown. Train it with

        fit(pair.model, pair.guide, (x, y), loss=TraceEnum_ELBO(max_plate_nesting=1))

    The reference weighs the mean of log q(y | x) over the labelled data by 0.1 N, so its
    alpha is 0.1 N / (number of labels) here.

    Args:
        labels: () to p(y), a categorical of batch_shape ().
        prior: () to p(z), batch_shape ().
        likelihood: (z, y) to p(x | z, y); ``Joined(part, num_classes=C)`` makes one of any likelihood.
        classifier: x to q(y | x), a categorical of batch_shape (B,).
        posterior: (x, y) to q(z | x, y); ``Joined(part, event_dim, num_classes=C)`` makes one of any posterior.
        alpha: Weight of log q(y | x) of each labelled datum, in the gradient only.
    Example:
        >>> pair = SemiSupervised.build((1, 8, 8), 10, latent_dim=2, hidden=(16,))
        >>> pair.classify(torch.zeros(5, 1, 8, 8)).shape, pair.sample(torch.arange(10)).shape
        (torch.Size([5, 10]), torch.Size([10, 1, 8, 8]))

    Reference: Kingma et al., Semi-supervised Learning with Deep Generative Models, 2014. arXiv:1406.5298
    """

    def __init__(
        self, labels: Conditional, prior: Conditional, likelihood: Conditional, classifier: Conditional,
        posterior: Conditional, alpha: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = SemiSupervisedModel(labels, prior, likelihood)
        self.guide = SemiSupervisedGuide(classifier, posterior, alpha)

    @classmethod
    @checked
    def build(
        cls,
        x_shape: Sequence[int],
        num_classes: int,
        latent_dim: int = 50,
        hidden: Sequence[int] = (400, 400),
        *,
        alpha: float = 1.0,
        activation: str = "silu",
        likelihood: str | Callable[[nn.Module], Any] = Bernoulli,
        posterior: str | Callable[[nn.Module, int], Any] = DiagonalNormal,
    ) -> SemiSupervised:
        """Dense networks with new weights, p(y) uniform and p(z) standard normal.

        Args:
            num_classes: C.
            hidden: Widths of the hidden layers, from the data to the latent; the classifier has the same.
            alpha: As for the class; all else as of `Conditional.build`.
        """
        features = MLP(x_shape, (), None).out_features
        decoder = pixel_likelihood(likelihood, latent_dim + num_classes, hidden[::-1], x_shape, activation)
        encoder = MLP(features + num_classes, hidden, None, activation)
        return cls(
            Labels(num_classes),
            StandardNormal(latent_dim),
            Joined(decoder, num_classes=num_classes),
            Classifier(MLP(x_shape, hidden, num_classes, activation)),
            Joined(names.made("posterior", posterior, encoder, latent_dim), len(x_shape), num_classes),
            alpha,
        )

    @classmethod
    def _of(cls, architecture: Architecture) -> Self:
        classes = architecture.option("num_classes")
        features: Any = architecture.encoder()
        return cls(
            Labels(classes),
            StandardNormal(architecture.latent_dim),
            Joined(architecture.a_likelihood(classes), num_classes=classes),
            Classifier(nn.Sequential(features, nn.Linear(features.out_features, classes))),
            Joined(architecture.a_posterior(classes), len(architecture.x_shape), classes),
            float(architecture.model_options.get("alpha", 1.0)),
        )

    @torch.no_grad()
    @checked
    def classify(self, x: Any, *, seed: int | None = None) -> Tensor:
        """q(y | x), (B, C)."""
        with noise(seed):
            x = data_of(x, self.guide)
            return running(self.guide.classifier, x, network=self.guide).probs

    @torch.no_grad()
    @checked
    def sample(self, y: Any, *, pixels: str = "mean", seed: int | None = None) -> Tensor:
        """New data, one for each label: z ~ p(z), then x from p(x | z, y).

        Args:
            y: Labels, (B,).
            pixels: "mean" for E[x | z, y]; "draw" for a sample of p(x | y).
            seed: As for `VAE.sample`.
        Returns:
            (B, *x_shape).
        """
        y = data_of(y, name="y")
        with noise(seed):
            return pixels_of(self.decode(self.model.prior().expand([len(y)]).sample(), y), pixels)


def label_check(x: Tensor | None, y: Tensor | None, among: TorchDistribution | None = None) -> None:
    """Refuse labels that are not one integer for each datum, and, where values can be read, one of the classes."""
    if y is None:
        return
    if not is_class_numbers(y) or y.dim() != 1 or x is not None and len(x) != len(y):
        raise ValueError(
            f"got labels of shape {tuple(y.shape)} and dtype {y.dtype}, wanted one integer for each datum"
            f"{'' if x is None else f', ({len(x)},)'}, -1 where it is unknown. Of one-hot labels take y.argmax(-1)."
        )
    if among is not None and readable(y):
        class_check(y, among.logits.shape[-1], unknown=True)
