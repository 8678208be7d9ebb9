"""The text files that are written from templates of this package."""

from __future__ import annotations

from pathlib import Path

from bridge import templates


def fill(template: str, **content: object) -> str:
    """A template of this package, filled. An unknown name is an error."""
    return templates.fill(Path(__file__).parent, template, content)
