"""The plan of a study: its numbers against direct computations, without any data."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from bridge.errors import ConfigError
from bridge.privacy.forecast import FEASIBLE
from simulations import cli
from simulations.config import SimulationConfig, load_simulation
from simulations.plan import PhasePlan, Plan, plan, plan_summary
from tests.conftest import ROOT

CONFIGS = [p for p in sorted((ROOT / "configs").glob("*.yaml")) if "fedbridge.simulation" in p.read_text()]

CONTENT: dict[str, Any] = {
    "name": "planned",
    "data": {"source": "builtin", "builtin": {"hospital_patients": 480}},
    "partition": {"hospitals": 8},
    "split": {"test": 0.25},
    "bridge": {"rank": 4, "prototypes": 16},
    "train": {"rounds": 40, "local_steps": 1},
    "privacy": {
        "mechanism": "central",
        "epsilon": 8,
        "selection": {"epsilon": 1},
        "metrics": {"noise_multiplier": 1.0},
        "training": {"sampling_rate": 0.25, "divisor": 11},
    },
}

ONE_SHOT = {
    "bridge": {
        "kind": "factored",
        "rank": 4,
        "prototypes": 4,
        "cosines": 2,
        "whitening": "public",
        "components": 10,
        "frozen_prototypes": True,
        "initialisation": "public",
    },
    "train": {"method": "closed_form"},
}


def config(**sections: Any) -> SimulationConfig:
    return SimulationConfig.model_validate(CONTENT | sections)


def privacy(**changes: Any) -> dict[str, Any]:
    return {"privacy": CONTENT["privacy"] | changes}


def phase(found: Plan, name: str) -> PhasePlan:
    return next(each for each in found.phases if each.phase == name)


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8."""

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * noise), epsilon * noise
        return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b) - delta)

    return float(brentq(excess, 0, 50))


@pytest.fixture(scope="module")
def found() -> Plan:
    return plan(config())


def test_the_target_epsilon_is_met_closely(found: Plan) -> None:
    costs = {cohort.cohort: cohort.epsilon for cohort in found.cohorts}
    assert 7.99 < costs["pair"] <= 8
    assert costs["test"] == pytest.approx(gaussian_epsilon(1.0, 1e-3), abs=1e-3)
    assert [each.phase for each in found.phases] == ["probe", "similarity", "training", "metrics"]
    selection = phase(found, "probe").noise_multiplier / math.sqrt(2)
    assert gaussian_epsilon(selection, 1e-3) == pytest.approx(1, abs=2e-3)
    assert all(each.epsilon < costs[each.cohort] + 1e-9 for each in found.phases)


def test_the_study_and_the_bridge_follow_from_the_configuration(found: Plan) -> None:
    assert (found.study.sites, found.study.pair_patients, found.study.test_patients) == (8, 45, 15)
    # A 64 x 4, B 4 x (50 tokens * 16), P 16 x 64
    assert (found.bridge.parameters, found.bridge.parameters_least) == (256 + 3200 + 1024, 4480)
    assert phase(found, "training").numbers == 4480
    assert (phase(found, "probe").numbers, phase(found, "metrics").numbers) == (5, 27)


def test_the_ratio_is_the_documented_formula(found: Plan) -> None:
    training = phase(found, "training")
    assert training.share is not None
    patients = 8 * 45 * 0.25
    expected = training.share * patients / (training.noise_multiplier * math.sqrt(4480))
    assert training.signal_to_noise == pytest.approx(expected)
    assert training.signal_to_noise_run == pytest.approx(expected * math.sqrt(40))


def test_local_noise_counts_every_step_and_every_site() -> None:
    local = plan(config(**privacy(mechanism="local"), train={"rounds": 10, "local_steps": 4}))
    training = phase(local, "training")
    assert training.count == 40
    assert training.share is not None
    expected = training.share * 90 / (training.noise_multiplier * math.sqrt(4480 * 8))
    assert training.signal_to_noise == pytest.approx(expected)


def test_the_closed_form_is_one_release_of_few_numbers() -> None:
    found = plan(config(**ONE_SHOT, **privacy(closed_form={"gram": "public"})))
    release = phase(found, "closed_form")
    # A weight, and cross moments of 10 components and a one with 2 cosines x 4 prototypes.
    assert (release.numbers, found.bridge.statistics, release.count) == (1 + 11 * 8, 89, 1)
    assert found.bridge.parameters == 11 * 4 + 4 * 8
    assert [each.phase for each in found.phases] == ["probe", "similarity", "closed_form", "metrics"]
    with_gram = plan(config(**ONE_SHOT, **privacy(closed_form={"gram": "released"})))
    assert with_gram.bridge.statistics == 89 + 11 * 12 // 2


def test_less_privacy_budget_looks_worse_and_needs_more_patients() -> None:
    plans = [plan(config(**privacy(epsilon=epsilon, selection={"epsilon": 0.2}))) for epsilon in (8, 2, 0.5)]
    ratios = [phase(each, "training").signal_to_noise_run or 0 for each in plans]
    assert ratios == sorted(ratios, reverse=True)
    needed = [each.patients_needed or 0 for each in plans]
    assert needed == sorted(needed)
    assert plans[-1].outlook == "hopeless"


def test_with_the_patients_that_are_needed_it_looks_feasible() -> None:
    asked = privacy(epsilon=2, selection={"epsilon": 0.5})
    before = plan(config(**asked))
    assert before.outlook != "feasible"
    assert before.patients_needed is not None
    everybody = math.ceil(before.patients_needed / 0.75)
    after = plan(config(**asked, data={"source": "builtin", "builtin": {"hospital_patients": everybody}}))
    assert after.outlook == "feasible"
    assert (phase(after, "training").signal_to_noise_run or 0) == pytest.approx(FEASIBLE, rel=0.02)


def test_real_recordings_are_planned_from_public_numbers_alone(tmp_path: Path) -> None:
    """The folder does not even exist."""
    data = {"source": "eegmat", "eegmat": {"folder": str(tmp_path / "absent")}}
    found = plan(config(data=data, **privacy(training={"sampling_rate": 0.25, "divisor": 1.5})))
    assert found.study.pair_patients == 6
    assert found.study.test_patients is None
    assert phase(found, "metrics").half_width is None
    assert phase(found, "metrics").numbers == 3 * 4


def test_what_does_not_fit_is_remarked() -> None:
    wrong = privacy(training={"divisor": 80}, metrics={"noise_multiplier": 40.0}, patients_bound=30, simulation_seed=1)
    remarks = " ".join(plan(config(**wrong)).remarks)
    for words in ("divisor is 80, but about 11.2", "above privacy.patients_bound 30", "says nothing", "void"):
        assert words in remarks
    assert plan(config()).remarks == []


def test_no_mechanism_has_a_bridge_and_no_costs() -> None:
    found = plan(config(**privacy(mechanism="none")))
    assert (found.threat_model, found.phases, found.cohorts, found.outlook) == ("none", [], [], None)
    assert found.bridge.parameters == 4480
    assert "no formal guarantee" in found.remarks[0]


def test_a_phase_without_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.metrics"):
        plan(config(**privacy(metrics={})))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_can_be_planned(path: Path) -> None:
    settings = load_simulation(path)
    found = plan(settings)
    assert found.bridge.parameters > 0
    lines = plan_summary(settings)
    assert 2 <= len(lines) <= 4
    assert f"{found.bridge.parameters:,}" in lines[0]


def test_the_summary_before_a_run() -> None:
    lines = plan_summary(config())
    assert lines[0] == "bridge: prototype, 4,480 trained numbers"
    assert lines[1].startswith("privacy: threat model central, pair patients epsilon 8, test patients epsilon 3.")
    assert "signal-to-noise" in lines[2]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(json.dumps(CONTENT), encoding="utf-8")
    with pytest.raises(SystemExit) as ended:
        cli.main(["plan", str(file), "--json", "--set", "privacy.metrics.noise_multiplier=2"])
    assert ended.value.code in (0, None)
    printed = json.loads(capsys.readouterr().out)
    assert printed["schema"] == "fedbridge.plan/1"
    assert printed["bridge"]["parameters"] == 4480
    assert printed["phases"][-1]["noise_multiplier"] == 2
    assert Plan.model_validate(printed).cohorts[0].cohort == "pair"
    with pytest.raises(SystemExit):
        cli.main(["plan", str(file)])
    text = capsys.readouterr().out
    assert "8 sites with about 45 pair patients and 15 test patients each" in text
    assert "outlook: " in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]
