"""Names as people write them: "IAF", "iaf", "von_mises_fisher" and "von-mises-fisher" are one, and a typo gets a hint.

Nothing heavy is imported here, so that ``pyro-vae --help`` can use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# What other packages call it, by `key`.
_ELSEWHERE = {
    "lr": "learningrate", "stepsize": "learningrate", "numepochs": "epochs", "nepochs": "epochs", "maxepochs": "epochs",
    "zdim": "latentdim", "latentsize": "latentdim", "hiddendims": "hidden", "hiddendim": "hidden",
    "numparticles": "numsamples", "nsamples": "numsamples", "elbo": "loss", "optim": "optimizer", "x": "data",
}  # fmt: skip


def key(name: str) -> str:
    """What two spellings of one name have in common: neither case nor hyphens, underscores and spaces count.

    Example:
        >>> key("Von_Mises-Fisher")
        'vonmisesfisher'
    """
    return name.casefold().replace("-", "").replace("_", "").replace(" ", "")


def spelled(name: str, known: Iterable[str]) -> str | None:
    """The one of the known names that this is a spelling of, if any; what is itself known stays.

    Example:
        >>> spelled("One_Cycle", ["cosine", "one-cycle"]), spelled("linear", ["cosine"])
        ('one-cycle', None)
    """
    known = list(known)
    return name if name in known else next((each for each in known if key(each) == key(name)), None)


def did_you_mean(got: object, known: Iterable[str]) -> str:
    """A hint at the nearest known name, with a space before it, or nothing.

    Example:
        >>> did_you_mean("sylvestre", ["planar", "sylvester"])
        " Did you mean 'sylvester'?"
        >>> did_you_mean("lr", ["learning_rate", "loss"])
        " Did you mean 'learning_rate'?"
    """
    names = {key(each): each for each in known}
    usual = _ELSEWHERE.get(key(str(got)))
    close = [usual] if usual in names else difflib.get_close_matches(key(str(got)), names, n=1)
    return f" Did you mean {names[close[0]]!r}?" if close else ""


def one_of(kind: str, given: object, known: Iterable[str], more: str = "") -> str:
    """A known name in whatever spelling; a ValueError, with a hint, where it is none of them.

    `kind` is what it names, and `more` what else is possible, such as " or a function", for the message.

    Example:
        >>> one_of("schedule", "ONE_CYCLE", ["cosine", "one-cycle"])
        'one-cycle'
        >>> one_of("schedule", "cosin", ["cosine", "one-cycle"])
        Traceback (most recent call last):
        ...
        ValueError: unknown schedule 'cosin', wanted one of cosine, one-cycle. Did you mean 'cosine'?
    """
    known = list(known)
    found = spelled(given, known) if isinstance(given, str) else None
    if found is None:
        raise ValueError(
            f"unknown {kind} {given!r}, wanted one of {', '.join(known)}{more}.{did_you_mean(given, known)}"
        )
    return found
