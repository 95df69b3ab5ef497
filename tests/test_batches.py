"""Data as people hold them: each container gives the rows that NumPy says it holds, and what is no argument is said."""

import functools
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import scipy.sparse as sp
import torch
import torchvision
from pyro import poutine
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, TensorDataset, random_split

from pyro_vae.data.splits import Split
from pyro_vae.inference.arguments import arguments_of
from pyro_vae.inference.batches import Batches, one_draw
from pyro_vae.inference.objectives import mean_bound
from pyro_vae.inference.training import fit
from pyro_vae.inference.trees import joined, rows, values
from pyro_vae.judging.anomalies import anomaly_scores
from pyro_vae.judging.estimates import elbo_terms, log_likelihood
from pyro_vae.programs.vae import VAE
from pyro_vae.programs.zoo.conditional import Conditional


def vae_of(shape, likelihood="normal", seed=0):
    torch.manual_seed(seed)
    return VAE.build(shape, latent_dim=2, hidden=(8,), likelihood=likelihood)


def pair_of(shape, **options):
    vae = vae_of(shape, **options)
    return vae.model, vae.guide


def all_rows(batches):
    return joined(list(batches))


X = np.random.default_rng(0).normal(size=(20, 5)).astype("float32")
COUNTS = np.random.default_rng(0).poisson(1.0, (20, 5))


class Images(Dataset):
    def __init__(self, x):
        self.x = torch.as_tensor(x)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        assert isinstance(i, int)
        return self.x[i]


class Labelled(Images):
    def __getitem__(self, i):
        return self.x[i], i % 3


class Named(Images):
    def __getitem__(self, i):
        return {"x": self.x[i], "label": i % 3}


def hdf5(x, tmp_path):
    h5py = pytest.importorskip("h5py")
    h5py.File(tmp_path / "x.h5", "w").create_dataset("x", data=x)
    return h5py.File(tmp_path / "x.h5")["x"]


def memory_map(x, tmp_path):
    np.save(tmp_path / "x.npy", x)
    return np.load(tmp_path / "x.npy", mmap_mode="r")


def read_only(x, tmp_path):
    x = x.copy()
    x.flags.writeable = False
    return x


HOLDERS = {
    "array": lambda x, _: x,
    "float64": lambda x, _: x.astype("f8"),
    "float16": lambda x, _: x.astype("f2"),
    "long double": lambda x, _: x.astype(np.longdouble),
    "big-endian": lambda x, _: x.astype(">f4"),
    "Fortran": lambda x, _: np.asfortranarray(x),
    "reversed twice": lambda x, _: np.ascontiguousarray(x[::-1, ::-1])[::-1, ::-1],
    "every second": lambda x, _: np.repeat(x, 2, 0)[::2],
    "read-only": read_only,
    "memory map": memory_map,
    "big-endian memory map": lambda x, p: memory_map(x.astype(">f8"), p),
    "hdf5": hdf5,
    "masked, nothing missing": lambda x, _: np.ma.masked_array(x),
    "objects": lambda x, _: x.astype(object),
    "nested lists": lambda x, _: x.tolist(),
    "list of tensors": lambda x, _: [torch.tensor(r) for r in x],
    "list of arrays": lambda x, _: list(x),
    "frame": lambda x, _: pd.DataFrame(x, columns=list("abcde")),
    "nullable frame": lambda x, _: pd.DataFrame(x).astype("Float64"),
    "csr": lambda x, _: sp.csr_matrix(x),
    "csc array": lambda x, _: sp.csc_array(x),
    "coo": lambda x, _: sp.coo_matrix(x),
    "torch csr": lambda x, _: torch.tensor(x).to_sparse_csr(),
    "torch coo": lambda x, _: torch.tensor(x).to_sparse_coo(),
    "annotated": lambda x, _: SimpleNamespace(X=sp.csr_matrix(x), obs={"cell": list(range(len(x)))}, n_obs=len(x)),
    "dataset": lambda x, _: Images(x),
    "subset": lambda x, _: Subset(TensorDataset(torch.tensor(np.concatenate([x, x]))), list(range(len(x)))),
    "subset of a dataset": lambda x, _: Subset(Images(x), list(range(len(x)))),
    "tensor dataset": lambda x, _: TensorDataset(torch.tensor(x)),
    "loader": lambda x, _: DataLoader(Images(x), batch_size=6),
    "labelled loader": lambda x, _: DataLoader(Labelled(x), batch_size=6),
    "labelled dataset": lambda x, _: Labelled(x),
    "labelled tensors": lambda x, _: (torch.tensor(x), torch.arange(len(x))),
    "loader of arrays": lambda x, _: DataLoader(Images(x), batch_size=6, collate_fn=lambda b: np.stack(b)),
}


@pytest.mark.filterwarnings("ignore:the pair takes")
@pytest.mark.parametrize("name", HOLDERS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")  # torch's, of a holder in the list
def test_every_holder_gives_the_rows_that_it_holds(name, tmp_path):
    model, guide = pair_of((5,))
    batches = Batches(HOLDERS[name](X, tmp_path), 6, shuffle=False, programs=(model, guide))
    (found,) = all_rows(batches)
    assert found.dtype == torch.float32 and [rows(b) for b in batches] == [6, 6, 6, 2]
    exact = name != "float16"
    assert np.allclose(found.numpy(), X, rtol=0 if exact else 1e-3, atol=0 if exact else 1e-3)


def test_holders_give_the_same_fit_and_the_same_estimate_as_a_tensor(tmp_path):
    def score(data):
        model, guide = pair_of((5,))
        history = fit(model, guide, data, epochs=2, batch_size=6, seed=0, progress=False)
        return (
            history["loss"],
            log_likelihood(model, guide, data, num_samples=5).value,
            anomaly_scores(model, guide, data),
        )

    wanted = score(torch.tensor(X))
    for name in ("float64", "big-endian memory map", "frame", "csr", "annotated", "dataset"):
        loss, value, scores = score(HOLDERS[name](X, tmp_path))
        assert loss == wanted[0] and value == wanted[1] and torch.equal(scores, wanted[2]), name


@pytest.mark.parametrize("kind", ["u1", "i1", ">i2", "u2", "u4", "i8", "u8", "f2"])
def test_counts_of_any_type_are_counts(kind):
    model, guide = pair_of((5,), likelihood="poisson")
    (found,) = all_rows(Batches(COUNTS.astype(kind), 6, shuffle=False, programs=(model, guide)))
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), COUNTS)


def test_bytes_are_not_rescaled_and_booleans_are_zeros_and_ones():
    grey = np.arange(40, dtype=np.uint8).reshape(8, 5)
    (found,) = all_rows(Batches(grey, 3, shuffle=False, programs=pair_of((5,))))
    assert np.array_equal(found.numpy(), grey)
    model, guide = pair_of((5,), likelihood="bernoulli")
    (found,) = all_rows(Batches(grey > 20, 3, shuffle=False, programs=(model, guide)))
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), grey > 20)


def test_the_type_is_that_of_the_pairs_parameters():
    vae = vae_of((5,)).double()
    (found,) = Batches(X, 6, programs=(vae.model, vae.guide)).first()
    assert found.dtype == torch.float64

    def model(x):  # a pair without parameters takes tensors as they are, and arrays in torch's default type
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(pyro.sample("z", dist.Normal(x.new_zeros(()), 1.0)), 1.0), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x / 2, 0.5**0.5))

    assert Batches(torch.zeros(4, dtype=torch.float64), 2, programs=(model, guide)).first()[0].dtype == torch.float64
    assert Batches(np.zeros(4), 2, programs=(model, guide)).first()[0].dtype == torch.float32
    half = nn.Linear(1, 1).double()

    def doubles(x):
        pyro.module("half", half)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(half(x[:, None])[:, 0], 1.0))

    assert Batches(torch.zeros(4), 2, programs=(model, doubles)).first()[0].dtype == torch.float64


def test_tokens_stay_whole_numbers_and_labels_too():
    embedding, out = nn.Embedding(9, 4), nn.Linear(2, 7)

    def model(tokens):
        pyro.module("out", out)
        with pyro.plate("data", len(tokens)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            logits = out(z).unsqueeze(-2).expand(*z.shape[:-1], tokens.shape[1], 7)
            pyro.sample("tokens", dist.Categorical(logits=logits).to_event(1), obs=tokens)

    def guide(tokens):
        pyro.module("embedding", embedding)
        with pyro.plate("data", len(tokens)):
            pyro.sample("z", dist.Normal(embedding(tokens).mean(1)[:, :2], 1.0).to_event(1))

    tokens = np.random.default_rng(0).integers(0, 7, (12, 3)).astype(np.int64)
    (found,) = all_rows(Batches(tokens, 5, shuffle=False, programs=(model, guide)))
    assert found.dtype == torch.int64 and np.array_equal(found.numpy(), tokens)
    fit(model, guide, tokens, epochs=1, progress=False)
    tokens[7, 1] = 7
    with pytest.raises(ValueError, match="row 7, column 1 of the data is 7, outside the support.*Categorical"):
        fit(model, guide, tokens, epochs=1, progress=False)
    conditional = Conditional.build((5,), 3, latent_dim=2, hidden=(8,))
    one_hot = torch.eye(3)[torch.arange(20) % 3]
    _, y = Batches(((X > 0), one_hot), 20, programs=(conditional.model, conditional.guide)).first()
    assert torch.equal(y.sort(0).values, one_hot.sort(0).values)


# What is no argument


@pytest.mark.parametrize("data", ["labelled loader", "labelled dataset", "labelled tensors"])
def test_labels_are_left_out_after_one_line_and_never_a_mask(data, tmp_path):
    model, guide = pair_of((5,))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        history = fit(model, guide, HOLDERS[data](X, tmp_path), epochs=3, batch_size=6, seed=0, progress=False)
    said = [str(w.message) for w in said if "left out" in str(w.message)]
    assert len(said) == 1 and "int64 (6,), such as labels" in said[0]
    again = pair_of((5,))
    wanted = fit(*again, HOLDERS[data.replace("labelled ", "").replace("tensors", "tensor dataset")](X, tmp_path),
                 epochs=3, batch_size=6, seed=0, progress=False)  # fmt: skip
    assert history["loss"] == wanted["loss"]


def test_a_mask_is_boolean_and_of_the_datas_shape():
    model, guide = pair_of((5,))
    x, mask = torch.tensor(X), torch.tensor(X) > 0
    taken = Batches((x.masked_fill(~mask, float("nan")), mask), 6, programs=(model, guide)).first()
    assert len(taken) == 2 and taken[1].dtype == torch.bool
    assert len(Batches((x, mask[:, :1].expand_as(x)), 6, programs=(model, guide)).first()) == 2
    for labels in (mask[:, 0], mask[:, :1]):  # a column of labels is no mask, however it stands
        with pytest.raises(ValueError, match=r"boolean column of shape .* beside data of shape \(6, 5\).*expand_as"):
            Batches((x, labels), 6, programs=(model, guide))
    with pytest.raises(ValueError, match="got a mask of dtype torch.float32, wanted torch.bool"):
        fit(model, guide, (x, mask.float()), epochs=1, progress=False)
    missing = np.ma.masked_array(X, X > 0)
    with pytest.raises(ValueError, match=r"masked entries.*\(x.filled\(0\), ~x.mask\)"):
        fit(model, guide, missing, epochs=1, progress=False)
    fit(model, guide, (missing.filled(0), ~missing.mask), epochs=1, progress=False)


def test_what_a_pair_takes_is_read_from_whatever_wraps_it():
    def two(x, y):
        pass

    class Module(nn.Module):
        def forward(self, x, mask=None):
            pass

        def method(self, x):
            pass

    assert arguments_of(two).most == 2 and arguments_of(functools.partial(two, y=1)).names == ("x",)
    assert arguments_of(functools.partial(two, 1)).names == ("y",)
    assert arguments_of(poutine.scale(two, scale=2.0)).required == 2
    assert arguments_of(poutine.block(poutine.scale(Module(), scale=2.0))).masks == {1}
    assert arguments_of(Module().method, Module()).most == 1
    assert arguments_of(lambda *args: None).most == float("inf") and arguments_of(lambda *a: None, two).names == (
        "x",
        "y",
    )
    with pytest.raises(ValueError, match=r"the pair takes 2 arguments \(x, y\).*fit\(model, guide, \(x, y\)\)"):
        Batches(torch.tensor(X), 6, programs=(two,))


def test_a_loader_does_not_set_an_option_of_the_pair():
    def model(x, temperature=1.0):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(0.0, temperature), obs=x)

    data = TensorDataset(torch.zeros(6), torch.arange(6))
    with pytest.raises(ValueError, match="column 1 would be the argument 'temperature'.*whose default is 1.0"):
        Batches(DataLoader(data, batch_size=3), 3, programs=(model,))
    _, given = Batches((torch.zeros(6), torch.ones(6)), 3, programs=(model,)).first()
    assert torch.equal(given, torch.ones(3))


# Dicts and lists


def dict_pair():
    net = nn.Linear(5, 1)

    def model(batch):
        with pyro.plate("data", len(batch["x"])):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1), 1.0).expand([*z.shape, 5]).to_event(1), obs=batch["x"])

    def guide(batch):
        pyro.module("net", net)
        with pyro.plate("data", len(batch["x"])):
            pyro.sample("z", dist.Normal(net(batch["x"])[..., 0], 0.5))

    return model, guide


def test_dicts_are_one_argument_and_numbers_are_per_datum():
    torch.manual_seed(0)
    model, guide = dict_pair()
    loader = DataLoader(Named(X), batch_size=8)
    with torch.no_grad():
        truth = -sum(pyro.infer.Trace_ELBO(num_particles=400).loss(model, guide, b) for b in loader) / 20
    for data in (loader, Named(X), {"x": X, "label": np.arange(20)}):
        history = fit(model, guide, data, epochs=1, batch_size=8, learning_rate=1e-9, seed=0, progress=False)
        terms = elbo_terms(model, guide, data, num_samples=400)
        assert abs(terms.value - truth) < 5 * terms.mc_stderr and len(terms.pointwise) == 20
        assert abs(history["bound"][0] - truth) < 0.6  # one draw a datum
        assert mean_bound(model, guide, data, num_samples=400, batch_size=8) == pytest.approx(truth, abs=0.1)


def test_the_first_column_may_be_the_labels():
    def swapped(program):
        return lambda y, x: program({"x": x})

    torch.manual_seed(0)
    model, guide = dict_pair()
    x, y = torch.tensor(X), torch.arange(20)
    first = elbo_terms(swapped(model), swapped(guide), (y, x), num_samples=50)
    second = elbo_terms(lambda x, y: model({"x": x}), lambda x, y: guide({"x": x}), (x, y), num_samples=50)
    assert first.value == second.value and torch.equal(first.pointwise, second.pointwise)
    assert values((y, x)) == values((x, y)) == 512 and rows((torch.tensor(3), y, {"x": x})) == 20
    assert values((torch.zeros(2), torch.zeros(2, 3, 32, 32))) == 3073 and rows((torch.zeros(2, 9), y, x)) == 20


def test_a_list_is_of_single_data_or_of_batches_or_it_is_refused():
    images = [torch.rand(1, 4, 4) for _ in range(9)]
    programs = pair_of((1, 4, 4))
    assert Batches(images, 4, programs=programs).num_data == 9
    batches = Batches(list(torch.stack(images).split(3)), 4, programs=programs)
    assert batches.num_data is None and [rows(b) for b in batches] == [3, 3, 3]
    for two in ([torch.rand(6, 5), torch.rand(6, 5)], [torch.rand(6, 5), torch.arange(6)]):
        with pytest.raises(ValueError, match="2 tensors of 6 rows each, which could be columns.*torch.stack"):
            fit(*pair_of((5,)), two, epochs=1)
    with pytest.raises(ValueError, match=r"different shapes, \(1, 4, 4\) at 0 and \(1, 5, 5\) at 1; wanted one shape"):
        fit(*programs, [torch.rand(1, 4, 4), torch.rand(1, 5, 5), torch.rand(1, 4, 4)], epochs=1)
    items = Batches([(image, i) for i, image in enumerate(images)], 4, shuffle=False, programs=dict_pair()[:0])
    assert items.num_data == 9 and torch.equal(items.first()[1], torch.arange(4))
    with pytest.raises(ValueError, match="could be single data or batches"):
        Batches(images, 4)


def test_subsets_and_splits_of_datasets_are_data():
    train, test = random_split(TensorDataset(torch.tensor(X), torch.arange(20)), [15, 5],
                               generator=torch.Generator().manual_seed(0))  # fmt: skip
    with pytest.warns(UserWarning, match="left out int64"):
        batches = Batches(test, 2, shuffle=False, programs=pair_of((5,)))
    assert np.array_equal(all_rows(batches)[0].numpy(), X[test.indices]) and batches.num_data == 5
    assert Batches(train, 4).num_data == 15


# What cannot be data


@pytest.mark.parametrize(
    "data, text",
    [
        (pd.DataFrame({"a": [1.0, 2.0], "name": ["x", "y"], "when": pd.to_datetime(["2020", "2021"])}),
         "columns 'name', 'when' are not numeric"),
        (np.array(["a", "b"]), "dtype <U1, wanted integers, booleans or floats"),
        (np.zeros(3, complex), "dtype complex128, wanted integers"),
        (np.array([1.0, None, 2.0], object).reshape(3), "got nan|is nan|object array"),
        (torch.zeros(()), "got data of type Tensor, 0-dimensional"),
        (np.float32(3), "got data of type float32, wanted a tensor"),
        ("text", "got data of type str, wanted a tensor"),
        ({1, 2}, "got data of type set, wanted a tensor"),
        (np.array([[2**63 + 5]], np.uint64), r"got the integer .*, wanted at most 2\*\*63 - 1"),
        (["a", "b", "c"], "wanted numbers"),
        ([[1.0], [1.0, 2.0]], "list that is not of one shape"),
        ({"a": np.zeros(3), "b": np.zeros(4)}, "columns of different lengths"),
        (SimpleNamespace(X=None, obs=0), "X is None"),
        (torch.zeros(3, 5, dtype=torch.complex64), "complex tensor"),
        (Images(torch.zeros(0, 5)), "the data are empty"),
    ],
)  # fmt: skip
def test_what_holds_no_numbers_is_refused_by_name(data, text):
    with pytest.raises(ValueError, match=text):
        fit(*pair_of((5,)), data, epochs=1, progress=False)


def test_rows_of_another_shape_are_refused_with_what_was_got():
    with pytest.raises(
        ValueError, match=r"does not run on a batch of the data, float32 \(20, 4\).*Wanted rows of the shape"
    ):
        fit(five, Normalised(), X[:, :4], epochs=1, progress=False)
    with pytest.raises(
        ValueError, match=r"does not run on a batch of the data, float32 \(20, 5\).*Wanted rows of the shape"
    ):
        fit(*pair_of((6,)), X, epochs=1, progress=False)


def test_items_that_do_not_stack_are_refused():
    class Uneven(Images):
        def __getitem__(self, i):
            return torch.zeros(i + 1)

    with pytest.raises(
        ValueError, match=r"cannot be made one batch: got float32 \(1,\) and float32 \(2,\).*collate_fn"
    ):
        fit(*pair_of((5,)), Uneven(X), epochs=1, progress=False)


# What a look at the data leaves behind


def test_meeting_the_pair_leaves_no_trace():
    class Dropped(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))

        def forward(self, x):
            return self.net(x)[:, 0]

    torch.manual_seed(0)
    np.random.seed(0)
    net = Dropped()

    def model(x):
        loc = pyro.param("loc", lambda: torch.randn(()))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 5), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("net", net)
        np.random.rand()
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(net(x), 1.0))

    pyro.clear_param_store()
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    Batches(X, 6, programs=(model, guide)).first()
    assert torch.equal(torch.get_rng_state(), state) and np.array_equal(np.random.get_state()[1], numpy_state)
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    assert all(m.training for m in net.modules()) and not len(pyro.get_param_store())


def test_a_memory_map_is_not_copied(tmp_path):
    mapped = memory_map(X.astype(">f8"), tmp_path)
    batches = Batches(mapped, 6, programs=pair_of((5,)))
    assert batches.columns[0].array.base is not None and np.shares_memory(batches.columns[0].array, mapped)
    plain = Batches(memory_map(X, tmp_path), 6)
    assert not plain.columns[0].numpy().flags.owndata


# Batch normalisation


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))

    def forward(self, x):
        pyro.module("normalised", self.net)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.net(x)[:, 0], 1.0))


def five(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z.unsqueeze(-1).expand(*z.shape, 5), 1.0).to_event(1), obs=x)


def test_a_last_batch_of_one_is_merged_or_refused_before_training():
    torch.manual_seed(0)
    x = torch.randn(13, 5)
    batches = Batches(x, 4, programs=(five, Normalised()))
    batches.keep_together()
    assert [rows(b) for b in batches] == [4, 4, 5] and len(batches) == 3
    assert torch.equal(all_rows(batches)[0].sort(0).values, x.sort(0).values)
    history = fit(five, Normalised(), x, batch_size=4, epochs=2, progress=False, seed=0)
    assert len(history) == 2
    guide = Normalised()
    before = guide.net[0].weight.clone()
    for data in (DataLoader(TensorDataset(x), batch_size=4), list(x.split(4))):
        with pytest.raises(ValueError, match="batch normalisation.*batch_size, or pass drop_last=True"):
            fit(five, guide, data, epochs=1, progress=False)
    assert torch.equal(guide.net[0].weight, before)
    fit(five, guide, DataLoader(TensorDataset(x), batch_size=4, drop_last=True), epochs=1, progress=False)
    for data, size in ((x[:1], 4), (x, 1)):
        with pytest.raises(ValueError, match="batch normalisation"):
            fit(five, guide, data, batch_size=size, epochs=1, progress=False)


def test_of_several_columns_all_or_none_are_shortened():
    split = Split(torch.arange(40, dtype=torch.uint8).reshape(10, 1, 2, 2), binarization="dynamic")
    lengths = [len(part) for part in one_draw((split, torch.arange(10)), 0, 4)]
    assert lengths == [10, 10] and [len(part) for part in one_draw((split, split), 0, 4)] == [4, 4]
    assert torch.equal(one_draw((split, split), 0, 4)[0][:], one_draw(split, 0)[:4])


# Subclasses of torch's datasets, whose items are their own


class Doubled(TensorDataset):
    def __getitem__(self, index):
        return tuple(2 * x for x in super().__getitem__(index))


class DoubledTogether(TensorDataset):
    def __getitems__(self, numbers):
        return [tuple(2 * x for x in self[i]) for i in numbers]


class FirstHalf(TensorDataset):
    def __len__(self):
        return super().__len__() // 2


class DoubledSubset(Subset):
    def __getitem__(self, index):
        return tuple(2 * x for x in super().__getitem__(index))

    def __getitems__(self, numbers):
        return [self[i] for i in numbers]


class Together(Dataset):
    """Items one by one, and several at once."""

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return (torch.tensor(X[index]),)

    def __getitems__(self, numbers):
        return [(torch.tensor(X[i]),) for i in numbers]


class DoubledOneByOne(Together):
    """What `__getitems__` of the class above passes over."""

    def __getitem__(self, index):
        return tuple(2 * x for x in super().__getitem__(index))


class Attributes(Dataset):
    """Items that are not what the attributes hold, which are called as in an AnnData."""

    def __init__(self):
        self.X, self.obs, self.n_obs = X, None, len(X)

    def __len__(self):
        return len(X)

    def __getitem__(self, index):
        return torch.tensor(2 * X[index])


class SubsetOfArray(Subset):
    """Of rows of an array, which are tensors here."""

    def __getitem__(self, index):
        return torch.tensor(2 * self.dataset[self.indices[index]])

    def __getitems__(self, numbers):
        return [self[i] for i in numbers]


ROWS = torch.tensor(X)
OWN_ITEMS = {
    "TensorDataset": (lambda: Doubled(ROWS), 2 * X),
    "TensorDataset, together": (lambda: DoubledTogether(ROWS), 2 * X),
    "TensorDataset, length": (lambda: FirstHalf(ROWS), X[:10]),
    "Subset of TensorDataset": (lambda: Subset(Doubled(ROWS), [3, 1]), 2 * X[[3, 1]]),
    "Subset of Subset": (lambda: Subset(DoubledSubset(TensorDataset(ROWS), [4, 2, 0]), [2, 1]), 2 * X[[0, 2]]),
    "Subset": (lambda: DoubledSubset(TensorDataset(ROWS), [3, 1]), 2 * X[[3, 1]]),
    "Subset of an array": (lambda: SubsetOfArray(X, [3, 1]), 2 * X[[3, 1]]),
    "ConcatDataset": (lambda: ConcatDataset([Doubled(ROWS), TensorDataset(ROWS)]), np.concatenate([2 * X, X])),
    "passed over": (DoubledOneByOne, 2 * X),
    "Subset of what is passed over": (lambda: Subset(DoubledOneByOne(), [3, 1]), 2 * X[[3, 1]]),
    "attributes": (Attributes, 2 * X),
    "torchvision": (lambda: DoubledPictures(root="."), 2 * X),
}


class DoubledPictures(torchvision.datasets.VisionDataset):
    data = ROWS

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return 2 * self.data[index]


@pytest.mark.parametrize("kind", OWN_ITEMS)
def test_the_items_of_a_subclass_are_its_own(kind):
    make, wanted = OWN_ITEMS[kind]
    batches = Batches(make(), 4, shuffle=False, programs=pair_of((5,)))
    assert batches.num_data == len(wanted)
    assert np.array_equal(all_rows(batches)[0].numpy(), wanted)


def test_one_draw_of_a_subset_keeps_its_class():
    split = Split(torch.full((6, 1, 2, 2), 100, dtype=torch.uint8), binarization="dynamic")

    class Shifted(Subset):
        def __getitem__(self, index):
            return super().__getitem__(index) + 5

        def __getitems__(self, numbers):
            return [self[i] for i in numbers]

    found = all_rows(Batches(one_draw(Shifted(split, [4, 2]), 0), 4, shuffle=False))[0]
    assert torch.equal(found, 5 + split.frozen(0)[torch.tensor([4, 2])])
