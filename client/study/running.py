"""Which bundle this process runs: set once by the executor's process, before anything of a run is looked at."""

from __future__ import annotations

_running = ""


def set_running_bundle(sha256: str) -> None:
    """State the sha256 of the bundle that asked for this process; the installed code stands for it from now on."""
    global _running
    _running = sha256


def running_bundle() -> str:
    """Hex sha256 of the bundle; empty where no executor of ours runs here, so that nobody compared the code."""
    return _running
