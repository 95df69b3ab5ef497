"""Data that draw as they are looked at: all functions of one seed score one draw."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Subset

import pyro_vae as pv
from pyro_vae.data import Split
from pyro_vae.inference.bounds import elbo
from pyro_vae.inference.objectives import mean_bound
from pyro_vae.judging.anomalies import anomaly_scores
from pyro_vae.judging.estimates import elbo_terms, log_likelihood, rate_distortion

QUIET = {"progress": False, "compile": False}
RAMP = torch.linspace(0, 0.4, 16).reshape(1, 4, 4)
PIXELS = torch.randint(0, 256, (300, 1, 4, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def seen_by(function, data, **options):
    """The data that a function scores, as the model sees them, in the order of the rows."""
    seen = {}

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(RAMP + 0 * z[..., :1, None, None], 0.1).to_event(3), obs=x)
            seen.setdefault(len(seen), x.detach().clone())

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    torch.manual_seed(options.pop("outside", 5))
    found = function(model, guide, data, **options)
    return seen, found


@pytest.mark.parametrize("options", [{"binarization": "dynamic"}, {"dequantize": True}])
def test_an_unfrozen_split_is_one_draw_for_all_who_score_it(options):
    split = Split(PIXELS, **options)
    wanted = split.frozen(3)[:]
    level = dist.Normal(RAMP, 0.1).log_prob(wanted).flatten(1).sum(1)
    scores = {
        "log_likelihood": seen_by(log_likelihood, split, num_samples=700, seed=3, **QUIET)[1].pointwise,
        "elbo_terms": seen_by(elbo_terms, split, num_samples=7, seed=3, outside=9, **QUIET)[1].pointwise,
        "rate_distortion": -seen_by(rate_distortion, split, num_samples=3, seed=3, **QUIET)[1].distortion.pointwise,
        "anomaly_scores": -seen_by(anomaly_scores, split, num_samples=3, seed=3, **QUIET)[1],
        "columns": seen_by(log_likelihood, (split,), num_samples=30, seed=3, **QUIET)[1].pointwise,
    }
    for name, found in scores.items():
        assert torch.allclose(found, level.double(), rtol=1e-5, atol=1e-3), name
    _, mean = seen_by(mean_bound, split, bound=elbo, num_samples=2, batch_size=7, seed=3)
    assert mean == pytest.approx(level.mean().item(), rel=1e-5)
    other = seen_by(log_likelihood, split, num_samples=30, seed=4, **QUIET)[1].pointwise
    assert (other - level.double()).abs().max() > 0.1  # of the noise alone
    part = seen_by(elbo_terms, Subset(split, [5, 2]), num_samples=3, seed=3, **QUIET)[1].pointwise
    assert torch.allclose(part, level[[5, 2]].double(), rtol=1e-5, atol=1e-3)


class Noisy(Dataset):
    """Items that are drawn anew at each look."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return index + torch.rand(1, 4, 4)


def test_a_loader_that_draws_gives_all_functions_the_same_batches():
    loader = DataLoader(Noisy(), batch_size=8, shuffle=True)
    one = seen_by(log_likelihood, loader, num_samples=400, seed=1, outside=2, **QUIET)[1].pointwise
    two = seen_by(elbo_terms, loader, num_samples=3, seed=1, outside=3, **QUIET)[1].pointwise
    assert torch.allclose(one, two, rtol=1e-5) and len(one.unique()) == 40
    other = seen_by(elbo_terms, loader, num_samples=3, seed=2, **QUIET)[1].pointwise
    assert not torch.allclose(one, other, rtol=1e-3)


def test_what_draws_nothing_and_no_seed_stay_as_they_are():
    split = Split(PIXELS, binarization="threshold")
    from pyro_vae.inference.batches import one_draw

    assert one_draw(split, 0) is split and one_draw(PIXELS, 0) is PIXELS
    drawn = Split(PIXELS, binarization="dynamic")
    assert one_draw(drawn, None) is drawn and pv.load is not None
