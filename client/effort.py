"""What each message cost the site's machine: how long its process lived, and how much memory it held.

One JSON line a message, in a file that stays at the site: `state/messages.jsonl`. `fedbridge-site rehearse` measures
its messages with the same two functions, so the two can be compared.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path

MAX_BYTES = 5_000_000
"""A file that grows beyond this is moved to `<name>.1`, over the one that was there."""
_STARTED_FIELD = 19
"""Of /proc/self/stat behind the command's name: `starttime`, in clock ticks since the machine started (proc(5))."""


@dataclass(frozen=True)
class Effort:
    """One message's cost, start of Python and imports included."""

    when: str
    """UTC, ISO 8601."""
    run: str
    """The Flower run."""
    message: str
    """Its type: describe, probe, ..."""
    round: int | None
    """The round of training or evaluation, where the message has one."""
    seconds: float
    """From the start of the process until the reply was ready."""
    peak_bytes: int
    """The most memory that the process held."""
    outcome: str
    """`OK`, or the reason code by name."""


def record_effort(path: Path, effort: Effort) -> None:
    """Append one line. Never raises: a full disk must not decide whether a message is answered.

    A line that could not be written whole is taken back.
    """
    line = (json.dumps(asdict(effort), separators=(",", ":")) + "\n").encode()
    try:
        if path.exists() and path.stat().st_size > MAX_BYTES:
            path.replace(path.with_name(path.name + ".1"))
        with path.open("ab", buffering=0) as file:
            before = os.fstat(file.fileno()).st_size
            if file.write(line) != len(line):
                file.truncate(before)
    except OSError as error:
        sys.stderr.write(f"{path}: can't be written ({error.strerror or error})\n")


def read_efforts(path: Path) -> list[Effort]:
    """All lines, oldest first; none where there is no file. A line that is no effort (half written) is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    return [effort for line in lines if (effort := _parsed(line)) is not None]


def seconds_since_start() -> float:
    """How long this process has lived, the start of Python and imports included."""
    behind_name = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = int(behind_name[_STARTED_FIELD])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def peak_bytes() -> int:
    """The most memory that this process has held, in bytes.

    From the kernel's VmHWM: `ru_maxrss` also counts what the parent held when it started this one. Where the kernel
    has no VmHWM, `ru_maxrss` it is.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _parsed(line: str) -> Effort | None:
    try:
        content = json.loads(line)
    except ValueError:
        return None
    if not isinstance(content, dict) or content.keys() != {field.name for field in fields(Effort)}:
        return None
    effort = Effort(**content)
    numbers = isinstance(effort.seconds, int | float) and isinstance(effort.peak_bytes, int)
    texts = all(isinstance(each, str) for each in (effort.when, effort.run, effort.message, effort.outcome))
    return effort if numbers and texts and isinstance(effort.round, int | None) else None
