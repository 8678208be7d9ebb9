"""What is told of a case."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

TOLERANCE = 1e-4
"""Largest error that is agreement, in standard deviations of the reference array."""


@dataclass(frozen=True)
class CaseResult:
    """One case. Errors are in standard deviations of the reference array; None is what the case does not have."""

    name: str
    model: str = ""
    weights: Literal["as stated", "no digest stated"] | None = None
    """Whether the weights made here are, by digest, those that the originals had."""
    front: float | None = None
    """Largest error of all that follows from the input."""
    middle: float | None = None
    """Largest error of all that follows from tokens written into the middle."""
    preprocessing: float | None = None
    """Largest error of the model's input made from a raw signal."""
    worst: str = ""
    """The array with the largest error."""
    arrays: int = 0
    """How many arrays were compared."""
    positions: int | None = None
    parameters: int | None = None
    seconds_a_window: float | None = None
    """Of one pass through the whole network (preprocessing: of the whole recording), divided by the windows."""
    seconds: float = 0.0
    """Of the case's process, imports and the making of weights included."""
    peak_bytes: int = 0
    """The most memory that the case's process held."""
    error: str = ""
    """Why it could not be run."""

    @property
    def largest(self) -> float:
        """The largest of the errors; infinite where there is none."""
        found = [error for error in (self.front, self.middle, self.preprocessing) if error is not None]
        return max(found, default=math.inf)

    @property
    def passed(self) -> bool:
        """Whether it was run and everything is within the tolerance."""
        return not self.error and self.largest <= TOLERANCE


def to_json(results: Sequence[CaseResult]) -> str:
    """All results, and whether all agree."""
    cases = [{**_finite(asdict(result)), "passed": result.passed} for result in results]
    agree = all(result.passed for result in results)
    return json.dumps({"tolerance": TOLERANCE, "passed": agree, "cases": cases}, indent=2, allow_nan=False)


def in_words(result: CaseResult) -> str:
    """A line."""
    if result.error:
        return f"CAN'T BE RUN: {' '.join(result.error.split())}"
    named = (("front", result.front), ("middle", result.middle), ("preprocessing", result.preprocessing))
    errors = ", ".join(f"{name} {error:.1e}" for name, error in named if error is not None)
    verdict = "agrees" if result.passed else f"BEYOND {TOLERANCE:g} in {result.worst}"
    weights = f"weights {result.weights}, " if result.weights else ""
    window = "" if result.seconds_a_window is None else f", {result.seconds_a_window:.3g} s a window"
    cost = f"{result.seconds:.1f} s, {result.peak_bytes / 2**20:,.0f} MiB"
    return f"{verdict}: {weights}{errors} ({result.arrays} arrays){window}; {cost}"


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinity: an error that is no number is told as a text."""
    return {
        key: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in facts.items()
    }
