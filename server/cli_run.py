"""`fedbridge-server run|follow|end`: a signed study on real sites."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from server.coordinator.folder import CoordinatorFolder
    from server.flower_command import FlowerCommand

DirOption = Annotated[Path, typer.Option("--dir", metavar="DIR", help="The coordinator's folder.")]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Name of the run: its folder below DIR/runs.")]
_INTERRUPTED = 128 + signal.SIGINT


def add_commands(app: typer.Typer) -> None:
    """Register the commands of this module."""
    app.command("run")(run_command)
    app.command("follow")(follow_command)
    app.command("end")(end_command)


def run_command(
    study: Annotated[Path, typer.Argument(metavar="STUDY.zip", help="The signed study file.")],
    dir: DirOption = Path(),  # noqa: A002 - the option's name
    name: Annotated[str | None, typer.Option("--name", help="Name of the run. [default: the study's id]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with a run that ended before its end.")] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Submit, and do not follow.")] = False,
    models: Annotated[
        Path | None, typer.Option("--models", help="Folder with the weights that the study does not include.")
    ] = None,
) -> None:
    """Submit a study to the sites that accepted it and follow it to its report.

    The study must be signed by this coordinator, and be built with the installed code. Ctrl-C stops following, not the
    run. Exits with 6 where the run did not succeed.
    """
    from bridge.study.archive import open_study
    from server.submission.study import check_study, placed_models
    from server.submission.submit import reserved, submit, wait_until_over

    coordinator, flower = _open(dir)
    with open_study(study) as opened:
        check_study(opened, coordinator)
        with reserved(coordinator.runs, opened, name, resume) as folder:
            if resume:
                wait_until_over(folder, flower)
            placed = placed_models(opened, coordinator, models)
            submission = submit(opened, placed, folder, flower)
    typer.echo(f"{folder.name}: submitted as Flower's run {submission.flower_run}")
    typer.echo(f"  everything it writes: {folder}")
    if detach:
        _say_how_to_return(folder, dir)
        return
    _follow(folder, flower, dir)


def follow_command(name: RunArgument, dir: DirOption = Path()) -> None:  # noqa: A002
    """Follow a submitted run to its report. Ctrl-C stops following, not the run."""
    coordinator, flower = _open(dir)
    _follow(coordinator.runs / name, flower, dir)


def end_command(name: RunArgument, dir: DirOption = Path()) -> None:  # noqa: A002
    """Stop a run. It can be resumed."""
    from server.submission.stop import stop_run

    coordinator, flower = _open(dir)
    typer.echo(stop_run(coordinator.runs / name, flower))


def _open(path: Path) -> tuple[CoordinatorFolder, FlowerCommand]:
    from server.coordinator.folder import CoordinatorFolder
    from server.flower_command import FlowerCommand

    coordinator = CoordinatorFolder.open(path)
    return coordinator, FlowerCommand(coordinator.flower_home, {})


def _follow(folder: Path, flower: FlowerCommand, path: Path) -> None:
    from server.report.headline import headline
    from server.report.render import write_report
    from server.submission.display import display
    from server.submission.follow import follow

    try:
        with display() as show:
            record = follow(folder, flower, show)
    except KeyboardInterrupt:
        typer.echo(f"\n{folder.name}: no longer followed; the run goes on")
        _say_how_to_return(folder, path)
        raise typer.Exit(_INTERRUPTED) from None
    typer.echo(headline(record))
    typer.echo(str(write_report(folder)))


def _say_how_to_return(folder: Path, path: Path) -> None:
    where = "" if path == Path() else f" --dir {path}"
    typer.echo(f"  come back to it: fedbridge-server follow {folder.name}{where}")
    typer.echo(f"  stop it:         fedbridge-server end {folder.name}{where}")
