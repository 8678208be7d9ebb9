"""How the three console commands end: an error of fedbridge's own becomes three lines on stderr and its exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bridge.errors import FedbridgeError

if TYPE_CHECKING:
    import typer


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
