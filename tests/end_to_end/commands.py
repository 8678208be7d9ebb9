"""The installed console commands as child processes, on the smoke configuration."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.conftest import ROOT

SMOKE = ROOT / "configs" / "smoke.yaml"


def command(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def yielding(name: str, *arguments: str | Path) -> list[str]:
    """The command at a low priority: what is judged by the clock may run beside it."""
    return ["nice", "-n", "5", command(name), *map(str, arguments)]


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "NO_COLOR": "1", **(extra or {})}


def call(name: str, *arguments: str | Path, extra: Mapping[str, str] | None = None, timeout: float = 300) -> str:
    """Run to the end; fails the test with the output where the exit code is not 0."""
    code, output = attempt(name, *arguments, extra=extra, timeout=timeout)
    assert code == 0, output
    return output


def attempt(
    name: str,
    *arguments: str | Path,
    extra: Mapping[str, str] | None = None,
    timeout: float = 300,
    cwd: Path | None = None,
) -> tuple[int, str]:
    """Exit code and everything printed."""
    done = subprocess.run(
        yielding(name, *arguments),
        env=environment(extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
        cwd=cwd,
    )
    return done.returncode, done.stdout


def start(name: str, *arguments: str | Path, extra: Mapping[str, str] | None = None) -> subprocess.Popen[bytes]:
    """Start in a process group of its own, so that all of it can be killed."""
    return subprocess.Popen(
        yielding(name, *arguments),
        env=environment(extra),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
