"""A captured step is the step, for every part and bound; what cannot be captured is listed with the reason."""

import pyro
import pytest
import torch
from pyro.infer import ReweightedWakeSleep, Trace_ELBO, TraceEnum_ELBO, TraceTailAdaptive_ELBO

from pyro_vae.inference import bounds
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.estimators import ESTIMATORS, refusal
from pyro_vae.inference.objectives import Objective
from pyro_vae.inference.regularizers import free_bits, mmd, total_correlation
from pyro_vae.inference.split_bounds import cubo, piwae, wake_sleep
from pyro_vae.parts.likelihoods import Bernoulli
from pyro_vae.parts.networks import MLP, ConvDecoder, ConvEncoder, GatedMLP, ResidualDecoder, ResidualEncoder
from pyro_vae.parts.posteriors import DiagonalNormal, VonMisesFisher
from pyro_vae.parts.priors import HypersphericalUniform, StandardNormal
from pyro_vae.programs.hamiltonian import Hamiltonian
from pyro_vae.programs.pair import Guide, Model
from pyro_vae.programs.semi_amortized import SemiAmortized
from pyro_vae.programs.zoo import Conditional, Hierarchical, Mixture
from tests.pairs import binary, small_pair
from tests.test_battery import LIKELIHOODS, POSTERIORS, PRIORS, encoder
from tests.test_compiled import assert_same, steps

images = binary(6)


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def of_posterior(name):
    torch.manual_seed(0)
    posterior = POSTERIORS[name]()
    dim = posterior.latent_dim
    prior = (HypersphericalUniform if name == "VonMisesFisher" else StandardNormal)(dim)
    return Model(prior, Bernoulli(MLP(dim, [8], (1, 4, 4)))), Guide(posterior)


def of_prior(name):
    torch.manual_seed(0)
    prior = PRIORS[name]()
    (dim,) = prior().event_shape
    posterior = (VonMisesFisher if name == "HypersphericalUniform" else DiagonalNormal)(encoder(), dim)
    return Model(prior, Bernoulli(MLP(dim, [8], (1, 4, 4)))), Guide(posterior)


def of_likelihood(name):
    torch.manual_seed(0)
    likelihood = LIKELIHOODS[name]()
    return Model(StandardNormal(2), likelihood), Guide(DiagonalNormal(MLP(shape_of(likelihood), [8], None), 2))


def shape_of(likelihood):
    return tuple(likelihood(torch.zeros(1, 2)).event_shape)


def data_of(name):
    torch.manual_seed(1)
    return LIKELIHOODS[name]()(torch.randn(6, 2)).sample()


def networks(encode, decode, dtype=torch.float32):
    def pair():
        torch.manual_seed(0)
        model, guide = Model(StandardNormal(3), Bernoulli(decode())), Guide(DiagonalNormal(encode(), 3))
        return model.to(dtype), guide.to(dtype)

    return pair


def hierarchical():
    torch.manual_seed(0)
    both = Hierarchical.build((1, 4, 4), latent_dims=(3, 2), hidden=((8,), (8,)))
    return both.model, both.guide


def semi_amortized(seed=0):
    model, guide = small_pair()
    return model, SemiAmortized(model, guide, num_steps=2, step_size=0.02, seed=seed)


def hamiltonian():
    model, guide = small_pair()
    return model, Hamiltonian(model, guide)


def enumerated():
    torch.manual_seed(0)
    both = Mixture.build((1, 4, 4), 2, latent_dim=2, hidden=(8,))
    return both.model, both.guide


def discrete():
    """A latent without a reparameterised sampler: the score function, whose baseline Pyro keeps in Python."""

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", pyro.distributions.Bernoulli(0.5))
            pyro.sample("x", pyro.distributions.Normal(z * pyro.param("w", torch.ones(())), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", pyro.distributions.Bernoulli(logits=x * pyro.param("a", torch.ones(()))))

    return model, guide


wide = images.repeat(1, 1, 7, 7)
CASES = {f"posterior-{n}": (lambda n=n: of_posterior(n), images, Trace_ELBO) for n in POSTERIORS if n != "Delta"}
CASES["posterior-Delta"] = (lambda: of_posterior("Delta"), images, lambda: Objective(bounds.reconstruction))
CASES |= {f"prior-{n}": (lambda n=n: of_prior(n), images, Trace_ELBO) for n in PRIORS}
CASES |= {f"likelihood-{n}": (lambda n=n: of_likelihood(n), data_of(n), Trace_ELBO) for n in LIKELIHOODS}
CASES |= {
    "networks-gated": (networks(lambda: GatedMLP((1, 4, 4), [8], None), lambda: GatedMLP(3, [8], (1, 4, 4))), images,
                       Trace_ELBO),
    "networks-convolutional": (networks(lambda: ConvEncoder((1, 28, 28), (2, 2)),
                                        lambda: ConvDecoder(3, (1, 28, 28), (2, 2))), wide, Trace_ELBO),
    # In float32 the bias before a normalisation has a gradient of rounding errors only.
    "networks-residual": (networks(lambda: ResidualEncoder((1, 28, 28), (2, 2)),
                                   lambda: ResidualDecoder(3, (1, 28, 28), (2, 2)), torch.float64), wide.double(),
                          Trace_ELBO),
    "guide-semi-amortized": (lambda: semi_amortized(seed=None), images, Trace_ELBO),
    "guide-hamiltonian": (hamiltonian, images, Trace_ELBO),
    "guide-discrete": (discrete, torch.randn(6), Trace_ELBO),
    "guide-discrete-objective": (discrete, torch.randn(6),
                                 lambda: Objective(bounds.elbo, 3, estimator="score-function")),
    "model-two-layers": (hierarchical, images, lambda: Objective(bounds.iwae, 3)),
}  # fmt: skip
BOUNDS = {
    "elbo": bounds.elbo, "iwae": bounds.iwae, "renyi": bounds.renyi(0.5), "vr-max": bounds.vr_max,
    "miwae": bounds.miwae(2), "ciwae": bounds.ciwae(0.5), "piwae": piwae(2), "cubo": cubo(2.0),
    "wake-sleep": wake_sleep(), "wake-sleep-dreaming": wake_sleep(0.5),
}  # fmt: skip
SLOW = set()  # in an ordinary run each bound goes with one estimator, in turn
for number, (name, bound) in enumerate(BOUNDS.items()):
    allowed = [estimator for estimator in ESTIMATORS if refusal(bound, estimator, 4) is None]
    for estimator in allowed:
        if estimator != allowed[number % len(allowed)]:
            SLOW.add(f"bound-{name}-{estimator}")
        CASES[f"bound-{name}-{estimator}"] = (
            small_pair, images, lambda b=bound, e=estimator: Objective(b, 4, estimator=e)
        )  # fmt: skip
for name, extra in {"mmd": mmd(1.0), "total-correlation": total_correlation(1.0), "free-bits": free_bits(0.5)}.items():
    CASES[f"regularizer-{name}"] = (small_pair, images, lambda r=extra: Objective(regularizers=[r]))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in CASES])
def test_a_captured_step_is_the_step_for_every_part_and_bound(name):
    pair, data, make = CASES[name]
    loss = Compiled(make(), compile_after=None)
    ours = steps(pair, data, loss, count=5)
    assert loss.reason is None and loss.captures == 1
    assert_same(ours, steps(pair, data, make(), count=5))


def conditional():
    torch.manual_seed(0)
    both = Conditional.build((1, 4, 4), 2, latent_dim=2, hidden=(8,))
    return both.model, both.guide


def test_two_arguments_one_of_them_labels():
    y = torch.nn.functional.one_hot(torch.arange(6) % 2, 2).float()
    found = []
    for loss in (Compiled(Trace_ELBO(), compile_after=None), Trace_ELBO()):
        model, guide = conditional()
        svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss)
        torch.manual_seed(1)
        found.append([svi.step(images, y) for _ in range(5)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


# What runs as it did, and a part of the sentence that says why. A part that learns to be captured leaves this list.
REFUSED = {
    "a seed of its own": (semi_amortized, images, Trace_ELBO, "fork of the random state"),
    "enumeration": (enumerated, images, lambda: TraceEnum_ELBO(max_plate_nesting=1), "values of tensors"),
    "tail-adaptive": (small_pair, images, lambda: TraceTailAdaptive_ELBO(num_particles=3, vectorize_particles=True),
                      "returns float made of Python numbers"),
    "wake-sleep of Pyro": (small_pair, images, lambda: ReweightedWakeSleep(num_particles=3), "values of tensors"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_captured_says_why(name):
    pair, data, make, why = REFUSED[name]
    loss = Compiled(make(), compile_after=None)
    ours = steps(pair, data, loss, count=4)
    assert loss.captures == 0 and why in loss.reason
    assert_same(ours, steps(pair, data, make(), count=4))
