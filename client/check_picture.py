"""The picture of `fedbridge-site check`: a few accepted windows of both modalities, and rejected ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.check import Findings
from client.errors import OutputError
from client.labels import LabelSource
from client.readers.base import Recording
from client.site_file import Role
from client.windowing import chosen_signal, cut, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACCEPTED, _REJECTED, _CHANNELS = 4, 4, 4
_COLOURS: dict[Role, str] = {"old": "#1f5a94", "new": "#b3541e"}
_RAW, _BAD = "#9a9a9a", "#a01818"


@dataclass(frozen=True)
class _Row:
    """One window to draw; `reason` is empty for an accepted one."""

    path: Path
    start: float
    reason: str


def draw(findings: Findings, picture: Path) -> list[str]:
    """Draw the picture; return what each row is, for the terminal. Raises `OutputError` where it can't be written."""
    from matplotlib.figure import Figure

    rows = _chosen(findings)
    roles = list(findings.formats)
    figure = Figure(figsize=(6.2 * len(roles), 1.6 * max(1, len(rows)) + 0.9), layout="constrained")
    axes = figure.subplots(max(1, len(rows)), len(roles), squeeze=False)
    for number, (row, line) in enumerate(zip(rows, axes, strict=False), start=1):
        _draw_row(findings, row, line)
        line[0].set_ylabel(str(number), rotation=0, fontsize=10, labelpad=12)
    for role, axis in zip(roles, axes[0], strict=True):
        form = findings.formats[role]
        title = f"{role}: {form.window.modality}, {form.window.rate_hz:g} Hz"
        axis.set_title(title, fontsize=9, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("seconds of the window", fontsize=8)
    figure.suptitle(
        "Colour: as the encoder reads it. Grey: as recorded, scaled to fit. Red: rejected, as recorded.", fontsize=9
    )
    try:
        figure.savefig(picture, dpi=120)
    except (OSError, ValueError) as error:
        raise OutputError(
            f"{picture}: the picture can't be written",
            why=getattr(error, "strerror", None) or str(error),
            fix="name a .png file in a folder that you own",
        ) from error
    return [f"{row.path.name} from {row.start:g} s: {row.reason or 'accepted'}" for row in rows]


def _chosen(findings: Findings) -> list[_Row]:
    """Accepted windows of different recordings, then one rejected window for each of the commonest reasons."""
    usable = [each for each in findings.files if each.accepted]
    picks = np.unique(np.linspace(0, len(usable) - 1, min(_ACCEPTED, len(usable))).round().astype(np.int64))
    rows = []
    for index in picks:
        path = usable[int(index)].path
        starts = _cut_again(findings, path)[1].starts
        rows.append(_Row(path, float(starts[len(starts) // 2]), ""))
    for reason, _ in [each for each in findings.rejected.most_common() if each[0] != "short segment"][:_REJECTED]:
        path, start = next((each.path, at) for each in findings.files for at, why in each.rejections if why == reason)
        rows.append(_Row(path, start, reason))
    return rows


def _cut_again(findings: Findings, path: Path) -> tuple[Recording, Any]:
    recording = findings.site.reader.read(path)
    labels = LabelSource.of(findings.site)
    return recording, cut(recording, findings.site.file, findings.formats, labels)


def _draw_row(findings: Findings, row: _Row, axes: Sequence[Axes]) -> None:
    recording, found = _cut_again(findings, row.path)
    seconds = findings.site.file.window.seconds
    for (role, form), axis in zip(findings.formats.items(), axes, strict=True):
        signal = chosen_signal(recording, findings.site.file.section(role), form.window)
        first = nearest((row.start - signal.start_seconds) * signal.rate_hz)
        raw = signal.data[:_CHANNELS, max(0, first) : first + round(seconds * signal.rate_hz)]
        _plot(axis, _scaled(raw), seconds, signal.channels, _BAD if row.reason else _RAW)
        if not row.reason:
            index = int(np.flatnonzero(np.isclose(found.starts, row.start))[0])
            _plot(axis, _scaled(found.signals[role][index, :_CHANNELS]), seconds, signal.channels, _COLOURS[role])
        modalities = [each.window.modality for each in findings.formats.values()]
        if row.reason.startswith(form.window.modality) or not row.reason.startswith(tuple(modalities)):
            axis.set_title(row.reason, fontsize=8, loc="right", color=_BAD)
        axis.set_xlim(0, seconds)
        axis.set_ylim(-6 * min(len(form.window.channels), _CHANNELS) + 2.9, 3.1)
        axis.tick_params(labelsize=7)


def _plot(axis: Axes, values: NDArray[np.float64], seconds: float, channels: Sequence[str], colour: str) -> None:
    """Channels one below the other; gaps stay open."""
    times = np.linspace(0, seconds, values.shape[1], endpoint=False)
    for index, line in enumerate(values):
        axis.plot(times, line - 6 * index, color=colour, linewidth=0.8)
    axis.set_yticks([-6 * index for index in range(len(values))], list(channels[: len(values)]))


def _scaled(values: NDArray[np.float32]) -> NDArray[np.float64]:
    """Each channel centred and scaled to its largest finite value; a constant stays a flat line, a gap a gap."""
    out = values.astype(np.float64)
    for line in out:
        finite = np.isfinite(line)
        if finite.any():
            line -= np.median(line[finite])
            largest = float(np.abs(line[finite]).max())
            line *= 2.8 / largest if largest > 1e-12 else 1.0
    return out
