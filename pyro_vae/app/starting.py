"""`pyro-vae fit --from RUN`: which options a fit takes over from a finished run, and whether its weights too.

The options of the run are the base, and what is typed wins. What followed from an option that is now another one is
forgotten with it: the widths of another network, the number of samples of another bound, the options of another family.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pyro_vae.app.configuration import about
from pyro_vae.app.defaults import FitOptions, in_words, option, resolve
from pyro_vae.app.runs import BUILT, Run, is_unfinished, options_of

_OF_VALUES = ("likelihood", "likelihood_options", "scale", "standardize", "binarization", "dequantize")
# What is settled by another option, so that it goes with it.
_SETTLED_BY = {
    "data": ("data_dir", "image_size", "crop", "channels", "background", "images", "labels", "limit", *_OF_VALUES),
    "likelihood": _OF_VALUES, "binarization": _OF_VALUES, "dequantize": _OF_VALUES,
    "posterior": ("posterior_options",), "prior": ("prior_options",), "bound": ("bound_options",),
}  # fmt: skip
_WARMUP = {"kl_warmup": 0, "kl_warmup_steps": None}


@dataclass(frozen=True)
class Origin:
    """Where a fit comes from, and why: the folder of the finished run; whether its weights are gone on from, or only
    its options were the base; and epochs that went into these weights, those of the runs that it came from included.
    """

    run: str
    weights: bool
    epochs: int
    why: str

    def to_json(self) -> dict[str, Any]:
        """As plain data, for summary.json."""
        return asdict(self)

    def line(self, options: FitOptions) -> str:
        """The line that says which of the two it is, and why."""
        where = shown(self.run)
        if self.weights:
            return (
                f"going on from the weights of {where}, {self.epochs} epochs old ({self.why}): {options.epochs} more; "
                f"data order, noise and learning rate from their start, seed {options.seed}"
            )
        return f"new weights by the options of {where}, not its weights: {self.why}"


def shown(path: str | os.PathLike[str]) -> str:
    """A path as short as it can be typed here."""
    path, here = Path(path), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) and path != here else str(path)


def base(path: str | os.PathLike[str]) -> Run:
    """The finished run that a fit comes from; a ValueError where there is none, or an unfinished or damaged one."""
    path = Path(path).expanduser()
    with about("--from", shown(path)):
        if not path.is_dir():
            raise ValueError("wanted a run folder, as 'pyro-vae fit' writes one.")
        if is_unfinished(path):
            first = f"Go on with it first: pyro-vae fit --resume {shown(path)}"
            raise ValueError(f"an unfinished run, wanted a finished one. {first}")
        return Run.load(path)


def merged(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `resolve` is to be given: the options of the run at ``from_run`` (see `base`), and over them what the user
    gave.
    """
    run = base(given["from_run"])
    earlier = options_of(run)
    changes = {name for name, value in given.items() if _as_resolved(name, value) != getattr(earlier, name)}
    values = _together(earlier, changes, given)
    try:
        options = resolve(values)
    except ValueError as error:
        raise ValueError(f"{error} (What is not typed here is that of --from {shown(run.path)}.)") from error
    if "data" not in changes and compared(run, earlier, options).weights:
        # The weight of the KL has risen already.
        values = values | {name: given.get(name, none) for name, none in _WARMUP.items()}
    return values


def _as_resolved(name: str, value: Any) -> Any:
    try:
        return getattr(resolve({name: value}), name)
    except ValueError:  # to be said of all options together
        return value


def _together(earlier: FitOptions, changes: Iterable[str], given: Mapping[str, Any]) -> dict[str, Any]:
    gone = {name for changed in changes for name in _SETTLED_BY.get(changed, ()) if name != changed}
    return {name: value for name, value in _asked(earlier).items() if name not in gone} | dict(given)


def _asked(options: FitOptions) -> dict[str, Any]:
    """Options from which all others follow."""
    given = {name: value for name, value in vars(options).items() if name != "from_run"}
    wanted = resolve(given)
    for name in list(given):
        fewer = {key: value for key, value in given.items() if key != name}
        try:
            if resolve(fewer) == wanted:
                given = fewer
        except ValueError:  # it is needed
            continue
    return given


def compared(run: Run, earlier: FitOptions, options: FitOptions) -> Origin:
    """Whether a fit of these options can take the weights of a run, as far as the options say."""
    differing = [name for name in (*BUILT, "frozen") if getattr(earlier, name) != getattr(options, name)]
    before = run.summary.get("from") or {}
    epochs = int(run.summary.get("epochs") or 0) + int(before["epochs"] if before.get("weights") else 0)
    words = [f"{option(name)} {in_words(getattr(options, name))} (there: {in_words(getattr(earlier, name))})"
             for name in differing]  # fmt: skip
    why = ", ".join(words) if differing else "the networks are the same"
    return Origin(str(Path(run.path).absolute()), not differing, epochs, why)
