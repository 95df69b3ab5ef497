"""Data that stay on the disk: each datum once a pass, in an order that a disk can follow, and the same numbers as in
memory; and the examples of docs/data.md, with small data of this computer."""

import io
import re
import tarfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from pyro_vae.data import Split
from pyro_vae.inference import batches as module
from pyro_vae.inference.batches import Batches, in_blocks
from pyro_vae.inference.columns import row_on_disk
from pyro_vae.inference.training import fit
from pyro_vae.judging.estimates import log_likelihood
from pyro_vae.programs.vae import VAE

PAGE = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
BYTES = np.random.default_rng(0).integers(0, 256, (300, 1, 4, 4), dtype=np.uint8)


def mapped(array, folder):
    np.save(folder / "x.npy", array)
    return np.load(folder / "x.npy", mmap_mode="r")


def vae_of(likelihood, shape=(1, 4, 4)):
    torch.manual_seed(0)
    return VAE.build(shape, latent_dim=2, hidden=(8,), likelihood=likelihood)


@pytest.fixture
def large(monkeypatch):
    """Everything on a disk is large, in blocks of 10 rows of 16 bytes, of which 4 are mixed at a time."""
    monkeypatch.setattr(module, "LARGE", 1)
    monkeypatch.setattr(module, "_BLOCK", 160)
    monkeypatch.setattr(module, "_WINDOW", 4)


@pytest.mark.parametrize("count, block, window", [(1, 1, 256), (97, 10, 3), (100, 10, 10), (7, 100, 2)])
def test_an_order_in_blocks_has_each_row_once(monkeypatch, count, block, window):
    monkeypatch.setattr(module, "_WINDOW", window)
    pieces = list(in_blocks(count, block, seed=3))
    assert torch.cat(pieces).sort().values.tolist() == list(range(count))
    assert max(len(piece) for piece in pieces) <= block * window  # what is held of the order
    assert all(len(set((piece // block).tolist())) <= window for piece in pieces)
    assert torch.equal(torch.cat(pieces), torch.cat(list(in_blocks(count, block, seed=3))))


def test_blocks_and_rows_are_shuffled_evenly(monkeypatch):
    # The place of the first row over many seeds: uniform, by its mean (standard error 100 / sqrt(12 * 2000) = 0.65).
    monkeypatch.setattr(module, "_WINDOW", 3)
    places = [float((torch.cat(list(in_blocks(100, 10, seed))) == 0).nonzero()) for seed in range(2000)]
    assert abs(np.mean(places) - 49.5) < 4 * 0.65 and abs(np.std(places) - 100 / 12**0.5) < 1.5


def test_what_lies_on_a_disk_is_known(tmp_path):
    on_disk = mapped(BYTES, tmp_path)
    for held in (on_disk, on_disk[5:], np.asarray(on_disk), {"x": on_disk}, Split(on_disk, binarization="dynamic")):
        assert row_on_disk(held) == 16
    h5py = pytest.importorskip("h5py", reason="HDF5 is read by h5py")
    assert row_on_disk(h5py.File(tmp_path / "x.h5", "w").create_dataset("x", data=BYTES)) == 16
    for held in (BYTES, on_disk + 1, torch.from_numpy(BYTES), Split(BYTES), Split(on_disk).subset([0, 1]),
                 Split(on_disk, binarization="threshold"), TensorDataset(torch.zeros(3)), [1.0, 2.0]):  # fmt: skip
        assert row_on_disk(held) == 0


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_batches_of_a_large_file_hold_each_datum_once(large, tmp_path, shuffle, together):
    rows = np.arange(273, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    batches = Batches(mapped(rows, tmp_path), 16, shuffle=shuffle)
    batches.together = together  # 273 = 17 * 16 + 1: the last one joins the batch before it
    first, second = ([x[:, 0].long() for (x,) in batches] for _ in range(2))
    assert torch.cat(first).sort().values.tolist() == list(range(273))
    assert [len(x) for x in first] == ([16] * 16 + [17] if together else [16] * 17 + [1])
    assert len(first) == len(batches) and torch.equal(torch.cat(first), torch.cat(second)) is not shuffle
    if shuffle:
        near = [len(set((x // 10).tolist())) for x in first]
        assert max(near) <= 2 * 4  # of so few blocks, read together


def test_processes_share_an_order_in_blocks(large, tmp_path):
    from pyro_vae.inference.batches import Stream

    data, seen = mapped(BYTES, tmp_path), []
    for rank in range(3):
        batches = Batches(data, 16, shuffle=True)
        batches.stream = Stream(7, torch.device("cpu"))
        batches.shard(rank, 3)
        batches.begin(1)
        seen.append([index for (index,) in batches.choices()])
    whole = torch.cat([each for several in zip(*seen, strict=True) for each in several])
    assert whole.sort().values.tolist() == list(range(300))


def test_a_fit_to_a_file_is_the_fit_to_the_same_order_in_memory(large, tmp_path, monkeypatch):
    found = []
    for data in (mapped(BYTES, tmp_path), BYTES):
        vae = vae_of("bernoulli")
        # What is in memory is given the order of the file.
        if data is BYTES:
            monkeypatch.setattr(module, "row_on_disk", lambda each: 16)
        fit(vae.model, vae.guide, Split(data, binarization="dynamic"), epochs=2, batch_size=32, seed=0, progress=False)
        found.append([p.detach().clone() for p in vae.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_small_files_have_the_order_of_memory(tmp_path):
    found = []
    for data in (mapped(BYTES, tmp_path), BYTES):
        vae = vae_of("bernoulli")
        fit(vae.model, vae.guide, Split(data, binarization="dynamic"), epochs=1, batch_size=32, seed=0, progress=False)
        test = Split(data, binarization="dynamic").frozen()
        found.append(log_likelihood(vae.model, vae.guide, test, num_samples=20, seed=0).value)
    assert found[0] == found[1]


def test_a_large_file_is_looked_at_as_it_comes(large, tmp_path):
    data = BYTES.astype(np.float32) / 255
    data[299, 0, 0, 0] = np.nan
    vae = vae_of("normal")
    batches = Batches(mapped(data, tmp_path), 32, programs=(vae.model, vae.guide))  # not refused before
    with pytest.raises(ValueError, match="row 299.*nan; wanted a finite number"):
        list(batches)


def test_memory_does_not_grow_with_a_file(large, tmp_path, monkeypatch):
    """Of a sparse file of 10 GB, a pass's first batches take no more than of one of 100 MB."""
    monkeypatch.setattr(module, "LARGE", 2**26)
    monkeypatch.setattr(module, "_BLOCK", 2**20)
    peaks = []
    for size in (10**8, 10**10):
        np.lib.format.open_memmap(tmp_path / f"{size}.npy", mode="w+", dtype=np.uint8, shape=(size // 784, 1, 28, 28))
        data = Split(np.load(tmp_path / f"{size}.npy", mmap_mode="r"), binarization="dynamic")
        vae = vae_of("bernoulli", (1, 28, 28))
        batches = Batches(data, 128, programs=(vae.model, vae.guide))
        tracemalloc.start()
        torch_before = anonymous()
        for number, _ in enumerate(batches):
            if number == 20:
                break
        peaks.append((tracemalloc.get_traced_memory()[1], anonymous() - torch_before))
        tracemalloc.stop()
    # All rows at once were 13 million numbers of 8 bytes, and 100,000 tensors.
    assert peaks[1][0] < peaks[0][0] + 2e6 and peaks[1][1] < peaks[0][1] + 20e6, peaks


def anonymous():
    text = Path("/proc/self/status").read_text() if Path("/proc/self/status").exists() else "RssAnon: 0 kB"
    return int(re.search(r"RssAnon:\s+(\d+)", text)[1]) * 1024


def test_a_map_of_numbers_that_a_split_cannot_hand_out_is_refused(tmp_path):
    with pytest.raises(ValueError, match="memory map of dtype >f4, wanted uint8 levels or floats of this machine"):
        Split(mapped(BYTES.astype(">f4"), tmp_path))
    assert torch.equal(Split(BYTES.astype(">f4"))[:], torch.from_numpy(BYTES.astype("f4")))


# The examples of the page


def small(code):
    code = re.sub(r"epochs=10", "epochs=2, progress=False, seed=0", code)
    return re.sub(r"VAE\.build\(\(1, 28, 28\)", "VAE.build((1, 28, 28), latent_dim=2, hidden=(8,)", code)


def block(word):
    (found,) = [code for code in BLOCKS if word in code]
    return found


def run(code, folder, monkeypatch):
    monkeypatch.chdir(folder)
    scope = {"__name__": "page"}
    exec(compile(small(code), "docs/data.md", "exec"), scope)
    return scope


def pictures():
    return [image for image in np.random.default_rng(0).integers(0, 256, (40, 28, 28), dtype=np.uint8)]


def photos(folder):
    from PIL import Image

    (folder / "photos").mkdir()
    for i, image in enumerate(pictures()):
        Image.fromarray(image).save(folder / "photos" / f"{i}.png")


def png(image):
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def tars(folder):
    for shard in range(2):
        with tarfile.open(folder / f"shards-{shard:03}.tar", "w") as tar:
            for i, image in enumerate(pictures()[20 * shard : 20 * shard + 20]):
                for ending, content in {
                    "png": png(image),
                    "cls": b"3",
                    "pyd": b"cos\nsystem\n(S'touch run'\ntR.",
                }.items():
                    entry = tarfile.TarInfo(f"{shard}{i:03}.{ending}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))


def test_there_are_four_examples():
    assert len(BLOCKS) == 4


def test_the_example_of_a_memory_map_runs(tmp_path, monkeypatch):
    np.save(tmp_path / "images.npy", np.stack(pictures())[:, None])
    found = run(block("mmap_mode"), tmp_path, monkeypatch)
    assert found["data"].mapped and len(found["data"]) == 40


def test_the_example_of_a_folder_runs(tmp_path, monkeypatch):
    photos(tmp_path)
    assert len(run(block("class Folder"), tmp_path, monkeypatch)["Folder"]("photos")) == 40


def test_the_example_of_webdataset_runs_and_runs_no_code_of_the_file(tmp_path, monkeypatch):
    pytest.importorskip("webdataset", reason="webdataset is not installed: pip install webdataset")
    tars(tmp_path)
    found = run(block("webdataset."), tmp_path, monkeypatch)
    assert sum(len(x) for (x,) in found["shards"]) == 40
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")  # theirs
def test_the_example_of_hugging_face_runs(tmp_path, monkeypatch):
    for name in ("HF_HOME", "HF_DATASETS_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")
    photos(tmp_path)
    found = run(block("load_dataset"), tmp_path, monkeypatch)
    assert sum(len(x["image"]) for x in found["photos"].batch(8)) == 40


class Shards:
    """What WebDataset gives after `batched`: tuples of batches, again at each pass, of a length that is not known."""

    def __iter__(self):
        for start in range(0, 40, 16):
            yield (torch.stack([torch.from_numpy(x)[None] / 255 for x in pictures()[start : start + 16]]),)


class Rows:
    """What a Hugging Face dataset gives: dicts of one datum, by number."""

    def __len__(self):
        return 40

    def __getitem__(self, i):
        return {"image": torch.from_numpy(pictures()[i]), "label": i % 3}


def test_stand_ins_of_both_are_fitted_alike():
    from torch.utils.data import DataLoader

    def pixels(rows):
        return torch.stack([row["image"].reshape(1, 28, 28) for row in rows]) / 255

    found = []
    for data in (Shards(), DataLoader(Rows(), batch_size=16, collate_fn=pixels)):
        vae = vae_of("normal", (1, 28, 28))
        history = fit(vae.model, vae.guide, data, epochs=2, seed=0, data_seed=0, progress=False)
        found.append([p.detach().clone() for p in vae.parameters()])
        assert len(history) == 2
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_dicts_of_several_fields_say_what_to_pass():
    vae = vae_of("normal", (1, 28, 28))
    with pytest.raises(ValueError, match="for a pair of tensors pass its fields"):
        fit(vae.model, vae.guide, Rows(), epochs=1, batch_size=16, progress=False)
