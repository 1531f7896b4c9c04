"""The command line: flags in, one pipeline call, one report call. Heavy imports stay inside the commands."""

from qdetr_cli.cli.app import app

# Each registers its commands; help lists them in this order.
# isort: off
from qdetr_cli.cli import models, measures, files, shows, recipes
# isort: on

__all__ = ["app", "files", "main", "measures", "models", "recipes", "shows"]


def main() -> None:
    """The console script."""
    app()
