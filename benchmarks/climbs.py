"""What capturing the steps of `pv.gaps` saves: the same climbs run by the programs and replayed, in turns.

    python benchmarks/climbs.py                                          # the digits, a few minutes
    python benchmarks/climbs.py --data mnist --data-dir ../shared/data/mnist --images 100

Prints for each number of images the seconds of CPU of a whole call, and the ratio within rounds, median (min-max). The
first round, in which torch loads what captures need, is left out.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import pyro_vae as pv

NETWORKS = {
    "digits": {"latent_dim": 10, "hidden": (256, 128)},
    "mnist": {"latent_dim": 50, "hidden": (400,), "activation": "softplus"},
}


def main() -> None:
    """Fit for a few epochs, and take turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(NETWORKS), default="digits")
    parser.add_argument("--data-dir", help="where MNIST lies")
    parser.add_argument("--images", type=int, nargs="+", default=[16, 250], help="[16 250]")
    parser.add_argument("--epochs", type=int, help="[100, of MNIST 4]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = pv.load(arguments.data, arguments.data_dir)
    vae = pv.VAE.build(data.x_shape, **NETWORKS[arguments.data])
    epochs = arguments.epochs or (100 if arguments.data == "digits" else 4)
    pv.fit(vae.model, vae.guide, data.train, epochs=epochs, batch_size=64, seed=0, progress=False)
    for images in arguments.images:
        x, took = data.test.subset(slice(images)).frozen(0), {False: [], "auto": []}
        for _ in range(arguments.rounds + 1):
            for compile, seconds in took.items():
                start = time.process_time()
                found = pv.gaps(vae.model, vae.guide, x, seed=0, progress=False, compile=compile).families["guide"]
                seconds.append(time.process_time() - start)
        ratios = [a / b for a, b in zip(took[False][1:], took["auto"][1:], strict=True)]
        plain, captured = (statistics.median(seconds[1:]) for seconds in took.values())
        ratio = f"{statistics.median(ratios):.2f} x ({min(ratios):.2f}-{max(ratios):.2f})"
        print(
            f"{arguments.data}, {images} images, {found.steps.mean():.0f} steps on average: {plain:.2f} s by the "
            f"programs, {captured:.2f} s captured, {ratio}",
            flush=True,
        )


if __name__ == "__main__":
    main()
