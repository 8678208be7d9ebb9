"""`submitted.json`: which study a run folder belongs to, and as which run of Flower's it was submitted last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from bridge.config import Settings
from bridge.files import cause, write_whole
from server.errors import RunFolderError

SUBMITTED = "submitted.json"


class Submission(Settings):
    """The last submission of a run; what Flower said of its end, once somebody asked."""

    schema_: Literal["fedbridge.submission/1"] = Field(default="fedbridge.submission/1", alias="schema")
    study: str
    """The study's id."""
    study_sha256: str
    study_file: str
    """Where the study file was."""
    submitted: str
    """UTC, ISO 8601."""
    flower_run: str = ""
    """Flower's id of the run; empty while it is being submitted."""
    ended: Literal["", "completed", "failed", "stopped", "lost"] = ""
    """How Flower says that it ended; `lost`: Flower knows it no longer. Empty as long as nobody knows."""
    details: str = ""
    """Flower's words for it."""


def write_submission(folder: Path, submission: Submission) -> None:
    """Write it in one rename; raises `RunFolderError` where the folder can't be written."""
    text = json.dumps(submission.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False)
    try:
        write_whole(folder / SUBMITTED, text + "\n", sync=True)
    except OSError as error:
        raise RunFolderError(
            f"{folder / SUBMITTED}: can't be written", why=cause(error), fix="free space or correct the permissions"
        ) from error


def read_submission(folder: Path) -> Submission | None:
    """What a run folder says; None where nothing was submitted. Raises `RunFolderError` where it can't be read."""
    path = folder / SUBMITTED
    try:
        return Submission.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError) as error:
        why = cause(error) if isinstance(error, OSError) else "it is damaged"
        raise RunFolderError(f"{path}: can't be read", why=why, fix="bring it back from a backup") from error
