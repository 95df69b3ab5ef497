"""Pictures as they look: depth, transparency, palettes, frames; and folders that are splits."""

import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from pyro_vae.data import load
from pyro_vae.data.decoding import Framing, frames_of, grey_level
from pyro_vae.data.photographs import read_image

RANDOM = np.random.default_rng(0)
SECRET = (200, 40, 90)


def flat(level, folder, name, **options):
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 6), level, dtype=np.uint8)).save(folder / name, **options)


def stack(levels, path, **options):
    frames = [Image.fromarray(np.full((6, 6), level, dtype=np.uint8)) for level in levels]
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)


def origin(data):
    return {part: getattr(data, part).pixels[:, 0, 0, 0].tolist() for part in ("train", "validation", "test")}


def png16(kind, channels):
    """A PNG of 16 bits a channel, which Pillow opens as one of 8 where it has a colour or transparency."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = (b"\0" + np.full((6, channels), 40_001, dtype=">u2").tobytes()) * 6
    header = struct.pack(">IIBBBBB", 6, 6, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def tiff16(bits, channels=3):
    """A colour TIFF of 16 bits a channel."""
    after = 8 + 2 + 9 * 12 + 4
    pixels = np.full((2, 2, channels), 40_001, dtype="<u2").tobytes()
    tags = [
        (256, 3, 1, 2),
        (257, 3, 1, 2),
        (258, 3, channels, after),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, 1, after + 2 * channels),
        (277, 3, 1, channels),
        (278, 3, 1, 2),
        (279, 4, 1, len(pixels)),
    ]
    return (
        b"II*\0"
        + struct.pack("<IH", 8, 9)
        + b"".join(struct.pack("<HHII", *tag) for tag in tags)
        + struct.pack("<I", 0)
        + struct.pack(f"<{channels}H", *[bits] * channels)
        + pixels
    )


@pytest.mark.parametrize(
    "name, raw",
    [
        ("grey.png", png16(0, 1)),
        ("colour.png", png16(2, 3)),
        ("greyalpha.png", png16(4, 2)),
        ("alpha.png", png16(6, 4)),
        ("colour.tif", tiff16(16)),
        ("a.ppm", b"P6 2 2 65535\n" + bytes(24)),
        ("b.ppm", b"P6 2 2 4095\n" + bytes(24)),
        ("a.pgm", b"P5 2 2 65535\n" + bytes(8)),
        ("plain.ppm", b"P3 1 1 1000\n1 2 3\n"),
    ],
)
def test_more_than_eight_bits_are_never_dropped(tmp_path, name, raw):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(
        ValueError, match=f"{name} has more than 8 bits a channel .*wanted 8. Convert it, or stack.*uint16"
    ):
        read_image(tmp_path / name)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
def test_deep_modes_are_refused_in_every_frame(tmp_path, dtype):
    Image.fromarray(np.ones((6, 6), dtype=dtype)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="more than 8 bits a channel"):
        read_image(tmp_path / "a.tif")


def hidden(alpha):
    levels = np.empty((6, 6, 4), dtype=np.uint8)
    levels[...] = (*SECRET, alpha)
    return levels


@pytest.mark.parametrize("background, level", [(None, 255), ("white", 255), ("black", 0), (90, 90), ("90", 90)])
@pytest.mark.parametrize("name, options", [("a.png", {}), ("a.tif", {}), ("a.webp", {"lossless": True, "exact": True})])
def test_hidden_colours_never_show(tmp_path, background, level, name, options):
    Image.fromarray(hidden(0)).save(tmp_path / name, **options)
    image = read_image(tmp_path / name, Framing(background=grey_level(background)))
    assert torch.equal(image, torch.full((3, 6, 6), level, dtype=torch.uint8))


def test_transparency_of_every_kind_lies_on_the_background(tmp_path):
    half = [(colour * 128 + 255 * 127) / 255 for colour in SECRET]
    Image.fromarray(hidden(128)).save(tmp_path / "half.png")
    assert read_image(tmp_path / "half.png").float().mean((1, 2)).tolist() == pytest.approx(half, abs=0.5)
    palette = Image.fromarray(hidden(255)[..., :3]).quantize(4)
    secret = palette.getpixel((0, 0))
    grey, colour = Image.fromarray(np.full((6, 6), 70, dtype=np.uint8)), Image.fromarray(hidden(255)[..., :3])
    pair = np.stack([np.full((6, 6), 70), np.zeros((6, 6))], -1).astype(np.uint8)
    for name, image, options in (
        ("palette.png", palette, {"transparency": secret}), ("bytes.png", palette, {"transparency": bytes(4)}),
        ("palette.gif", palette, {"transparency": secret}), ("grey.png", grey, {"transparency": 70}),
        ("key.png", colour, {"transparency": SECRET}), ("pair.png", Image.fromarray(pair), {}),
    ):  # fmt: skip
        image.save(tmp_path / name, **options)
        assert read_image(tmp_path / name, Framing(background=33)).unique().tolist() == [33], name
    assert read_image(tmp_path / "pair.png").shape[0] == read_image(tmp_path / "grey.png").shape[0] == 1


def test_the_background_is_an_option_and_in_the_protocol(tmp_path):
    for number in range(4):
        Image.fromarray(hidden(0)).save(tmp_path / f"{number}.png")
    assert load(tmp_path).protocol["background"] == 255
    data = load(tmp_path, background="black")
    assert data.train.pixels.max() == 0 and data.protocol["background"] == 0
    for bad in ("red", 256, -1, "0.5"):
        with pytest.raises(ValueError, match="wanted white, black or a grey level"):
            load(tmp_path, background=bad)


def test_palettes_are_looked_up_before_grey_is_told_from_colour(tmp_path):
    for number in range(6):
        grey = Image.fromarray(RANDOM.integers(1, 255, (8, 8)).astype(np.uint8))
        (grey.convert("P") if number == 3 else grey).save(tmp_path / f"{number}.{'gif' if number == 4 else 'png'}")
    assert load(tmp_path).x_shape == (1, 8, 8)
    colour = Image.fromarray(hidden(255)[..., :3]).quantize(4)
    colour.save(tmp_path / "colour.png")
    assert read_image(tmp_path / "colour.png").float().mean((1, 2)).tolist() == list(SECRET)


def test_odd_files_of_one_folder(tmp_path):
    flat_colour = Image.new("RGB", (8, 8), SECRET)
    flat_colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    flat_colour.save(tmp_path / "from-chrome.jfif", "jpeg", quality=100)
    flat_colour.save(tmp_path / "old.JPE", "jpeg", quality=100)
    flat_colour.save(tmp_path / "Ünïcode ☃.PNG")
    Image.fromarray(RANDOM.random((8, 8)) < 0.5).save(tmp_path / "bilevel.TIFF")
    halves = Image.fromarray(np.repeat(np.array([250, 5], dtype=np.uint8), 8)[:, None].repeat(8, 1))
    halves.getexif()[0x0112] = 6
    halves.save(tmp_path / "turned.jpg", exif=halves.getexif(), quality=100)
    turned = read_image(tmp_path / "turned.jpg")
    assert turned.shape == (1, 8, 16) and turned[0, :, 0].max() < 20 and turned[0, :, -1].min() > 230
    for name in ("cmyk.jpg", "from-chrome.jfif", "old.JPE", "Ünïcode ☃.PNG"):
        assert read_image(tmp_path / name).float().mean((1, 2)).tolist() == pytest.approx(SECRET, abs=12)
    assert sum(load(tmp_path, image_size=8, channels=3).protocol["sizes"].values()) == 6


def test_other_suffixes_are_counted_and_named_in_one_line(tmp_path):
    for number in range(4):
        flat(40 * number, tmp_path, f"{number}.png")
    for name in ("a.txt", "b.TXT", "c.heic", "LICENSE", ".hidden"):
        (tmp_path / name).write_text("x")
    with pytest.warns(
        UserWarning, match=r"passed over 4 files that are not read as images: 2 .txt, 1 .heic, 1 without a suffix\.$"
    ):
        load(tmp_path)


@pytest.mark.parametrize("suffix, options", [("tif", {}), ("gif", {}), ("png", {}), ("webp", {"lossless": True})])
def test_all_frames_count_and_those_of_a_file_stay_together(tmp_path, suffix, options):
    for number in range(5):
        stack(range(40 * number, 40 * number + 6), tmp_path / f"{number}.{suffix}", **options)
    assert frames_of(tmp_path / f"0.{suffix}")[0] == 6
    data = load(tmp_path)
    found = origin(data)
    assert sorted(sum(found.values(), [])) == [40 * n + k for n in range(5) for k in range(6)]
    files = [{level // 40 for level in levels} for levels in found.values()]
    assert sum(map(len, files)) == 5 and len(set().union(*files)) == 5
    assert data.protocol["split"].endswith("the frames of a file together")
    limited = load(tmp_path, limit=2)
    assert all(torch.equal(getattr(limited, part).pixels, getattr(data, part).pixels[:2]) for part in found)
    with pytest.warns(UserWarning, match="has 6 frames; the first was taken"):
        assert read_image(tmp_path / f"1.{suffix}").unique().tolist() == [40]


def test_one_stack_is_cut_in_its_order(tmp_path):
    stack(range(30), tmp_path / "a.tif")
    for place in (tmp_path, tmp_path / "a.tif"):
        data = load(place)
        assert origin(data) == {"train": [*range(24)], "validation": [24, 25, 26], "test": [27, 28, 29]}
        assert "80/10/10 of the 30 frames in their order" in data.protocol["split"]


def test_frames_of_a_file_are_in_one_given_part(tmp_path):
    for part, start in (("train", 0), ("test", 120)):
        (tmp_path / part).mkdir()
        for number in range(3):
            stack(range(start + 20 * number, start + 20 * number + 4), tmp_path / part / f"{number}.tif")
    found = origin(load(tmp_path))
    assert sorted(found["test"]) == [120, 121, 122, 123, 140, 141, 142, 143, 160, 161, 162, 163]
    assert len(found["validation"]) == 4 and len({level // 20 for level in found["validation"]}) == 1
    assert not {level // 20 for level in found["train"]} & {level // 20 for level in found["validation"]}


def test_small_copies_and_masks_in_a_tiff_are_no_images(tmp_path):
    first, second = (Image.fromarray(np.full((6, 6), level, dtype=np.uint8)) for level in (10, 20))
    second.encoderinfo = {"tiffinfo": {254: 1}}
    first.save(tmp_path / "a.tif", save_all=True, append_images=[second])
    assert frames_of(tmp_path / "a.tif")[0] == 1


def test_a_camera_puts_more_behind_a_jpeg(tmp_path):
    for number in range(4):
        first, second = (Image.fromarray(np.full((8, 8), level, dtype=np.uint8)) for level in (40 * number, 255))
        first.save(tmp_path / f"{number}.jpg", "mpo", save_all=True, append_images=[second])
    with pytest.warns(UserWarning, match="4 JPEG files hold more pictures behind the first"):
        data = load(tmp_path)
    assert sum(data.protocol["sizes"].values()) == 4 and data.train.pixels.max() < 140


def write_split(folder, parts, inner="{part}/{name}"):
    for number, part in enumerate(parts):
        for name in ("cat", "dog"):
            for copy in range(4):
                flat(
                    60 * number + 20 * (name == "dog") + copy,
                    folder / inner.format(part=part, name=name),
                    f"{copy}.png",
                )


@pytest.mark.parametrize("inner", ["{part}/{name}", "{name}/{part}", "images/{part}/{name}"])
@pytest.mark.parametrize("names", [("train", "val"), ("training_set", "validation"), ("Train", "valid")])
def test_train_and_validation_folders_without_test(tmp_path, inner, names):
    write_split(tmp_path, names, inner)
    data = load(tmp_path)
    found = origin(data)
    assert sorted(found["train"]) == [0, 1, 2, 3, 20, 21, 22, 23]
    assert sorted(found["validation"] + found["test"]) == [60, 61, 62, 63, 80, 81, 82, 83] and len(found["test"]) == 4
    assert "test: 4 of validation, chosen with seed 0" in data.protocol["split"]
    assert data.label_names == (("cat", "dog") if not inner.startswith("images") else data.label_names)
    if not inner.startswith("images"):
        assert torch.equal(data.train.labels, (data.train.pixels[:, 0, 0, 0] >= 20).long())


def test_three_folders_are_the_split_whatever_lies_above(tmp_path):
    write_split(tmp_path, ("train", "valid", "testing"), "{name}/{part}")
    data = load(tmp_path)
    assert [len(levels) for levels in origin(data).values()] == [8, 8, 8] and data.label_names == ("cat", "dog")
    assert min(origin(data)["test"]) >= 120 and data.test.labels.tolist() == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    "parts, message",
    [
        (
            ("train", "val", "test", "extra"),
            "images outside them, in .*extra.*; wanted all images in train, validation or test",
        ),
        (("train", "training", "test"), "holds train and training for one part of the split, wanted one folder"),
        (("val", "test"), "but none for train, wanted train and test"),
        (("test",), "but none for train"),
        (("train", "car", "bus"), "rename what is a class"),
        (("train/test", "train/cats"), "names two parts of a split"),
    ],
)
def test_mixtures_of_parts_and_classes_are_refused(tmp_path, parts, message):
    write_split(tmp_path, parts)
    with pytest.raises(ValueError, match=message):
        load(tmp_path)


def test_a_lone_train_folder_is_a_heap(tmp_path):
    write_split(tmp_path, ("train",))
    data = load(tmp_path)
    assert data.label_names == ("cat", "dog") and data.protocol["split"].startswith("80/10/10 of the sorted paths")


def test_black_and_white_pictures_are_binary(tmp_path):
    bits = RANDOM.random((6, 8, 8)) < 0.4
    for number, image in enumerate(bits):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    data = load(tmp_path)
    assert data.train.binarization == "threshold"
    assert sum(part[:].sum() for part in (data.train, data.validation, data.test)) == bits.sum()


@pytest.mark.filterwarnings("ignore:Image size:PIL.Image.DecompressionBombWarning")  # Pillow's, before the refusal
def test_bombs_and_disguises_are_refused(tmp_path, monkeypatch):
    flat(3, tmp_path, "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 35)
    with pytest.raises(ValueError, match="6x6 pixels .*wanted at most 35: it may be a decompression bomb"):
        read_image(tmp_path / "a.png")
    # Ghostscript must not be started, whatever a file is called.
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: pytest.fail("a program was run"))
    Image.new("L", (5, 5)).save(tmp_path / "b.png", "eps")
    with pytest.raises(ValueError, match="b.png could not be decoded .*wanted an image"):
        read_image(tmp_path / "b.png")
