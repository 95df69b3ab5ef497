"""Crop, scale and colour of images already in memory.

One implementation for photographs in folders and for arrays, so that the same options
mean the same thing everywhere: first a centre crop, then the shorter side is scaled to
`image_size` (antialiased bilinear) and the longer one cropped to it, then the channels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Framing", "grey_level"]

# ITU-R 601, the weights that Pillow uses for convert("L").
LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Framing:
    """What to make of images (N, C, H, W): a callable from uint8 to uint8, or float to float.

    Args:
        crop: Side of a centred square cut out first; None leaves the image whole.
        image_size: Side of the square that results; None keeps the size.
        channels: 1 for grey, 3 for colour; None keeps what is there.
        background: Grey level 0..255 behind the transparent pixels of picture files; a tensor has none.
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
            raise ValueError(f"{name}: got crop, image_size or channels for data of shape {tuple(images.shape[1:])}, "
                             "wanted images (C, H, W). Leave these options out for vectors.")
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
        raise ValueError(f"{name}: got crop={side} for an image of {height}x{width} (height x width), "
                         f"wanted crop <= {min(height, width)}. Choose a smaller crop.")
    top, left = (height - side) // 2, (width - side) // 2
    return images[..., top : top + side, left : left + side]


def _scaled(images: Tensor, side: int) -> Tensor:
    height, width = images.shape[-2:]
    if min(height, width) == side:
        return images
    ratio = side / min(height, width)
    size = (max(side, round(height * ratio)), max(side, round(width * ratio)))
    return torch.cat([
        torch.nn.functional.interpolate(part.contiguous(), size=size, mode="bilinear", antialias=True)
        for part in images.split(4096)
    ])


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
