"""A run while it goes on: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from server.submission.runs import RunState


class Display(Protocol):
    """Shows a run as it stands; called again and again."""

    def __call__(self, state: RunState, note: str = "") -> None:
        """`note` is what can't be read from the run's folder."""


@contextmanager
def display() -> Iterator[Display]:
    """On stdout: a table that is redrawn where it is a terminal, one line for each change where it is none."""
    console = Console()
    if not console.is_terminal:
        yield _Lines()
        return
    with Live(console=console, auto_refresh=False, transient=False) as live:

        def show(state: RunState, note: str = "") -> None:
            live.update(page(state, note), refresh=True)

        yield show


def page(state: RunState, note: str = "") -> Group:
    """The table of sites below a line that says where the run is."""
    lines = [Text(headline(state), style="bold")]
    if note:
        lines.append(Text(note, style="yellow"))
    table = Table("site", "last said", "last seen", Column("bytes up", justify="right"), box=None, pad_edge=False)
    for site in sorted({*state.sites, *state.bytes_up}):
        said = state.sites.get(site, "")
        table.add_row(
            Text(site),
            Text(said, style="green" if said == "OK" else "red"),
            Text(ago(state.seen.get(site, ""))),
            Text(f"{state.bytes_up.get(site, 0):,}"),
        )
    return Group(*lines, table if table.row_count else Text("no site has answered yet"))


def headline(state: RunState) -> str:
    """Where the run is, in one line."""
    pieces = [state.name, state.state, state.phase]
    if state.rounds:
        pieces.append(f"round {state.round} of {state.rounds}")
    if state.loss is not None:
        pieces.append(f"loss {state.loss:.4f}")
    if state.bytes_up:
        pieces.append(f"{sum(state.bytes_up.values()):,} bytes from the sites")
    return ", ".join(piece for piece in pieces if piece)


def ago(moment: str) -> str:
    """How long ago a moment (UTC, ISO 8601) was, in words."""
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(moment)).total_seconds()
    except ValueError:
        return "never"
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s ago"
    return f"{seconds / 60:.0f} min ago" if seconds < 6000 else f"{seconds / 3600:.1f} h ago"


class _Lines:
    """A line where phase, round or state changed, and one for each site that said something new."""

    def __init__(self) -> None:
        self._console = Console(soft_wrap=True, highlight=False)
        self._last = ""
        self._sites: dict[str, str] = {}

    def __call__(self, state: RunState, note: str = "") -> None:
        key = f"{state.state} {state.phase} {state.round} {note}"
        if key != self._last:
            self._last = key
            self._console.print(Text(headline(state) + (f" ({note})" if note else "")))
        for site, said in sorted(state.sites.items()):
            if self._sites.get(site) != said:
                self._sites[site] = said
                self._console.print(Text(f"  {site}: {said}"))
