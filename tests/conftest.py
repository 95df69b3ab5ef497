"""Tests compute on one thread: their tensors are tiny, and two threads would wait for each other."""

import gc
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for torch, which is imported later, and for all subprocesses


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported and collected stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()
