"""Guides that finish what the encoder began, by gradient steps for each datum.

    lambda_0 = encoder(x),   lambda_{t+1} = lambda_t + e * grad ELBO(x; lambda_t)

The parameters are those of the distributions at the guide's sites, without constraints, or, for a family that is not
made of its parameters alone, such as a flow, all that its posterior's head returns. The result is a member of the base
guide's family, so whatever that can do (score samples, an analytic KL), it can.

The size of the steps is found by measurement, per datum. A step is tried and its ELBO compared with that before it, at
common noise that the gradient has not seen; where it did not rise, the datum stays, and tries a shorter one next. At
the end all that was gained is measured once more, at noise that no step has seen, and a datum whose gain is not above
its standard error keeps the base guide's parameters.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import pyro
import torch
from torch import Tensor

from pyro_vae.options import checked
from pyro_vae.programs.refined import Plates, Refined, Sites, hidden
from pyro_vae.protocols import Build, Free, Rescoring, twice_differentiable
from pyro_vae.randomness import forked
from pyro_vae.sites import data_plate, kind, lengths, plates
from pyro_vae.traces import Program, draw
from pyro_vae.unconstrained import Heads, Moved, free_parameters, heads_of

_Key = TypeVar("_Key", str, tuple[str, str])
# Of measured steps: how far the first moves the parameter of the steepest slope, how much longer the next is where one
# helped and how much shorter where not, and how many times the samples of a step the last look takes.
_FIRST, _LONGER, _SHORTER, _CHECKS = 0.1, 1.5, 2.0, 4


class SemiAmortized(Refined):
    """q(z | x): the base guide after a few gradient steps on its parameters, per datum.

    The steps climb the model's ELBO, with the gradient along reparameterised samples. The sequence of their noise is
    fixed by the seed, so that the guide scores samples by the distribution that it draws them from. It is unaffected by
    scales, tempering and losses outside.

    With ``differentiate`` the loss is differentiated through the steps (at the price of second derivatives), so that
    the encoder learns to give parameters from which the steps go far, as in the paper. Without, the change is taken as
    a constant, which pulls the encoder to where the steps end.

    One run costs the base guide once (twice for guides of several sites and for families known by their heads only,
    which also run it in every step) and per step the model and its gradient. The steps seed torch's generator, so a
    compiler that captures the program has to leave it as it is.

    Args:
        model: The model.
        guide: The base guide, reparameterised.
        num_steps: How many; at 0 the guide is its base guide.
        step_size: e, the same for all data, each step taken as it comes; None finds it per datum, and takes only
            what helps (see above), at twice the cost.
        momentum: Share of the last change that is added to the next, in [0, 1).
        max_change: No parameter moves further in one step; None for no limit.
        num_samples: Samples per step behind the gradient; None for 1, or 16 where steps are measured.
        differentiate: Differentiate the loss through the steps.
        seed: Of the steps' noise. None draws it anew in every run: the guide is then
            another one in every run, and cannot score samples that it did not draw.
    Raises:
        ValueError: An option out of range; a site that is a point, is not
            reparameterised, or whose distribution cannot be rebuilt from parameters.
    Example:
        >>> import pyro.distributions as dist
        >>> from pyro_vae import Guide, Model
        >>> model = Model(lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        ...               lambda z: dist.Normal(z, 1.0).to_event(1))
        >>> base = Guide(lambda x: dist.Normal(torch.zeros_like(x), 1.0).to_event(1))
        >>> SemiAmortized(model, base, num_steps=3)(torch.zeros(5, 2)).shape
        torch.Size([5, 2])

    Reference: Kim et al., Semi-Amortized Variational Autoencoders, 2018. arXiv:1802.02550
    """

    @checked
    def __init__(
        self,
        model: Program,
        guide: Program,
        num_steps: int = 10,
        step_size: float | None = None,
        momentum: float = 0.5,
        max_change: float | None = 1.0,
        num_samples: int | None = None,
        differentiate: bool = True,
        seed: int | None = 0,
    ) -> None:
        super().__init__(model, guide, num_steps)
        limited, measured = max_change is None or max_change > 0, step_size is None
        positive = step_size is None or step_size > 0
        num_samples = (16 if measured else 1) if num_samples is None else num_samples
        if not positive or not 0 <= momentum < 1 or num_samples < 1 or not limited:
            raise ValueError(
                f"got step_size={step_size}, momentum={momentum}, max_change={max_change}, num_samples={num_samples}, "
                "wanted a positive step_size or None, a momentum in [0, 1), a positive max_change or None, and at "
                "least one sample."
            )
        if measured and num_samples < 2:
            raise ValueError(
                f"got num_samples={num_samples} with step_size=None, wanted at least 2, since whether a step helps is "
                "measured. Give a step_size."
            )
        self.step_size, self.momentum, self.max_change = step_size, momentum, max_change
        self.num_samples, self.differentiate, self.seed = num_samples, differentiate, seed

    @property
    def rescoring(self) -> Rescoring:
        """As of the base guide; "impossible" where every run draws its own noise."""
        return "impossible" if self.num_steps and self.seed is None else super().rescoring

    def _refine(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        through = self.differentiate and torch.is_grad_enabled()
        with Heads(heads_of(self.guide)) as heads:
            start = self._run_guide(args, kwargs)
        try:
            parts = {name: free_parameters(site["fn"]) for name, site in start.items()}
        except ValueError as refusal:
            parts = {}
            if not heads.cover(start):
                raise ValueError(
                    f"SemiAmortized cannot rebuild the guide's sites, {_list(start)}, from their parameters: {refusal}"
                    ", and the guide has no posterior with a head and a family for each site. Take an Amortized "
                    "posterior."
                ) from refusal
        if through:
            for name, site in start.items():
                if not twice_differentiable(site["fn"]):
                    raise ValueError(
                        f"guide site {name!r} ({kind(site['fn'])}) has samples with first derivatives only, so the "
                        "steps cannot be differentiated. Pass differentiate=False."
                    )
        axis = self._axes(start, args)
        like: Mapping[Any, Tensor]
        moved: Callable[[Any], Program]
        if len(parts) < len(start):
            moved, like = _by_heads(self.guide, heads.posteriors), heads.returned
            axes: dict[Any, int] = dict(zip(like, axis.values(), strict=True))  # a head for each site
        elif len(start) == 1:
            ((name, (like, build)),) = parts.items()
            moved, axes = _by_parameters(start[name], like, build), dict.fromkeys(like, axis[name])
        else:
            like = {(name, key): value for name, (free, _) in parts.items() for key, value in free.items()}
            moved, axes = _by_sites(self.guide), {key: axis[key[0]] for key in like}
        found = functools.partial(self._found, moved, like, axes, args, kwargs, through)
        changes = found() if self.seed is None else self._once(args, kwargs, found)
        return moved(changes)(*args, **kwargs)

    def _axes(self, start: Sites, args: Any) -> dict[str, int]:
        """The dimension of the data in the parameters of each site, where steps are measured datum by datum."""
        if self.step_size is not None:
            return dict.fromkeys(start, 0)
        stacks = [{(dim, frame.size) for dim, frame in plates(site).items()} for site in start.values()]
        common = set.intersection(*stacks)
        if not common:
            raise ValueError(
                f"the guide's sites, {_list(start)}, share no plate, so that no datum's ELBO can be measured. Wrap the "
                'guide in with pyro.plate("data", len(x)):, or give a step_size.'
            )
        dim, _ = data_plate(common, lengths(args))
        return {name: len(site["fn"].batch_shape) + dim for name, site in start.items()}

    def _found(
        self, guide: Any, like: Mapping[_Key, Tensor], axes: Mapping[_Key, int], args: Any, kwargs: Any, through: bool
    ) -> dict[_Key, Tensor]:
        """What the steps add to the parameters."""
        zeros = {key: torch.zeros_like(value, requires_grad=True) for key, value in like.items()}

        def climb(changes: dict[_Key, Tensor]) -> tuple[Tensor, list[Tensor]]:
            """The log weights at some changes, (K, B), and the slopes of the ELBO in them."""
            table = draw(self.model, guide(changes), args, kwargs, self.num_samples, vectorize=False)
            target = table.log_weight.mean(0).sum()
            slopes = torch.autograd.grad(target, list(changes.values()), create_graph=through, materialize_grads=True)
            return table.log_weight.detach(), list(slopes)

        with torch.enable_grad(), hidden(), self._noise() as seed:
            if self.step_size is None:
                found = self._measured(climb, guide, zeros, axes, args, kwargs, through, seed)
            else:
                found = self._as_they_come(climb, zeros, through)
        return found if through else {key: change.detach() for key, change in found.items()}

    def _as_they_come(self, climb: Any, changes: dict[_Key, Tensor], through: bool) -> dict[_Key, Tensor]:
        """Steps of one size for all data."""
        speeds = {key: torch.zeros_like(value) for key, value in changes.items()}
        for _ in range(self.num_steps):
            for key, slope in zip(changes, climb(changes)[1], strict=True):
                speeds[key] = self._speed(speeds[key], self.step_size * slope)
                moved = changes[key] + speeds[key]
                changes[key] = moved if through else moved.detach().requires_grad_()
        return changes

    def _measured(
        self, climb: Any, guide: Any, start: dict[_Key, Tensor], axes: Mapping[_Key, int], args: Any, kwargs: Any,
        through: bool, seed: int,
    ) -> dict[_Key, Tensor]:  # fmt: skip
        """Steps of a size for each datum, taken where the ELBO rises at noise that their gradient has not seen."""

        def of(datum: Tensor, key: _Key) -> Tensor:
            """A number for each datum, broadcast over the parameters of a site."""
            shape = [1] * start[key].dim()
            shape[axes[key]] = -1
            return datum.reshape(shape)

        def weights(changes: dict[_Key, Tensor], noise: int, count: int) -> Tensor:
            torch.manual_seed(seed + noise)
            with torch.no_grad():
                return draw(self.model, guide(changes), args, kwargs, count, vectorize=False).log_weight

        torch.manual_seed(seed)
        now, (value, slopes) = start, climb(start)
        speeds = [torch.zeros_like(change) for change in now.values()]
        steepest = value.new_zeros(value.shape[1])
        for key, slope in zip(now, slopes, strict=True):
            rows = slope.detach().abs().movedim(axes[key], 0).reshape(len(steepest), -1)
            steepest = torch.maximum(steepest, rows.amax(1))
        rate = _FIRST / steepest.clamp(min=1e-12)
        for step in range(1, self.num_steps + 1):
            tried = [self._speed(speed, of(rate, key) * slope)
                     for key, speed, slope in zip(now, speeds, slopes, strict=True)]  # fmt: skip
            there = {key: change + speed for (key, change), speed in zip(now.items(), tried, strict=True)}
            if not through:
                there = {key: change.detach().requires_grad_() for key, change in there.items()}
            before = weights(now, step, self.num_samples)
            torch.manual_seed(seed + step)
            after, steeper = climb(there)
            rises = (after - before).mean(0) > 0
            taken = [of(rises, key) for key in now]
            now = {key: torch.where(t, there[key], now[key]) for key, t in zip(now, taken, strict=True)}
            slopes = [torch.where(*each) for each in zip(taken, steeper, slopes, strict=True)]
            speeds = [torch.where(t, speed, 0.0) for t, speed in zip(taken, tried, strict=True)]
            rate = torch.where(rises, rate * _LONGER, rate / _SHORTER)
        count = _CHECKS * self.num_samples
        gain = weights(now, self.num_steps + 1, count) - weights(start, self.num_steps + 1, count)
        kept = gain.mean(0) > gain.std(0) / count**0.5
        return {key: torch.where(of(kept, key), change, 0.0) for key, change in now.items()}

    def _speed(self, last: Tensor, step: Tensor) -> Tensor:
        speed = self.momentum * last + step
        return speed if self.max_change is None else speed.clamp(-self.max_change, self.max_change)

    @contextlib.contextmanager
    def _noise(self) -> Iterator[int]:
        """The steps' noise, apart from all other, and its seed; without a seed steps that are not measured need no
        generator of their own."""
        if self.seed is None and self.step_size is not None:
            yield 0
            return
        seed = int(torch.randint(2**31, ()).item()) if self.seed is None else self.seed
        with forked():
            torch.manual_seed(seed)
            yield seed


def _by_parameters(site: Any, free: Free, build: Build) -> Callable[[Free], Program]:
    """One site: its parameters are known, and the encoder need not run again."""

    def moved(changes: Free) -> Program:
        def program(*_: Any, **__: Any) -> Tensor:
            with Plates().of(site):
                there = build({key: value + changes[key] for key, value in free.items()})
                return pyro.sample(site["name"], there, infer=site["infer"])

        return program

    return moved


def _by_sites(guide: Program) -> Callable[[Mapping[tuple[str, str], Tensor]], Program]:
    """Several sites: later ones may depend on draws of earlier ones, so the guide runs again in every step."""

    def moved(changes: Mapping[tuple[str, str], Tensor]) -> Program:
        by_site: dict[str, Free] = {name: {} for name, _ in changes}
        for (name, key), change in changes.items():
            by_site[name][key] = change
        return Moved(by_site)(guide)

    return moved


def _by_heads(guide: Program, posteriors: Mapping[str, Any]) -> Callable[[Free], Program]:
    """Families known by their heads: what the heads return is moved."""

    def moved(changes: Free) -> Program:
        def program(*args: Any, **kwargs: Any) -> Any:
            with Heads(posteriors, changes):
                return guide(*args, **kwargs)

        return program

    return moved


def _list(sites: Sites) -> str:
    return ", ".join(f"{name!r} ({kind(site['fn'])})" for name, site in sites.items())
