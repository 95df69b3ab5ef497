"""The options of `pyro-vae fit`, and their defaults for each dataset.

`FitOptions` is the complete configuration of a run; `resolve` makes one from what the user gave and the table of the
dataset. This module imports nothing heavy, so that ``pyro-vae fit --help`` can show the table at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from pyro_vae.app import models
from pyro_vae.parts import names
from pyro_vae.words import did_you_mean, spelled

CHOICES: dict[str, tuple[str, ...]] = {
    "model": models.MODELS,
    "schedule": ("constant", "cosine", "one-cycle"),
    "network": tuple(names.NETWORKS),
    "activation": ("silu", "relu", "gelu", "elu", "tanh", "softplus"),
    "bound": ("elbo", "iwae", "renyi", "vr-max", "miwae", "ciwae", "piwae", "cubo", "wake-sleep"),
    "estimator": ("reparameterized", "sticking-the-landing", "doubly-reparameterized", "score-function"),
    "binarization": ("dynamic", "static", "threshold", "none"),
    "compile": ("auto", "on", "off"),
    "matmul_precision": ("highest", "high", "medium", "bfloat16"),
}
REGULARIZERS = ("mmd", "total-correlation", "free-bits")
NOT_BINARY = (
    "a density of zeros and ones has no upper limit, and a distribution of levels needs levels. Use --likelihood "
    "bernoulli, or --binarization none."
)
SCALES = ("learned", "per-pixel", "network")


@dataclass(frozen=True)
class FitOptions:
    """The configuration of a run: plain data, one field for each option of the command.

    A field that is None after `resolve` is really none (no clipping, no limit), but for `evaluation_images`: as many as
    a minute allows, or with `full` the whole test set. `likelihood`, `binarization` and the framing of data given by a
    path are settled when the data have been read.

    What each field means is said by the command's help: `pyro_vae.app.configuration.FIT`.
    """

    data: str = "digits"
    data_dir: str | None = None
    binarization: str | None = None
    dequantize: bool | None = None
    image_size: int | None = None
    crop: int | None = None
    channels: int | None = None
    background: str | None = None
    images: str | None = None
    labels: str | None = None
    limit: int | None = None
    model: str = "vae"
    model_options: dict[str, Any] = field(default_factory=dict)
    network: str = "mlp"
    hidden: tuple[int, ...] = (400, 400)
    activation: str = "silu"
    latent_dim: int = 32
    posterior: str = "diagonal"
    posterior_options: dict[str, Any] = field(default_factory=dict)
    prior: str = "normal"
    prior_options: dict[str, Any] = field(default_factory=dict)
    likelihood: str | None = None
    likelihood_options: dict[str, Any] = field(default_factory=dict)
    scale: float | str = "learned"
    standardize: bool | None = None
    bound: str = "elbo"
    bound_options: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 1
    estimator: str = "reparameterized"
    regularizers: dict[str, Any] = field(default_factory=dict)
    beta: float = 1.0
    epochs: int = 100
    batch_size: int = 64
    learning_rate: float = 1e-3
    schedule: str = "one-cycle"
    clip_norm: float | None = None
    kl_warmup: int = 0
    kl_warmup_steps: int | None = None
    patience: int | None = None
    seed: int = 0
    data_seed: int | None = None
    split_seed: int | None = None
    frozen: str | None = None
    device: str = "auto"
    threads: int | None = None
    compile: str = "auto"
    matmul_precision: str = "highest"
    evaluation_samples: int = 1000
    evaluation_images: int | None = None
    full: bool = False
    from_run: str | None = None  # --from, and "from" in config.json: a word that Python keeps for itself

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value is None:
                continue
            found = spelled(value, choices) if isinstance(value, str) else None
            if found is None:
                raise ValueError(
                    f"got {option(name)} {value!r}, wanted one of {', '.join(choices)}." + did_you_mean(value, choices)
                )
            object.__setattr__(self, name, found)
        for kind in names.PARTS:
            if getattr(self, kind) is not None:
                object.__setattr__(self, kind, names.check(kind, getattr(self, kind)))
        regularizers = {spelled(name, REGULARIZERS) or name: value for name, value in self.regularizers.items()}
        object.__setattr__(self, "regularizers", regularizers)
        for name in self.regularizers:
            if name not in REGULARIZERS:
                raise ValueError(
                    f"got --regularizers {name}, wanted some of {', '.join(REGULARIZERS)}, such as mmd=10."
                    + did_you_mean(name, REGULARIZERS)
                )
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not (value >= least and math.isfinite(value)):
                raise ValueError(f"got {option(name)} {value}, wanted a number >= {least}.")
            if value is not None and not name.endswith("seed") and value > MOST:
                raise ValueError(f"got {option(name)} {value}, wanted a number up to {MOST:,}.")
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ValueError(f"got {option('learning_rate')} {self.learning_rate}, wanted a number > 0.")
        for name in ("seed", "data_seed", "split_seed"):
            if (getattr(self, name) or 0) >= 2**63:
                raise ValueError(f"got {option(name)} {getattr(self, name)}, wanted a number below 2^63.")
        if isinstance(self.scale, str) and self.scale not in SCALES or not isinstance(self.scale, str) and not (
            self.scale > 0 and math.isfinite(self.scale)
        ):  # fmt: skip
            raise ValueError(f"got --scale {self.scale}, wanted a number > 0 or one of {', '.join(SCALES)}.")
        if self.network != "linear" and not (self.hidden and all(width > 0 for width in self.hidden)):
            widths = ",".join(map(str, self.hidden))
            raise ValueError(f"got --hidden {widths!r}, wanted positive widths such as 400,400.")
        if self.beta != 1 and (self.bound != "elbo" or self.posterior == "point"):
            what = f"--bound {self.bound}" if self.bound != "elbo" else "--posterior point"
            raise ValueError(f"got --beta {self.beta:g} with {what}: it weighs the KL of the elbo. Leave it out.")
        if self.posterior == "point" and (self.bound != "elbo" or self.num_samples > 1):
            raise ValueError(
                f"got --posterior point with --bound {self.bound} of {self.num_samples} samples: a plain autoencoder "
                "has no bound, and a point is one sample. Leave --bound and --num-samples out."
            )
        for name, wanted in (("prior", "normal"), ("estimator", "reparameterized")):
            if self.posterior == "point" and getattr(self, name) != wanted:
                raise ValueError(
                    f"got --posterior point with {option(name)} {getattr(self, name)}: a plain autoencoder has neither "
                    f"a prior nor a bound. Leave {option(name)} out."
                )
        models.check(self)

    def to_json(self) -> dict[str, Any]:
        """As plain data, to be written and given back by ``--config``."""
        values = asdict(self) | {"hidden": list(self.hidden)}
        return {_FIELDS.get(name, name): value for name, value in values.items()}


_FIELDS = {"from_run": "from"}  # as they are written and typed, where that is no name in Python
_LEAST = {
    "image_size": 1, "crop": 1, "channels": 1, "limit": 1, "latent_dim": 1, "num_samples": 1, "epochs": 1,
    "batch_size": 1, "threads": 1, "clip_norm": 0, "beta": 0, "kl_warmup": 0, "kl_warmup_steps": 0,
    "patience": 1, "seed": 0, "data_seed": 0, "split_seed": 0, "evaluation_samples": 2, "evaluation_images": 2,
}  # fmt: skip

MOST = 2**31 - 1  # what counts and sizes can be: torch has no more of most

FULL_SAMPLES = 5000  # of --full

HIDDEN: dict[str, tuple[int, ...]] = {
    "mlp": (400, 400), "gated": (300, 300), "conv": (32, 64, 128), "residual": (32, 64, 128), "linear": (),
}  # fmt: skip

_MNIST = FitOptions(
    "mnist", hidden=(500, 500), latent_dim=50, epochs=260, batch_size=256, learning_rate=2e-3, likelihood="bernoulli"
)
DATASETS: dict[str, FitOptions] = {
    "digits": FitOptions(
        "digits", hidden=(256, 128), latent_dim=10, epochs=300, batch_size=64, learning_rate=2e-3,
        likelihood="bernoulli", threads=1,
    ),
    "mnist": _MNIST,
    "fashion-mnist": replace(_MNIST, data="fashion-mnist"),
    "frey": FitOptions(
        "frey", hidden=(400, 200), latent_dim=20, epochs=300, batch_size=64, likelihood="normal", clip_norm=1e4
    ),
    "celeba": FitOptions(
        "celeba", network="conv", hidden=(32, 64, 128, 256), latent_dim=128, epochs=30, batch_size=128,
        likelihood="normal", clip_norm=1e5,
    ),
    "linear-gaussian": FitOptions(
        "linear-gaussian", network="linear", hidden=(), latent_dim=4, epochs=60, batch_size=100, learning_rate=1e-2,
        likelihood="normal", threads=1,
    ),
}  # fmt: skip
OTHER = FitOptions("folders, files", clip_norm=1e5)


def resolve(given: Mapping[str, Any]) -> FitOptions:
    """The configuration that follows from what the user gave; what is missing comes from the dataset's row.

    An unknown option, or a value that it cannot have, is a ValueError.

    Example:
        >>> resolve({"data": "mnist"}).latent_dim, resolve({"network": "conv"}).hidden
        (50, (32, 64, 128))
    """
    known = [field.name for field in fields(FitOptions)]
    given = {field_of(name): value for name, value in given.items()}
    for name in given:
        if name not in known:
            raise ValueError(f"got the option {name!r}, wanted one of {', '.join(known)}." + did_you_mean(name, known))
    given = {name: _as_spelled(name, value) for name, value in given.items()}
    data = str(given.get("data", "digits"))
    row = DATASETS.get(data, OTHER)
    values = vars(row) | {"data": data} | dict(given)
    if "network" in given and "hidden" not in given and given["network"] != row.network:
        values["hidden"] = HIDDEN.get(given["network"], ())
    if values["full"] and "evaluation_samples" not in given:
        values["evaluation_samples"] = FULL_SAMPLES
    if values["network"] == "linear":
        values["hidden"] = ()
    if values["bound"] != "elbo" and "num_samples" not in given:
        values["num_samples"] = 50
    values["posterior"] = names.check("posterior", values["posterior"])
    if "prior" not in given:
        values["prior"] = names.prior_for(values["posterior"])
    values["prior"] = names.check("prior", values["prior"])
    names.check_supports(values["posterior"], values["prior"])
    values |= models.asked(values, given)
    for name in ("clip_norm", "patience"):
        values[name] = values[name] or None  # 0 turns it off
    if data not in DATASETS and Path(data).expanduser().exists():
        values["data"] = str(Path(data).expanduser().absolute())
    for name in ("data_dir", "frozen", "from_run"):
        if values[name] is not None:
            values[name] = str(Path(values[name]).expanduser().absolute())
    values |= _binarization(data, given, values["likelihood"])
    return FitOptions(**values)


def _binarization(data: str, given: Mapping[str, Any], likelihood: str | None) -> dict[str, Any]:
    """The data that a likelihood is a likelihood of: binary for a Bernoulli, continuous for a normal."""
    wanted, dequantize = given.get("binarization"), given.get("dequantize")
    kind = names.values_of(likelihood)
    if kind not in (None, "binary") and wanted in ("dynamic", "static", "threshold"):
        raise ValueError(f"got --likelihood {likelihood} with --binarization {wanted}: {NOT_BINARY}")
    if wanted is not None or dequantize is not None:
        return {}
    if kind == "continuous" and data in ("digits", "mnist", "fashion-mnist"):
        return {"binarization": "none", "dequantize": True}
    if kind in ("levels", "counts"):
        return {"binarization": "none", "dequantize": False}
    if kind == "binary" and data in ("frey", "celeba"):
        return {"binarization": "dynamic"}
    return {}


def _as_spelled(name: str, value: Any) -> Any:
    """A name as the tables spell it; what is none of theirs, and the path of something, stays for others to judge."""
    if name == "data" and isinstance(value, str | Path) and not Path(value).expanduser().exists():
        return spelled(str(value), DATASETS) or value
    if name in CHOICES and isinstance(value, str):
        return spelled(value, CHOICES[name]) or value
    return value


def option(name: str) -> str:
    """A field as the user types it.

    Example:
        >>> option("batch_size")
        '--batch-size'
    """
    return "--" + _FIELDS.get(name, name).replace("_", "-")


def field_of(name: str) -> str:
    """The field of an option as it is written in a file.

    Example:
        >>> field_of("batch-size"), field_of("from")
        ('batch_size', 'from_run')
    """
    return {word: field for field, word in _FIELDS.items()}.get(name, name.replace("-", "_"))


def changed(options: FitOptions) -> dict[str, str]:
    """The options that differ from the defaults of their dataset, as they are typed, with the default."""
    usual = vars(resolve({"data": options.data}))
    found = {name: (value, usual[name]) for name, value in vars(options).items() if value != usual[name]}
    words = {option(name): f"{in_words(value)} (default: {in_words(default)})"
             for name, (value, default) in found.items()}  # fmt: skip
    return ({"--data": options.data} if options.data != FitOptions().data else {}) | words


def in_words(value: Any) -> str:
    """The value of an option as it is typed.

    Example:
        >>> in_words((400, 200)), in_words({"bins": 8, "alpha": 1.2570000000000001}), in_words(None)
        ('400,200', 'bins=8,alpha=1.257', 'none')
    """
    if isinstance(value, Mapping):
        return ",".join(f"{key}={in_words(item)}" for key, item in value.items()) or "none"
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    if isinstance(value, float):
        return f"{value:.15g}"
    return "none" if value is None else str(value)
