"""Watch a submitted run to its end, and say whether it really succeeded.

Two witnesses have to agree: `run.json`, which the run writes last, and Flower's list of runs. The first is read from
disk as often as one likes; Flower is asked when the first has something to say, or when the run's process is gone.
"""

from __future__ import annotations

import math
import time
from contextlib import suppress
from pathlib import Path

from bridge.errors import ServiceError
from server.coordinator.folder import CONNECTION
from server.errors import RunError, RunFolderError
from server.flower_command import FlowerCommand
from server.record import RUN_JSON, RunRecord, read_record
from server.runfolder import is_held
from server.submission.display import Display
from server.submission.flower import FlowerStatus, flower_status
from server.submission.record import Submission, read_submission, write_submission
from server.submission.runs import run_state

FLOWER_LOG = "flower.log"
_POLL_SECONDS = 1.0
_ASK_SECONDS = 5.0
"""Between two questions to Flower while the run's process is not at work."""
_SELDOM_SECONDS = 60.0
"""The same while it is."""
_PATIENCE_SECONDS = 180.0
"""How long the SuperLink may be gone: it may be restarted."""


def follow(folder: Path, flower: FlowerCommand, show: Display) -> RunRecord:
    """Watch a run until it has ended and return its record.

    Raises `RunError` where it did not succeed (Flower's log is then in `flower.log`), `ServiceError` where the
    SuperLink does not answer for a while, `RunFolderError` where the folder holds no submitted run. What Flower said
    of its end is kept in `submitted.json`.
    """
    submission = _submitted(folder)
    status = FlowerStatus(submission.ended, submission.details)
    watch = _Watch(flower, submission.flower_run)
    while not status.is_over:
        show(run_state(folder), watch.note)
        status = watch.status(seldom=is_held(folder))
        if not status.is_over:
            time.sleep(_POLL_SECONDS)
    if not submission.ended:
        with suppress(RunFolderError):  # a full disk must not hide why the run failed
            write_submission(folder, submission.model_copy(update={"ended": status.ending, "details": status.details}))
    show(run_state(folder))
    return _succeeded(folder, status, flower, submission.flower_run)


class _Watch:
    """Asks Flower now and then, and bears with a SuperLink that is gone for a while."""

    def __init__(self, flower: FlowerCommand, run: str) -> None:
        self._flower, self._run = flower, run
        self._asked, self._answered = -math.inf, time.monotonic()
        self.note = ""

    def status(self, *, seldom: bool) -> FlowerStatus:
        """What Flower says, where it is time to ask; else that the run goes on."""
        if time.monotonic() - self._asked < (_SELDOM_SECONDS if seldom else _ASK_SECONDS):
            return FlowerStatus("")
        self._asked = time.monotonic()
        try:
            found = flower_status(self._flower, self._run)
        except ServiceError:
            if time.monotonic() - self._answered > _PATIENCE_SECONDS:
                raise
            self.note = "the SuperLink does not answer"
            return FlowerStatus("")
        self._answered, self.note = time.monotonic(), ""
        return found


def _submitted(folder: Path) -> Submission:
    submission = read_submission(folder)
    if submission is None:
        raise RunFolderError(
            f"{folder}: is no submitted run", why="there is no such run", fix="see `fedbridge-server status` for names"
        )
    if not submission.flower_run:
        raise RunFolderError(
            f"{folder}: its submission was interrupted",
            why="whether Flower has started it is not known",
            fix=f"go on with `fedbridge-server run {submission.study_file} --name {folder.name} --resume`",
        )
    return submission


def _succeeded(folder: Path, status: FlowerStatus, flower: FlowerCommand, run: str) -> RunRecord:
    try:
        record = read_record(folder) if (folder / RUN_JSON).is_file() else None
    except RunFolderError:
        record = None
    if record is not None and record.status == "completed" and status.ending == "completed":
        return record
    _keep_log(folder, flower, run)
    raise RunError(
        f"{folder.name}: {_what(record, status)}",
        why=_why(record, status),
        fix=f"{folder / FLOWER_LOG} has the whole log; go on with `fedbridge-server run STUDY --name {folder.name} "
        "--resume` once the reason is gone",
    )


def _what(record: RunRecord | None, status: FlowerStatus) -> str:
    if status.ending == "stopped":
        return "the run was stopped"
    if record is not None and record.status == "completed":
        return f"its result is there, but Flower says that the run {status.ending}"
    return "the run failed"


def _why(record: RunRecord | None, status: FlowerStatus) -> str:
    """The run's own words where it had time for them, with each site that lost its turn; else Flower's."""
    if record is None or record.status != "failed" or not record.error:
        return status.details or "its process ended and left no word"
    refused = [f"{site.site}: {site.reason}" for site in record.sites if not site.can_take_part]
    refused = [each for each in refused if each not in record.error]
    return record.error + (f"\nSites that did not take part: {'; '.join(refused)}" if refused else "")


def _keep_log(folder: Path, flower: FlowerCommand, run: str) -> None:
    """What the run printed, its traceback too; a failure to keep it hides no other."""
    with suppress(OSError, ServiceError):
        (folder / FLOWER_LOG).write_text(flower.call("log", run, CONNECTION, "--show").stdout, encoding="utf-8")
