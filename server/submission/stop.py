"""Stop a run on purpose."""

from __future__ import annotations

import time
from pathlib import Path

from server.errors import RunFolderError
from server.flower_command import FlowerCommand
from server.runfolder import is_held
from server.submission.flower import flower_status, stop_in_flower
from server.submission.record import read_submission, write_submission

_WAIT_SECONDS = 60.0
"""A process notices at its next heartbeat or question, at most half a minute later."""
_POLL_SECONDS = 1.0


def stop_run(folder: Path, flower: FlowerCommand) -> str:
    """Stop a submitted run and wait until its process is gone; a sentence that says what was done.

    Raises `RunFolderError` where there is no such run or its process does not end, `ServiceError` where the SuperLink
    does not answer.
    """
    submission = read_submission(folder)
    if submission is None or not submission.flower_run:
        raise RunFolderError(f"{folder}: is no submitted run", fix="see `fedbridge-server status` for names")
    status = flower_status(flower, submission.flower_run)
    if status.is_over:
        return f"{folder.name}: had ended already ({status.ending})"
    stop_in_flower(flower, submission.flower_run)
    write_submission(folder, submission.model_copy(update={"ended": "stopped", "details": "stopped on purpose"}))
    deadline = time.monotonic() + _WAIT_SECONDS
    while is_held(folder):
        if time.monotonic() >= deadline:
            raise RunFolderError(
                f"{folder}: Flower stopped the run, but its process still works", fix="end it by hand, or wait"
            )
        time.sleep(_POLL_SECONDS)
    return f"{folder.name}: stopped; go on with --resume"
