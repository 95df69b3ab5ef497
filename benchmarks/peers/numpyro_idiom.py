"""NumPyro, as its VAE example trains: stax networks, SVI, a whole epoch inside one jitted loop.

As there, a last partial batch is dropped, pixels are floats, and the binarisation lies
inside the loop. Unlike there, Bernoulli takes logits (`logits=False` for the example's way), and
weights start at stax's default scale: from the example's, 0.01, the first epochs lag by 40 nats.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jax.example_libraries import stax
from numpyro.infer import SVI, Trace_ELBO

from peers import HIDDEN, LATENT, LEARNING_RATE


def _encoder() -> Any:
    heads = stax.parallel(stax.Dense(LATENT), stax.serial(stax.Dense(LATENT), stax.Exp))
    return stax.serial(stax.Dense(HIDDEN), stax.Softplus, stax.FanOut(2), heads)


def _decoder(logits: bool) -> Any:
    last = [] if logits else [stax.Sigmoid]
    return stax.serial(stax.Dense(HIDDEN), stax.Softplus, stax.Dense(784), *last)


def build(
    pixels: np.ndarray, batch_size: int, seed: int, logits: bool = True
) -> Callable[[], tuple[int, float]]:
    jax.config.update("jax_platforms", "cpu")

    def model(x: jax.Array) -> None:
        decode = numpyro.module("decoder", _decoder(logits), (len(x), LATENT))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([LATENT]).to_event(1))
            given_z = dist.Bernoulli(logits=decode(z)) if logits else dist.Bernoulli(decode(z))
            numpyro.sample("x", given_z.to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        encode = numpyro.module("encoder", _encoder(), (len(x), 784))
        loc, scale = encode(x)
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(loc, scale).to_event(1))

    svi = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), Trace_ELBO())
    floats = jnp.asarray(pixels, jnp.float32) / 255
    batches = len(pixels) // batch_size
    key, start = random.split(random.PRNGKey(seed))
    state = svi.init(start, floats[:batch_size].round())

    @jax.jit
    def train(state: Any, key: jax.Array, order: jax.Array, floats: jax.Array) -> Any:
        def step(i: int, carry: Any) -> Any:
            state, total = carry
            index = lax.dynamic_slice_in_dim(order, i * batch_size, batch_size)
            x = random.bernoulli(random.fold_in(key, i), floats[index]).astype(jnp.float32)
            state, loss = svi.update(state, x)
            return state, total + loss

        return lax.fori_loop(0, batches, step, (state, 0.0))

    generator = np.random.default_rng(seed)

    def epoch() -> tuple[int, float]:
        nonlocal state, key
        key, now = random.split(key)
        order = jnp.asarray(generator.permutation(len(pixels)))
        state, total = train(state, now, order, floats)
        return batches * batch_size, -float(total) / (batches * batch_size)

    return epoch
