"""`log.jsonl`: what a run is doing, one JSON object a line, for progress bars and for machines."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Literal, TextIO

from server.errors import RunFolderError

LOG = "log.jsonl"

Event = Literal[
    "describe",
    "probe",
    "similarity",
    "closed_form",
    "round",
    "evaluate",
    "lost_turn",
    "retry",
    "checkpoint",
    "export",
    "finished",
    "failed",
    "note",
]

PHASES: Mapping[str, str] = MappingProxyType(
    {
        "describe": "asking the sites",
        "probe": "choosing the input position",
        "similarity": "choosing the output position",
        "closed_form": "solving for the bridge",
        "evaluate": "evaluating the bridge",
        "export": "exporting the bridge",
    }
)
"""Events that are logged twice, `state` started, then done; and what they say that the run is doing."""


class EventLog:
    """Appends events to a run folder's `log.jsonl`; each line is flushed as it is written.

    A line holds `time` (UTC, ISO 8601), `event`, and plain numbers, names and codes: never an array, never a text that
    a site made up.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG
        try:
            self._file: TextIO = self._path.open("a+", encoding="utf-8")
            self._end_broken_line()
        except OSError as error:
            raise self._unwritable(error) from error

    def emit(self, event: Event, **fields: object) -> None:
        """Write one event; raises `RunFolderError` where the file can't be written."""
        line = json.dumps({"time": now(), "event": event, **fields}, ensure_ascii=False, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def _end_broken_line(self) -> None:
        """A process killed while writing leaves half a line: what follows must not be glued to it."""
        size = self._path.stat().st_size
        if size and os.pread(self._file.fileno(), 1, size - 1) != b"\n":
            self._file.write("\n")

    def _unwritable(self, error: OSError) -> RunFolderError:
        return RunFolderError(
            f"{self._path}: the log can't be written", why=error.strerror or "", fix="free space or name another folder"
        )

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class LogTail:
    """Whole new lines of a growing `log.jsonl`: from its beginning, or from where it ends now."""

    def __init__(self, folder: Path, *, from_end: bool = False) -> None:
        self._path = folder / LOG
        self._offset = self._path.stat().st_size if from_end and self._path.is_file() else 0

    def events(self) -> list[dict[str, Any]]:
        """What was added since the last call; half a line waits, and what is no JSON object is passed over."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read()
        except OSError:
            return []
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [event for line in whole.splitlines() if isinstance(event := _parsed(line), dict)]


def _parsed(line: bytes) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def now() -> str:
    """The time in UTC, ISO 8601, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
