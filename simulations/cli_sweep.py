"""`fedbridge-sim sweep`: a grid of runs, a table and curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations.cli_options import QuietOption, SetOption

if TYPE_CHECKING:
    from simulations.sweep.grid import SweepConfig
    from simulations.sweep.table import Row


def register(app: typer.Typer) -> None:
    """Add the command to `fedbridge-sim`."""
    app.command("sweep")(sweep_command)


def sweep_command(
    config: Annotated[Path, typer.Argument(help="A sweep, such as configs/tradeoff.yaml.", metavar="CONFIG.yaml")],
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the sweep.", show_default="runs/<name>")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Compute only what is missing or failed.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a sweep that is there.")] = False,
    workers: Annotated[int, typer.Option("--workers", help="Runs side by side.", min=1)] = 2,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Run a grid of configurations: one row a run, curves with intervals, an HTML page."""
    from simulations.progress import bars
    from simulations.sigterm import end_on_sigterm
    from simulations.sweep.execute import run_sweep
    from simulations.sweep.grid import load_sweep
    from simulations.sweep.page import write_page

    end_on_sigterm()
    sweep = load_sweep(config, set_ or [])
    folder = (out or Path("runs") / sweep.name).absolute()
    with bars(quiet) as progress:
        rows = run_sweep(sweep, folder, workers=workers, resume=resume, overwrite=overwrite, progress=progress)
    page = write_page(sweep, rows, folder)
    if not quiet:
        _print_table(sweep, rows)
    failed = sum(row.status == "failed" for row in rows)
    typer.echo(f"{len(rows)} runs, {failed} failed; table: {folder / 'results.csv'}; report: {page}")


def _print_table(sweep: SweepConfig, rows: list[Row]) -> None:
    """The bridge's means alone, so that it fits a terminal; the page and the CSV hold the rest."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from simulations.sweep.page import means_table

    content = means_table(rows, sweep.curves.metric if sweep.curves else "balanced_accuracy")
    axes = [axis.rpartition(".")[2] for axis in sweep.grid]
    heads = [*axes, *(head.lower() for head in content.heads[len(axes) : len(axes) + 3]), "bridge", "interval"]
    table = Table(title=sweep.name, box=box.SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    for number, head in enumerate(heads):
        table.add_column(head, justify="left" if number < len(axes) else "right", no_wrap=True)
    for cells in content.rows:
        value, _, bounds = cells[len(axes) + 3].partition("\n")
        table.add_row(*cells[: len(axes) + 3], value, bounds)
    Console().print(table)
