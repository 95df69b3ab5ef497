"""One optimiser step for all parameters, behind Pyro's optimiser interface.

``pyro.optim.PyroOptim`` keeps one torch optimiser per tensor, so that no fused kernel can run and clipping is per
tensor. `Fused` keeps one for all. Its state is kept by the parameters' names, as Pyro's is.
"""

from __future__ import annotations

import inspect
import os
import pickle
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import optimizer as shared_hooks

from pyro_vae.inference.optimizer_states import copied, matched, path_of
from pyro_vae.inference.updates import Update, clip
from pyro_vae.parameters import names_of

_UNSTABLE = 3  # changes of an option, after which the step is left outside of the graph
_WRITTEN = ("params", "lr", "initial_lr")  # what a step in a graph reads anew
# How a step is computed, not what: of the machine, and left to it when a state is taken up there.
_MACHINE = ("params", "fused", "foreach", "capturable", "differentiable")


class Fused(PyroOptim):
    """One torch optimiser for all parameters, with a schedule and global clipping.

    Args:
        options: Keyword arguments of the class; ``fused=True`` is added where it is supported.
        clip_norm: Upper limit of the joint gradient norm of all parameters, in units of `scale`, 1 if nobody says.
    Attributes:
        parameters: The tensors that had a gradient so far.
        exchange: Takes the tensors that have a gradient before each step, puts the gradients to step along in their
            place, and returns those that have one then: how processes put theirs together.
    Raises:
        ValueError: A learning rate or clip_norm that is not positive.
    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([3.0]))
        >>> weight.grad = torch.tensor([4.0])
        >>> Fused(torch.optim.SGD, {"lr": 1.0}, clip_norm=1.0)([weight])
        >>> weight.data
        tensor([2.0000])
    """

    def __init__(
        self,
        constructor: type[torch.optim.Optimizer] = torch.optim.Adam,
        options: dict[str, Any] | None = None,
        clip_norm: float | None = None,
    ) -> None:
        options = {"lr": 1e-3} | (options or {})
        if not options["lr"] > 0:
            raise ValueError(f"the learning rate must be positive, got {options['lr']}.")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive or None, got {clip_norm}.")
        super().__init__(constructor, options)
        self.constructor, self.options = constructor, options
        self.clip_norm = clip_norm
        self.scale = 1.0
        self.learning_rate: float = options["lr"]
        self.parameters: set[Tensor] = set()
        self._factor = 1.0
        self._optimizer: torch.optim.Optimizer | None = None
        self._changes = 0  # of options during a fit
        self._rates: list[float] | None = None  # of the groups of an optimiser that was taken over
        self._pending: dict[str, Any] | None = None  # a state whose parameters are yet to join
        self.count = 0
        self._even = True  # whether all parameters took part in every step
        self._update: Update | None = None
        self.exchange: Callable[[list[Tensor]], list[Tensor]] | None = None

    @classmethod
    def taking(cls, optimizer: torch.optim.Optimizer, clip_norm: float | None = None) -> Fused:
        """Step with an optimiser that is there: its algorithm, options, groups, rates and state.

        Gradients that lie on its parameters are dropped, since a step would use them. A parameter that has one in the
        first step and is not in the optimiser is a ValueError then.
        """
        optimizer.zero_grad(set_to_none=True)
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        taken = cls(type(optimizer), {"lr": max(rates)}, clip_norm)
        taken._optimizer, taken._rates = optimizer, rates
        tensors = [p for group in optimizer.param_groups for p in group["params"]]
        steps = [int(optimizer.state.get(p, {}).get("step", 0)) for p in tensors]
        taken.count, taken._even = max(steps), len(set(steps)) == 1
        return taken

    def __call__(self, params: Iterable[Tensor], *args: Any, **kwargs: Any) -> None:
        """Step all parameters that have a gradient; new ones join the optimiser."""
        params = [p for p in params if p.grad is not None]
        if self.exchange is not None:
            params = self.exchange(params)
        new = [p for p in params if p not in self.parameters]
        if new:
            self._join(new)
        if self._optimizer is None:
            return
        self._even = self._even and len(params) == len(self.parameters)
        if self.clip_norm is not None:
            clip([p.grad for p in params if p.grad is not None], self.clip_norm * self.scale)
        self._optimizer.step()
        self.count += 1
        # SVI zeroes gradients with a fresh tensor for each; None spares that and an addition in backward.
        for p in params:
            p.grad = None

    @property
    def current_rate(self) -> float:
        """The learning rate of the first group, as it stands."""
        return self._groups[0]["lr"] if self._groups else self.learning_rate * self._factor

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return [] if self._optimizer is None else self._optimizer.param_groups

    def set_learning_rate(self, factor: float) -> None:
        """Scale the initial learning rate by a factor, for parameters yet to join as well.

        Rates of an optimiser that was taken over are its own as long as the factor is 1.
        """
        unchanged = self._rates is not None and factor == self._factor
        self._factor = factor
        for index, group in enumerate(self._groups):
            if not unchanged:
                group["lr"] = (self.learning_rate if self._rates is None else self._rates[index]) * factor

    def release(self) -> None:
        """Give an optimiser that was taken over its own rates back."""
        if self._rates is not None:
            self.set_learning_rate(1.0)

    def taken_groups(self) -> list[dict[str, Any]]:
        """The options of each group of an optimiser that was taken over; [] of one of our own."""
        if self._rates is None:
            return []
        own = [{k: v for k, v in group.items() if k not in _MACHINE} for group in self._groups]
        return [options | {"lr": rate} for options, rate in zip(own, self._rates, strict=True)]

    @property
    def settings(self) -> tuple[Any, ...]:
        """What a step inside of a graph has as constants: the options of all groups but the rate."""
        return tuple(value for group in self._groups for key, value in group.items() if key not in _WRITTEN)

    @property
    def hooked(self) -> bool:
        """Whether other code runs with a step."""
        return self._optimizer is not None and _hooked(self._optimizer)

    def inside(self) -> Update | None:
        """This optimiser's step as tensor operations, for a graph that holds a whole training step.

        None where there is no such form: before the first step, between processes, for another algorithm than Adam and
        AdamW, where other code runs with a step (a hook), parameters took part in different numbers of steps, or an
        option changes the algorithm. An option that changes needs another graph; where some do again and again, as
        under a cycle of momenta, there is none either.
        """
        optimizer = self._optimizer
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or not self._even or self.exchange is not None:
            return None
        assert optimizer is not None
        if self.hooked:
            return None
        (group, *more) = optimizer.param_groups
        tensors = group["params"]
        made = self._update
        if made is not None and made.optimizer is optimizer and len(made.parameters) == len(tensors):
            if made.settings == self.settings:
                return made
            self._changes += 1
        if self._changes > _UNSTABLE:
            return None
        plain = not any(group[name] for name in ("amsgrad", "maximize", "differentiable"))
        known = all(p in optimizer.state and p.is_floating_point() for p in tensors)
        if more or not plain or not known or len({(p.dtype, p.device) for p in tensors}) != 1:
            return None
        if {int(optimizer.state[p]["step"]) for p in tensors} != {self.count}:
            return None
        self._update = Update(self, optimizer)
        return self._update

    def get_state(self) -> dict[str, Any]:
        """All that the next steps depend on, by the parameters' names: plain data and copies of tensors.

        Raises:
            ValueError: A parameter without a name, or two of one name.
        """
        if self._optimizer is None:
            return {} if self._pending is None else self._pending
        named: dict[str, Tensor] = {}
        groups = []
        for index, group in enumerate(self._groups):
            members = [p for p in group["params"] if p in self.parameters]
            names = [next(iter(names_of(p)), f"a parameter of shape {tuple(p.shape)}") for p in members]
            for name, p in zip(names, members, strict=True):
                if not names_of(p) or named.setdefault(name, p) is not p:
                    raise ValueError(
                        f"the optimiser's state is kept by name, and {name!r} is no name of one parameter. Give each "
                        "network a name of its own, in pyro.module or as an attribute of a PyroModule."
                    )
            options = {key: value for key, value in group.items() if key not in _MACHINE}
            options["lr"] = self.learning_rate if self._rates is None else self._rates[index]
            groups.append({"names": names, "options": options})
        state = {name: {k: copied(v) for k, v in self._optimizer.state[p].items()} for name, p in named.items()}
        return {
            "algorithm": path_of(self.constructor), "count": self.count, "even": self._even, "factor": self._factor,
            "groups": groups, "shapes": {name: list(p.shape) for name, p in named.items()}, "state": state,
        }  # fmt: skip

    def set_state(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what `get_state` gave: now for parameters that are known, for others when they join.

        The learning rate and all other options of the algorithm are then those of the state. Names of programs that
        this package numbers (Model1, Model2) are the same but for the number. What is no state of `Fused`, or of
        another algorithm, or, when the parameters are known, of others, is a ValueError.
        """
        if not state_dict:
            return
        missing = {"algorithm", "count", "even", "factor", "groups", "shapes", "state"} - set(state_dict)
        if missing:
            raise ValueError(
                "got a state that Fused.get_state() has not made (those of Pyro's own optimisers are one per tensor), "
                f"wanted one with {', '.join(sorted(missing))}. Load it into the kind of optimiser that saved it."
            )
        if state_dict["algorithm"] != path_of(self.constructor):
            raise ValueError(
                f"got the state of {state_dict['algorithm']}, wanted one of {path_of(self.constructor)}. Make the "
                "optimiser of the class that was saved."
            )
        self._pending = dict(state_dict)
        if self.parameters:
            self._take_up(list(self.parameters))

    def save(self, filename: str | os.PathLike[str]) -> None:
        """Write `get_state` to a file."""
        torch.save(self.get_state(), filename)

    def load(self, filename: str | os.PathLike[str], map_location: Any = None) -> None:
        """Take up what `save` wrote. Reads tensors and plain data, and runs no code.

        Raises:
            ValueError: The file holds something else; all that `set_state` refuses.
        """
        try:
            state = torch.load(filename, map_location=map_location, weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            raise ValueError(f"{filename} does not hold the state of an optimiser, wanted what save writes.") from error
        if not isinstance(state, dict):
            raise ValueError(f"{filename} holds a {type(state).__name__}, wanted what save writes.")
        self.set_state(state)

    def moments(self, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
        """The optimiser's state of each of these tensors that has one, by name."""
        state = {} if self._optimizer is None else self._optimizer.state
        return {
            name: {key: torch.as_tensor(value) for key, value in state[tensor].items() if value is not None}
            for name, tensor in tensors.items()
            if tensor in state
        }

    def restore(self, tensors: Mapping[str, Tensor], moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up `moments` again, in a new process too."""
        if not moments:
            return
        joining = [tensors[name] for name in sorted(moments) if tensors[name] not in self.parameters]
        if joining:
            self._join(joining)
        assert self._optimizer is not None
        for name, state in moments.items():
            parameter = tensors[name]
            now = self._optimizer.state[parameter]
            if now and {k: v.shape for k, v in state.items()} == {k: torch.as_tensor(v).shape for k, v in now.items()}:
                for key, value in state.items():  # in place, since graphs hold these tensors
                    now[key].copy_(value)
            else:
                self._optimizer.state[parameter] = {k: self._placed(k, v, parameter) for k, v in state.items()}
        self.count = max(int(state.get("step", 0)) for state in moments.values())

    @property
    def can_start_afresh(self) -> bool:
        """Whether zeros are what its state starts from, as Adam's do."""
        return self.constructor in (torch.optim.Adam, torch.optim.AdamW) and self._rates is None

    def start_afresh(self) -> None:
        """Forget all steps; the parameters stay, and so do the tensors of the state, which graphs hold."""
        self.count = 0
        for state in self._optimizer.state.values() if self._optimizer is not None else ():
            for value in state.values():
                value.zero_()

    def _join(self, new: list[Tensor]) -> None:
        if self._rates is not None:
            self._check_taken(new)
        elif self._pending is None:
            self._add(new)
        self.parameters.update(new)
        if self._pending is not None:
            self._take_up(new)

    def _check_taken(self, new: list[Tensor]) -> None:
        """Refuse parameters that the optimiser taken over does not hold: its owner would not have them trained."""
        held = {id(p) for group in self._groups for p in group["params"]}
        lacking = [next(iter(names_of(p)), f"one of shape {tuple(p.shape)}") for p in new if id(p) not in held]
        if lacking:
            raise ValueError(
                f"{len(lacking)} of the pair's {len(new)} parameters are not in the optimiser ({min(lacking)!r}). "
                f"Add them to it, freeze them by requires_grad_(False), or pass the class, "
                f"optimizer=torch.optim.{self.constructor.__name__}, which takes all."
            )

    def _take_up(self, joined: list[Tensor]) -> None:
        """Give parameters their part of the state that is pending."""
        pending, fresh = self._pending, self._optimizer is None
        assert pending is not None
        found = matched(joined, pending["shapes"])
        unused = set(pending["shapes"]) - set(found.values())
        lacking = [next(iter(names_of(p)), f"one of shape {tuple(p.shape)}") for p in joined if p not in found]
        if lacking or (unused and pending["even"]):
            which = f"has nothing for {min(lacking)!r}" if lacking else f"is for {min(unused)!r}, which had no gradient"
            raise ValueError(
                f"the state of the optimiser {which}: it is that of another pair. It holds {len(pending['shapes'])} "
                f"parameters, {min(pending['shapes'])!r} for one."
            )
        self.learning_rate = pending["groups"][0]["options"]["lr"]
        for saved in pending["groups"]:
            members = [p for p in joined if found[p] in saved["names"]]
            held = {id(p) for group in self._groups for p in group["params"]}
            if self._rates is None and any(id(p) not in held for p in members):
                self._add(members)
            assert self._optimizer is not None
            for index, group in enumerate(self._groups):
                if any(p is q for p in members for q in group["params"]):
                    group.update(saved["options"])
                    if self._rates is not None:
                        self._rates[index] = saved["options"]["lr"]
                    group["lr"] = saved["options"]["lr"] * pending["factor"]
            for p in members:
                self._optimizer.state[p] = {k: self._placed(k, v, p) for k, v in pending["state"][found[p]].items()}
        if fresh or len(joined) == len(self.parameters):
            self.count, self._even, self._factor = pending["count"], pending["even"], pending["factor"]
        self._update = None
        shapes = {name: shape for name, shape in pending["shapes"].items() if name in unused}
        self._pending = pending | {"shapes": shapes} if unused else None

    def _placed(self, key: str, value: Any, parameter: Tensor) -> Any:
        """A copy of a part of the state where the algorithm wants it for this parameter."""
        if not isinstance(value, Tensor):
            return value
        if key != "step":
            return copied(value).to(parameter.device)
        (group,) = (g for g in self._groups if any(parameter is p for p in g["params"]))
        return copied(value).to(parameter.device if (group.get("fused") or group.get("capturable")) else "cpu")

    def _add(self, new: list[Tensor]) -> None:
        if self._optimizer is not None:
            self._optimizer.add_param_group({"params": new})
        else:
            options = dict(self.options)
            floating = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in new)
            if floating and "fused" in inspect.signature(self.constructor).parameters:
                options.setdefault("fused", True)
            self._optimizer = self.constructor(new, **options)
        # The optimiser is made by the first step, which has a rate of its own already.
        self.set_learning_rate(self._factor)


def _hooked(optimizer: torch.optim.Optimizer) -> bool:
    """Whether other code runs with a step; torch's schedulers only count there."""
    step = vars(optimizer).get("step")
    hooks = optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    shared = shared_hooks._global_optimizer_pre_hooks or shared_hooks._global_optimizer_post_hooks
    return bool(hooks or shared) or not (step is None or getattr(step, "_wrapped_by_lr_sched", False))
