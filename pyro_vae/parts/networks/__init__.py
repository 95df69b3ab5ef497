"""Networks: tensors to tensors, over any leading dimensions.

An encoder turns data (..., *x_shape) into features (..., F), a decoder latents (..., D) into one tensor (...,
*x_shape). K particles of B data arrive as (K, B, D). Any ``nn.Module`` that does the same drops in.
"""

from pyro_vae.parts.networks.convolutional import ConvDecoder, ConvEncoder, ResidualDecoder, ResidualEncoder
from pyro_vae.parts.networks.dense import ACTIVATIONS, MLP, GatedMLP, Softplus, set_output_mean

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
