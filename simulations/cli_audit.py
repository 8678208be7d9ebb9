"""`fedbridge-sim audit`: an empirical lower bound of epsilon beside the claim."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from simulations.cli_options import ConfigArgument, QuietOption, SetOption

if TYPE_CHECKING:
    from server.audit_record import AuditRecord


def register(app: typer.Typer) -> None:
    """Add the command to `fedbridge-sim`."""
    app.command("audit")(audit_command)


def audit_command(
    config: ConfigArgument,
    canaries: Annotated[
        int, typer.Option("--canaries", help="Canary patients; half of them take part.", min=20)
    ] = 2000,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for audit.json: that of a run, whose report then shows it.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Put canary patients through the configured mechanisms and tell what epsilon they prove at least."""
    from server.audit_record import write_audit
    from server.record import RUN_JSON
    from server.report.render import write_report
    from simulations.audit.run import audit
    from simulations.config import load_simulation
    from simulations.progress import bars

    settings = load_simulation(config, set_ or [])
    with bars(quiet or json) as progress:
        record = audit(settings, canaries, progress=progress)
    if out is not None:
        write_audit(out, record)
        if (out / RUN_JSON).is_file():
            write_report(out)
    if json:
        typer.echo(record.model_dump_json(by_alias=True, indent=2))
    else:
        for line in lines_of(record):
            typer.echo(line)


def lines_of(record: AuditRecord) -> list[str]:
    """What the audit found, in words."""
    lines = []
    for phase in record.phases:
        sees = "would be seen" if phase.half_noise_bound > phase.claim.epsilon else "would NOT be seen"
        lines.append(
            f"{record.threat_model}, {phase.phase.replace('_', ' ')}: epsilon at least {phase.lower_bound:.2f} "
            f"({record.confidence:.0%} confidence; {phase.correct} of {phase.guesses} guesses right about "
            f"{phase.canaries:,} canaries), claimed {phase.claim.epsilon:.2f}, both at delta {phase.claim.delta:g}. "
            f"{'The claim stands.' if phase.holds else 'THE CLAIM IS REFUTED.'} "
            f"Half the noise {sees} (bound {phase.half_noise_bound:.2f})."
        )
    return [*lines, f"Not covered: {record.not_covered}"]
