"""Cuts recordings into time-aligned windows, and counts what it rejects and why.

The grid of windows begins anew at each segment and is the same whatever modalities are asked for; each modality is
judged and preprocessed on its own, so a new window is the same to the last bit with and without the old modality.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridge.windows import WindowSpec
from client.errors import NoWindowsError, RecordingError
from client.labels import LabelSource, label_windows
from client.preprocessing import finish_windows, prepare_run
from client.quality import judge
from client.readers.base import Recording, Signal
from client.site import InputFormat, Site
from client.site_file import QualitySection, Role, SignalSection, SiteFile, Split

log = logging.getLogger("fedbridge.site")

_told: set[str] = set()

_SLACK = 1e-6
"""Seconds by which times may differ through rounding."""


@dataclass(frozen=True)
class WindowTable:
    """What is known of each window, one row a window; the patient is always beside it."""

    patients: NDArray[np.str_]
    recordings: NDArray[np.str_]
    starts: NDArray[np.float64]
    """Seconds on the recording's axis."""
    labels: NDArray[np.int64]
    """Index into `labels.classes`; -1 where there is no label."""
    groups: NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.starts)

    def take(self, rows: NDArray[np.integer] | NDArray[np.bool_]) -> WindowTable:
        """The table of some rows."""
        return WindowTable(
            self.patients[rows], self.recordings[rows], self.starts[rows], self.labels[rows], self.groups[rows]
        )

    @classmethod
    def of(cls, recording: Recording, cut: Cut) -> WindowTable:
        """The table of one recording's windows."""
        n = len(cut.starts)
        names = np.array([recording.patient] * n, np.str_), np.array([recording.name] * n, np.str_)
        return cls(*names, cut.starts, cut.labels, np.array(cut.groups, dtype=np.str_).reshape(n))

    @classmethod
    def joined(cls, tables: Sequence[WindowTable]) -> WindowTable:
        """Several tables, one after the other."""
        texts = [
            np.concatenate([np.asarray(part, dtype=np.str_) for part in parts]) if parts else np.array([], np.str_)
            for parts in ([t.patients for t in tables], [t.recordings for t in tables], [t.groups for t in tables])
        ]
        starts = np.concatenate([np.zeros(0), *[t.starts for t in tables]])
        labels = np.concatenate([np.zeros(0, np.int64), *[t.labels for t in tables]])
        return cls(texts[0], texts[1], starts, labels, texts[2])


@dataclass(frozen=True)
class Cut:
    """The accepted windows of one recording: `signals[role]` is float32 `(n, channels, samples)`."""

    starts: NDArray[np.float64]
    labels: NDArray[np.int64]
    groups: tuple[str, ...]
    signals: Mapping[Role, NDArray[np.float32]]
    rejections: tuple[tuple[float, str], ...]
    """Start (seconds) and reason of everything that was rejected."""

    @property
    def rejected(self) -> Counter[str]:
        """How many windows were rejected for each reason."""
        return Counter(reason for _, reason in self.rejections)


@dataclass(frozen=True)
class FileProblem:
    """One file that could not be used, and why; for the site's own eyes."""

    path: Path
    error: RecordingError


@dataclass(frozen=True)
class Windows:
    """Windows of a split: the table and, for each role asked for, float32 `(n, channels, samples)`."""

    table: WindowTable
    old: NDArray[np.float32] | None
    new: NDArray[np.float32] | None
    rejected: Counter[str] = field(default_factory=Counter)
    problems: tuple[FileProblem, ...] = ()


def cut(recording: Recording, file: SiteFile, formats: Mapping[Role, InputFormat], labels: LabelSource) -> Cut:
    """Cut one recording for the roles in `formats`.

    A window is rejected, and counted under the first reason that holds: `<modality> missing | nan | flat | clipped`,
    then `mixed label`, `no label`, `other label` (where the site file rejects unlabelled windows). A segment that is
    shorter than a window counts as `short segment`. Raises `RecordingError` where a modality or channel is missing, the
    rate is another, or the two signals do not cover the same time.
    """
    signals = {role: chosen_signal(recording, file.section(role), form.window) for role, form in formats.items()}
    _check_same_time(recording.name, list(signals.values()), file.quality)
    starts, rejections = window_starts(recording, file)
    keep = np.ones(len(starts), dtype=bool)
    parts = {role: _Part(signal, formats[role], recording.segments) for role, signal in signals.items()}
    for role, part in parts.items():
        for row in np.flatnonzero(keep):
            reason = part.reason(starts[row], file.window.seconds, file.quality)
            if reason:
                keep[row] = False
                rejections.append((float(starts[row]), f"{formats[role].window.modality} {reason}"))
    found = label_windows(labels.track(recording), starts, file.window.seconds, file.labels, recording.group)
    for row in np.flatnonzero(keep):
        if found.problems[row] and file.labels.unlabelled == "reject":
            keep[row] = False
            rejections.append((float(starts[row]), found.problems[row]))
    starts = starts[keep]
    groups = tuple(group for group, kept in zip(found.groups, keep, strict=True) if kept)
    cuts = {role: part.windows(starts) for role, part in parts.items()}
    return Cut(starts, found.labels[keep], groups, cuts, tuple(rejections))


def window_starts(recording: Recording, file: SiteFile) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """Starts (seconds) of all windows that lie in one segment, and a rejection for each segment too short for any."""
    seconds, step = file.window.seconds, file.window.step_seconds
    rejections: list[tuple[float, str]] = []
    starts: list[NDArray[np.float64]] = [np.zeros(0)]
    for start, end in recording.segments:
        count = int(np.floor((end - start - seconds + _SLACK) / step)) + 1
        if count < 1:
            rejections.append((start, "short segment"))
        else:
            starts.append(start + step * np.arange(count, dtype=np.float64))
    return np.concatenate(starts), rejections


def chosen_signal(recording: Recording, section: SignalSection, window: WindowSpec) -> Signal:
    """The signal of one role with the encoder's channels in its order. Raises `RecordingError`."""
    modality = section.modality
    if modality not in recording.signals:
        why = recording.absent.get(modality, f"the reader gives {', '.join(recording.signals) or 'nothing'}")
        raise RecordingError(
            f"{recording.name}: has no {modality}", why=why, fix="correct reader.options, or exclude the file"
        )
    signal = recording.signals[modality]
    if abs(signal.rate_hz - section.rate_hz) > 1e-6 * section.rate_hz:
        raise RecordingError(
            f"{recording.name}: {modality} was sampled at {signal.rate_hz:g} Hz",
            why=f"the site file says {section.rate_hz:g} Hz",
            fix="correct rate_hz in the site file, resample the file, or exclude it",
        )
    missing = [
        channel for channel in dict.fromkeys((*section.channels, *window.channels)) if channel not in signal.channels
    ]
    if missing:
        raise RecordingError(
            f"{recording.name}: {modality} lacks the channel(s) {', '.join(missing)}",
            why=f"it has {', '.join(signal.channels)}",
            fix="correct the channels in the site file, or exclude the file",
        )
    rows = [signal.channels.index(channel) for channel in window.channels]
    return Signal(signal.data[rows], signal.rate_hz, window.channels, signal.start_seconds, signal.masked)


def _check_same_time(name: str, signals: Sequence[Signal], quality: QualitySection) -> None:
    if len(signals) < 2:
        return
    first, second = signals
    apart = max(abs(first.start_seconds - second.start_seconds), abs(first.end_seconds - second.end_seconds))
    if apart > quality.length_tolerance_seconds + _SLACK:
        spans = " and ".join(f"{each.start_seconds:g} to {each.end_seconds:g} s" for each in signals)
        raise RecordingError(
            f"{name}: the two signals do not cover the same time: {spans}",
            why=f"they may differ by quality.length_tolerance_seconds, {quality.length_tolerance_seconds:g} s; "
            "signals of different length are seldom aligned, or have another rate than the reader's options say",
            fix="align the file or correct the rate; or raise the tolerance, if both surely begin at the same moment; "
            "or exclude the file",
        )


class _Part:
    """One modality of one recording: judged on the raw signal, cut from the prepared gap-free runs."""

    def __init__(self, signal: Signal, form: InputFormat, segments: Iterable[tuple[float, float]]) -> None:
        self.signal = signal
        self.form = form
        self.runs = gap_free_runs(signal, segments)
        self._prepared: dict[int, NDArray[np.float64]] = {}

    def reason(self, start: float, seconds: float, quality: QualitySection) -> str:
        """Why the window can't be used, or an empty text."""
        rate = self.signal.rate_hz
        first = nearest((start - self.signal.start_seconds) * rate)
        last = first + math.floor(seconds * rate + _SLACK)
        if first < 0 or last > self.signal.data.shape[1]:
            return "missing"
        if self.signal.masked is not None and self.signal.masked[first:last].any():
            return "missing"
        return judge(self.signal.data[:, first:last], quality)

    def windows(self, starts: NDArray[np.float64]) -> NDArray[np.float32]:
        """float32 `(n, channels, samples)` at the encoder's rate, of windows without a reason against them."""
        window, steps = self.form.window, self.form.preprocessing
        out = np.zeros((len(starts), len(window.channels), window.samples))
        for row, start in enumerate(starts):
            out[row] = self._window(start) if steps.over == "window" else self._part_of_run(start)
        by_recording = steps.normalise == "recording" and len(starts) > 0
        return finish_windows(out, steps, self._all_runs() if by_recording else None)

    def _part_of_run(self, start: float) -> NDArray[np.float64]:
        """A window of the prepared run that holds it, from the nearest sample on."""
        rate, window = self.signal.rate_hz, self.form.window
        index = self._run_index(start)
        begin, _ = self.runs[index]
        run = _at_least(window.samples, self._run(index))
        offset = nearest((start - self.signal.start_seconds - begin / rate) * window.rate_hz)
        offset = min(max(offset, 0), run.shape[1] - window.samples)
        return run[:, offset : offset + window.samples]

    def _window(self, start: float) -> NDArray[np.float64]:
        """A window that is prepared by itself, as if nothing had been recorded before and after."""
        rate, window = self.signal.rate_hz, self.form.window
        _, end = self.runs[self._run_index(start)]
        first = nearest((start - self.signal.start_seconds) * rate)
        data = self.signal.data[:, first : min(end, first + nearest(window.seconds * rate))]
        prepared = prepare_run(data, rate, window.rate_hz, self.form.preprocessing)
        return _at_least(window.samples, prepared)[:, : window.samples]

    def _run_index(self, start: float) -> int:
        first = nearest((start - self.signal.start_seconds) * self.signal.rate_hz)
        return next(i for i, (begin, end) in enumerate(self.runs) if begin <= first < end)

    def _all_runs(self) -> NDArray[np.float64]:
        """All prepared runs end to end, `(channels, n')`."""
        return np.concatenate([self._run(index) for index in range(len(self.runs))], axis=-1)

    def _run(self, index: int) -> NDArray[np.float64]:
        """A gap-free run, prepared once."""
        if index not in self._prepared:
            begin, end = self.runs[index]
            data, rate = self.signal.data[:, begin:end], self.signal.rate_hz
            self._prepared[index] = prepare_run(data, rate, self.form.window.rate_hz, self.form.preprocessing)
        return self._prepared[index]


def _at_least(samples: int, run: NDArray[np.float64]) -> NDArray[np.float64]:
    """A run of just one window may lack the part of a sample that its own rate can't express: its end is held."""
    short = max(0, samples - run.shape[1])
    return np.pad(run, ((0, 0), (0, short)), mode="edge") if short else run


def nearest(samples: float) -> int:
    """The nearest sample; halves go up, so that shifting by whole samples never changes the rounding."""
    return math.floor(samples + 0.5)


def gap_free_runs(signal: Signal, segments: Iterable[tuple[float, float]]) -> list[tuple[int, int]]:
    """Sample ranges `[begin, end)` without NaN in any channel, each inside one segment."""
    usable = np.asarray(np.isfinite(signal.data).all(axis=0), dtype=np.bool_)
    if signal.masked is not None:
        usable = usable & ~signal.masked
    runs: list[tuple[int, int]] = []
    for start, end in segments:
        first = max(0, nearest((start - signal.start_seconds) * signal.rate_hz))
        last = min(len(usable), nearest((end - signal.start_seconds) * signal.rate_hz))
        inside = np.concatenate([[False], usable[first:last], [False]]).astype(np.int8)
        edges = np.flatnonzero(np.diff(inside))
        runs += [(first + int(begin), first + int(stop)) for begin, stop in zip(edges[::2], edges[1::2], strict=True)]
    return runs


def formats_of(site: Site, roles: Iterable[Role]) -> dict[Role, InputFormat]:
    """What the site's encoders read, from their cards."""
    return {role: InputFormat.of(site.old_card if role == "old" else site.new_card) for role in roles}


def windows_of(
    site: Site,
    split: Split | None,
    roles: Sequence[Role] = ("old", "new"),
    formats: Mapping[Role, InputFormat] | None = None,
) -> Windows:
    """All accepted windows of a split (None: of every patient) for the roles.

    `formats` stands in for the cards where the encoders do not exist yet. A file that can't be used is logged, listed
    in `problems` and left out. Raises `NoWindowsError` with the counted reasons where no window is left.
    """
    formats = formats_of(site, roles) if formats is None else {role: formats[role] for role in roles}
    labels = LabelSource.of(site)
    tables: list[WindowTable] = []
    parts: dict[Role, list[NDArray[np.float32]]] = {role: [] for role in roles}
    rejected: Counter[str] = Counter()
    problems: list[FileProblem] = []
    for path in site.files():
        try:
            recording = site.reader.read(path)
            if split is not None and site.file.splits.of(recording.patient) != split:
                continue
            found = cut(recording, site.file, formats, labels)
        except RecordingError as error:
            problems.append(FileProblem(path, error))
            continue
        rejected += found.rejected
        tables.append(WindowTable.of(recording, found))
        for role in roles:
            parts[role].append(found.signals[role])
    report_problems(site, problems)
    table = WindowTable.joined(tables)
    if not len(table):
        raise no_windows(site, split, rejected, problems)
    arrays = {role: np.concatenate(each) for role, each in parts.items()}
    return Windows(table, arrays.get("old"), arrays.get("new"), rejected, tuple(problems))


def report_problems(site: Site, problems: Sequence[FileProblem]) -> None:
    """Say which files were left out; a process says it once of each."""
    for problem in problems:
        text = f"{site.name}: left out: {str(problem.error).replace(chr(10), ' ')}"
        if text not in _told:
            _told.add(text)
            log.warning(text)


def no_windows(
    site: Site, split: Split | None, rejected: Mapping[str, int], problems: Sequence[FileProblem]
) -> NoWindowsError:
    """The error for a split without any window, with the counts by reason."""
    counts = ", ".join(f"{reason}: {count}" for reason, count in sorted(rejected.items(), key=lambda each: -each[1]))
    why = f"rejected windows: {counts or 'none'}; unusable files: {len(problems)}"
    if problems:
        why += f" (the first: {problems[0].error.what})"
    if not rejected and not problems:
        why = "no patient with a recording belongs to it"
    return NoWindowsError(
        f"site '{site.name}': no usable window in " + (f"the split '{split}'" if split else "any recording"),
        why=why,
        fix=f"run: fedbridge-site check {site.path}",
    )
