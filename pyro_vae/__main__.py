"""``python -m pyro_vae`` is the command ``pyro-vae``."""

from pyro_vae.app.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
