"""Who is ahead: intervals over data and seeds cover, and nobody is called ahead by chance."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from pyro_vae.judging.rankings import rank
from pyro_vae.judging.scoring import Scores, holm


def arms_of(values: np.ndarray, bound: tuple[bool, ...] = (), k: float = 0.0) -> dict[str, tuple[Scores, ...]]:
    """Arms named a0, a1, ... from values (arms, seeds, data)."""
    found = {}
    for i, seeds in enumerate(values):
        rows = [torch.from_numpy(np.ascontiguousarray(row)) for row in seeds]
        found[f"a{i}"] = tuple(
            Scores(row, 0.01, row - 1 - i, torch.full((len(row),), k), 100, bool(bound and bound[i]), seed)
            for seed, row in enumerate(rows)
        )
    return found


def simulated(rng, means, num_seeds, num_data, seeds, data, rest) -> np.ndarray:
    shape = (len(means), num_seeds, num_data)
    common = 3 * rng.normal(size=(1, 1, num_data))
    own = data * rng.normal(size=(shape[0], 1, num_data))
    fits = seeds * rng.normal(size=(*shape[:2], 1))
    return np.array(means)[:, None, None] + common + own + fits + rest * rng.normal(size=shape)


def covered(arms, num_seeds, seeds, data, rest, repetitions, num_data=100) -> tuple[float, float]:
    """How often intervals hold their difference, and how often somebody is called ahead where nobody is."""
    rng = np.random.default_rng(1)
    inside = total = false = 0
    for _ in range(repetitions):
        means = 0.5 * np.arange(arms)
        values = simulated(rng, means, num_seeds, num_data, seeds, data, rest)
        found = rank(arms_of(values))
        for each in found.differences:
            truth = means[int(each.first[1:])] - means[int(each.second[1:])]
            inside, total = inside + (each.low <= truth <= each.high), total + 1
        false += any(each.holds for each in rank(arms_of(values - means[:, None, None])).differences)
    return inside / total, false / repetitions


# Seeds vary not at all, as much as the data, and more than all else.
SPREADS = [(0.05, 1.0, 0.5), (0.1, 1.0, 0.5), (0.3, 0.5, 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("seeds, data, rest", SPREADS)
@pytest.mark.parametrize("arms, num_seeds", [(2, 3), (2, 5), (4, 2), (4, 3), (10, 3)])
def test_intervals_cover_and_nobody_is_ahead_by_chance(arms, num_seeds, seeds, data, rest) -> None:
    repetitions = 400
    inside, false = covered(arms, num_seeds, seeds, data, rest, repetitions)
    # Four standard errors of a share of 400 around 93 to 97 % and 5 %: with two arms, 0.043.
    noise = 4 * math.sqrt(0.05 * 0.95 / repetitions)
    assert 0.93 - noise / 4 <= inside <= 0.97 + noise / 4
    assert false <= 0.05 + noise / 4


def test_intervals_cover_in_short() -> None:
    inside, false = covered(4, 3, 0.1, 1.0, 0.5, 100)
    assert 0.91 <= inside <= 0.99
    assert false <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 100)


def test_an_interval_that_forgets_the_seeds_would_not_cover() -> None:
    """The simulation tells right from wrong: all fits taken for independent data cover far too rarely."""
    rng = np.random.default_rng(2)
    inside = 0
    for _ in range(200):
        a, b = simulated(rng, [0.0, 0.0], 3, 100, 0.3, 0.5, 0.5)
        d = (a - b).ravel()
        inside += abs(d.mean()) < 1.96 * d.std(ddof=1) / math.sqrt(d.size)
    assert inside / 200 < 0.5


def test_one_seed_is_the_paired_t_test() -> None:
    values = simulated(np.random.default_rng(3), [0.0, 0.3], 1, 60, 0.0, 1.0, 0.5)
    (found,) = rank(arms_of(values)).differences
    known = stats.ttest_rel(values[0, 0], values[1, 0])
    interval = known.confidence_interval()
    assert found.p == pytest.approx(known.pvalue, rel=1e-6)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6)
    assert found.diff_stderr == pytest.approx(np.std(values[0, 0] - values[1, 0], ddof=1) / math.sqrt(60))


def test_seeds_alone_are_students_t_of_few_degrees() -> None:
    """No datum differs from another: what is left is a t test of three numbers."""
    effects = np.array([[0.1, 0.4, 0.2], [0.9, 0.3, 0.5]])
    values = np.repeat(effects[..., None], 50, axis=2)
    (found,) = rank(arms_of(values)).differences
    known = stats.ttest_rel(*effects)
    assert found.p == pytest.approx(known.pvalue, rel=0.02)  # 200 quantiles
    assert found.value == pytest.approx(np.mean(effects[0] - effects[1]))


def test_seeds_are_paired_by_their_names_and_not_by_their_place() -> None:
    rng = np.random.default_rng(4)
    shared = rng.normal(size=(3, 1))
    a = shared + 0.01 * rng.normal(size=(3, 200))
    b = a + 0.05 + 0.01 * rng.normal(size=(3, 200))
    arms = arms_of(np.stack([a, b]))
    paired = rank(arms).difference("a1", "a0")
    shuffled = rank({"a0": arms["a0"], "a1": tuple(reversed(arms["a1"]))}).difference("a1", "a0")
    assert paired.holds and paired.value == pytest.approx(0.05, abs=0.005)
    assert (paired.p, paired.low) == (shuffled.p, shuffled.low)


def test_many_arms_are_held_to_more() -> None:
    """A difference that two arms would show is none among twenty."""
    rng = np.random.default_rng(5)
    base = rng.normal(size=(1, 1, 200))
    values = base + 0.5 * rng.normal(size=(20, 1, 200))
    values[0] = base[0] + 0.5 * rng.normal(size=(1, 200)) + 0.12
    alone, many = rank(arms_of(values[:2])), rank(arms_of(values))
    first, among = alone.difference("a0", "a1"), many.difference("a0", "a1")
    assert first.holds and first.p == pytest.approx(among.p)
    assert among.p_corrected > 5 * among.p and not among.holds


def test_holm_is_what_it_is_by_hand() -> None:
    assert holm(np.array([0.005, 0.011, 0.02, 0.04])).tolist() == pytest.approx([0.02, 0.033, 0.04, 0.04])
    assert holm(np.array([])).tolist() == []


def test_a_lower_bound_cannot_lose() -> None:
    values = np.random.default_rng(6).normal(size=(1, 1, 300)) + np.array([1.0, 0.0])[:, None, None]
    values += 0.01 * np.random.default_rng(7).normal(size=values.shape)
    loser_is_bound = rank(arms_of(values, bound=(False, True)))
    winner_is_bound = rank(arms_of(values, bound=(True, False)))
    assert not loser_is_bound.difference("a0", "a1").holds
    assert "only a lower bound" in loser_is_bound.verdict and "lower bound" in loser_is_bound.flags("a1")
    assert winner_is_bound.difference("a0", "a1").holds


def test_by_the_elbo_of_one_frozen_model() -> None:
    values = np.random.default_rng(8).normal(size=(1, 1, 300)) + np.zeros((2, 1, 1))
    found = rank(arms_of(values, bound=(True, True)), criterion="elbo")
    assert found.best == "a0" and found.difference("a0", "a1").value == pytest.approx(1.0)
    assert found.rows()[1]["gap"] == pytest.approx(2.0)


def test_equal_arms_are_equal() -> None:
    values = np.repeat(np.random.default_rng(9).normal(size=(1, 2, 50)), 3, axis=0)
    found = rank(arms_of(values))
    assert all(each.p == 1 and each.value == 0 and not each.holds for each in found.differences)
    assert "nobody is ahead" in found.verdict


def test_the_table_has_arvizs_columns_and_those_that_failed() -> None:
    values = simulated(np.random.default_rng(10), [0.0, 1.0, 0.9], 2, 150, 0.01, 0.3, 0.2)
    found = rank(arms_of(values), failed={"a3": "out of memory"}, notes=["budget: 3 epochs each"])
    frame = found.to_frame()
    wanted = ["rank", "arm", "log_p", "diff", "diff_stderr", "p_worse", "mc_stderr", "data_stderr", "khat_ok", "elbo",
              "gap", "seconds", "parameters", "flags"]  # fmt: skip
    assert [name for name in frame.columns if name in wanted] == wanted
    assert frame["arm"].tolist() == ["a1", "a2", "a0", "a3"]
    assert frame["diff"][0] == 0 and frame["diff"][2] == pytest.approx(found.difference("a1", "a0").value)
    assert frame["diff"][1:3].min() > 0 and 0.5 < frame["p_worse"][2] <= 1
    assert frame["flags"][3] == "failed: out of memory"
    assert "out of memory" in str(found) and "budget: 3 epochs" in str(found)
    assert r"\toprule" in found.to_latex() and found.to_markdown().count("|") > 20
    bounds = rank(arms_of(values - 5, bound=(False, False, True))).to_latex()
    assert r"$\geq$ $-$" in bounds and "[$-$" in bounds and ">" not in bounds  # which text of LaTeX prints as another
    assert found.plot().axes


def test_what_cannot_be_paired_is_refused() -> None:
    one, two = arms_of(np.zeros((1, 1, 10)))["a0"], arms_of(np.zeros((1, 1, 11)))["a0"]
    with pytest.raises(ValueError, match="10 data with K = 100 and 11 data"):
        rank({"one": one, "two": two})
    with pytest.raises(ValueError, match="0 arms"):
        rank({})
    with pytest.raises(ValueError, match="'a1'.*wanted two arms|twice"):
        rank({"a1": one}).difference("a1", "a1")
    with pytest.raises(ValueError, match="no arm 'tow'.*'two'"):
        rank({"two": one}).difference("tow", "two")


def test_a_seed_that_not_all_arms_have_is_left_out_and_said() -> None:
    """Over other seeds a mean is of other luck: the order and the paired differences would contradict each other."""
    luck = np.array([0.0, 5.0])[:, None] + np.random.default_rng(11).normal(size=(1, 60))
    better = 0.3 + 0.01 * np.random.default_rng(12).normal(size=(2, 60))
    arms = arms_of(np.stack([luck, luck + better]))
    found = rank({"a0": arms["a0"], "a1": arms["a1"][:1]})  # a1's lucky seed failed
    assert found.best == "a1" and found.difference("a1", "a0").value == pytest.approx(better[0].mean())
    assert found.rows()[1]["diff"] == pytest.approx(found.rows()[0]["log_p"] - found.rows()[1]["log_p"])
    assert found.notes == ("of the seeds only 0 is compared, which all arms have: a1 lacks 1",)
    assert "one fit each" in found.verdict
    by_place = rank({"a0": arms["a0"], "a1": tuple(Scores(**(vars(each) | {"seed": 9})) for each in arms["a1"][:1])})
    assert [len(own) for own in by_place.arms.values()] == [1, 1] and "as many as all have: a0 has 2" in str(by_place)


def test_what_has_no_mean_is_not_ranked() -> None:
    values = np.zeros((2, 1, 10))
    values[1, 0, 3] = np.nan
    with pytest.raises(ValueError, match="'a1' with 10 data, of which 1 have log p.x. that is not finite"):
        rank(arms_of(values))
    with pytest.raises(ValueError, match="'a0' with 1 data.*wanted two data or more"):
        rank(arms_of(np.zeros((2, 3, 1))))
