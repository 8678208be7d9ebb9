"""Audits: the bound against brute force, canaries that are what they should be, and a planted fault that is seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from math import comb, exp, log
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from bridge.errors import ConfigError
from bridge.job import Job, Models
from bridge.privacy.calibration import resolved
from bridge.privacy.noise import NoiseSource
from server.audit_record import AuditRecord, write_audit
from simulations.audit.bound import correct_guesses, lower_bound, p_value
from simulations.audit.canaries import Canaries, closed_form_scores, training_scores
from simulations.audit.run import audit
from simulations.cli import main
from simulations.config import SimulationConfig, set_key

FIXED = {
    "selection.mode": "fixed",
    "selection.input_position": 1,
    "selection.output_position": 1,
    "evaluate.final": False,
    "train.local_steps": 1,
}
SOLVED = {
    "bridge.kind": "factored",
    "bridge.whitening": "public",
    "bridge.frozen_prototypes": True,
    "bridge.initialisation": "directions",
    "train.method": "closed_form",
    "privacy.closed_form.noise_multiplier": 1.0,
}
TRAINED = {"train.rounds": 4, "privacy.training.sampling_rate": 1.0, "privacy.training.noise_multiplier": 2.0}


def configuration(mechanism: str, **keys: Any) -> SimulationConfig:
    content: dict[str, Any] = {"name": "audited"}
    for key, value in ({"privacy.mechanism": mechanism} | FIXED | keys).items():
        set_key(content, key, value, "test")
    return SimulationConfig.model_validate(content)


def job_of(config: SimulationConfig) -> Job:
    return resolved(config.job(Models(old_encoder="", new_encoder="", task_head="")))


class Silence(NoiseSource):
    """No noise at all, so that what the canaries add stands alone."""

    def __init__(self) -> None:
        super().__init__(bytes(32))

    def normal(self, shape: int | tuple[int, ...], deviation: float) -> NDArray[np.float64]:
        return np.zeros(shape)


def streams(seed: int) -> Iterator[NoiseSource]:
    number = 0
    while True:
        yield NoiseSource.seeded(seed, number)
        number += 1


def binomial(n: int, k: int, q: float) -> float:
    return comb(n, k) * q**k * (1 - q) ** (n - k)


@pytest.mark.parametrize("guesses", [1, 7, 20])
@pytest.mark.parametrize("epsilon", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("delta", [0.0, 1e-4, 1e-2])
def test_the_p_value_is_that_of_the_theorem(guesses: int, epsilon: float, delta: float) -> None:
    q = exp(epsilon) / (1 + exp(epsilon))
    for correct in range(guesses + 1):
        tail = sum(binomial(guesses, k, q) for k in range(correct, guesses + 1))
        shares = [sum(binomial(guesses, k, q) for k in range(correct - i, correct)) / i for i in range(1, correct + 1)]
        expected = min(1.0, tail + 2 * 40 * delta * max(shares, default=0.0))
        assert p_value(40, guesses, correct, epsilon, delta) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("guesses", [10, 200, 2000])
def test_when_every_guess_is_right_the_bound_has_a_closed_form(guesses: int) -> None:
    q = 0.05 ** (1 / guesses)
    assert lower_bound(guesses, guesses, guesses, 0.0) == pytest.approx(log(q / (1 - q)), abs=2e-6)


def test_the_bound_grows_with_right_guesses_and_falls_with_delta_and_confidence() -> None:
    bounds = [lower_bound(1000, 100, correct, 1e-5) for correct in range(101)]
    assert bounds == sorted(bounds)
    assert bounds[50] == 0.0 < bounds[70] < bounds[100]
    assert lower_bound(1000, 100, 90, 1e-3) < lower_bound(1000, 100, 90, 1e-5) < lower_bound(1000, 100, 90, 0.0)
    assert lower_bound(1000, 100, 90, 0.0, 0.99) < lower_bound(1000, 100, 90, 0.0, 0.95)


def test_randomised_response_is_refuted_no_more_often_than_the_confidence_allows() -> None:
    """Randomised response meets its epsilon exactly, so the bound must exceed it in about 5 % of the audits."""
    rng = np.random.default_rng(0)
    epsilon = 1.5
    right = rng.binomial(300, exp(epsilon) / (1 + exp(epsilon)), size=4000)
    values, times = np.unique(right, return_counts=True)
    above = [lower_bound(300, 300, int(each), 0.0) > epsilon for each in values]
    assert 0.02 < times[above].sum() / times.sum() <= 0.055


def test_guesses_are_the_highest_and_the_lowest_scores() -> None:
    scores = np.array([0.1, 5.0, -3.0, 2.0, 0.0, -1.0])
    inserted = np.array([True, True, False, False, True, True])
    assert correct_guesses(scores, inserted, 2) == 2  # 5.0 in, -3.0 out
    assert correct_guesses(scores, inserted, 4) == 2  # and 2.0 in, -1.0 out: both wrong


@pytest.mark.parametrize("mechanism", ["central", "local"])
@pytest.mark.parametrize("clip", [0.25, 3.0])
def test_an_inserted_canary_adds_the_whole_clipping_bound_in_its_own_direction(mechanism: str, clip: float) -> None:
    job = job_of(configuration(mechanism, **TRAINED | {"privacy.training.clip": clip}))
    canaries = Canaries.drawn(300, seed=2)
    scores = training_scores(job, canaries, Silence, lambda message: bytes(32))
    assert 100 < canaries.inserted.sum() < 200
    np.testing.assert_allclose(scores, np.where(canaries.inserted, 4 * clip, 0.0), atol=1e-4 * clip)


def test_canaries_are_drawn_at_the_plans_rate() -> None:
    keys = TRAINED | {"privacy.training.sampling_rate": 0.25, "train.rounds": 40}
    canaries = Canaries(np.ones(200, dtype=np.bool_))
    scores = training_scores(job_of(configuration("central", **keys)), canaries, Silence, lambda i: i.to_bytes(32))
    times = np.round(scores)
    np.testing.assert_allclose(scores, times, atol=1e-3)
    assert times.mean() == pytest.approx(10.0, abs=4 * np.sqrt(40 * 0.25 * 0.75 / 200))


@pytest.mark.parametrize("gram", ["public", "released"])
def test_a_canary_of_the_closed_form_adds_the_whole_bound(gram: str) -> None:
    keys = SOLVED | {"privacy.closed_form.clip": 0.5, "privacy.closed_form.gram": gram}
    canaries = Canaries.drawn(300, seed=3)
    scores = closed_form_scores(job_of(configuration("central", **keys)), canaries, Silence)
    np.testing.assert_allclose(scores, np.where(canaries.inserted, 0.5, 0.0), atol=1e-3)


def test_without_a_mechanism_there_is_nothing_to_audit() -> None:
    with pytest.raises(ConfigError, match="claims nothing"):
        audit(configuration("none"))


def test_the_record_sets_the_bound_beside_the_claim(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = configuration("central", **TRAINED)
    (tmp_path / "config.yaml").write_text(config.text(), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        main(["audit", str(tmp_path / "config.yaml"), "--canaries", "400", "--json", "--out", str(tmp_path)])
    assert ended.value.code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == json.loads((tmp_path / "audit.json").read_text(encoding="utf-8"))
    record = AuditRecord.model_validate(shown)
    (phase,) = record.phases
    assert (record.threat_model, phase.phase, phase.canaries, phase.guesses) == ("central", "training", 400, 40)
    # Four sums of noise 2 are one Gaussian of noise 1: epsilon 4.38 at delta 1e-5 (Balle and Wang 2018).
    assert phase.claim.epsilon == pytest.approx(4.377, abs=2e-3)
    assert phase.claim.delta == 1e-5
    assert record.plan.epsilon < phase.claim.epsilon  # at the plan's own, larger delta


def test_the_record_can_only_be_written_where_a_folder_is(tmp_path: Path) -> None:
    record = audit(configuration("central", **TRAINED), canaries=20, seed=0)
    with pytest.raises(Exception, match="can't be written"):
        write_audit(tmp_path / "nowhere", record)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [TRAINED, SOLVED], ids=["training", "closed_form"])
@pytest.mark.parametrize("mechanism", ["central", "local"])
def test_shipped_mechanisms_stay_below_their_claim_and_half_the_noise_is_seen(
    mechanism: str, keys: dict[str, Any]
) -> None:
    source = streams(7)
    record = audit(configuration(mechanism, **keys), canaries=16_000, seed=7, noise=lambda: next(source))
    (phase,) = record.phases
    assert record.holds
    assert 1.0 < phase.lower_bound < phase.claim.epsilon == pytest.approx(4.377, abs=2e-3)
    assert phase.half_noise_bound > phase.claim.epsilon
