"""The site's own log of what went wrong: full texts, which never leave the site."""

from __future__ import annotations

import os
import sys
import traceback
from datetime import UTC, datetime
from pathlib import Path

from bridge.errors import FedbridgeError

MAX_BYTES = 5_000_000
"""A log that grows beyond this is moved to `<log>.1`, over the one that was there."""


def log_error(path: Path | None, message_type: str, code: str, error: BaseException) -> None:
    """Append one error with its time and, where it is a defect, its traceback.

    Never raises: a log that can't be written must not decide what the server learns. Without a path, or where the file
    can't be written, one line without the error's text goes to stderr.
    """
    when = datetime.now(UTC).isoformat(timespec="seconds")
    text = f"{when} {message_type} {code}\n{_indent(_describe(error))}\n"
    try:
        if path is None:
            raise OSError("no site folder was found")
        if path.exists() and path.stat().st_size > MAX_BYTES:
            path.replace(path.with_name(path.name + ".1"))
        # Owner only: error texts may name recordings.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as failure:
        sys.stderr.write(
            f"{when} {message_type} {code} (the site log can't be written: {failure.strerror or failure})\n"
        )


def _describe(error: BaseException) -> str:
    if isinstance(error, FedbridgeError):
        causes = f"\nCaused by: {error.__cause__!r}" if error.__cause__ is not None else ""
        return f"{type(error).__name__}: {error}{causes}"
    return "".join(traceback.format_exception(error)).rstrip()


def _indent(text: str) -> str:
    return "\n".join("  " + line for line in text.splitlines())
