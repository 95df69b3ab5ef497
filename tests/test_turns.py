"""Threads have their turns: the numbers are those of one thread, and nothing is left on Pyro's stack."""

import threading

import pytest
from pyro.poutine.runtime import _PYRO_STACK

from pyro_vae import turns
from pyro_vae.inference.training import fit
from pyro_vae.judging.estimates import elbo_terms
from tests.pairs import binary, small_pair


def in_threads(work, count=3):
    found = []

    def run():
        try:
            found.append(work())
        except Exception as error:  # for the assertion, which shows it
            found.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_estimates_of_several_threads_are_those_of_one():
    pair = small_pair()
    wanted = elbo_terms(*pair, binary(), num_samples=10).value

    def work():
        return [elbo_terms(*pair, binary(), num_samples=10).value for _ in range(5)]

    assert in_threads(work) == [[wanted] * 5] * 3
    assert not _PYRO_STACK


def test_fits_of_several_threads_are_those_of_one():
    pairs = [small_pair() for _ in range(4)]  # made here: the seeds of networks are no pair's affair

    def work():
        return fit(*pairs.pop(), binary(), epochs=2, seed=0, progress=False)["loss"]

    wanted = work()
    assert in_threads(work) == [wanted] * 3
    assert not _PYRO_STACK


def test_a_callback_fits_and_judges():
    pair, other, seen = small_pair(), small_pair(seed=1), []

    def callback(record):
        fit(*other, binary(), epochs=1, seed=0, progress=False)
        seen.append(elbo_terms(*pair, binary(), num_samples=2).value)

    fit(*pair, binary(), epochs=2, seed=0, progress=False, callback=callback)
    assert len(seen) == 2 and not _PYRO_STACK


def test_a_callback_that_waits_for_another_thread_ends_in_a_refusal(monkeypatch):
    monkeypatch.setattr(turns, "_PATIENCE", 0.3)
    pair, found = small_pair(), []

    def callback(record):
        found.extend(in_threads(lambda: elbo_terms(*pair, binary(), num_samples=2), 1))

    fit(*pair, binary(), epochs=1, seed=0, progress=False, callback=callback)
    with pytest.raises(ValueError, match="in the callback of a fit .* call this in the callback itself"):
        raise found[0]
