"""`fedbridge-site`: what a hospital's engineer runs. Everything here stays on the hospital's machine."""

from __future__ import annotations

from enum import StrEnum
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.console import new_app, run_app
from bridge.weights_command import new_weights_app
from client import cli_deployment, cli_study
from client.cli_head import head_app
from client.cli_ledger import SiteArgument, forget_command, ledger_app

if TYPE_CHECKING:
    from client.audit import Line
    from client.site import Site

MORE_COMMANDS = "fedbridge.site_commands"
"""Entry point group: functions that add a command to this one. What needs the server's part too is added so."""

app = new_app(
    "The hospital's side of fedbridge: look at your recordings, at what your policy permits and at what has left, "
    "use a trained bridge, and take part in studies. `start` and `status` connect to the coordinator alone, the other "
    "commands to nothing."
)
audit_app = typer.Typer(help="Look at the log of everything that left this site.", no_args_is_help=True)
policy_app = typer.Typer(help="Look at what this site permits.", no_args_is_help=True)
app.add_typer(audit_app, name="audit")
app.add_typer(policy_app, name="policy")
app.add_typer(ledger_app, name="ledger")
app.add_typer(head_app, name="head")
app.add_typer(new_weights_app(), name="weights")
app.command("forget")(forget_command)
cli_study.register(app)
cli_deployment.register(app)


class SplitChoice(StrEnum):
    """Whose recordings are predicted."""

    all = "all"
    pair = "pair"
    validation = "validation"
    test = "test"


@app.command()
def check(
    site: SiteArgument,
    picture: Annotated[
        Path | None, typer.Option(help="Where to draw a few windows of both modalities (a .png file).")
    ] = None,
) -> None:
    """Read the recordings and tell what was found, what would be rejected, and why. Nothing is sent or changed.

    Run this first, and after every change of the site file or the recordings.
    """
    from client.check import run_check

    raise typer.Exit(run_check(site, picture))


@app.command()
def predict(
    bridge: Annotated[Path, typer.Argument(metavar="BRIDGE_DIR", help="Folder of an exported bridge (manifest.json).")],
    site: SiteArgument,
    out: Annotated[Path, typer.Option(help="The CSV file to write.")] = Path("predictions.csv"),
    split: Annotated[SplitChoice, typer.Option(help="Patients of which split.")] = SplitChoice.all,
) -> None:
    """Predict the class of each window from the new modality alone, and write a CSV file that stays here.

    The old modality is not needed.

    A row is a window: patient, recording, start in seconds, prediction, and the probability of each class.
    """
    from client.predict import predict_site, write_predictions
    from client.site import open_site
    from client.site_file import SPLITS

    chosen = next((each for each in SPLITS if each == split.value), None)
    windows, probabilities, manifest = predict_site(bridge, open_site(site), chosen)
    write_predictions(out, windows, probabilities, manifest.classes)
    patients = len(set(windows.table.patients.tolist()))
    typer.echo(f"{out}: {len(windows.table)} windows of {patients} patients, bridge of job '{manifest.job}'")
    for reason, count in sorted(windows.rejected.items()):
        typer.echo(f"  rejected: {count} ({reason})")


@audit_app.command("show")
def audit_show(
    site: SiteArgument,
    run: Annotated[str, typer.Option(help="Only this run (its Flower id).")] = "",
    lines: Annotated[bool, typer.Option("--lines", help="Every entry, instead of the sums of each item.")] = False,
) -> None:
    """Show what left this site: for each run and item how often, how many bytes, and what for."""
    opened = _open(site)
    entries = [line for line in _verified(opened) if not run or line.entry.run == run]
    _print_lines(entries) if lines else _print_sums(entries)


@audit_app.command("verify")
def audit_verify(site: SiteArgument) -> None:
    """Check that no line of the log was changed, removed, moved or inserted. Exits with an error where one was."""
    opened = _open(site)
    entries = _verified(opened)
    repaired = sum(line.entry.event == "repaired" for line in entries)
    typer.echo(f"{opened.audit_path}: {len(entries)} entries, each follows the one before it")
    if entries:
        typer.echo(f"  last: line {entries[-1].number}, {entries[-1].when}, {entries[-1].hash}")
    if repaired:
        typer.echo(f"  {repaired} interrupted append(s) are marked as repaired; nothing of them left the site")


@policy_app.command("show")
def policy_show(site: SiteArgument) -> None:
    """Show what holds in effect, every key, with the defaults where the policy file is silent or absent."""
    import yaml

    from bridge.messages import ITEMS
    from client.policy import load_policy

    opened = _open(site)
    policy = load_policy(opened.policy_path)
    source = opened.policy_path or "no policy file: the strictest defaults hold"
    typer.echo(f"# {opened.name}: {source}")
    typer.echo(yaml.safe_dump(policy.model_dump(mode="json"), sort_keys=False), nl=False)
    kept = [name for name in ITEMS if not policy.permits(name)]
    typer.echo(f"# never leaves: {', '.join(kept) or 'every declared item may leave'}")


@policy_app.command("template")
def policy_template(
    name: Annotated[str, typer.Option("--site", help="The site's agreed name, to fill in.")] = "",
) -> None:
    """Print a policy file with every key explained and the strictest defaults; save it and edit it."""
    from client.policy import template

    typer.echo(template(name), nl=False)


def main() -> None:
    """Entry point of `fedbridge-site`: errors are three lines and an exit code, never a traceback."""
    for entry in sorted(entry_points(group=MORE_COMMANDS), key=lambda entry: entry.name):
        entry.load()(app)
    run_app(app)


def _open(path: Path) -> Site:
    from client.site import open_site

    return open_site(path)


def _verified(site: Site) -> list[Line]:
    from client.audit import AuditLog

    return AuditLog(site.audit_path).verify()


def _print_sums(entries: list[Line]) -> None:
    from client.audit import totals

    sent, refused = totals(entries)
    fitted = [line for line in entries if line.entry.event == "fitted"]
    if not sent and not refused and not fitted:
        typer.echo("nothing has left this site")
        return
    for line in fitted:
        typer.echo(f"{line.when}  {line.entry.item} {line.entry.sha256[:16]}...  {line.entry.purpose}")
    if not sent and not refused:
        return
    typer.echo(f"{'run':<22}{'item':<24}{'times':>6}{'bytes':>14}  purpose")
    for row in sent:
        typer.echo(f"{row.run:<22}{row.item:<24}{row.count:>6}{row.bytes:>14,}  {row.purpose}")
    if refused:
        typer.echo(f"{refused} message(s) were answered by a reason code alone; see the site's log")


def _print_lines(entries: list[Line]) -> None:
    for line in entries:
        entry = line.entry
        where = f"round {entry.round}" if entry.round is not None else ""
        shape = "x".join(map(str, entry.shape))
        parts = [line.when, entry.run, entry.message, where, entry.event, entry.item, shape, f"{entry.bytes} B"]
        typer.echo(f"{line.number:>6}  " + "  ".join(part for part in (*parts, entry.purpose) if part))
