"""Labels of windows: from the recording or from a CSV, and only where one label covers the window."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from client.errors import SiteFileError
from client.readers.base import LabelTrack, Recording
from client.site import Site
from client.site_file import LabelsSection

COLUMNS = ("recording", "start_seconds", "end_seconds", "label")


@dataclass(frozen=True)
class LabelSource:
    """Where a recording's label track comes from: `none`, the recording itself, or rows of the site's CSV."""

    source: str
    tracks: Mapping[str, LabelTrack]

    @classmethod
    def of(cls, site: Site) -> LabelSource:
        """The source that the site file names. Raises `SiteFileError` where its CSV can't be used."""
        section = site.file.labels
        tracks = read_label_csv(site.resolve(section.path)) if section.path is not None else {}
        return cls(section.source, tracks)

    def track(self, recording: Recording) -> LabelTrack | None:
        """The labels of a recording, or None."""
        return recording.labels if self.source == "recording" else self.tracks.get(recording.name)

    def content(self, name: str) -> list[object]:
        """What, beside the recording's own bytes, decides its labels: plain values, for a content key."""
        track = self.tracks.get(name)
        if track is None:
            return [self.source]
        return [self.source, track.starts.tolist(), track.ends.tolist(), list(track.values), list(track.groups)]


@dataclass(frozen=True)
class WindowLabels:
    """For each window: its class index (-1: none), its group, and why it has no class (an empty text if it has one)."""

    labels: NDArray[np.int64]
    groups: tuple[str, ...]
    problems: tuple[str, ...]


def label_windows(
    track: LabelTrack | None, starts: NDArray[np.float64], seconds: float, section: LabelsSection, group: str
) -> WindowLabels:
    """Label windows of `seconds` at `starts` by the stretches of a track.

    A window gets the label that covers at least `section.coverage` of it. Otherwise its problem is `no label` (nothing
    covers any of it), `mixed label` (no label covers enough), or `other label` (one not among `section.classes`).
    """
    labels = np.full(len(starts), -1, dtype=np.int64)
    groups, problems = [group] * len(starts), ["no label"] * len(starts)
    if track is None or not len(track.starts):
        return WindowLabels(labels, tuple(groups), tuple(problems))
    texts = np.array(track.values)
    for row, start in enumerate(starts):
        overlap = np.minimum(track.ends, start + seconds) - np.maximum(track.starts, start)
        touching = np.flatnonzero(overlap > 1e-9)
        if not len(touching):
            continue
        covered = {text: overlap[touching][texts[touching] == text].sum() for text in set(texts[touching].tolist())}
        best = max(sorted(covered), key=lambda text: covered[text])
        longest = touching[np.argmax(overlap[touching])]
        groups[row] = track.groups[longest] if track.groups and track.groups[longest] else group
        if covered[best] < section.coverage * seconds - 1e-6:
            problems[row] = "mixed label"
        elif best not in section.classes:
            problems[row] = "other label"
        else:
            problems[row], labels[row] = "", section.classes.index(best)
    return WindowLabels(labels, tuple(groups), tuple(problems))


def read_label_csv(path: Path) -> dict[str, LabelTrack]:
    """Label tracks by recording name. Raises `SiteFileError` that names the line."""
    rows: dict[str, list[tuple[float, float, str, str]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise _bad(path, 1, f"the column(s) {', '.join(missing)} are missing")
            for line, row in enumerate(reader, start=2):
                rows.setdefault(row["recording"], []).append(_row(path, line, row))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise SiteFileError(
            f"{path}: the label file can't be read", why=str(error), fix="correct labels.path in the site file"
        ) from error
    return {recording: _track(path, recording, each) for recording, each in rows.items()}


def _row(path: Path, line: int, row: Mapping[str, str | None]) -> tuple[float, float, str, str]:
    try:
        start, end = float(row["start_seconds"] or ""), float(row["end_seconds"] or "")
    except ValueError:
        raise _bad(path, line, "start_seconds and end_seconds must be numbers") from None
    if not (np.isfinite([start, end]).all() and start < end):
        raise _bad(path, line, f"start_seconds {start:g} must lie before end_seconds {end:g}")
    return start, end, (row["label"] or "").strip(), (row.get("group") or "").strip()


def _track(path: Path, recording: str, rows: list[tuple[float, float, str, str]]) -> LabelTrack:
    rows = sorted(rows)
    starts, ends, values, groups = zip(*rows, strict=True)
    if any(later < earlier - 1e-9 for earlier, later in zip(ends[:-1], starts[1:], strict=True)):
        raise SiteFileError(
            f"{path}: two labels of the recording '{recording}' overlap",
            why="a moment has one label at most",
            fix="correct the rows of that recording",
        )
    return LabelTrack(np.array(starts), np.array(ends), values, groups)


def _bad(path: Path, line: int, why: str) -> SiteFileError:
    return SiteFileError(f"{path}: line {line} can't be used", why=why, fix="correct that line of the label file")
