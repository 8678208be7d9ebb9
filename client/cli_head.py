"""`fedbridge-site head fit`: fitting a task head on the site's own patients, where its policy allows it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.head_command import FitSetOption, FitSettingsOption, SeedOption, told
from client.cli_ledger import SiteArgument

if TYPE_CHECKING:
    from client.head_fit import SiteFit

head_app = typer.Typer(help="Fit the old modality's task head on this site's patients.", no_args_is_help=True)


@head_app.command("fit")
def fit_command(
    site: SiteArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make; must not exist.")],
    settings: FitSettingsOption = None,
    set_: FitSetOption = None,
    seed: SeedOption = 0,
) -> None:
    """Fit a task head, or the whole old model, on the labelled pair patients, and write it to be handed out.

    Refused unless the policy has fit_head: true, since what is fitted can reveal the patients that it was fitted on: no
    privacy mechanism protects them. Validation and test patients are never read, and who withdrew is left out.
    """
    from bridge.head_command import head_settings
    from client.head_fit import fit_site_head
    from client.site import open_site

    chosen = head_settings(settings, set_ or [])
    _print(fit_site_head(open_site(site), out, chosen, seed=seed, progress=told()), out)


def _print(found: SiteFit, out: Path) -> None:
    typer.echo(f"{out}: fitted on {found.fitted.patients} patients of this site")
    if found.withdrawn:
        typer.echo(f"  left out: {found.withdrawn} patient(s) who withdrew")
    typer.echo(f"  {found.fitted.sentence()}")
    if found.fitted.settings.train == "whole":
        typer.echo(f"  digest of the new old encoder: {found.encoder.digest}")
    typer.echo(f"  digest of the head:            {found.head.digest}")
    typer.echo("  whoever gets it may learn about these patients: no privacy mechanism protects them")
