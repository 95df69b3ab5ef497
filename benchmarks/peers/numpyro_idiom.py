"""NumPyro, as its VAE example trains: stax networks, SVI, a whole epoch inside one jitted loop.

As there, a last partial batch is dropped, pixels are floats, and the binarisation lies
inside the loop. Unlike there, Bernoulli takes logits (`logits=False` for the example's way), and
weights start at stax's default scale: from the example's, 0.01, the first epochs lag by 40 nats.
`looped=False` jits a step instead of an epoch: convolutions of XLA on a CPU are six times slower
inside a jitted loop than outside. With K > 1 samples the loss is RenyiELBO, which at alpha = 0 is
the bound of IWAE, per datum.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jax.example_libraries import stax
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO

from peers import LEARNING_RATE, Problem, weights

_SILU = stax.elementwise(jax.nn.silu)
_ACTIVATIONS = {"softplus": stax.Softplus, "tanh": stax.Tanh, "silu": _SILU}


def _reshape(*event: int) -> Any:
    """A layer: (..., n) or (..., *other) to (B, *event)."""
    return (lambda key, shape: ((shape[0], *event), ())), (lambda params, x, **_: x.reshape(len(x), *event))


def _dense(widths: tuple[int, ...], activation: str) -> list[Any]:
    return [layer for width in widths for layer in (stax.Dense(width), _ACTIVATIONS[activation])]


def _encoder(problem: Problem) -> Any:
    layers = _dense(problem.hidden, problem.activation)
    if problem.network == "convolutional":
        layers = [
            _reshape(28, 28, 1),
            stax.Conv(32, (3, 3), (2, 2), "SAME"), _SILU,
            stax.Conv(64, (3, 3), (2, 2), "SAME"), _SILU,
            stax.Flatten, stax.Dense(256), _SILU,
        ]  # fmt: skip
    heads = stax.parallel(stax.Dense(problem.latent), stax.serial(stax.Dense(problem.latent), stax.Exp))
    return stax.serial(*layers, stax.FanOut(2), heads)


def _decoder(problem: Problem, logits: bool = True) -> Any:
    layers = [*_dense(problem.hidden[::-1], problem.activation), stax.Dense(784)]
    if problem.network == "convolutional":
        layers = [
            stax.Dense(256), _SILU, stax.Dense(64 * 7 * 7), _reshape(7, 7, 64), _SILU,
            stax.ConvTranspose(32, (3, 3), (2, 2), "SAME"), _SILU,
            stax.ConvTranspose(1, (3, 3), (2, 2), "SAME"), stax.Flatten,
        ]  # fmt: skip
    return stax.serial(*layers, *([] if logits else [stax.Sigmoid]))


def programs(problem: Problem, logits: bool = True) -> tuple[Callable[..., None], Callable[..., None]]:
    """Model and guide of one batch."""

    def model(x: jax.Array) -> None:
        decode = numpyro.module("decoder", _decoder(problem, logits), (len(x), problem.latent))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([problem.latent]).to_event(1))
            given_z = dist.Bernoulli(logits=decode(z)) if logits else dist.Bernoulli(decode(z))
            numpyro.sample("x", given_z.to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        encode = numpyro.module("encoder", _encoder(problem), (len(x), 784))
        loc, scale = encode(x)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    return model, guide


def _start(problem: Problem) -> None:
    # On a GPU machine jax takes the GPU by itself.
    if problem.device == "cpu":
        jax.config.update("jax_platforms", "cpu")


def build(
    pixels: np.ndarray, problem: Problem, logits: bool = True, looped: bool = True
) -> Callable[[], tuple[int, float]]:
    _start(problem)
    model, guide = programs(problem, logits)
    bound = Trace_ELBO() if problem.num_samples == 1 else RenyiELBO(0, problem.num_samples)
    svi = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), bound)
    floats = jnp.asarray(pixels, jnp.float32) / 255
    size = problem.batch_size
    batches = len(pixels) // size
    key, start = random.split(random.PRNGKey(problem.seed))
    state = svi.init(start, floats[:size].round())

    def step(i: int, carry: Any, key: jax.Array, order: jax.Array, floats: jax.Array) -> Any:
        state, total = carry
        index = lax.dynamic_slice_in_dim(order, i * size, size)
        x = random.bernoulli(random.fold_in(key, i), floats[index]).astype(jnp.float32)
        state, loss = svi.update(state, x)
        return state, total + loss

    one_step = jax.jit(step)

    @jax.jit
    def loop(state: Any, *data: jax.Array) -> Any:
        return lax.fori_loop(0, batches, lambda i, carry: step(i, carry, *data), (state, 0.0))

    def steps(state: Any, *data: jax.Array) -> Any:
        carry = state, 0.0
        for i in range(batches):
            carry = one_step(i, carry, *data)
        return carry

    train = loop if looped else steps
    generator = np.random.default_rng(problem.seed)

    def epoch() -> tuple[int, float]:
        nonlocal state, key
        key, now = random.split(key)
        order = jnp.asarray(generator.permutation(len(pixels)))
        state, total = train(state, now, order, floats)
        return batches * size, -float(total) / (batches * size)

    return epoch


def log_mean_weight(problem: Problem) -> Callable[..., jax.Array]:
    """Of a batch: sum over the data of log 1/K sum_k p(x, z_k) / q(z_k | x), at the weights of `weights`."""
    layers = weights(problem)
    loc, log_scale = layers["encoder"][-2:]
    hidden = [layer for pair in layers["encoder"][:-2] for layer in (pair, ())]
    encoder = [*hidden, (), [loc, [log_scale, ()]]]
    decoder = [layer for pair in layers["decoder"][:-1] for layer in (pair, ())] + [layers["decoder"][-1]]
    params = jax.tree.map(jnp.asarray, {"encoder$params": encoder, "decoder$params": decoder})
    model, guide = programs(problem)
    bound = RenyiELBO(0, problem.num_samples)
    return lambda key, x: -bound.loss(key, params, model, guide, x)


def evaluation(pixels: np.ndarray, problem: Problem) -> Callable[[], tuple[int, float]]:
    """One image after the other, K samples of each at once by `vmap`, in one jitted loop."""
    _start(problem)
    ones = jnp.asarray(pixels >= 128, jnp.float32)
    of_batch = log_mean_weight(problem)

    @jax.jit
    def total(key: jax.Array) -> jax.Array:
        keys = random.split(key, len(ones))
        return lax.map(lambda pair: of_batch(pair[0], pair[1][None]), (keys, ones)).mean()

    key = random.PRNGKey(problem.seed)

    def epoch() -> tuple[int, float]:
        nonlocal key
        key, now = random.split(key)
        value = float(total(now))
        if not math.isfinite(value):
            raise ValueError(f"log p(x) = {value}")
        return len(pixels), value

    return epoch
