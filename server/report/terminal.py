"""The comparison on a terminal: the same rows as on the page, with an interval for the bridge alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from server.report.compare import Run, differences, figures_table, runs_table
from server.report.tables import Table

_WIDTH = 120
"""Columns where the output is no terminal, for example a log."""


def print_comparison(runs: Sequence[Run]) -> None:
    """Print results, what each run did, and the keys in which the configurations differ."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    console.print(_rich(figures_table(runs, intervals=("bridge",)), "Balanced accuracy"))
    console.print(_rich(runs_table(runs), "What each run did"))
    found = differences(runs)
    if found.rows:
        console.print(_rich(found, "Where the configurations differ"))
    for run in runs:
        if run.record.error:
            console.print(Text(f"{run.label}: {run.record.error}", style="red"))


def _rich(table: Table, title: str) -> RichTable:
    drawn = RichTable(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for index, head in enumerate(table.heads):
        numeric = index in table.numeric
        longest = max((len(line) for row in table.rows for line in row[index].splitlines()), default=0)
        drawn.add_column(
            Text(head),
            justify="right" if numeric else "left",
            vertical="top",
            overflow="fold",
            min_width=longest if numeric else min(longest, 12),
        )
    for index, row in enumerate(table.rows):
        drawn.add_row(*(Text(cell) for cell in row), style="bold" if index in table.strong else None)
    return drawn
