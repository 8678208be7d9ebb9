"""Templates into pages, and files written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bridge.files import write_whole
from server.errors import RunFolderError

_HERE = Path(__file__).parent


def fill(template: str, content: Mapping[str, Any]) -> str:
    """A template of this package, filled. Every text is escaped unless it is `Markup`; an unknown name is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(**content)


def write_file(path: Path, text: str) -> None:
    """Write in one atomic rename; raises `RunFolderError` where the file can't be written."""
    try:
        write_whole(path, text)
    except OSError as error:
        raise RunFolderError(
            f"{path}: can't be written", why=error.strerror or "", fix="name a file in a folder that can be written"
        ) from error
