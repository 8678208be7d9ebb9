"""`fedbridge-site init | request | start | stop | status` and the services: a site on a machine of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.errors import ExitCode

if TYPE_CHECKING:
    from client.deployment.init import Initialised
    from client.site import Site

FolderArgument = Annotated[
    Path, typer.Argument(metavar="[SITE]", help="The site file, or the folder that holds it (default: this folder).")
]


def init_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The site's folder; made where it is not there.")],
    name: Annotated[str, typer.Option(help="The agreed name (default: the site file's, else the folder's).")] = "",
    coordinator: Annotated[Path | None, typer.Option(help="The coordinator.yaml that you were sent.")] = None,
    port: Annotated[
        int | None, typer.Option(help="For the site file: port on 127.0.0.1, another for each site of a machine.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Write the systemd units anew, replace coordinator.yaml.")
    ] = False,
    new_keys: Annotated[
        bool, typer.Option("--new-keys", help="Make new keys; the site must be enrolled again.")
    ] = False,
) -> None:
    """Make a site's folder: site file, policy, keys and systemd units. What is there already is kept.

    The site file and the policy are yours: they are never written over.
    """
    from client.deployment.init import initialise

    _tell(initialise(folder, name=name, port=port, coordinator=coordinator, force=force, new_keys=new_keys))


def request_command(
    site: FolderArgument = Path(),
    out: Annotated[Path | None, typer.Option(help="Write it to this file instead of printing it.")] = None,
) -> None:
    """Print the enrolment request for the coordinator, and its fingerprint for the telephone. It holds no secret."""
    from client.deployment.request import make_request, request_text

    request = make_request(_open(site))
    if out is None:
        typer.echo(request_text(request), nl=False)
    else:
        _write_new(out, request_text(request))
        typer.echo(f"{out}: send this file to the coordinator", err=True)
    typer.echo(f"fingerprint, to read to the coordinator by telephone:\n  {request.fingerprint}", err=True)


def start_command(site: FolderArgument = Path()) -> None:
    """Start SuperNode and executor, and keep them running until `stop`. With systemd, use its units instead."""
    from client.deployment.services import start_site

    opened = _open(site)
    if os.geteuid() == 0:
        typer.echo(
            "warning: as root; a site's services need no more than an own user (see the systemd units)", err=True
        )
    start_site(opened)
    typer.echo(f"'{opened.name}' is running; see `fedbridge-site status {opened.folder}`")


def stop_command(site: FolderArgument = Path()) -> None:
    """End what `start` started."""
    from bridge.services import stop

    ended = stop(_open(site).state_folder)
    typer.echo(f"ended: {', '.join(ended)}" if ended else "nothing was running")


def status_command(
    site: FolderArgument = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Tell what runs, whether the coordinator can be reached, what was accepted, and what was answered last.

    Exits with 1 where a service does not run or nothing could pass.
    """
    from client.deployment.status import site_status, status_lines

    status = site_status(_open(site))
    typer.echo(json.dumps(status.plain(), indent=1) if as_json else "\n".join(status_lines(status)))
    if not status.well:
        raise typer.Exit(int(ExitCode.FAILED))


def supernode_command(site: FolderArgument = Path()) -> None:
    """Run the site's SuperNode in the foreground: the connection to the coordinator. For systemd; `start` does both."""
    from client.deployment.supernode import run_supernode

    run_supernode(_open(site))


def executor_command(site: FolderArgument = Path()) -> None:
    """Run the site's executor in the foreground: it runs accepted code alone. For systemd; `start` does both."""
    from client.deployment.executor import run_executor

    run_executor(_open(site))


def serve_command(site: FolderArgument = Path()) -> None:
    """Keep SuperNode and executor running in the foreground; what `start` detaches."""
    from client.deployment.services import serve_site

    serve_site(_open(site))


def register(app: typer.Typer) -> None:
    """Add these commands to `fedbridge-site`."""
    app.command("init")(init_command)
    app.command("request")(request_command)
    app.command("start")(start_command)
    app.command("stop")(stop_command)
    app.command("status")(status_command)
    app.command("supernode")(supernode_command)
    app.command("executor")(executor_command)
    app.command("serve", hidden=True)(serve_command)


def _open(path: Path) -> Site:
    from client.site import open_site

    return open_site(path)


def _write_new(path: Path, text: str) -> None:
    from bridge.files import cause, write_whole
    from client.errors import OutputError

    try:
        write_whole(path, text)
    except OSError as error:
        raise OutputError(f"{path}: can't be written", why=cause(error), fix="name a place that can") from error


def _tell(done: Initialised) -> None:
    from client.deployment.units import USER

    site, folder = done.site, done.site.folder
    typer.echo(f"{folder}: the folder of site '{site.name}'")
    for verb, names in (("written", done.written), ("kept", done.kept)):
        for name in names:
            typer.echo(f"  {verb}  {name}")
    if done.coordinator is not None:
        typer.echo(f"coordinator '{done.coordinator.name}' at {done.coordinator.address}; its fingerprint, to read to")
        typer.echo(f"the coordinator by telephone before you go on:\n  {done.coordinator.fingerprint}")
    else:
        typer.echo(f"no {site.coordinator_path.name} yet: ask the coordinator, then `init {folder} --coordinator FILE`")
    steps = (
        ("describe the recordings", f"edit {site.path}"),
        ("decide what may leave", f"edit {site.policy_path or 'a policy (fedbridge-site policy template)'}"),
        ("see what was found", f"fedbridge-site check {folder}"),
        ("ask to be enrolled", f"fedbridge-site request {folder} --out {site.name}.yaml"),
        ("try a study without a network", f"fedbridge-site rehearse STUDY.zip --site {folder}"),
        ("agree to it", f"fedbridge-site accept STUDY.zip --site {folder}"),
        ("take part", f"fedbridge-site start {folder}"),
    )
    typer.echo("next steps:")
    for number, (aim, command) in enumerate(steps, 1):
        typer.echo(f"  {number}. {aim:<31}{command}")
    typer.echo(f"or, with systemd: useradd --system {USER}; chown -R {USER}: {folder}; cp {folder}/systemd/* ")
    typer.echo("/etc/systemd/system/; then systemctl daemon-reload, and systemctl enable --now both units.")
