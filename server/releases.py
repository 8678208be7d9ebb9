"""Noised aggregates of a run, each made once: stored before anything is done with it, and read when it is asked again.

Sites answer the same question the same way, so a coordinator that was stopped and asks again gets the same sums. Noise
drawn anew over them would be a second release, which nobody has paid for.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bridge.files import cause, write_whole
from bridge.job import Job
from server.errors import ResumeError, RunFolderError
from server.noise import server_noise
from server.noised import NoisedSum, noised_sum

RELEASES = "releases"

Floats = NDArray[np.float64]


class Releases:
    """The noised sums of a run folder, by name."""

    def __init__(self, folder: Path, job: Job) -> None:
        self._folder, self._job = folder / RELEASES, job

    def noised(self, name: str, deviation: float, ask: Callable[[], Mapping[str, Floats]]) -> NoisedSum:
        """The noised sum of that name: the stored one, else of the sites' sums that `ask` gets, stored before it is
        returned.

        `deviation` is the noise multiplier times the sensitivity to one patient. Raises what `ask` raises,
        `RunFolderError` where it can't be stored, `ResumeError` where the stored one can't be read.
        """
        path = self._folder / f"{name}.json"
        if path.is_file():
            return _read(path)
        made = noised_sum(ask(), self._job, deviation, server_noise(self._job, name))
        text = json.dumps({"values": made.values.tolist(), "deviation": made.deviation})
        try:
            path.parent.mkdir(exist_ok=True)
            write_whole(path, text + "\n", sync=True)
        except OSError as error:
            raise RunFolderError(
                f"{path}: the noised aggregate can't be stored",
                why=cause(error),
                fix="free space, then resume the run; nothing was made of it",
            ) from error
        return made


def _read(path: Path) -> NoisedSum:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return NoisedSum(np.asarray(stored["values"], np.float64), float(stored["deviation"]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{path}: the stored aggregate can't be read",
            why="drawing its noise anew would be a second release that nobody has paid for",
            fix="restore the file from a copy, or start the run anew in another folder",
        ) from error
