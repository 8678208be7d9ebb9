"""`fedbridge-site ledger ...` and `fedbridge-site forget`: what private runs have cost the patients, and withdrawal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.errors import ExitCode

if TYPE_CHECKING:
    from client.ledger.view import PlanView
    from client.site import Site

SiteArgument = Annotated[Path, typer.Argument(metavar="SITE.yaml", help="The site file, or the folder that holds it.")]

ledger_app = typer.Typer(help="Look at what private runs have cost this site's patients.", no_args_is_help=True)


@ledger_app.command("show")
def ledger_show(site: SiteArgument) -> None:
    """Show each run's plan, what was used of it, and what is left for the patient who has spent most."""
    from client.ledger import Ledger
    from client.ledger.view import view
    from client.policy import load_policy

    opened = _open(site)
    if not _has_ledger(opened):
        return
    cap = load_policy(opened.policy_path).privacy.epsilon_cap
    with Ledger.open(opened) as ledger:
        found = view(ledger)
    for plan in found.plans:
        _print_plan(plan)
    typer.echo(f"{len(found.plans)} plan(s) charge {found.patients} patient(s); {found.withdrawn} withdrew")
    typer.echo(
        f"most spent: epsilon {found.worst:.3f} of {cap:g} (the policy's epsilon_cap), "
        f"{max(cap - found.worst, 0):.3f} left"
    )


@ledger_app.command("verify")
def ledger_verify(site: SiteArgument) -> None:
    """Check every row, charge and stored reply, and the ledger against the audit log. Exits with an error that names
    the row where one was changed."""
    from client.audit import AuditLog
    from client.ledger import Ledger
    from client.ledger.verify import verify

    opened = _open(site)
    if not _has_ledger(opened):
        return
    with Ledger.open(opened) as ledger:
        found = verify(ledger, AuditLog(opened.audit_path))
    typer.echo(f"{opened.ledger_path}: {found.head.number} rows, each follows the one before it")
    typer.echo(f"  last: row {found.head.number}, {found.head.hash}")
    typer.echo(f"  {found.plans} plan(s), {found.messages} charged message(s), {found.withdrawn} withdrawal(s)")
    if found.lost:
        typer.echo(f"  {found.lost} message(s) were charged and have no reply: interrupted or failed, refused for ever")


@ledger_app.command("forecast")
def ledger_forecast(
    site: SiteArgument,
    job: Annotated[Path, typer.Argument(metavar="JOB", help="The study's job.yaml, or its run-config.toml.")],
) -> None:
    """Tell whether a job's plan would fit into what this site's patients have left, and what would be left then.

    Books nothing. Exits with an error where it would not fit. Reads the recordings to see whose they are.
    """
    from client.forecast import forecast_file
    from client.ledger import Ledger
    from client.policy import load_policy

    opened = _open(site)
    policy = load_policy(opened.policy_path)
    with Ledger.open(opened) as ledger:
        found = forecast_file(ledger, opened, job, policy.privacy.epsilon_cap)
    typer.echo(f"the most charged patient has spent epsilon {found.before:.3f} and would come to {found.after:.3f}")
    if not found.fits:
        typer.echo(f"it does not fit: the policy's epsilon_cap is {found.cap:g}")
        raise typer.Exit(int(ExitCode.REFUSED))
    typer.echo(f"it fits: {found.left:.3f} of the policy's epsilon_cap {found.cap:g} would be left")


def forget_command(
    site: SiteArgument,
    patient: Annotated[str, typer.Argument(metavar="PATIENT", help="The patient's id, as the recordings have it.")],
) -> None:
    """Withdraw a patient: out of the feature cache and the stored replies, and out of every later run.

    What was spent of the patient's budget stays spent. The recordings themselves stay where they are.
    """
    from client.forget import forget

    found = forget(_open(site), patient)
    typer.echo(f"withdrawn; deleted {found.entries} cache entries and {found.replies} stored replies")
    typer.echo("the recordings are untouched: delete them yourself where the patient asked for it")


def _open(path: Path) -> Site:
    from client.site import open_site

    return open_site(path)


def _has_ledger(site: Site) -> bool:
    from client.ledger.opening import exists

    if exists(site):
        return True
    typer.echo(f"{site.ledger_path}: no ledger yet: nothing was asked under a private mechanism, nobody withdrew")
    return False


def _print_plan(plan: PlanView) -> None:
    typer.echo(f"run {plan.run}, reserved {plan.reserved}, delta {plan.delta:g}")
    for cohort, patients in plan.patients.items():
        typer.echo(f"  {cohort}: {patients} patient(s), each epsilon {plan.epsilon[cohort]:.3f} by this plan alone")
    typer.echo(f"  {'phase':<14}{'cohort':<12}{'noise':>8}{'rate':>7}{'reserved':>10}{'used':>7}")
    for phase in plan.phases:
        release = phase.release
        typer.echo(
            f"  {release.phase:<14}{release.cohort:<12}{release.noise_multiplier:>8.3f}{release.sampling_rate:>7.3g}"
            f"{release.count:>10}{phase.used:>7}"
        )
