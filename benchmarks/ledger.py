"""What the ledger adds to a private message: opening it, drawing down, keeping the reply.

    python -m benchmarks.ledger [--messages 200] [--patients 300] [--runs 50]

The ledger first gets a history of so many runs over the same patients. Then each message does what a fresh process
does, on the disk of the working folder: open the ledger and check its head, find the run's plan reserved for all
patients, charge the message, let the audit log know, store a reply of 100 kB encrypted. The naive variant keeps no
ledger: it writes the reply to a file and waits for the disk. The goal is 20 ms for drawing down, that is for all but
opening and finding the plan; it fails the command where the median misses it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

from bridge.files import write_whole
from bridge.privacy.accounting import Release
from client.ledger import Ledger, MessageKey, Plan
from client.site import Site, open_site
from client.site_file import SignalSection, SiteFile, WindowSection, write_site_file

GOAL_MS = 20.0
REPLY = os.urandom(100_000)
STEP = Release("training", "pair", 4.0, 0.25)


def site_in(folder: Path) -> Site:
    """A site file; the ledger needs no recordings."""
    file = SiteFile(
        site="alpha",
        folder=Path("recordings"),
        new=SignalSection(modality="PPG", channels=("P",), rate_hz=32),
        window=WindowSection(seconds=4, step_seconds=4),
    )
    write_site_file(folder / "site.yaml", file)
    return open_site(folder)


def main() -> int:
    """Measure, print milliseconds, and return 1 where the goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--messages", type=int, default=200)
    parser.add_argument("--patients", type=int, default=300)
    parser.add_argument("--runs", type=int, default=50)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as name:
        site = site_in(Path(name))
        releases = (Release("training", "pair", 4.0, 0.25, options.messages),)
        plan = Plan("a" * 64, releases, 1e-3, 1e9, {"pair": [f"p{i}" for i in range(options.patients)]})
        with Ledger.open(site) as ledger:
            for run in range(options.runs):
                ledger.reserve(f"run {run}", plan)
        opened: list[float] = []
        found: list[float] = []
        drawn: list[float] = []
        naive: list[float] = []
        for number in range(options.messages):
            times = [time.perf_counter()]
            ledger = Ledger.open(site)
            times.append(time.perf_counter())
            ledger.reserve("run 0", plan)
            times.append(time.perf_counter())
            key = MessageKey("train", number)
            ledger.answer("run 0", key, "q" * 64, (STEP,), "pair", lambda: REPLY, encrypt=True)
            times.append(time.perf_counter())
            ledger.close()
            start = time.perf_counter()
            write_whole(Path(name) / "reply", REPLY, sync=True)
            naive.append(1000 * (time.perf_counter() - start))
            for before, kept in enumerate((opened, found, drawn)):
                kept.append(1000 * (times[before + 1] - times[before]))
    print(f"{'':<28}{'median ms':>10}{'95 %':>8}")
    for what, each in (
        ("open, check the head", opened),
        ("find the reserved plan", found),
        ("draw down, keep the reply", drawn),
        ("naive: write the reply", naive),
    ):
        print(f"{what:<28}{statistics.median(each):>10.2f}{statistics.quantiles(each, n=20)[-1]:>8.2f}")
    median = statistics.median(drawn)
    print(f"ratio to the naive variant: {median / statistics.median(naive):.1f}")
    print(f"goal: under {GOAL_MS:g} ms: {'met' if median < GOAL_MS else 'MISSED'}")
    return int(median >= GOAL_MS)


if __name__ == "__main__":
    sys.exit(main())
