"""`fedbridge-server`: the coordinator's command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bridge.console import new_app, run_app
from server import cli_coordinator, cli_run
from server.cli_statement import app as statement_app
from server.cli_study import app as study_app

app = new_app("The coordinator's side of fedbridge: let sites in, run studies on them, and read what the runs leave.")
app.add_typer(statement_app, name="statement")
app.add_typer(study_app, name="study")
cli_coordinator.add_commands(app)
cli_run.add_commands(app)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The folder of a run: it holds run.json.")],
    out: Annotated[
        Path | None,
        typer.Option("--out", help="The HTML file to write.", dir_okay=False, show_default="DIR/report.html"),
    ] = None,
) -> None:
    """Render a run folder as one self-contained HTML page."""
    from server.report.render import write_report

    typer.echo(str(write_report(folder, out)))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR DIR...", help="Folders of runs.")],
    out: Annotated[Path | None, typer.Option("--out", help="An HTML file to write.", dir_okay=False)] = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", help="A CSV file to write, one line a run.", dir_okay=False)
    ] = None,
) -> None:
    """Put runs side by side: a table here, and an HTML page or a CSV file where asked for."""
    from server.report.compare import comparison_csv, load_runs, write_comparison
    from server.report.page import write_file
    from server.report.terminal import print_comparison

    runs = load_runs(folders)
    print_comparison(runs)
    if out is not None:
        typer.echo(str(write_comparison(runs, out)))
    if csv is not None:
        write_file(csv, comparison_csv(runs))
        typer.echo(str(csv))


@app.command()
def schema(
    privacy: Annotated[bool, typer.Option("--privacy", help="That of privacy.json instead.")] = False,
) -> None:
    """Print the JSON schema of run.json (docs/reference/run.schema.json and privacy.schema.json hold the same)."""
    from server import record, statement

    typer.echo(statement.schema_text() if privacy else record.schema_text(), nl=False)


def main() -> None:
    """The console command."""
    run_app(app)
