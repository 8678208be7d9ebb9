"""`fedbridge-sim`: many hospitals on one machine. Heavy imports wait until a command runs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.console import new_app, run_app
from simulations.cli_audit import register as register_audit
from simulations.cli_head import register as register_head
from simulations.cli_made_up import register as register_made_up
from simulations.cli_options import ConfigArgument, QuietOption, SetOption
from simulations.cli_plan import register as register_plan
from simulations.cli_sweep import register as register_sweep
from simulations.cli_weights import register as register_weights
from simulations.sigterm import end_on_sigterm

if TYPE_CHECKING:
    from server.record import Evaluation, Metric, Metrics, RunRecord
    from simulations.config import SimulationConfig
    from simulations.run import EngineName

app = new_app("Simulate a study of many hospitals on one machine.")

register_plan(app)
register_sweep(app)
register_audit(app)
register_weights(app)
register_head(app)
register_made_up(app)


@app.command("prepare")
def prepare_command(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder to make; must not hold anything.")],
    set_: SetOption = None,
    copy: Annotated[bool, typer.Option("--copy", help="Copy the recordings instead of linking to them.")] = False,
    standalone: Annotated[
        bool,
        typer.Option("--standalone", help="Site folders for machines of their own, and a study to build for them."),
    ] = False,
    quiet: QuietOption = False,
) -> None:
    """Write real site folders, models and the job of a study, and tell how Flower runs it."""
    from simulations.config import load_simulation
    from simulations.prepare import STUDY, flwr_command, prepare
    from simulations.progress import bars

    settings = load_simulation(config, set_ or [])
    with bars(quiet) as progress:
        folder = prepare(settings, out, copy=copy, standalone=standalone, progress=progress)
    typer.echo(f"prepared: {folder}")
    if standalone:
        typer.echo(f"build its study: fedbridge-server study build {shlex.quote(str(folder / STUDY))} --out STUDY.zip")
    else:
        typer.echo(f"run it with Flower: {flwr_command(folder)}")


@app.command("run")
def run_command(
    config: ConfigArgument,
    engine: Annotated[
        str,
        typer.Option("--engine", help="local: one process; flower: Flower's own simulation.", metavar="local|flower"),
    ] = "local",
    set_: SetOption = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run.", show_default="runs/<name>-seed<seed>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that was interrupted.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")] = False,
    quiet: QuietOption = False,
) -> None:
    """Run a study: prepare, choose positions, train the bridge, compute the controls, write the report."""
    from server.record import SIMULATED_EVALUATION, read_evaluation
    from simulations.config import load_simulation
    from simulations.plan import plan_summary
    from simulations.progress import bars
    from simulations.run import run

    end_on_sigterm()
    settings = load_simulation(config, set_ or [])
    folder = out or Path("runs") / f"{settings.name}-seed{settings.seed}"
    if not quiet:
        for line in plan_summary(settings):
            typer.echo(line)
    with bars(quiet) as progress:
        record = run(settings, folder, engine=_engine(engine), resume=resume, overwrite=overwrite, progress=progress)
    report = folder.absolute() / "report.html"
    if quiet:
        typer.echo(_line(record, report))
        return
    _print_table(f"{record.name}: {_what(record.evaluation)}", record.evaluation, settings)
    known = folder / SIMULATED_EVALUATION
    if known.is_file():
        evaluation = read_evaluation(known)
        _print_table(f"what the simulator knows, and no hospital releases: {_what(evaluation)}", evaluation, settings)
    typer.echo(f"report: {report}")


def _engine(name: str) -> EngineName:
    if name == "local":
        return "local"
    if name == "flower":
        return "flower"
    raise typer.BadParameter(f"'{name}' is not one of local, flower", param_hint="--engine")


def _rows(evaluation: Evaluation) -> list[tuple[str, Metrics]]:
    """Predictors in the order in which they read best; what was not computed is left out."""
    baselines = evaluation.baselines
    rows = [
        ("teacher (old modality)", evaluation.teacher),
        ("bridge, federated", evaluation.bridge),
        ("linear student", baselines.get("linear_student")),
        ("bridge, one machine", baselines.get("centralised")),
        ("bridge, hospital alone", baselines.get("site_alone")),
        ("KD, one machine", baselines.get("kd:centralised")),
        ("KD-Contrast, one machine", baselines.get("kd_contrast:centralised")),
        ("KD, alone", baselines.get("kd:site_alone")),
        ("KD-Contrast, alone", baselines.get("kd_contrast:site_alone")),
        ("bridge, shuffled pairs", baselines.get("shuffled_pairs")),
        ("chance", evaluation.chance),
    ]
    return [(name, metrics) for name, metrics in rows if metrics is not None]


def _what(evaluation: Evaluation) -> str:
    if evaluation.windows is None:
        return "from noised sums over test patients"
    return f"{evaluation.windows} windows of {evaluation.patients} test patients, {len(evaluation.classes)} classes"


def _print_table(title: str, evaluation: Evaluation, settings: SimulationConfig) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    level = f"{settings.bootstrap.level:.0%} interval"
    table = Table(title=title, box=box.SIMPLE)
    table.add_column("", no_wrap=True)
    for column in ("balanced\naccuracy", level, "macro F1", "agreement"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, metrics in _rows(evaluation):
        balanced = metrics.balanced_accuracy
        table.add_row(name, _value(balanced), _interval(balanced), _value(metrics.f1_macro), _value(metrics.agreement))
    Console().print(table)


def _line(record: RunRecord, report: Path) -> str:
    """The result in one line, for machines and scripts."""
    names = {"teacher (old modality)": "teacher", "bridge, federated": "bridge"}
    shown = [
        f"{names[name]} {_value(metrics.balanced_accuracy)} {_interval(metrics.balanced_accuracy)}".rstrip()
        for name, metrics in reversed(_rows(record.evaluation))
        if name in names
    ]
    return f"{record.name} {record.status}: balanced accuracy {', '.join(shown)}; report {report}"


def _value(metric: Metric | None) -> str:
    return "-" if metric is None else f"{metric.value:.3f}"


def _interval(metric: Metric | None) -> str:
    if metric is None or metric.low is None or metric.high is None:
        return ""
    return f"[{metric.low:.3f}, {metric.high:.3f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `fedbridge-sim`."""
    run_app(app, sys.argv[1:] if arguments is None else arguments)
