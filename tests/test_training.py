"""A fit is what one would write by hand: the same batches, the same loss, the same steps."""

import copy
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import nn
from torch.distributions import constraints, kl_divergence
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from pyro_vae.data.splits import Split
from pyro_vae.inference.batches import Batches
from pyro_vae.inference.bounds import elbo, iwae, reconstruction
from pyro_vae.inference.objectives import Objective, mean_bound
from pyro_vae.inference.optimizers import Fused
from pyro_vae.inference.schedules import SCHEDULES, constant, cosine, one_cycle
from pyro_vae.inference.training import fit
from pyro_vae.programs.vae import VAE
from pyro_vae.programs.zoo import autoencoder
from tests.pairs import binary, small_pair


@pytest.fixture(autouse=True)
def fresh_store():
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def weights(*modules):
    return [p.detach().clone() for m in modules for p in m.parameters()]


def equal(ones, others):
    return all(torch.equal(a, b) for a, b in zip(ones, others, strict=True))


def distance(ones, others):
    return max((a - b).abs().max().item() for a, b in zip(ones, others, strict=True))


def by_hand(loss, model, guide, x, *, epochs, batch_size, seed, lr=1e-2, optimizer=torch.optim.Adam, clip_norm=None):
    """The same minibatches and noise under the same seed; the loss per datum of each epoch."""
    parameters = [*model.parameters(), *guide.parameters()]
    steps, losses = optimizer(parameters, lr=lr), []
    torch.manual_seed(seed)
    for _ in range(epochs):
        losses.append(0.0)
        for index in torch.randperm(len(x)).split(batch_size):
            steps.zero_grad()
            losses[-1] += loss.loss_and_grads(model, guide, x[index]) / len(x)
            if clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
            steps.step()
    return losses


# Seeds


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"clip_norm": 2.0, "schedule": "one-cycle"},
        {"kl_warmup": 1, "loss": Objective()},
        {"loss": Objective(iwae, 3)},
        {"validation": binary(8, seed=5), "patience": 1},
        {"optimizer": torch.optim.SGD},
    ],
    ids=["plain", "clipped", "warm-up", "iwae", "patience", "sgd"],
)
def test_a_seed_fixes_every_bit_and_another_changes_them(options):
    grey = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = Split(grey, binarization="dynamic")
    results = []
    for seed in (4, 4, 5):
        pair = small_pair()
        torch.manual_seed(len(results))  # the state before the fit must not matter
        fit(*pair, split, epochs=2, batch_size=16, learning_rate=1e-2, seed=seed, **options)
        results.append(weights(*pair))
    assert equal(results[0], results[1])
    assert not any(torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))


def test_a_seeded_fit_leaves_the_random_state_alone_and_an_unseeded_one_follows_it():
    results = []
    for seed in (9, None):
        pair = small_pair()
        torch.manual_seed(9)
        before = torch.get_rng_state()
        fit(*pair, binary(20), epochs=2, batch_size=8, seed=seed)
        assert torch.equal(before, torch.get_rng_state()) is (seed is not None)
        results.append(weights(*pair))
    assert equal(*results)


def test_scoring_validation_data_leaves_the_training_alone():
    one, other = small_pair(), small_pair()
    fit(*one, binary(20), epochs=3, batch_size=8, seed=0)
    fit(*other, binary(20), epochs=3, batch_size=8, seed=0, validation=binary(7, seed=3))
    assert equal(weights(*one), weights(*other))


# The loss and the steps


@pytest.mark.parametrize("clip_norm", [None, 3.0])
@pytest.mark.parametrize("batch_size", [40, 16])
def test_the_default_is_trace_elbo_and_adam_written_by_hand(clip_norm, batch_size):
    x, ours, theirs = binary(40), small_pair(), small_pair()
    start = weights(*ours)
    options = {"epochs": 4, "batch_size": batch_size, "seed": 7, "clip_norm": clip_norm}
    history = fit(*ours, x, learning_rate=1e-2, **options)
    losses = by_hand(Trace_ELBO(), *theirs, x, **options)
    assert distance(weights(*ours), weights(*theirs)) < 1e-6
    assert distance(weights(*ours), start) > 1e-2
    assert history["loss"] == pytest.approx(losses, rel=1e-6)
    assert history["bound"] == pytest.approx([-loss for loss in losses], rel=1e-6)
    assert history["epoch"] == [1, 2, 3, 4] and history["beta"] == [1.0] * 4 and history["learning_rate"] == [1e-2] * 4


ELBOS = {
    "trace": lambda: Trace_ELBO(num_particles=2, vectorize_particles=True),
    "renyi": lambda: RenyiELBO(alpha=0.5, num_particles=3, vectorize_particles=True),
    "renyi-sequential": lambda: RenyiELBO(alpha=0, num_particles=2),
    "mean-field": lambda: TraceMeanField_ELBO(),
    "graph": lambda: TraceGraph_ELBO(),
    "elbo": lambda: Objective(elbo, 2),
    "iwae": lambda: Objective(iwae, 3),
}


@pytest.mark.parametrize("name", ELBOS)
def test_losses_go_in_unchanged_and_come_out_unchanged(name):
    x, ours, theirs, loss = binary(20), small_pair(), small_pair(), ELBOS[name]()
    before = dict(vars(loss))
    history = fit(*ours, x, loss=loss, epochs=2, batch_size=10, learning_rate=1e-2, seed=3)
    assert vars(loss) == before
    losses = by_hand(ELBOS[name](), *theirs, x, epochs=2, batch_size=10, seed=3)
    assert history["loss"] == pytest.approx(losses, rel=1e-6)
    assert distance(weights(*ours), weights(*theirs)) < 1e-6


def test_one_loss_serves_pairs_of_different_plates():
    """An ELBO that remembered the nesting of the first pair would refuse the second."""

    def model(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 4, dim=-1):
            z = pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x), dim=-2), pyro.plate("pixels", 4, dim=-1):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    loss = Trace_ELBO(num_particles=2, vectorize_particles=True)
    fit(*small_pair(), binary(8), loss=loss, epochs=1)
    fit(model, guide, torch.ones(8, 4), loss=loss, epochs=1)
    assert pyro.param("a").item() > 0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.AdamW])
def test_any_torch_optimiser_takes_the_same_steps_as_by_hand(optimizer):
    x, ours, theirs = binary(20), small_pair(), small_pair()
    fit(*ours, x, optimizer=optimizer, learning_rate=1e-3, epochs=3, batch_size=10, seed=1)
    by_hand(Trace_ELBO(), *theirs, x, optimizer=optimizer, lr=1e-3, epochs=3, batch_size=10, seed=1)
    assert distance(weights(*ours), weights(*theirs)) < 1e-6


@pytest.mark.filterwarnings("ignore:learning_rate=5.0 has no effect")  # it is there to be ignored
def test_a_pyro_optimiser_takes_the_same_steps_as_the_fused_one():
    x, ours, theirs = binary(20), small_pair(), small_pair()
    options = {"epochs": 3, "batch_size": 10, "seed": 1}
    fit(*ours, x, learning_rate=1e-2, **options)
    history = fit(*theirs, x, optimizer=pyro.optim.Adam({"lr": 1e-2}), learning_rate=5.0, **options)
    assert distance(weights(*ours), weights(*theirs)) < 1e-6
    assert history["learning_rate"] == [None] * 3  # the optimiser's own affair
    given = small_pair()
    fit(*given, x, optimizer=Fused(torch.optim.Adam, {"lr": 1e-2}), learning_rate=5.0, **options)
    assert equal(weights(*ours), weights(*given))


def test_float64_pairs_stay_float64_and_equal_the_hand_written_steps():
    ours, theirs = (tuple(m.double() for m in small_pair()) for _ in range(2))
    fit(*ours, binary(20).double(), epochs=3, batch_size=8, learning_rate=1e-2, seed=2)
    by_hand(Trace_ELBO(), *theirs, binary(20).double(), epochs=3, batch_size=8, seed=2)
    assert all(w.dtype == torch.float64 for w in weights(*ours))
    assert distance(weights(*ours), weights(*theirs)) < 1e-12


@pytest.mark.filterwarnings("ignore:.*was not registered in the param store because requires_grad")
def test_frozen_parameters_stay_and_all_others_move():
    model, guide = small_pair()
    frozen = [*model.likelihood.decoder.layers[0].parameters(), guide.posterior.head.bias]
    for p in frozen:
        p.requires_grad_(False)
    everything = [*model.parameters(), *guide.parameters()]
    before = weights(model, guide)
    fit(model, guide, binary(20), epochs=2, seed=0)
    still = {id(p) for p, old in zip(everything, before, strict=True) if torch.equal(p, old)}
    assert still == {id(p) for p in frozen}


# Schedules and clipping


def test_schedules_end_where_they_say():
    assert [constant(f) for f in (0, 0.5, 1)] == [1, 1, 1]
    assert [cosine(f) for f in (0, 1 / 3, 0.5, 1, 2)] == pytest.approx([1, 0.75, 0.5, 0, 0], abs=1e-15)
    assert one_cycle(0) == pytest.approx(1e-3 / 0.101) and one_cycle(0.05) == pytest.approx(0.051 / 0.101)
    assert [one_cycle(f) for f in (0.1, 0.55, 1)] == pytest.approx([1, 0.5, 0], abs=1e-15)
    assert one_cycle(0.1 - 1e-9) == pytest.approx(1, abs=1e-7)
    up, down = ([one_cycle(a + (b - a) * i / 50) for i in range(51)] for a, b in ((0, 0.1), (0.1, 1)))
    assert up == sorted(up) and down == sorted(down, reverse=True)


def slope_pair():
    """A loss of -w, so that plain gradient descent adds the learning rate to w in every step."""

    def model(x):
        pyro.factor("slope", pyro.param("w", torch.zeros((), dtype=torch.float64)))

    return model, lambda x: None


@pytest.mark.parametrize("schedule", [*SCHEDULES, lambda f: 1 + f], ids=[*SCHEDULES, "own"])
def test_the_learning_rate_that_is_applied_follows_the_schedule_from_the_first_step(schedule):
    path = [0.0]
    model, guide = slope_pair()
    history = fit(
        model,
        guide,
        torch.zeros(4),
        optimizer=torch.optim.SGD,
        learning_rate=0.3,
        schedule=schedule,
        epochs=20,
        callback=lambda record: path.append(pyro.param("w").item()),
    )
    rate = SCHEDULES.get(schedule, schedule) if isinstance(schedule, str) else schedule
    applied = [after - before for before, after in zip(path[:-1], path[1:], strict=True)]
    assert applied == pytest.approx([0.3 * rate(step / 20) for step in range(20)], abs=1e-12)
    assert history["learning_rate"] == pytest.approx(applied, abs=1e-12)


def test_parameters_that_join_later_step_at_the_rate_of_that_moment():
    first, second = (nn.Parameter(torch.zeros(())) for _ in range(2))
    steps = Fused(torch.optim.SGD, {"lr": 1.0})
    steps.set_learning_rate(0.5)
    for joined in ([first], [first, second]):
        for p in joined:
            p.grad = torch.tensor(1.0)
        steps(joined)
    assert (first.item(), second.item()) == (-1.0, -0.5)
    assert steps.parameters == {first, second}


def gradients(seed=0):
    torch.manual_seed(seed)
    shapes = [(), (3,), (4, 5), (2, 3, 4), (40, 7)]
    parameters = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for i, p in enumerate(parameters):
        p.grad = torch.randn_like(p) * 10.0 ** (i - 2)
    return parameters


@pytest.mark.parametrize("clip_norm", [1e-2, 5.0, 1e6])
def test_clipping_is_that_of_all_gradients_together_whatever_their_order(clip_norm):
    ours, theirs = gradients(), gradients()
    norm = torch.nn.utils.clip_grad_norm_(theirs, clip_norm)
    torch.optim.SGD(theirs, lr=1.0).step()
    assert (norm > clip_norm) == (clip_norm < 1e6)
    Fused(torch.optim.SGD, {"lr": 1.0}, clip_norm)(ours)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a, b, rtol=1e-6, atol=1e-7)


def test_clipping_does_not_depend_on_the_order_in_which_svi_hands_over_its_set():
    results = []
    for order in range(20):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.zeros(3)) for _ in range(40)]
        for p in parameters:
            p.grad = torch.randn(3)
        torch.manual_seed(order)
        Fused(torch.optim.SGD, {"lr": 1.0}, 0.5)([parameters[i] for i in torch.randperm(40).tolist()])
        results.append(weights(nn.ParameterList(parameters)))
    assert all(equal(results[0], other) for other in results[1:])


# The weight of the divergence


def tempered_by_hand(pair, x, betas, seed, analytic=False, weight=1.0):
    """-(reconstruction - beta KL) and the ELBO per datum, at the draws of one full batch per epoch."""
    model, guide = pair
    losses, bounds = [], []
    torch.manual_seed(seed)
    with torch.no_grad():
        for beta in betas:
            batch = x[torch.randperm(len(x))]
            q, p = guide.posterior(batch), model.prior()
            z = q.rsample()
            divergence = kl_divergence(q.base_dist, p.base_dist).sum(-1) if analytic else q.log_prob(z) - p.log_prob(z)
            likelihood = model.likelihood(z).log_prob(batch)
            losses.append(-(likelihood - beta * weight * divergence).mean().item())
            bounds.append((likelihood - divergence).mean().item())
    return losses, bounds


@pytest.mark.parametrize(
    "loss, analytic, weight",
    [(None, False, 1), (TraceGraph_ELBO(), False, 1), (TraceMeanField_ELBO(), True, 1), (Objective(), False, 1)]
    + [(Objective(beta=0.4), False, 0.4)],
    ids=["trace", "graph", "mean-field", "objective", "objective-0.4"],
)
def test_a_tempered_loss_is_reconstruction_plus_beta_times_the_divergence(loss, analytic, weight):
    pair, x = tuple(m.double() for m in small_pair()), binary(12).double()
    betas = [1 / 3, 2 / 3, 1, 1]
    # At a vanishing learning rate the weights stay, so that the whole course can be computed by hand.
    options = {"optimizer": torch.optim.SGD, "learning_rate": 1e-30, "epochs": 4, "batch_size": 12, "seed": 6}
    history = fit(*pair, x, loss=loss, kl_warmup=3, **options)
    losses, bounds = tempered_by_hand(pair, x, betas, 6, analytic, weight)
    assert history["loss"] == pytest.approx(losses, rel=1e-12)
    assert history["beta"] == pytest.approx([weight * beta for beta in betas])
    if isinstance(loss, Objective):
        assert history["bound"] == pytest.approx(bounds, rel=1e-12)
        assert (loss.beta, loss.last_bound) == (weight, None)
    else:
        assert history["bound"] == [None, None, -history["loss"][2], -history["loss"][3]]


def test_the_gradient_is_tempered_like_the_loss():
    """Pyro's ELBO under the handler and the Objective take the same steps."""
    x, ours, theirs = binary(24), small_pair(), small_pair()
    one = fit(*ours, x, kl_warmup=2, epochs=3, batch_size=8, learning_rate=1e-2, seed=1)
    other = fit(*theirs, x, loss=Objective(), kl_warmup=2, epochs=3, batch_size=8, learning_rate=1e-2, seed=1)
    assert distance(weights(*ours), weights(*theirs)) < 1e-6
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
    assert one["beta"] == other["beta"] == pytest.approx([3 / 6, 1, 1])
    plain = small_pair()
    fit(*plain, x, epochs=3, batch_size=8, learning_rate=1e-2, seed=1)
    assert distance(weights(*ours), weights(*plain)) > 1e-3


@pytest.mark.parametrize("loss", [RenyiELBO(num_particles=2), Objective(iwae, 2), Objective(reconstruction)])
def test_only_an_elbo_is_tempered(loss):
    with pytest.raises(ValueError, match="kl_warmup tempers an ELBO, got .*Leave kl_warmup at 0"):
        fit(*small_pair(), binary(), loss=loss, epochs=3, kl_warmup=1)


# Validation and early stopping


class Methods(nn.Module):
    """N(b, 1) prior and N(z, 1) likelihood, with a linear guide: the optimum is known. Two methods of one module."""

    def __init__(self):
        super().__init__()
        self.decoder, self.encoder = nn.Linear(1, 1).double(), nn.Linear(1, 1).double()
        with torch.no_grad():
            self.decoder.weight.zero_(), self.decoder.bias.zero_()
            self.encoder.weight.fill_(0.5), self.encoder.bias.zero_()

    def model(self, x):
        pyro.module("decoder", self.decoder)
        self._model(x, self.decoder.bias)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        self._guide(x, self.encoder(x[:, None])[:, 0], x.new_tensor(0.5).sqrt())

    @staticmethod
    def _model(x, loc):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    @staticmethod
    def _guide(x, loc, scale):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale))


def methods_pair():
    owner = Methods()
    return owner.model, owner.guide


def functions_pair():
    def model(x):
        Methods._model(x, pyro.param("b", torch.zeros((), dtype=torch.float64)))

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.2, dtype=torch.float64))
        shift = pyro.param("shift", torch.zeros((), dtype=torch.float64))
        scale = pyro.param("scale", torch.tensor(0.5, dtype=torch.float64), constraint=constraints.positive)
        Methods._guide(x, slope * x + shift, scale)

    return model, guide


def closures_pair():
    owner = Methods()
    return (lambda x: owner.model(x)), (lambda x: owner.guide(x))


def shifted(mean, size=50, seed=0):
    return mean + 2**0.5 * torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


PAIRS = {"modules": None, "methods": methods_pair, "functions": functions_pair, "closures": closures_pair}


@pytest.mark.parametrize("optimizer", [None, pyro.optim.Adam({"lr": 0.05})], ids=["fused", "pyro"])
@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.filterwarnings("ignore:learning_rate=0.05 has no effect")  # the optimiser has its own
def test_early_stopping_goes_back_to_the_best_weights(kind, optimizer):
    # The validation data lie between the start and the training data: good on the way, bad at the end.
    pair = PAIRS[kind]() if PAIRS[kind] else small_pair()
    data, validation = (shifted(4.0), shifted(1.0, seed=1)) if PAIRS[kind] else (binary(40), 1 - binary(40))
    options = {"batch_size": 10, "learning_rate": 0.05, "validation": validation, "seed": 0, "epochs": 40}
    history = fit(*pair, data, patience=3, optimizer=copy.copy(optimizer), **options)
    best = max(history["validation"])
    assert history.stopped_early and 1 < history.best_epoch and len(history) == history.best_epoch + 3
    assert history["validation"].index(best) == history.best_epoch - 1
    assert mean_bound(*pair, validation) == best > history["validation"][-1]


def between(**options):
    """A fit to data around 4 from a start at 0, validated at 1: good on the way, worse at the end."""
    pair = methods_pair()
    options = {"validation": shifted(1.0, seed=1), "learning_rate": 0.05, "epochs": 12, "seed": 0} | options
    return pair, fit(*pair, shifted(4.0), **({"batch_size": 10} | options))


def test_the_best_weights_come_back_where_patience_lasts_and_the_last_ones_stay_without_it():
    pair, history = between(patience=30)
    best = max(history["validation"])
    assert len(history) == 12 and not history.stopped_early and 1 < history.best_epoch < 12
    assert mean_bound(*pair, shifted(1.0, seed=1)) == history["validation"][history.best_epoch - 1] == best
    pair, again = between()
    assert again["validation"] == history["validation"] and again.best_epoch == 12
    assert mean_bound(*pair, shifted(1.0, seed=1)) == again["validation"][-1] < best


@pytest.mark.parametrize("batch_size", [10, 50])  # 50 is all data: the last step of an epoch is also its first
def test_while_the_divergence_is_tempered_no_weights_are_best(batch_size):
    warm, rate = (8, 0.1) if batch_size == 10 else (10, 0.2)
    pair, history = between(patience=2, kl_warmup=warm, epochs=40, batch_size=batch_size, learning_rate=rate)
    validation = history["validation"]
    assert validation.index(max(validation)) < warm - 2 and validation[warm - 2] > validation[warm - 1]
    assert history.best_epoch >= warm and len(history) == history.best_epoch + 2 and history.stopped_early
    assert mean_bound(*pair, shifted(1.0, seed=1)) == validation[history.best_epoch - 1] == max(validation[warm - 1 :])


def test_a_bound_that_is_not_a_number_is_never_the_best():
    calls = []

    def fickle(particles):
        calls.append(0)
        return elbo(particles) * (math.nan if len(calls) in (1, 4) else 1.0)

    pair, history = between(patience=30, validation_bound=fickle)
    assert [epoch for epoch, value in enumerate(history["validation"], 1) if math.isnan(value)] == [1, 4]
    best = max(value for value in history["validation"] if not math.isnan(value))
    assert mean_bound(*pair, shifted(1.0, seed=1)) == history["validation"][history.best_epoch - 1] == best


def test_the_validation_bound_is_the_elbo_unless_another_is_given():
    x, pair = binary(9, seed=2), small_pair()
    history = fit(*pair, binary(20), validation=x, loss=Objective(iwae, 4), epochs=2, seed=0)
    assert history["validation"][-1] == mean_bound(*pair, x, elbo)
    history = fit(*pair, binary(20), validation=x, validation_bound=reconstruction, epochs=2, seed=0)
    assert history["validation"][-1] == mean_bound(*pair, x, reconstruction)


@pytest.mark.parametrize("options", [{"patience": 3}, {"patience": 0, "validation": binary(4)}])
def test_patience_needs_validation_data_and_a_positive_number(options):
    with pytest.raises(ValueError, match=r"patience \(got [03]\) needs validation data, and must be a positive"):
        fit(*small_pair(), binary(), **options)


def test_modules_train_in_training_mode_and_are_scored_and_left_in_evaluation_mode():
    modes = []

    class Watching(nn.Linear):
        def forward(self, x):
            modes.append(self.training)
            return super().forward(x)

    owner = Methods()
    owner.encoder = Watching(1, 1).double()
    fit(owner.model, owner.guide, shifted(0.0), validation=shifted(0.0), batch_size=25, epochs=2, seed=0)
    assert modes[-6:] == [True, True, False] * 2 and not owner.encoder.training
    pair = small_pair()
    fit(*pair, binary(), epochs=1, callback=lambda record: modes.append(pair[0].training and pair[1].training))
    assert modes[-1] is True and not any(m.training for program in pair for m in program.modules())


# Data of all kinds


class Indexed:
    """What a Split is to a fit: a length, and batches by index tensors."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        assert isinstance(index, torch.Tensor)
        return self.x[index]


class Passes:
    """Batches that can be run through again, without a length."""

    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x.split(10))


class Stream(IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return iter(self.x)


def loader(dataset):
    # With a generator of its own a loader takes no number from the global one.
    return DataLoader(dataset, batch_size=10, generator=torch.Generator().manual_seed(0))


KINDS = {
    "shuffled": [lambda x: x, lambda x: (x,), Indexed, Split],
    "as they come": [
        lambda x: list(x.split(10)),
        lambda x: [(part,) for part in x.split(10)],
        Passes,
        loader,
        lambda x: loader(TensorDataset(x)),
        lambda x: loader(Stream(x)),
    ],
}


@pytest.mark.parametrize("order", KINDS)
def test_the_same_data_of_any_kind_give_the_same_weights(order):
    results = []
    for wrap in KINDS[order]:
        pair = small_pair()
        options = {"validation": wrap(binary(25)), "epochs": 2, "batch_size": 10, "kl_warmup": 1, "seed": 0}
        history = fit(*pair, wrap(binary(25)), **options)
        results.append([*weights(*pair), torch.tensor(history["loss"] + history["validation"])])
    assert all(equal(results[0], other) for other in results[1:])


def test_every_datum_comes_once_a_pass_in_step_with_the_other_columns():
    torch.manual_seed(0)
    x = torch.arange(23.0)
    batches = Batches((x, Indexed(2 * x)), 5)
    passes = [list(batches), list(batches)]
    assert len(batches) == 5
    for batched in passes:
        assert [len(one) for one, _ in batched] == [5, 5, 5, 5, 3]
        assert all(torch.equal(2 * one, two) for one, two in batched)
        assert torch.equal(torch.cat([one for one, _ in batched]).sort().values, x)
    assert not torch.equal(passes[0][0][0], passes[1][0][0])
    assert torch.equal(torch.cat([one for (one,) in Batches(x, 5, shuffle=False)]), x)


def test_two_columns_reach_programs_of_two_arguments():
    def model(x, y):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())) * y, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x + pyro.param("a", torch.zeros(())) * y) / 2, 0.5**0.5))

    y = torch.tensor([-1.0, 1.0]).repeat(30)
    for data in ((3 * y, y), loader(TensorDataset(3 * y, y))):
        pyro.clear_param_store()
        fit(model, guide, data, epochs=60, batch_size=10, learning_rate=0.1, schedule="cosine", seed=0)
        # At the maximum, a = 3, the exact posterior leaves no noise but that of the last steps.
        assert pyro.param("a").item() == pytest.approx(3.0, abs=0.05)


@pytest.mark.parametrize(
    "data, text",
    [
        ((batch for batch in [binary()]), "got data of type generator.*run through again"),
        (3, "got data of type int, wanted a tensor"),
        (binary()[:0], "the data are empty; wanted at least one datum"),
        ((), "the data are empty; wanted at least one datum"),
        ([], "the data are empty; wanted at least one batch"),
        ((binary(5), binary(6)), r"different lengths, \[5, 6\]"),
    ],
)
def test_data_that_cannot_be_batched_are_refused(data, text):
    with pytest.raises(ValueError, match=text):
        fit(*small_pair(), data, epochs=1)


def test_an_empty_loader_is_refused():
    with pytest.raises(ValueError, match="the data are empty; wanted at least one batch"):
        fit(*small_pair(), DataLoader(TensorDataset(binary()[:0])), epochs=1)


# What is refused


@pytest.mark.parametrize(
    "options, text",
    [
        ({"epochs": 0}, "epochs must be a positive integer, got 0"),
        ({"batch_size": 0}, "batch_size must be a positive integer, got 0"),
        ({"epochs": 2, "kl_warmup": 2}, r"kl_warmup must lie in 0 .. epochs - 1 = 1, got 2"),
        ({"kl_warmup": -1}, "kl_warmup must lie in"),
        ({"schedule": "linear"}, "unknown schedule 'linear', wanted one of constant, cosine, one-cycle"),
        ({"loss": nn.MSELoss()}, r"got loss MSELoss\(\), wanted a Pyro ELBO"),
        ({"learning_rate": 0.0}, "the learning rate must be positive, got 0.0"),
        ({"clip_norm": -1.0}, "clip_norm must be positive or None, got -1.0"),
    ],
)
def test_options_out_of_range_are_named(options, text):
    with pytest.raises(ValueError, match=text):
        fit(*small_pair(), binary(), **options)


@pytest.mark.parametrize("optimizer", [None, pyro.optim.Adam({"lr": 0.1})], ids=["fused", "pyro"])
def test_a_pair_with_nothing_to_train_is_refused(optimizer):
    net = nn.Linear(1, 1)

    def guide(x):  # forgot pyro.module
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], 1.0))

    with pytest.raises(ValueError, match=r"nothing to train. Register networks with pyro.module"):
        fit(lambda x: Methods._model(x, 0.0), guide, torch.zeros(4), epochs=1, optimizer=optimizer)


def normal_vae():
    torch.manual_seed(0)
    return VAE.build((3,), latent_dim=1, network="linear", likelihood="normal", scale=0.5)


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_a_loss_that_is_not_finite_names_the_step_and_the_remedy():
    remedy = "Lower learning_rate, set clip_norm .*scale that collapses"
    vae, x = normal_vae(), torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=f"the loss became (nan|inf) at step [1-9]. {remedy}"):
        fit(vae.model, vae.guide, x, optimizer=torch.optim.SGD, learning_rate=1e8, batch_size=10, epochs=5, seed=0)
    with pytest.raises(ValueError, match="row 0, column . of the data is nan; wanted a finite number.*missing value"):
        fit(normal_vae().model, normal_vae().guide, x.where(x > 1, math.nan), epochs=1)


@pytest.mark.parametrize("loss", [None, TraceMeanField_ELBO(), RenyiELBO(num_particles=2)])
def test_a_point_guide_has_no_elbo(loss):
    pair = autoencoder((1, 4, 4), latent_dim=2, hidden=(8,))
    with pytest.raises(ValueError, match=r"point site \(Delta\) without a density.*loss=Objective\(reconstruction\)"):
        fit(pair.model, pair.guide, binary(), loss=loss, epochs=1)
    with pytest.raises(ValueError, match=r"no ELBO.*Train it with Objective\(reconstruction\)"):
        fit(pair.model, pair.guide, binary(), loss=Objective(), epochs=1)


def test_a_point_guide_trains_under_its_own_objective():
    torch.manual_seed(0)
    pair, x = autoencoder((1, 4, 4), latent_dim=2, hidden=(8,)), binary(40)

    def score():
        with torch.no_grad():
            return pair.decode(pair.posterior(x).mean).log_prob(x).mean().item()

    before, start = weights(pair), score()
    history = fit(
        pair.model,
        pair.guide,
        x,
        loss=Objective(reconstruction),
        validation=x,
        epochs=30,
        batch_size=20,
        learning_rate=2e-2,
        seed=0,
    )
    assert history["validation"][-1] == pytest.approx(score(), rel=1e-6)
    # The best that ignores x is each pixel's frequency; the two patterns take one bit to tell apart.
    frequency = x.mean(0).clamp(1e-6, 1 - 1e-6)
    assert score() > dist.Bernoulli(frequency).to_event(3).log_prob(x).mean() + 1 > start
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(pair), strict=True))


def test_grey_pixels_under_a_bernoulli_are_said_and_binary_ones_are_not():
    with pytest.warns(UserWarning, match="site 'x' is Bernoulli but its data have grey values.*Binarise"):
        fit(*small_pair(), 0.9 * binary(), epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(*small_pair(), binary(), epochs=1)
        vae = normal_vae()
        fit(vae.model, vae.guide, torch.rand(10, 3), epochs=1)


# Around the fit


def test_plain_functions_learn_the_closed_form_and_leave_it_in_the_param_store():
    model, guide = functions_pair()
    x = shifted(3.0, size=400)
    fit(model, guide, x, epochs=60, batch_size=100, learning_rate=0.05, schedule="cosine", seed=0)
    value = {name: pyro.param(name).item() for name in ("b", "slope", "shift", "scale")}
    # The maximum-likelihood prior mean is the data's; the posterior is N((x + b) / 2, 1 / 2).
    stderr = x.std().item() / 20
    assert value["b"] == pytest.approx(x.mean().item(), abs=stderr)
    assert value["slope"] == pytest.approx(0.5, abs=0.05)
    assert value["slope"] * 3 + value["shift"] == pytest.approx((3 + value["b"]) / 2, abs=stderr)
    assert value["scale"] == pytest.approx(0.5**0.5, abs=0.05)
    assert set(pyro.get_param_store().keys()) == set(value)
    evidence = dist.Normal(x.mean(), 2**0.5).log_prob(x).mean().item()
    assert evidence - 0.02 < mean_bound(model, guide, x, num_samples=50) < evidence + 0.02


def test_a_second_fit_of_functions_goes_on_from_the_store():
    model, guide = slope_pair()
    for _ in range(2):
        fit(model, guide, torch.zeros(4), optimizer=torch.optim.SGD, learning_rate=0.5, epochs=3)
    assert pyro.param("w").item() == 3.0


def test_ctrl_c_keeps_the_weights_of_that_moment():
    def stop(record):
        if record["epoch"] == 10:
            raise KeyboardInterrupt

    ours, history = between(patience=30, callback=stop)
    assert history.interrupted and not history.stopped_early and len(history) == history.best_epoch == 10
    assert history["validation"].index(max(history["validation"])) < 9  # they are not the best
    assert not ours[0].__self__.training
    theirs, other = between(epochs=10)
    assert not other.interrupted and equal(weights(ours[0].__self__), weights(theirs[0].__self__))


def test_ctrl_c_inside_a_step_keeps_what_was_learned():
    vae, calls = normal_vae(), []
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))

    def guide(batch):
        calls.append(0)
        if len(calls) == 7:  # the first call is the check of the pair
            raise KeyboardInterrupt
        return vae.guide(batch)

    before, state = weights(vae), torch.get_rng_state()
    history = fit(vae.model, guide, x, batch_size=10, epochs=5, seed=0)
    assert torch.equal(state, torch.get_rng_state())
    assert history.interrupted and len(history) == 1
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(vae), strict=True))


def switches():
    return (
        pyro.distributions.is_validation_enabled(),
        pyro.infer.is_validation_enabled(),
        pyro.poutine.is_validation_enabled(),
        torch.get_float32_matmul_precision(),
        torch.is_grad_enabled(),
        torch.get_default_dtype(),
    )


def store():
    return {name: (id(t), t.detach().clone()) for name, t in pyro.get_param_store().named_parameters()}


@pytest.mark.filterwarnings("ignore:Encountered NaN")
@pytest.mark.parametrize("validation", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_switches_and_the_param_store_are_left_as_they_were(validation, fails):
    seen = []
    pyro.param("decoder$$$weight", torch.tensor(5.0))
    vae = normal_vae()
    before_store, random = store(), torch.get_rng_state()
    with pyro.validation_enabled(validation):
        before = switches()
        x = torch.full((20, 3), 1.0)
        try:
            fit(
                vae.model,
                vae.guide,
                x,
                epochs=2,
                matmul_precision="medium",
                seed=0,
                learning_rate=1e30 if fails else 1e-3,
                batch_size=10,
                validation=x,
                callback=lambda record: seen.append(torch.get_float32_matmul_precision()),
            )
        except ValueError as error:
            assert fails and "the loss became" in str(error)
        assert switches() == before
    assert seen == ([] if fails else ["medium", "medium"])
    assert before_store.keys() == {"decoder$$$weight"}
    names = set() if fails else {f"{program._pyro_name}." for program in (vae.model, vae.guide)}
    added = store().keys() - before_store.keys()  # the pair's own, and nothing where the fit failed
    assert {name.partition(".")[0] + "." for name in added} == names
    assert all(store()[name][0] == before_store[name][0] for name in before_store)
    assert torch.equal(random, torch.get_rng_state())


def test_quiet_where_there_is_no_terminal(capsys):
    fit(*small_pair(), binary(), epochs=2)
    assert capsys.readouterr() == ("", "")
    fit(*small_pair(), binary(), epochs=2, progress=False)
    assert capsys.readouterr() == ("", "")
    fit(*small_pair(), binary(), epochs=2, progress=True)
    out, err = capsys.readouterr()
    assert out == "" and "epoch 2/2" in err and "bound -" in err and "loss=" not in err


def test_the_callback_gets_each_record_of_the_history():
    records = []
    history = fit(*small_pair(), binary(), epochs=3, validation=binary(), callback=records.append)
    assert records == history.records and len(history) == 3
    with pytest.raises(ValueError, match="got the column 'nothing', wanted one of epoch, loss, bound, validation"):
        history["nothing"]
    assert all(b > a for a, b in zip(history["seconds"][:-1], history["seconds"][1:], strict=True))


def test_arrays_and_tensor_datasets_are_data():
    import numpy as np

    x = torch.arange(10.0)
    for data in (x.numpy(), torch.utils.data.TensorDataset(x), (np.arange(10.0, dtype=np.float32),)):
        assert torch.equal(torch.cat([b for (b,) in Batches(data, 4, shuffle=False)]), x)


def test_a_frozen_model_stays_as_it_is_and_in_evaluation_mode():
    model, guide = small_pair()
    model.requires_grad_(False)
    before, modes = [p.clone() for p in model.parameters()], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pyro would warn of each frozen parameter in training mode
        fit(model, guide, binary(), epochs=2, progress=False, seed=0, callback=lambda _: modes.append(model.training))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True)) and modes == [False, False]


@pytest.mark.filterwarnings("ignore")  # of torch.jit
@pytest.mark.parametrize("name", ["Trace_ELBO", "TraceMeanField_ELBO", "TraceGraph_ELBO"])
def test_pyros_compiled_losses_take_the_steps_of_the_plain_ones(name):
    ends = []
    for make in (getattr(pyro.infer, name), lambda: getattr(pyro.infer, "Jit" + name)(ignore_jit_warnings=True)):
        torch.manual_seed(0)
        enc, dec = nn.Linear(3, 2).double(), nn.Linear(2, 3).double()
        start = weights(enc, dec)

        def model(x, dec=dec):
            pyro.module("dec", dec)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(dec(z), 1.0).to_event(1), obs=x)

        def guide(x, enc=enc):  # hardly any noise, since tracing draws some of its own
            pyro.module("enc", enc)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(enc(x), 1e-9).to_event(1))

        x = torch.randn(20, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        options = {"optimizer": torch.optim.SGD, "epochs": 3, "batch_size": 20, "learning_rate": 1e-2, "seed": 1}
        fit(model, guide, x, loss=make(), progress=False, **options)
        ends.append(weights(enc, dec))
        assert distance(start, weights(enc, dec)) > 0.01
    assert distance(*ends) < 1e-6
