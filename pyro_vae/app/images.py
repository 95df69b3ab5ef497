"""What the commands sample and reconstruct do: new data as pictures, and image files beside their reconstructions."""

from __future__ import annotations

import functools
from pathlib import Path

import click
import torch
from torch import Tensor

from pyro_vae import plots
from pyro_vae.app import evaluation, following, report, serving
from pyro_vae.app.defaults import FitOptions
from pyro_vae.app.loaded import opened, x_shape
from pyro_vae.app.remarks import of_image
from pyro_vae.app.runs import FIGURES, Run
from pyro_vae.atomic import write_file
from pyro_vae.data import binarize, dequantize, threshold
from pyro_vae.data.decoding import Framing, grey_level
from pyro_vae.data.photographs import read_image
from pyro_vae.inference.batches import seeded
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.programs.vae import Answers
from pyro_vae.traces import particles


def sample_run(
    run: Path, number: int = 64, pixels: str = "mean", out: Path | None = None, seed: int | None = None,
    trust: tuple[str, ...] = (), label: str | None = None,
) -> Path:  # fmt: skip
    """`pyro-vae sample`: new data as a picture, an array or a folder of pictures; returns where."""
    _, vae, seed = opened(run, trust, seed)
    summary = Run.load(run).summary
    known = serving.label_names(summary)
    wanted = None if label is None else serving.label_of(label, known)
    with seeded(seed):
        x = serving.face(vae).sample(vae, number, pixels=pixels, label=wanted, clusters=summary.get("cluster_classes"))
    of = "" if label is None else f"-label{label}"
    path = out or run / FIGURES / f"samples-{number}{of}-seed{seed}.png"
    if path.suffix == ".npy":
        import numpy as np

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                np.save(file, x.numpy())

        write_file(path, write)
    elif path.suffix == ".png":
        what = f"{number} samples from the prior" if label is None else f"{number} samples of label {label}"
        report.save(plots.samples(x, f"{what}, seed {seed}"), path)
    elif path.suffix:
        raise ValueError(f"got --out {path}, wanted a .png, a .npy, or a folder.")
    else:
        _image_folder(x, path)
    click.echo(path)
    following.say(following.after("sample", run, {}))
    return path


def reconstruct_images(
    run: Path, images: tuple[Path, ...], out: Path | None = None, num_samples: int = 1000, seed: int | None = None,
    trust: tuple[str, ...] = (), label: str | None = None,
) -> Path:  # fmt: skip
    """`pyro-vae reconstruct`: image files beside their reconstructions, and their scores; returns the picture."""
    options, vae, seed = opened(run, trust, seed)
    shape = x_shape(vae)
    if len(shape) != 3:
        raise ValueError(f"{run} is of vectors of shape {shape}, wanted a run of images.")
    x = torch.cat([_as_data(path, shape, options, seed)[None] for path in images])
    face, labels = serving.face(vae), _label_of_images(vae, label, len(x), run)
    (model, guide), given = face.programs(vae), face.batch(x, labels)
    point = evaluation.is_autoencoder(vae)
    rows = [("image", *(("log p(x|z)",) if point else ("E_q log p(x|z)", "KL", "ELBO", face.density)))]
    bound: Tensor | None = None
    with seeded(seed), torch.no_grad():
        if point:
            terms = [particles(model, guide, *given).log_likelihood.mean(0)]
        else:
            drawn = particles(model, guide, *given, num_samples=100)
            likelihood, elbo = drawn.log_likelihood.mean(0), drawn.log_weight.mean(0)
            estimate = log_likelihood(model, guide, given, num_samples=num_samples, seed=seed, progress=False)
            terms = [likelihood, likelihood - elbo, elbo, estimate.pointwise]
            bound = estimate.trusted
        picture = plots.reconstructions(x, vae.reconstruct(x, *face.beside(vae, x, labels)))
    rows += [(path.name, *(f"{float(term[i]):.2f}" for term in terms)) for i, path in enumerate(images)]
    if bound is not None:
        rows = [(*row[:-1], row[-1] if i == 0 or bound[i - 1] else f">= {row[-1]}") for i, row in enumerate(rows)]
    report.print_table(rows)
    levels = Run.load(run).summary.get("train_levels")
    for path, image in zip(images, x, strict=True):
        if (line := of_image(image, levels)) is not None:
            click.echo(f"{path.name} {line}")
    path = out or Path("reconstructions.png")
    report.save(picture, path)
    click.echo(path)
    following.say(following.after("reconstruct", run, {}))
    return path


def _label_of_images(vae: Answers, label: str | None, count: int, run: Path) -> Tensor | None:
    """The label that images are said to have, for each of them, if the model takes it; else None.

    Raises:
        ValueError: A conditional model, and no label or one that is no class; a label for another model.
    """
    if label is not None:
        serving.only(vae, "--label of an image", "conditional")
    elif serving.face(vae).needs_label:
        raise ValueError(f"{run} is a conditional model of p(x | y), wanted the label of the images: --label N.")
    if label is None:
        return None
    assert vae.architecture is not None
    found = serving.label_of(label, serving.label_names(Run.load(run).summary))
    classes = vae.architecture.option("num_classes")
    if not 0 <= found < classes:
        raise ValueError(f"got --label {label}, wanted one of the classes 0, ..., {classes - 1}.")
    return torch.full((count,), found)


def _as_data(path: Path, shape: tuple[int, ...], options: FitOptions, seed: int) -> Tensor:
    """An image file as one datum of a run, (C, H, W); what had to be changed is printed."""
    image = read_image(path, Framing(background=grey_level(options.background)))
    fitted = Framing(channels=shape[0])(image[None], name=str(path))
    size = (shape[1], shape[2])
    done = [] if fitted.shape[1] == image.shape[0] else ["made grey" if shape[0] == 1 else "made colour"]
    if tuple(fitted.shape[-2:]) != size:
        ratio = max(size[0] / fitted.shape[-2], size[1] / fitted.shape[-1])
        larger = [max(s, round(ratio * n)) for s, n in zip(size, fitted.shape[-2:], strict=True)]
        fitted = torch.nn.functional.interpolate(fitted, size=larger, mode="bilinear", antialias=True)
        top, left = (larger[0] - size[0]) // 2, (larger[1] - size[1]) // 2
        fitted = fitted[..., top : top + size[0], left : left + size[1]]
        done.append(f"scaled from {image.shape[1]}x{image.shape[2]} to {size[0]}x{size[1]} (height x width)")
    generator = torch.Generator().manual_seed(seed)
    if options.binarization in ("dynamic", "static"):
        x = binarize(fitted, generator)
        done.append("binarized by one draw")
    elif options.binarization == "threshold":
        x = threshold(fitted)
        done.append("binarized at one half")
    else:
        x = dequantize(fitted, generator) if options.dequantize else fitted.float() / 255
    if done:
        click.echo(f"{path.name}: {', '.join(done)}", err=True)
    return x[0]


def _image_folder(x: Tensor, folder: Path) -> None:
    from PIL import Image

    if x.dim() != 4:
        raise ValueError(f"got --out {folder} for data of shape {tuple(x.shape[1:])}, wanted a .npy for vectors.")
    width = len(str(len(x) - 1))
    for i, datum in enumerate(x):
        levels = (datum.clamp(0, 1) * 255).round().to(torch.uint8)
        picture = Image.fromarray(levels[0].numpy() if len(levels) == 1 else levels.permute(1, 2, 0).numpy())
        write_file(folder / f"{i:0{width}}.png", functools.partial(picture.save, format="png"))
