"""One vocabulary: a name in whatever spelling is that name, a typo gets a hint, and a table has one way out."""

import inspect

import pytest
import torch
from matplotlib.figure import Figure

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.app.cli import main
from pyro_vae.app.defaults import CHOICES, DATASETS, REGULARIZERS, resolve
from pyro_vae.inference.schedules import SCHEDULES
from pyro_vae.judging.quotes import latex
from pyro_vae.parts import names
from tests.pairs import binary

ODD = [
    str.upper,
    lambda name: name.replace("-", "_"),
    lambda name: name.replace("-", "_").title(),
    lambda name: name.replace("_", "-"),
]


@pytest.mark.parametrize("spelling", ODD)
def test_every_part_has_one_name_in_every_spelling(spelling):
    for kind, table in names.PARTS.items():
        for name, where in table.items():
            assert names.check(kind, spelling(name)) == name
            assert names.find(kind, spelling(name)) is names.find(kind, name)
            if kind != "prior" or name != "flow":
                assert names.find(kind, where.partition(":")[2]) is names.find(kind, name)  # the class's own name
    assert all(names.networks(spelling(name)) is names.networks(name) for name in names.NETWORKS)


@pytest.mark.parametrize("spelling", ODD)
def test_every_option_of_the_command_takes_every_spelling(spelling):
    for option, choices in CHOICES.items():
        for choice in choices:
            if option == "network" and choice == "linear":
                continue
            assert getattr(resolve({option: spelling(choice)}), option) == choice
    for name in names.PARTS["posterior"]:
        if name != "point":
            assert resolve({"posterior": spelling(name)}) == resolve({"posterior": name})
    for data in DATASETS:
        assert resolve({"data": spelling(data)}) == resolve({"data": data})
    for name in REGULARIZERS:
        assert resolve({"regularizers": {spelling(name): 1.0}}).regularizers == {name: 1.0}


def test_a_pair_is_the_same_pair_and_is_saved_under_the_one_name():
    one, two = (torch.manual_seed(0) and pv.VAE.build((4,), latent_dim=2, hidden=(4,), posterior=name, network=net)
                for name, net in (("iaf", "mlp"), ("IAF", "MLP")))  # fmt: skip
    assert one.architecture == two.architecture and two.architecture.posterior == "iaf"
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True))


@pytest.mark.parametrize("spelling", ODD)
def test_bounds_estimators_and_schedules(spelling):
    for name in ("elbo", "iwae", "vr_max"):
        assert pv.Objective(spelling(name), num_samples=2).bound is getattr(pv, name)
    objective = pv.Objective("iwae", 2, estimator=spelling("doubly-reparameterized"))
    assert objective.estimator == "doubly-reparameterized"
    with pytest.raises(ValueError, match=r"got the function renyi, wanted what it returns, such as renyi\(0.5\)"):
        pv.Objective(spelling("renyi"), num_samples=2)
    vae = pv.VAE.build((1, 4, 4), latent_dim=2, hidden=(4,))
    for schedule in SCHEDULES:
        assert len(pv.fit(vae, binary(8), epochs=1, schedule=spelling(schedule), progress=False)) == 1
    scores = pv.anomaly_scores(vae, binary(4), score=spelling("log-likelihood"), num_samples=5, progress=False)
    assert torch.equal(scores, pv.anomaly_scores(vae, binary(4), num_samples=5, progress=False))


TYPOS = [
    (lambda: pv.VAE.build((4,), posterior="ifa"), "Did you mean 'iaf'"),
    (lambda: pv.VAE.build((4,), network="residul"), "Did you mean 'residual'"),
    (lambda: pv.VAE.build((4,), activation="rellu"), "Did you mean 'relu'"),
    (lambda: pv.VAE.build((4,), latent_dims=3), "Did you mean 'latent_dim'"),
    (lambda: pv.VAE.build((4,), posterior="nsf", posterior_options={"bin": 8}), "Did you mean 'bins'"),
    (lambda: pv.Objective("iwea"), "Did you mean 'iwae'"),
    (lambda: pv.Objective(pv.iwae, 2, estimator="doubly-reparametrized"), "Did you mean 'doubly-reparameterized'"),
    (lambda: pv.load("fashon-mnist"), "Did you mean 'fashion-mnist'"),
    (lambda: pv.load("digits", binarization="dynamc"), "Did you mean 'dynamic'"),
    (lambda: fitted(schedule="one-cylce"), "Did you mean 'one-cycle'"),
    (lambda: pv.gaps(small(), binary(4), start="frehs"), "Did you mean 'fresh'"),
    (lambda: resolve({"epoch": 3}), "Did you mean 'epochs'"),
    (lambda: resolve({"bound": "iwea"}), "Did you mean 'iwae'"),
]


def small():
    return pv.VAE.build((1, 4, 4), latent_dim=2, hidden=(4,))


def fitted(**options):
    return pv.fit(small(), binary(16), **({"epochs": 2, "seed": 0, "progress": False} | options))


@pytest.mark.parametrize("call, hint", TYPOS, ids=[hint for _, hint in TYPOS])
def test_a_typo_gets_a_hint(call, hint):
    with pytest.raises(ValueError, match=hint.replace("(", "\\(")):
        call()


@pytest.mark.parametrize("call, hint", [
    (lambda: fitted(epoch=3), r"fit\(\) got an unexpected keyword argument 'epoch'. Did you mean 'epochs'\?"),
    (lambda: pv.judge(small(), binary(4), num_sample=3), "Did you mean 'num_samples'"),
    (lambda: pv.fit_guide(small(), binary(8), epoch=3), "Did you mean 'epochs'"),
])  # fmt: skip
def test_an_unknown_keyword_gets_a_hint(call, hint):
    with pytest.raises(TypeError, match=hint):
        call()


@pytest.mark.parametrize("argv, hint", [
    (["fti"], "unknown command 'fti', wanted one of fit, evaluate, "),
    (["fti"], "Did you mean 'fit'?"),
    (["fit", "--epoch", "3"], "did you mean"),
    (["fit", "--posterior", "ifa"], "Did you mean 'iaf'?"),
    (["combinations", "--bound", "iwea"], "Did you mean 'iwae'?"),
])  # fmt: skip
def test_the_command_hints_too(argv, hint, capsys):
    assert main(argv) == 2
    assert hint.lower() in capsys.readouterr().err.lower()


def test_a_history_names_its_columns_and_is_drawn():
    history = fitted(validation=binary(8, seed=1))
    assert len(history["loss"]) == 2 and history["validation"][0] is not None
    with pytest.raises(
        ValueError, match="got the column 'validaton', wanted one of epoch, loss, .*Did you mean 'validation'"
    ):
        history["validaton"]
    assert fitted()["validation"] == [None, None]  # a column that there can be
    with pytest.raises(ValueError, match="wanted one of epoch, loss"):
        pv.History()["lost"]
    assert history.to_frame()["loss"].tolist() == history["loss"]
    axes = Figure().subplots()
    history.plot(ax=axes)
    assert {line.get_label() for line in axes.lines} == {"training", "validation"}
    assert torch.allclose(torch.tensor(axes.lines[0].get_ydata()), torch.tensor(history["bound"]).double())


SEVERAL = {
    "gallery",
    "latent_spaces",
    "side_by_side",
}  # that have a panel for each datum or view, and so no axes of one


def test_every_picture_of_one_pair_of_axes_takes_them():
    for name in plots.__all__:
        taken = "ax" in inspect.signature(getattr(plots, name)).parameters
        assert taken is (name not in SEVERAL), name
    x = torch.rand(4, 1, 3, 3)
    z = torch.randn(9, 2)
    calls = {
        "training_curve": ([{"epoch": 1, "bound": -1.0}],), "reconstructions": (x, x), "samples": (x,),
        "interpolations": (x[None],), "latent_space": (z,), "bounds_by_samples": ([1, 2], {"a": [1.0, 2.0]}),
        "gap_bars": ([{"guide": "g", "total": 1.0}],), "khat_against_log_p": ([0.1, 0.2], [1.0, 2.0]),
        "bracket": ([1.0, 2.0], [1.5, 2.5]), "rank_histogram": (torch.arange(10) % 5, 4),
        "coverage_curve": ([0.5], {"a": [0.5]}, 10), "kl_by_dimension": ([1.0, 2.0],),
        "number_bars": ([{"guide": "a", "elbo": 1.0, "elbo_mc_stderr": 0.5}],),
    }  # fmt: skip
    for name, arguments in calls.items():
        one, other = Figure().subplots(1, 2)
        figure = getattr(plots, name)(*arguments, ax=other)
        assert figure is other.figure and len(figure.axes) == 2, name
        assert other.has_data() and not one.has_data(), name
    with pytest.raises(ValueError, match="wanted images"):
        plots.samples(torch.rand(3, 2), ax=one)


def test_every_result_is_drawn_and_written_as_a_table():
    from pyro_vae.judging.results import Result

    def below(kind):
        return {kind, *(each for child in kind.__subclasses__() for each in below(child))}

    for kind in below(Result):
        if kind.__module__.startswith("pyro_vae"):
            assert "ax" in inspect.signature(kind.plot).parameters, kind
    found = pv.log_likelihood(small(), binary(6), num_samples=20, progress=False)
    for result in (found, pv.active_units(small(), binary(6)), pv.kl_per_dimension(small(), binary(6), progress=False)):
        axes = Figure().subplots()
        assert result.plot(ax=axes) is axes.figure and axes.has_data()
        assert result.to_latex().startswith("\\begin{tabular}{l") and result.to_frame().shape[0] == len(result.rows())
    figure = found.plot()
    (shown,) = [c for c in figure.axes[0].containers if c.lines[0].get_xdata()[0] == pytest.approx(found.value)]
    low, high = shown.lines[2][0].get_segments()[0][:, 0]
    assert (high - low) / 4 == pytest.approx(found.mc_stderr)


def test_latex_is_that_of_booktabs_with_what_is_special_to_it_escaped():
    text = latex([["a_b", "k̂ ok"], ["x & 50 %", "-1.50 ± 0.02"], ["~^\\", "nan"]])
    assert text.splitlines() == [
        r"\begin{tabular}{lr}", r"\toprule", r"a\_b & $\hat{k}$ ok \\", r"\midrule",
        r"x \& 50 \% & $-1.50 \pm 0.02$ \\", r"\textasciitilde{}\textasciicircum{}\textbackslash{} & nan \\",
        r"\bottomrule", r"\end{tabular}",
    ]  # fmt: skip
