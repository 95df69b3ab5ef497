"""Pairs that have numbers, and none of log p(x): swapped, blind, with auxiliary draws or supports that do not fit."""

import contextlib
import inspect
import math
import types
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

import pyro_vae as pv
from pyro_vae.reach import Reach, places

X = torch.tensor([0.5, 1.0, -2.0, 3.0])
EXACT = dist.Normal(0.0, 2**0.5).log_prob(X).mean().item()


def model(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(x / 2, pyro.param("scale", torch.tensor(0.5**0.5))))


def blind(x):
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(pyro.param("m", torch.zeros(())), 1.0)), 1.0))


def with_auxiliary(x):
    with pyro.plate("data", len(x)):
        pyro.sample("u", dist.Uniform(0.0, 10.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Normal(x / 2, pyro.param("scale", torch.tensor(0.5**0.5))))


def through_auxiliary(x):
    with pyro.plate("data", len(x)):
        u = pyro.sample(
            "u", dist.Normal(x / 2, pyro.param("scale", torch.tensor(0.5**0.5))), infer={"is_auxiliary": True}
        )
        pyro.sample("z", dist.Delta(u))


RUNS = {
    "fit": lambda m, g: pv.fit(m, g, X, epochs=1, progress=False, seed=0),
    "elbo_terms": lambda m, g: pv.elbo_terms(m, g, X, num_samples=10),
    "log_likelihood": lambda m, g: pv.log_likelihood(m, g, X, num_samples=10),
    "kl_per_dimension": lambda m, g: pv.kl_per_dimension(m, g, X),
    "judge": lambda m, g: pv.judge(m, g, X, num_data=4, budget=5.0),
}
NONE = {
    "swapped": (guide, model, "the guide observes 'x'.*The order is .model, guide, data."),
    "the model twice": (model, model, "the guide observes 'x'"),
    "nothing observed": (blind, guide, "the model observes nothing, only draws .'z', 'x'."),
    "an idle auxiliary site": (
        model,
        with_auxiliary,
        "'u' is none of the model's latent sites: it is auxiliary, and no latent is a function of it",
    ),
}


@pytest.mark.parametrize("name", NONE)
@pytest.mark.parametrize("run", RUNS)
def test_what_is_no_pair_is_refused_by_name(run, name):
    if (run, name) == ("judge", "an idle auxiliary site"):
        pytest.skip("its stages say it one by one")
    first, second, text = NONE[name]
    with pytest.raises(ValueError, match=text):
        RUNS[run](first, second)


def with_a_pair():
    """Every public function whose first arguments are a pair and its data, with the few others that some need."""
    options = {
        "fit": {"epochs": 1, "progress": False},
        "mean_bound": {},
        "compare_guides": {},
        "judge": {"budget": 5.0},
    }
    for name in sorted(dir(pv)):
        function = getattr(pv, name)
        if name.startswith("_") or inspect.isclass(function) or not callable(function):
            continue
        try:
            first = list(inspect.signature(function).parameters)[:3]
        except (TypeError, ValueError):
            continue
        if first[:1] == ["model"] and first[1:2] in (["guide"], ["guides"]):
            yield pytest.param(function, options.get(name, {}), id=name)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("function, options", list(with_a_pair()))
def test_a_swapped_pair_is_refused_by_every_function_that_takes_one(function, options):
    second = {"one": model} if "guides" in inspect.signature(function).parameters else model
    data, first = X, guide
    if function is pv.guide_distances:
        options = {"reference": pv.reference(model, guide, X, num_samples=20, num_chains=2, num_warmup=20)}
    if function is pv.impute:
        data, first, second = (X, X > 0), lambda x, mask: guide(x), lambda x, mask: model(x)
    text = "wanted a Model.prior, likelihood" if function is pv.ex_post else "the guide observes 'x'|observes nothing"
    with pytest.raises(ValueError, match=text):
        function(first, second, data, **options)


def test_a_pair_is_a_pair_with_an_auxiliary_site_that_the_latent_is_made_of():
    for second in (guide, through_auxiliary):
        assert pv.log_likelihood(model, second, X, num_samples=10).value == pytest.approx(EXACT, abs=1e-5)


@pytest.mark.parametrize("run", ["elbo_terms", "log_likelihood"])
def test_supports_that_do_not_fit_are_said_by_estimates(run):
    def narrow(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Uniform(x / 2 - 0.3, x / 2 + 0.3))

    with pytest.warns(UserWarning, match="'z' .Uniform. cannot draw all that the prior .Normal. can.*lower bound"):
        assert RUNS[run](model, narrow).value < EXACT - 0.5

    def positive(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.LogNormal(0.0, 1.0)), 1.0), obs=x)

    with pytest.raises(ValueError, match="'z' .Normal. draws values outside of the support of the prior .LogNormal."):
        RUNS[run](positive, guide)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(RUNS[run](model, guide).value)


def test_a_program_that_reaches_more_than_can_be_watched_runs_eagerly():
    chain = None
    for _ in range(places.MOST_PLACES):
        chain = types.SimpleNamespace(after=chain, weight=[1.0])

    def deep(x):
        shift = 0.0 * len(chain.after.weight if x.dim() > 1 else x)  # it is reached, and never looked at
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(shift, 1.0)), 1.0), obs=x)

    assert "more than 20,000 places of Python are read" in Reach(deep).unproven[-1]
    histories = []
    for compile in (False, "auto"):
        pyro.clear_param_store()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = pv.fit(deep, guide, X, epochs=510, batch_size=len(X), seed=0, progress=False, compile=compile)
        histories.append(found["loss"])
    assert histories[0] == histories[1]


@pytest.mark.parametrize(
    "change",
    [
        lambda group, epoch: group.update(weight_decay=1.0 if epoch > 30 else 0.0),
        lambda group, epoch: group.update(betas=(0.85 + 0.01 * (epoch % 10), 0.99)),
        lambda group, epoch: group.update(eps=1e-8 if epoch < 30 else 1.0),
    ],
    ids=["weight decay", "betas", "eps"],
)
def test_options_of_an_optimiser_that_change_during_a_fit_reach_a_captured_step(change):
    x = 2 * torch.randn(100, generator=torch.Generator().manual_seed(0)) + 1
    losses = []
    for compile in (False, "auto"):
        pyro.clear_param_store()
        net = torch.nn.Linear(1, 2)
        with torch.no_grad():
            net.weight.fill_(0.3), net.bias.fill_(0.1)

        def amortized(x, net=net):
            pyro.module("net", net)
            loc, log_scale = net(x[:, None]).T
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, log_scale.exp()))

        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        history = pv.fit(
            model, amortized, x, optimizer=optimizer, epochs=70, batch_size=10, seed=0, progress=False, compile=compile,
            callback=lambda record, group=optimizer.param_groups[0]: change(group, record["epoch"]),
        )  # fmt: skip
        losses.append(history["loss"])
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)


SEEN = torch.tensor([True, False, True, False])
BOUNDS = {
    "fit": lambda m, g: pv.fit(m, g, (X, SEEN), epochs=1, progress=False, seed=0),
    "elbo_terms": lambda m, g: pv.elbo_terms(m, g, (X, SEEN), num_samples=10),
    "log_likelihood": lambda m, g: pv.log_likelihood(m, g, (X, SEEN), num_samples=10),
    "kl_per_dimension": lambda m, g: pv.kl_per_dimension(m, g, (X, SEEN)),
    "Objective": lambda m, g: pv.fit(m, g, (X, SEEN), loss=pv.Objective(), epochs=1, progress=False, seed=0),
}


def masked_pair(prior, posterior, inside=False):
    """z and x under masks, each a function of what was seen; the exact posterior where x was, the prior where not."""

    def put(mask, name, fn, **given):
        if inside:
            return pyro.sample(name, fn if mask is None else fn.mask(mask), **given)
        with poutine.mask(mask=mask) if mask is not None else contextlib.nullcontext():
            return pyro.sample(name, fn, **given)

    def first(x, seen):
        with pyro.plate("data", len(x)):
            z = put(prior(seen), "z", dist.Normal(0.0, 1.0))
            put(seen, "x", dist.Normal(z, 1.0), obs=x)

    def second(x, seen):
        scale = pyro.param("scale", torch.tensor(0.5**0.5))
        with pyro.plate("data", len(x)):
            put(posterior(seen), "z", dist.Normal(torch.where(seen, x / 2, 0.0), torch.where(seen, scale, 1.0)))

    return first, second


def without(seen):
    return None


APART = {
    "prior only": (lambda seen: seen, without),
    "opposite": (lambda seen: seen, lambda seen: ~seen),
    "guide nowhere": (without, lambda seen: False),
    "prior nowhere": (lambda seen: False, without),
}


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("masks", APART)
@pytest.mark.parametrize("run", BOUNDS)
def test_a_latent_that_is_masked_in_one_program_only_has_no_bound(run, masks, inside):
    with pytest.raises(
        ValueError, match="latent site 'z' is masked in one way by the model and in another by the guide"
    ):
        BOUNDS[run](*masked_pair(*APART[masks], inside))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize(
    "masks",
    [
        (without, without),
        (lambda seen: seen, lambda seen: seen.clone()),
        (lambda seen: True, without),
        (without, lambda seen: torch.ones_like(seen)),
        (lambda seen: seen, lambda seen: seen & torch.ones(1, dtype=torch.bool)),
    ],
)
def test_masks_that_are_the_same_in_both_programs_leave_the_evidence_of_what_was_seen(masks, inside):
    want = torch.where(SEEN, dist.Normal(0.0, 2**0.5).log_prob(X), 0.0).mean().item()
    for run, bound in BOUNDS.items():
        pyro.clear_param_store()
        found = bound(*masked_pair(*masks, inside))
        if run in ("elbo_terms", "log_likelihood"):
            assert found.value == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("inside, theirs", [(True, False), (False, True)])
def test_masks_are_compared_by_value_wherever_they_are_put(inside, theirs):
    first, _ = masked_pair(lambda seen: seen, without, inside)
    _, second = masked_pair(without, lambda seen: seen, theirs)
    for bound in BOUNDS.values():
        bound(first, second)


def test_a_mask_that_a_latent_decides_is_compared_at_the_same_latent():
    def both(x, seen, loc, scale, **given):
        with pyro.plate("data", len(x)):
            on = pyro.sample("on", dist.Bernoulli(torch.full((len(x),), 0.5)))
            with poutine.mask(mask=on > 0):
                z = pyro.sample("z", dist.Normal(torch.as_tensor(loc), scale))
            if given:
                pyro.sample("x", dist.Normal(torch.where(on > 0, z, 0.0), 1.0), **given)

    def scale():
        return pyro.param("width", torch.tensor(0.7))

    first, second = lambda x, seen: both(x, seen, 0.0, 1.0, obs=x), lambda x, seen: both(x, seen, x / 2, scale())
    for seed in range(3):
        pv.log_likelihood(first, second, (X, SEEN), num_samples=10, seed=seed)
        pv.fit(first, second, (X, SEEN), loss=pv.Objective(estimator="score-function", num_samples=2), epochs=1,
               learning_rate=1e-30, progress=False, seed=seed)  # fmt: skip


@pytest.mark.parametrize("run", BOUNDS)
def test_what_was_not_observed_is_drawn_under_its_mask(run):
    def first(x, seen):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(0.0, 1.0)), 1.0), obs=x, obs_mask=seen)

    def second(x, seen, mask):
        scale = pyro.param("scale", torch.tensor(0.5**0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.where(seen, x / 2, 0.0), torch.where(seen, scale, 1.0)))
            with poutine.mask(mask=~seen if mask else True):
                pyro.sample("x_unobserved", dist.Normal(z, 1.0))

    with pytest.raises(ValueError, match=r"'x_unobserved' is masked .*with poutine.mask\(mask=~obs_mask\)"):
        BOUNDS[run](first, lambda x, seen: second(x, seen, False))
    pyro.clear_param_store()
    found = BOUNDS[run](first, lambda x, seen: second(x, seen, True))
    if run in ("elbo_terms", "log_likelihood"):
        want = torch.where(SEEN, dist.Normal(0.0, 2**0.5).log_prob(X), 0.0).mean().item()
        assert found.value == pytest.approx(want, abs=1e-5)
