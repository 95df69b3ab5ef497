"""A variational and a plain autoencoder of the same networks: what is each good for?

    python benchmarks/autoencoder.py
    python benchmarks/autoencoder.py --data mnist --data-dir ../shared/data/mnist

Both are trained on the same images for the same number of epochs at most, each with early
stopping on its own objective on the validation split. On the test split are measured:

    reconstruction  log p(x | z) in nats: at the mean of q(z | x), and averaged over q
    samples         energy distance in pixel space between prior draws and test images;
                    its null is the standard deviation between random halves of the test images
    anomalies       ROC-AUC of test images against sets of other images: 0.5 is blind

The autoencoder has no prior. Its samples are decoded from N(0, I), as if it were a VAE, and
from a Gaussian fitted to its training codes, the most that can be done for it cheaply.
Errors are standard errors over seeds of the training; test images and draws stay the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from pyro_vae import VAE, Objective, autoencoder, fit, load, reconstruction  # noqa: E402
from pyro_vae.data import Split  # noqa: E402
from pyro_vae.judging.anomalies import anomaly_scores, roc_auc  # noqa: E402
from pyro_vae.judging.distances import energy_distance  # noqa: E402
from pyro_vae.parts.posteriors import mean  # noqa: E402

SETTINGS = {
    "digits": {"hidden": (256, 128), "latent_dim": 10, "epochs": 300, "batch_size": 64},
    "mnist": {"hidden": (400, 400), "latent_dim": 50, "epochs": 30, "batch_size": 128},
    "fashion-mnist": {"hidden": (400, 400), "latent_dim": 50, "epochs": 30, "batch_size": 128},
}
PLAIN, FITTED = "autoencoder", "autoencoder, z ~ Gaussian fitted to codes"


def outlier_sets(data: str, test: Split, size: int) -> dict[str, Tensor]:
    """Images unlike the test images, of their shape and binarised like them."""
    other = "mnist" if data == "fashion-mnist" else "fashion-mnist"
    sets = {}
    try:
        found = load(other, image_size=None if test.x_shape[-1] == 28 else test.x_shape[-1], download=False)
        sets[other] = found.test.subset(slice(size)).frozen(seed=2)[:]
    except ValueError as missing:
        print(f"without {other}: {str(missing).splitlines()[0]}")
    # Per image, since one permutation for all would be a transformation that a network could learn.
    order = torch.rand(len(test), test.x_shape[-2], generator=torch.Generator().manual_seed(3)).argsort(1)
    rows = test.pixels[torch.arange(len(test)).unsqueeze(1), :, order].transpose(1, 2)
    shuffled = Split(rows, binarization="dynamic").frozen(seed=2)
    return sets | {"shuffled rows": shuffled[:size]}


@torch.no_grad()
def draws(vae: VAE, z: Tensor) -> Tensor:
    return vae.decode(z).sample()


@torch.no_grad()
def gaussian_codes(pair: VAE, x: Tensor, size: int) -> Tensor:
    codes = mean(pair.posterior(x))
    # The codes of a bottleneck may span fewer dimensions than it has.
    covariance = codes.T.cov() + 1e-4 * torch.eye(codes.shape[1])
    return torch.distributions.MultivariateNormal(codes.mean(0), covariance).sample((size,))


def measure(name: str, pair: VAE, train: Split, x: Tensor, outliers: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """One trained pair: a row of numbers (two for the autoencoder, by where its z come from)."""
    model, guide = pair.model, pair.guide
    with torch.no_grad():
        at_mean = pair.decode(mean(pair.posterior(x))).log_prob(x).mean().item()
    z = pair.model.prior().expand([len(x)]).sample()
    row = {"at mean": at_mean, "samples": energy_distance(draws(pair, z), x).value}
    scores = {"reconstruction": 1} if name == PLAIN else {"reconstruction": 100, "log-likelihood": 100}
    for score, samples in scores.items():
        inside = anomaly_scores(model, guide, x, score=score, num_samples=samples, progress=False)
        if score == "reconstruction" and name != PLAIN:
            row["under q"] = -inside.mean().item()
        for other, images in outliers.items():
            outside = anomaly_scores(model, guide, images, score=score, num_samples=samples, progress=False)
            row[f"{other} by {score}"] = roc_auc(inside, outside)
    if name != PLAIN:
        return {name: row}
    fitted = draws(pair, gaussian_codes(pair, train.subset(slice(5000)).frozen(seed=4)[:], len(x)))
    return {name: row, FITTED: {"samples": energy_distance(fitted, x).value}}


def null_distances(x: Tensor, times: int = 20) -> list[float]:
    """Energy distances between random halves: what is still nothing."""
    # Random, since a test split may be in an order (the digits repeat 0 to 9) that even and odd rows inherit.
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(len(x), generator=generator) for _ in range(times)]
    return [energy_distance(x[order[::2]], x[order[1::2]]).value for order in orders]


def shown(values: list[float], digits: int) -> str:
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", choices=SETTINGS)
    parser.add_argument("--data-dir", default=None, help="where its files lie")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="at most; 300 for the digits, else 30")
    parser.add_argument("--patience", type=int, default=30, help="epochs without a better validation score")
    parser.add_argument("--test-images", type=int, default=2000, help="score the first ... test images")
    parser.add_argument("--json", type=Path, help="write the results to this file, too")
    args = parser.parse_args()
    if min(args.seeds, args.patience, args.test_images) < 1:
        parser.error("wanted --seeds, --patience and --test-images >= 1.")
    settings = SETTINGS[args.data]
    network = {key: settings[key] for key in ("hidden", "latent_dim")}
    epochs = args.epochs or settings["epochs"]
    dataset = load(args.data, args.data_dir, binarization="dynamic")
    test = dataset.test.subset(slice(args.test_images))
    x = test.frozen(seed=1)[:]
    outliers = outlier_sets(args.data, test, len(test))
    null = null_distances(x)
    print(
        f"{args.data}, dynamic binarisation, {len(dataset.train):,} training and {len(x):,} test images; networks "
        f"{network['hidden']}, {network['latent_dim']} latents; {args.seeds} seeds",
        flush=True,
    )
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for name, build, loss in (("VAE", VAE.build, None), (PLAIN, autoencoder, Objective(reconstruction))):
            torch.manual_seed(seed)
            pair = build(dataset.x_shape, **network)
            started = time.perf_counter()
            history = fit(
                pair.model,
                pair.guide,
                dataset.train,
                loss=loss,
                epochs=epochs,
                batch_size=settings["batch_size"],
                validation=dataset.validation.frozen(seed=1),
                patience=args.patience,
                seed=seed,
                progress=False,
            )
            for row, numbers in measure(name, pair, dataset.train, x, outliers).items():
                found.setdefault(row, []).append(numbers)
            print(
                f"seed {seed}, {name}: best of {len(history)} epochs {history.best_epoch}, "
                f"{time.perf_counter() - started:.0f} s",
                flush=True,
            )
    columns = [("at mean", "log p(x|z), nats, z at mean", 2), ("under q", "log p(x|z), nats, z ~ q", 2)]
    columns += [("samples", f"samples (null ± {statistics.stdev(null):.3f})", 3)]
    columns += [
        (f"{other} by {score}", f"{other}, {score}", 3)
        for score in ("reconstruction", "log-likelihood")
        for other in outliers
    ]
    rows = [["", *found]]
    for key, title, digits in columns:
        cells = [shown([seed[key] for seed in seeds if key in seed], digits) for seeds in found.values()]
        rows.append([("ROC-AUC, " if " by " in key else "") + title, *cells])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print()
    for row in rows:
        print(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
        )
    if args.json is not None:
        setup = {"data": dataset.protocol, "network": network, "epochs": epochs, "torch": torch.__version__}
        args.json.write_text(json.dumps({"setup": setup, "null": null, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
