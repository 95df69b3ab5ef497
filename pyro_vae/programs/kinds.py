"""The pairs that an architecture can be of, by name: the plain VAE, and those of the zoo.

One table says which class a name stands for and which options it has of its own. It imports nothing heavy, so that a
command line can show it, and a file that names a pair gets a class of this package or a refusal, never other code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from pyro_vae.words import did_you_mean, one_of

KINDS: dict[str, str] = {
    "vae": "vae:VAE",
    "conditional": "zoo.conditional:Conditional",
    "semi-supervised": "zoo.semi_supervised:SemiSupervised",
    "mixture": "zoo.mixture:Mixture",
    "hierarchical": "zoo.hierarchical:Hierarchical",
}
# Their own options, and what kind of value each has.
OPTIONS: dict[str, dict[str, str]] = {
    "vae": {},
    "conditional": {"num_classes": "count", "conditional_prior": "switch"},
    "semi-supervised": {"num_classes": "count", "num_labelled": "count", "alpha": "weight"},
    "mixture": {"num_components": "count"},
    "hierarchical": {"latent_dims": "dimensions"},
}
# Of each kind what is wanted, and whether a value is it.
_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "count": ("a whole number >= 1", lambda value: _whole(value) and value >= 1),
    "switch": ("true or false", lambda value: isinstance(value, bool)),
    "weight": ("a number >= 0", lambda v: (_whole(v) or isinstance(v, float)) and 0 <= v < float("inf")),
    "dimensions": (
        "two or more whole numbers >= 1, the level next to the data first, such as latent_dims=[20,10]",
        lambda v: isinstance(v, list | tuple) and len(v) >= 2 and all(_whole(each) and each >= 1 for each in v),
    ),
}


def check(model: str, options: Mapping[str, Any], where: str = "model_options") -> str:
    """A pair's name, given in whatever spelling, as the table spells it, once its options are what they can be.

    Example:
        >>> check("Semi_Supervised", {"num_labelled": 100})
        'semi-supervised'
        >>> check("mixture", {"num_clusters": 10})
        Traceback (most recent call last):
        ...
        ValueError: got model_options num_clusters for the model mixture, which has num_components.
    """
    model = one_of("model", model, KINDS)
    if not isinstance(options, Mapping):
        raise ValueError(f"{where} must be a dict of options, got {options!r}.")
    known = OPTIONS[model]
    for name, value in options.items():
        if name not in known:
            raise ValueError(
                f"got {where} {name} for the model {model}, which has {', '.join(known) or 'none'}."
                + did_you_mean(name, list(known))
            )
        wanted, fits = _KINDS[known[name]]
        if not fits(value):
            raise ValueError(f"got {where} {name}={value!r}, wanted {wanted}.")
    return model


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def find(model: str) -> Any:
    """The class of a pair by its name.

    Example:
        >>> find("mixture").__name__
        'Mixture'
    """
    module, _, name = KINDS[one_of("model", model, KINDS)].partition(":")
    return getattr(importlib.import_module(f"pyro_vae.programs.{module}"), name)
