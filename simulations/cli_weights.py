"""`fedbridge-sim weights`: what a site has, and `parity`, which holds the encoders against the originals' numbers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.errors import ExitCode
from bridge.weights_command import new_weights_app

if TYPE_CHECKING:
    from simulations.parity.result import CaseResult


def register(app: typer.Typer) -> None:
    """Add the sub-command `weights`."""
    weights = new_weights_app()
    weights.command("parity")(parity_command)
    app.add_typer(weights, name="weights")


def parity_command(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of numeric fixtures.")],
    case: Annotated[
        list[str] | None, typer.Option("--case", metavar="NAME", help="Only this case. May be repeated.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each case's computation.")] = 1,
) -> None:
    """Hold every published encoder and its preprocessing against what the originals computed.

    Each case of the folder runs in a process of its own: weights, front, middle, preprocessing. Errors are in standard
    deviations of the reference array. Exits with 4 where one is beyond the tolerance or a case can't be run.
    """
    from simulations.parity.result import to_json
    from simulations.parity.run import found_cases, run_case

    results = []
    chosen = found_cases(folder, case or [])
    for each in chosen:
        results.append(run_case(each, threads))
        if not json:
            _print(results[-1], max(len(each.name) for each in chosen))
    failed = [result.name for result in results if not result.passed]
    if json:
        typer.echo(to_json(results))
    else:
        typer.echo(f"{len(results) - len(failed)} of {len(results)} cases agree with the originals")
    if failed:
        raise typer.Exit(int(ExitCode.WEIGHTS))


def _print(result: CaseResult, width: int) -> None:
    from simulations.parity.result import in_words

    typer.echo(f"{result.name:<{width}}  {in_words(result)}")
