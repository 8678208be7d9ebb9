"""`fedbridge-server study`: the one signed file that a coordinator hands to its sites."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bridge.study.archive import Study

app = typer.Typer(help="Build, show and verify the signed file that sites accept.", no_args_is_help=True)

StudyArgument = Annotated[Path, typer.Argument(metavar="STUDY.zip", help="A study file.")]
FolderOption = Annotated[
    Path, typer.Option("--dir", metavar="DIR", help="The coordinator's folder.", show_default="the current folder")
]
CoordinatorOption = Annotated[
    Path | None,
    typer.Option(
        "--coordinator", metavar="FILE", help="A coordinator file.", show_default="DIR/coordinator.yaml", dir_okay=False
    ),
]


@app.command("build")
def build_command(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="A study's configuration (configs/study.yaml).")],
    out: Annotated[Path, typer.Option("--out", metavar="STUDY.zip", help="The file to write.", dir_okay=False)],
    folder: FolderOption = Path(),
    force: Annotated[bool, typer.Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """Write a study: the resolved job, the models, the code's hash and the page for the sites, signed.

    The code is that of this installation, the key that of DIR (keys/signing.key).
    """
    from server.coordinator.folder import CoordinatorFolder
    from server.study_file import build_study

    place = CoordinatorFolder.open(folder)
    built = build_study(config, place.coordinator(), place.signing_secret(), out, force=force)
    typer.echo(f"{built.path}: study {built.id}, {built.path.stat().st_size:,} bytes")
    typer.echo(f"sha256 of its study.json: {built.sha256}")
    typer.echo(f"Hand it to the sites by any channel; each runs: fedbridge-site accept {built.path.name}")


@app.command("show")
def show_command(file: StudyArgument, coordinator: CoordinatorOption = None, folder: FolderOption = Path()) -> None:
    """Show what a study file says of itself, who signed it, and the page for the sites."""
    from bridge.study.archive import open_study

    with open_study(file) as study:
        for name, value in _facts(study, file):
            typer.echo(f"{name:<12} {value}")
        typer.echo(f"{'signed by':<12} {_signer(study, coordinator, folder)}")
        typer.echo("\n" + study.page, nl=False)


@app.command("verify")
def verify_command(file: StudyArgument, coordinator: CoordinatorOption = None, folder: FolderOption = Path()) -> None:
    """Check a study file: its signature, every file in it, the models' cards, and that its page tells what it asks.

    Exit code 5 where anything is wrong.
    """
    from bridge.config import load_model
    from bridge.enrolment import COORDINATOR_FILE, CoordinatorFile
    from bridge.study.archive import open_study
    from bridge.study.page import require_own_page
    from server.study_file import is_own_code

    known = load_model(coordinator or folder / COORDINATOR_FILE, CoordinatorFile)
    with open_study(file) as study:
        study.require_signed_by(known.verify_key, f"the coordinator '{known.name}'")
        study.check()
        own = is_own_code(study)
        if own:
            require_own_page(study)
        files = len(study.manifest.members)
        typer.echo(f"{file}: study {study.id} is signed by '{known.name}' and whole ({files} files).")
        if not own:
            typer.echo("Its code is not that of this installation, so its page was not made again and compared.")


def _facts(study: Study, file: Path) -> list[tuple[str, str]]:
    manifest = study.manifest
    included = all(model.included for model in manifest.models.values())
    return [
        ("study", study.id),
        ("sha256", study.sha256),
        ("file", f"{file} ({file.stat().st_size:,} bytes, {len(manifest.members)} files)"),
        ("coordinator", manifest.coordinator),
        ("created", manifest.created),
        ("models", "included" if included else "not included"),
        ("code", manifest.code.sha256),
    ]


def _signer(study: Study, coordinator: Path | None, folder: Path) -> str:
    """Whose signature it is, as far as a coordinator file is at hand."""
    from bridge.config import load_model
    from bridge.enrolment import COORDINATOR_FILE, CoordinatorFile

    path = coordinator or folder / COORDINATOR_FILE
    if coordinator is None and not path.is_file():
        return f"not checked: {path} is not there (name one by --coordinator)"
    known = load_model(path, CoordinatorFile)
    if study.is_signed_by(known.verify_key):
        return f"'{known.name}', by the key in {path}"
    return f"NOT '{known.name}': the signature is not by the key in {path}"
