"""The weight of the divergence during a fit.

    beta_t (log q(z | x) - log p(z)),   t = 0, 1, ... the steps

rises from nearly 0 over the first epochs or steps (Bowman et al. 2016, arXiv:1511.06349), or follows a function of the
fraction of steps done, as in cyclical annealing (Fu et al. 2019, arXiv:1903.10145).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from typing import Any, TypeAlias

from pyro import infer
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_vae.inference.bounds import elbo
from pyro_vae.inference.objectives import Objective
from pyro_vae.options import integer, number

Beta: TypeAlias = float | Callable[[float], float]

_JIT = (infer.JitTrace_ELBO, infer.JitTraceEnum_ELBO, infer.JitTraceGraph_ELBO, infer.JitTraceMeanField_ELBO)
_GRID = 10_000  # fractions at which a function is looked at, for where it settles


class Number:
    """A number that may change between steps."""

    def __init__(self, value: float) -> None:
        self.value = value


class Tempered(Messenger):
    """Scales log p(z) and log q(z | x), not the likelihood, by a weight that may change: a tensor without dimensions,
    which a captured step reads anew, or a `Number`, for losses that compare scales in Python.
    """

    def __init__(self, weight: Tensor | Number) -> None:
        super().__init__()
        self.weight = weight

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"]:
            msg["scale"] = msg["scale"] * (self.weight if isinstance(self.weight, Tensor) else self.weight.value)


class Tempering:
    """beta in every step of a fit of so many epochs and batches (`steps_per_epoch`).

    Over so many epochs (`kl_warmup`) or steps it rises linearly to 1, or to the beta of an `Objective`; or it is a
    constant, or a function of the fraction of steps done. From step `warmup` on it stays what it is at the end, 0 where
    it never changes; `active` says whether the fit sets one at all. What `check_tempering` refuses, a warm-up that is
    as long as the fit, and, in a step, a beta that is negative or not finite are a ValueError.

    Example:
        >>> rising = Tempering(Objective(beta=4.0), 10, 50, kl_warmup_steps=100)
        >>> rising(0), rising(49), rising(200), rising.warmup
        (0.04, 2.0, 4.0, 100)
        >>> Tempering(infer.Trace_ELBO(), 4, 25, beta=lambda done: min(1.0, 2 * done)).warmup
        50
    """

    def __init__(
        self,
        loss: Any,
        epochs: int,
        steps_per_epoch: int,
        *,
        kl_warmup: float = 0,
        kl_warmup_steps: int | None = None,
        beta: Beta | None = None,
    ) -> None:
        check_tempering(loss, epochs, kl_warmup, kl_warmup_steps, beta)
        self.total = epochs * steps_per_epoch
        self.function = beta if callable(beta) else None
        self.last = float(loss.beta) if isinstance(loss, Objective) else 1.0
        if beta is not None and not callable(beta):
            self.last = float(beta)
        self.warmup = kl_warmup_steps or (max(1, round(kl_warmup * steps_per_epoch)) if kl_warmup else 0)
        if self.warmup >= self.total and self.warmup:
            raise ValueError(
                f"kl_warmup_steps must lie below the number of steps, {epochs} epochs of {steps_per_epoch} = "
                f"{self.total}, got {self.warmup}."
            )
        if self.function is not None:
            self.warmup = self._settled()
        self.active = bool(self.warmup) or beta is not None

    def __call__(self, step: int) -> float:
        """beta in a step, from 0."""
        if self.function is not None:
            return value_of("beta", self.function, step / self.total)
        return self.last * (min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0)

    def _settled(self) -> int:
        stride = -(-self.total // _GRID)
        last = self(self.total - 1)
        for step in range(self.total - 1, -1, -stride):
            if not math.isclose(self(step), last, rel_tol=1e-6, abs_tol=1e-9):
                return min(step + stride, self.total)
        return 0


def value_of(name: str, function: Callable[[float], Any], done: float) -> float:
    """What a schedule of that name says of the fraction of steps done; a ValueError where it is no finite number >= 0.

    Example:
        >>> value_of("beta", lambda done: None, 0.5)
        Traceback (most recent call last):
        ...
        ValueError: beta(0.5) is None, wanted a finite number that is not negative.
    """
    value, found = function(done), math.nan
    with contextlib.suppress(ValueError):
        found = float(number(name, value))
    if not (math.isfinite(found) and found >= 0):
        raise ValueError(f"{name}({done:g}) is {value!r}, wanted a finite number that is not negative.")
    return found


def check_tempering(loss: Any, epochs: int, kl_warmup: float, kl_warmup_steps: int | None, beta: Beta | None) -> None:
    """Refuse what `Tempering` cannot do, before there are data."""
    weights = {"kl_warmup": kl_warmup, "kl_warmup_steps": kl_warmup_steps, "beta": beta}
    given = [name for name, value in weights.items() if value is not None and (name == "beta" or value)]
    if kl_warmup < 0 or kl_warmup >= epochs > 0 and kl_warmup:
        raise ValueError(
            f"kl_warmup must lie in 0 .. epochs - 1 = {epochs - 1}, got {kl_warmup} (fractions of an epoch, too, as "
            "long as it ends before the fit does)."
        )
    if kl_warmup_steps is not None and integer("kl_warmup_steps", kl_warmup_steps) < 0:
        raise ValueError(f"kl_warmup_steps must be a number of steps, got {kl_warmup_steps}.")
    if callable(beta):
        value_of("beta", beta, 0.0)  # one that gives no numbers is told before the data are looked at
    elif beta is not None:
        try:
            negative = number("beta", beta) < 0
        except ValueError:
            negative = True
        if negative:
            raise ValueError(f"beta must be a finite number that is not negative, or a function, got {beta!r}.")
    if not given:
        return
    own = isinstance(loss, Objective) and float(loss.beta) != 1 and beta is not None
    if len(given) > 1 or own:
        both = " and ".join([*given, *([f"Objective(beta={float(loss.beta):g})"] if own else [])])
        raise ValueError(f"got {both}, wanted one of them: each says what the weight of the divergence is.")
    name = given[0]
    off = "None" if name != "kl_warmup" else "0"
    temperable = (infer.Trace_ELBO, infer.TraceMeanField_ELBO, infer.TraceGraph_ELBO, infer.TraceEnum_ELBO)
    if not isinstance(loss, temperable) and getattr(loss, "bound", None) is not elbo:
        raise ValueError(f"{name} tempers an ELBO, got {loss!r}. Leave {name} at {off}.")
    if isinstance(loss, _JIT):
        raise ValueError(
            f"{type(loss).__name__} compiles its first step with the first weight for good, so that {name} would do "
            f"nothing after it. Take {type(loss).__name__.removeprefix('Jit')}: fit captures the steps by itself."
        )
