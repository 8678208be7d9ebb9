"""The process of one case: `python -m simulations.parity.child FOLDER FILE ENTRY KIND THREADS`; prints its result."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import torch

from bridge.errors import FedbridgeError
from simulations.parity.cases import FoundCase, Kind
from simulations.parity.compare import run
from simulations.parity.result import CaseResult


def main(folder: str, file: str, entry: str, kind: str, threads: str) -> None:
    """Run the case and print its result as a line of JSON, the last one."""
    torch.set_num_threads(int(threads))
    case = FoundCase(Path(folder), file, entry, cast("Kind", kind))
    try:
        result = run(case)
    except FedbridgeError as error:
        result = CaseResult(name=case.name, error=str(error))
    sys.stdout.write(json.dumps(asdict(replace(result, peak_bytes=_peak_bytes()))) + "\n")


def _peak_bytes() -> int:
    """The most memory that this process held, by Linux; what its parent held before is no part of it."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main(*sys.argv[1:])
