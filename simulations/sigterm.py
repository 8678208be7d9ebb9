"""SIGTERM ends a command as Ctrl-C does."""

from __future__ import annotations

import multiprocessing
import signal
from types import FrameType


def end_on_sigterm() -> None:
    """From now on SIGTERM ends the processes that compute at once, and then this one, which cleans up first."""
    signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, frame: FrameType | None) -> None:
    for child in multiprocessing.active_children():
        child.terminate()
    raise SystemExit(128 + number)
