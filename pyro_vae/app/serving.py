"""How the pairs of ``--model`` are given data, trained, sampled and looked at: one face for each, so that the commands
need not know which they have before them.

    Face              the plain VAE, and what is the same of all: programs of x
    Conditional       programs of (x, y), y the label of each datum; everything is given y, log p(x | y) too
    SemiSupervised    trained on (x, y) with most y hidden, judged on x alone; its classifier q(y | x) is scored
    Mixture           the clusters are summed out in the prior; they are matched with the labels, and scored
    Hierarchical      several latents, of which z1, the one next to the data, is looked at
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pyro.infer import TraceEnum_ELBO
from torch import Tensor

from pyro_vae.app.defaults import FitOptions
from pyro_vae.data import Dataset, Split
from pyro_vae.inference.batches import seeded
from pyro_vae.parts import posteriors
from pyro_vae.programs.vae import Answers
from pyro_vae.randomness import noise

_ROWS = 1000
MATCHED = 10_000  # training data, at most, that clusters are matched with labels on
_CLASSES, _PER_CLASS, _SAMPLES = 20, 8, 64


class Face:
    """The plain VAE.

    Attributes:
        density: What is estimated, in words.
        site: The latent that is looked at; None for the only one.
        rows: What samples are shown of.
        no_remedies: What `judge` may advise and no command can do for the model.
        needs_label: Whether a datum without its label can be given no numbers.
        within: Whether a line in the latent space is one within a class, as the decoder is given the class.
    """

    density = "log p(x)"
    site: str | None = None
    within = False
    rows = "the prior"
    needs_label = False
    no_remedies: frozenset[str] = frozenset()

    def programs(self, pair: Any) -> tuple[Any, Any]:
        """Model and guide, as everything that judges takes them."""
        return pair.model, pair.guide

    def training(self, split: Split, options: FitOptions) -> Any:
        """What is trained on."""
        return self.given(split)

    def given(self, split: Split) -> Any:
        """What is validated, scored and judged on: the arguments of the programs."""
        return split

    def batch(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """The same of a batch: x, (B, *x_shape), and labels (B,)."""
        return (x,)

    def loss(self, pair: Any) -> Any:
        """The only loss that trains the pair; None where there is a choice."""
        return None

    def beside(self, pair: Any, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """What the pair takes beside x to reconstruct it, given labels (B,)."""
        return ()

    def prior_draws(self, pair: Any, count: int, y: Tensor | None) -> Tensor:
        """Draws of the prior of the latent that is looked at, (count, D)."""
        return self.programs(pair)[0].prior().sample((count,))

    def sample(self, pair: Any, size: int, *, pixels: str = "mean", label: int | None = None, y: Tensor | None = None,
               clusters: Sequence[int | None] | None = None) -> Tensor:  # fmt: skip
        """New data, (size, *x_shape): of one label, of the labels y (those of some data), or of the model's own. A
        label that the model does not know is a ValueError.
        """
        if label is not None:
            raise ValueError(
                f"got --label {label} for a {pair.architecture.model} model, which knows nothing of classes. Leave it "
                "out, or fit a run that does: pyro-vae fit --model conditional."
            )
        return pair.sample(size, pixels=pixels)

    def grid(self, pair: Any, names: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
        """Samples to be shown, and what each row of them is; no rows where they are all alike."""
        return pair.sample(_SAMPLES), []

    def codes(self, pair: Any, x: Tensor, y: Tensor | None = None) -> Any:
        """q(z | x), of the latent that is looked at; a ValueError where there is none, or where it takes labels that
        are not there.
        """
        return pair.posterior(x)

    def lines(self, pair: Any, start: Tensor, end: Tensor, y: Tensor | None, steps: int) -> Tensor:
        """E[x | z] along straight lines between the posterior means of two batches, (B, steps, *x_shape)."""
        return pair.interpolate(start, end, steps)

    def numbers(self, pair: Any, dataset: Dataset, test: Split, seed: int) -> dict[str, Any]:
        """What the model alone can be scored by: the accuracy of a classifier."""
        return {}


class Zoo(Face):
    """What the pairs of the zoo have in common."""

    no_remedies = frozenset({"refine"})

    def lines(self, pair: Any, start: Tensor, end: Tensor, y: Tensor | None, steps: int) -> Tensor:
        beside = self.beside(pair, start, y)
        a, b = (posteriors.mean(pair.posterior(x, *beside)) for x in (start, end))
        weight = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).unsqueeze(-1)
        z = a.unsqueeze(1) + (b - a).unsqueeze(1) * weight
        found = pair.decode(z.flatten(0, 1), *(v.repeat_interleave(steps, 0) for v in beside)).mean
        return found.unflatten(0, (len(start), steps))


class Conditional(Zoo):
    density = "log p(x | y)"
    within = needs_label = True
    rows = "each class"

    def given(self, split: Split) -> Any:
        return split, _known(split.labels)

    def batch(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        return x, torch.zeros(len(x), dtype=torch.int64, device=x.device) if y is None else y

    def beside(self, pair: Any, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        return (_known(y).to(x.device),)

    def prior_draws(self, pair: Any, count: int, y: Tensor | None) -> Tensor:
        y = _known(y)
        y = y[torch.arange(count) % len(y)].to(next(pair.parameters()).device)
        return pair.model.given_y(y).sample()

    def sample(self, pair: Any, size: int, *, pixels: str = "mean", label: int | None = None, y: Tensor | None = None,
               clusters: Sequence[int | None] | None = None) -> Tensor:  # fmt: skip
        classes = pair.architecture.option("num_classes")
        if label is not None and not 0 <= label < classes:
            raise ValueError(f"got --label {label}, wanted one of the classes 0, ..., {classes - 1}.")
        if label is not None:
            y = torch.full((size,), label)
        elif y is not None:
            y = y[torch.arange(size) % len(y)]
        else:
            y = torch.arange(size) * classes // size
        return pair.sample(y.to(next(pair.parameters()).device), pixels=pixels)

    def grid(self, pair: Any, names: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
        shown = min(pair.architecture.option("num_classes"), _CLASSES)
        y = torch.arange(shown).repeat_interleave(_PER_CLASS).to(next(pair.parameters()).device)
        return pair.sample(y), [_name(names, label) for label in range(shown)]

    def codes(self, pair: Any, x: Tensor, y: Tensor | None = None) -> Any:
        if y is None:
            raise ValueError(
                "a conditional model has q(z | x, y), and these data have no labels y. Give data that have: train, "
                "validation or test, or from Python pv.open(run).pair.posterior(x, y)."
            )
        return pair.posterior(x, y)


class SemiSupervised(Conditional):
    density = "log p(x)"
    site = "z"
    needs_label = False

    def training(self, split: Split, options: FitOptions) -> Any:
        return split, shown_labels(_known(split.labels), options.model_options["num_labelled"], options.seed)

    def given(self, split: Split) -> Any:
        return split

    def batch(self, x: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        return (x,)

    def loss(self, pair: Any) -> Any:
        return TraceEnum_ELBO(max_plate_nesting=1)

    def beside(self, pair: Any, x: Tensor, y: Tensor | None) -> tuple[Tensor, ...]:
        """Its own guess: it is judged on x alone."""
        return (pair.classify(x).argmax(-1),)

    def prior_draws(self, pair: Any, count: int, y: Tensor | None) -> Tensor:
        return pair.model.prior().sample((count,))

    def sample(self, pair: Any, size: int, *, pixels: str = "mean", label: int | None = None, y: Tensor | None = None,
               clusters: Sequence[int | None] | None = None) -> Tensor:  # fmt: skip
        if y is not None:  # in the place of the model's own p(y)
            y = pair.model.labels().sample((size,))
        return super().sample(pair, size, pixels=pixels, label=label, y=y)

    def codes(self, pair: Any, x: Tensor, y: Tensor | None = None) -> Any:
        raise ValueError(
            "a semi-supervised model has q(y | x) q(z | x, y), and no one q(z | x). From Python: "
            "pv.open(run).pair.classify(x), and .posterior(x, y)."
        )

    def numbers(self, pair: Any, dataset: Dataset, test: Split, seed: int) -> dict[str, Any]:
        test = test.frozen(seed)
        with noise(seed):
            guessed = torch.cat([pair.classify(part).argmax(-1).cpu() for part in _parts(test)])
        about = f"the share of {len(test):,} test data whose label is the largest of q(y | x)"
        return _accuracy(guessed, test, about)


class Mixture(Zoo):
    rows = "each cluster"

    def programs(self, pair: Any) -> tuple[Any, Any]:
        return pair.marginal, pair.guide

    def sample(self, pair: Any, size: int, *, pixels: str = "mean", label: int | None = None, y: Tensor | None = None,
               clusters: Sequence[int | None] | None = None) -> Tensor:  # fmt: skip
        if label is None:
            return pair.sample(size, pixels=pixels)
        found = [c for c, of in enumerate(clusters or ()) if of == label]
        if not found:
            raise ValueError(
                f"got --label {label}, and no cluster was matched with that class"
                + (" of labels: the data had none, or the run is not evaluated yet." if clusters is None else
                   f": they are those of {', '.join(str(of) for of in clusters if of is not None)}.")
            )  # fmt: skip
        return pair.sample(size, cluster=found[0], pixels=pixels)

    def grid(self, pair: Any, names: Sequence[str] | None = None) -> tuple[Tensor, list[str]]:
        weights = pair.model.prior.clusters().probs
        shown = weights.argsort(descending=True)[:_CLASSES].tolist()
        x = torch.cat([pair.sample(_PER_CLASS, cluster=c) for c in shown])
        return x, [f"cluster {c} ({100 * weights[c]:.0f} %)" for c in shown]

    def numbers(self, pair: Any, dataset: Dataset, test: Split, seed: int) -> dict[str, Any]:
        if test.labels is None or dataset.train.labels is None:
            return {}
        train, test = dataset.train.subset(slice(0, MATCHED)).frozen(seed), test.frozen(seed)
        with noise(seed):
            there, here = (
                torch.cat([pair.responsibilities(part, 20).argmax(-1).cpu() for part in _parts(split)])
                for split in (train, test)
            )
        matched = matching(there, _known(train.labels).cpu(), len(pair.model.prior.logits))
        guessed = torch.tensor([-1 if c is None else c for c in matched])[here]
        about = (
            f"the share of {len(test):,} test data whose label is that of their likeliest cluster, clusters matched "
            f"one to one with the classes on {len(train):,} training data"
        )
        return _accuracy(guessed, test, about) | {"cluster_classes": matched}


class Hierarchical(Zoo):
    site = "z1"
    no_remedies = frozenset({"refine", "full", "local", "iaf"})

    def prior_draws(self, pair: Any, count: int, y: Tensor | None) -> Tensor:
        model = pair.model
        z = model.prior().expand([count]).sample()
        for layer in range(model.num_layers - 1, 0, -1):
            z = getattr(model, f"z{layer}_given_z{layer + 1}")(z).sample()
        return z


_FACES: dict[str, Face] = {
    "vae": Face(), "conditional": Conditional(), "semi-supervised": SemiSupervised(), "mixture": Mixture(),
    "hierarchical": Hierarchical(),
}  # fmt: skip


def face(pair: Answers) -> Face:
    """The face of a pair; that of a plain VAE where it was not built from an architecture."""
    return _FACES["vae" if pair.architecture is None else pair.architecture.model]


def only(pair: Answers, what: str, *models: str) -> None:
    """Refuse, by a ValueError, what works for some models alone."""
    model = "vae" if pair.architecture is None else pair.architecture.model
    if model not in models:
        raise ValueError(f"{what} is for runs of --model {' and '.join(models)}, and this one is a {model} model.")


def shown_labels(labels: Tensor, count: int, seed: int) -> Tensor:
    """So many of the labels, as many of each class as there can be, drawn by the seed; -1 in place of the others.

    Example:
        >>> shown = shown_labels(torch.tensor([0, 0, 0, 1, 1, 2]), 4, seed=0)
        >>> int((shown >= 0).sum()), shown[shown >= 0].unique().tolist()
        (4, [0, 1, 2])
    """
    with seeded(seed):
        order = torch.randperm(len(labels))
    place = torch.zeros(len(labels), dtype=torch.int64)  # of each datum among those of its class
    for label in labels.unique():
        rows = (labels[order] == label).nonzero().flatten()
        place[rows] = torch.arange(len(rows))
    chosen = order[place.argsort(stable=True)[:count]]
    return torch.full_like(labels, -1).scatter(0, chosen, labels[chosen])


def matching(clusters: Tensor, labels: Tensor, num_clusters: int) -> list[int | None]:
    """The class of each cluster, by the one-to-one matching that is right most often; None for what is left over.

    Clusters and labels are those of each datum, (N,).

    Example:
        >>> matching(torch.tensor([2, 2, 0, 0, 0]), torch.tensor([0, 0, 1, 1, 0]), 3)
        [1, None, 0]
    """
    from scipy.optimize import linear_sum_assignment

    table = torch.zeros(num_clusters, int(labels.max()) + 1, dtype=torch.int64)
    table.index_put_((clusters, labels), torch.ones_like(labels), accumulate=True)
    found: list[int | None] = [None] * num_clusters
    for cluster, label in zip(*linear_sum_assignment(table.numpy(), maximize=True), strict=True):
        if table[cluster, label] > 0:
            found[cluster] = int(label)
    return found


def label_of(text: str, names: Sequence[str] | None) -> int:
    """A class by its number or its name; a ValueError where it is neither.

    Example:
        >>> label_of("7", None), label_of("dog", ["cat", "dog"])
        (7, 1)
    """
    if names is not None and text in names:
        return list(names).index(text)
    try:
        return int(text)
    except ValueError:
        known = f", or one of the names {', '.join(names)}" if names else ""
        raise ValueError(f"got --label {text!r}, wanted the number of a class{known}.") from None


def _accuracy(guessed: Tensor, test: Split, about: str) -> dict[str, Any]:
    share, count = (guessed == _known(test.labels).cpu()).double().mean().item(), len(test)
    error = math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else math.nan
    return {"test_accuracy": share, "test_accuracy_stderr": error, "accuracy_is": about}


def _parts(split: Split) -> list[Tensor]:
    return [split[start : start + _ROWS] for start in range(0, len(split), _ROWS)]


def _known(labels: Tensor | None) -> Tensor:
    if labels is None:
        raise ValueError("the model takes the label of each datum, and these data have none. Give data with labels.")
    return labels


def _name(names: Sequence[str] | None, label: int) -> str:
    return names[label] if names and label < len(names) else str(label)


def label_names(summary: Mapping[str, Any]) -> Sequence[str] | None:
    """What the classes of a run are called; None where they have no names."""
    return summary.get("protocol", {}).get("label_names")
