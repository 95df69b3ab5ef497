"""One picture file as levels: what its pixels look like on a page, and nothing that they hide.

Turned as the EXIF tag says; transparent pixels lie on a background, white unless told
otherwise, so that the colour stored under them never shows; a palette is looked up before
grey is told from colour; every frame of a stack or an animation is an image. More than 8
bits a channel are refused: Pillow would drop them without a word.

Only formats whose decoders are plain code are opened: EPS, say, starts Ghostscript,
whatever the file's name says.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pyro_vae.data.framing import Framing

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["AS_IT_IS", "frames_of", "read_frames", "read_image", "suffixes"]

AS_IT_IS = Framing()
FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "AVIF")
SUFFIXES = frozenset({".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".webp", ".tif",
                      ".tiff", ".ppm", ".pgm", ".pbm", ".pnm"})
GREY_MODES = frozenset({"1", "L", "LA", "La"})
ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
NO_PAGE = 0b101  # bits of TIFF's NewSubfileType: a smaller copy, a mask


def suffixes() -> frozenset[str]:
    """Suffixes of the picture files that are read, in lower case; AVIF where this Pillow knows it."""
    from PIL import Image

    Image.init()
    return SUFFIXES | {".avif", ".avifs"} if "AVIF" in Image.OPEN else SUFFIXES


def read_image(path: str | Path, framing: Framing = AS_IT_IS) -> Tensor:
    """One image file as uint8 (C, H, W): one channel if the file is grey, else three.

    Of several frames the first is taken, and a line says so.

    Args:
        path: PNG, JPEG and others that Pillow decodes, 8 bits a channel.
        framing: Crop, size and channels to bring it to, and the background.
    """
    with _errors(path), _opened(path) as image:
        frames = _frames(image)
        pixels = next(_decoded(image, path, frames[:1], framing))
    if len(frames) > 1:
        warnings.warn(f"{path} has {len(frames)} frames; the first was taken.", stacklevel=2)
    return pixels


def read_frames(path: Path, frames: Sequence[int], framing: Framing = AS_IT_IS) -> list[Tensor]:
    """Some of the frames of a stack or an animation, each as `read_image` gives one.

    Args:
        path: The file.
        frames: Places among `frames_of(path)`.
        framing: As for `read_image`.
    """
    with _errors(path), _opened(path) as image:
        known = _frames(image)
        pixels = list(_decoded(image, path, [known[frame] for frame in frames], framing))
    if len({len(frame) for frame in pixels}) > 1:  # an animation is of one kind, though some frames be grey
        pixels = [frame.expand(3, -1, -1) for frame in pixels]
    return pixels


def frames_of(path: Path) -> tuple[int, bool, bool]:
    """How many images a file holds, whether it is a JPEG with more beside the first, and whether it is transparent.

    A file that cannot be opened counts as one: what is wrong is said when it is decoded.
    """
    try:
        with _opened(path) as image:
            transparent = _transparent(image)
            return len(_frames(image)), image.format == "MPO", transparent
    except Exception:
        return 1, False, False


class _errors:
    """Whatever Pillow raises about a file becomes one ValueError that names it."""

    def __init__(self, path: str | Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FileNotFoundError):
            raise ValueError(f"{self.path} could not be decoded: there is no such file. Check the path.") from error
        # Decoders raise all kinds of things at damaged files; what is refused here on purpose names the file.
        if isinstance(error, Exception) and not (isinstance(error, ValueError) and str(self.path) in str(error)):
            reason = str(error).replace(str(self.path), "the file") or type(error).__name__
            raise ValueError(f"{self.path} could not be decoded ({reason}), wanted an image. "
                             "Remove the file or save it again.") from error


def _opened(path: str | Path) -> "Image.Image":
    from PIL import Image

    Image.init()
    image = Image.open(path, formats=[name for name in FORMATS if name in Image.OPEN])
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        image.close()
        raise ValueError(f"{path} could not be decoded: it has {image.width}x{image.height} pixels (width x height), "
                         f"wanted at most {most}: it may be a decompression bomb. Scale it down, or set "
                         "PIL.Image.MAX_IMAGE_PIXELS.")
    return image


def _frames(image: "Image.Image") -> list[int]:
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


def _decoded(image: "Image.Image", path: str | Path, frames: Sequence[int], framing: Framing) -> Iterator[Tensor]:
    for frame in frames:
        if getattr(image, "n_frames", 1) > 1:
            image.seek(frame)
        depth = _too_deep(image, path)
        if depth:
            raise ValueError(f"{path} has more than 8 bits a channel ({depth}), wanted 8. Convert it, or stack the "
                             "images in a .npy array: uint16 (N, H, W) keeps 16 bits, floats are in [0, 1].")
        array = _levels(image, framing.background)
        pixels = torch.from_numpy(array)
        pixels = pixels.unsqueeze(0) if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        yield framing(pixels.unsqueeze(0), name=str(path)).squeeze(0)


def _too_deep(image: "Image.Image", path: str | Path) -> str:
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


def _transparent(image: "Image.Image") -> bool:
    return image.mode in ALPHA_MODES or "transparency" in image.info


def _levels(image: "Image.Image", background: int) -> np.ndarray:
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
