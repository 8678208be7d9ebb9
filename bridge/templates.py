"""Text files that are written from the templates of a package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def fill(folder: Path, template: str, content: Mapping[str, object]) -> str:
    """A template of that folder, filled as it stands: the values are checked where they are read. An unknown name is an
    error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(folder),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(content)
