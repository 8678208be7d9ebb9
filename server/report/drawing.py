"""The look of every picture, and how a matplotlib figure becomes an inline SVG.

Text stays text (selectable, in the page's font); nothing refers to anything outside the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from markupsafe import Markup, escape

INK, MUTED, FAINT, PAPER = "#1c2430", "#5b6675", "#d9dee5", "#ffffff"
BLUE, GREEN, ORANGE, RED, GREY = "#1f5fc4", "#1d7a52", "#c4651a", "#b3362b", "#8a94a3"
VIOLET = "#7a4fb0"

COLOURS = {
    "teacher": GREEN,
    "centralised": MUTED,
    "linear_student": MUTED,
    "bridge": BLUE,
    "site_alone": ORANGE,
    "kd:centralised": VIOLET,
    "kd_contrast:centralised": VIOLET,
    "kd:site_alone": VIOLET,
    "kd_contrast:site_alone": VIOLET,
    "shuffled_pairs": RED,
    "chance": GREY,
}
MARKERS = {
    "teacher": "D",
    "centralised": "s",
    "linear_student": "^",
    "bridge": "o",
    "site_alone": "v",
    "kd:centralised": "p",
    "kd_contrast:centralised": "h",
    "kd:site_alone": "<",
    "kd_contrast:site_alone": ">",
    "shuffled_pairs": "X",
    "chance": "|",
}
WIDE = 8.4
"""Inches of a picture that takes the page's full width."""

_STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.08,
    "figure.constrained_layout.h_pad": 0.08,
    "text.parse_math": False,
}


@contextmanager
def canvas(width: float, height: float, name: str) -> Iterator[Any]:
    """A figure of `width` x `height` inches in the report's style; `name` keeps its ids apart from other pictures'."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(width, height))
        FigureCanvasSVG(figure)
        yield figure


def as_svg(figure: Any, description: str) -> Markup:
    """The figure as one `<svg>` element; `description` is read out to those who can't see it. Call inside `canvas`."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing, transparent=True)
    text = buffer.getvalue()
    opening, rest = text[text.index("<svg") :].split(">", 1)
    opening = re.sub(r'\s(width|height|xmlns(:\w+)?|version)="[^"]*"', "", opening)
    opening += f' style="--inches: {figure.get_figwidth():g}" role="img" aria-label="{escape(description)}"'
    rest = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", rest, flags=re.DOTALL)
    # Matplotlib escapes what it draws. An HTML page knows neither the xlink prefix nor two elements of one id.
    rest = rest.replace("<use xlink:href=", "<use href=")
    rest = re.sub(r'<g id="[^"]*"', "<g", rest)
    return Markup(f"{opening}>{rest}")
