"""Folders of images and CelebA: the pixels are those of the files, and bad files are named."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae.data import load, photographs
from pyro_vae.data.decoding import Framing
from pyro_vae.data.photographs import read_image

RANDOM = np.random.default_rng(0)


def write_images(folder: Path, count: int, shape: tuple[int, ...] = (9, 6, 3), suffix: str = "png") -> list[np.ndarray]:
    folder.mkdir(parents=True, exist_ok=True)
    arrays = [RANDOM.integers(0, 256, shape, dtype=np.uint8) for _ in range(count)]
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{number:03d}.{suffix}")
    return arrays


@pytest.mark.parametrize("shape", [(9, 6, 3), (9, 6)])
def test_folder_pixels_are_those_of_the_files(tmp_path, shape):
    arrays = write_images(tmp_path / "deep" / "er", 20, shape)
    data = load(tmp_path)
    parts = (data.train, data.validation, data.test)
    assert [len(part) for part in parts] == [16, 2, 2] and data.train.labels is None
    assert data.x_shape == (3 if len(shape) == 3 else 1, 9, 6)
    assert data.train.dequantize and data.train.binarization == "none"
    channels_last = torch.cat([part.pixels for part in parts]).permute(0, 2, 3, 1).reshape(20, *shape).numpy()
    assert sorted(map(bytes, channels_last)) == sorted(map(bytes, arrays))
    assert torch.equal(load(str(tmp_path)).test.pixels, data.test.pixels)


def test_subfolders_are_labels(tmp_path):
    for value, name in ((10, "cat"), (200, "dog")):
        (tmp_path / name / "inner").mkdir(parents=True)
        for number in range(10):
            Image.fromarray(np.full((4, 4), value, dtype=np.uint8)).save(tmp_path / name / "inner" / f"{number}.png")
    data = load(tmp_path, binarization="none", dequantize=False)
    assert data.label_names == ("cat", "dog")
    for part in (data.train, data.validation, data.test):
        assert torch.equal(part.labels, (part.pixels[:, 0, 0, 0] > 100).long())
    write_images(tmp_path, 1, (4, 4))
    assert load(tmp_path).train.labels is None


@pytest.mark.parametrize("validation", [True, False])
def test_train_and_test_folders_are_the_split(tmp_path, validation):
    write_images(tmp_path / "train" / "a", 10)
    write_images(tmp_path / "train" / "b", 10)
    test = write_images(tmp_path / "test" / "b", 4)
    if validation:
        write_images(tmp_path / "val" / "a", 3)
    data = load(tmp_path)
    assert [len(part) for part in (data.train, data.validation, data.test)] == (
        [20, 3, 4] if validation else [18, 2, 4]
    )
    assert data.label_names == ("a", "b") and data.test.labels.tolist() == [1] * 4
    assert np.array_equal(data.test.pixels.permute(0, 2, 3, 1).numpy(), np.stack(test))


def test_limit_decodes_no_more_than_it_keeps(tmp_path, monkeypatch):
    write_images(tmp_path, 30)
    full = load(tmp_path)
    decoded = set()
    monkeypatch.setattr(
        photographs, "read_image", lambda path, framing: (decoded.add(path), read_image(path, framing))[1]
    )
    limited = load(tmp_path, limit=2)
    assert len(decoded) == 6
    assert [len(part) for part in (limited.train, limited.validation, limited.test)] == [2, 2, 2]
    assert torch.equal(limited.train.pixels, full.train.pixels[:2])


def test_mixed_sizes_become_one_and_mixed_colours_need_a_word(tmp_path):
    write_images(tmp_path / "one", 6, (9, 6, 3))
    write_images(tmp_path / "two", 6, (12, 12, 3), "bmp")
    with pytest.warns(
        UserWarning, match=r"images of 2 sizes, from 9x6 to 12x12 \(height x width\), were scaled and cut to 6x6"
    ):
        found = load(tmp_path)
    same = load(tmp_path, image_size=6)
    assert (
        found.x_shape == (3, 6, 6)
        and torch.equal(found.train.pixels, same.train.pixels)
        and found.protocol["image_size"] == 6
    )
    assert load(tmp_path, image_size=5).x_shape == (3, 5, 5)
    write_images(tmp_path / "three", 6, (9, 6))
    with pytest.raises(
        ValueError, match=r"differ in colour: .*00\d.* is .*, .*00\d.* is .*wanted one kind. Pass channels=1"
    ):
        load(tmp_path, image_size=5)
    assert load(tmp_path, image_size=5, channels=1).x_shape == (1, 5, 5)
    assert load(tmp_path, image_size=5, channels=3).x_shape == (3, 5, 5)


def test_undecodable_images_are_named(tmp_path):
    write_images(tmp_path, 10)
    (tmp_path / "005.png").write_bytes((tmp_path / "004.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"005.png could not be decoded .*Remove the file or save it again"):
        load(tmp_path)
    (tmp_path / "005.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"005.png could not be decoded .*wanted an image"):
        load(tmp_path)


@pytest.mark.filterwarnings("ignore:.* passed over 1 files")  # a text among the images
def test_empty_and_small_folders(tmp_path):
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="holds no images, wanted files ending in .bmp"):
        load(tmp_path)
    write_images(tmp_path, 2)
    with pytest.raises(ValueError, match="got 2 images or rows, wanted at least 3"):
        load(tmp_path)


def test_kinds_of_pixels(tmp_path):
    Image.fromarray(np.zeros((4, 5, 4), dtype=np.uint8)).save(tmp_path / "alpha.png")
    assert read_image(tmp_path / "alpha.png").shape == (3, 4, 5)
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert read_image(tmp_path / "bits.png").tolist() == [[[255, 0]]]
    turned = Image.fromarray(np.zeros((4, 6, 3), dtype=np.uint8))
    turned.getexif()[0x0112] = 6
    turned.save(tmp_path / "turned.jpg", exif=turned.getexif())
    assert read_image(tmp_path / "turned.jpg").shape == (3, 6, 4)
    Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match="deep.png has more than 8 bits a channel"):
        read_image(tmp_path / "deep.png")


def test_framing_against_pillow():
    smooth = Image.fromarray(RANDOM.integers(0, 256, (8, 6, 3), dtype=np.uint8)).resize(
        (90, 120), Image.Resampling.BICUBIC
    )
    pixels = torch.from_numpy(np.array(smooth)).permute(2, 0, 1)[None]
    expected = np.array(smooth.crop((5, 20, 85, 100)).resize((16, 16), Image.Resampling.BILINEAR))
    got = Framing(crop=80, image_size=16)(pixels)[0].permute(1, 2, 0).numpy()
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1
    grey = Framing(channels=1)(pixels)[0, 0].numpy()
    assert np.abs(grey.astype(int) - np.array(smooth.convert("L")).astype(int)).max() <= 1


def test_framing_crops_the_centre_of_the_longer_side():
    pixels = torch.zeros(2, 1, 10, 4, dtype=torch.uint8)
    pixels[:, :, 3:7] = 255
    assert torch.equal(Framing(crop=4)(pixels), torch.full((2, 1, 4, 4), 255, dtype=torch.uint8))
    assert torch.equal(Framing(image_size=4)(pixels), Framing(crop=4)(pixels))
    assert Framing(image_size=7)(pixels).shape == (2, 1, 7, 7)
    assert torch.equal(Framing(channels=3)(pixels), pixels.expand(-1, 3, -1, -1))
    assert Framing(image_size=7)(torch.rand(2, 3, 9, 9)).dtype == torch.float32


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: Framing(crop=11)(torch.zeros(1, 1, 10, 20), "cats"),
            "cats: got crop=11 for an image of 10x20 .*wanted crop <= 10",
        ),
        (lambda: Framing(image_size=0), "got image_size=0, wanted a number of pixels >= 1"),
        (lambda: Framing(channels=4), r"got channels=4, wanted 1 \(grey\), 3 \(colour\)"),
        (lambda: Framing(channels=3)(torch.zeros(1, 2, 4, 4)), "got images of 2 channels and channels=3"),
    ],
)
def test_framing_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_celeba_split_and_size(tmp_path):
    write_images(tmp_path / "celeba" / "img_align_celeba", 6, (218, 178, 3), "jpg")
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("".join(f"{i:03d}.jpg {i // 2}\n" for i in range(6)))
    data = load("celeba", tmp_path)
    assert data.x_shape == (3, 64, 64) and (len(data.train), len(data.validation), len(data.test)) == (2, 2, 2)
    assert data.protocol["crop"] == 148 and data.protocol["image_size"] == 64 and data.train.dequantize
    assert load("celeba", tmp_path / "celeba", limit=1, image_size=32).x_shape == (3, 32, 32)
    expected = read_image(tmp_path / "celeba" / "img_align_celeba" / "004.jpg", Framing(148, 64))
    assert torch.equal(data.test.pixels[0], expected)


@pytest.mark.parametrize(
    "listing, message",
    [
        (None, "no celeba in .*list_eval_partition.txt, both in .*celeba. Fetch them"),
        ("000.jpg three\n", "line 1: got '000.jpg three', wanted a file name and 0, 1 or 2"),
        ("000.jpg 0\n001.jpg 1\n", "names no images for test"),
        ("000.jpg 0\n001.jpg 1\n9.jpg 2\n", "9.jpg could not be decoded"),
    ],
)
def test_bad_celeba(tmp_path, listing, message):
    write_images(tmp_path / "img_align_celeba", 2, (218, 178, 3), "jpg")
    if listing is not None:
        (tmp_path / "list_eval_partition.txt").write_text(listing)
    with pytest.raises(ValueError, match=message):
        load("celeba", tmp_path)


def test_a_missing_image_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png could not be decoded: there is no such file"):
        photographs.read_image(tmp_path / "none.png")


def test_large_images_of_several_sizes_become_64_and_one_size_stays(tmp_path):
    write_images(tmp_path / "a", 3, (80, 100, 3), "jpg")
    assert load(tmp_path / "a").x_shape == (3, 80, 100)
    write_images(tmp_path / "b", 3, (100, 80, 3), "jpg")
    with pytest.warns(UserWarning, match="to 64x64"):
        assert load(tmp_path).x_shape == (3, 64, 64)


def test_celeba_has_an_attribute_for_labels(tmp_path):
    write_images(tmp_path / "celeba" / "img_align_celeba", 6, (218, 178, 3), "jpg")
    (tmp_path / "celeba" / "list_eval_partition.txt").write_text("".join(f"{i:03d}.jpg {i // 2}\n" for i in range(6)))
    assert load("celeba", tmp_path, image_size=8).train.labels is None
    with pytest.raises(ValueError, match="wanted the attributes in .*list_attr_celeba.txt. Fetch"):
        load("celeba", tmp_path, labels="Male")
    has = {"Male": [1, -1, 1, 1, -1, -1], "Smiling": [-1, 1, 1, -1, 1, 1]}
    lines = ["6", " ".join(has), *(f"{i:03d}.jpg  {has['Male'][i]}  {has['Smiling'][i]}" for i in range(6))]
    (tmp_path / "celeba" / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
    data = load("celeba", tmp_path, image_size=8)
    assert data.label_names == ("not Smiling", "Smiling") and data.protocol["attributes"] == ["Male", "Smiling"]
    assert [part.labels.tolist() for part in (data.train, data.validation, data.test)] == [[0, 1], [1, 0], [1, 1]]
    assert load("celeba", tmp_path, image_size=8, labels="male", limit=1).test.labels.tolist() == [0]
    with pytest.raises(ValueError, match="Did you mean 'Smiling'"):
        load("celeba", tmp_path, labels="Smilling")
    (tmp_path / "celeba" / "list_attr_celeba.txt").write_text("\n".join(lines[:-1]))
    with pytest.raises(ValueError, match="no line for 005.jpg"):
        load("celeba", tmp_path)
