"""Images in, nats out: datasets in memory, binarization, and test beds with exact answers."""

from pyro_vae.data.binarization import BINARIZATIONS, Binarization, binarize, bits_per_dimension, dequantize, threshold
from pyro_vae.data.datasets import DATASETS, default_data_dir, load
from pyro_vae.data.splits import Dataset, Split
from pyro_vae.data.testbeds import LinearGaussian

__all__ = [
    "BINARIZATIONS", "Binarization", "DATASETS", "Dataset", "LinearGaussian", "Split", "binarize",
    "bits_per_dimension", "default_data_dir", "dequantize", "load", "threshold",
]
