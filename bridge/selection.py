"""Rules that both stages of position selection share: who is in which fold, which windows count, which position wins.

Stage 1 (`bridge.probe`) chooses the input position `m` of the new encoder, stage 2 (`bridge.cka`) the output position
`l` of the old one (BioX-Bridge, section 3). Folds and windows depend on public keys and patient ids, never on the
order or the number of sites, so that sites agree on them without a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bridge.errors import SelectionError
from bridge.hashing import keyed_hash


def fold_of(patient: str, folds: int, key: str) -> int:
    """The fold of a patient, `0 .. folds - 1`: a keyed hash of the id, the same wherever it is computed."""
    return keyed_hash(key, "fold", patient) % folds


def cap_windows(patients: NDArray[Any], w: int, key: str) -> NDArray[np.int64]:
    """Rows of at most `w` windows a patient, ascending.

    From a patient with more windows every (n/w)-th is taken, from a start that the key and the patient's id give:
    evenly over the recording, since neighbouring windows overlap. A patient's choice depends on its own rows alone.
    """
    rows: list[NDArray[np.int64]] = []
    for patient in np.unique(patients):
        own = np.flatnonzero(patients == patient).astype(np.int64)
        if len(own) > w:
            start = keyed_hash(key, "windows", str(patient)) / 2.0**64
            own = own[np.floor((np.arange(w) + start) * len(own) / w).astype(np.int64).clip(max=len(own) - 1)]
        rows.append(own)
    return np.sort(np.concatenate(rows)) if rows else np.empty(0, dtype=np.int64)


def choose_position(scores: Sequence[float] | NDArray[np.float64]) -> int:
    """The position with the highest score; of equal ones the lowest. Raises `SelectionError` on none or NaN."""
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or values.size == 0 or not np.isfinite(values).all():
        raise SelectionError(
            "no position can be chosen",
            why=f"{values.size} scores, {int((~np.isfinite(values)).sum())} of them not finite",
            fix="look for the site whose statistics are not numbers, or fix the positions in the job",
        )
    return int(values.argmax())
