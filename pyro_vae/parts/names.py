"""Parts by name: what a command line, a configuration or a saved architecture calls them.

The two tables are the only place where a part is registered, by one line; what else is to be known of it stands on the
part (see `pyro_vae.protocols`). Anything else has the form ``module:Class`` and is imported, which runs that module's
code: so a file never gets one imported unless its reader trusts it by name.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from pyro_vae.words import did_you_mean, key, one_of, spelled

PARTS: dict[str, dict[str, str]] = {
    "posterior": {
        "diagonal": "posteriors.amortized:DiagonalNormal",
        "full": "posteriors.amortized:FullNormal",
        "low-rank": "posteriors.amortized:LowRankNormal",
        "mixture": "posteriors.amortized:NormalMixture",
        "planar": "posteriors.planar:Planar",
        "sylvester": "posteriors.planar:Sylvester",
        "iaf": "posteriors.flow:IAF",
        "maf": "posteriors.flow:MAF",
        "nsf": "posteriors.flow:NSF",
        "coupling": "posteriors.flow:Coupling",
        "von-mises-fisher": "posteriors.amortized:VonMisesFisher",
        "point": "posteriors.amortized:Delta",
    },
    "prior": {
        "normal": "priors.standard:StandardNormal",
        "mixture": "priors.mixture:NormalMixture",
        "vamp": "priors.mixture:VampPrior",
        "flow": "priors.standard:Flow",
        "hyperspherical": "priors.standard:HypersphericalUniform",
    },
    "likelihood": {
        "bernoulli": "likelihoods.likelihood:Bernoulli",
        "continuous-bernoulli": "likelihoods.likelihood:ContinuousBernoulli",
        "normal": "likelihoods.likelihood:Normal",
        "discretized-logistic": "likelihoods.discrete:DiscretizedLogistic",
        "logistic-mixture": "likelihoods.discrete:MixtureOfDiscretizedLogistics",
        "categorical": "likelihoods.discrete:Categorical",
        "poisson": "likelihoods.discrete:Poisson",
        "negative-binomial": "likelihoods.discrete:NegativeBinomial",
    },
}
# Pairs of an encoder and a decoder: see `pyro_vae.parts.networks.dense.Networks`.
NETWORKS: dict[str, str] = {
    "mlp": "networks.dense:MLPS",
    "gated": "networks.dense:GATED",
    "conv": "networks.convolutional:CONVOLUTIONAL",
    "residual": "networks.convolutional:RESIDUAL",
    "linear": "networks.dense:LINEAR",
}


def is_foreign(name: str) -> bool:
    """Whether a name stands for a class outside this package.

    Example:
        >>> is_foreign("nsf"), is_foreign("mymodule:Mine")
        (False, True)
    """
    return ":" in name


def check(kind: str, name: str) -> str:
    """A name of a part, in whatever spelling, as the table spells it, or ``module:Class``; nothing is imported.

    Raises:
        ValueError: Neither.
    Example:
        >>> check("posterior", "IAF"), check("posterior", "FullNormal"), check("likelihood", "discretized_logistic")
        ('iaf', 'full', 'discretized-logistic')
    """
    if not isinstance(name, str):
        own = f" For this class pass {_path(name)!r}." if isinstance(name, type) else ""
        raise ValueError(f"got {kind}={name!r}, wanted a name: one of {', '.join(PARTS[kind])}, or module:Class.{own}")
    module, colon, attribute = name.partition(":")
    if colon and attribute.isidentifier() and all(p.isidentifier() for p in module.split(".")):
        return name
    if not spelled(name, PARTS[kind]):  # it may be the name of the class
        classes = {key(where.partition(":")[2]): short for short, where in PARTS[kind].items()}
        name = classes.get(key(name), name)
    return one_of(kind, name, PARTS[kind], ", or module:Class")


def _path(family: type) -> str:
    """What a class is called by: its name here, or where it lies."""
    where = f"{family.__module__}:{family.__qualname__}"
    return next((n for parts in PARTS.values() for n, p in parts.items() if f"pyro_vae.parts.{p}" == where), where)


def made(kind: str, given: Any, *arguments: Any) -> Any:
    """A part of a class, function or name, on its networks.

    Raises:
        ValueError: It is none, or a part that is made already, or does not take such networks.
    """
    maker = find(kind, given) if isinstance(given, str) else given
    made_already = hasattr(maker, "forward") and not isinstance(maker, type)
    if made_already or not callable(maker):
        shown = f"a {type(maker).__name__} that is made already" if made_already else repr(maker)
        takes = "decoder" if kind == "likelihood" else "encoder and latent_dim"
        raise ValueError(
            f"got {shown} as the {kind}, wanted its class, a function of {takes}, or a name: one of "
            f"{', '.join(PARTS[kind])}."
        )
    try:
        part = maker(*arguments)
    except TypeError as error:
        raise ValueError(
            f"got {getattr(maker, '__name__', maker)!r} as the {kind}, which is not made like one ({error}); wanted a "
            f"class of pyro_vae.parts.{'likelihoods' if kind == 'likelihood' else 'posteriors'}, or one of the names "
            f"{', '.join(PARTS[kind])}."
        ) from error
    if not callable(part):
        raise ValueError(
            f"got {getattr(maker, '__name__', maker)!r} as the {kind}, which makes a "
            f"{type(part).__name__}; wanted one that makes a module that returns a distribution."
        )
    return part


def check_supports(posterior: str, prior: str) -> None:
    """Refuse a posterior and a prior that lie in different sets, such as the sphere and R^D.

    Parts of other packages are not imported for it: `pyro_vae.programs.architecture` checks them when it builds them.

    Raises:
        ValueError: One of two named parts lies where the other does not.
    """
    if not (is_foreign(posterior) or is_foreign(prior)):
        check_same_support(posterior, prior, find("posterior", posterior), find("prior", prior))


def check_same_support(posterior: str, prior: str, q: Any, p: Any) -> None:
    """As `check_supports`, of the parts q and p themselves, or of their classes; the names are for the message."""
    from pyro_vae import protocols  # here, as it brings torch

    if protocols.same_support(q, p):
        return
    remedy = _on("posterior", p) if protocols.support_name(q) == "real" else _on("prior", q)
    raise ValueError(
        f"got posterior {posterior!r} with prior {prior!r}, wanted two on the same space: their supports are "
        f"{protocols.support_name(q)!r} and {protocols.support_name(p)!r}, and KL(q || p) is infinite. {remedy}"
    )


def prior_for(posterior: str) -> str:
    """The first prior that lies where a posterior does; "normal" for a part of another package, which is not imported.

    Example:
        >>> prior_for("nsf"), prior_for("von-mises-fisher")
        ('normal', 'hyperspherical')
    """
    same = [] if is_foreign(posterior) else _same("prior", find("posterior", posterior))
    return next(iter(same), "normal")


def values_of(likelihood: str | None) -> str | None:
    """What data a likelihood of this package is for, such as "counts"; None for none, and for other packages' parts.

    Example:
        >>> values_of("poisson"), values_of("mymodule:Mine")
        ('counts', None)
    """
    if likelihood is None or is_foreign(likelihood):
        return None
    from pyro_vae.protocols import values

    return values(find("likelihood", likelihood))


def _same(kind: str, part: Any) -> list[str]:
    from pyro_vae.protocols import support_name

    return [name for name in PARTS[kind] if support_name(find(kind, name)) == support_name(part)]


def _on(kind: str, part: Any) -> str:
    """The remedy: a part that lies where another does."""
    names = _same(kind, part)
    return f"Use {kind} {names[0]!r}." if names else f"Give both the same support: write a {kind} on it."


def find(kind: str, name: str) -> Any:
    """The class that a name of `PARTS`, or ``module:Class``, which is imported, stands for.

    Raises:
        ValueError: An unknown name, or one that cannot be imported.
    Example:
        >>> find("posterior", "diagonal").__name__
        'DiagonalNormal'
    """
    name = check(kind, name)
    where = name if is_foreign(name) else f"pyro_vae.parts.{PARTS[kind][name]}"
    module, _, attribute = where.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"got {kind} {name!r}, wanted a class that can be imported: {error}. Run where the module lies, or put its "
            "folder on PYTHONPATH."
        ) from error


def build(
    kind: str,
    name: str,
    arguments: Sequence[Any],
    options: Mapping[str, Any],
    defaults: Mapping[str, Any] | None = None,
    maker: Any = None,
) -> Any:
    """A new part, by its class or by `maker`: what every part of its kind takes first, then its own keyword arguments.

    The defaults are taken where the class knows them and none are given.

    Raises:
        ValueError: An unknown name, or an option that the class does not have.
    Example:
        >>> build("prior", "normal", [3], {}).latent_dim
        3
        >>> build("prior", "normal", [3], {"bins": 8})
        Traceback (most recent call last):
        ...
        ValueError: prior 'normal' has no option 'bins'; it has none.
    """
    maker = find(kind, name) if maker is None else maker
    taken = list(inspect.signature(maker).parameters.values())[len(arguments) :]
    known = [p.name for p in taken if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != "features"]
    takes_all = any(p.kind is p.VAR_KEYWORD for p in taken)
    for option in () if takes_all else options:
        if option not in known:
            hint = did_you_mean(option, known)
            raise ValueError(f"{kind} {name!r} has no option {option!r}; it has {', '.join(known) or 'none'}.{hint}")
    filled = {key: value for key, value in (defaults or {}).items() if takes_all or key in known} | dict(options)
    try:
        return maker(*arguments, **filled)
    except TypeError as error:
        raise ValueError(f"{kind} {name!r} cannot be built with {dict(options)}: {error}.") from error


def networks(name: str) -> Any:
    """The encoder and decoder that a name of `NETWORKS` stands for (see `Networks`).

    Raises:
        ValueError: An unknown name.
    """
    name = one_of("network", name, NETWORKS)
    module, _, attribute = NETWORKS[name].partition(":")
    return getattr(importlib.import_module(f"pyro_vae.parts.{module}"), attribute)
