"""The numbers of a fitted pair on test data, as one flat mapping with its protocol."""

from __future__ import annotations

import functools
import hashlib
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch

from pyro_vae import __version__
from pyro_vae.app import serving
from pyro_vae.app.defaults import FULL_SAMPLES, FitOptions
from pyro_vae.app.remarks import codes_outside, levels
from pyro_vae.data import Dataset, LinearGaussian, Split, bits_per_dimension
from pyro_vae.evaluation import evaluating
from pyro_vae.inference.bounds import reconstruction
from pyro_vae.inference.fingerprints import fingerprint
from pyro_vae.inference.objectives import mean_bound
from pyro_vae.inference.ranks import by_first
from pyro_vae.judging.distances import energy_distance
from pyro_vae.judging.estimates import ElboTerms, elbo_terms, log_likelihood
from pyro_vae.judging.evidence import Estimate
from pyro_vae.judging.kept import Kept
from pyro_vae.judging.latents import active_units, posterior_means
from pyro_vae.parts.likelihoods import Normal
from pyro_vae.programs.vae import Answers
from pyro_vae.protocols import has_density, standardize

ELBO_SAMPLES = 100
SAMPLES = 1000
MINUTE = 75.0  # seconds that an evaluation may take where nobody said how large it is to be
_LADDER = (1000, 500, 200, 100)
_TRIED, _LONG_ENOUGH = 20, 0.2  # images and seconds that its speed is measured on


class Plan(NamedTuple):
    """How much is evaluated, and about how many seconds that takes; the same of everything, as by ``--full``."""

    num_samples: int
    images: int
    seconds: float
    full_images: int
    full_seconds: float


def plan(vae: Answers, dataset: Dataset, options: FitOptions) -> Plan:
    """How much of the test data is evaluated, with how many samples.

    What the options say, else 1,000 images, or as many as the clock says that about a minute allows: 500, 200 or 100,
    and fewer samples only where that is too long still. The speed is measured on a few images of the pair, whose
    weights do not matter to it.
    """
    test, wanted = dataset.test, options.evaluation_images
    each = by_first(lambda: seconds_each(vae, test, options.evaluation_samples))

    def seconds(images: int, num_samples: int) -> float:
        return each * images * (num_samples + ELBO_SAMPLES)

    samples = options.evaluation_samples
    if wanted is not None or options.full:
        images = min(len(test), wanted or len(test))
    else:
        sizes = [min(n, len(test)) for n in _LADDER]
        images = next((n for n in sizes if seconds(n, samples) <= MINUTE), sizes[-1])
        if seconds(images, samples) > MINUTE:
            fewer = [k for k in _LADDER if k <= samples] or [samples]
            samples = next((k for k in fewer if seconds(images, k) <= MINUTE), fewer[-1])
    return Plan(samples, images, seconds(images, samples), len(test), seconds(len(test), max(samples, FULL_SAMPLES)))


def seconds_each(vae: Answers, test: Split, most: int) -> float:
    """Seconds that one importance sample of one image takes.

    What a call takes whatever its size, on a loaded machine more than all samples of a few images, is not counted: it
    falls out of the difference of two sizes.
    """
    if is_autoencoder(vae):
        return 0.0
    few = test.subset(slice(0, _TRIED)).frozen()
    num_samples, face = min(10, most), serving.face(vae)
    model, guide = face.programs(vae)
    given = face.given(few)

    def took(num_samples: int) -> float:
        started = time.perf_counter()
        log_likelihood(model, guide, given, num_samples=num_samples, progress=False)
        return time.perf_counter() - started

    took(min(50, most))  # whatever is made only once, for k-hat too
    least, base = num_samples, took(num_samples)
    if least >= most or base >= 10 * _LONG_ENOUGH:
        return base / (len(few) * least)
    while True:
        num_samples = min(most, 5 * num_samples)
        seconds = took(num_samples)
        if seconds - base >= _LONG_ENOUGH:
            return (seconds - base) / (len(few) * (num_samples - least))
        if num_samples >= most:  # so quick that the difference may be noise: no slower than either of these
            return min(seconds / num_samples, _LONG_ENOUGH / (num_samples - least)) / len(few)


def test_data(dataset: Dataset, seed: int, images: int | None = None) -> Split:
    """The test split with its noise drawn for good, or its first images, which have the same draws."""
    return (dataset.test if images is None else dataset.test.subset(slice(0, images))).frozen(seed)


def evaluate(
    vae: Answers,
    dataset: Dataset,
    *,
    num_samples: int,
    images: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
    kept: Kept | None = None,
) -> dict[str, Any]:
    """Judge a fitted pair on its test data, or the first so many `images`, with K = `num_samples` for log p(x).

    In nats per datum: ``test_elbo`` = ``test_reconstruction`` - ``test_kl``, ``test_log_likelihood`` with its errors,
    and more; of a plain autoencoder only the reconstruction. The seed is that of the test data's noise and of the
    samples. What `kept` has already is not done again; all parts have seeds of their own.
    """
    started, kept = time.perf_counter(), kept or Kept()
    before = kept.seconds
    test = test_data(dataset, seed, images)
    latents = vae.architecture.latent_dim if vae.architecture else vae.model.prior().event_shape.numel()
    numbers: dict[str, Any] = {"test_images": len(test), "latent_dim": latents}
    if len(dataset.x_shape) == 3:
        numbers["train_levels"] = levels(dataset.train)
    if is_autoencoder(vae):
        point = functools.partial(mean_bound, vae.model, vae.guide, test, reconstruction, seed=seed)
        numbers["test_reconstruction"] = kept.piece("reconstruction", point)
    else:
        numbers |= _densities(vae, test, num_samples, {"seed": seed, "progress": progress}, kept)
        numbers |= _closed_forms(vae, dataset, test, numbers["test_elbo"])

    def others() -> dict[str, Any]:
        with evaluating(vae, seed=seed):
            found = _latents_and_samples(vae, test)
            return found | serving.face(vae).numbers(vae, dataset, dataset.test, seed)

    numbers |= kept.piece("latents and samples", others)
    numbers["evaluation_seconds"] = before + time.perf_counter() - started
    return numbers


def kept_for(
    path: Path, weights: Path, dataset: Dataset, settings: Mapping[str, Any], more: Mapping[str, Any] | None = None
) -> Kept:
    """Where the finished parts of an evaluation are kept until its result is written, by all that they depend on."""
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    data = fingerprint([dataset.test, dict(dataset.protocol)])
    about = {"weights": digest, "data": data, "versions": versions(), "threads": torch.get_num_threads()}
    return Kept(path, about | dict(settings) | dict(more or {}))


def _densities(
    vae: Answers, test: Split, num_samples: int, options: dict[str, Any], kept: Kept
) -> dict[str, Any]:  # fmt: skip
    """The ELBO and log p(x), with their errors."""
    face = serving.face(vae)
    model, guide = face.programs(vae)
    given = face.given(test)
    terms = kept.piece("elbo", lambda: elbo_terms(model, guide, given, num_samples=ELBO_SAMPLES, **options))
    estimate = kept.piece("log p(x)", lambda: log_likelihood(model, guide, given, num_samples=num_samples, **options))
    numbers = told(terms, estimate) | ({} if face.density == "log p(x)" else {"log_likelihood_of": face.density})
    if test.dequantize:
        dims = test[:1].numel()
        numbers["test_bits_per_dimension"] = bits_per_dimension(estimate.value, dims)
        numbers["bits_per_dimension_by"] = (
            f"-log p(x) / (D ln 2) + log2(256), D = {dims}: the density of x = (v + u) / 256, u ~ U(0, 1), changed "
            "to bins v of width one; an upper limit on the bits of the 8-bit levels"
        )
    return numbers


def told(terms: ElboTerms, estimate: Estimate) -> dict[str, Any]:
    """The ELBO and log p(x) by their names in a summary."""
    return {
        "test_elbo": terms.value,
        "test_elbo_stderr": terms.mc_stderr,
        "test_elbo_data_stderr": terms.data_stderr,
        "test_reconstruction": terms.reconstruction,
        "test_kl": terms.kl,
        "test_log_likelihood": estimate.value,
        "log_likelihood_is": estimate.kind,
        "log_likelihood_by": estimate.method,
        "test_log_likelihood_stderr": estimate.mc_stderr,
        "test_log_likelihood_data_stderr": estimate.data_stderr,
        "test_log_likelihood_bias": estimate.bias,
        "test_khat_ok": estimate.khat_ok,
        "test_ess_median": estimate.ess.median().item(),
    }


def _latents_and_samples(vae: Answers, test: Split) -> dict[str, Any]:
    """Active units, and how far samples are from the data; what takes more data than there are is left out."""
    numbers: dict[str, Any] = {}
    left_out, face = [], serving.face(vae)
    if len(test) >= 2:
        numbers["active_units"] = active_units(vae.guide, face.given(test), site=face.site).count
        if face.site not in (None, "z"):
            numbers["active_units_of"] = face.site
        if not is_autoencoder(vae):
            few = test.subset(slice(0, SAMPLES))
            codes = posterior_means(vae.guide, face.given(few), site=face.site, progress=False)
            numbers["codes_outside_prior"] = codes_outside(codes, face.prior_draws(vae, 4000, few.labels))
    else:
        left_out.append("active units (a variance over the test data, of which there is one)")
    if len(test) >= 4:
        distance = energy_distance(face.sample(vae, SAMPLES, pixels="draw", y=test.labels), test[:SAMPLES])
        numbers |= {"sample_energy_distance": distance.value, "sample_energy_distance_null": distance.null}
    else:
        left_out.append(f"the energy distance of samples (takes 4 test data, got {len(test)})")
    return numbers | ({"left_out": left_out} if left_out else {})


def protocol(
    vae: Answers, dataset: Dataset, *, num_samples: int, images: int | None = None, seed: int = 0
) -> dict[str, Any]:
    """What belongs to every number of `evaluate`."""
    test = dataset.test
    drawn = test.binarization == "dynamic" or test.dequantize
    noise = "dequantization noise" if test.dequantize else "dynamic binarization"
    about = dict(dataset.protocol) | {
        "sizes": {part: len(getattr(dataset, part)) for part in ("train", "validation", "test")},
        "test_images": min(len(test), images or len(test)),
        "standardized": standardized(vae),
        "test_draw": f"one draw of the {noise}, seed {seed}" if drawn else "the data are fixed",
        "evaluation_seed": seed,
        "selection": "nothing selected on the test set",
        "device": str(next(vae.parameters()).device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    if vae.architecture is not None and vae.architecture.model != "vae":
        about |= {"model": vae.architecture.model, "model_options": dict(vae.architecture.model_options)}
        if dataset.label_names is not None:
            about["label_names"] = list(dataset.label_names)
    if not is_autoencoder(vae):
        about |= {"log_likelihood_samples": num_samples, "elbo_samples": ELBO_SAMPLES}
    return about


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    own = {"pyro_vae": __version__, "torch": torch.__version__, "pyro": pyro.__version__}
    return own | {"python": platform.python_version()}


def is_autoencoder(vae: Answers) -> bool:
    """Whether the guide is a point, so that there is no density over z."""
    if vae.architecture is not None and vae.architecture.model != "vae":
        return False
    guide: Any = vae.guide
    return not has_density(getattr(guide, "guide", guide).posterior)  # of a refined guide, its base


def standardized(vae: Answers) -> bool:
    """Whether the networks see columns of mean 0 and standard deviation 1; the densities are of the data anyway."""
    found = standardize(vae.model.likelihood)
    return found is not None and found.moves and not (bool((found.loc == 0).all()) and bool((found.scale == 1).all()))


def fitted_testbed(vae: Answers) -> LinearGaussian | None:
    """The closed form of a fitted linear-Gaussian model; None where it is not one."""
    likelihood, built = vae.model.likelihood, vae.architecture
    if built is None or built.model != "vae" or built.network != "linear" or not isinstance(likelihood, Normal):
        return None
    if standardized(vae):  # then its noise differs from column to column
        return None
    if likelihood.scale == "learned":
        scale = likelihood.learned_scale(likelihood.log_scale).item()
    elif isinstance(likelihood.scale, int | float):
        scale = float(likelihood.scale)
    else:
        return None
    layer = next(module for module in likelihood.decoder.modules() if isinstance(module, torch.nn.Linear))
    return LinearGaussian(layer.weight.detach().double().cpu(), layer.bias.detach().double().cpu(), scale)


def _closed_forms(vae: Answers, dataset: Dataset, test: Split, elbo: float) -> dict[str, Any]:
    fitted = fitted_testbed(vae)
    if fitted is None:
        return {}
    x = test[:].flatten(1).double().cpu()
    evidence = fitted.log_evidence(x).mean().item()
    numbers = {"fitted_log_evidence": evidence, "fitted_log_evidence_minus_elbo": evidence - elbo}
    if dataset.testbed is not None:
        true = dataset.testbed.to(dtype=torch.float64)
        excess = true.log_evidence(x) - fitted.log_evidence(x)
        numbers |= {
            "true_log_evidence": true.log_evidence(x).mean().item(),
            "true_minus_fitted_log_evidence": excess.mean().item(),
            "true_minus_fitted_stderr": excess.std().item() / len(excess) ** 0.5,
            "true_minus_fitted_expected": true.expected_excess(len(dataset.train)),
        }
    return numbers
