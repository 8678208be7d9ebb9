from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from bridge.messages import ReasonCode
from bridge.projection import projection
from client.features import features
from client.site import open_site
from client.statistics import SELECTION_KEY, selection_rows
from tests.client.sites import Small, ask, build_job, build_site


def fold(patient: str, folds: int) -> int:
    """A patient's fold as docs/reference/messages.md has it."""
    text = json.dumps([SELECTION_KEY, "fold", patient], separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % folds


def array(small: Small, kind: str, item: str, config: dict[str, int], mode: str) -> NDArray[np.float64]:
    reply = ask(small.site, build_job(small.models, selection={"mode": mode}), kind, config)
    assert set(reply.content) == {"arrays"}
    assert list(reply.content["arrays"]) == [item]
    value: NDArray[np.float64] = reply.content["arrays"][item].numpy()
    return value


def test_no_patient_enters_with_more_windows_than_the_job_allows(small: Small) -> None:
    found = features(open_site(small.site), "pair")
    kept = found.table.patients[selection_rows(found, build_job(small.models))]
    assert set(np.unique(found.table.patients, return_counts=True)[1]) == {12}
    assert set(np.unique(kept, return_counts=True)[1]) == {6}
    assert set(kept) == set(found.table.patients)


def test_probe_scores_are_one_bounded_score_a_position(small: Small) -> None:
    scores = array(small, "query.probe", "probe_scores", {}, "scores")
    assert scores.shape == (4,)
    assert ((scores > 0.6) & (scores <= 1)).all()


def test_probe_moments_are_the_sums_over_the_capped_windows(small: Small) -> None:
    found = features(open_site(small.site), "pair")
    rows = selection_rows(found, build_job(small.models))
    which = np.array([fold(str(patient), 3) for patient in found.table.patients[rows]])
    expected = []
    for position in range(4):
        x = np.c_[found.new_output(position)[rows].astype(np.float64), np.ones(len(rows))]
        y = np.stack([found.pseudo_labels[rows] == c for c in range(2)], axis=1).astype(float)
        for f in range(3):
            gram = sum((np.outer(v, v) for v in x[which == f]), np.zeros((17, 17)))
            expected += [gram[i, j] for i in range(17) for j in range(i, 17)]
            expected += list((x[which == f].T @ y[which == f]).ravel())
    sent = array(small, "query.probe", "probe_moments", {}, "moments")
    np.testing.assert_allclose(sent, expected, rtol=1e-9, atol=1e-9)


def test_wide_features_are_projected_before_their_moments_and_nowhere_else(small: Small) -> None:
    found = features(open_site(small.site), "pair")
    asked = {"mode": "moments", "width_limit": 5}
    rows = selection_rows(found, build_job(small.models))
    reply = ask(small.site, build_job(small.models, selection=asked, seed=9), "query.probe", {})
    sent = reply.content["arrays"]["probe_moments"].numpy()
    assert sent.shape == (4 * 3 * (6 * 7 // 2 + 6 * 2),)
    which = np.array([fold(str(patient), 3) for patient in found.table.patients[rows]])
    for position, part in enumerate(np.split(sent, 4)):
        signs = np.sign(projection(9, position, 16, 5)) / np.sqrt(5)
        x = found.new_output(position)[rows].astype(np.float64) @ signs
        for f, numbers in enumerate(np.split(part, 3)):
            own = np.c_[x[which == f], np.ones((which == f).sum())]
            np.testing.assert_allclose(numbers[:21], (own.T @ own)[np.triu_indices(6)], rtol=1e-9, atol=1e-9)
    for kind, mode, item, config in (
        ("query.probe", "scores", "probe_scores", {}),
        ("query.similarity", "moments", "similarity_moments", {"input-position": 3}),
    ):
        whole = array(small, kind, item, config, mode)
        limited = ask(small.site, build_job(small.models, selection={"mode": mode, "width_limit": 5}), kind, config)
        assert np.array_equal(limited.content["arrays"][item].numpy(), whole)


def test_similarity_moments_give_the_scores(small: Small) -> None:
    scores = array(small, "query.similarity", "similarity_scores", {"input-position": 3}, "scores")
    moments = array(small, "query.similarity", "similarity_moments", {"input-position": 3}, "moments")
    assert moments.shape == (3, 3)
    ratio = moments[:, 0] / np.sqrt(moments[:, 1] * moments[:, 2])
    np.testing.assert_allclose(scores, ratio.clip(-1, 1), rtol=1e-9)
    assert scores.max() > 0.3


def test_moments_stay_where_the_policy_does_not_list_them(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, seed=4)
    job = build_job(small.models, selection={"mode": "moments"})
    for kind, config in (("query.probe", {}), ("query.similarity", {"input-position": 0})):
        reply = ask(site, job, kind, config)
        assert reply.error.code == ReasonCode.POLICY_FORBIDS


@pytest.mark.parametrize(("kind", "config"), [("query.probe", {}), ("query.similarity", {"input-position": 2})])
def test_a_job_of_fixed_positions_gets_no_statistics(small: Small, kind: str, config: dict[str, int]) -> None:
    job = build_job(small.models, selection={"mode": "fixed", "input_position": 2, "output_position": 1})
    assert ask(small.site, job, kind, config).error.code == ReasonCode.MESSAGE_INVALID
