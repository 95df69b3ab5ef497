"""What is reported per datum is per datum: whatever the plate's scale, the batch, and how it is laid out."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO, TraceGraph_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import nn
from torch.distributions import kl_divergence

import pyro_vae as pv
from pyro_vae import Objective, elbo, elbo_terms, fit, iwae
from pyro_vae.inference.bounds import reconstruction
from pyro_vae.inference.compiled import Compiled
from pyro_vae.inference.per_datum import Counting, Unit
from pyro_vae.inference.regularizers import free_bits
from pyro_vae.inference.split_bounds import sleep_phase
from pyro_vae.judging.company import seen_by_others
from pyro_vae.judging.gradients import gradient_lab
from pyro_vae.judging.sweeps import sweep
from pyro_vae.parameters import own_parameters
from pyro_vae.programs.vae import VAE
from pyro_vae.traces import log_joint, log_q, particles

N = 60
X = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
FROZEN = {"learning_rate": 1e-30, "progress": False, "seed": 0, "optimizer": torch.optim.SGD}


@pytest.fixture(autouse=True)
def empty_store():
    pyro.clear_param_store()


def pair(plate=lambda x: pyro.plate("data", len(x)), get=lambda *batch: batch[0]):
    torch.manual_seed(1)
    net = nn.Linear(2, 1)

    def model(*batch):
        x = get(*batch)
        with plate(x):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

    def guide(*batch):
        pyro.module("net", net)
        x = get(*batch)
        with plate(x):
            pyro.sample("z", dist.Normal(net(x)[..., 0], 0.5))

    return model, guide


def exact(data=X):
    """The ELBO per datum in closed form."""
    torch.manual_seed(1)
    with torch.no_grad():
        loc = nn.Linear(2, 1)(data)[..., 0]
    kl = kl_divergence(dist.Normal(loc, 0.5), dist.Normal(0.0, 1.0))
    fits = dist.Normal(loc.unsqueeze(-1), 1.0).log_prob(data).sum(-1) - 0.25
    return (fits - kl).mean().item()


def scaled(programs, scale):
    return tuple(poutine.scale(program, scale=scale) for program in programs)


PLATES = {
    "plain": lambda x: pyro.plate("data", len(x)),
    "subsample": lambda x: pyro.plate("data", 10_000, subsample=x),
    "subsample_size": lambda x: pyro.plate("data", 10_000, subsample_size=len(x)),
    "dim": lambda x: pyro.plate("rows", len(x), dim=-1),
}


@pytest.mark.parametrize("around", [1.0, 1e-3])
@pytest.mark.parametrize("plate", PLATES.values(), ids=PLATES)
@pytest.mark.parametrize(
    "loss", [Trace_ELBO(), TraceGraph_ELBO(), Objective(elbo)], ids=["trace", "graph", "objective"]
)
def test_history_is_per_datum_under_every_scale(loss, plate, around):
    programs = scaled(pair(plate), around) if around != 1 else pair(plate)
    history = fit(*programs, X, loss=loss, epochs=40, batch_size=25, validation=X, **FROZEN)  # the last batch has ten
    for column, sign in (("loss", -1), ("bound", 1)):
        values = torch.tensor(history[column])
        assert abs(sign * values.mean() - exact()) < 4 * values.std() / math.sqrt(40)
    assert abs(history["validation"][0] - exact()) < 0.5


class Dicts(torch.utils.data.Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"label": i % 3, "image": X[i]}


class Loader:
    """Batches as they are, in an iterable of one's own."""

    def __init__(self, *batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


BATCHES = {
    "dict": (torch.utils.data.DataLoader(Dicts(), batch_size=20), lambda batch: batch["image"]),
    "labels first": ((torch.arange(N), X), lambda y, x: x),
    "a number first": (Loader(*((torch.tensor(3.0), X[i : i + 20]) for i in range(0, N, 20))), lambda t, x: x),
    "transposed": (Loader(*((X[i : i + 20].T,) for i in range(0, N, 20))), lambda x: x.T),
}


@pytest.mark.parametrize("data, get", BATCHES.values(), ids=BATCHES)
def test_history_is_per_datum_whatever_a_batch_is(data, get):
    history = fit(*pair(PLATES["subsample"], get), data, epochs=40, batch_size=20, **FROZEN)
    values = torch.tensor(history["loss"])
    assert abs(-values.mean() - exact()) < 4 * values.std() / math.sqrt(40)


def test_captured_steps_report_what_eager_ones_do():
    for plate in (PLATES["plain"], PLATES["subsample"]):
        found = [
            fit(*pair(plate), X, loss=loss, epochs=4, batch_size=25, learning_rate=1e-3, seed=0, progress=False)
            for loss in (Trace_ELBO(), Compiled(Trace_ELBO(), compile_after=None))
        ]
        assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    kept, programs = Compiled(Trace_ELBO(), compile_after=None), pair(PLATES["subsample"])
    for _ in range(2):  # the second replays from its first step on
        history = fit(*programs, X, loss=kept, epochs=3, batch_size=20, **FROZEN)
        assert abs(history["loss"][0] + exact()) < 1.0


def test_annealing_of_the_divergence_alone_is_no_unit():
    torch.manual_seed(1)
    net = nn.Linear(2, 1)

    def model(x):
        with PLATES["subsample"](x):
            with poutine.scale(scale=0.1):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        with PLATES["subsample"](x), poutine.scale(scale=0.1):
            pyro.sample("z", dist.Normal(net(x)[..., 0], 0.5))

    history = fit(model, guide, X, epochs=60, batch_size=20, **FROZEN)
    with torch.no_grad():
        loc = net(X)[..., 0]
    fits = (dist.Normal(loc.unsqueeze(-1), 1.0).log_prob(X).sum(-1) - 0.25).mean()
    kl = kl_divergence(dist.Normal(loc, 0.5), dist.Normal(0.0, 1.0)).mean()
    values = torch.tensor(history["loss"])
    assert abs(values.mean() - (0.1 * kl - fits)) < 4 * values.std() / math.sqrt(60)
    assert history["bound"] == [None] * 60  # a tempered ELBO is no bound


def test_latents_of_all_data_count_once_in_a_pass():
    y = X @ torch.tensor([1.0, -2.0]) + 0.1

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", N, subsample=y):
            pyro.sample("y", dist.Normal(x @ w, 0.5), obs=y)

    guide = AutoNormal(model)
    history = fit(model, guide, (X, y), epochs=100, batch_size=20, learning_rate=1e-30, seed=0, progress=False)
    with torch.no_grad():
        want = Trace_ELBO(num_particles=1000).loss(model, guide, X, y) / N
    values = torch.tensor(history["loss"])
    assert abs(values.mean() - want) < 4 * values.std() / math.sqrt(100) + 0.03
    with pytest.raises(ValueError, match="site 'w' lies outside the data plate"):
        elbo_terms(model, guide, (X, y), num_samples=3)


def test_the_unit_of_plates_inside_and_beside():
    def words(x):
        topic = pyro.sample("topic", dist.Normal(0.0, 1.0))
        with pyro.plate("documents", 100, subsample_size=4, dim=-1):
            theta = pyro.sample("theta", dist.Normal(topic, 1.0))
            with pyro.plate("words", 30, subsample_size=10, dim=-2):
                pyro.sample("w", dist.Normal(theta, 1.0), obs=torch.zeros(10, 4))

    with Counting() as counting:
        words(None)
    assert counting.unit((10, 4)) == Unit(4, 25.0, True, 25.0)

    def one_by_one(x):
        for i in pyro.plate("data", 12, subsample_size=3):
            pyro.sample(f"x{i}", dist.Normal(0.0, 1.0), obs=torch.zeros(()))

    with Counting() as counting:
        one_by_one(None)
    assert counting.unit() == Unit(3, 4.0, True, 4.0)
    with Counting() as counting:
        pyro.sample("x", dist.Normal(torch.zeros(7, 2), 1.0).to_event(2), obs=torch.zeros(7, 2))
    assert counting.unit((7, 2)).rows == 7


def trained(plate, loss=None, **options):
    programs = pair(plate)
    fit(*programs, X, loss=loss, epochs=15, batch_size=20, seed=0, progress=False, **options)
    with own_parameters(), poutine.trace(param_only=True) as params:
        programs[1](X)
    return torch.cat([s["value"].detach().flatten() for s in params.trace.nodes.values()])


def test_a_clip_does_not_depend_on_the_scale():
    """A limit that binds in some steps: at the same length of step per unit of loss, SGD goes the same way."""
    sgd = {"optimizer": torch.optim.SGD}
    plain = trained(PLATES["plain"], learning_rate=1e-2, clip_norm=3.0, **sgd)
    scale = 10_000 / 20
    assert torch.allclose(
        plain, trained(PLATES["subsample"], learning_rate=1e-2 / scale, clip_norm=3.0, **sgd), rtol=1e-4
    )
    assert not torch.allclose(plain, trained(PLATES["plain"], learning_rate=1e-2, **sgd), rtol=1e-3)
    assert not torch.allclose(plain, trained(PLATES["plain"], learning_rate=1e-2, clip_norm=0.01, **sgd), rtol=1e-2)
    eager, captured, unclipped = (
        trained(PLATES["subsample"], loss=loss, learning_rate=3e-2, clip_norm=limit)
        for loss, limit in ((None, 3.0), (Compiled(Trace_ELBO(), compile_after=None), 3.0), (None, None))
    )
    assert torch.allclose(eager, captured, rtol=1e-4) and not torch.allclose(eager, unclipped, rtol=1e-3)


def test_gradient_norms_are_per_datum():
    options = {"num_samples": (2,), "repeats": 10, "estimators": ("reparameterized",), "progress": False}
    plain = gradient_lab(*pair(), X, **options)
    scaled_lab = gradient_lab(*pair(PLATES["subsample"]), X, **options)
    second = gradient_lab(*pair(PLATES["subsample"], lambda y, x: x), (torch.zeros(5), X), **options)
    for lab in (scaled_lab, second):
        assert lab.measured[0].norm == pytest.approx(plain.measured[0].norm, rel=1e-4) and lab.num_data == N


def test_regularizers_see_densities_that_are_not_tempered_and_count_per_datum():
    seen = []

    def spy(particles, model, guide):
        seen.append(particles)
        return particles.log_likelihood.new_ones(()) * 3

    model, guide = pair(PLATES["subsample"])
    for beta in (1.0, 0.25):
        torch.manual_seed(0)
        Objective(elbo, beta=beta, regularizers=[spy]).loss(model, guide, X)
    assert torch.equal(seen[0].log_q["z"], seen[1].log_q["z"])
    assert torch.equal(seen[0].log_prior["z"], seen[1].log_prior["z"])
    values = {}
    for name, extra in {"none": [], "three": [spy], "bits": [free_bits(9.0)]}.items():
        values[name] = fit(model, guide, X, loss=Objective(elbo, beta=0.5, regularizers=extra), epochs=1, **FROZEN)
    gap = values["three"]["loss"][0] - values["none"]["loss"][0]
    assert gap == pytest.approx(3.0, abs=1e-4) and values["three"]["bound"] == values["none"]["bound"]
    kl = 9.0 - (values["bits"]["loss"][0] - values["none"]["loss"][0])
    torch.manual_seed(1)
    loc = nn.Linear(2, 1)(X)[..., 0]
    assert abs(kl - kl_divergence(dist.Normal(loc, 0.5), dist.Normal(0.0, 1.0)).mean().item()) < 0.5


def test_densities_at_given_latents_treat_scales_as_particles_do():
    model, guide = pair(PLATES["subsample"])
    table = particles(model, guide, X, num_samples=3)
    assert table.scale == 10_000 / N
    assert torch.allclose(log_joint(model, table.latents, X), table.log_joint)
    assert torch.allclose(log_q(guide, table.latents, X), table.log_q["z"])

    def uneven(x):
        with pyro.plate("data", len(x)):
            with poutine.scale(scale=0.5):
                z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 2]).to_event(1), obs=x)

    with pytest.raises(ValueError, match="'z' carries the scale 0.5"):
        log_joint(uneven, table.latents, X)

    def by_row(x):
        with pyro.plate("data", len(x)), poutine.scale(scale=torch.rand(N)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match=r"'z' carries a scale of shape \(60,\)"):
        log_q(by_row, table.latents, X)


def test_a_dream_replaces_all_that_is_observed():
    """q learns of what it is shown: the guide reports both arguments, which must both be the model's draws."""
    shown = []
    x, y = torch.full((4, 3), 7.0), torch.full((4,), 5)

    def model(x, y, keep):
        with pyro.plate("data", 4):
            z = pyro.sample("z", dist.Normal(0.0, 0.1))
            pyro.sample("y", dist.Categorical(logits=torch.zeros(2)), obs=y)
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.1).expand([*z.shape, 3]).to_event(1), obs=x)

    def guide(x, y, keep):
        shown.append((x, y, keep))
        with pyro.plate("data", 4):
            pyro.sample("z", dist.Normal(x.mean(-1), 1.0))

    sleep_phase(model, guide, x, y, torch.full((4,), 9.0))
    seen, label, kept = shown[-1]
    assert (seen.abs() < 2).all() and (label < 2).all() and label.dtype == y.dtype and (kept == 9).all()
    assert (x == 7).all() and (y == 5).all()

    def of_dict(program):
        return lambda batch: program(batch["x"], batch["y"], batch["keep"])

    sleep_phase(of_dict(model), of_dict(guide), {"y": y, "x": x, "keep": torch.full((4,), 9.0)})
    assert (shown[-1][0].abs() < 2).all() and (shown[-1][1] < 2).all() and (shown[-1][2] == 9).all()


def test_a_dream_finds_columns_views_and_types():
    shown = []

    def guide(x):
        shown.append(x)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    def steps(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.1))
            for t in range(3):
                pyro.sample(f"x{t}", dist.Normal(z, 0.1), obs=x[:, t])

    def flat(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.1))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 0.1).expand([*z.shape, 4]).to_event(1), obs=x.flatten(1))

    def cast(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 0.1))
            pyro.sample("x", dist.Bernoulli(torch.sigmoid(z)), obs=x.float())

    sleep_phase(steps, guide, torch.full((5, 4), 7.0))
    assert (shown[-1][:, :3].abs() < 2).all() and (shown[-1][:, 3] == 7).all()
    sleep_phase(flat, guide, torch.full((5, 2, 2), 7.0))
    assert shown[-1].shape == (5, 2, 2) and (shown[-1].abs() < 2).all()
    torch.manual_seed(0)
    sleep_phase(cast, guide, torch.ones(200, dtype=torch.uint8))
    assert shown[-1].dtype == torch.uint8 and 60 < shown[-1].sum() < 140


@pytest.mark.parametrize("what", ["scaled", "twice", "constant", "factor"])
def test_a_dream_that_cannot_replace_says_what(what):
    x = torch.full((5,), 7.0)
    args = (x, x.clone()) if what == "twice" else (x, torch.zeros(5))

    def model(x, other):
        with pyro.plate("data", 5):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x / 2 if what == "scaled" else x * 1 if what == "twice" else x)
            if what == "constant":
                pyro.sample("flag", dist.Bernoulli(torch.sigmoid(z)), obs=torch.ones(5))
            if what == "factor":
                pyro.factor("weight", -z)

    def guide(x, other):
        with pyro.plate("data", 5):
            pyro.sample("z", dist.Normal(x, 1.0))

    text = {
        "scaled": r"none of the 2 arguments is what the model observes \(x\)",
        "twice": r"more than one of the 2 arguments is what the model observes \(x\)",
        "constant": r"none of the 2 arguments is what the model observes \(flag\)",
        "factor": "site 'weight' is a pyro.factor",
    }[what]
    with pytest.raises(ValueError, match=text):
        sleep_phase(model, guide, *args)


def test_a_point_guide_and_many_samples_are_per_datum_too():
    def guide(x):
        with PLATES["subsample"](x):
            pyro.sample("z", dist.Delta(x.mean(-1) * pyro.param("a", torch.tensor(0.5))))

    history = fit(pair(PLATES["subsample"])[0], guide, X, loss=Objective(reconstruction), epochs=1, **FROZEN)
    want = dist.Normal(0.5 * X.mean(-1, keepdim=True), 1.0).log_prob(X).sum(-1).mean().item()
    assert history["bound"][0] == pytest.approx(want, rel=1e-5)
    history = fit(*pair(PLATES["subsample"]), X, loss=Objective(iwae, 50), epochs=1, **FROZEN)
    evidence = dist.MultivariateNormal(torch.zeros(2), torch.ones(2, 2) + torch.eye(2)).log_prob(X).mean().item()
    assert abs(history["bound"][0] - evidence) < 0.3


def test_the_bound_is_known_again_after_a_captured_warm_up():
    """What a captured step during the warm-up said of its scales does not stand for those after it."""
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    found = []
    for option in (False, "auto"):
        torch.manual_seed(0)
        pair = VAE.build((3,), latent_dim=2, hidden=(4,), likelihood="normal")
        history = fit(pair.model, pair.guide, x, epochs=110, batch_size=8, seed=0, kl_warmup=2, compile=option)
        found.append(history["bound"])
    assert found[1][0] is None and found[1][2:] == pytest.approx(found[0][2:], rel=1e-4)


def test_of_two_plates_that_all_sites_share_the_one_as_long_as_the_data_is_theirs():
    """The data at dim -1 under a plate of their coordinates, which is the outer one."""

    def model(x):
        with pyro.plate("coordinate", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x.T)

    def guide(x):
        with pyro.plate("coordinate", 3, dim=-2), pyro.plate("data", len(x), dim=-1):
            pyro.sample("z", dist.Normal(x.T / 2, pyro.param("width", torch.tensor(0.5**0.5))))

    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    exact = dist.Normal(0.0, 2**0.5).log_prob(x).sum(-1)
    pyro.clear_param_store()
    found = pv.log_likelihood(model, guide, x, num_samples=20)
    assert found.pointwise.shape == (300,) and torch.allclose(found.pointwise.float(), exact, atol=1e-4)
    history = fit(model, guide, x, epochs=1, learning_rate=1e-9, validation=x, progress=False, seed=0)
    for name in ("bound", "validation"):
        assert history[name][-1] == pytest.approx(exact.mean().item(), abs=1e-4)


class Centred(nn.Module):
    def forward(self, h):
        return h - h.mean(-2, keepdim=True)


class Norm(nn.Module):
    """Batch normalisation over one leading dimension, sample by sample."""

    def __init__(self, size, **options):
        super().__init__()
        self.norm = nn.BatchNorm1d(size, **options)

    def forward(self, h):
        return self.norm(h.reshape(-1, h.shape[-1])).reshape(h.shape) if h.dim() == 2 else torch.stack([*map(self, h)])


def neural(decoder=(), encoder=(), noise=0.0):
    torch.manual_seed(3)
    enc, dec = nn.Sequential(nn.Linear(2, 4), *encoder), nn.Sequential(nn.Linear(2, 2), *decoder)

    def model(x):
        pyro.module("dec", dec)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            loc = dec(z)
            pyro.sample("x", dist.Normal(loc + noise * torch.randn_like(loc), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("enc", enc)
        loc, log_scale = enc(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    return model, guide


MIXING = {
    "centred decoder": (neural((Centred(),)), "model"),
    "normalised decoder": (neural((Norm(2, track_running_stats=False),)), "model"),
    "centred encoder": (neural((), (Centred(),)), "guide"),
    "normalised encoder": (neural((), (nn.BatchNorm1d(4, track_running_stats=False),)), "guide"),
}


@pytest.mark.parametrize("count", [60, 3])
@pytest.mark.parametrize("name", MIXING)
def test_rows_that_see_each_other_are_named_once_per_call(name, count):
    programs, who = MIXING[name]
    for bound in (pv.elbo_terms, pv.log_likelihood):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            bound(*programs, X[:count], num_samples=3)
        said = [str(w.message) for w in caught if "scores datum 0 differently" in str(w.message)]
        assert len(said) == 1 and said[0].startswith(f"the {who} "), said


@pytest.mark.parametrize(
    "programs",
    [
        neural(),
        neural((nn.LayerNorm(2),), (nn.LayerNorm(4), nn.Dropout(0.5))),
        neural((Norm(2),), (nn.BatchNorm1d(4),)),
        neural(noise=1.0),
        pair(),
        pair(lambda x: pyro.plate("data", 600, subsample=x)),
    ],
    ids=["linear", "layer norm", "running statistics", "noise of its own", "plain", "subsampled"],
)
def test_rows_that_do_not_see_each_other_are_not_suspected(programs):
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert seen_by_others(programs, (X,)) is None
    assert torch.equal(torch.get_rng_state(), state)


def test_the_probe_costs_two_tiny_runs():
    model, guide = pair()
    sizes = []

    def watched(x):
        sizes.append(len(x))
        return model(x)

    assert seen_by_others((watched, guide), (X,)) is None
    assert sizes == [4, 4]
    sizes.clear()
    assert (
        seen_by_others((watched, guide), (X[:1],)) is None
        and seen_by_others((watched, guide), (torch.arange(9),)) is None
    )
    assert not sizes


def test_what_a_call_says_of_its_rows_it_says_once_and_to_its_caller():
    def count():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pv.log_likelihood(*programs, X, num_samples=3)
        return [w.filename for w in caught if "scores datum 0" in str(w.message)]

    programs = MIXING["centred decoder"][0]
    assert count() == count() == [__file__]
    with pytest.warns(UserWarning, match="scores datum 0"), sweep(*programs, data=X, batch_size=20):
        assert count() == []
    assert count() == [__file__]
