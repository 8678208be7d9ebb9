"""`fedbridge-sim made-up`: try a configuration of a published set before its files are there."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from simulations.cli_options import ConfigArgument


def register(app: typer.Typer) -> None:
    """Add the command to `fedbridge-sim`."""
    app.command("made-up")(made_up_command)


def made_up_command(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder to make; must not be there.")],
    patients: Annotated[int, typer.Option("--patients", help="How many; 12 or more.")] = 12,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of signals and weights.")] = 0,
) -> None:
    """Write small made-up recordings and filled weights in the published formats, and a configuration that uses them.

    What comes of a run shows that the direction works here, and nothing about models or patients.
    """
    from simulations.made_up.study import WARNING, make_study

    made = make_study(config, out, patients=patients, seed=seed)
    typer.echo(
        f"made up: {made.folder}: {made.patients} patients with {made.windows} window(s) of each class, "
        f"filled weights {', '.join(made.weights) or 'none'}"
    )
    typer.echo(WARNING)
    run = f"fedbridge-sim run {shlex.quote(str(made.config))} --out {shlex.quote(str(made.folder / 'run'))}"
    typer.echo(f"run it: {run}")
