"""Draw the picture of a run's explore page in docs/users.md, as a browser shows it.

    python benchmarks/explore_picture.py runs/mnist docs/images/explore.png

Needs Playwright (the extra "browser") and a Chromium. The datum nearest to the origin is chosen.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from pyro_vae.app.cli import main as pyro_vae

WIDTH, COLOURS = 960, 256


def main(run: str, out: str) -> None:
    """The whole page, 1280 pixels wide, made smaller."""
    found = os.environ.get("PYRO_VAE_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "explore.html"
        if pyro_vae(["explore", run, "--out", str(page)]):
            raise SystemExit(1)
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            opened = browser.new_page(viewport={"width": 1280, "height": 900})
            opened.goto(page.as_uri())
            opened.wait_for_timeout(1000)
            opened.locator("#map").press("Enter")
            opened.wait_for_timeout(1000)
            taken = Image.open(io.BytesIO(opened.screenshot(full_page=True))).convert("RGB")
            browser.close()
    small = taken.resize((WIDTH, round(taken.height * WIDTH / taken.width)), Image.Resampling.LANCZOS)
    small.quantize(COLOURS, Image.Quantize.MAXCOVERAGE).save(out, optimize=True)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python benchmarks/explore_picture.py RUN OUT.png")
    main(*sys.argv[1:])
