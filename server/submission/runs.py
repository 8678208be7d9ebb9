"""What each run of a coordinator is at, read from its folder alone: nothing is asked of Flower."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from server.errors import RunFolderError
from server.events import PHASES, LogTail
from server.record import RUN_JSON, RunRecord, read_record
from server.runfolder import is_held
from server.submission.record import Submission, read_submission

RunStatus = Literal["submitted", "running", "completed", "failed", "stopped", "lost"]
"""`lost`: its process is gone and left no word; it can be resumed like a failed or stopped one."""

_WORDS = {**PHASES, "round": "training", "finished": "done"}


@dataclass(frozen=True)
class RunState:
    """One run as it stands."""

    name: str
    study: str
    """The study's id; empty where the folder does not say."""
    state: RunStatus
    phase: str = ""
    """In words."""
    round: int = 0
    rounds: int = 0
    """Of how many; 0 where there are none."""
    started: str = ""
    """When it was submitted first or started, UTC."""
    error: str = ""
    loss: float | None = None
    """Of the last round, where the sites permit it."""
    sites: dict[str, str] = field(default_factory=dict)
    """Name to what it last said: `OK`, or the code of why not."""
    seen: dict[str, str] = field(default_factory=dict)
    """Name to when it last answered well, UTC."""
    bytes_up: dict[str, int] = field(default_factory=dict)
    """Name to bytes that came from it."""


def list_runs(runs: Path) -> list[RunState]:
    """Every run below `runs`, by name; a folder that can't be read is a run whose `error` says why."""
    if not runs.is_dir():
        return []
    return [run_state(folder) for folder in sorted(runs.iterdir()) if folder.is_dir() and _is_run(folder)]


def _is_run(folder: Path) -> bool:
    return not folder.name.startswith(".") and any(folder.iterdir())


def run_state(folder: Path) -> RunState:
    """One run by its folder."""
    try:
        submission = read_submission(folder)
        record = read_record(folder) if (folder / RUN_JSON).is_file() else None
        state = _status(folder, submission, record)
    except RunFolderError as error:
        return RunState(folder.name, "", "lost", error=str(error))
    course = read_course(folder)
    return RunState(
        name=folder.name,
        study=submission.study if submission else "",
        state=state,
        phase=course.phase,
        round=course.round,
        rounds=course.rounds,
        started=record.started if record else submission.submitted if submission else "",
        error=_error(state, submission, record),
        loss=course.loss,
        sites=_sites(record) | course.codes,
        seen=course.seen,
        bytes_up=bytes_by_site(record),
    )


def _status(folder: Path, submission: Submission | None, record: RunRecord | None) -> RunStatus:
    if record is not None and record.status == "completed":
        return "completed"
    ended = submission.ended if submission else ""
    if is_held(folder) and not ended:
        return "running"
    if ended == "stopped":
        return "stopped"
    if record is None or (submission is not None and not ended and _older(folder / RUN_JSON, submission.submitted)):
        return "failed" if ended else "submitted"
    return "failed" if record.status == "failed" else "lost"


def _older(path: Path, moment: str) -> bool:
    """Whether a file was last written before that moment, of this machine's clock."""
    try:
        return path.stat().st_mtime < datetime.fromisoformat(moment).timestamp()
    except (OSError, ValueError):
        return False


def _error(state: RunStatus, submission: Submission | None, record: RunRecord | None) -> str:
    if state == "failed":
        return (record.error if record else None) or (submission.details if submission else "")
    return "its process is gone and left no word" if state == "lost" else ""


def _sites(record: RunRecord | None) -> dict[str, str]:
    """What the sites said to describe: `OK` of those that take part."""
    return {site.site: site.reason for site in record.sites} if record else {}


def bytes_by_site(record: RunRecord | None) -> dict[str, int]:
    """Bytes that came from each site so far."""
    sums: dict[str, int] = {}
    for row in record.outbox if record else []:
        sums[row.site] = sums.get(row.site, 0) + row.bytes
    return sums


class Course:
    """What `log.jsonl` tells, event by event: where the run is, and what each site last said."""

    def __init__(self) -> None:
        self.phase = ""
        self.round = self.rounds = 0
        self.loss: float | None = None
        self.codes: dict[str, str] = {}
        self.seen: dict[str, str] = {}
        self._taking_part: set[str] = set()
        self._lost: set[str] = set()

    def take(self, event: dict[str, Any]) -> None:
        """One more event; what it lacks is passed over."""
        name, moment = event.get("event"), str(event.get("time", ""))
        if name in _WORDS:
            self.phase = _WORDS[str(name)]
        if name == "lost_turn":
            site = str(event.get("site"))
            self._lost.add(site)
            self.codes[site] = str(event.get("code"))
        elif name == "retry" and isinstance(event.get("sites"), list):
            self._lost -= set(event["sites"])
        elif name == "describe" and event.get("state") == "done" and isinstance(event.get("sites"), list):
            self._taking_part = set(event["sites"])
            self._answered(moment)
        elif name == "round":
            self.round, self.rounds = int(event.get("round", 0)), int(event.get("rounds", 0))
            loss = event.get("loss")
            self.loss = float(loss) if isinstance(loss, int | float) else None
            self._answered(moment)
        elif name in PHASES and name != "export" and event.get("state") == "done":
            self._answered(moment)

    def _answered(self, moment: str) -> None:
        """A phase or round is over: who takes part and did not lose its turn has answered."""
        for site in sorted(self._taking_part - self._lost):
            self.codes[site], self.seen[site] = "OK", moment
        self._lost.clear()


def read_course(folder: Path) -> Course:
    """What a run folder's log tells so far."""
    course = Course()
    for event in LogTail(folder).events():
        course.take(event)
    return course
