"""What torch logs and is no news."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_TEXT = "No CUDA runtime is found"


@contextmanager
def no_news_of_a_gpu() -> Iterator[None]:
    """Leave out one line of torch's compiler, which looks for a GPU's tools also for a CPU, and says there is no GPU.

    Example:
        >>> with no_news_of_a_gpu():
        ...     logging.getLogger("torch.utils.cpp_extension").warning("No CUDA runtime is found, using CUDA_HOME='x'")
    """
    logger = logging.getLogger("torch.utils.cpp_extension")

    def is_news(record: logging.LogRecord) -> bool:  # one for each use, so that uses may be nested
        return not str(record.msg).startswith(_TEXT)

    logger.addFilter(is_news)
    try:
        yield
    finally:
        logger.removeFilter(is_news)
