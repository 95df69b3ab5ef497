"""The weight of the divergence: in epochs, in steps, as a number and as a function."""

import math

import pyro
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO

from pyro_vae.inference.bounds import elbo, iwae
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.tempering import Tempering
from pyro_vae.inference.training import fit
from tests.pairs import binary, small_pair

# Pyro's loss that enumerates is among the losses, also where there is nothing to enumerate.
pytestmark = pytest.mark.filterwarnings("ignore:TraceEnum_ELBO found no sample sites")

OPTIONS = {"epochs": 4, "batch_size": 6, "seed": 1, "progress": False}  # 16 steps on 24 data
LOSSES = {
    "trace": Trace_ELBO, "mean field": TraceMeanField_ELBO, "graph": TraceGraph_ELBO, "objective": Objective,
    "enum": lambda: TraceEnum_ELBO(max_plate_nesting=1),
}  # fmt: skip


def values(pair):
    return [p.detach().clone() for program in pair for p in program.parameters()]


def close(one, other, atol=1e-6):
    return all(torch.allclose(a, b, atol=atol) for a, b in zip(one, other, strict=True))


def by_hand(loss, betas, batch_size=6):
    """Plain gradient steps of Pyro's ELBO with the latent site under poutine.scale, at these weights."""
    model, guide = pair = small_pair()
    x, optimizer = binary(24), torch.optim.SGD([p for program in pair for p in program.parameters()], 1e-3)

    def tempered(program, beta):
        def run(batch):
            with Scaled(beta):
                return program(batch)

        return run

    with torch.random.fork_rng():
        torch.manual_seed(1)
        for step, beta in enumerate(betas):
            if step % (24 // batch_size) == 0:
                order = torch.randperm(24)
            batch = x[order[:batch_size]]
            order = order[batch_size:]
            pyro.clear_param_store()
            loss.loss_and_grads(tempered(model, beta), tempered(guide, beta), batch)
            optimizer.step()
            optimizer.zero_grad()
    return values(pair)


class Scaled(poutine.messenger.Messenger):
    """poutine.scale of the site z alone."""

    def __init__(self, beta):
        super().__init__()
        self.beta = beta

    def _pyro_sample(self, msg):
        if msg["name"] == "z":
            msg["scale"] = msg["scale"] * self.beta


def steps_of(**options):
    pair = small_pair()
    history = fit(*pair, binary(24), optimizer=torch.optim.SGD, learning_rate=1e-3, **OPTIONS | options)
    return values(pair), history


def cyclical(done):
    return min(1.0, 2 * (2 * done % 1.0))


WEIGHTS = {
    "a number": ({"beta": 0.3}, [0.3] * 16),
    "a function": ({"beta": cyclical}, [cyclical(step / 16) for step in range(16)]),
    "steps": ({"kl_warmup_steps": 10}, [min(1.0, (step + 1) / 10) for step in range(16)]),
    "half an epoch": ({"kl_warmup": 1.5}, [min(1.0, (step + 1) / 6) for step in range(16)]),
}


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_each_step_is_that_of_the_explicit_weight(kind, loss):
    options, betas = WEIGHTS[kind]
    ours, history = steps_of(loss=LOSSES[loss](), **options)
    assert history["beta"] == pytest.approx(betas[3::4])
    make = Trace_ELBO if loss == "objective" else LOSSES[loss]
    theirs = by_hand(make(), betas)
    assert close(ours, theirs)
    assert not close(ours, by_hand(make(), [1.0] * 16))
    # Where any step was tempered, Pyro's loss is no bound; an Objective knows its own.
    known = [bound is not None for bound in history["bound"]]
    assert known == ([True] * 4 if loss == "objective" else [set(betas[e * 4 : e * 4 + 4]) == {1.0} for e in range(4)])


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("loss", LOSSES)
def test_captured_steps_read_the_weight_anew(kind, loss):
    options, _ = WEIGHTS[kind]
    one, other = (steps_of(loss=LOSSES[loss](), compile=c, **options) for c in (False, True))
    assert close(one[0], other[0], atol=1e-5) and one[1]["beta"] == other[1]["beta"]
    assert one[1]["loss"] == pytest.approx(other[1]["loss"], rel=1e-5)


def test_patience_waits_for_the_end_of_the_warm_up_in_steps():
    # Every epoch scores worse than the one before: the weights of the first that counts are kept.
    for options, first in (({}, 1), ({"kl_warmup_steps": 9}, 3), ({"beta": lambda done: min(1.0, 2 * done)}, 2)):
        calls = []

        def falling(particles, calls=calls):
            calls.append(0)
            return elbo(particles) * 0 - len(calls)

        history = fit(*small_pair(), binary(24), validation=binary(12), validation_bound=falling, patience=1,
                      **OPTIONS | options)  # fmt: skip
        assert history.best_epoch == first and len(history) == first + 1 and history.stopped_early


def test_where_it_settles():
    loss = Trace_ELBO()
    assert Tempering(loss, 4, 10).warmup == 0 and not Tempering(loss, 4, 10).active
    assert Tempering(loss, 4, 10, kl_warmup=0.5).warmup == 5 and Tempering(loss, 4, 10, kl_warmup=0.01).warmup == 1
    assert Tempering(loss, 4, 10, beta=lambda done: 0.2).warmup == 0
    assert Tempering(loss, 4, 10, beta=lambda done: done).warmup == 39
    assert Tempering(loss, 1000, 100, beta=lambda done: float(done >= 0.5)).warmup == pytest.approx(50_000, abs=10)


def test_a_loss_that_is_lent_gets_its_own_weight_back():
    from pyro_vae.inference.compiled import Compiled

    loss = Compiled(Objective(), compile_after=None)
    fit(*small_pair(), binary(24), loss=loss, beta=lambda done: 0.5, **OPTIONS)
    assert loss.beta == 1.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kl_warmup": 1, "beta": 0.5}, "got kl_warmup and beta, wanted one of them"),
        ({"kl_warmup": 1, "kl_warmup_steps": 5}, "got kl_warmup and kl_warmup_steps, wanted one"),
        ({"beta": 0.5, "loss": Objective(beta=2.0)}, r"got beta and Objective\(beta=2\), wanted one"),
        ({"beta": -1.0}, "beta must be a finite number that is not negative, or a function, got -1.0"),
        ({"beta": math.nan}, "beta must be a finite number"),
        ({"beta": lambda done: 0.1 - done}, r"beta\(0.9375\) is -0.8375, wanted a finite number"),
        ({"kl_warmup_steps": 16}, "must lie below the number of steps, 4 epochs of 4 = 16, got 16"),
        ({"kl_warmup_steps": -1}, "kl_warmup_steps must be a number of steps, got -1"),
        ({"kl_warmup_steps": 2.5}, "kl_warmup_steps must be a number of steps, got 2.5"),
        ({"beta": 0.5, "loss": Objective(iwae, 2)}, "beta tempers an ELBO, got Objective.*Leave beta at None"),
        ({"kl_warmup": 1, "loss": pyro.infer.JitTrace_ELBO()}, "JitTrace_ELBO compiles .*Take Trace_ELBO"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(*small_pair(), binary(24), **OPTIONS | options)
