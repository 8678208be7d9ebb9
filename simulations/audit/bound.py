"""What guesses about canaries prove of epsilon: one-run auditing (Steinke, Nasr and Jagielski 2023, arXiv:2305.08846).

Each of m canaries is put in or left out by its own fair coin. After ONE run, a guesser says of r of them whether they
were in, and is right v times. If the mechanism is (epsilon, delta)-DP with regard to a canary, then (theorem 5.2)

    P[right >= v]  <=  P[Binomial(r, q) >= v] + 2 m delta max_i ( P[v - i <= Binomial(r, q) < v] / i ),

q = e^epsilon / (1 + e^epsilon). The largest epsilon at which the right side is at most 1 - confidence is refuted, and
all smaller ones with it. The number r of guesses must be fixed before the scores are seen.
"""

from __future__ import annotations

from math import exp

import numpy as np
from numpy.typing import NDArray

_STEPS = 40


def p_value(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The bound above: the chance, at most, of so many correct guesses under an (epsilon, delta)-DP mechanism."""
    from scipy.stats import binom

    if not 0 <= correct <= guesses <= canaries:
        raise ValueError(f"{correct} correct of {guesses} guesses about {canaries} canaries")
    q = 1.0 / (1.0 + exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, q))
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, q))
    worst = float(np.max(below / np.arange(1, correct + 1))) if correct else 0.0
    return min(1.0, tail + 2.0 * canaries * delta * worst)


def lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The largest epsilon, rounded down by less than 1e-6, that so many correct guesses refute; 0 where they refute
    none."""
    level = 1.0 - confidence
    low, high = 0.0, 1.0
    if p_value(canaries, guesses, correct, low, delta) > level:
        return 0.0
    while p_value(canaries, guesses, correct, high, delta) <= level:
        low, high = high, 2 * high
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if p_value(canaries, guesses, correct, middle, delta) <= level:
            low = middle
        else:
            high = middle
    return low


def correct_guesses(scores: NDArray[np.float64], inserted: NDArray[np.bool_], guesses: int) -> int:
    """How many guesses are right when the `guesses / 2` highest scores are said to be in, as many lowest to be out."""
    order = np.argsort(scores, kind="stable")
    half = guesses // 2
    return int(inserted[order[len(order) - half :]].sum() + (~inserted[order[:half]]).sum())
