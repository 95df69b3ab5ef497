"""`pyro-vae export`: a run's encoder and decoder as programs of torch.export, that run without this package.

Each is written only when the file, read back, gives what the networks give, on batches of several sizes.
"""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path
from typing import Any

import click
import pyro
import torch
from torch import Tensor, nn

from pyro_vae.app import following, serving
from pyro_vae.app.opening import open as opened
from pyro_vae.atomic import write_file
from pyro_vae.evaluation import evaluating
from pyro_vae.protocols import has_head

TOLERANCE = 1e-6
_SIZES = (1, 2, 5)


class Encoder(nn.Module):
    """x, (B, *x_shape), to mean and standard deviation of q(z | x), (B, D) each, as far as they are closed forms.

    Where the family has no mean, to the numbers that it is made of, (B, P).
    """

    def __init__(self, vae: Any, x: Tensor) -> None:
        super().__init__()
        self.guide = vae.guide
        self.gives: tuple[str, ...] = ()
        q = vae.posterior(x)
        for name in ("mean", "stddev"):
            with contextlib.suppress(NotImplementedError):
                getattr(q, name)
                self.gives += (name,)
        if "mean" not in self.gives:
            if not has_head(vae.guide.posterior):
                raise ValueError(
                    "the posterior has neither a mean in closed form nor a head, so that no encoder can "
                    "be exported as a function of tensors. Fit one of pyro_vae.parts.posteriors."
                )
            self.gives = ("parameters",)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        seen = self.guide.visible(x)
        if self.gives == ("parameters",):
            posterior: Any = self.guide.posterior
            return (posterior.head(posterior.encoder(seen)),)
        q = self.guide.posterior(seen)
        return tuple(getattr(q, name) for name in self.gives)


class Decoder(nn.Module):
    """z, (B, D), to E[x | z], (B, *x_shape)."""

    gives = ("mean",)

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.model = vae.model

    def forward(self, z: Tensor) -> tuple[Tensor, ...]:
        return (self.model.likelihood(z).mean,)


def export_run(run: Path, out: Path | None = None, trust: tuple[str, ...] = ()) -> list[Path]:
    """The command; returns the files. What torch.export cannot write, or writes wrongly, is a ValueError."""
    pair = opened(run, trust=trust).pair.eval()
    serving.only(pair, "export", "vae", "mixture")
    vae: Any = pair
    folder = run / "export" if out is None else out
    assert vae.architecture is not None
    dtype = next(vae.parameters()).dtype
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(max(_SIZES), *vae.architecture.x_shape, dtype=dtype, generator=generator)
    z = torch.randn(max(_SIZES), vae.architecture.latent_dim, dtype=dtype, generator=generator)
    written = []
    for name, module, example in (("encoder", Encoder(vae, x), x), ("decoder", Decoder(vae), z)):
        path = folder / f"{name}.pt2"
        write_file(path, lambda partial, m=module, e=example, n=name: _exported(m, e, n, partial))  # type: ignore[misc]
        takes, shape = ("x", vae.architecture.x_shape) if name == "encoder" else ("z", (vae.architecture.latent_dim,))
        gives = ", ".join(module.gives) + ("," if len(module.gives) == 1 else "")
        click.echo(f"{path}: {takes}, (B, {', '.join(map(str, shape))}), to ({gives})")
        written.append(path)
    click.echo(f'load it by torch.export.load("{written[0]}").module(); it needs torch {torch.__version__} alone')
    following.say(following.after("export", run, {}))
    return written


def _exported(module: Any, example: Tensor, name: str, path: Path) -> None:
    module.eval()
    # Without Pyro's look at values, which no export can record, and what torch says of its own.
    with warnings.catch_warnings(action="ignore"), pyro.validation_enabled(False), evaluating(module.forward):
        try:
            sizes = ({0: torch.export.Dim("batch", min=1)},)
            program = torch.export.export(module, (example,), dynamic_shapes=sizes, strict=False)
            torch.export.save(program, path)
        except OSError:
            raise
        except Exception as error:  # torch.export raises all kinds
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"torch.export cannot write the {name} of this run ({reason}). Load it with pyro_vae: pv.open(run)."
            ) from error
        loaded = torch.export.load(path).module()
        for size in _SIZES:
            given = example[:size]
            for got, wanted in zip(loaded(given), module(given), strict=True):
                away = float(((got - wanted).abs() / wanted.abs().clamp(min=1)).max())
                if not away <= TOLERANCE:
                    raise ValueError(
                        f"the exported {name} is {away:.1e} away from the networks for a batch of {size}, "
                        f"wanted at most {TOLERANCE:g}: nothing was written. Report it, with the run."
                    )
