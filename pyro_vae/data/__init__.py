"""Images in, nats out: datasets in memory, binarization, and test beds with exact answers."""

from typing import TYPE_CHECKING

from pyro_vae._lazy import attach

if TYPE_CHECKING:
    from pyro_vae.data.binarization import BINARIZATIONS as BINARIZATIONS
    from pyro_vae.data.binarization import Binarization as Binarization
    from pyro_vae.data.binarization import binarize as binarize
    from pyro_vae.data.binarization import bits_per_dimension as bits_per_dimension
    from pyro_vae.data.binarization import dequantize as dequantize
    from pyro_vae.data.binarization import threshold as threshold
    from pyro_vae.data.datasets import DATASETS as DATASETS
    from pyro_vae.data.datasets import default_data_dir as default_data_dir
    from pyro_vae.data.datasets import load as load
    from pyro_vae.data.splits import Dataset as Dataset
    from pyro_vae.data.splits import Split as Split
    from pyro_vae.data.testbeds import LinearGaussian as LinearGaussian
else:
    __getattr__, __dir__, __all__ = attach(__name__)
