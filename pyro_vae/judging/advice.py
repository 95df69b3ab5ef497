"""Remedies as what can be typed: a command in the command's own words, made from a run where there is one, and a line
of Python."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

About = Literal["posterior", "latents", "estimate", "calibration", "protocol", "training", "advice"]
Culprit = Literal[
    "family", "encoder", "dead encoder", "collapse", "estimator", "overfitting", "unfinished training"
]  # fmt: skip


@dataclass(frozen=True)
class Finding:
    """One sentence of a verdict.

    Attributes:
        about: What it is about.
        text: What was found.
        culprit: Who is at fault; None where nobody is.
        advice: What to try next; empty where nothing need be.
        remedy: The name of what to try (see `commands`); empty where there is none that can be typed.
        value: Its number, such as epochs.
        command: What to type.
        python: The same as a line of Python, with `pv` for pyro_vae.
    """

    about: About
    text: str
    culprit: Culprit | None = None
    advice: str = ""
    remedy: str = ""
    value: int | None = None
    command: str = ""
    python: str = ""

    def __str__(self) -> str:
        return f"{self.text} {self.advice}".strip()

    def typed(self, run: str | None = None, options: Mapping[str, Any] | None = None) -> Finding:
        """With its command and line of Python, for a run and its configuration where there is one."""
        if not self.remedy:
            return self
        command, python = commands(self.remedy, self.value, run, options)
        return dataclasses.replace(self, command=command, python=python)


def commands(
    remedy: str, value: int | None = None, run: str | None = None, options: Mapping[str, Any] | None = None
) -> tuple[str, str]:
    """A remedy as a command and as a line of Python.

    Args:
        remedy: "train", "epochs" (train longer), "wider", "full", "iaf" (another family), "local" (as "full"),
            "scale" (learned), "refine", "patience", "warm-up", "samples", "data" (judge more).
        value: Its number; of "epochs", "patience", "warm-up" epochs, of "samples" K, of "data" how many.
        run: The run folder; None for a command of a run that is still to be named.
        options: Its configuration.
    Example:
        >>> commands("wider", None, "runs/frey-1", {"hidden": [400, 200], "epochs": 300})[0]
        'pyro-vae fit --config runs/frey-1/config.json --hidden 800,400 --patience 60'
        >>> commands("refine")
        ('pyro-vae evaluate RUN --refine semi-amortized', 'guide = pv.SemiAmortized(model, guide)')
    """
    return _WAYS[remedy](value, "RUN" if run is None else shlex.quote(run), run is not None, options or {})


def _fit(run: str, known: bool, change: str, options: Mapping[str, Any], patient: bool = True) -> str:
    start = f"pyro-vae fit --config {run}/config.json" if known else "pyro-vae fit"
    return f"{start} {change}" + (f" --patience {_patience(options)}" if patient else "")


def _patience(options: Mapping[str, Any]) -> int:
    """What goes back to the best weights where a longer or larger fit goes too far, and ends none of a usual one."""
    return max(20, int(options.get("epochs", 100)) // 5)


def _longer(value: int | None, run: str, known: bool, options: Mapping[str, Any]) -> tuple[str, str]:
    epochs = value or 2 * int(options.get("epochs", 100))
    patience = _patience({"epochs": epochs})
    python = f"pv.fit(model, guide, data, validation=validation, epochs={epochs}, patience={patience})"
    return _fit(run, known, f"--epochs {epochs}", {"epochs": epochs}), python


def _wider(_: int | None, run: str, known: bool, options: Mapping[str, Any]) -> tuple[str, str]:
    hidden = [2 * int(width) for width in options.get("hidden") or (400, 200)]
    python = f"vae = pv.VAE.build(x_shape, hidden={tuple(hidden)}); pv.fit(vae.model, vae.guide, data)"
    return _fit(run, known, f"--hidden {','.join(map(str, hidden))}", options), python


def _family(name: str) -> Callable[..., tuple[str, str]]:
    def ways(_: int | None, run: str, known: bool, options: Mapping[str, Any]) -> tuple[str, str]:
        # The options of one family are not those of another.
        change = f"--posterior {name}" + (' --posterior-options ""' if options.get("posterior_options") else "")
        python = f'vae = pv.VAE.build(x_shape, posterior="{name}"); pv.fit(vae.model, vae.guide, data)'
        return _fit(run, known, change, options), python

    return ways


def _refine(_: int | None, run: str, known: bool, options: Mapping[str, Any]) -> tuple[str, str]:
    return f"pyro-vae evaluate {run} --refine semi-amortized", "guide = pv.SemiAmortized(model, guide)"


def _scale(_: int | None, run: str, known: bool, options: Mapping[str, Any]) -> tuple[str, str]:
    python = 'vae = pv.VAE.build(x_shape, likelihood="normal", scale="learned"); pv.fit(vae, data)'
    return _fit(run, known, "--scale learned", options), python


def _stop(value: int | None, run: str, known: bool, options: Mapping[str, Any]) -> tuple[str, str]:
    patience = value or _patience(options)
    python = f"pv.fit(model, guide, data, validation=validation, patience={patience})"
    return _fit(run, known, f"--patience {patience}", options, patient=False), python


def _warm_up(value: int | None, run: str, known: bool, options: Mapping[str, Any]) -> tuple[str, str]:
    epochs = value or max(1, int(options.get("epochs", 100)) // 4)
    return _fit(run, known, f"--kl-warmup {epochs}", options, patient=False), (
        f"pv.fit(model, guide, data, kl_warmup={epochs})"
    )


def _samples(value: int | None, run: str, known: bool, options: Mapping[str, Any]) -> tuple[str, str]:
    return f"pyro-vae evaluate {run} -K {value}", f"pv.log_likelihood(model, guide, data, num_samples={value})"


def _data(value: int | None, run: str, known: bool, options: Mapping[str, Any]) -> tuple[str, str]:
    count = value or 400
    return f"pyro-vae judge {run} --num-data {count} --budget 600", (
        f"pv.judge(model, guide, data, num_data={count}, budget=600)"
    )


_WAYS: dict[str, Callable[..., tuple[str, str]]] = {
    "train": _longer, "epochs": _longer, "wider": _wider, "full": _family("full"), "local": _family("full"),
    "iaf": _family("iaf"), "refine": _refine, "patience": _stop, "warm-up": _warm_up, "samples": _samples,
    "data": _data, "scale": _scale,
}  # fmt: skip
