"""The text files that are written from templates of this package."""

from __future__ import annotations

from pathlib import Path


def fill(template: str, **content: object) -> str:
    """A template, filled as it stands: the values are checked where they are read. An unknown name is an error."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(content)
