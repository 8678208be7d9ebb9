"""`fedbridge-sim plan`: what a study would cost and could reach, without any data."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from simulations.cli_options import ConfigArgument, SetOption

if TYPE_CHECKING:
    from simulations.plan import PhasePlan, Plan


def register(app: typer.Typer) -> None:
    """Add the command `plan`."""
    app.command("plan")(plan_command)


def plan_command(
    config: ConfigArgument,
    set_: SetOption = None,
    json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Tell what a study costs its patients and whether it looks feasible, from its configuration alone."""
    from simulations.config import load_simulation
    from simulations.plan import lines_of, plan

    found = plan(load_simulation(config, set_ or []))
    if json:
        typer.echo(found.model_dump_json(by_alias=True, indent=2))
        return
    if found.phases:
        _print_phases(found)
    for line in lines_of(found):
        typer.echo(line)


def _print_phases(found: Plan) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{found.name}: threat model {found.threat_model}, delta {found.delta:g}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("release", no_wrap=True)
    for head in ("noise", "q", "times", "epsilon\nalone", "numbers", "signal/\nnoise", "over\nrun"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("outlook", no_wrap=True)
    for phase in found.phases:
        table.add_row(*_row(phase))
    Console().print(table)


def _row(phase: PhasePlan) -> tuple[str, ...]:
    def ratio(value: float | None) -> str:
        return "-" if value is None else f"{value:.2g}"

    return (
        ("" if phase.cohort == "pair" else f"{phase.cohort} ") + phase.phase.replace("_", " "),
        f"{phase.noise_multiplier:.4g}",
        f"{phase.sampling_rate:g}",
        f"{phase.count:,}",
        f"{phase.epsilon:.3f}",
        f"{phase.numbers:,}",
        ratio(phase.signal_to_noise),
        ratio(phase.signal_to_noise_run) if phase.half_width is None else f"+-{phase.half_width:.2f}",
        phase.outlook or "-",
    )
