"""What the latents know about labels: classifiers on the posterior means, with their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.judging.latents import posterior_means
from pyro_vae.options import checked
from pyro_vae.traces import Program

METHODS = ("knn", "linear")


@dataclass(frozen=True)
class Accuracy:
    """Share of test labels that a classifier of the posterior means gets right.

    Attributes:
        value: The share.
        stderr: Its binomial standard error, given the training data.
        baseline: The share of the commonest training label: what no knowledge gives.
        num_test: Test data.
        num_train: Training data.
        protocol: The classifier, in words.
    """

    value: float
    stderr: float
    baseline: float
    num_test: int
    num_train: int
    protocol: str

    def __str__(self) -> str:
        return (
            f"{self.protocol}: {100 * self.value:.1f} ± {100 * self.stderr:.1f} % of {self.num_test} test labels "
            f"(trained on {self.num_train}; always the commonest: {100 * self.baseline:.1f} %)"
        )


@checked
def probe(
    guide: Program,
    train: Any,
    train_labels: Tensor,
    test: Any,
    test_labels: Tensor,
    *,
    method: str = "knn",
    num_neighbours: int = 10,
    site: str = "z",
    num_samples: int = 64,
    seed: int = 0,
) -> Accuracy:
    """Accuracy of a classifier of the posterior means.

    "knn": the majority of the nearest neighbours in Euclidean distance, each dimension as it
    is (dead dimensions have means that hardly move, and so do not count). "linear": multinomial
    logistic regression on standardised means, with an L2 penalty of 1.

    Args:
        guide: A Pyro program for q(z | x).
        train: Data as for `fit`, from which the classifier learns.
        train_labels: (N,) integers.
        test: Data as for `fit`, on which it is scored.
        test_labels: (M,) integers.
        method: "knn" or "linear".
        num_neighbours: Of "knn".
        site: Name of the latent site.
        num_samples: Samples per datum where the mean is not known.
        seed: Of those samples.
    Returns:
        The accuracy with its error.
    Raises:
        ValueError: Another method; labels of another length than the data; no such site.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 1.0))
        >>> x, y = torch.tensor([-1.0, -2.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 1])
        >>> probe(guide, x, y, x, y, num_neighbours=1).value
        1.0
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, wanted one of {', '.join(map(repr, METHODS))}.")
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    features = []
    for data, labels, which in ((train, train_labels, "train"), (test, test_labels, "test")):
        means = posterior_means(guide, data, site=site, num_samples=num_samples, seed=seed)
        means = means.reshape(len(means), -1)
        if labels.dim() != 1 or len(labels) != len(means):
            raise ValueError(
                f"got {which}_labels of shape {tuple(labels.shape)} for {len(means)} data, wanted ({len(means)},)."
            )
        features.append(means.double().cpu().numpy())
    known, wanted = train_labels.cpu().numpy(), test_labels.cpu().numpy()
    if method == "knn":
        count = min(num_neighbours, len(known))
        classifier, protocol = KNeighborsClassifier(count), f"{count} nearest neighbours of posterior means"
    else:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        protocol = "linear probe of posterior means"
    right = int((classifier.fit(features[0], known).predict(features[1]) == wanted).sum())
    size = len(wanted)
    share = (right + 0.5) / (size + 1)  # so that all right is not without error
    commonest = torch.mode(train_labels.flatten().cpu()).values.item()
    return Accuracy(
        value=right / size,
        stderr=math.sqrt(share * (1 - share) / size),
        baseline=float((wanted == commonest).mean()),
        num_test=size,
        num_train=len(known),
        protocol=protocol,
    )
