"""`fedbridge-server statement`: what a run promises its patients, recomputed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.statement import Statement
    from server.verification import Verification

app = typer.Typer(no_args_is_help=True)

_VERDICTS = {
    "holds": "The statement holds.",
    "conditional": "The statement holds on a condition.",
    "void": "The statement says itself that it is void.",
    "none": "No formal guarantee was asked for, so there is nothing to recompute.",
}


@app.callback()
def statement() -> None:
    """The privacy statement of a run (privacy.json)."""


@app.command("verify")
def verify_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A privacy.json, or the run folder that holds it.")],
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Recompute a statement with other accountants (Opacus PRV, Renyi) and say how far they differ.

    Beside a run.json the events are also held against the run's job. Exit code 5 where the statement claims more
    privacy than its events give, or contradicts itself.
    """
    from server.errors import StatementError
    from server.statement import read_statement
    from server.verification import verify_statement

    stated = read_statement(file)
    found = verify_statement(stated, file if file.is_dir() else file.parent)
    if json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        for line in _lines(stated, found):
            typer.echo(line)
    if not found.verified:
        raise StatementError(
            f"{file}: the statement is not right",
            why="; ".join(found.problems),
            fix="ask the coordinator for the statement as the run wrote it, and do not rely on this one",
        )


def _lines(statement: Statement, found: Verification) -> list[str]:
    lines = [f"{statement.name}: threat model {statement.threat_model}"]
    for check in found.cohorts:
        second = "no figure" if check.prv is None else f"{check.prv:.4f}"
        lines.append(
            f"{check.cohort} patients: epsilon {check.stated:.4f} stated, {second} by Opacus PRV, "
            f"{check.rdp:.4f} by Renyi (stated minus second: {check.difference:+.4f}): "
            f"{'agrees' if check.agrees else 'UNDERSTATED'}"
        )
    lines += [f"Wrong: {problem}" for problem in found.problems]
    lines += [_VERDICTS[found.verdict], *statement.reasons] if found.verified else []
    return lines
