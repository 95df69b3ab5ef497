"""The page of `pyro-vae explore` in a browser: what it decodes is what PyTorch decodes, whatever moves it.

Needs Playwright (the extra "browser") and a Chromium, Debian's own or the one that PYRO_VAE_CHROMIUM names.
"""

import functools
import itertools
import os
import shutil

import pyro.distributions as dist
import pytest
import torch

import pyro_vae as pv
from pyro_vae import plots
from pyro_vae.app import html, run_page
from pyro_vae.app.explore import contents, document
from pyro_vae.app.explore.contents import payload
from pyro_vae.app.explore.document import page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install -e '.[browser]'")
TOLERANCE = 1e-3
HOSTILE = '</script><script>window.hacked=1</script><img src=x onerror="window.hacked=1">'
NAMES = (HOSTILE, "one", "two")


@pytest.fixture(scope="module")
def browser():
    named = os.environ.get("PYRO_VAE_CHROMIUM")
    path = next(
        (
            found
            for name in (named, "chromium", "chromium-browser", "google-chrome")
            if name and (found := shutil.which(name))
        ),
        None,
    )
    if path is None:
        pytest.skip("needs a Chromium: apt-get install chromium, or PYRO_VAE_CHROMIUM=its path")
    with sync_api.sync_playwright() as playwright:
        try:
            opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except sync_api.Error as error:
            pytest.skip(f"{path} does not start: {str(error).splitlines()[0]}")
        yield opened
        opened.close()


def built(shape, seed=0, **options):
    """A pair of random weights, large enough for pixels to be far from one half."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = pv.VAE.build(shape, **options).eval()
        with torch.no_grad():
            for module in vae.model.likelihood.decoder.modules():
                if isinstance(module, torch.nn.GroupNorm):
                    module.weight.uniform_(0.5, 1.5)
                    module.bias.uniform_(-0.5, 0.5)
                elif getattr(module, "weight", None) is not None:
                    module.weight.mul_(2.0)
                    if module.bias is not None:
                        module.bias.uniform_(-0.3, 0.3)
    return vae


def split(shape, count=24):
    x = (torch.rand(count, *shape, generator=torch.Generator().manual_seed(0)) < 0.4).float()
    return pv.Split(x, labels=torch.arange(count) % 3)


def opened(browser, tmp_path, vae, data, width=1280, height=900, **settings):
    """The page, and what went wrong on it or was asked of the network."""
    about = {"title": f"A run {HOSTILE}", "dataset": HOSTILE}
    path = tmp_path / "page.html"
    path.write_text(page(*payload(vae, data, about=about, names=NAMES, **settings.pop("of", {}))), encoding="utf-8")
    context = browser.new_context(viewport={"width": width, "height": height}, **settings)
    shown, wrong = context.new_page(), []
    shown.set_default_timeout(20_000)
    shown.on("pageerror", lambda error: wrong.append(str(error)))
    shown.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    shown.on("request", lambda request: wrong.append(request.url) if not request.url.startswith("file:") else None)
    shown.goto(path.as_uri())
    shown.wait_for_function("window.explorer || document.querySelector('#about.bad')")
    return shown, wrong


def mean(vae, z):
    with torch.no_grad():
        return vae.decode(torch.tensor(z)).mean


def is_decoded(shown, vae, z):
    """The page shows E[x | z] of this z: its numbers, and the levels of the canvas."""
    wanted = mean(vae, z)
    got = torch.tensor(shown.evaluate("window.explorer.pixels()")).reshape(wanted.shape)
    assert (got - wanted).abs().max() < TOLERANCE, (got - wanted).abs().max()
    levels = torch.tensor(shown.evaluate(
        "(() => { const c = document.getElementById('image'); return Array.from(c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data); })()"
    )).reshape(*wanted.shape[1:], 4)  # fmt: skip
    channels = wanted if len(wanted) == 3 else wanted.expand(3, -1, -1)
    assert (levels[..., :3] - 255 * channels.clamp(0, 1).permute(1, 2, 0)).abs().max() < 0.5 + 255 * TOLERANCE


def z_of(shown):
    return shown.evaluate("window.explorer.z()")


MLP = {"shape": (1, 9, 7), "latent_dim": 4, "hidden": (16, 12)}
CONV = {"shape": (3, 9, 7), "latent_dim": 4, "hidden": (6, 8), "network": "conv", "likelihood": "normal"}
NETWORKS = [
    *({**MLP, "activation": name} for name in ("silu", "relu", "gelu", "elu", "tanh", "softplus")),
    {**MLP, "network": "gated"}, {**MLP, "network": "linear"}, CONV,
    {**CONV, "shape": (1, 12, 10), "activation": "relu"},
    {**CONV, "network": "residual", "hidden": (8, 16)}, {**MLP, "network": "residual", "activation": "gelu", "hidden": (4, 4, 8)},
    {**MLP, "likelihood": "continuous-bernoulli"}, {**MLP, "likelihood": "discretized-logistic"},
    {**CONV, "likelihood": "logistic-mixture", "likelihood_options": {"num_components": 3}},
    {**MLP, "likelihood": "logistic-mixture", "likelihood_options": {"num_components": 2, "initial_scale": 2e-3}},
    {**MLP, "likelihood": "discretized-logistic", "likelihood_options": {"levels": 4, "initial_scale": 0.3}},
    {**MLP, "shape": (3, 9, 7), "likelihood": "categorical", "likelihood_options": {"levels": 8}},
    {**MLP, "likelihood": "poisson", "likelihood_options": {"levels": 256}},
    {**MLP, "likelihood": "negative-binomial", "likelihood_options": {"concentration": "network", "link": "exp"}},
    {**MLP, "likelihood": "normal", "scale": "network", "standardize": True},
    {**MLP, "latent_dim": 1},
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    NETWORKS,
    ids=lambda o: "-".join(str(v) for k, v in o.items() if k in ("network", "likelihood", "activation", "latent_dim")),
)
def test_every_decoder_is_that_of_pytorch(browser, tmp_path, options):
    vae = built(**options)
    scaled = getattr(vae.model.likelihood, "standardize", None)
    if scaled is not None:
        scaled.measure([torch.rand(20, *options["shape"], generator=torch.Generator().manual_seed(1)) * 0.5])
    shown, wrong = opened(browser, tmp_path, vae, split(options["shape"]))
    z = 1.5 * torch.randn(8, options["latent_dim"], generator=torch.Generator().manual_seed(2))
    got = torch.tensor(shown.evaluate("all => all.map((z) => window.explorer.decode(z))", z.tolist()))
    wanted = mean(vae, z.tolist())
    scale = wanted.abs().max().clamp(min=1)
    assert (got.reshape(wanted.shape) - wanted).abs().max() < TOLERANCE * scale
    assert wanted.std() > 0.02 and shown.evaluate("window.explorer.right") and not wrong
    shown.context.close()


@pytest.mark.parametrize("options", [MLP, CONV], ids=["mlp", "conv"])
def test_the_mouse_moves_clicks_and_drags(browser, tmp_path, options):
    vae, data = built(**options), split(options["shape"])
    shown, wrong = opened(browser, tmp_path, vae, data)
    is_decoded(shown, vae, [0.0] * 4)
    a, b = torch.tensor(shown.evaluate("window.explorer.directions()"))

    def at(u, v):
        return shown.evaluate("([u, v]) => window.explorer.screen(u, v)", [u, v])

    # A pointer that passes by shows, and changes nothing.
    for u, v in ((1.3, -2.0), (-1.7, 1.9)):
        shown.mouse.move(*at(u, v))
        hover = shown.evaluate("window.explorer.hover()")
        assert torch.allclose(torch.tensor(hover), u * a + v * b, atol=0.02) and z_of(shown) == [0.0] * 4
        is_decoded(shown, vae, hover)
    shown.mouse.move(5, 5)
    is_decoded(shown, vae, [0.0] * 4)
    # A click stays.
    shown.mouse.click(*at(2.2, -2.2))
    assert torch.allclose(torch.tensor(z_of(shown)), 2.2 * a - 2.2 * b, atol=0.02)
    is_decoded(shown, vae, z_of(shown))
    # A drag moves on.
    shown.mouse.move(*at(2.2, 2.2))
    shown.mouse.down()
    for u in (1.0, 0.0, -1.2):
        shown.mouse.move(*at(u, 2.1))
        assert torch.allclose(torch.tensor(z_of(shown)), u * a + 2.1 * b, atol=0.02)
        is_decoded(shown, vae, z_of(shown))
    shown.mouse.up()
    kept = z_of(shown)
    shown.mouse.move(*at(0.0, 0.0))
    assert z_of(shown) == kept
    # A click on a datum chooses it: its code, its image, its reconstruction.
    points = shown.evaluate("window.explorer.points()")
    alone = max(
        range(24),
        key=lambda i: min(
            ((p[0] - points[i][0]) ** 2 + (p[1] - points[i][1]) ** 2) for j, p in enumerate(points) if j != i
        ),
    )
    shown.mouse.click(*at(*points[alone]))
    assert shown.evaluate("window.explorer.chosen()") == alone
    assert torch.allclose(torch.tensor(z_of(shown)), vae.encode(data, seed=0)[alone], atol=1e-6)
    is_decoded(shown, vae, z_of(shown))
    for canvas, wanted in (
        ("original", data[:][alone]),
        ("reconstruction", vae.reconstruct(data[alone : alone + 1], seed=0)[0]),
    ):
        levels = torch.tensor(shown.evaluate(
            "id => { const c = document.getElementById(id); return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data); }",
            canvas)).reshape(*wanted.shape[1:], 4)[..., 0]  # fmt: skip
        assert (levels - 255 * wanted[0].clamp(0, 1)).abs().max() < 0.5 + 255 * TOLERANCE
    assert f"Test datum {alone}, label {NAMES[alone % 3]}" == shown.inner_text("#datum-name")
    assert not wrong
    shown.context.close()


@pytest.mark.parametrize("options", [MLP, CONV], ids=["mlp", "conv"])
def test_keys_move_and_choose(browser, tmp_path, options):
    vae, data = built(**options), split(options["shape"])
    shown, wrong = opened(browser, tmp_path, vae, data)
    a, b = torch.tensor(shown.evaluate("window.explorer.directions()"))
    shown.focus("#map")
    for key, (u, v) in {
        "ArrowRight": (1, 0),
        "ArrowUp": (0, 1),
        "ArrowLeft": (-1, 0),
        "ArrowDown": (0, -1),
        "Shift+ArrowUp": (0, 5),
    }.items():
        before = torch.tensor(z_of(shown))
        shown.keyboard.press(key)
        move = torch.tensor(z_of(shown)) - before
        step = move.norm() / (u * u + v * v) ** 0.5
        assert 0.05 < step < 0.5 and torch.allclose(move, step * (u * a + v * b), atol=1e-5)
        is_decoded(shown, vae, z_of(shown))
    shown.keyboard.press("Home")
    assert z_of(shown) == [0.0] * 4
    codes = vae.encode(data, seed=0)
    for key, chosen in (("PageDown", 0), ("PageDown", 1), ("PageUp", 0), ("PageUp", 23)):
        shown.keyboard.press(key)
        assert shown.evaluate("window.explorer.chosen()") == chosen
        assert torch.allclose(torch.tensor(z_of(shown)), codes[chosen], atol=1e-6)
        is_decoded(shown, vae, z_of(shown))
    shown.keyboard.press("Home")
    shown.keyboard.press("Enter")
    on_plane = codes @ torch.stack([a, b], 1)
    assert shown.evaluate("window.explorer.chosen()") == int(on_plane.norm(dim=1).argmin()) and not wrong
    shown.context.close()


@pytest.mark.parametrize("options", [MLP, CONV], ids=["mlp", "conv"])
def test_fingers_tap_and_drag_on_a_phone(browser, tmp_path, options):
    vae = built(**options)
    shown, wrong = opened(
        browser,
        tmp_path,
        vae,
        split(options["shape"]),
        width=390,
        height=844,
        has_touch=True,
        is_mobile=True,
        device_scale_factor=2,
    )
    assert shown.evaluate("document.documentElement.scrollWidth") <= 390
    shown.locator("#map").scroll_into_view_if_needed()
    a, b = torch.tensor(shown.evaluate("window.explorer.directions()"))

    def at(u, v):
        return shown.evaluate("([u, v]) => window.explorer.screen(u, v)", [u, v])

    shown.touchscreen.tap(*at(2.1, -2.1))
    assert torch.allclose(torch.tensor(z_of(shown)), 2.1 * a - 2.1 * b, atol=0.03)
    is_decoded(shown, vae, z_of(shown))
    before, device = shown.evaluate("scrollY"), shown.context.new_cdp_session(shown)

    def touch(kind, *where):
        points = [{"x": where[0], "y": where[1]}] if where else []
        device.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", *at(-2.2, 2.2))
    for u in (-1.0, 0.5, 1.9):
        touch("touchMove", *at(u, 1.0))
        shown.wait_for_timeout(50)
        assert torch.allclose(torch.tensor(z_of(shown)), u * a + 1.0 * b, atol=0.03)
        is_decoded(shown, vae, z_of(shown))
    touch("touchEnd")
    assert shown.evaluate("scrollY") == before and not wrong  # the plane moves, not the page
    shown.context.close()


def test_sliders_morphs_attributes_and_the_grid_decode_what_they_say(browser, tmp_path):
    vae, data = built(**MLP), split(MLP["shape"])
    shown, wrong = opened(browser, tmp_path, vae, data)
    codes = vae.encode(data, seed=0)
    active = codes.double().var(0).argsort(descending=True).tolist()
    assert shown.evaluate("window.explorer.latents().order") == active
    shown.locator("#further").evaluate("element => { element.open = true; }")
    assert shown.locator(".slider span").all_text_contents() == [f"z{d + 1}" for d in active]
    # A slider is one coordinate.
    shown.locator(".slider input").nth(1).fill("1.5")
    assert z_of(shown) == pytest.approx([1.5 if d == active[1] else 0.0 for d in range(4)])
    is_decoded(shown, vae, z_of(shown))
    # A morph is a straight line between codes of two data of one's choice.
    for number, end in ((5, "#as-start"), (7, "#as-end")):
        shown.focus("#map")
        while shown.evaluate("window.explorer.chosen()") != number:
            shown.keyboard.press("PageDown")
        shown.click(end)
    shown.locator("#morph").fill("0.25")
    assert torch.allclose(torch.tensor(z_of(shown)), codes[5] + 0.25 * (codes[7] - codes[5]), atol=1e-5)
    is_decoded(shown, vae, z_of(shown))
    # An attribute is the way from the mean of those without to the mean of those with it, from where z was.
    shown.locator("#attribute").select_option("1")
    base = torch.tensor(z_of(shown))
    has = data.labels == 1
    direction = codes[has].mean(0) - codes[~has].mean(0)
    for t in (-4.0, 2.5, 4.0):
        shown.locator("#factor").fill(str(t))
        assert torch.allclose(torch.tensor(z_of(shown)), base + t * direction, atol=1e-5)
        is_decoded(shown, vae, z_of(shown))
    # The grid is 15 by 15, in the prior's quantiles; a click goes there.
    shown.click("#origin")
    shown.evaluate("window.explorer.drawn()")
    a, b = torch.tensor(shown.evaluate("window.explorer.directions()"))
    box = shown.locator("#grid").bounding_box()
    quantiles = dist.Normal(0.0, 1.0).icdf(torch.linspace(0.01, 0.99, 15))
    for column, line in ((0, 0), (12, 3)):
        shown.locator("#grid").click(
            position={"x": box["width"] * (column + 0.5) / 15, "y": box["height"] * (line + 0.5) / 15}
        )
        wanted = quantiles[column] * a + quantiles[14 - line] * b
        assert torch.allclose(torch.tensor(z_of(shown)), wanted, atol=1e-4)
        is_decoded(shown, vae, z_of(shown))
    # Two latents instead of the principal components: a plane of two coordinates.
    shown.locator("#kind").select_option("latents")
    shown.locator("#across").select_option("3")
    shown.locator("#up").select_option("1")
    a, b = torch.tensor(shown.evaluate("window.explorer.directions()"))
    assert a.tolist() == [0, 0, 0, 1] and b.tolist() == [0, 1, 0, 0]
    shown.click("#origin")
    shown.locator("#map").scroll_into_view_if_needed()
    shown.mouse.click(*shown.evaluate("window.explorer.screen(2.3, -2.3)"))
    assert z_of(shown) == pytest.approx([0, -2.3, 0, 2.3], abs=0.02) and not wrong
    is_decoded(shown, vae, z_of(shown))
    shown.context.close()


@pytest.mark.parametrize("posterior", ["diagonal", "full", "iaf"])
def test_the_posterior_of_a_datum_is_the_guides(browser, tmp_path, posterior):
    vae, data = built(**MLP, posterior=posterior), split(MLP["shape"])
    shown, wrong = opened(browser, tmp_path, vae, data)
    plane = torch.tensor(shown.evaluate("window.explorer.directions()"))
    for i in (0, 5):
        q, found = vae.posterior(data[i : i + 1]), shown.evaluate("i => window.explorer.posterior(i)", i)
        if posterior == "iaf":
            draws = q.sample((4000,))[:, 0] @ plane.T
            got = torch.tensor(found["cloud"])
            assert ((got.mean(0) - draws.mean(0)).abs() < 4.5 * draws.std(0) / len(got) ** 0.5 + 0.01).all()
            continue
        covariance = q.covariance_matrix[0] if posterior == "full" else q.stddev[0].square().diag()
        wanted = plane @ covariance @ plane.T
        assert found["covariance"] == pytest.approx(
            [wanted[0, 0].item(), wanted[0, 1].item(), wanted[1, 1].item()], abs=3e-3
        )
        assert found["mean"] == pytest.approx((plane @ q.mean[0]).tolist(), abs=1e-5)
    assert shown.evaluate("window.explorer.reference(0)") is None and not wrong
    shown.context.close()


def test_the_exact_posterior_of_a_datum_is_hmcs(browser, tmp_path, monkeypatch):
    vae, data = built(**MLP), split(MLP["shape"])
    quick = functools.partial(pv.reference, num_samples=25, num_warmup=40, num_chains=4, num_leapfrog=2)
    monkeypatch.setattr(contents, "reference", quick)
    shown, wrong = opened(browser, tmp_path, vae, data, of={"references": 1, "progress": False})
    plane = torch.tensor(shown.evaluate("window.explorer.directions()"))
    with pytest.warns(UserWarning, match="have not converged"):
        draws = quick(vae.model, vae.guide, data[:1], seed=0, progress=False).draws["z"]
    wanted = draws[:, :, 0].flatten(0, 1) @ plane.T
    assert torch.allclose(torch.tensor(shown.evaluate("window.explorer.reference(0)")), wanted, atol=5e-3)
    assert shown.evaluate("window.explorer.reference(1)") is None
    shown.focus("#map")
    shown.keyboard.press("PageDown")
    assert "orange crosses: the exact posterior" in shown.inner_text("#facts") and "not converged" in shown.inner_text(
        "#facts"
    )
    assert not wrong
    shown.context.close()


def test_a_prior_of_another_form_has_its_own_quantiles(browser, tmp_path):
    vae = built(**MLP, prior="mixture")
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        draws = vae.model.prior().sample((20_000,))
    shown, wrong = opened(browser, tmp_path, vae, split(MLP["shape"]))
    for direction in shown.evaluate("window.explorer.directions()"):
        along = draws @ torch.tensor(direction)
        got = torch.tensor(shown.evaluate("v => window.explorer.quantiles(v)", direction))
        shares = torch.linspace(0.01, 0.99, 15)
        wanted = along.quantile(shares)
        # The standard error of a quantile of 1,000 draws, by the density that neighbouring quantiles show.
        slope = (along.quantile(shares + 0.009) - along.quantile(shares - 0.009)) / 0.018
        assert ((got - wanted).abs() < 4.5 * slope * (shares * (1 - shares) / 1000).sqrt() + 1e-2).all()
    assert not wrong
    shown.context.close()


def test_names_from_data_stay_words_and_nothing_else_runs(browser, tmp_path):
    shown, wrong = opened(browser, tmp_path, built(**MLP), split(MLP["shape"]))
    assert shown.title() == f"A run {HOSTILE}" and shown.inner_text("h1") == f"A run {HOSTILE}"
    assert shown.inner_text("#about").startswith(HOSTILE)
    assert shown.locator("#legend button").first.inner_text() == HOSTILE
    assert shown.locator("#attribute option").first.inner_text() == HOSTILE
    assert shown.locator("img").count() == 0 and shown.locator("script").count() == 3 and not wrong
    shown.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s); }"
    )
    assert shown.evaluate("fetch('https://example.com/').then(() => 'loaded', () => 'refused')") == "refused"
    assert shown.evaluate("window.hacked") is None and any("Content Security Policy" in text for text in wrong)
    shown.context.close()


@pytest.mark.parametrize("width", [1280, 700, 390])
def test_no_width_is_overflown(browser, tmp_path, width):
    shown, wrong = opened(browser, tmp_path, built(**MLP), split(MLP["shape"]), width=width)
    shown.evaluate("window.explorer.drawn()")
    shown.locator("#further").evaluate("element => { element.open = true; }")
    assert shown.evaluate("document.documentElement.scrollWidth") <= width and not wrong
    wide = shown.evaluate(
        "[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1).map((e) => e.id || e.tagName)"
    )
    assert wide == []
    shown.context.close()


@pytest.mark.pictures
@pytest.mark.parametrize("width", [1280, 390])
def test_the_other_pages_fit_too_with_words_large_enough_to_read(browser, tmp_path, width):
    # A long word, a wide table and wide pictures: the page itself never moves sideways.
    long = "a/" + "very-long-name-" * 12
    figure = plots.cost([{"rank": 0, "arm": long, "seconds": 2.0, "log_p": -3.0, "mc_stderr": 0.1}])
    drawn = html.figures([html.Picture("cost", figure, long)])
    wide = f"<p>{long}</p><div class='wide'><table><tr>{'<td class=number>-27.17 ± 0.004</td>' * 9}</tr></table></div>"
    narrow = "<table><tr><th>approximation gap</th><td class=number>-10.02 ± 0.04 nats</td><td>the estimator's; " \
             "beside one that uses the best q of each datum, too</td></tr></table>"  # fmt: skip
    figure.savefig(tmp_path / "a.png", dpi=150)
    picture = {"training_curve.png": (tmp_path / "a.png").read_bytes()}
    pages = {
        "study": html.document(long, f"<pre>{long}</pre>{narrow}{wide}{drawn}"),
        "run": run_page.page(long, {"test_elbo": 1.0, "test_elbo_stderr": 0.1, "test_reconstruction": 1, "test_kl": 0,
                                    "test_log_likelihood": 1.0, "test_log_likelihood_stderr": 0.1,
                                    "test_log_likelihood_data_stderr": 0.1}, picture, {"--data": long}, [long]),
    }  # fmt: skip
    context = browser.new_context(viewport={"width": width, "height": 900})
    for name, text in pages.items():
        (tmp_path / f"{name}.html").write_text(text, encoding="utf-8")
        shown = context.new_page()
        shown.goto((tmp_path / f"{name}.html").as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") <= width, name
        assert all(shown.evaluate("[...document.querySelectorAll('body > table td')].map(e => e.clientWidth > 120)")), (
            name
        )
        assert shown.evaluate("document.querySelector('img').getBoundingClientRect().width") >= 560, name
    context.close()


MUTANTS = [
    ("silu: (x) => x * sigmoid(x)", "silu: (x) => Math.max(x, 0)", MLP),
    ("sigmoid: (_, raw) => raw.map(sigmoid)", "sigmoid: (_, raw) => raw.map(Math.tanh)", MLP),
    ("product(weight.values, 1, rows, rows,", "product(weight.values, channels, 1, rows,", CONV),
]


@pytest.mark.parametrize("was, becomes, options", MUTANTS, ids=["activation", "link", "transposed"])
def test_a_page_that_decodes_wrongly_says_so(browser, tmp_path, monkeypatch, was, becomes, options):
    parts = tmp_path / "parts"
    shutil.copytree(document._PARTS, parts)
    script = (parts / "page.js").read_text(encoding="utf-8")
    assert was in script
    (parts / "page.js").write_text(script.replace(was, becomes), encoding="utf-8")
    monkeypatch.setattr(document, "_PARTS", parts)
    vae = built(**options)
    shown, _ = opened(browser, tmp_path, vae, split(options["shape"]))
    assert not shown.evaluate("window.explorer.right")
    assert "decodes wrongly" in shown.inner_text("#about.bad")
    with pytest.raises(AssertionError):
        for z in itertools.product((-1.0, 1.0), repeat=4):  # what the tests above look at sees it, too
            got = torch.tensor(shown.evaluate("z => window.explorer.decode(z)", list(z)))
            assert (got - mean(vae, list(z)).flatten()).abs().max() < TOLERANCE
    shown.context.close()
