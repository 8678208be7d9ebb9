"""Sums of a real site under a private mechanism: against plain computation, and between neighbours, down to nobody."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bridge.chain import InferenceChain
from bridge.encoders.loading import load_encoder
from bridge.head import load_head
from bridge.job import Job
from bridge.metrics import confusion_matrix
from bridge.privacy.noise import NoiseSource
from bridge.privacy.selection import sensitivity
from bridge.probe import probe_scores
from bridge.prototype import PrototypeBridge
from bridge.shape import BridgeShape
from client.errors import NoWindowsError
from client.features import FeatureSet, features
from client.private_evaluation import confusion_sums
from client.private_statistics import probe_sums, similarity_sums
from client.session import Deadline
from client.site import open_site
from client.statistics import SELECTION_KEY, selection_rows
from tests.bridge.reference import hashed
from tests.client.sites import Small, build_job, build_site, start_arrays

POSITIONS_NEW, POSITIONS_OLD, CLASSES = 4, 3, 2
GROUPS, CLIP, Z = 2, 0.1, 1.7
FOREVER = Deadline(np.inf)


def private_job(models: Path, mechanism: str = "central", **changes: Any) -> Job:
    selection = {"groups": GROUPS, "clip": CLIP, "noise_multiplier": Z}
    privacy = {"mechanism": mechanism, "selection": selection, "metrics": {"noise_multiplier": Z}}
    train = {"local_steps": 1} if mechanism == "central" else {}
    return build_job(models, privacy=privacy, train=train, **changes)


def cohort(folder: Path, small: Small, patients: list[str]) -> FeatureSet | None:
    """The features of a site whose pairs, and test patients, are these."""
    splits = {"pair": patients, "validation": [], "test": []}
    site = build_site(folder, "gamma", models=small.models, seed=8, patients=10, changes={"splits": splits})
    try:
        return features(open_site(site), "pair")
    except NoWindowsError:
        return None


@pytest.fixture(scope="module")
def shrinking(small: Small, tmp_path_factory: pytest.TempPathFactory) -> list[FeatureSet | None]:
    """The same site with 8 patients, then one less each time (the first), until nobody is left."""
    folder = tmp_path_factory.mktemp("shrinking")
    names = [f"gamma-p{i:02d}" for i in range(8)]
    return [cohort(folder / f"s{len(names) - i}", small, names[i:]) for i in range(9)]


def group_of(patient: str) -> int:
    return hashed(f"{SELECTION_KEY}/groups", "fold", patient) % GROUPS


def bridge_chain(small: Small) -> InferenceChain:
    rng = np.random.default_rng(8)
    start = start_arrays()
    arrays = {name: rng.normal(size=value.shape).astype(np.float32) for name, value in start.items()}
    (width_new, rank), (prototypes, width_old) = start["A"].shape, start["P"].shape
    bridge = PrototypeBridge(BridgeShape(width_new, rank, start["B"].shape[1] // prototypes, prototypes, width_old))
    bridge.load_arrays(arrays)
    old, new = load_encoder(small.models / "old_encoder"), load_encoder(small.models / "new_encoder")
    return InferenceChain(new, bridge, old, load_head(small.models / "task_head"), 2, 1)


def test_probe_sums_are_those_of_the_groups_on_capped_windows(small: Small, shrinking: list[FeatureSet | None]) -> None:
    job, found = private_job(small.models), shrinking[0]
    assert found is not None
    rows = selection_rows(found, job)
    patients = found.table.patients[rows]
    assert max(np.unique(patients, return_counts=True)[1]) == 6
    group = np.array([group_of(str(p)) for p in patients])
    expected = np.zeros(POSITIONS_NEW)
    for g in range(GROUPS):
        own = rows[group == g]
        if len(set(found.table.patients[own])) < 2:
            continue
        x = [found.new_output(i)[own] for i in range(POSITIONS_NEW)]
        scores = probe_scores(x, found.pseudo_labels[own], found.table.patients[own], CLASSES, 3, SELECTION_KEY)
        centred = scores - scores.mean()
        expected += centred * min(1.0, CLIP / max(1e-300, np.linalg.norm(centred)))
    sent = probe_sums(found, job, POSITIONS_NEW, CLASSES, FOREVER, None)
    assert np.linalg.norm(expected) > 0
    np.testing.assert_allclose(sent, expected, atol=1e-12)
    assert sent.dtype == np.float64


def test_one_patient_less_moves_every_sum_by_at_most_its_bound_down_to_nobody(
    small: Small, shrinking: list[FeatureSet | None]
) -> None:
    job, chain = private_job(small.models), bridge_chain(small)
    assert shrinking[-1] is None
    sent: list[dict[str, NDArray[np.float64]]] = [
        {
            "probe": probe_sums(each, job, POSITIONS_NEW, CLASSES, FOREVER, None),
            "similarity": similarity_sums(each, job, 2, POSITIONS_OLD, FOREVER, None),
            "confusion": confusion_sums(each, chain, CLASSES, None, Z),
        }
        for each in shrinking
    ]
    bounds = {"probe": sensitivity(CLIP), "similarity": sensitivity(CLIP), "confusion": 1.0}
    for name, bound in bounds.items():
        assert {item[name].shape for item in sent} == {sent[0][name].shape}
        assert not sent[-1][name].any()
        assert np.linalg.norm(sent[0][name]) > 0
        steps = [np.linalg.norm(a[name] - b[name]) for a, b in itertools.pairwise(sent)]
        assert max(steps) <= bound * (1 + 1e-9)


@pytest.mark.parametrize("nobody", [True, False])
def test_local_noise_has_the_claimed_deviation_whoever_is_there(
    small: Small, shrinking: list[FeatureSet | None], nobody: bool
) -> None:
    job, chain = private_job(small.models, "local"), bridge_chain(small)
    found = shrinking[-1 if nobody else 0]
    claimed = {"probe": Z * 2 * CLIP, "similarity": Z * 2 * CLIP, "confusion": Z}
    plain = {
        "probe": probe_sums(found, job, POSITIONS_NEW, CLASSES, FOREVER, None),
        "similarity": similarity_sums(found, job, 2, POSITIONS_OLD, FOREVER, None),
        "confusion": confusion_sums(found, chain, CLASSES, None, Z),
    }
    for name, deviation in claimed.items():
        source = NoiseSource.seeded(5, name)
        if name == "probe":
            sent = probe_sums(found, job, POSITIONS_NEW, CLASSES, FOREVER, source)
        elif name == "similarity":
            sent = similarity_sums(found, job, 2, POSITIONS_OLD, FOREVER, source)
        else:
            sent = confusion_sums(found, chain, CLASSES, source, Z)
        expected = NoiseSource.seeded(5, name).normal(plain[name].shape, deviation)
        np.testing.assert_allclose(sent - plain[name], expected, atol=1e-12)


def test_confusion_sums_are_each_patient_s_shares(small: Small, shrinking: list[FeatureSet | None]) -> None:
    found, chain = shrinking[0], bridge_chain(small)
    assert found is not None
    predicted = chain.logits_from_features(found.new_output(2)).argmax(dim=-1).numpy()
    labels, teacher = found.table.labels, found.pseudo_labels
    expected = np.zeros((3, CLASSES, CLASSES))
    for patient in np.unique(found.table.patients):
        own = found.table.patients == patient
        assert own.sum() == 12
        pairs = ((labels, predicted), (labels, teacher), (teacher, predicted))
        tables = np.array([confusion_matrix(a[own], b[own], CLASSES) for a, b in pairs]) / 12
        expected += tables / max(1.0, np.linalg.norm(tables))
    np.testing.assert_allclose(confusion_sums(found, chain, CLASSES, None, Z), expected, atol=1e-12)


@pytest.mark.parametrize("wrong", ["nan", "error"])
def test_a_patient_that_can_t_be_classified_counts_as_zero(
    small: Small, shrinking: list[FeatureSet | None], wrong: str
) -> None:
    class Failing:
        """A chain that can't do one patient's windows."""

        def __init__(self, chain: InferenceChain, windows: NDArray[np.float32]) -> None:
            self.m, self._chain, self._windows = chain.m, chain, windows

        def logits_from_features(self, h: NDArray[np.float32]) -> Any:
            logits = self._chain.logits_from_features(h)
            if h.shape == self._windows.shape and (h == self._windows).all():
                if wrong == "error":
                    raise RuntimeError
                logits[3] = np.nan
            return logits

    found, chain, rest = shrinking[0], bridge_chain(small), shrinking[1]
    assert found is not None
    # Patient 00 is the one that the next smaller site lacks.
    own = found.new_output(2)[found.table.patients == "gamma-p00"]
    sent = confusion_sums(found, Failing(chain, own), CLASSES, None, Z)  # type: ignore[arg-type]
    np.testing.assert_array_equal(sent, confusion_sums(rest, chain, CLASSES, None, Z))
