"""What the three console commands share: `--version`, and how they end.

An error of fedbridge's own becomes three lines on stderr and its exit code.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Annotated

import typer

from bridge.errors import FedbridgeError


def new_app(text: str) -> typer.Typer:
    """A command with sub-commands, `text` as its help and the option `--version`; main options are the same for all."""
    app = typer.Typer(help=text, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Print the versions and exit.", is_eager=True, callback=_print_version)
        ] = False,
    ) -> None:
        pass

    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedbridge {version('fedbridge')}, Flower {version('flwr')}, Python {platform.python_version()}")
        raise typer.Exit


def run_app(app: typer.Typer, arguments: Sequence[str] | None = None) -> None:
    """Run a command line and exit with its code; `arguments` default to those of the process.

    A `FedbridgeError` is printed (what, why, what to do) without a traceback. A usage error exits with 2, as a
    configuration error does. Any other exception is a defect and keeps its traceback.
    """
    try:
        app(args=list(arguments) if arguments is not None else None)
    except FedbridgeError as error:
        sys.stderr.write(f"error: {error}\n")
        raise SystemExit(int(error.exit_code)) from None
