"""Where a decoder starts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def set_output_mean(decoder: nn.Module, mean: Tensor, floor: float = 1e-3) -> None:
    """Start a decoder of logits at the mean image, as Burda et al. (2016) do.

    The bias of the last layer becomes logit(mean), with the mean clipped to
    [floor, 1 - floor]; a convolutional layer, whose bias is per channel, gets that of
    the channel means.

    Args:
        decoder: A network whose last layer with a bias gives the logits.
        mean: Mean of the training data in [0, 1], of the shape of one datum.
        floor: Distance kept from 0 and 1.
    Raises:
        ValueError: No layer with a bias, or one of another size than the mean.
    """
    biased = [m for m in decoder.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    if not biased:
        raise ValueError("the decoder has no layer with a bias to start at the mean of the data.")
    bias = biased[-1].bias
    assert isinstance(bias, Tensor)
    start = mean.flatten() if bias.numel() == mean.numel() or mean.dim() < 2 else mean.flatten(1).mean(-1)
    if start.shape != bias.shape:
        raise ValueError(f"the decoder's last bias has {bias.numel()} entries, the mean has shape {tuple(mean.shape)}.")
    with torch.no_grad():
        bias.copy_(torch.logit(start.clamp(floor, 1 - floor)))
