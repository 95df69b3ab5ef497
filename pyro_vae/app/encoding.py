"""`pyro-vae encode`: where a run's guide puts data in the latent space, and how sure it is, one row for each datum."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor

from pyro_vae.app import evaluation, following, serving
from pyro_vae.app.defaults import DATASETS, FitOptions
from pyro_vae.app.opening import open as opened
from pyro_vae.atomic import write_file
from pyro_vae.data import Split, load
from pyro_vae.data.arrays import as_pixels
from pyro_vae.data.decoding import Framing, grey_level, read_image, suffixes
from pyro_vae.data.room import fits, joined
from pyro_vae.data.sources import SPLITS
from pyro_vae.evaluation import evaluating
from pyro_vae.programs.vae import Answers
from pyro_vae.words import spelled

DRAWS = 256  # of a family without mean or scale in closed form
_ROWS = 1000


class Codes(NamedTuple):
    """Means and standard deviations of q(z | x), (N, D) each; `drawn`: from how many draws, 0 in closed form."""

    mean: Tensor
    scale: Tensor
    drawn: int


def codes(vae: Answers, data: Split, seed: int = 0) -> Codes:
    """Mean and standard deviation of q(z | x) of every datum; by draws where the family has no closed form.

    Of a conditional model those of q(z | x, y); of a hierarchical one those of z1. A pair that has no one q(z | x), or
    data without the labels that it takes, is a ValueError.
    """
    means, scales, drawn = [], [], 0
    face, labels = serving.face(vae), data.labels
    with evaluating(vae.model, vae.guide, seed=seed):
        for start in range(0, len(data), _ROWS):
            rows = slice(start, start + _ROWS)
            q = face.codes(vae, data[rows], None if labels is None else labels[rows])
            try:
                mean, scale = q.mean, q.stddev
            except NotImplementedError:
                drawn = DRAWS
                z = torch.stack([q.sample() for _ in range(DRAWS)])
                mean, scale = z.mean(0), z.std(0)
            means.append(mean.flatten(1).cpu())
            scales.append(scale.flatten(1).cpu())
    return Codes(torch.cat(means), torch.cat(scales), drawn)


def encode_run(
    run: Path, data: str, out: Path, seed: int | None = None, data_dir: str | None = None,
    trust: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """The command; returns where the table is. What the run cannot encode, and an unknown suffix, is a ValueError."""
    write = _writer(out)
    found = opened(run, trust=trust, data_dir=data_dir)
    seed = found.options.seed if seed is None else seed
    split, names = _data(data, found, seed)
    shape = None if found.pair.architecture is None else found.pair.architecture.x_shape
    if split.x_shape != shape:
        raise ValueError(f"got {data} of shape {split.x_shape}, wanted {shape} as in {run}. Bring it to that shape.")
    result = codes(found.pair, split, seed)
    how = f" (means and scales of {DRAWS} draws: the family has none in closed form)" if result.drawn else ""
    write_file(out, lambda partial: write(partial, names, result))
    click.echo(f"{out}: {len(result.mean):,} rows, mean and scale of {result.mean.shape[1]} latents{how}")
    following.say(following.after("encode", run, {}))
    return out


Names = dict[str, list[Any]]  # the columns that say which datum a row is of


def _data(data: str, found: Any, seed: int) -> tuple[Split, Names]:
    """The data in the run's own way of reading, drawn for good, and what its rows are called."""
    part = spelled(data, SPLITS)
    path = Path(data).expanduser()
    options: FitOptions = found.options
    if part is not None and not path.exists():
        split = getattr(found.data, part)
        return split.frozen(seed), {"part": [part] * len(split), "row": list(range(len(split)))}
    files = _pictures(path, suffixes()) if data not in DATASETS else []
    if files:
        x = torch.stack([_framed(file, found.pair.architecture.x_shape, options) for file in files])
        names = [str(file.relative_to(path)) if path.is_dir() else file.name for file in files]
        return _as_in(options, x).frozen(seed), {"file": names}
    if path.suffix == ".npy" and path.is_file():
        try:
            array = np.load(path, None if fits(path.stat().st_size) else "r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} could not be read ({error}), wanted an array of numbers.") from error
        return _as_in(options, as_pixels(array, str(path))).frozen(seed), {"row": list(range(len(array)))}
    dataset = load(
        data, found.data_dir, binarization=options.binarization,  # type: ignore[arg-type]
        dequantize=options.dequantize if options.binarization == "none" else None, seed=options.seed,
    )  # fmt: skip
    splits = [evaluation.test_data(dataclasses.replace(dataset, test=getattr(dataset, name)), seed) for name in SPLITS]
    x = joined((few for split in splits for few in split.pieces()), sum(map(len, splits)))
    rows: Names = {"part": [n for n, s in zip(SPLITS, splits, strict=True) for _ in range(len(s))],
                   "row": [i for s in splits for i in range(len(s))]}  # fmt: skip
    known = [split.labels for split in splits if split.labels is not None]
    labels = torch.cat(known) if len(known) == len(splits) else None
    return dataclasses.replace(splits[0], pixels=x, labels=labels, rows=None, fixed=splits[0].final), rows


def _pictures(path: Path, known: frozenset[str]) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix.lower() in known else []
    if not path.is_dir():
        return []
    files = (file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in known)
    return sorted(file for file in files if not any(p.startswith(".") for p in file.relative_to(path).parts))


def _framed(path: Path, shape: tuple[int, ...], options: FitOptions) -> Tensor:
    """An image file as grey levels of the run's shape: cropped as its data were, scaled, and cut to the middle."""
    if len(shape) != 3:
        raise ValueError(f"got the image {path} for a run of vectors of shape {shape}, wanted an array of those.")
    framing = Framing(options.crop, None, shape[0], grey_level(options.background))
    image = read_image(path, framing)[None]
    height, width = shape[1:]
    if tuple(image.shape[-2:]) != (height, width):
        ratio = max(height / image.shape[-2], width / image.shape[-1])
        larger = [max(s, round(ratio * n)) for s, n in zip((height, width), image.shape[-2:], strict=True)]
        image = torch.nn.functional.interpolate(image, size=larger, mode="bilinear", antialias=True)
        top, left = (larger[0] - height) // 2, (larger[1] - width) // 2
        image = image[..., top : top + height, left : left + width]
    return image[0]


def _as_in(options: FitOptions, pixels: Tensor) -> Split:
    dequantize = bool(options.dequantize) and not pixels.is_floating_point()
    return Split(pixels, binarization=options.binarization or "none", dequantize=dequantize,  # type: ignore[arg-type]
                 seed=options.seed)  # fmt: skip


def _writer(out: Path) -> Callable[[Path, Names, Codes], None]:
    writers = {".csv": _csv, ".npz": _npz, ".parquet": _parquet}
    if out.suffix.lower() not in writers:
        raise ValueError(f"got --out {out}, wanted a .csv, a .npz or a .parquet.")
    missing = [name for name in ("pandas", "pyarrow") if out.suffix.lower() == ".parquet" and find_spec(name) is None]
    if missing:
        raise ValueError(
            f"got --out {out}, which needs pandas and pyarrow, and {missing[0]} is not installed. Run: pip install "
            "pandas pyarrow, or write a .csv or a .npz."
        )
    return writers[out.suffix.lower()]


def _columns(result: Codes) -> dict[str, Tensor]:
    kinds = (("mean", result.mean), ("scale", result.scale))
    return {f"{kind}_{d + 1}": values[:, d] for kind, values in kinds for d in range(values.shape[1])}


def _csv(path: Path, names: Names, result: Codes) -> None:
    columns = _columns(result)
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow([*names, *columns])
        for line in zip(*names.values(), *(values.tolist() for values in columns.values()), strict=True):
            table.writerow([f"{value:.7g}" if isinstance(value, float) else value for value in line])


def _npz(path: Path, names: Names, result: Codes) -> None:
    held = {name: np.array(values) for name, values in names.items()}
    np.savez(path, mean=result.mean.numpy(), scale=result.scale.numpy(), **held)  # type: ignore[arg-type]


def _parquet(path: Path, names: Names, result: Codes) -> None:
    import pandas

    held = {name: values.numpy() for name, values in _columns(result).items()}
    pandas.DataFrame(names | held).to_parquet(path, index=False)
