"""What the latents know about labels: classifiers on the posterior means, with their errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pyro_vae.judging.latents import posterior_means
from pyro_vae.judging.results import Result
from pyro_vae.options import checked
from pyro_vae.traces import Program

METHODS = ("knn", "linear")


@dataclass(frozen=True)
class Accuracy(Result):
    """Share of test labels that a classifier of the posterior means gets right.

    Attributes:
        value: The share.
        data_stderr: Its binomial standard error, given the training data.
        baseline: The share of the commonest training label: what no knowledge gives.
        num_test: Test data.
        num_train: Training data.
        protocol: The classifier, in words.
    """

    value: float
    data_stderr: float
    baseline: float
    num_test: int
    num_train: int
    protocol: str

    def __str__(self) -> str:
        return (
            f"{self.protocol}: {100 * self.value:.1f} ± {100 * self.data_stderr:.1f} % of {self.num_test} test labels "
            f"(trained on {self.num_train}; always the commonest: {100 * self.baseline:.1f} %)"
        )


@checked
def probe(
    guide: Program,
    data: Any,
    *,
    labels: Tensor,
    test_data: Any,
    test_labels: Tensor,
    method: str = "knn",
    num_neighbours: int = 10,
    site: str | None = None,
    num_samples: int = 64,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> Accuracy:
    """Accuracy of a classifier of the posterior means.

    "knn": the majority of the nearest neighbours in Euclidean distance, each dimension as it
    is (dead dimensions have means that hardly move, and so do not count). "linear": multinomial
    logistic regression on standardised means, with an L2 penalty of 1.

    Args:
        guide: A Pyro program for q(z | x).
        data: As for `fit`, from which the classifier learns.
        labels: (N,) integers.
        test_data: As for `fit`, on which it is scored.
        test_labels: (M,) integers.
        method: "knn" or "linear".
        num_neighbours: Of "knn".
        site: As for `posterior_means`, as all that follow.
    Returns:
        The accuracy with its error.
    Raises:
        ValueError: Another method; labels of another length than the data; no such site.
    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(0.0, 1.0))
        ...         pyro.sample("x", dist.Normal(z, 1.0), obs=x)
        >>> def guide(x):
        ...     with pyro.plate("data", len(x)):
        ...         pyro.sample("z", dist.Normal(x, 1.0))
        >>> x, y = torch.tensor([-1.0, -2.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 1])
        >>> probe(guide, x, labels=y, test_data=x, test_labels=y, num_neighbours=1).value
        1.0
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, wanted one of {', '.join(map(repr, METHODS))}.")
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    options: dict[str, Any] = {"site": site, "num_samples": num_samples, "seed": seed, "device": device}
    features = []
    for part, given, which in ((data, labels, "labels"), (test_data, test_labels, "test_labels")):
        means = posterior_means(guide, part, progress=progress, **options)
        means = means.reshape(len(means), -1)
        if given.dim() != 1 or len(given) != len(means):
            raise ValueError(
                f"got {which} of shape {tuple(given.shape)} for {len(means)} data, wanted ({len(means)},)."
            )
        features.append(means.double().cpu().numpy())
    known, wanted = labels.cpu().numpy(), test_labels.cpu().numpy()
    if method == "knn":
        count = min(num_neighbours, len(known))
        classifier, protocol = KNeighborsClassifier(count), f"{count} nearest neighbours of posterior means"
    else:
        classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
        protocol = "linear probe of posterior means"
    right = int((classifier.fit(features[0], known).predict(features[1]) == wanted).sum())
    size = len(wanted)
    share = (right + 0.5) / (size + 1)  # so that all right is not without error
    commonest = torch.mode(labels.flatten().cpu()).values.item()
    return Accuracy(
        value=right / size,
        data_stderr=math.sqrt(share * (1 - share) / size),
        baseline=float((wanted == commonest).mean()),
        num_test=size,
        num_train=len(known),
        protocol=protocol,
    )
