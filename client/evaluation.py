"""Confusion counts of a split: what the policy permits of what exists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bridge.job import EvaluationSplit
from bridge.messages import CONFUSION_ITEMS, ReasonCode
from client.errors import NoWindowsError, PolicyError
from client.policy import Policy

if TYPE_CHECKING:
    from bridge.chain import InferenceChain
    from client.features import FeatureSet
    from client.session import Session

Confusions = dict[str, NDArray[np.int64]]


def permitted_confusions(policy: Policy) -> tuple[str, ...]:
    """The confusion items that may leave; raises `PolicyError` (POLICY_FORBIDS) where none may. Touches no data."""
    names = tuple(name for name in CONFUSION_ITEMS if policy.permits(name))
    if not names:
        policy.demand(CONFUSION_ITEMS[0])
    return names


def group_features(session: Session, split: EvaluationSplit) -> FeatureSet:
    """The features of the validation or test patients, if they are `minimum_group` or more.

    Raises `PolicyError` (GROUP_TOO_SMALL), also where the split has no usable window at all.
    """
    try:
        features = session.features(split)
        patients = len(np.unique(features.table.patients))
    except NoWindowsError:
        patients = 0
    if patients < session.policy.minimum_group:
        raise _too_small(f"the {split} split", patients, session.policy)
    return features


def confusions(
    features: FeatureSet, chain: InferenceChain, classes: int, policy: Policy, names: tuple[str, ...]
) -> Confusions:
    """Counts `(classes, classes)`, int64, of each named item that exists; rows are labels (pseudo-labels for
    agreement).

    Windows without a label count for the agreement alone. Where labels exist for fewer than `minimum_group` patients,
    the items that need them are left out; raises `PolicyError` (GROUP_TOO_SMALL) where nothing remains.
    """
    from bridge.metrics import confusion_matrix

    predicted = chain.logits_from_features(features.new_output(chain.m)).argmax(dim=-1).numpy()
    teacher = np.asarray(features.pseudo_labels, dtype=np.int64)
    labels = np.asarray(features.table.labels, dtype=np.int64)
    known = labels >= 0
    labelled_patients = len(np.unique(features.table.patients[known]))
    found: Confusions = {}
    if "confusion.agreement" in names:
        found["confusion.agreement"] = confusion_matrix(teacher, predicted, classes)
    if labelled_patients >= policy.minimum_group:
        for name, guess in (("confusion.bridge", predicted), ("confusion.teacher", teacher)):
            if name in names:
                found[name] = confusion_matrix(labels[known], guess[known], classes)
    if not found:
        raise _too_small("the labelled part of the split", labelled_patients, policy)
    return found


def _too_small(what: str, patients: int, policy: Policy) -> PolicyError:
    return PolicyError(
        ReasonCode.GROUP_TOO_SMALL,
        f"{what} has {patients} patients with usable windows",
        why=f"the policy's minimum_group is {policy.minimum_group}",
        fix="no metric of so small a group leaves; enlarge the split or lower minimum_group",
    )
