"""Figures of a bridge on test patients under a private mechanism: what a site may send, and what can be said of it.

Each patient contributes three confusion tables (bridge and teacher against the labels, bridge against the teacher),
each divided by the patient's windows, so that all patients count equally however long they were recorded. Stacked,
they have an L2 norm of at most one: a patient whose tables are concentrated is scaled down to it. The sum over
patients is noised.

Unit: the patient, of a cohort of its own. Adding or removing one moves the sum by at most `SENSITIVITY`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from bridge.job_privacy import PrivateMetrics
from bridge.metrics import confusion_matrix

Floats = NDArray[np.float64]

SENSITIVITY = 1.0
"""L2 norm by which one patient, added or removed, moves a site's sum at most."""

KINDS: tuple[Literal["bridge", "teacher", "agreement"], ...] = ("bridge", "teacher", "agreement")
"""Order of the stacked tables."""

INTERVAL = 0.95


def metrics_deviation(plan: PrivateMetrics) -> float:
    """Standard deviation of the noise of one sum, by a plan whose noise multiplier is known; raises `ValueError` where
    it is not: nothing leaves without noise by mistake."""
    if plan.noise_multiplier is None:
        raise ValueError("the plan has no noise_multiplier")
    return plan.noise_multiplier * SENSITIVITY


def patient_tables(labels: NDArray[Any], teacher: NDArray[Any], predicted: NDArray[Any], classes: int) -> Floats:
    """One patient's stacked tables `(3, classes, classes)`, L2 norm at most one; rows are labels (the teacher's
    classes for the agreement).

    `labels`, `teacher` and `predicted` are `(windows,)` classes. Windows without a label (-1) count for the agreement
    alone, but for the divisor of all three. Zeros for no window.
    """
    if not len(labels):
        return np.zeros((len(KINDS), classes, classes))
    pairs = ((labels, predicted), (labels, teacher), (teacher, predicted))
    shares = np.stack([confusion_matrix(truth, guess, classes) for truth, guess in pairs]) / len(labels)
    return np.asarray(shares / max(1.0, float(np.linalg.norm(shares))), dtype=np.float64)


def noise_interval(
    tables: Floats,
    deviation: float,
    figure: Callable[[Floats], NDArray[np.float64]],
    seed: int,
    samples: int = 2000,
) -> tuple[float, float] | None:
    """95 % interval of a figure of noised tables, from the known noise and the unknown patients.

    `tables (classes, classes)` is one noised sum as released, negative cells and all; `deviation` the standard
    deviation of its noise in each cell; `figure` takes `(samples, classes, classes)` to `(samples,)` in [0, 1]. A
    parametric Monte Carlo: each cell is drawn anew as often as a Poisson count of the released size would vary, and the
    noise once more on top. Cells stay negative where they come out so, since clamping each would pull every figure
    towards chance; the figures are clamped to [0, 1].

    It assumes that a sum of S comes from S independent patients of one cell each. A patient's windows are spread over
    cells, so this overstates how patients vary. None where the figure is defined in no sample. It reads released
    numbers alone, so it costs nothing.
    """
    rng = np.random.default_rng(seed)
    released = tables.ravel()
    size = released.clip(min=0.0)
    varied = rng.standard_gamma(size, size=(samples, size.size)) - size
    noise = deviation * rng.standard_normal((samples, size.size))
    values = figure((released + varied + noise).reshape(samples, *tables.shape))
    values = values[np.isfinite(values)].clip(0.0, 1.0)
    if not len(values):
        return None
    tail = 100 * (1 - INTERVAL) / 2
    low, high = np.percentile(values, [tail, 100 - tail])
    return float(low), float(high)
