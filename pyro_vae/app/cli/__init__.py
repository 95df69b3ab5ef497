"""The command `pyro-vae`, as it is typed: words, options and their help. What a command does is beside this package."""

# Each of these adds its commands to the group.
from pyro_vae.app.cli import comparisons as comparisons
from pyro_vae.app.cli import fits as fits
from pyro_vae.app.cli import on_runs as on_runs
from pyro_vae.app.cli._main import main as main
from pyro_vae.app.cli.group import commands as commands
