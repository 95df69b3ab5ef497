"""Images in, nats out: datasets in memory, binarization, and test beds with exact answers."""

from .binarization import BINARIZATIONS, Binarization, binarize, bits_per_dimension, dequantize, threshold
from .datasets import DATASETS, default_data_dir, load
from .splits import Dataset, Split
from .testbeds import LinearGaussian

__all__ = [
    "BINARIZATIONS", "Binarization", "DATASETS", "Dataset", "LinearGaussian", "Split", "binarize",
    "bits_per_dimension", "default_data_dir", "dequantize", "load", "threshold",
]
