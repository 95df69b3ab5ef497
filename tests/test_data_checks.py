"""No row enters a number before it was looked at: supports, NaN, and where a loss that is not finite came from."""

import math
import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_vae.data.splits import Split
from pyro_vae.inference.batches import Batches
from pyro_vae.inference.bounds import iwae
from pyro_vae.inference.objectives import Objective, mean_bound
from pyro_vae.inference.rehearsal import diagnosis
from pyro_vae.inference.training import fit
from pyro_vae.judging.anomalies import anomaly_scores
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.programs.vae import VAE


def pair_of(likelihood, size=4, **options):
    torch.manual_seed(0)
    vae = VAE.build((size,), latent_dim=2, hidden=(8,), likelihood=likelihood, **options)
    return vae.model, vae.guide


def ones(rows=300, size=4):
    return torch.bernoulli(torch.full((rows, size), 0.4), generator=torch.Generator().manual_seed(0))


def counts(rows=300, size=4):
    return torch.poisson(torch.full((rows, size), 2.0), generator=torch.Generator().manual_seed(0))


def with_row(x, value, row=257, column=2):
    x = x.clone()
    x[row, column] = value
    return x


# likelihood, data, the value that it cannot have, what is said of it
OUTSIDE = {
    "bytes under a bernoulli": ("bernoulli", ones, 255.0, r"wanted \[0, 1\].*x / 255"),
    "0..16 under a bernoulli": ("bernoulli", ones, 16.0, r"wanted \[0, 1\].*x / 16"),
    "[-1, 1] under a bernoulli": ("bernoulli", ones, -1.0, r"wanted \[0, 1\].*\(x \+ 1\) / 2"),
    "continuous bernoulli": ("continuous-bernoulli", ones, 1.5, r"wanted \[0, 1\]"),
    "discretized logistic": ("discretized-logistic", ones, 0.335, "wanted grey levels v / 255"),
    "logistic mixture": ("logistic-mixture", ones, 2.0, "wanted grey levels v / 255"),
    "categorical": ("categorical", ones, -0.5, "wanted grey levels v / 255"),
    "a sentinel among counts": ("poisson", counts, -1.0, "wanted counts.*missing value, pass a mask"),
    "a normalised row": ("negative-binomial", counts, 0.37, "wanted counts.*neither normalised nor log-transformed"),
}


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_row_outside_the_support_is_found_wherever_it_stands(name):
    likelihood, make, value, text = OUTSIDE[name]
    x = make()
    fit(*pair_of(likelihood), x, epochs=1, batch_size=50, seed=0, progress=False)  # such data are fine
    wrong = with_row(x, value)
    said = rf"row 257, column 2 of the data is {value:g}, outside the support of the likelihood.*{text}"
    for seed in (0, 1):
        with pytest.raises(ValueError, match=said):
            fit(*pair_of(likelihood), wrong, epochs=1, batch_size=50, seed=seed, progress=False)
    with pytest.raises(ValueError, match=said):
        fit(*pair_of(likelihood), x, validation=wrong, epochs=1, progress=False)
    for estimate in (log_likelihood, elbo_terms, mean_bound, anomaly_scores):
        with pytest.raises(ValueError, match=said):
            estimate(*pair_of(likelihood), wrong)


def test_batches_of_a_loader_are_looked_at_as_they_come():
    x = with_row(ones(), 255.0)
    loader = DataLoader(TensorDataset(x), batch_size=50)
    with pytest.raises(
        ValueError, match=r"row 7 of batch 5 \(row 257 as they came\), column 2 of the data is 255, outside"
    ):
        fit(*pair_of("bernoulli"), loader, epochs=1, progress=False)
    with pytest.raises(ValueError, match="row 7 of batch 5"):
        log_likelihood(*pair_of("bernoulli"), loader, num_samples=3)

    class Items(torch.utils.data.Dataset):
        def __len__(self):
            return len(x)

        def __getitem__(self, i):
            return {"x": x[i]}

    def model(batch):
        with pyro.plate("data", len(batch["x"])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Bernoulli(logits=z.unsqueeze(-1).expand(*z.shape, 4)).to_event(1), obs=batch["x"])

    net = nn.Linear(4, 1)

    def guide(batch):
        pyro.module("net", net)
        with pyro.plate("data", len(batch["x"])):
            pyro.sample("z", dist.Normal(net(batch["x"])[:, 0], 1.0))

    with pytest.raises(
        ValueError, match="row 257, field 'x', column 2 of the data is 255, outside.*Bernoulli, site 'x'"
    ):
        fit(model, guide, Items(), epochs=1, batch_size=50, progress=False, seed=0)


def test_a_mask_excuses_what_it_hides_and_nothing_else():
    x = with_row(counts(), -1.0)
    mask = torch.ones_like(x, dtype=torch.bool)
    with pytest.raises(ValueError, match="row 257, column 2 of the data is -1, outside the support"):
        fit(*pair_of("poisson"), (x, mask), epochs=1, batch_size=50, progress=False)
    mask[257, 2] = False
    first = fit(*pair_of("poisson"), (x, mask), epochs=1, batch_size=50, seed=0, progress=False)
    second = fit(*pair_of("poisson"), (with_row(x, math.nan), mask), epochs=1, batch_size=50, seed=0, progress=False)
    assert first["loss"] == second["loss"]
    with pytest.raises(ValueError, match="row 3, column 1 of the data is 0.37"):
        fit(*pair_of("poisson"), (with_row(x, 0.37, 3, 1), mask), epochs=1, batch_size=50, progress=False)


def masking_pair(hide):
    """A pair that masks for itself: missing values by NaN, or by a sentinel."""
    net = nn.Linear(4, 2)

    def model(x):
        seen = hide(x)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)).unsqueeze(-1)
            rate = z.exp().expand(*z.shape[:-1], 4)
            pyro.sample(
                "x", dist.Poisson(rate, validate_args=False).mask(seen).to_event(1), obs=x.where(seen, x.new_zeros(()))
            )

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            loc, scale = net(x.where(hide(x), x.new_zeros(())) / 10).unbind(-1)
            pyro.sample("z", dist.Normal(loc / 10, scale.exp()))

    return model, guide


@pytest.mark.parametrize("value, hide", [(math.nan, lambda x: ~x.isnan()), (-1.0, lambda x: x >= 0)])
def test_a_pair_that_masks_for_itself_is_believed(value, hide):
    x = with_row(counts(), value)
    torch.manual_seed(0)
    assert math.isfinite(fit(*masking_pair(hide), x, epochs=1, batch_size=50, seed=0, progress=False)["loss"][0])
    with pytest.raises(ValueError, match="row 3, column 1 of the data is"):
        fit(*masking_pair(hide), with_row(x, 0.5, 3, 1), epochs=1, batch_size=50, progress=False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("likelihood", ["normal", "bernoulli", "poisson"])
def test_what_is_not_finite_is_named(value, likelihood):
    x = with_row(ones(), value)
    with pytest.raises(ValueError, match=f"row 257, column 2 of the data is {value}[;,].*wanted"):
        fit(*pair_of(likelihood), x, epochs=1, batch_size=50, progress=False)
    with pytest.raises(ValueError, match=f"row 257, column 2 of the data is {value}"):
        log_likelihood(*pair_of(likelihood), x, num_samples=3)


def test_the_column_of_a_table_is_named_and_what_overflows_too():
    table = pd.DataFrame(np.zeros((20, 4)), columns=["age", "height", "weight", "dose"])
    table.loc[13, "weight"] = np.nan
    with pytest.raises(ValueError, match="row 13, column 'weight' of the data is nan; wanted a finite number"):
        fit(*pair_of("normal"), table, epochs=1, progress=False)
    table.loc[13, "weight"] = 1e300
    with pytest.raises(
        ValueError, match="row 13, column 'weight' of the data is inf.*too large for the model's floats"
    ):
        fit(*pair_of("normal"), table, epochs=1, progress=False)


def test_covariates_are_looked_at_as_well():
    net = nn.Linear(1, 1)

    def model(x, y):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + net(y[:, None])[:, 0], 1.0), obs=x)

    def guide(x, y):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("a", torch.zeros(())) * x, 1.0))

    x, y = torch.zeros(20), torch.zeros(20)
    y[11] = math.nan
    with pytest.raises(ValueError, match="row 11, argument 1 of the data is nan"):
        fit(model, guide, (x, y), epochs=1, progress=False)


def test_a_support_that_differs_between_data_is_not_that_of_others():
    """Binomial counts out of a total of their own: the first row's total says nothing about the second's."""
    net = nn.Linear(2, 1)

    def model(x, total):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Binomial(total, logits=z), obs=x)

    def guide(x, total):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(torch.stack([x, total], -1) / 10)[:, 0], 1.0))

    total = torch.arange(1.0, 41.0)
    fit(model, guide, (total - 1, total), epochs=1, batch_size=7, progress=False)
    with pytest.raises(ValueError, match="row 30 of the data is 0.5, outside the support.*Binomial"):
        fit(
            model,
            guide,
            ((total - 1).where(total != 31, torch.tensor(0.5)), total),
            epochs=1,
            batch_size=7,
            progress=False,
        )


def test_grey_values_are_scored_and_said():
    with pytest.warns(UserWarning, match="site 'x' is Bernoulli but its data have grey values"):
        fit(*pair_of("bernoulli"), 0.9 * ones(), epochs=1, progress=False)
    with pytest.warns(UserWarning, match="have grey values.*row 257, column 2 of the data is 0.5"):
        fit(*pair_of("bernoulli"), with_row(ones(), 0.5), epochs=1, batch_size=50, progress=False)
    mask = torch.ones(300, 4, dtype=torch.bool)
    with pytest.warns(UserWarning, match="site 'x' is Bernoulli but its data have grey values"):
        fit(*pair_of("bernoulli"), (0.9 * ones(), mask), epochs=1, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(*pair_of("bernoulli"), ones(), epochs=1, progress=False)


def test_splits_are_right_by_construction_or_looked_at():
    grey = torch.randint(256, (300, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pair = pair_of("bernoulli")
    state = torch.get_rng_state()
    Batches(Split(grey, binarization="dynamic"), 50, programs=pair)
    assert torch.equal(torch.get_rng_state(), state)
    one = fit(*pair_of("bernoulli"), Split(grey, binarization="dynamic"), epochs=1, seed=3, progress=False)
    two = fit(*pair_of("bernoulli"), Split(grey, binarization="dynamic"), epochs=1, seed=3, progress=False)
    assert one["loss"] == two["loss"]
    fit(*pair_of("discretized-logistic"), Split(grey), epochs=1, progress=False)
    with pytest.raises(ValueError, match="wanted counts.*levels=256"):
        fit(*pair_of("poisson"), Split(grey), epochs=1, progress=False)
    with pytest.raises(ValueError, match="row 257, column 2 of the data is 7, outside"):
        fit(*pair_of("bernoulli"), Split(with_row(ones(), 7.0)), epochs=1, batch_size=50, progress=False)


def test_the_look_costs_no_random_number_and_no_step():
    x = ones()
    looked = []
    model, guide = pair_of("bernoulli")
    batches = Batches(x, 50, programs=(model, guide))
    batches._check = lambda *args: looked.append(args)
    for _ in batches:
        pass
    assert not looked and not batches._each
    by_hand = pair_of("bernoulli")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        optimizer = torch.optim.Adam([p for program in by_hand for p in program.parameters()], lr=1e-3)
        total = 0.0
        for index in torch.randperm(300).split(50):
            optimizer.zero_grad()
            total += pyro.infer.Trace_ELBO().loss_and_grads(*by_hand, x[index])
            optimizer.step()
    history = fit(*pair_of("bernoulli"), x, epochs=1, batch_size=50, seed=5, progress=False)
    assert history["loss"][0] == pytest.approx(total / 300, rel=1e-6)


# Where a loss that is not finite came from

pytestmark = pytest.mark.filterwarnings("ignore:Encountered NaN")


def test_data_on_a_scale_of_their_own_are_named_at_step_0():
    x = 1e20 * torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match=r"became (inf|nan) at step 0\..*data are unscaled: they lie in \[-.*e\+20"):
        fit(*pair_of("normal", standardize=False), x, epochs=1, seed=0, progress=False)


def collapsing(site):
    """A pair one of whose scales goes to zero at the rows where x is 9."""
    net = nn.Linear(1, 1)

    def scale(x, where):
        return torch.where((x == 9) & (where == site), torch.tensor(0.0), torch.tensor(1.0))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), scale(x, "prior"), validate_args=False))
            pyro.sample("x", dist.Normal(z, scale(x, "likelihood"), validate_args=False), obs=x)

    def guide(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x[:, None])[:, 0], scale(x, "q"), validate_args=False))

    return model, guide, net


@pytest.mark.parametrize("site, text", [
    ("q", r"Site 'z' of the guide \(Normal, q\)"),
    ("prior", r"Site 'z' of the model \(Normal, prior\)"),
    ("likelihood", r"Site 'x' of the model \(Normal, likelihood\)"),
])  # fmt: skip
def test_the_site_and_the_rows_are_named_and_the_parameters_are_not_spoilt(site, text):
    x = torch.zeros(40)
    x[[17, 31]] = 9.0
    model, guide, net = collapsing(site)
    with pytest.raises(ValueError, match=rf"the loss became (inf|nan|-inf) at step 0\..*{text}.*rows? (17|31)"):
        fit(model, guide, x, epochs=1, batch_size=40, seed=0, progress=False)
    assert all(bool(torch.isfinite(p).all()) for p in net.parameters())
    said = diagnosis(math.nan, 3, (model, guide), (x[20:],), torch.arange(20, 40))
    assert "at step 3. Lower learning_rate" in said and "row 31 of the data" in said


def test_the_parameter_that_blew_up_first_is_named():
    model, guide = pair_of("normal")
    with torch.no_grad():
        next(p for name, p in guide.named_parameters() if name.endswith("bias"))[1] = math.inf
    with pytest.raises(ValueError, match="Parameter '.*bias' is not finite"):
        fit(model, guide, torch.randn(20, 4), epochs=1, seed=0, progress=False)
    with pytest.raises(ValueError, match=r"became (nan|inf) at step [1-9]\. Lower learning_rate"):
        fit(*pair_of("normal", standardize=False), torch.randn(20, 4), optimizer=torch.optim.SGD, learning_rate=1e8, batch_size=10, epochs=5,
            seed=0, loss=Objective(iwae, 5), progress=False)  # fmt: skip


def test_a_single_datum_without_a_dimension_in_front_is_not_scored_as_many():
    decoder, encoder = torch.nn.Linear(2, 10), torch.nn.Linear(10, 4)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        loc, log_scale = encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))

    x = torch.arange(10.0) / 10
    for run in (lambda: fit(model, guide, x, epochs=1, progress=False), lambda: elbo_terms(model, guide, x)):
        with pytest.raises(ValueError, match=r"data of shape \(10,\).*shape \(10,\); wanted .*x\[None\]"):
            run()
    assert elbo_terms(model, guide, x[None]).pointwise.shape == (1,)


def bernoulli_pair(change=lambda x: x, **options):
    """A pair as Pyro users write it, with Pyro's own Bernoulli."""
    encoder, decoder = nn.Linear(4, 4), nn.Linear(2, 4)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z), **options).to_event(1), obs=change(x))

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            loc, scale = encoder(x / 255).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))

    return model, guide


RUNS = {
    "fit": lambda pair, x: fit(*pair, x, epochs=1, batch_size=50, progress=False),
    "log_likelihood": lambda pair, x: log_likelihood(*pair, x, num_samples=2, seed=0),
}


@pytest.mark.parametrize("row", [0, 257, slice(None)], ids=["first", "late", "all"])
@pytest.mark.parametrize("run", RUNS)
def test_pyros_own_bernoulli_refuses_grey_values_in_any_row(run, row):
    x = (torch.rand(300, 4, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    x[row] = 0.25
    at = 0 if isinstance(row, slice) else row
    with pytest.raises(ValueError, match=f"row {at}, column 0 of the data is 0.25, .*wanted 0 or 1. Binarize"):
        RUNS[run](bernoulli_pair(), x)
    with pytest.warns(UserWarning, match="site 'x' is Bernoulli but its data have grey values") as said:
        RUNS[run](bernoulli_pair(validate_args=False), x)
    assert sum("grey" in str(w.message) for w in said) == 1


@pytest.mark.parametrize("run", RUNS)
def test_what_a_program_makes_of_the_data_is_looked_at_too(run):
    x = torch.randint(256, (300, 4), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="site 'x' .Bernoulli. observes 0.*made of the data.*wanted 0 or 1"):
        RUNS[run](bernoulli_pair(lambda x: x / 255), x)
    with pytest.warns(UserWarning, match="site 'x' is Bernoulli but its data have grey values"):
        RUNS[run](bernoulli_pair(lambda x: x / 255, validate_args=False), x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RUNS[run](bernoulli_pair(lambda x: (x > 127).float()), x)


def test_truth_values_of_a_wrong_shape_are_refused_for_their_shape():
    with pytest.raises(ValueError, match="got data of shape|does not run on a batch of the data"):
        fit(*pair_of("normal", 3), torch.ones(3, 4, dtype=torch.bool), epochs=1, progress=False)


@pytest.mark.parametrize("likelihood, value", [("bernoulli", 0.4), ("poisson", -1.0), ("normal", math.nan)])
@pytest.mark.filterwarnings("ignore:drawing .* one by one")  # the mask has no leading dimension
def test_what_a_models_own_mask_leaves_out_is_not_refused(likelihood, value):
    """The mask comes as data; Pyro's own validation looks before it masks."""
    families = {"bernoulli": lambda z: dist.Bernoulli(logits=z), "poisson": lambda z: dist.Poisson(z.exp()),
                "normal": lambda z: dist.Normal(z, 1.0)}  # fmt: skip

    def model(x, mask):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0)).unsqueeze(-1)
            pyro.sample("x", families[likelihood](z.expand(len(x), 6)).mask(mask).to_event(1), obs=x)

    def guide(x, mask):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("shift", torch.tensor(0.1)), 1.0))

    x = torch.bernoulli(torch.full((20, 6), 0.5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(20, 6, dtype=torch.bool)
    mask[3, 2] = False
    losses, values = [], []
    for hidden in (x[3, 2].item(), value):
        x[3, 2] = hidden
        pyro.clear_param_store()
        options = {"epochs": 2, "batch_size": 10, "progress": False, "seed": 0}
        if math.isnan(hidden):  # a gradient through what is masked is NaN in torch
            with pytest.raises(ValueError, match=r"A mask leaves out .*x.where\(mask, 0\)"):
                fit(model, guide, (x, mask), **options)
            pyro.clear_param_store()
            fit(model, guide, (x.where(mask, torch.zeros(())), mask), **options)
        else:
            losses.append(fit(model, guide, (x, mask), **options)["loss"])
        values.append(log_likelihood(model, guide, (x, mask), num_samples=10, seed=0).value)
    assert losses[0] == pytest.approx(losses[-1])
    assert values[0] == pytest.approx(values[-1])
