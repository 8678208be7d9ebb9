"""What a site says about positions under a private mechanism: sums over groups of its patients, bounded by patient.

The same shape leaves whether a site has patients or not. Under `local` the sum leaves with the site's own noise; under
`central` it leaves as it is, and the server adds the noise before it does anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bridge.job import Job
from client.statistics import SELECTION_KEY, at_each_position, selection_rows

if TYPE_CHECKING:
    from bridge.privacy.noise import NoiseSource
    from client.features import FeatureSet
    from client.session import Deadline

Floats = NDArray[np.float64]


def probe_sums(
    features: FeatureSet | None,
    job: Job,
    positions: int,
    classes: int,
    deadline: Deadline,
    noise: NoiseSource | None,
) -> Floats:
    """`probe_sums (positions,)` in answer to `query.probe`; `features` is None where no patient can be used.

    Looks at no more than `selection.windows_per_patient` windows a patient. Sensitivity to one patient: 2R with
    R = `privacy.selection.clip`; `noise` adds `noise_multiplier` times as much, None adds nothing.
    """
    from bridge.privacy.selection import probe_group_sums

    total = np.zeros(positions)
    if features is not None:
        rows = selection_rows(features, job)
        total = probe_group_sums(
            at_each_position(features.new_output, positions, rows, deadline),
            features.pseudo_labels[rows],
            features.table.patients[rows],
            classes=classes,
            folds=job.selection.folds,
            groups=job.privacy.selection.groups,
            clip=job.privacy.selection.clip,
            key=SELECTION_KEY,
        )
    return _noised(total, job, noise)


def similarity_sums(
    features: FeatureSet | None, job: Job, m: int, positions: int, deadline: Deadline, noise: NoiseSource | None
) -> Floats:
    """`similarity_sums (positions,)` in answer to `query.similarity` for the chosen `m`; bounded and noised as
    `probe_sums`."""
    from bridge.privacy.selection import similarity_group_sums

    total = np.zeros(positions)
    if features is not None:
        rows = selection_rows(features, job)
        total = similarity_group_sums(
            features.new_output(m)[rows],
            at_each_position(features.old_input, positions, rows, deadline),
            features.table.patients[rows],
            groups=job.privacy.selection.groups,
            clip=job.privacy.selection.clip,
            key=SELECTION_KEY,
        )
    return _noised(total, job, noise)


def _noised(total: Floats, job: Job, noise: NoiseSource | None) -> Floats:
    if noise is None:
        return total
    from bridge.privacy.selection import noise_deviation

    return total + noise.normal(total.shape, noise_deviation(job.privacy.selection))
