"""What a picture shows are the numbers that it was given."""

import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from scipy.stats import binom

from pyro_vae import plots
from pyro_vae.app import report
from pyro_vae.judging._calibration import calibration


def line(axes, label):
    (found,) = [item for item in axes.lines if item.get_label() == label]
    return found.get_data()


def band(collection):
    """Lower and upper edge of a filled band, by x."""
    points = np.concatenate([path.vertices for path in collection.get_paths()])
    xs = sorted(set(points[:, 0]))
    return xs, [(points[points[:, 0] == x, 1].min(), points[points[:, 0] == x, 1].max()) for x in xs]


def whiskers(axes):
    """Ends of vertical error bars, (M, 2)."""
    return np.array([segment[:, 1] for c in axes.collections for segment in getattr(c, "get_segments", list)()])


def test_bounds_by_samples_shows_values_bands_and_log_p():
    figure = plots.bounds_by_samples(
        [1, 10, 100],
        {"IWAE": torch.tensor([-9.0, -8.0, -7.5]), "other": [-9.0, None, -8.0]},
        {"IWAE": [0.3, 0.2, 0.1]},
        -7.0,
        0.05,
    )
    (axes,) = figure.axes
    assert_allclose(line(axes, "IWAE"), ([1, 10, 100], [-9, -8, -7.5]))
    assert_allclose(line(axes, "other")[1], [-9, np.nan, -8])
    xs, edges = band(axes.collections[0])
    assert xs == [1, 10, 100]
    assert_allclose(edges, [(-9.6, -8.4), (-8.4, -7.6), (-7.7, -7.3)])
    assert_allclose(line(axes, "log p(x): −7.00")[1], [-7, -7])
    (span,) = axes.patches
    assert_allclose((span.get_y(), span.get_height()), (-7.1, 0.2))
    assert axes.get_xscale() == "log" and [t.get_text() for t in axes.get_xticklabels()] == ["1", "10", "100"]
    assert "nats" in axes.get_ylabel()


def test_bracket_orders_data_and_gives_the_width_with_its_error():
    lower, width = np.array([-5.0, -9.0, -7.0]), np.array([0.1, 0.3, -0.1])
    exact, error = lower + 0.05, np.array([0.03, 0.04, 0.0])
    above, below = plots.bracket(lower, lower + width, exact, error, [0.04, 0.03, 0.0]).axes
    segments = [c for c in above.collections if c.get_label() == "bracket"][0].get_segments()
    assert_allclose([s[:, 1] for s in segments], [(-9, -8.7), (-7, -7.1), (-5, -4.9)])
    # Errors of bounds stand at the bounds.
    errors = [s[:, 1] for c in above.collections if c.get_label() != "bracket" for s in c.get_segments()]
    assert_allclose(errors[:3], [(-9.08, -8.92), (-7, -7), (-5.06, -4.94)])
    assert_allclose(errors[3:], [(-8.76, -8.64), (-7.1, -7.1), (-4.98, -4.82)])
    assert_allclose(line(above, "log p(x)")[1], [-8.95, -6.95, -4.95])
    assert_allclose(line(below, "log p(x)")[1], [0.05] * 3)
    assert_allclose(below.lines[0].get_ydata(), [0.3, -0.1, 0.1])
    assert_allclose(whiskers(below), [(0, 0.3), (0, -0.1), (0, 0.1)], atol=1e-12)
    assert below.get_title(loc="right") == f"mean 0.100 ± {width.std(ddof=1) / 3**0.5:.3f} nats"


def rows():
    split = {"approximation": 1.5, "approximation_stderr": 0.1, "amortization": 0.5, "amortization_stderr": 0.2}
    return [
        {"guide": "diagonal", "split": "train", **split},
        {"guide": "diagonal", "split": "test", **split, "amortization": 0.9},
        {"guide": "mine", "split": "test", "total": 3.0, "total_stderr": None},
    ]


def test_gap_bars_stack_and_leave_the_total_alone():
    axes = plots.gap_bars(json.loads(json.dumps(rows()))).axes[0]
    bars = sorted((round(b.get_x() + b.get_width() / 2, 6), round(b.get_y(), 6), b.get_height()) for b in axes.patches)
    assert_allclose(bars, [(-0.2, 0, 1.5), (-0.2, 1.5, 0.5), (0.2, 0, 1.5), (0.2, 1.5, 0.9), (1.2, 0, 3.0)])
    assert_allclose(sorted(map(tuple, whiskers(axes))), sorted([(1.3, 1.7), (1.6, 2.4), (1.3, 1.7), (2.0, 2.8)]))
    assert [t.get_text() for t in axes.get_legend().get_texts()] == ["approximation", "amortization", "total only"]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["train", "test", "test"]
    hatches = {bar.get_hatch() for bar in axes.patches}
    assert len(hatches) == 3  # told apart without colour


def test_khat_shows_every_datum_and_the_worst_images():
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 1, 4, 4) / 5
    k, x = [0.2, 0.9, -np.inf, 0.75, None], [-80.0, -90.0, -70.0, -60.0, -50.0]
    figure = plots.khat_against_log_p(k, x, 0.7, images, worst=3)
    axes, *panels = figure.axes
    points = {c.get_label(): c.get_offsets().data.tolist() for c in axes.collections}
    assert points["reliable (1)"] == [[-80, 0.2]]
    assert points["unreliable (2)"] == [[-90, 0.9], [-60, 0.75]]
    (exact,) = points["constant weights, k̂ = −∞ (1)"]
    assert exact[0] == -70 and axes.get_ylim()[0] < exact[1] < 0.2
    assert line(axes, "limit 0.70")[1] == [0.7, 0.7]
    assert [panel.images[0].get_array()[0, 0] for panel in panels] == pytest.approx([0.2, 0.6, 0.0])
    assert [panel.get_xlabel() for panel in panels] == ["k̂ 0.90", "k̂ 0.75", "k̂ 0.20"]


def test_khat_of_exact_guides_only():
    (axes,) = plots.khat_against_log_p([-np.inf] * 3, [-1.0, -2.0, -3.0]).axes
    assert len(axes.collections[1].get_offsets()) == 3


def test_rank_histogram_counts_ranks_in_equal_bars():
    ranks = np.random.default_rng(0).integers(0, 100, (400, 2))
    figure = plots.rank_histogram(ranks, 99, num_bins=18)  # 20 is the nearest that divides 100
    for d, axes in enumerate(figure.axes[:2]):
        bars = [patch for patch in axes.patches if patch.get_width() == pytest.approx(5)]
        assert [bar.get_height() for bar in bars] == [((ranks[:, d] // 5) == i).sum() for i in range(20)]
        edges = sorted({item.get_ydata()[0] for item in axes.lines})
        assert_allclose(edges, [binom.ppf(0.025, 400, 0.05), 20, binom.ppf(0.975, 400, 0.05)])


def test_ranks_are_called_by_their_latents_and_those_left_out_are_counted():
    ranks = np.random.default_rng(0).integers(0, 20, (60, 10))
    names = [f"w[{d}]" for d in range(10)]
    figure = plots.rank_histogram(ranks, 19, names=names)
    assert [axes.get_title() for axes in figure.axes if axes.axison] == names[:8]
    assert figure.get_suptitle().endswith("8 of 10 latents")


def test_coverage_curve_and_its_band():
    (axes,) = plots.coverage_curve([0.5, 0.9], {"diagonal": [0.4, 0.85], "NSF": torch.tensor([0.5, 0.91])}, 200).axes
    assert_allclose(line(axes, "diagonal"), ([0.5, 0.9], [0.4, 0.85]))
    assert_allclose(line(axes, "NSF"), ([0.5, 0.9], [0.5, 0.91]), rtol=1e-6)
    xs, edges = band(axes.collections[0])
    middle = int(np.argmin(np.abs(np.array(xs) - 0.5)))
    assert_allclose(edges[middle], binom.ppf([0.025, 0.975], 200, 0.5) / 200)
    bands = calibration(("a",), torch.arange(200)[:, None] % 20, 19).coverage()
    (axes,) = plots.coverage_curve(
        bands.nominal, {"a": bands.empirical[:, 0]}, 200, bands.lower, bands.upper, bands.level
    ).axes
    xs, edges = band(axes.collections[0])
    assert_allclose(xs, bands.nominal)
    assert_allclose(edges, torch.stack([bands.lower, bands.upper], 1))
    assert axes.collections[0].get_label() == "95 % band, all points"


def test_kl_by_dimension_falls_and_counts_what_is_used():
    (axes,) = plots.kl_by_dimension([0.5, 0.001, 2.0], [0.1, 0.0, 0.2]).axes
    assert [bar.get_height() for bar in axes.patches] == [2.0, 0.5, 0.001]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["z3", "z1", "z2"]
    assert_allclose(whiskers(axes), [(1.6, 2.4), (0.3, 0.7), (0.001, 0.001)])
    assert axes.get_title(loc="left") == "KL by latent: 2 of 3 carry 0.01 nats or more"
    (axes,) = plots.kl_by_dimension([0.5, 2.0], names=["z[0]", "w"]).axes
    assert [t.get_text() for t in axes.get_xticklabels()] == ["w", "z[0]"]


@pytest.mark.pictures
def test_a_picture_is_written(tmp_path):
    report.save(plots.gap_bars(rows()), tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").stat().st_size > 5000


def test_where_no_test_looks_at_it_a_picture_is_blank(tmp_path):
    report.save(plots.gap_bars(rows()), tmp_path / "gaps.png")
    assert (tmp_path / "gaps.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "gaps.png").stat().st_size < 1000


ARMS = [f"{family}, {bound}" for family in ("diagonal", "low-rank", "von-mises-fisher") for bound in ("elbo", "iwae")]
ROWS = [
    {"arm": arm, "rank": i, "seconds": 10.0 + i / 100, "log_p": -23 - i / 100, "elbo": -24.0, "mc_stderr": 0.01,
     "diff": i / 10, "diff_low": 0.0, "diff_high": 1.0, "p_worse": None if i == 0 else 0.9, "holds": i > 2}
    for i, arm in enumerate(ARMS)
]  # fmt: skip


def overlapping(texts, figure):
    """Pairs of texts of which one lies over the other, as drawn."""
    boxes = [(text.get_text(), text.get_window_extent(figure.canvas.get_renderer())) for text in texts]
    boxes = [(text, box) for text, box in boxes if text]
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)]


@pytest.mark.parametrize("draw", [
    lambda arms: plots.differences([row | {"arm": arm} for row, arm in zip(ROWS, arms, strict=False)]),
    lambda arms: plots.gap_bars([{"guide": arm, "total": 0.5, "total_stderr": 0.1} for arm in arms]),
    lambda arms: plots.khat_maps({arm: torch.linspace(-1, 2, 50) for arm in arms}),
    lambda arms: plots.side_by_side({arm: torch.zeros(10, 1, 8, 8) for arm in arms}),
])  # fmt: skip
@pytest.mark.parametrize("more", ["", ", num_samples=50, learning_rate=0.0005, hidden=[400,400]"])
def test_names_of_arms_do_not_lie_over_one_another(draw, more):
    figure = draw([arm + more for arm in ARMS])
    figure.canvas.draw()
    axes = figure.axes[: len(ARMS) * 10]
    names = [text for each in axes for text in (*each.get_yticklabels(), each.yaxis.label)]
    across = [text for text in axes[0].get_xticklabels() if text.get_rotation() == 0]
    assert overlapping(names, figure) == [] and overlapping(across, figure) == []


def test_points_of_the_cost_have_their_rank_and_the_names_are_beside():
    figure = plots.cost(ROWS)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "4", "5", "6"]
    named = [text.get_text() for text in axes.get_legend().get_texts()]
    assert [name.replace("\n", " ") for name in named[-6:]] == [f"{i + 1}: {arm}" for i, arm in enumerate(ARMS)]
    assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1  # not over the data


def test_khat_changes_colour_at_the_limit():
    def luminous(k, limit):
        image = plots.khat_maps({"a": [k]}, limit).axes[0].images[0]
        red, _, blue, _ = image.cmap(image.norm(k))
        return blue - red

    for limit in (0.5, 0.67, 0.7):
        assert luminous(limit - 1e-3, limit) > 0 > luminous(limit + 1e-3, limit)  # blue below, orange above
        assert luminous(-1.0, limit) > 0 > luminous(5.0, limit)


def test_columns_of_unlike_scale_are_all_seen():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 1e4, 1.0])
    x[:, 1] += 5e4
    panels = plots.reconstructions(x, x + torch.tensor([0.0, 1e4, 1.0])).axes
    shown, _, difference = (axes.images[0].get_array() for axes in panels[:3])
    assert (shown.std(0) > 0.1 * np.abs(shown).max()).all()
    assert_allclose(difference[:, 0], 0, atol=1e-6)
    assert (difference[:, 1:] < -0.5).all()
    assert "standard deviations" in panels[-1].get_ylabel()
    alike = plots.reconstructions(x[:, [0, 2]], x[:, [0, 2]]).axes  # the values themselves
    assert_allclose(alike[0].images[0].get_array(), x[:, [0, 2]].numpy())


def test_classes_differ_in_colour_or_shape():
    axes = plots.latent_space(torch.randn(40, 2), torch.arange(40) % 20).axes[0]
    looks = {(tuple(c.get_facecolor()[0]), len(c.get_paths()[0].vertices)) for c in axes.collections}
    assert len(looks) == 20
