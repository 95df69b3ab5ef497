"""A `Model` and a `Guide` held together, with what people expect of a VAE.

Nothing in the package needs this class: it is a convenience over the two programs,
and it can rebuild itself from a file without running code from it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

import torch
from pyro.distributions import TorchDistribution
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from pyro_vae import seals
from pyro_vae.options import checked
from pyro_vae.parameters import plain_name
from pyro_vae.parts import posteriors
from pyro_vae.programs import kinds
from pyro_vae.programs.architecture import Architecture
from pyro_vae.programs.pair import Guide, Model
from pyro_vae.randomness import forked, noise
from pyro_vae.tensors import data_of, running

_METADATA = "pyro_vae.architecture"
_ROWS = 1000  # data that go through the networks at a time


class Answers(nn.Module):
    """What people ask of a pair, abstract: numbers, and the distributions that they are of.

        posterior(x), decode(z)     distributions, which carry gradients
        encode, reconstruct, ...    plain tensors without, where the pair is: ``.numpy()`` works on a CPU

    Data are whatever `data_of` takes. With `seed` the noise that is drawn on the way starts at it, and torch's random
    state is afterwards what it was; without, it goes on.

    y: What the programs take beside x.
    """

    model: Any
    guide: Any
    architecture: Architecture | None = None

    def posterior(self, x: Any, *y: Any) -> TorchDistribution:
        """q(z | x), or q(z | x, y): a distribution over the latent for each datum, batch_shape (B,)."""
        beside = [data_of(value, name="y") for value in y]
        return running(self.guide.posterior, data_of(x, self.guide), *beside, network=self.guide)

    def decode(self, z: Any, *y: Any) -> TorchDistribution:
        """p(x | z), or p(x | z, y): a distribution over data for each latent, batch_shape (...)."""
        beside = [data_of(value, name="y") for value in y]
        return running(self.model.likelihood, data_of(z, self.model, "z"), *beside, network=self.model)

    @torch.no_grad()
    @checked
    def encode(self, x: Any, *y: Any, seed: int | None = None) -> Tensor:
        """E_q[z | x], the place of each datum in the latent space; `posterior` is the whole distribution.

        Args:
            x: Data, (B, *x_shape): a tensor, an array, images, a `Split`.
            y: What the guide takes beside.
            seed: Of a binarisation on the way, and of the draws behind the mean of a family without one in closed form.
        Returns:
            (B, D).
        """
        with noise(seed):
            return torch.cat([posteriors.mean(self.posterior(*part)) for part in self._parts(x, *y)])

    @torch.no_grad()
    @checked
    def reconstruct(self, x: Any, *y: Any, seed: int | None = None) -> Tensor:
        """E[x' | z] at z = E_q[z | x], given y where the programs take it.

        Args:
            x, y, seed: As for `encode`.
        Returns:
            (B, *x_shape).
        """
        with noise(seed):
            parts = self._parts(x, *y)
            return torch.cat([self._decoded(posteriors.mean(self.posterior(*part)), *part[1:]) for part in parts])

    def _decoded(self, z: Tensor, *y: Any) -> Tensor:
        return self.decode(z, *y).mean

    def _parts(self, x: Any, *y: Any) -> list[tuple[Any, ...]]:
        """The data, and what goes with each of them, so many at a time as memory is for."""
        x = data_of(x, self.guide)
        others = [value if value is None else data_of(value, name="y") for value in y]
        if len(x) <= _ROWS:
            return [(x, *others)]
        rows = [slice(start, start + _ROWS) for start in range(0, len(x), _ROWS)]
        return [(x[r], *(v if v is None or len(v) != len(x) else v[r] for v in others)) for r in rows]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights (and architecture, where known) to a safetensors file, atomically.

        Raises:
            ValueError: There is no such folder.
            OSError: Nothing can be written there.
        """
        path = Path(path)
        if not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: there is no folder {path.parent}. Make it first.")
        metadata = {_METADATA: json.dumps(asdict(self.architecture))} if self.architecture else {}
        seals.save(path, _Plain(self), metadata, save_model)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, trust: Sequence[str] = ()) -> Self:
        """Rebuild a pair that `save` wrote. Reads tensors and JSON, and runs no code but this package's.

        Args:
            path: The file.
            trust: Parts of your own, ``module:Class``, that may be imported.
        Raises:
            ValueError: No such file, not a safetensors file, weights without an
                architecture (those of your own pair: build the VAE, then `load_weights`),
                with one of another pair or that this version cannot read, or with a part that is not trusted.
        """
        text = seals.check(path).get(_METADATA)
        if text is None:
            raise ValueError(
                f"{path} holds weights without an architecture. Build the VAE from your own parts, then call "
                "vae.load_weights(path)."
            )
        try:
            options = {"standardize": False} | json.loads(text)  # none had it before the field was there
            try:
                architecture = Architecture.of(options.pop("x_shape"), **options)
            except ValueError as error:
                raise TypeError(str(error)) from error
            for name in architecture.foreign:
                if name not in trust:
                    raise ValueError(
                        f"{path} was built with {name}, code outside pyro_vae that loading would run. If you trust it, "
                        f"say so: VAE.load(path, trust=[{name!r}]), or --trust {name} on the command line."
                    )
            maker = cls._maker(architecture.model, path)
            with forked(devices=()):  # weights that are overwritten cost no random numbers
                vae = maker.of(architecture)
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} holds an architecture that cannot be read ({error!r}), wanted what vae.save writes, got: "
                f"{text[:200]}"
            ) from error
        vae.to(_dtype(path))
        vae.load_weights(path)
        return vae.eval()

    @classmethod
    def of(cls, architecture: Architecture) -> Self:
        """The pair of an architecture, with new weights; one of another pair, or parts that do not fit, are refused."""
        pair = cls._of(architecture)
        pair.architecture = architecture
        return pair

    @classmethod
    def _of(cls, architecture: Architecture) -> Self:
        raise NotImplementedError

    @classmethod
    def _maker(cls, model: str, path: str | os.PathLike[str]) -> type[Self]:
        """The class that a file's pair is made by: this one, or the one of that name if this one is more general."""
        kind = kinds.find(model)
        if issubclass(cls, kind):
            return cls
        if issubclass(kind, cls):
            return kind
        raise ValueError(
            f"{path} holds a {model} model, wanted one that {cls.__name__}.load makes. Take "
            f"{kind.__name__}.load(path), or pv.open(run).pair of a run folder."
        )

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """Read weights into this pair.

        Raises:
            ValueError: No such file, a corrupt one, or tensors that do not fit; the weights are then as they were.
        """
        seals.check(path)
        before = {name: value.clone() for name, value in self.state_dict().items()}
        try:
            load_model(_Plain(self), str(path))  # type: ignore[arg-type]
        except (RuntimeError, SafetensorError) as error:
            self.load_state_dict(before)
            lines = [line.strip() for line in str(error).splitlines()]
            raise ValueError(f"the weights in {path} do not fit this VAE: {' '.join(lines[1:2] or lines)}") from error


class VAE(Answers):
    """A model p(z) p(x | z) and a guide q(z | x), with what people expect of the pair.

    ``vae.model`` and ``vae.guide`` are ordinary Pyro programs. It may stand in the place of both: ``fit(vae, data)``.
    `encode`, `reconstruct`, `sample` and `interpolate` give plain tensors; `posterior` and `decode` distributions.

    Args:
        model: The generative model.
        guide: The amortized posterior.
        architecture: How the two were built, if by `VAE.build`; saved with the weights.
    Example:
        >>> vae = VAE.build((1, 8, 8), latent_dim=2, hidden=(32,))
        >>> vae.sample(3).shape, vae.encode(torch.zeros(5, 1, 8, 8)).shape
        (torch.Size([3, 1, 8, 8]), torch.Size([5, 2]))
        >>> vae.posterior(torch.zeros(5, 1, 8, 8)).stddev.shape
        torch.Size([5, 2])
    """

    def __init__(self, model: Model, guide: Guide, architecture: Architecture | None = None) -> None:
        super().__init__()
        self.model, self.guide, self.architecture = model, guide, architecture

    def load_model(self, path: str | os.PathLike[str]) -> None:
        """Read the weights of the model alone, of a pair of whatever guide; none of that guide's code is needed.

        Raises:
            ValueError: No such file, a corrupt one, or tensors that do not fit.
        """
        seals.check(path)
        alone = torch.nn.Module()
        alone.model = self.model
        try:
            missing, _ = load_model(_Plain(alone), str(path), strict=False)  # type: ignore[arg-type]
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"the model in {path} does not fit this VAE: {' '.join(str(error).split())}.") from error
        if missing:
            raise ValueError(f"the model in {path} shares {sorted(missing)[0]} with its guide, wanted one of its own.")

    @classmethod
    def build(cls, x_shape: Sequence[int], **options: Any) -> VAE:
        """A standard VAE with new weights.

        Args:
            x_shape: Shape of one datum.
            options: The other fields of `Architecture`.
        Raises:
            ValueError: An unknown option, or a value that it cannot have.
        """
        return cls.of(Architecture.of(x_shape, **options))

    @classmethod
    def _of(cls, architecture: Architecture) -> Self:
        if architecture.model != "vae":
            raise ValueError(f"got model={architecture.model!r}, wanted 'vae'. Architecture.build makes the others.")
        return cls(*architecture.pair())

    def posterior(self, x: Any, mask: Any = None) -> TorchDistribution:
        """q(z | x): a distribution over the latent for each datum, of what the guide sees of it.

        Args:
            x: Data, (B, *x_shape), a tensor, an array, images or a `Split`, cast as `fit` casts them.
            mask: True where a pixel is observed, broadcastable to x; None for all.
        Returns:
            A distribution with batch_shape (B,).
        Raises:
            ValueError: Data that are none, or of another shape; a mask that is not boolean or does not fit x.
        """
        x = data_of(x, self.guide)
        mask = None if mask is None else data_of(mask, name="mask").to(x.device)
        return running(lambda x: self.guide.posterior(self.guide.visible(x, mask)), x, network=self.guide)

    def decode(self, z: Any) -> TorchDistribution:
        """p(x | z): a distribution over data for each latent.

        Args:
            z: Latents, (..., D), a tensor or an array.
        Returns:
            A distribution with batch_shape (...).
        Raises:
            ValueError: Latents that are none, or of another shape.
        """
        return super().decode(z)

    @torch.no_grad()
    @checked
    def encode(self, x: Any, mask: Any = None, *, seed: int | None = None) -> Tensor:  # type: ignore[override]
        """E_q[z | x], of the observed pixels where there is a mask, (B, D); `posterior` is the whole distribution.

        Args:
            x, mask: As for `posterior`.
            seed: As for `Answers.encode`.
        """
        return super().encode(x, mask, seed=seed)

    @torch.no_grad()
    @checked
    def reconstruct(self, x: Any, mask: Any = None, *, seed: int | None = None) -> Tensor:  # type: ignore[override]
        """E[x' | z] at z = E_q[z | x], of the observed pixels where there is a mask, (B, *x_shape).

        Args:
            x, mask: As for `posterior`.
            seed: As for `Answers.encode`.
        """
        return super().reconstruct(x, mask, seed=seed)

    def _decoded(self, z: Tensor, *y: Any) -> Tensor:
        return self.decode(z).mean

    @torch.no_grad()
    @checked
    def sample(self, size: int = 1, *, pixels: str = "mean", seed: int | None = None) -> Tensor:
        """New data: z ~ p(z), then x from p(x | z).

        Args:
            size: How many.
            pixels: "mean" for E[x | z], the picture people show; "draw" for a sample
                of p(x), which is what the model claims.
            seed: Of the draws; None goes on with torch's random state.
        Returns:
            (size, *x_shape).
        Raises:
            ValueError: Another value of pixels.
        """
        with noise(seed):
            return pixels_of(self.decode(self.model.prior().expand([size]).sample()), pixels)

    @torch.no_grad()
    @checked
    def interpolate(self, start: Any, end: Any, steps: int = 10, *, seed: int | None = None) -> Tensor:
        """E[x | z] along straight lines between the posterior means of two batches.

        Args:
            start: Data, (B, *x_shape).
            end: Data, (B, *x_shape).
            steps: Points on each line, both ends included.
            seed: As for `encode`.
        Returns:
            (B, steps, *x_shape).
        Raises:
            ValueError: Fewer than two steps, or batches of different shape.
        """
        with noise(seed):
            start, end = data_of(start, self.guide, "start"), data_of(end, self.guide, "end")
            if steps < 2 or start.shape != end.shape:
                raise ValueError(
                    f"got {steps} steps between data of shapes {tuple(start.shape)} and {tuple(end.shape)}, wanted at "
                    "least 2 steps and equal shapes."
                )
            a, b = (self.encode(x).unsqueeze(1) for x in (start, end))
        weight = torch.linspace(0, 1, steps, dtype=a.dtype, device=a.device).unsqueeze(-1)
        return self.decode(a + (b - a) * weight).mean


def pixels_of(given_z: TorchDistribution, pixels: str) -> Tensor:
    """The picture that people show, "mean" for E[x | z], or what the model claims, "draw" for a sample of p(x | z)."""
    if pixels not in ("mean", "draw"):
        raise ValueError(f'got pixels={pixels!r}, wanted "mean" or "draw".')
    return given_z.mean if pixels == "mean" else given_z.sample()


class _Plain:
    """The state of a module under plain names, whether or not parts of it are under ``torch.compile``."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def state_dict(self) -> dict[str, Tensor]:
        return {plain_name(name): value for name, value in self.module.state_dict().items()}

    def load_state_dict(self, state: Mapping[str, Tensor], strict: bool = True) -> tuple[list[str], list[str]]:
        here = {plain_name(name): name for name in self.module.state_dict()}
        given = {plain_name(name): value for name, value in state.items()}
        self.module.load_state_dict({here[name]: value for name, value in given.items() if name in here}, strict=False)
        return [name for name in here if name not in given], [name for name in given if name not in here]


def _dtype(path: str | os.PathLike[str]) -> torch.dtype:
    """Of the first floating-point tensor in a file."""
    with safe_open(str(path), framework="pt") as file:
        found = (file.get_tensor(name).dtype for name in file.keys())  # noqa: SIM118 (a file is no dict)
        return next((dtype for dtype in found if dtype.is_floating_point), torch.get_default_dtype())
