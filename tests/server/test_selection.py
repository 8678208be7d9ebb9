"""Positions from the sites' statistics, in the three modes, at the wire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error

from bridge.cka import similarity_moments
from bridge.errors import PositionError, SelectionError
from bridge.messages import moments_length
from bridge.probe import probe_moments
from bridge.projection import projected
from server.errors import RunError
from server.moments import check_probe_moments, check_similarity_moments
from server.record import SelectionRecord, read_record
from tests.bridge.reference import block_cka, ridge_score
from tests.server.conftest import Models
from tests.server.wire import CLASSES, POSITIONS_NEW, POSITIONS_OLD, Site, WireGrid, arrays_of, rng, run_server

NAMES = ("alpha", "beta", "gamma")
SITES = {"minimum": 2, "wait_seconds": 5, "timeout_seconds": 5, "retries": 0, "expected": NAMES}
SCORES = {
    "alpha": ([0.9, 0.1, 0.2], [0.1, 0.2, -0.3, 0.9]),
    "beta": ([0.1, 0.5, 0.4], [0.1, 0.5, 0.3, 0.0]),
    "gamma": ([0.2, 0.6, 0.7], [-0.2, 0.5, 0.3, 0.0]),
}


def run(models: Models, folder: Path, members: list[Site], **job: Any) -> SelectionRecord:
    changes = {"sites": SITES, "train": {"rounds": 1}, "evaluate": {"final": False}, **job}
    run_server(WireGrid(members, shuffle=3), folder, models.folder, models.job(**changes))
    record = read_record(folder)
    assert record.selection is not None
    return record.selection


def members_with_scores() -> list[Site]:
    return [
        Site(name, probe=list(SCORES[name][0]), similarity=list(SCORES[name][1])) for name in ("gamma", "alpha", "beta")
    ]


def test_scores_are_averaged(models: Models, tmp_path: Path) -> None:
    found = run(models, tmp_path, members_with_scores())
    assert found.probe_scores is not None
    assert found.similarity_scores is not None
    for stage, column in ((found.probe_scores, 0), (found.similarity_scores, 1)):
        wanted = [sum(SCORES[name][column][i] for name in NAMES) / 3 for i in range(len(SCORES["alpha"][column]))]
        assert stage.aggregate == pytest.approx(wanted, abs=1e-12)
        assert stage.per_site == {name: SCORES[name][column] for name in NAMES}
    assert (found.mode, found.input_position, found.output_position) == ("scores", 2, 1)


def test_public_weights_can_change_the_choice(models: Models, tmp_path: Path) -> None:
    weights = {"alpha": 1.0, "beta": 0.1, "gamma": 0.1}
    members = members_with_scores()
    for site in members:
        site.weight = weights[site.name]
    found = run(models, tmp_path, members, sites={**SITES, "weights": weights})
    assert (found.input_position, found.output_position) == (0, 3)
    assert found.probe_scores is not None
    assert found.probe_scores.aggregate[0] == pytest.approx((0.9 + 0.01 + 0.02) / 1.2)


def test_equal_scores_choose_the_first(models: Models, tmp_path: Path) -> None:
    members = [Site(name, probe=[0.3, 0.5, 0.5], similarity=[0.0, 0.0, 0.0, 0.0]) for name in NAMES]
    found = run(models, tmp_path, members)
    assert (found.input_position, found.output_position) == (1, 0)


def test_fixed_positions_ask_nobody(models: Models, tmp_path: Path) -> None:
    members = [Site(name) for name in NAMES]
    fixed = {"mode": "fixed", "input_position": 2, "output_position": 3}
    found = run(models, tmp_path, members, selection=fixed)
    assert (found.input_position, found.output_position, found.probe_scores) == (2, 3, None)
    assert [kind for kind, _ in members[0].seen] == ["query.describe", "train"]
    assert members[0].seen[1][1] == {"round": 1, "input-position": 2, "output-position": 3}


@pytest.mark.parametrize(("m", "l"), [(POSITIONS_NEW, 0), (0, POSITIONS_OLD)])
def test_fixed_positions_must_exist(models: Models, tmp_path: Path, m: int, l: int) -> None:  # noqa: E741
    fixed = {"mode": "fixed", "input_position": m, "output_position": l}
    with pytest.raises(PositionError, match="is not one of this"):
        run(models, tmp_path, [Site(name) for name in NAMES], selection=fixed)
    assert read_record(tmp_path).status == "failed"


def raw_site(name: str, windows: int) -> dict[str, Any]:
    """Unequal sites; position 1 of the new encoder holds the classes, position 2 of the old one resembles it."""
    source = rng("moments", name)
    labels = source.integers(0, CLASSES, windows)
    code = np.eye(CLASSES)[labels] @ rng("code").normal(size=(CLASSES, 16))
    new = [source.normal(size=(windows, 16)) + (1.5 if i == 1 else 0.1) * code for i in range(POSITIONS_NEW)]
    old = [source.normal(size=(windows, 8)) + (0.8 if i == 2 else 0.1) * new[1][:, :8] for i in range(POSITIONS_OLD)]
    patients = np.array([f"{name}-{i // 4}" for i in range(windows)])
    return {"labels": labels, "new": new, "old": old, "patients": patients}


def test_moments_give_what_one_machine_with_all_data_would(models: Models, tmp_path: Path) -> None:
    data = {name: raw_site(name, windows) for name, windows in (("alpha", 24), ("beta", 120), ("gamma", 60))}
    folds, ridge, key = 4, 0.05, "any public key"
    members = []
    for name, raw in data.items():
        moments = probe_moments(raw["new"], raw["labels"], raw["patients"], CLASSES, folds, key)

        def similar(m: int, raw: dict[str, Any] = raw) -> np.ndarray:
            return similarity_moments(raw["new"][m], raw["old"])

        members.append(Site(name, moments=(moments, similar)))
    found = run(models, tmp_path, members, selection={"mode": "moments", "folds": folds, "ridge": ridge})
    assert (found.mode, found.input_position, found.output_position) == ("moments", 1, 2)
    assert found.probe_scores is not None
    assert found.similarity_scores is not None
    assert found.probe_scores.per_site is None
    labels = np.concatenate([raw["labels"] for raw in data.values()])
    patients = np.concatenate([raw["patients"] for raw in data.values()])
    for position, score in enumerate(found.probe_scores.aggregate):
        x = np.concatenate([raw["new"][position] for raw in data.values()])
        assert score == pytest.approx(ridge_score(x, labels, patients, CLASSES, folds, key, ridge), abs=1e-6)
    for position, score in enumerate(found.similarity_scores.aggregate):
        pairs = [(raw["new"][1], raw["old"][position]) for raw in data.values()]
        assert score == pytest.approx(block_cka(pairs), abs=1e-6)


def test_moments_of_projected_features_are_judged_as_one_machine_would(models: Models, tmp_path: Path) -> None:
    folds, limit = 4, 10
    members, data = [], [raw_site(name, windows) for name, windows in (("alpha", 60), ("beta", 90), ("gamma", 60))]
    wide = [[projected(x, position, 0, limit) for position, x in enumerate(raw["new"])] for raw in data]
    for name, raw, new in zip(NAMES, data, wide, strict=True):
        moments = probe_moments(new, raw["labels"], raw["patients"], CLASSES, folds, "key")
        members.append(Site(name, moments=(moments, lambda m, raw=raw: similarity_moments(raw["new"][m], raw["old"]))))
    asked = {"mode": "moments", "folds": folds, "ridge": 0.05, "width_limit": limit}
    found = run(models, tmp_path, members, selection=asked)
    assert found.probe_scores is not None
    labels = np.concatenate([raw["labels"] for raw in data])
    patients = np.concatenate([raw["patients"] for raw in data])
    for position, score in enumerate(found.probe_scores.aggregate):
        x = np.concatenate([new[position] for new in wide])
        assert x.shape[1] == limit
        assert score == pytest.approx(ridge_score(x, labels, patients, CLASSES, folds, "key", 0.05), abs=1e-6)
    assert found.input_position == 1


def test_unprojected_moments_do_not_fit_a_lower_limit(models: Models, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="BAD_REPLY"):
        run(models, tmp_path, with_moments(), selection={"mode": "moments", "folds": 5, "width_limit": 10})


def with_moments(folds: int = 5, windows: int = 80) -> list[Site]:
    members = [Site(name) for name in NAMES]
    for site in members:
        raw = raw_site(site.name, windows)
        moments = probe_moments(raw["new"], raw["labels"], raw["patients"], CLASSES, folds, "key")
        site.moments = (moments, lambda m, raw=raw: similarity_moments(raw["new"][m], raw["old"]))
    return members


def test_a_site_that_refuses_moments_loses_its_turn(models: Models, tmp_path: Path) -> None:
    members = with_moments()
    members[0].wrong["query.probe"] = lambda *_: Error(code=103, reason="")
    members[1].wrong["query.similarity"] = lambda *_: arrays_of({"similarity_scores": np.zeros(POSITIONS_OLD)})
    run(models, tmp_path, members, selection={"mode": "moments"})
    lost = {site.site: site.lost_turns for site in read_record(tmp_path).sites}
    assert lost == {"alpha": ["probe: POLICY_FORBIDS"], "beta": ["similarity: BAD_REPLY"], "gamma": []}


def at(index: int, value: float) -> Any:
    """A site whose moments are honest but for one number."""

    def behave(site: Site, message: Any, honest: Any) -> Any:
        ((name, array),) = honest.array_records["arrays"].items()
        values = array.numpy()
        values.flat[index] = value
        return arrays_of({name: values})

    return behave


CORNER = 17 * 18 // 2
HOSTILE = {
    "probe: numbers that overflow": ("query.probe", at(3, 1e300)),
    "probe: a negative square": ("query.probe", at(0, -5.0)),
    "probe: a negative direction": ("query.probe", at(1, 1e6)),
    "probe: windows that nobody has": ("query.probe", at(CORNER - 1, 1e9)),
    "probe: a negative count": ("query.probe", at(CORNER + 17 * CLASSES - 1, -1e9)),
    "similarity: numbers that overflow": ("query.similarity", at(0, -1e300)),
    "similarity: negative squares": ("query.similarity", at(1, -1.0)),
    "similarity: more than alike": ("query.similarity", at(3, 1e9)),
}


@pytest.mark.parametrize(("phase", "bad"), HOSTILE.values(), ids=HOSTILE.keys())
def test_moments_of_no_possible_windows_cost_the_site_its_turn(
    models: Models, tmp_path: Path, phase: str, bad: Any
) -> None:
    results = []
    for name, behave in (("hostile", bad), ("silent", lambda *_: None)):
        members = with_moments()
        members[1].wrong[phase] = behave
        results.append(run(models, tmp_path / name, members, selection={"mode": "moments"}))
    assert results[0] == results[1]
    lost = {site.site: site.lost_turns for site in read_record(tmp_path / "hostile").sites}
    assert lost == {"alpha": [], "beta": [f"{phase.removeprefix('query.')}: BAD_REPLY"], "gamma": []}


def test_honest_moments_are_never_refused() -> None:
    """Few windows, empty folds, constant and huge features: all of them are sums of windows."""
    for seed in range(30):
        source = np.random.default_rng(seed)
        windows, width = int(source.integers(4, 60)), int(source.integers(1, 40))
        new = [10.0 ** source.integers(-4, 5) * source.normal(size=(windows, width)) for _ in range(2)]
        new += [np.full((windows, width), 3.0), np.zeros((windows, width)), 1e4 + source.normal(size=(windows, width))]
        patients = np.array([f"p{i // 5}" for i in range(windows)])
        labels = source.integers(0, 2, windows)
        moments = probe_moments(new, labels, patients, 2, 5, "key")
        check_probe_moments(moments, [width] * 5, 2, 5)
        check_similarity_moments(similarity_moments(new[0], new))


def test_moments_of_no_windows_stop_the_run_with_a_reason(models: Models, tmp_path: Path) -> None:
    empty = np.zeros(POSITIONS_NEW * 5 * moments_length(16, CLASSES))
    members = [Site(name, moments=(empty, lambda m: np.zeros((POSITIONS_OLD, 3)))) for name in NAMES]
    with pytest.raises(SelectionError):
        run(models, tmp_path, members, selection={"mode": "moments"})


def test_too_few_scores_stop_the_run(models: Models, tmp_path: Path) -> None:
    members = [Site(name) for name in NAMES]
    for site in members[:2]:
        site.wrong["query.similarity"] = lambda *_: None
    with pytest.raises(RunError, match=r"similarity: 1 good replies, 2 are needed; missing: alpha \(NO_REPLY\), beta"):
        run(models, tmp_path, members)
