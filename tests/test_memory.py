"""Freed memory is kept inside, and given back at the end."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pyro_vae.inference import hardware
from pyro_vae.inference.hardware import reused_memory


def resident():
    """Bytes that the process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def faults(count=20):
    """Pages that the kernel hands out while large tensors come and go."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones(10_000_000)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def measure():
    pages = 10_000_000 * 4 // resource.getpagesize()
    usual = faults()
    before = resident()
    with reused_memory():
        with reused_memory():
            faults()  # the heap grows to what the steps need; from then on nothing is new
        kept = faults()
        assert resident() > before + 30e6  # one tensor's memory stays
    # Huge pages may make a fault serve 512 pages, so the bar is relative.
    assert kept < 0.1 * usual or usual < pages
    assert resident() < before + 20e6


@pytest.mark.skipif(hardware._glibc() is None, reason="the C library is not glibc")
def test_pages_are_kept_inside_and_given_back_at_the_end():
    # In a process of its own: the heap of one that ran other tests is in pieces, and not the subject.
    code = "from tests.test_memory import measure; measure()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr(hardware, "_glibc", lambda: None)
    with reused_memory():
        assert torch.ones(3).sum() == 3
    assert hardware._depth == 0
