"""How much the latents say: about the data (mutual information), and about labels (probes).

The rate of the ELBO is what z tells about x, and what is wasted on a mismatch of q(z) = E_x q(z | x) with the prior:

    E_x KL(q(z | x) || p(z)) = I_q(x; z) + KL(q(z) || p(z)),   I_q(x; z) = E log q(z | x) / q(z)

    lower:  E log q(z_n | x_n) / (1/N sum_m q(z_n | x_m))            (leave-in)
    upper:  E log q(z_n | x_n) / (1/(N-1) sum_{m != n} q(z_n | x_m)) (leave-one-out)

The leave-in estimate is the information about *which of these N data* it was, without any approximation. For the
population of the data it is a lower bound in expectation, and the leave-one-out estimate an upper one. The first cannot
exceed log N: near this limit it says only that z tells all N data apart.

Reference: Poole et al., On variational bounds of mutual information, 2019. arXiv:1905.06922
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pyro_vae.judging.components import Components, Scorer, refuse_other_scores
from pyro_vae.judging.latents import posterior_means
from pyro_vae.judging.results import Mean, Measured, Result
from pyro_vae.judging.sweeps import Sweep, sweep
from pyro_vae.options import of_guide, of_pair
from pyro_vae.traces import Particles, Program, log_q

METHODS = ("knn", "linear")
_CHUNK = 2**22  # log densities that are held at once


@dataclass(frozen=True)
class MutualInformation(Measured):
    """What the latents say about the data, in nats. All `data_stderr` are by the jackknife over data.

    Attributes:
        value: I_q(x; z) by the leave-in estimate: exact for these N data, a lower bound for their population.
        mc_stderr: As in `Measured`; nan for one sample per datum, as of all parts.
        upper: The leave-one-out estimate: an upper bound for the population, infinite where posteriors hardly overlap.
        rate: R = E log q(z | x) / p(z) from the same samples.
        marginal_kl: KL(q(z) || p(z)) = R - I, from above for the population.
        limit: log N, which the value cannot exceed.
    """

    upper: Mean
    rate: Mean
    marginal_kl: Mean
    limit: float

    @property
    def saturated(self) -> bool:
        """Whether the value is within half a nat of its limit, and so says nothing about the population."""
        return self.value > self.limit - 0.5

    def __str__(self) -> str:
        found = self, self.upper, self.marginal_kl, self.rate
        value, upper, marginal, rate = (f"{part.value:.2f} ± {part.data_stderr:.2f}" for part in found)
        text = (
            f"I(x; z) = {value} to {upper} nats, KL(q(z) || p(z)) <= {marginal}, of a rate of {rate} "
            f"({len(self.pointwise)} data, {self.num_samples} samples each; limit log N = {self.limit:.2f})"
        )
        if self.saturated:
            text += "; at its limit: z tells these data apart, and how much more it says they are too few to show"
        return text


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


@of_pair
def mutual_information(
    model: Program,
    guide: Program,
    data: Any,
    *,
    num_samples: int = 1,
    num_data: int = 2000,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool | None = None,
) -> MutualInformation:
    """Mutual information of data and latents under the guide, and what is wasted on the prior's mismatch.

    Every sample is scored under the posterior of every datum: N^2 densities.

    Args:
        num_samples: Samples per datum.
        num_data: N: the first so many of the data.
        model, guide, data, seed, device, progress: As for `log_likelihood`.
    Returns:
        The information from below and above, the rate, and the marginal KL.
    Raises:
        ValueError: Fewer than three data; a guide with a point or auxiliary site, one that cannot score a sample
            that it did not draw, or one that is random beyond its draw.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> guide = Guide(lambda x: dist.Normal(0 * x, 1.0))
        >>> found = mutual_information(model, guide, torch.zeros(50))
        >>> found.value, found.upper.value, found.marginal_kl.value
        (0.0, 0.0, 0.0)

    Reference: Hoffman and Johnson, ELBO surgery: yet another way to carve up the evidence lower bound, 2016.
    """
    with sweep(model, guide, data=data, batch_size=200, copies=num_samples, num_data=num_data, seed=seed,
               device=device, progress=progress, title="I(x; z)") as run:  # fmt: skip
        args, draws, rates = _collected(run, num_samples)
        count = sum(rate.shape[1] for rate in rates)
        if count < 3:
            raise ValueError(
                f"got {count} data, wanted at least three, of which latents could tell one. Give more data."
            )
        scorers = []
        for batch, drawn in zip(args, draws, strict=True):  # once each has scored its own draws as it drew them
            again = log_q(guide, {name: z[:1] for name, z in drawn.latents.items()}, *batch)
            score = torch.stack([each[:1] for each in drawn.log_q.values()]).sum(0)
            refuse_other_scores("the guide", "its", again, score)
            scorers.append(Scorer(guide, batch, guide=True))
        terms, without = _aggregated(run, Components(model, args[0]), scorers, draws, num_samples)
    rate = torch.cat(rates, 1)
    values = torch.stack([*terms, rate, rate - terms[0]])  # (4, K, N)
    mean = values.mean(1)
    spread = values.var(1) / num_samples if num_samples > 1 else torch.full_like(mean, math.nan)
    # Leaving datum j out: its own term is gone, and its posterior from the aggregate at all other samples.
    others = torch.tensor([[count], [count - 1]], dtype=torch.float64)
    left_out = mean.sum(1, keepdim=True) - mean
    left_out[:2] += without / num_samples
    left_out /= count - 1
    left_out[:2] += torch.log((others - 1) / others)
    left_out[3] = left_out[2] - left_out[0]
    errors = ((count - 1) * left_out.var(1, correction=0)).sqrt().tolist()  # the jackknife's
    lower, upper, rated, marginal = (
        replace(Mean.of(m, v, num_samples), data_stderr=error) for m, v, error in zip(mean, spread, errors, strict=True)
    )
    return MutualInformation(**lower.measured(), upper=upper, rate=rated, marginal_kl=marginal, limit=math.log(count))


def _aggregated(
    run: Sweep, components: Components, scorers: list[Scorer], draws: list[Particles], num_samples: int
) -> tuple[Tensor, Tensor]:
    """Terms of both bounds, (2, K, N), and what leaving one datum out adds to others' samples, (2, N)."""
    sizes = [drawn.log_weight.shape[1] for drawn in draws]
    count = sum(sizes)
    step = max(1, _CHUNK // (max(sizes) * len(components.names)))
    run.expect(len(draws))

    def scored_by_all(number: int) -> tuple[Tensor, Tensor]:
        drawn, start, size = draws[number], sum(sizes[:number]), sizes[number]
        without = torch.zeros(2, count, dtype=torch.float64)
        own = torch.arange(start, start + size).repeat(num_samples)
        rows = {name: components.rows(name, drawn.latents[name]) for name in components.sites}
        scored = []
        for first in range(0, len(own), step):
            part = {name: z[first : first + step] for name, z in rows.items()}
            columns = []  # log q(z_i | x_j) of each row under each of B data, (rows, B)
            for scorer, many in zip(scorers, sizes, strict=True):
                shared = {name: components.shared(name, z, many) for name, z in part.items()}
                columns.append(torch.stack(list(scorer(shared).values())).sum(0))
            scored.append(_terms(torch.cat(columns, 1).double().cpu(), own[first : first + step], without))
        run.tick()
        return torch.cat(scored, 1).reshape(2, num_samples, size), without

    terms, without = zip(*run.each(scored_by_all, range(len(draws))), strict=True)
    return torch.cat(terms, 2), torch.stack(without).sum(0)


def _collected(run: Sweep, num_samples: int) -> tuple[list[tuple[Any, ...]], list[Particles], list[Tensor]]:
    """Batches, their draws, and the terms of the rate, (K, B) each."""
    args, draws, rates = [], [], []
    for batch in run:
        particles = run.draw(batch, num_samples)
        rate = particles.log_likelihood - particles.log_weight  # refuses points
        extra = [name for name in particles.log_q if name not in particles.log_prior]
        if extra:
            raise ValueError(
                f"guide site {extra[0]!r} is auxiliary: the density q(z | x) without it is not known, and the "
                "information in z neither. Use rate_distortion, which needs none."
            )
        args.append(batch)
        draws.append(particles)
        rates.append(rate.double().cpu())
    return args, draws, rates


def _terms(table: Tensor, own: Tensor, without: Tensor) -> Tensor:
    """Both terms of samples (rows, N), (2, rows); adds what leaving out each other datum changes."""
    count = table.shape[1]
    place = own.unsqueeze(1)
    density = table.gather(1, place).squeeze(1)
    others = table.scatter(1, place, -math.inf)
    found = []
    for row, (scores, size) in enumerate(((table, count), (others, count - 1))):
        found.append(density - torch.logsumexp(scores, 1) + math.log(size))
        share = torch.softmax(scores, 1).nan_to_num(0.0).clamp(max=1 - 1e-12).scatter(1, place, 0.0)
        without[row] -= torch.log1p(-share).sum(0)
    return torch.stack(found)


@of_guide
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

    "knn": the majority of the nearest neighbours in Euclidean distance, each dimension as it is. "linear": multinomial
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
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(0.0, 1.0), lambda z: dist.Normal(z, 1.0))
        >>> guide = Guide(lambda x: dist.Normal(x, 1.0))
        >>> x, y = torch.tensor([-1.0, -2.0, 1.0, 2.0]), torch.tensor([0, 0, 1, 1])
        >>> probe(guide, x, labels=y, test_data=x, test_labels=y, num_neighbours=1).value
        1.0
    """
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}, wanted one of {', '.join(map(repr, METHODS))}.")
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
    classifier, protocol = _classifier(method, min(num_neighbours, len(known)))
    right, size = int((classifier.fit(features[0], known).predict(features[1]) == wanted).sum()), len(wanted)
    share = (right + 0.5) / (size + 1)  # so that all right is not without error
    error = math.sqrt(share * (1 - share) / size)
    baseline = float((wanted == torch.mode(labels.flatten().cpu()).values.item()).mean())
    return Accuracy(right / size, error, baseline, size, len(known), protocol)


def _classifier(method: str, num_neighbours: int) -> tuple[Any, str]:
    """A classifier, and what it is in words."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if method == "knn":
        return KNeighborsClassifier(num_neighbours), f"{num_neighbours} nearest neighbours of posterior means"
    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    return classifier, "linear probe of posterior means"
