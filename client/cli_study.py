"""`fedbridge-site accept`, `withdraw` and `studies`: what the hospital agrees to, and no longer agrees to."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.errors import ExitCode

if TYPE_CHECKING:
    from client.study.accept import Consent
    from client.study.record import Accepted

SiteOption = Annotated[Path, typer.Option("--site", metavar="DIR", help="The site's folder, or its site file.")]
WhoOption = Annotated[str, typer.Option("--who", help="Who decides, for the audit log; else who is logged in.")]


def accept_command(
    study: Annotated[Path, typer.Argument(metavar="STUDY.zip", help="The study file, as the coordinator sent it.")],
    site: SiteOption = Path(),
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask: the answer is yes.")] = False,
    who: WhoOption = "",
) -> None:
    """Look at a study and accept it: who signed it, what it asks, and whether this site's policy and data fit.

    Shows the study's page and what stands in the way, then asks. Installs the models that come with the study where
    the site has none. Where anything stands in the way, or the answer is no, nothing is changed.
    """
    from rich.console import Console

    from client.study.accept import run_accept

    run_accept(study, site, _person(who), _consent(yes), Console())


def withdraw_command(
    study: Annotated[str, typer.Argument(metavar="STUDY_ID", help="As `fedbridge-site studies` lists it.")],
    site: SiteOption = Path(),
    who: WhoOption = "",
) -> None:
    """Leave a study now: what is being computed does not leave, what comes later is refused, its caches are deleted.

    The audit log and the privacy ledger stay. What has left the site can't be called back.
    """
    from client.site import open_site
    from client.study.withdraw import withdraw

    found = withdraw(open_site(site), study, _person(who))
    typer.echo(f"{study}: {'had been left before' if found.again else 'left'}; nothing more of it leaves this site")
    if found.kept_for:
        typer.echo(f"the feature cache stays: the study {found.kept_for} needs it")
    else:
        typer.echo(f"deleted {found.entries} cache entries")


def studies_command(
    site: Annotated[Path, typer.Argument(metavar="SITE", help="The site's folder, or its site file.")] = Path(),
) -> None:
    """List the studies that were accepted: when, by whom, whether they hold, and how often each question was answered.

    Exits with an error where a record is not what was accepted.
    """
    from client.site import open_site
    from client.study.acceptance import records
    from client.study.allowance import taken

    opened = open_site(site)
    found = records(opened)
    for each in found.sound:
        _print_study(each, taken(opened, each))
    for error in found.damaged:
        typer.echo(f"error: {error}", err=True)
    if not found.sound and not found.damaged:
        typer.echo(f"no study was accepted at the site '{opened.name}'")
    if found.damaged:
        raise typer.Exit(int(ExitCode.REFUSED))


def register(app: typer.Typer) -> None:
    """Add these commands to `fedbridge-site`."""
    app.command("accept")(accept_command)
    app.command("withdraw")(withdraw_command)
    app.command("studies")(studies_command)


def _print_study(study: Accepted, taken: dict[str, int]) -> None:
    acceptance = study.acceptance
    state = "accepted" if study.holds else f"withdrawn {acceptance.withdrawn}"
    typer.echo(f"{study.id}  {state}")
    typer.echo(f"  accepted {acceptance.when} by {acceptance.who}, coordinator '{study.manifest.coordinator}'")
    typer.echo(f"  sha256   {study.sha256}")
    typer.echo(f"  code     {study.bundle_sha256}")
    often = f", at most {max(taken.values())} of {study.manifest.attempts} times each" if taken else ""
    typer.echo(f"  answered {len(taken)} question(s){often}")


def _consent(yes: bool) -> Consent | None:
    if yes:
        return lambda question: True
    return typer.confirm if sys.stdin.isatty() else None


def _person(who: str) -> str:
    """The name that is put on record: as given, or the login."""
    import getpass

    if not who:
        try:
            who = getpass.getuser()
        except (KeyError, OSError):
            who = "unknown"
    if len(who) > 100 or not who.isprintable():
        raise typer.BadParameter("a name of at most 100 printable characters", param_hint="--who")
    return who
