"""Positions under a private mechanism: what the server makes of noised sums, at the wire and by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import kstest

from bridge.job import Job, parse_job
from bridge.privacy.noise import NoiseSource
from server.noised import noised_sum
from server.record import SelectionRecord, read_record
from tests.server.conftest import Models
from tests.server.wire import POSITIONS_NEW, POSITIONS_OLD, Site, WireGrid, arrays_of, run_server

NAMES = ("alpha", "beta", "gamma")
Z, CLIP = 0.5, 0.1
DEVIATION = Z * 2 * CLIP
PROBE = {"alpha": [9.0, 2.0, -5.0], "beta": [-7.0, 9.0, -2.0], "gamma": [-1.0, 4.0, 7.0]}
SIMILARITY = {"alpha": [-9.0, 1.0, 8.0, 0.0], "beta": [6.0, -3.0, 0.0, -3.0], "gamma": [0.0, 0.0, 4.0, -9.0]}


def private(mechanism: str, **changes: Any) -> dict[str, Any]:
    noised = {"noise_multiplier": 2.0}
    return {
        "mechanism": mechanism,
        "selection": {"noise_multiplier": Z, "clip": CLIP},
        "training": noised,
        "metrics": noised,
        **changes,
    }


def job_of(models: Models, mechanism: str, **changes: Any) -> str:
    sites = {"minimum": 3, "wait_seconds": 5, "timeout_seconds": 5, "retries": 0, "expected": NAMES}
    return models.job(
        sites={**sites, **changes.pop("sites", {})},
        train={"rounds": 1, "local_steps": 1},
        evaluate={"final": False},
        privacy=private(mechanism),
        **changes,
    )


def member(name: str) -> Site:
    site = Site(name, loss=False, confusions=False)
    site.wrong = {
        "query.probe": lambda site, message, honest: arrays_of({"probe_sums": np.array(PROBE[site.name])}),
        "query.similarity": lambda site, message, honest: arrays_of(
            {"similarity_sums": np.array(SIMILARITY[site.name])}
        ),
    }
    return site


def chosen(folder: Path, models: Models, text: str, members: list[Site] | None = None) -> SelectionRecord:
    run_server(WireGrid(members or [member(n) for n in NAMES], shuffle=2), folder, models.folder, text)
    found = read_record(folder).selection
    assert found is not None
    return found


@pytest.mark.parametrize("mechanism", ["local", "central"])
def test_the_highest_noised_sum_wins_and_no_site_s_own_is_kept(models: Models, tmp_path: Path, mechanism: str) -> None:
    found = chosen(tmp_path / "run", models, job_of(models, mechanism))
    assert (found.mode, found.input_position, found.output_position) == ("scores", 1, 2)
    for scores, sums in ((found.probe_scores, PROBE), (found.similarity_scores, SIMILARITY)):
        assert scores is not None
        assert scores.per_site is None
        expected = np.sum([sums[name] for name in NAMES], axis=0)
        # local: the sites' noise is in what they sent already, and the server adds none
        deviation = DEVIATION * np.sqrt(3) if mechanism == "local" else DEVIATION
        assert scores.noise_deviation == pytest.approx(deviation)
        moved = np.array(scores.aggregate) - expected
        if mechanism == "local":
            np.testing.assert_allclose(moved, 0, atol=1e-12)
        else:
            assert np.abs(moved).min() > 0
            assert np.abs(moved).max() < 6 * DEVIATION


def test_no_raw_sum_is_written_anywhere_under_central(models: Models, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    chosen(folder, models, job_of(models, "central"))
    raw = [*PROBE.values(), *SIMILARITY.values()]
    raw += [list(np.sum([s[n] for n in NAMES], axis=0)) for s in (PROBE, SIMILARITY)]
    for path in folder.rglob("*.json*"):
        text = path.read_text(encoding="utf-8").replace(" ", "").replace("\n", "")
        for values in raw:
            assert json.dumps([float(v) for v in values]).replace(" ", "") not in text, path
    for path in folder.rglob("*.safetensors"):
        content = path.read_bytes()
        assert all(np.array(values).tobytes() not in content for values in raw)


def test_two_runs_of_the_same_job_have_different_noise(models: Models, tmp_path: Path) -> None:
    first, second = (chosen(tmp_path / name, models, job_of(models, "central")) for name in ("one", "two"))
    assert first.probe_scores is not None
    assert second.probe_scores is not None
    assert not np.equal(first.probe_scores.aggregate, second.probe_scores.aggregate).any()


def test_public_weights_weigh_the_sums(models: Models, tmp_path: Path) -> None:
    weights = {"alpha": 1.0, "beta": 0.1, "gamma": 0.5}
    members = [member(n) for n in NAMES]
    for site in members:
        site.weight = weights[site.name]
    found = chosen(tmp_path / "run", models, job_of(models, "local", sites={"weights": weights}), members)
    assert found.probe_scores is not None
    expected = np.sum([weights[n] * np.array(PROBE[n]) for n in NAMES], axis=0)
    np.testing.assert_allclose(found.probe_scores.aggregate, expected, rtol=1e-12)
    assert found.input_position == 0
    norm = np.sqrt(1.0**2 + 0.1**2 + 0.5**2)
    assert found.probe_scores.noise_deviation == pytest.approx(DEVIATION * norm)


def test_a_site_that_sends_scores_without_privacy_loses_its_turn(models: Models, tmp_path: Path) -> None:
    members = [member(n) for n in NAMES]
    members[0].wrong = {}  # its honest answer is to a job without privacy
    text = job_of(models, "central", sites={"minimum": 2})
    chosen(tmp_path / "run", models, text, members)
    site = next(s for s in read_record(tmp_path / "run").sites if s.site == NAMES[0])
    assert site.lost_turns[:2] == ["probe: BAD_REPLY", "similarity: BAD_REPLY"]


def _job(models: Models, mechanism: str, weights: dict[str, float] | None = None) -> Job:
    return parse_job(job_of(models, mechanism, sites={"weights": weights or {}}))


def test_the_server_s_noise_is_the_claimed_one_times_the_largest_weight(models: Models) -> None:
    weights = {"alpha": 0.25, "beta": 0.8, "gamma": 0.1}
    values = {name: np.full(30_000, float(i)) for i, name in enumerate(NAMES)}
    found = noised_sum(values, _job(models, "central", weights), 1.5, NoiseSource.seeded(1, "central"))
    claimed = 1.5 * 0.8
    assert found.deviation == pytest.approx(claimed)
    noise = found.values - (0.8 * 1 + 0.1 * 2)
    assert kstest(noise / claimed, "norm").pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert kstest(noise / (wrong * claimed), "norm").pvalue < 1e-12


def test_only_sites_that_answered_decide_the_largest_weight(models: Models) -> None:
    weights = {"alpha": 0.25, "beta": 0.8, "gamma": 0.1}
    job = _job(models, "central", weights)
    found = noised_sum({"alpha": np.zeros(2), "gamma": np.zeros(2)}, job, 2.0, NoiseSource.seeded(1, "x"))
    assert found.deviation == pytest.approx(2.0 * 0.25)


def test_central_without_a_source_of_noise_gives_nothing(models: Models) -> None:
    with pytest.raises(ValueError, match="noise"):
        noised_sum({"alpha": np.zeros(2)}, _job(models, "central"), 1.0, None)


def test_shapes_are_those_of_the_models() -> None:
    assert {len(v) for v in PROBE.values()} == {POSITIONS_NEW}
    assert {len(v) for v in SIMILARITY.values()} == {POSITIONS_OLD}
