"""Pictures: one file as levels, and crop, scale and colour of images in memory.

One implementation of the latter for photographs in folders and for arrays, so that the same options
mean the same thing everywhere: first a centre crop, then the shorter side is scaled to
`image_size` (antialiased bilinear) and the longer one cropped to it, then the channels.

One picture file as levels: what its pixels look like on a page, and nothing that they hide.

Turned as the EXIF tag says; transparent pixels lie on a background, white unless told otherwise, so that the colour
stored under them never shows; a palette is looked up before grey is told from colour; every frame of a stack or an
animation is an image. More than 8 bits a channel are refused: Pillow would drop them without a word.

Only formats whose decoders are plain code are opened: EPS, say, starts Ghostscript, whatever the file's name says.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

# ITU-R 601, the weights that Pillow uses for convert("L").
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Framing:
    """What to make of images (N, C, H, W): a callable from uint8 to uint8, or float to float.

    Cuts out a centred square of side `crop` first, scales to a square of `image_size`, and makes `channels` of them, 1
    for grey or 3 for colour; None leaves each as it is. The background is the grey level 0..255 behind the transparent
    pixels of picture files; a tensor has none.

    Example:
        >>> Framing(crop=20, image_size=8, channels=1)(torch.zeros(2, 3, 28, 24, dtype=torch.uint8)).shape
        torch.Size([2, 1, 8, 8])
    """

    crop: int | None = None
    image_size: int | None = None
    channels: int | None = None
    background: int = 255

    def __post_init__(self) -> None:
        for name, size in (("crop", self.crop), ("image_size", self.image_size)):
            if size is not None and size < 1:
                raise ValueError(f"got {name}={size}, wanted a number of pixels >= 1, or None to leave the size alone.")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"got channels={self.channels}, wanted 1 (grey), 3 (colour) or None (as it is).")
        if not 0 <= self.background <= 255:
            raise ValueError(f"got background={self.background}, wanted white, black or a grey level 0..255.")

    @property
    def is_identity(self) -> bool:
        """Whether nothing is asked of images in memory."""
        return self.crop is None and self.image_size is None and self.channels is None

    def __call__(self, images: Tensor, name: str = "images") -> Tensor:
        if self.is_identity:
            return images
        if images.dim() != 4:
            raise ValueError(
                f"{name}: got crop, image_size or channels for data of shape {tuple(images.shape[1:])}, "
                "wanted images (C, H, W). Leave these options out for vectors."
            )
        if self.crop is not None:
            images = _centre(images, self.crop, name)
        if self.image_size is not None:
            images = _centre(_scaled(images, self.image_size), self.image_size, name)
        return images if self.channels is None else _coloured(images, self.channels, name)


def grey_level(background: str | int | None) -> int:
    """The level 0..255 of a background: white (also if None), black, or a number.

    Example:
        >>> grey_level("white"), grey_level("128")
        (255, 128)
    """
    named = {"white": 255, "black": 0, None: 255}
    if background in named:
        return named[background]
    text = str(background)
    if not text.isdecimal() or int(text) > 255:
        raise ValueError(f"got background={background!r}, wanted white, black or a grey level 0..255.")
    return int(text)


def _centre(images: Tensor, side: int, name: str) -> Tensor:
    height, width = images.shape[-2:]
    if side > min(height, width):
        raise ValueError(
            f"{name}: got crop={side} for an image of {height}x{width} (height x width), "
            f"wanted crop <= {min(height, width)}. Choose a smaller crop."
        )
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def _scaled(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[-2:]
    if min(height, width) == side:
        return images
    ratio = side / min(height, width)
    size = (max(side, round(height * ratio)), max(side, round(width * ratio)))
    return torch.cat(
        [
            torch.nn.functional.interpolate(part.contiguous(), size=size, mode="bilinear", antialias=True)
            for part in images.split(4096)
        ]
    )


def _coloured(images: Tensor, channels: int, name: str) -> Tensor:
    have = images.shape[1]
    if have == channels:
        return images
    if have == 1:
        return images.expand(-1, channels, -1, -1).contiguous()
    if have != 3:
        raise ValueError(
            f"{name}: got images of {have} channels and channels={channels}, wanted 1 or 3 to convert from."
        )
    weights = torch.tensor(LUMA).view(3, 1, 1)
    grey = torch.cat([(part * weights).sum(1, keepdim=True) for part in images.split(4096)])
    return grey.round().to(torch.uint8) if images.dtype == torch.uint8 else grey.to(images.dtype)


if TYPE_CHECKING:
    from PIL import Image

AS_IT_IS = Framing()
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF")
SUFFIXES = frozenset(".png .apng .jpg .jpeg .jpe .jfif .bmp .dib .gif .webp .tif .tiff .ppm .pgm .pbm .pnm".split())
GREY_MODES = frozenset({"1", "L", "LA", "La"})
ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_ORIENTATION = 0x0112
NO_PAGE = 0b101  # bits of TIFF's NewSubfileType: a smaller copy, a mask


def suffixes() -> frozenset[str]:
    """Suffixes of the picture files that are read, in lower case; AVIF where this Pillow knows it."""
    from PIL import Image

    Image.init()
    return SUFFIXES | {".avif", ".avifs"} if "AVIF" in Image.OPEN else SUFFIXES


def read_image(path: str | Path, framing: Framing = AS_IT_IS) -> Tensor:
    """One image file of 8 bits a channel as uint8 (C, H, W): one channel if the file is grey, else three.

    Of several frames the first is taken, and a line says so.
    """
    with _errors(path), _opened(path) as image:
        frames = _frames(image)
        pixels = next(_decoded(image, path, frames[:1], framing))
    if len(frames) > 1:
        warnings.warn(f"{path} has {len(frames)} frames; the first was taken.", stacklevel=2)
    return pixels


def read_frames(path: Path, frames: Sequence[int], framing: Framing = AS_IT_IS) -> list[Tensor]:
    """Frames of a stack or an animation, by their places among `frames_of(path)`, each as `read_image` gives one."""
    with _errors(path), _opened(path) as image:
        known = _frames(image)
        pixels = list(_decoded(image, path, [known[frame] for frame in frames], framing))
    if len({len(frame) for frame in pixels}) > 1:  # an animation is of one kind, though some frames be grey
        pixels = [frame.expand(3, -1, -1) for frame in pixels]
    return pixels


def frames_of(path: Path) -> tuple[int, bool, bool, tuple[int, int] | None]:
    """How many images a file holds, whether it is a JPEG with more beside the first, whether it is transparent, and the
    height and width of the first, upright.

    A file that cannot be opened counts as one: what is wrong is said when it is decoded.
    """
    try:
        with _opened(path) as image:
            transparent = _transparent(image)
            turned = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
            return len(_frames(image)), image.format == "MPO", transparent, image.size if turned else image.size[::-1]
    except Exception:
        return 1, False, False, None


@contextlib.contextmanager
def _errors(path: str | Path) -> Iterator[None]:
    """Whatever Pillow raises about a file becomes one ValueError that names it."""
    try:
        yield
    except FileNotFoundError as error:
        raise ValueError(f"{path} could not be decoded: there is no such file. Check the path.") from error
    except Exception as error:  # decoders raise all kinds of things at damaged files
        if isinstance(error, ValueError) and str(path) in str(error):  # refused here on purpose
            raise
        from PIL import UnidentifiedImageError

        known = not isinstance(error, UnidentifiedImageError)
        reason = (str(error).replace(str(path), "the file") or type(error).__name__) if known else "of no known format"
        raise ValueError(
            f"{path} could not be decoded ({reason}), wanted an image. Remove the file or save it again."
        ) from error


def _opened(path: str | Path) -> Image.Image:
    from PIL import Image

    Image.init()
    image = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        image.close()
        raise ValueError(
            f"{path} could not be decoded: it has {image.width}x{image.height} pixels (width x height), "
            f"wanted at most {most}: it may be a decompression bomb. Scale it down, or set "
            "PIL.Image.MAX_IMAGE_PIXELS."
        )
    return image


def _frames(image: Image.Image) -> list[int]:
    """The frames that are images: not the thumbnails and masks of a TIFF, nor what a camera puts behind its JPEG."""
    count = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if image.format != "TIFF" or count == 1:
        return list(range(count))
    found = []
    for frame in range(count):
        image.seek(frame)
        if not int(image.tag_v2.get(254, 0)) & NO_PAGE:  # type: ignore[attr-defined]
            found.append(frame)
    image.seek(0)
    return found or [0]


def _decoded(image: Image.Image, path: str | Path, frames: Sequence[int], framing: Framing) -> Iterator[Tensor]:
    for frame in frames:
        if getattr(image, "n_frames", 1) > 1:
            image.seek(frame)
        depth = _too_deep(image, path)
        if depth:
            raise ValueError(
                f"{path} has more than 8 bits a channel ({depth}), wanted 8. Convert it, or stack the "
                "images in a .npy array: uint16 (N, H, W) keeps 16 bits, floats are in [0, 1]."
            )
        pixels = torch.from_numpy(_levels(image, framing.background))
        pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        yield framing(pixels.unsqueeze(0), name=str(path)).squeeze(0)


def _too_deep(image: Image.Image, path: str | Path) -> str:
    """What says that a channel has more than 8 bits, also where Pillow will drop them; else nothing."""
    if image.mode.startswith(("I", "F")):
        return f"Pillow mode {image.mode}"
    if image.format == "TIFF" and max(image.tag_v2.get(258, (8,))) > 8:  # type: ignore[attr-defined]
        return f"{max(image.tag_v2[258])} bits"  # type: ignore[attr-defined]
    if image.format == "AVIF":
        with open(path, "rb") as file:
            configuration = file.read(65536).partition(b"av1C")[2]
        return "AVIF of 10 or 12 bits" if len(configuration) > 2 and configuration[2] & 0x40 else ""
    for tile in getattr(image, "tile", []):
        arguments = tile[3] if isinstance(tile[3], tuple) else (tile[3],)
        if image.format == "PNG" and re.search(";16", str(arguments[0])):
            return "16 bits"
        if image.format == "PPM" and len(arguments) == 2 and int(arguments[1]) > 255:
            return f"levels up to {arguments[1]}"
    return ""


def _transparent(image: Image.Image) -> bool:
    return image.mode in ALPHA_MODES or "transparency" in image.info


def _levels(image: Image.Image, background: int) -> np.ndarray:
    """uint8, (H, W) if the picture is grey, else (H, W, 3)."""
    from PIL import ImageOps

    transparent, by_pixels = _transparent(image), image.mode in ("P", "PA") or image.format == "GIF"
    upright = ImageOps.exif_transpose(image)
    grey = upright.mode in GREY_MODES
    if not transparent and not by_pixels:
        return np.array(upright.convert("L" if grey else "RGB"))
    if upright.mode in ("La", "RGBa"):
        upright = upright.convert(upright.mode[:-1] + "A")
    pixels = np.array(upright.convert("RGBA"))
    colours, alpha = pixels[..., :3].astype(np.uint32), pixels[..., 3:].astype(np.uint32)
    laid = ((colours * alpha + background * (255 - alpha) + 127) // 255).astype(np.uint8)
    if by_pixels:  # palettes and animations say nothing of grey, but the visible pixels do
        grey = bool((laid == laid[..., :1]).all())
    return laid[..., 0].copy() if grey else laid
