"""`fedbridge-site rehearse`: registered with the site's command by the entry point group `fedbridge.site_commands`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("rehearse")(rehearse_command)


def rehearse_command(
    study: Annotated[Path, typer.Argument(metavar="STUDY.zip", help="The study file, accepted already or not.")],
    site: Annotated[Path, typer.Option("--site", help="The site file, or the folder that holds it.")] = Path(),
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder to make; must not hold anything.", show_default="rehearsal-<study id>"),
    ] = None,
    pretend: Annotated[int, typer.Option("--pretend", min=1, help="How many pretend sites take part.")] = 3,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
) -> None:
    """Run a whole study on this site's own recordings, with no coordinator and no network, and list what would leave.

    Tells how many bytes of what would leave, how long a real run keeps the machine busy, with how much memory, and what
    the site would refuse. Every item is written to OUT/outgoing to be looked at: keep it here. Nothing of the site is
    changed: no budget is spent, nothing is accepted or recorded.
    """
    from bridge.errors import ExitCode
    from bridge.study.archive import open_study
    from simulations.progress import bars
    from simulations.rehearse.run import rehearse
    from simulations.rehearse.summary import summary
    from simulations.sigterm import end_on_sigterm

    end_on_sigterm()
    if out is None:
        with open_study(study) as opened:
            out = Path(f"rehearsal-{opened.id}")
    with bars(quiet) as progress:
        record = rehearse(study, site, out, pretend=pretend, progress=progress)
    typer.echo(summary(record), nl=False)
    typer.echo(f"written: {out.absolute()}")
    if any(message.message != "evaluate" for message in record.refused):
        raise typer.Exit(int(ExitCode.REFUSED))
