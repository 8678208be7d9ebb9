"""Arguments and options that several of `fedbridge-sim`'s commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

ConfigArgument = Annotated[
    Path, typer.Argument(help="A configuration, such as configs/demo.yaml.", metavar="CONFIG.yaml")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, such as train.rounds=5. May be repeated."),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="No progress: only the result.")]
