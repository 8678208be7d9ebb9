"""`fedbridge-sim head fit`: the old encoder and task head of a configuration, made from its public patients."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.files import require_free
from simulations.cli_options import ConfigArgument, QuietOption, SetOption

if TYPE_CHECKING:
    from bridge.encoders.cards import EncoderCard, HeadCard


def register(app: typer.Typer) -> None:
    """Add the sub-command `head`."""
    head = typer.Typer(help="The old modality's task head.", no_args_is_help=True)
    head.command("fit")(fit_command)
    app.add_typer(head, name="head")


def fit_command(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to make; must not exist.")],
    set_: SetOption = None,
    quiet: QuietOption = False,
) -> None:
    """Fit the configuration's task head on its labelled public patients, and say how good it is.

    Writes DIR/old_encoder and DIR/task_head, which `encoders.old.folder` and `encoders.old.head.folder` of a
    configuration can name. Where the whole old model is trained, that is another encoder with another digest.
    """
    from simulations.config import load_simulation
    from simulations.models.make import make_old
    from simulations.prepare import load_source
    from simulations.progress import bars
    from simulations.split import split_patients

    require_free(out)
    settings = load_simulation(config, set_ or [])
    with bars(quiet) as progress:
        source = load_source(settings.data, progress)
        cards = make_old(settings, source, split_patients(source, settings.split), out, progress)
    for line in _lines(out, *cards):
        typer.echo(line)


def _lines(out: Path, encoder: EncoderCard, head: HeadCard) -> list[str]:
    return [
        f"{out}: an old encoder and a task head for {', '.join(head.classes)}",
        f"  fitted on: {head.training.get('data', 'not said by its card')}",
        f"  {head.training.get('sentence') or _of_compact(head)}",
        f"  digest of the old encoder: {encoder.digest}",
        f"  digest of the head:        {head.digest}",
    ]


def _of_compact(head: HeadCard) -> str:
    """A compact encoder learns together with its head, and its card tells no interval."""
    score, chance = head.training.get("held_back_balanced_accuracy"), 1 / len(head.classes)
    if score is None:
        return "its card does not say how good it is"
    found = f"balanced accuracy {score:.3f} on held-back patients (chance {chance:.3f})"
    return found + ("" if score > chance else ": NOT better than chance")
