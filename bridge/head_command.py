"""What `fedbridge-site head fit` and `fedbridge-sim head fit` share: options, settings and progress."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bridge.errors import ConfigError

if TYPE_CHECKING:
    from bridge.head_fit import HeadSettings

FitSettingsOption = Annotated[
    Path | None,
    typer.Option("--settings", metavar="HEAD.yaml", help="Keys of the fit (docs/heads.md); defaults where left out."),
]
FitSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set one key, such as train=whole. May be repeated."),
]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Seed of the fit and of who is held back.")]


def head_settings(file: Path | None, changes: Sequence[str]) -> HeadSettings:
    """The settings of a file, with single keys changed. Raises `ConfigError`."""
    from bridge.config import load_yaml, parse_model, parse_yaml
    from bridge.head_fit import HeadSettings

    content = {} if file is None else load_yaml(file)
    name = "--set" if file is None else str(file)
    if not isinstance(content, dict):
        raise ConfigError(f"{name}: holds no keys", why="a mapping of keys to values is expected", fix="see --help")
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change}: no value", fix="write KEY=VALUE")
        content[key.strip()] = parse_yaml(value, f"--set {change}")
    return parse_model(content, HeadSettings, name)


def told() -> Callable[[str, int, int], None]:
    """Progress as lines on stderr, one each tenth of a stage."""
    last: dict[str, int] = {}

    def tell(what: str, done: int, total: int) -> None:
        tenth = 10 * done // total
        if last.get(what, 0) != tenth:
            last[what] = tenth
            typer.echo(f"{what}: {done} of {total}", err=True)

    return tell
