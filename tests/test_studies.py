"""Every posterior, bound and estimator go together, or are refused with the reason."""

import itertools
import json

import pytest

from pyro_vae.app import losses
from pyro_vae.app.cli import main
from pyro_vae.app.defaults import CHOICES
from pyro_vae.parts import names

POSTERIORS = [name for name in names.PARTS["posterior"] if name != "point"]


def pairwise():
    """Combinations in which every two values of different columns meet at least once."""
    columns = (POSTERIORS, CHOICES["bound"], CHOICES["estimator"])
    everything = list(itertools.product(*columns))
    missing = {pair for row in everything for pair in itertools.combinations(enumerate(row), 2)}
    chosen = []
    while missing:
        best = max(everything, key=lambda row: len(missing & set(itertools.combinations(enumerate(row), 2))))
        chosen.append(best)
        missing -= set(itertools.combinations(enumerate(best), 2))
    return chosen


def test_pairwise_is_small_and_complete():
    assert len(POSTERIORS) * len(CHOICES["bound"]) <= len(pairwise()) < 1.2 * len(POSTERIORS) * len(CHOICES["bound"])


@pytest.mark.parametrize("posterior", POSTERIORS)
def test_each_posterior_trains_or_is_refused(posterior):
    rows = [row for row in pairwise() if row[0] == posterior]
    outcomes = [losses._tried(*row) for row in rows]
    assert [o for o in outcomes if o.result == "fails"] == []
    assert any(o.result == "trains" for o in outcomes)
    assert all(o.reason.endswith(".") and len(o.reason) > 40 for o in outcomes if o.result == "refused")


@pytest.mark.slow
def test_all_combinations_train_or_are_refused():
    outcomes = losses.combinations(progress=False)
    assert len(outcomes) == len(POSTERIORS) * len(CHOICES["bound"]) * len(CHOICES["estimator"])
    assert [o for o in outcomes if o.result == "fails"] == []
    refused = {(o.bound, o.estimator) for o in outcomes if o.result == "refused" and o.posterior == "diagonal"}
    assert ("vr-max", "doubly-reparameterized") in refused


def test_the_command_prints_the_table(capsys):
    argv = ["combinations", "--posterior", "diagonal", "--bound", "elbo", "--bound", "vr-max"]
    assert main([*argv, "--estimator", "doubly-reparameterized"]) == 0
    printed = capsys.readouterr().out
    assert (
        "diagonal  doubly-reparameterized  yes   no [1]" in printed and "[1] refused: doubly-reparameterized" in printed
    )
    assert main([*argv, "--estimator", "reparameterized", "--json"]) == 0
    assert [row["result"] for row in json.loads(capsys.readouterr().out)] == ["trains", "trains"]


@pytest.mark.parametrize("argv", [["--bound", "elob"], ["--posterior", "normal"], ["--estimator", "reinforce"]])
def test_an_unknown_name_is_one_line(argv, capsys):
    assert main(["combinations", *argv]) == 2
    assert "wanted one of" in capsys.readouterr().err
