"""The command `pyro-vae explore`."""

from __future__ import annotations

import shlex
from pathlib import Path

from pyro_vae.app import following, report
from pyro_vae.app.explore.contents import payload
from pyro_vae.app.explore.document import LIMIT, page
from pyro_vae.app.following import next_commands
from pyro_vae.app.opening import open as opened
from pyro_vae.atomic import write_file

PAGE = "explore.html"


def explore_run(
    run: Path, out: Path | None = None, num_data: int = 1000, reference: int = 0, seed: int | None = None,
    data_dir: str | None = None, trust: tuple[str, ...] = (),
) -> Path:  # fmt: skip
    """Write the page of a run; where it is. A run that it cannot show, or a suffix but .html, is a ValueError."""
    path = run / PAGE if out is None else out
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"got --out {path}, wanted a .html, which a browser opens.")
    found = opened(run, trust=trust, data_dir=data_dir)
    seed = found.options.seed if seed is None else seed
    data = found.data
    test = data.test.subset(slice(0, num_data))
    about = {"title": f"The latent space of {run}", "dataset": found.options.data}
    shown, arrays = payload(found.vae, test, about=about, names=data.label_names, references=reference, seed=seed)
    text = page(shown, arrays)
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    size = len(text.encode())
    weights = {"f2": "float16", "f4": "float32: rounded to float16 a pixel would be off by "
               f"{shown['rounding']:.1g}"}[shown["decoder"]["weights"]]  # fmt: skip
    large = "; --num-data makes it smaller" if size > LIMIT else ""
    what = f"{size / 1e6:.1f} MB with everything inside, opens offline in a browser{large}"
    sampling = f"pyro-vae sample {shlex.quote(str(run))}"
    follow = next((command for command in next_commands(run, found.summary) if "judge" in command), sampling)
    report.show_lines([("page", str(path)), ("", what), ("weights", weights), ("test data", f"{len(test):,}")])
    following.say(follow)
    return path
