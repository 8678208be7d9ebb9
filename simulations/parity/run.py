"""Each case in a process of its own, so that its memory is its own and one that fails ends nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from simulations.parity.cases import FoundCase, choose, find_cases
from simulations.parity.result import CaseResult


def found_cases(folder: Path, names: Sequence[str] = ()) -> list[FoundCase]:
    """The folder's cases, or those of them that are named. Raises `FixtureError`."""
    return choose(find_cases(folder), names)


def run_case(case: FoundCase, threads: int = 1) -> CaseResult:
    """Run a case in a process of its own; whatever becomes of it is in the result."""
    words = [str(case.folder.absolute()), case.file, case.entry, case.kind, str(threads)]
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "simulations.parity.child", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        check=False,
    )
    seconds = time.perf_counter() - begin
    if done.returncode:
        return CaseResult(name=case.name, error=_ended(done.returncode, done.stderr), seconds=seconds)
    return replace(CaseResult(**json.loads(done.stdout.splitlines()[-1])), seconds=seconds)


def _ended(code: int, stderr: str) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        return f"its process was ended by {name}" + (": too little memory, probably" if name == "SIGKILL" else "")
    last = stderr.strip().splitlines()[-1] if stderr.strip() else "it said nothing"
    return f"its process failed: {last}"
