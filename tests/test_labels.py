"""Labels of conditional and semi-supervised pairs: class numbers or one-hot, and never what is neither."""

import pyro
import pytest
import torch
from pyro.infer import TraceEnum_ELBO

import pyro_vae as pv
from pyro_vae.parts.posteriors import DiagonalNormal
from pyro_vae.programs.zoo import Conditional, Joined, SemiSupervised
from pyro_vae.programs.zoo.assembly import class_check


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


X = torch.bernoulli(torch.full((60, 6), 0.5, dtype=torch.float32), generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(2))


def conditional(prior=False) -> Conditional:
    torch.manual_seed(3)
    return Conditional.build((6,), 3, latent_dim=2, hidden=(8,), conditional_prior=prior)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.int16])
def test_class_numbers_are_their_one_hot_rows(prior, dtype):
    pair, hot, y = conditional(prior), torch.eye(3)[Y], Y.to(dtype)
    for call in (pv.elbo_terms, pv.log_likelihood):
        found, wanted = (
            call(pair.model, pair.guide, (X, given), num_samples=7, progress=False).pointwise for given in (y, hot)
        )
        assert torch.equal(found, wanted)
    assert torch.equal(pair.posterior(X, y).mean, pair.posterior(X, hot).mean)
    assert torch.equal(pair.reconstruct(X, y), pair.reconstruct(X, hot))
    torch.manual_seed(1)
    drawn = pair.sample(y)
    torch.manual_seed(1)
    assert torch.equal(drawn, pair.sample(hot))
    bounds = []
    for given in (y, hot):
        pair = conditional(prior)
        bounds.append(
            pv.fit(pair.model, pair.guide, (X, given), epochs=3, batch_size=20, progress=False, seed=0)["bound"]
        )
    assert bounds[0] == bounds[1]


def test_class_numbers_train_the_same_captured_and_as_rows():
    bounds = []
    for y, compile in ((Y, "auto"), (torch.eye(3)[Y], False)):  # 510 steps, which "auto" captures
        pair = conditional()
        options = {"epochs": 51, "batch_size": 6, "progress": False, "seed": 0, "compile": compile}
        bounds.append(pv.fit(pair.model, pair.guide, (X, y), **options)["bound"])
    assert bounds[0] == pytest.approx(bounds[1], rel=1e-3)


@pytest.mark.parametrize("make", ["conditional", "semi-supervised"])
@pytest.mark.parametrize(
    ("shift", "text"),
    [(1, r"got labels from 1 to 3 \(row \d+ is 3\), wanted classes 0, ..., 2.*They count from 1: pass"),
     (5, r"got labels from 5 to 7 .*wanted classes 0, ..., 2.*num_classes=8")],
)  # fmt: skip
def test_labels_that_no_class_has_are_refused_before_a_step_and_by_every_estimate(make, shift, text):
    y = Y + shift
    if make == "conditional":
        pair, loss = conditional(), None
    else:
        pair, loss = SemiSupervised.build((6,), 3, latent_dim=2, hidden=(8,)), TraceEnum_ELBO(max_plate_nesting=1)
        y[::3] = -1
    before = [p.detach().clone() for p in pair.parameters()]
    with pytest.raises(ValueError, match=text):
        pv.fit(pair.model, pair.guide, (X, y), loss=loss, epochs=1, batch_size=7, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, pair.parameters(), strict=True))
    for call in (pv.elbo_terms, pv.log_likelihood):
        with pytest.raises(ValueError, match="wanted classes 0, ..., 2"):
            call(pair.model, pair.guide, (X, y), num_samples=3, progress=False)


def test_a_label_in_the_last_row_only_is_found_and_its_row_named():
    y = Y.clone()
    y[-1] = 3
    pair = conditional()
    with pytest.raises(ValueError, match=r"got labels from 0 to 3 \(row 59 is 3\)"):
        pv.fit(pair.model, pair.guide, (X, y), epochs=1, batch_size=7, progress=False)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, y), 20)
    with pytest.raises(ValueError, match=r"\(row 19 is 3\)"):
        pv.fit(pair.model, pair.guide, loader, epochs=1, progress=False)


def test_a_missing_label_is_for_the_semi_supervised_pair():
    pair, y = conditional(), Y.clone()
    y[4] = -1
    with pytest.raises(ValueError, match=r"row 4 is -1.*is for SemiSupervised"):
        pv.fit(pair.model, pair.guide, (X, y), epochs=1, progress=False)
    semi = SemiSupervised.build((6,), 3, latent_dim=2, hidden=(8,))
    loss = TraceEnum_ELBO(max_plate_nesting=1)
    assert len(pv.fit(semi.model, semi.guide, (X, y), loss=loss, epochs=1, progress=False)) == 1


@pytest.mark.parametrize(
    ("x", "y", "text"),
    [
        (
            X[:3],
            torch.tensor([0.0, 1.0, 0.0]),
            r"got labels y of shape \(3,\) and dtype torch.float32 for 3 data.*y.long\(\)",
        ),
        (X, torch.zeros(60, 2), r"shape \(60, 2\).*wanted one row each, \(60, 3\)"),
        (X, Y[:, None], r"shape \(60, 1\).*pass y\[:, 0\]"),
        (X, Y[:9], "got 60 data and 9 labels"),
        (X, torch.tensor(1), "got 60 data and no row of labels"),
        (X, Y > 0, r"dtype torch.bool for 60 data.*y.long\(\)"),
    ],
)
def test_shapes_of_labels_are_checked_and_not_their_lengths(x, y, text):
    pair = conditional()
    for program in (pair.model, pair.guide):
        with pytest.raises(ValueError, match=text):
            program(x, y)


def test_one_vector_is_never_one_row_for_all():
    part = Joined(DiagonalNormal(torch.nn.Linear(2 + 3, 8), 4))
    with pytest.raises(ValueError, match=r"got y of shape \(3,\) beside \(3, 2\).*a vector would be one row for all"):
        part(torch.zeros(3, 2), torch.ones(3))
    classes = Joined(DiagonalNormal(torch.nn.Linear(2 + 3, 8), 4), num_classes=3)
    with pytest.raises(ValueError, match=r"got labels of dtype torch.float32.*y.argmax\(-1\)"):
        classes(torch.zeros(3, 2), torch.eye(3))


def test_a_number_of_each_datum_is_a_row_of_one():
    pair = Conditional.build((6,), 1, latent_dim=2, hidden=(8,))
    y = torch.randn(60)
    assert torch.equal(pair.posterior(X, y).mean, pair.posterior(X, y[:, None]).mean)


def test_where_values_cannot_be_read_a_label_that_is_no_class_is_nan_and_not_no_class():
    from torch.fx.experimental.proxy_tensor import make_fx

    from pyro_vae.programs.zoo.assembly import one_hot

    graph = make_fx(lambda y: one_hot(y, 3) * 1.0)(torch.tensor([0, 1]))
    assert torch.equal(graph(torch.tensor([2, 0])), torch.tensor([[0.0, 0, 1], [1, 0, 0]]))
    assert graph(torch.tensor([3, 0])).isnan().tolist() == [[True] * 3, [False] * 3]


def test_all_labels_unknown_are_fine_and_less_than_that_is_not():
    class_check(torch.full((3,), -1), 4, unknown=True)
    with pytest.raises(ValueError, match=r"row 1 is -2\), wanted classes 0, ..., 3, -1 where unknown"):
        class_check(torch.tensor([-1, -2]), 4, unknown=True)
    pyro.clear_param_store()
