"""A study: arms, which differ in named options, times seeds; each a run folder, found by what it was made of.

    study.json          what was asked for
    trials/NAME/        a run folder for each fit, with scores.safetensors beside its weights
    table.csv, .md, .tex, report.html

Which fits these are `plans` says, and `trials` makes them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyro_vae.app.configuration import convert, parsed
from pyro_vae.app.defaults import FitOptions, option
from pyro_vae.app.runs import Run
from pyro_vae.words import did_you_mean

BUDGETS = ("epochs", "gradients", "seconds")
OPTIONS = tuple(field.name for field in dataclasses.fields(FitOptions) if field.name != "from_run")


@dataclass(frozen=True)
class Study:
    """What is compared.

    Attributes:
        vary: Axes: options of ``fit`` by name, each with its values; or a name of one's own with sets of options by
            name, ``{"encoder": {"narrow": {"hidden": (64,)}, "wide": {"hidden": (512,)}}}``. The arms are all
            combinations.
        fixed: Options that all arms share, those of ``fit``.
        seeds: How many fits of each arm, 0, 1, ..., or which seeds.
        frozen: A run, whose model is frozen for all guides; True fits one first, with the fixed options. None: model
            and guide are trained together in each arm.
        budget: What is equal: "epochs" (passes through the data), "gradients" (passes times samples in the bound: the
            arm of fewest samples has the epochs, others fewer), or "seconds".
        seconds: Of each fit, for that budget.
    """

    vary: dict[str, Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    seeds: int | tuple[int, ...] = 1
    frozen: str | bool | None = None
    budget: str = "epochs"
    seconds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.vary, Mapping) or not self.vary or not all(self.vary.values()):
            raise ValueError(
                f"got vary={self.vary!r}, wanted axes with their values, such as {{'posterior': ['diagonal', 'full']}}."
            )
        if self.budget not in BUDGETS or (self.budget == "seconds") != (self.seconds is not None):
            raise ValueError(
                f"got budget={self.budget!r} and seconds={self.seconds}, wanted one of {', '.join(BUDGETS)}, with "
                "seconds for the last alone."
            )
        if self.seconds is not None and not self.seconds > 0:
            raise ValueError(f"got seconds={self.seconds}, wanted a positive number.")
        seeds = self.seed_list
        if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            raise ValueError(f"got seeds={self.seeds}, wanted how many, 1 or more, or different seeds from 0 on.")
        for name in self.fixed:
            _known(name)
            part = name.removesuffix("_options")
            if part != name and part in self.vary:
                raise ValueError(
                    f"got fixed: {name} and vary: {part}, wanted options with the part that they belong to: give a set "
                    f"of both, such as vary: {{mine: {{a: {{{part}: ..., {name}: ...}}}}}}."
                )
        for name in ("seed", "frozen", "data_seed", "evaluation_samples", "evaluation_images"):
            if name in self.vary:
                raise ValueError(f"got vary: {name}, wanted another axis: that is the study's to set.")

    @property
    def seed_list(self) -> tuple[int, ...]:
        """The seeds."""
        return tuple(range(self.seeds)) if isinstance(self.seeds, int) else tuple(self.seeds)

    def settings(self) -> dict[str, dict[str, Any]]:
        """Of each arm, by its name, the options in which it differs; an unknown one, or two arms alike, are a
        ValueError.
        """
        found: dict[str, dict[str, Any]] = {}
        for combination in self._combinations():
            name = ", ".join(label for label, _ in combination)
            changes = {key: value for _, options in combination for key, value in options.items()}
            if name in found:
                raise ValueError(f"got the arm {name!r} twice, wanted different values on each axis.")
            found[name] = changes
        return found

    def methods(self) -> dict[str, str]:
        """Of each arm what it is called without its dataset: the same for arms that differ in their data alone."""
        return {
            ", ".join(label for label, _ in each): ", ".join(label for label, options in each if "data" not in options)
            for each in self._combinations()
        }

    def _combinations(self) -> Iterator[tuple[tuple[str, dict[str, Any]], ...]]:
        return itertools.product(*(_values(axis, values) for axis, values in self.vary.items()))

    def to_json(self) -> dict[str, Any]:
        """As plain data, from which `of` makes it again."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def of(cls, values: Mapping[str, Any], where: str = "the study") -> Study:
        """From plain data, such as a YAML file holds; unknown keys and values of other types are a ValueError."""
        known = [each.name for each in dataclasses.fields(cls)]
        given = {str(key).replace("-", "_"): value for key, value in values.items()}
        for key in given:
            if key not in known:
                raise ValueError(f"{where} has the unknown key {key!r}, wanted some of {', '.join(known)}."
                                 + did_you_mean(key, known))  # fmt: skip
        if "vary" not in given:
            raise ValueError(f"{where} has no 'vary', wanted axes, such as 'vary: {{posterior: [diagonal, full]}}'.")
        for key in ("vary", "fixed"):
            if not isinstance(given.get(key, {}), Mapping):
                raise ValueError(f"{where}: {key} is {given[key]!r}, wanted options by name.")
        if isinstance(given.get("seeds"), list | tuple):
            given["seeds"] = tuple(given["seeds"])
        seeds = given.get("seeds", 1)
        if not all(type(seed) is int for seed in (seeds if isinstance(seeds, tuple) else (seeds,))):
            raise ValueError(f"{where}: seeds is {seeds!r}, wanted a whole number, or a list of them.")
        fixed = {_known(str(key)): value for key, value in given.pop("fixed", {}).items()}
        fixed = {name: convert(name, value, f"{where}: {name}") for name, value in fixed.items()}
        vary = {_axis(str(key)): value for key, value in given.pop("vary").items()}
        return cls(vary=vary, fixed=fixed, **given)


def refuse_strangers(study: Study, trust: bool | Sequence[str], *, in_file: bool) -> None:
    """Refuse, by a ValueError, parts of one's own that a file names, and its reader does not trust: importing runs
    their code.

    What is not `in_file` was named by whoever asks for the study, but for the parts of a run that it freezes.
    """
    written = set(_foreign(study.to_json()))
    named = set(written)
    if isinstance(study.frozen, str):
        named |= set(_foreign(Run.load(Path(study.frozen).expanduser()).config))
    if not in_file:
        named -= written
    strange = [] if trust is True else sorted(named - set([trust] if isinstance(trust, str) else trust or ()))
    if strange:
        raise ValueError(
            f"the study names {', '.join(strange)}, code of somebody's own, which is imported only if you say so. Add "
            f"{' '.join(f'--trust {name}' for name in strange)}, if you trust it."
        )


def _foreign(value: Any) -> Iterator[str]:
    """All that has the form ``module:Class`` in plain data."""
    if isinstance(value, Mapping | list | tuple):
        for each in [*value.values()] if isinstance(value, Mapping) else value:
            yield from _foreign(each)
    elif isinstance(value, str):
        module, colon, attribute = value.partition(":")
        if colon and attribute.isidentifier() and all(part.isidentifier() for part in module.split(".")):
            yield value


def study_file(path: Path) -> Study:
    """The study of a YAML or JSON file; a ValueError where it cannot be read, or is none."""
    values = parsed(path, f"{path}, wanted a study in YAML or JSON")
    if not isinstance(values, Mapping):
        raise ValueError(f"{path} holds no study, wanted keys such as vary, fixed and seeds.")
    return Study.of(values, str(path))


def _known(name: str) -> str:
    key = name.replace("-", "_")
    if key not in OPTIONS:
        known = [each.replace("_", "-") for each in OPTIONS]
        raise ValueError(f"got the option {name!r} to vary or to fix, wanted one of fit's." + did_you_mean(name, known))
    return key


def _axis(name: str) -> str:
    return name.replace("-", "_") if name.replace("-", "_") in OPTIONS else name


def _values(axis: str, values: Any) -> list[tuple[str, dict[str, Any]]]:
    """The labels of an axis, and the options that each stands for."""
    if isinstance(values, Mapping):
        sets = []
        for label, changes in values.items():
            if not isinstance(changes, Mapping):
                raise ValueError(f"got vary: {axis}: {label}: {changes!r}, wanted options by name.")
            pairs = {_known(str(key)): value for key, value in changes.items()}
            sets.append((str(label), {k: convert(k, v, f"{axis}: {label}: {k}") for k, v in pairs.items()}))
        return sets
    name = _known(axis)
    listed: Sequence[Any] = values if isinstance(values, list | tuple) else [values]
    read_ = [convert(name, value, option(name)) for value in listed]
    words = all(isinstance(value, str) for value in read_)
    return [(value if words else f"{name.replace('_', '-')}={_shown(value)}", {name: value}) for value in read_]


def _shown(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
