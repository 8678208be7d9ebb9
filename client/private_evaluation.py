"""Confusion tables of a split under a private mechanism: a sum over patients, each bounded."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bridge.privacy.metrics import KINDS, SENSITIVITY, patient_tables

if TYPE_CHECKING:
    from bridge.chain import InferenceChain
    from bridge.privacy.noise import NoiseSource
    from client.features import FeatureSet

Floats = NDArray[np.float64]


def confusion_sums(
    features: FeatureSet | None, chain: InferenceChain, classes: int, noise: NoiseSource | None, z: float
) -> Floats:
    """`confusion_sums (3, classes, classes)`, in the order of `bridge.privacy.metrics.KINDS`.

    `features` is None where the split has no usable patient. Sensitivity to one patient: `SENSITIVITY`; `noise` adds
    `z` times as much, None adds nothing. A patient whose windows can't be classified counts as zero.
    """
    total = np.zeros((len(KINDS), classes, classes))
    if features is not None:
        for patient in np.unique(features.table.patients):
            total += _contribution(features, np.flatnonzero(features.table.patients == patient), chain, classes)
    return total if noise is None else total + noise.normal(total.shape, z * SENSITIVITY)


def _contribution(features: FeatureSet, rows: NDArray[np.intp], chain: InferenceChain, classes: int) -> Floats:
    """One patient's tables, from its own windows alone: the networks never see it beside another."""
    nothing = np.zeros((len(KINDS), classes, classes))
    try:
        logits = chain.logits_from_features(features.new_output(chain.m)[rows]).numpy()
        teacher = features.teacher_logits[rows]
        if not (np.isfinite(logits).all() and np.isfinite(teacher).all()):
            return nothing
        return patient_tables(features.table.labels[rows], teacher.argmax(axis=1), logits.argmax(axis=1), classes)
    except Exception:
        return nothing
