"""What a site says about positions: bounded scores, or additive moments where its policy permits them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bridge.job import Job

if TYPE_CHECKING:
    from client.features import FeatureSet
    from client.session import Deadline

SELECTION_KEY = "fedbridge.selection/1"
"""Public and the same for ever: a patient keeps fold and windows in every job and at every number of sites."""


def probe_item(features: FeatureSet, job: Job, positions: int, classes: int, deadline: Deadline) -> tuple[str, Any]:
    """Name and value of the answer to `query.probe`: `probe_scores (positions_new,)`, or the flat `probe_moments`.

    Both look at no more than `selection.windows_per_patient` windows a patient. Moments are of features that were
    projected where they are wider than `selection.width_limit`; scores never grow with the width, and take them whole.
    """
    from bridge.probe import probe_moments, probe_scores
    from bridge.projection import projected

    rows = selection_rows(features, job)
    outputs = at_each_position(features.new_output, positions, rows, deadline)
    moments = job.selection.mode == "moments"
    if moments:
        limit = job.selection.width_limit
        outputs = [projected(each, position, job.seed, limit) for position, each in enumerate(outputs)]
    statistic = probe_moments if moments else probe_scores
    value = statistic(
        outputs,
        features.pseudo_labels[rows],
        features.table.patients[rows],
        classes,
        job.selection.folds,
        SELECTION_KEY,
    )
    return ("probe_moments" if moments else "probe_scores"), value


def similarity_item(features: FeatureSet, job: Job, m: int, positions: int, deadline: Deadline) -> tuple[str, Any]:
    """Name and value of the answer to `query.similarity` for the chosen `m`: `similarity_scores (positions_old,)`, or
    `similarity_moments (positions_old, 3)`."""
    from bridge.cka import similarity_moments, similarity_scores

    rows = selection_rows(features, job)
    inputs = at_each_position(features.old_input, positions, rows, deadline)
    moments = job.selection.mode == "moments"
    statistic = similarity_moments if moments else similarity_scores
    return ("similarity_moments" if moments else "similarity_scores"), statistic(features.new_output(m)[rows], inputs)


def at_each_position(
    pooled: Callable[[int], NDArray[np.float32]], positions: int, rows: NDArray[np.int64], deadline: Deadline
) -> list[NDArray[np.float32]]:
    """The rows' features at every position, `(rows, width)` each, as long as there is time."""
    found = []
    for position in range(positions):
        found.append(pooled(position)[rows])
        deadline.check()
    return found


def selection_rows(features: FeatureSet, job: Job) -> NDArray[np.int64]:
    """The windows that a statistic may look at: at most `windows_per_patient` of each patient."""
    from bridge.selection import cap_windows

    return cap_windows(features.table.patients, job.selection.windows_per_patient, SELECTION_KEY)
