"""`fedbridge-site init | request | start | stop | status` and the services: a site on a machine of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from client.site import Site

FolderArgument = Annotated[
    Path, typer.Argument(metavar="[SITE]", help="The site file, or the folder that holds it (default: this folder).")
]


def supernode_command(site: FolderArgument = Path()) -> None:
    """Run the site's SuperNode in the foreground: the connection to the coordinator. For systemd; `start` does both."""
    from client.deployment.supernode import run_supernode

    run_supernode(_open(site))


def executor_command(site: FolderArgument = Path()) -> None:
    """Run the site's executor in the foreground: it runs accepted code alone. For systemd; `start` does both."""
    from client.deployment.executor import run_executor

    run_executor(_open(site))


def register(app: typer.Typer) -> None:
    """Add these commands to `fedbridge-site`."""
    app.command("supernode")(supernode_command)
    app.command("executor")(executor_command)


def _open(path: Path) -> Site:
    from client.site import open_site

    return open_site(path)
