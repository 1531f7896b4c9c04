"""The application that commands join, and what becomes of a user's mistake."""

import functools
import signal
import sys
from collections.abc import Callable
from typing import Annotated, ParamSpec, TypeVar

import typer

from qdetr_cli import __version__
from qdetr_cli.errors import QDetrError
from qdetr_cli.launch import check_alone, launched_processes

P = ParamSpec("P")
R = TypeVar("R")

app = typer.Typer(
    name="qdetr",
    help="Low-bit quantization-aware training for DETR detectors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
recipe_app = typer.Typer(no_args_is_help=True, help="Find, read, check and start recipes.")
app.add_typer(recipe_app, name="recipe")


def reported(command: Callable[P, R]) -> Callable[P, R]:
    """`command` for one process, with a user's mistake as one message and exit code 2.

    Interrupted, the code is 130 (SIGTERM: 143).
    """

    @functools.wraps(command)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        check_alone(command.__name__)
        return command(*args, **kwargs)

    return reported_once(alone)


def reported_once(command: Callable[P, R]) -> Callable[P, R]:
    """`command` as `reported` has it, for several processes too: of them one prints."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except QDetrError as error:
            _complain(f"error: {error}")
            raise SystemExit(2) from error
        except KeyboardInterrupt as interruption:
            _complain(f"interrupted{f': {interruption}' if str(interruption) else ''}")
            raise SystemExit(128 + getattr(interruption, "number", signal.SIGINT)) from interruption

    return run


def _complain(message: str) -> None:
    if _speaks():
        sys.stderr.write(message + "\n")


def _speaks() -> bool:
    """Whether this process prints: of several the first that has something to say, once they have met."""
    if launched_processes() == 1:
        return True
    from qdetr_cli.processes import speaks

    return speaks()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"qdetr {__version__}")
        raise typer.Exit


@app.callback()
def _app(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Low-bit quantization-aware training for DETR detectors."""
