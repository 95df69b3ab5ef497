"""The programs that are compared: each module trains the same VAE in its own idiom.

    build(pixels, problem, **options) -> epoch,        epoch() -> (images, value)
    evaluation(pixels, problem, **options) -> epoch

`pixels` are uint8 (N, 784) in NumPy. One call of what `build` returns trains on all of them
once, in a fresh order and binarised afresh, and returns the number of images it trained on
and their mean bound in nats. One call of what `evaluation` returns estimates log p(x) of
threshold pixels from K samples each at the weights of `weights`, and returns the mean.
"""

import dataclasses

import numpy as np

LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Problem:
    """What all rows of one table train. The defaults are the network of NumPyro's VAE example.

    `hidden` are the widths of the encoder; the decoder has them in reverse. With K > 1 samples
    the bound is the importance-weighted one. "convolutional" is the network of
    `pyro_vae.parts.networks.convolutional` at its default sizes, for images of 28x28.
    """

    hidden: tuple[int, ...] = (400,)
    latent: int = 50
    activation: str = "softplus"
    network: str = "dense"
    num_samples: int = 1
    batch_size: int = 128
    seed: int = 0
    device: str = "cpu"

    def __str__(self) -> str:
        if self.network == "convolutional":
            return f"convolutions 32-64-256-{self.latent} (silu)"
        return f"784-{'-'.join(map(str, self.hidden))}-{self.latent} ({self.activation})"

    @property
    def bound(self) -> str:
        return "ELBO" if self.num_samples == 1 else f"IWAE-{self.num_samples}"


def weights(problem: Problem) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """The same weights for every library: lists of (weight (in, out), bias) for a dense network.

    `encoder` holds the hidden layers and the heads of location and log scale, `decoder` the
    hidden layers and the logits. Scaled by the number of inputs, as libraries do by default.
    """
    generator = np.random.default_rng(problem.seed)

    def dense(before: int, after: int) -> tuple[np.ndarray, np.ndarray]:
        limit = before**-0.5
        draws = generator.uniform(-limit, limit, (before + 1, after)).astype(np.float32)
        return draws[:-1], draws[-1]

    up = [784, *problem.hidden]
    down = [problem.latent, *reversed(problem.hidden), 784]
    heads = [dense(up[-1], problem.latent) for _ in ("loc", "log_scale")]
    return {
        "encoder": [dense(a, b) for a, b in zip(up[:-1], up[1:], strict=True)] + heads,
        "decoder": [dense(a, b) for a, b in zip(down[:-1], down[1:], strict=True)],
    }
