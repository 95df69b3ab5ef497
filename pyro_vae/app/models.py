"""What ``--model`` can be: which options belong to each model, which it refuses, and what of it the data settle.

This module imports nothing heavy, so that ``pyro-vae fit --help`` can show its table; how each model is given its data,
sampled and looked at is said in `pyro_vae.app.serving`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pyro_vae.programs import kinds

if TYPE_CHECKING:
    from pyro_vae.app.defaults import FitOptions
    from pyro_vae.data import Dataset

MODELS = tuple(kinds.KINDS)
NEED_LABELS = ("conditional", "semi-supervised")
NUM_LABELLED = 100  # of semi-supervised
NUM_COMPONENTS = 10  # of a mixture of data without labels

_JOINED = "x and y go into the networks as one vector"
_LEVELS = "its levels are vectors"
_SUMMED = "its classes are summed out by Pyro's TraceEnum_ELBO, which has this bound alone"
# What a model has no use for: the option, the only value that it may have, and why.
_ONLY: dict[str, dict[str, tuple[tuple[Any, ...], str]]] = {
    "conditional": {
        "network": (("mlp", "gated", "linear"), _JOINED),
        "prior": (("normal",), "its prior is N(0, I), or with --model-options conditional_prior=true a normal of y"),
    },
    "semi-supervised": {
        "network": (("mlp", "gated", "linear"), _JOINED),
        "prior": (("normal",), "its prior is N(0, I) beside a uniform one of y"),
        "bound": (("elbo",), _SUMMED),
        "num_samples": ((1,), _SUMMED),
        "estimator": (("reparameterized",), _SUMMED),
        "beta": ((1.0,), _SUMMED),
        "regularizers": (({},), _SUMMED),
    },
    "mixture": {
        "prior": (("normal",), "its clusters are the prior (--model-options num_components=N)"),
    },
    "hierarchical": {
        "network": (("mlp", "gated", "linear"), _LEVELS),
        "prior": (("normal",), "the prior of its last level is N(0, I), and of each other one a normal of the next"),
        "posterior": (("diagonal",), "each q of a level given the one below is a diagonal normal"),
    },
}


def check(options: FitOptions) -> None:
    """Refuse, by a ValueError, options that the model has no use for, and options of its own that it does not have."""
    model = kinds.check(options.model, options.model_options, "--model-options")
    for name, (allowed, why) in _ONLY.get(model, {}).items():
        value = getattr(options, name)
        if value not in allowed:
            given = ",".join(f"{key}={item}" for key, item in value.items()) if isinstance(value, Mapping) else value
            raise ValueError(_refusal(model, name, given, why, allowed))
    if model == "vae":
        return
    if "prior" in _ONLY[model] and options.prior_options:
        why = _ONLY[model]["prior"][1]
        raise ValueError(_refusal(model, "prior_options", ", ".join(options.prior_options), why, ()))
    one_latent = [name for name in options.regularizers if name != "free-bits"]
    if model == "hierarchical" and one_latent:
        why = "it is of one latent, and the model has several"
        raise ValueError(_refusal(model, "regularizers", one_latent[0], why, ()))
    if options.posterior == "point":
        raise ValueError(_refusal(model, "posterior", "point", "a point has no density, and the model is one", ()))
    if options.frozen is not None:
        raise ValueError(_refusal(model, "frozen", options.frozen, "guides are put under the model of a plain VAE", ()))
    if options.standardize:
        raise ValueError(_refusal(model, "standardize", "true", "its networks see the data as they are", ()))


def _refusal(model: str, name: str, value: Any, why: str, allowed: tuple[Any, ...]) -> str:
    option = f"--{name.replace('_', '-')}"
    use = f"Use one of {', '.join(map(str, allowed))}, or leave it out."
    remedy = use if len(allowed) > 1 else f"Leave {option} out, or use --model vae."
    return f"got {option} {value} with --model {model}: {why}. {remedy}"


def asked(values: dict[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What is settled of the model's own options by what was asked for; --latent-dim against latent_dims is a
    ValueError.
    """
    model, own = values["model"], dict(values["model_options"])
    if model == "semi-supervised":
        own = {"num_labelled": NUM_LABELLED} | own
    if model == "hierarchical":
        first = values["latent_dim"]
        own = {"latent_dims": [first, max(1, first // 2)]} | own
        kinds.check(model, own, "--model-options")
        dims = list(own["latent_dims"])
        if "latent_dim" in given and first != dims[0]:
            raise ValueError(
                f"got --latent-dim {first} with --model-options latent_dims={dims}: the first of them is that of the "
                "level next to the data. Leave --latent-dim out."
            )
        return {"model_options": own | {"latent_dims": dims}, "latent_dim": dims[0]}
    return {"model_options": own}


def settled(options: FitOptions, dataset: Dataset) -> FitOptions:
    """The options with what the data say of the model's own: how many classes there are, and so on; a ValueError where
    the model needs labels, and the data have none that are classes.
    """
    model, own = options.model, dict(options.model_options)
    if model == "vae":
        return options
    classes = None
    if model in NEED_LABELS or model == "mixture" and dataset.train.labels is not None:
        classes = _classes(options, dataset)
    if model in NEED_LABELS:
        assert classes is not None
        count = own.setdefault("num_classes", classes)
        if count < classes:
            raise ValueError(
                f"got --model-options num_classes={count} for data of {classes} classes, wanted at least as many. "
                "Leave it out: it is found from the data."
            )
    if model == "mixture":
        own.setdefault("num_components", classes or NUM_COMPONENTS)
    if model == "semi-supervised":
        known, count = own["num_labelled"], len(dataset.train)
        if not own["num_classes"] <= known <= count:
            raise ValueError(
                f"got --model-options num_labelled={known} for {count} training data of {own['num_classes']} classes, "
                f"wanted a number from {own['num_classes']} to {count}."
            )
        own.setdefault("alpha", 0.1 * count / known)  # as in the paper: see `SemiSupervised`
    return dataclasses.replace(options, model_options=own, standardize=False)


def _classes(options: FitOptions, dataset: Dataset) -> int:
    """How many classes the labels are of, each of which there is something of to train on."""
    what = f"got --model {options.model} with --data {options.data}"
    found = {part: getattr(dataset, part).labels for part in ("train", "validation", "test")}
    if any(labels is None for labels in found.values()):
        raise ValueError(
            f"{what}, which has no labels, wanted one class for each datum. Use a folder with a folder for each class, "
            "an array with labels (--labels KEY), or another --model."
        )
    seen = {part: sorted(set(labels.unique().tolist())) for part, labels in found.items()}
    if seen["train"][0] < 0:
        raise ValueError(f"{what}, whose labels start at {seen['train'][0]}, wanted classes 0, 1, 2, ...")
    for part in ("validation", "test"):
        missing = [label for label in seen[part] if label not in seen["train"]]
        if missing:
            raise ValueError(
                f"{what}: class {missing[0]} is in the {part} part and not among the {len(dataset.train)} training "
                "data, so nothing can be learnt of it. Train on more (--limit), or give data with all classes."
            )
    classes = int(seen["train"][-1]) + 1
    if len(seen["train"]) < 2:
        raise ValueError(f"{what}, whose labels are all {seen['train'][0]}, wanted two classes or more.")
    if classes > 10 * len(seen["train"]):
        raise ValueError(
            f"{what}, whose {len(seen['train'])} labels go up to {classes - 1}, wanted classes 0, 1, 2, ... without "
            "such gaps. Number them from 0: numpy.unique(labels, return_inverse=True)[1]."
        )
    return classes
