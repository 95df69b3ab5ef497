"""Generated data: each ends in the right rows, or in a refusal that says what was got and wanted.

No exception from inside torch, NumPy or pandas reaches the user. The oracle is NumPy, which never sees the code under
test: an array, and a holder of it whose rows it must be.
"""

import warnings

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from pyro_vae.inference.batches import Batches
from pyro_vae.inference.training import fit
from pyro_vae.inference.trees import joined, rows
from pyro_vae.programs.vae import VAE

EXAMPLES = settings(
    max_examples=1000, derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)  # fmt: skip
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = ["b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "g"]
ORDERS = ["<", ">", "="]


class Items(Dataset):
    def __init__(self, x, labelled=False):
        self.x, self.labelled = x, labelled

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        assert isinstance(i, int)
        row = np.array(self.x[i])
        return (row, i) if self.labelled else row


class Sequence:
    """A class of one's own: a length, and rows by a whole number."""

    def __init__(self, x):
        self.rows = [np.array(row) for row in x]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return torch.as_tensor(self.rows[i].astype("f8"))


class Annotated:
    def __init__(self, x):
        self.X, self.obs, self.n_obs = x, {}, len(x)


@st.composite
def arrays(draw):
    """Numbers of any type, byte order, memory order and stride; of 0 to 3 dimensions, none to nine rows."""
    kind = draw(st.sampled_from(KINDS))
    shape = tuple(draw(st.lists(st.integers(0, 5), min_size=0, max_size=3)))
    if draw(st.booleans()):  # mostly not empty
        shape = tuple(max(n, 1) for n in shape) or (3, 4)
    numbers = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape) * draw(st.sampled_from([1, 3, 100]))
    x = numbers > 0 if kind == "b1" else np.abs(numbers) if kind[0] in "u" else numbers
    x = np.asarray(x).astype(kind)
    if kind[0] in "fg" and x.size and draw(st.integers(0, 7)) == 0:
        x.flat[draw(st.integers(0, x.size - 1))] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))
    if kind != "g":
        x = x.astype(x.dtype.newbyteorder(draw(st.sampled_from(ORDERS))))
    for change in draw(st.lists(st.sampled_from([np.asfortranarray, lambda a: a[::-1], lambda a: np.repeat(a, 2, 0)[::2],
                                                 np.transpose]), max_size=2)):  # fmt: skip
        x = change(x) if x.ndim else x
    if draw(st.booleans()):
        x = x.view()
        x.flags.writeable = False
    return x


def tensor(x):
    return torch.as_tensor(
        x.astype("f8") if x.dtype.kind in "fu" or x.dtype.itemsize > 8 else x.astype(x.dtype.newbyteorder("="))
    )


HOLDERS = {
    "array": lambda x: x,
    "tensor": tensor,
    "tuple": lambda x: (x,),
    "two columns": lambda x: (x, np.arange(len(x))),
    "labelled tensors": lambda x: TensorDataset(tensor(x), torch.arange(len(x))),
    "uneven columns": lambda x: (x, np.arange(len(x) + 1)),
    "dict": lambda x: {"x": x, "label": np.arange(len(x))},
    "dict of one": lambda x: {"x": x},
    "list of rows": list,
    "list of tensors": lambda x: [torch.as_tensor(r) for r in tensor(x)],
    "nested list": lambda x: x.tolist(),
    "list of pairs": lambda x: [(np.array(r), 1) for r in x],
    "frame": pd.DataFrame,
    "series": lambda x: pd.Series(x.reshape(len(x), -1)[:, 0]),
    "frame with names": lambda x: pd.DataFrame(x).assign(name="a"),
    "masked": lambda x: np.ma.masked_array(x, np.zeros(x.shape, bool)),
    "masked entries": lambda x: np.ma.masked_array(x, np.ones(x.shape, bool)),
    "objects": lambda x: x.astype(object),
    "csr": lambda x: sp.csr_matrix(x.astype("f8")),
    "csc array": lambda x: sp.csc_array(x.astype("f4")),
    "coo array": lambda x: sp.coo_array(x.astype("f8")),
    "torch coo": lambda x: tensor(x).to_sparse(),
    "torch csr": lambda x: tensor(x).to_sparse_csr(),
    "annotated": Annotated,
    "dataset": Items,
    "labelled dataset": lambda x: Items(x, True),
    "sequence": Sequence,
    "subset": lambda x: Subset(TensorDataset(tensor(x)), range(len(x))),
    "subset of items": lambda x: Subset(Items(x), list(range(len(x)))),
    "loader": lambda x: DataLoader(TensorDataset(tensor(x)), batch_size=2),
    "labelled loader": lambda x: DataLoader(TensorDataset(tensor(x), torch.arange(len(x))), batch_size=2),
    "loader of items": lambda x: DataLoader(Items(x.astype("f8")), batch_size=2),
    "list of batches": lambda x: [x[i : i + 2] for i in range(0, len(x), 2)],
    "strings": lambda x: x.astype(str),
    "complex": lambda x: x.astype(complex),
    "generator": lambda x: (r for r in x),
    "zero-dimensional": lambda x: np.array(x.sum()),
}


def held(name, x):
    """The data, or None where NumPy, pandas or torch cannot make such a thing of this array: not ours to judge."""
    if x.ndim == 0 and name not in ("array", "tensor", "tuple", "masked", "objects", "strings", "complex"):
        return None
    try:
        made = HOLDERS[name](x)
    except (TypeError, ValueError, IndexError, RuntimeError, NotImplementedError):
        return None
    # SciPy makes a row of a vector, before 1.13 of each, and later where it is a matrix.
    return None if sp.issparse(made) and made.shape != x.shape else made


def refused(error):
    """Whether a refusal says what was got and what is wanted."""
    text = str(error)
    assert "wanted" in text or "Wanted" in text or "lengths" in text, text
    return True


@EXAMPLES
@given(x=arrays(), name=st.sampled_from(sorted(HOLDERS)), size=st.integers(1, 4))
def test_batches_are_the_rows_or_a_refusal(x, name, size):
    data = held(name, x)
    if data is None:
        return
    try:
        batches = Batches(data, size, shuffle=False)
        given_batches = list(batches)
        if not given_batches:  # an empty iterable of batches is refused when the first is asked for
            batches.first()
    except ValueError as error:
        refused(error)
        plain = x.ndim and len(x) and x.size and name in ("array", "tuple", "dataset", "csr", "annotated", "sequence")
        assert not plain, error
        return
    whole = joined(given_batches)
    found = whole[0]["x"] if isinstance(whole[0], dict) else whole[0]
    wanted = x.reshape(len(x), -1)[:, 0] if name == "series" else x[:, None] if name == "frame" and x.ndim == 1 else x
    if name in ("list of rows", "list of tensors") and len(x) == 1 and x.ndim > 1:
        wanted = x[0]  # without a pair to tell, a list of one tensor is one batch
    wanted = np.asarray(wanted.astype("f8"))
    assert found.shape == wanted.shape and found.layout == torch.strided
    assert np.array_equal(
        found.double().numpy(), wanted.astype("f4") if name == "csc array" else wanted, equal_nan=True
    )
    assert found.dtype not in (torch.uint16, torch.uint32, torch.uint64)
    if batches.num_data is not None:
        assert batches.num_data == len(x) and [rows(b) for b in given_batches][:-1] == [size] * (len(batches) - 1)


VAES = {}


def vae_of(shape, likelihood):
    if (shape, likelihood) not in VAES:
        torch.manual_seed(0)
        VAES[shape, likelihood] = VAE.build(shape, latent_dim=1, hidden=(2,), likelihood=likelihood)
    return VAES[shape, likelihood]


def allowed(x, likelihood):
    """Whether NumPy finds all values finite in float32, and in the support."""
    with np.errstate(over="ignore"):
        x = x.astype("f4")
    if not np.isfinite(x).all():
        return False
    if likelihood == "bernoulli":
        return bool(((x >= 0) & (x <= 1)).all())
    return likelihood == "normal" or bool(((x >= 0) & (x == np.round(x))).all())


@settings(EXAMPLES, max_examples=250)
@given(x=arrays(), name=st.sampled_from(sorted(HOLDERS)), size=st.integers(1, 4),
       likelihood=st.sampled_from(["normal", "bernoulli", "poisson"]), fits=st.booleans())  # fmt: skip
def test_a_step_of_fit_is_taken_or_refused(x, name, size, likelihood, fits):
    data = held(name, x)
    if data is None or x.ndim == 0:
        return
    shape = tuple(x.shape[1:]) if fits and x.ndim > 1 and x.size else (3,)
    vae = vae_of(shape, likelihood)
    good = fits and x.ndim > 1 and x.size > 0 and allowed(x, likelihood)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history = fit(
                vae.model, vae.guide, data, epochs=1, batch_size=size, learning_rate=1e-6, seed=0, progress=False
            )
    except ValueError as error:
        assert str(error)
        if name in ("array", "tuple", "two columns", "dataset", "labelled tensors", "loader", "annotated"):
            assert not good, error
        return
    assert np.isfinite(history["loss"]).all()
    if fits and x.ndim > 1 and name not in ("series", "masked entries", "complex"):
        assert good or not x.size, (x, likelihood)
