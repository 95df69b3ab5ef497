"""Networks: tensors to tensors, over any leading dimensions.

An encoder turns data (..., *x_shape) into features (..., F); a decoder turns latents
(..., D) into one tensor (..., *x_shape). Leading dimensions are free because K
particles of B data arrive as (K, B, D). Any ``nn.Module`` that does the same drops in.
"""

from pyro_vae.parts.networks.activations import ACTIVATIONS, Softplus
from pyro_vae.parts.networks.convolutional import ConvDecoder, ConvEncoder
from pyro_vae.parts.networks.dense import MLP
from pyro_vae.parts.networks.gated import GatedMLP
from pyro_vae.parts.networks.residual import ResidualDecoder, ResidualEncoder
from pyro_vae.parts.networks.start import set_output_mean

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "ConvDecoder",
    "ConvEncoder",
    "GatedMLP",
    "ResidualDecoder",
    "ResidualEncoder",
    "Softplus",
    "set_output_mean",
]
