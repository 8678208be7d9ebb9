"""privacy.json: what is stated is what the events cost, and a statement that claims more is found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from bridge.console import run_app
from bridge.errors import ConfigError
from bridge.job import Job
from server.cli import app
from server.errors import RunFolderError
from server.record import write_record
from server.statement import (
    PRIVACY_JSON,
    Statement,
    build_statement,
    read_statement,
    schema_text,
    sensitivity,
    write_statement,
)
from server.verification import PRV_ERROR, verify_statement
from tests.conftest import ROOT
from tests.server import private


@pytest.fixture(scope="module")
def stated() -> Statement:
    return build_statement(private.job(), private.record())


@pytest.fixture(scope="module")
def quick() -> Statement:
    """A plan whose recomputation takes no time: no draws."""
    return build_statement(Job.model_validate(QUICK), private.record(QUICK))


QUICK = private.config(training=private.PRIVACY["training"] | {"sampling_rate": 1.0, "noise_multiplier": 9.0})


def gaussian_epsilon(noise: float, delta: float) -> float:
    """Balle and Wang 2018, theorem 8: the exact curve of one Gaussian release, solved for epsilon."""

    def excess(epsilon: float) -> float:
        a, b = 1 / (2 * noise), epsilon * noise
        return float(norm.cdf(a - b) - math.exp(epsilon) * norm.cdf(-a - b) - delta)

    return float(brentq(excess, 0, 50, xtol=1e-10))


def test_the_events_are_those_of_the_plan(stated: Statement) -> None:
    found = [
        (each.phase, each.cohort, each.noise_multiplier, each.sensitivity, each.sampling_rate, each.count)
        for each in stated.events
    ]
    assert found == [
        ("probe", "pair", 4.0, 1.0, 1.0, 1),  # sensitivity 2R = 2 * 0.5
        ("similarity", "pair", 4.0, 1.0, 1.0, 1),
        ("training", "pair", 1.3, 0.7, 0.25, 80),
        ("metrics", "test", 0.9, 1.0, 1.0, 1),
    ]


def test_epsilon_of_a_single_gaussian_is_the_exact_one(stated: Statement) -> None:
    test = next(cohort for cohort in stated.cohorts if cohort.cohort == "test")
    assert test.epsilon == pytest.approx(gaussian_epsilon(0.9, 1e-3), abs=1e-3)


def test_selection_alone_costs_one_gaussian_of_joint_noise() -> None:
    """Two releases of noise z are one of z / sqrt(2)."""
    asked = private.config()
    asked["train"] |= {"method": "closed_form"}
    asked["bridge"] |= {
        "kind": "factored",
        "whitening": "public",
        "frozen_prototypes": True,
        "initialisation": "public",
    }
    asked["privacy"]["closed_form"]["noise_multiplier"] = 2.0
    asked["evaluate"]["final"] = False
    job = Job.model_validate(asked)
    statement = build_statement(job, private.record(asked))
    joint = 1 / math.sqrt(2 / 4.0**2 + 1 / 2.0**2)
    assert [cohort.cohort for cohort in statement.cohorts] == ["pair"]
    assert statement.epsilon == pytest.approx(gaussian_epsilon(joint, 1e-3), abs=1e-3)
    assert sensitivity(job, "closed_form") == job.privacy.closed_form.clip


def test_what_the_whole_run_states(stated: Statement) -> None:
    assert (stated.threat_model, stated.verdict, stated.delta) == ("central", "holds", 1e-3)
    assert stated.unit == "the patient, with all windows, in all sessions, at one site"
    assert stated.adjacency == "add or remove one patient"
    assert stated.epsilon == max(cohort.epsilon for cohort in stated.cohorts)
    assert stated.accountant_version == "0.6.0"
    for name, value in {
        "sites": 5,
        "rounds": 80,
        "clip": 0.7,
        "divisor": 12,
        "groups": 6,
        "patients_bound": 100,
    }.items():
        assert stated.public[name] == value
    assert [choice.chosen for choice in stated.choices][:2] == ["input 3, output 3", "round 18"]
    assert {model.trained_on for model in stated.provenance} == {"public"}
    assert any("k guarantees" in sentence for sentence in stated.not_covered)
    assert any("not hardened" in sentence for sentence in stated.not_covered)
    assert any(sentence.startswith("Timing") for sentence in stated.not_covered)


def test_the_best_attack_on_epsilon_one() -> None:
    """At epsilon 1 and delta 0: e times the false positives."""
    statement = build_statement(private.job(), private.record())
    test = next(cohort for cohort in statement.cohorts if cohort.cohort == "test")
    by_first = math.exp(test.epsilon) * 0.01 + 1e-3
    by_second = 1 - math.exp(-test.epsilon) * (1 - 1e-3 - 0.01)
    assert test.best_true_positive_rate == pytest.approx(min(by_first, by_second, 1))
    assert 0.01 < test.best_true_positive_rate < 1


def test_no_mechanism_states_no_guarantee() -> None:
    asked = private.config(mechanism="none")
    statement = build_statement(Job.model_validate(asked), private.record(asked))
    assert (statement.verdict, statement.epsilon, statement.delta) == ("none", None, None)
    assert (statement.cohorts, statement.events, statement.best_true_positive_rate) == ([], [], None)
    assert "adds no noise" in statement.reasons[0]
    assert verify_statement(statement).verified


def test_a_private_head_voids_and_a_silent_card_makes_it_conditional() -> None:
    record = private.record()
    head = {"digest": "c" * 64, "training": {"data": "hospital-a", "public": False}}
    with_head = record.model_copy(update={"models": record.models | {"task_head": head}})
    statement = build_statement(private.job(), with_head)
    assert statement.verdict == "void"
    assert "task head was trained on patients without privacy" in statement.reasons[0]
    silent = record.model_copy(update={"models": record.models | {"task_head": head | {"training": {}}}})
    statement = build_statement(private.job(), silent)
    assert statement.verdict == "conditional"
    assert "task head" in statement.reasons[0]


FITTED = {
    "digest": "c" * 64,
    "training": {
        "data": "labelled pair patients of the site north",
        "public": False,
        "private_patients": 12,
        "fitted_on": "patients of north",
        "privacy": "none: fitted on patients without a privacy mechanism",
    },
}


@pytest.mark.parametrize("model", ["task_head", "old_encoder"])
@pytest.mark.parametrize("mechanism", ["none", "central"])
def test_a_model_that_was_fitted_on_a_sites_patients_is_named(model: str, mechanism: str) -> None:
    asked = private.config(mechanism=mechanism)
    record = private.record(asked)
    record = record.model_copy(update={"models": record.models | {model: FITTED}})
    statement = build_statement(Job.model_validate(asked), record)
    named = next(each for each in statement.provenance if each.model == model)
    assert (named.trained_on, named.digest) == ("private", "c" * 64)
    assert named.data == "labelled pair patients of the site north (patients of north, 12 of them)"
    assert statement.verdict == ("void" if mechanism == "central" else "none")
    said = f"The {model.replace('_', ' ')} was fitted on patients of north, 12 of them, without a privacy mechanism"
    assert [reason.startswith(said) for reason in statement.reasons] == [False, True]
    assert "no noise of this run protects them" in statement.not_covered[-1]
    assert read_statement_of(statement) == statement


def test_public_models_leave_the_statement_as_it_is(quick: Statement) -> None:
    assert not any("fitted" in sentence for sentence in (*quick.reasons, *quick.not_covered))


def read_statement_of(statement: Statement) -> Statement:
    return Statement.model_validate_json(statement.model_dump_json(by_alias=True))


def test_a_seed_voids() -> None:
    statement = build_statement(private.job(simulation_seed=3), private.record())
    assert statement.verdict == "void"
    assert "simulation_seed" in statement.reasons[0]


def test_missing_noise_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.metrics\.noise_multiplier"):
        build_statement(private.job(metrics={}), private.record())


def test_it_survives_the_file(stated: Statement, tmp_path: Path) -> None:
    write_statement(tmp_path, stated)
    assert read_statement(tmp_path) == stated == read_statement(tmp_path / PRIVACY_JSON)
    with pytest.raises(RunFolderError, match="can't be written"):
        write_statement(tmp_path / "absent", stated)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema": "fedbridge.run/1"}', "\ufeff\x00"])
def test_another_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / PRIVACY_JSON).write_text(text, encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"fedbridge\.privacy/1"):
        read_statement(tmp_path)


def test_other_accountants_agree(stated: Statement) -> None:
    found = verify_statement(stated)
    assert found.verified
    for check in found.cohorts:
        assert check.prv is not None
        assert check.prv - 2 * PRV_ERROR - 1e-3 <= check.stated <= check.prv + 1e-3
        assert check.stated < check.rdp < 1.5 * check.stated


def _less_epsilon(content: dict[str, Any]) -> None:
    content["epsilon"] -= 0.05
    content["cohorts"][0]["epsilon"] -= 0.05


def _top_epsilon(content: dict[str, Any]) -> None:
    content["epsilon"] /= 2


def _fewer_events(content: dict[str, Any]) -> None:
    content["cohorts"].pop()


def _weaker_attack(content: dict[str, Any]) -> None:
    content["best_true_positive_rate"] -= 0.1


def _larger_delta(content: dict[str, Any]) -> None:
    content["delta"] = 0.01


def _no_threat(content: dict[str, Any]) -> None:
    content["threat_model"] = "none"


def _no_figure(content: dict[str, Any]) -> None:
    content["epsilon"] = None


def _private_model(content: dict[str, Any]) -> None:
    content["provenance"][0]["trained_on"] = "private"


@pytest.mark.parametrize(
    ("tamper", "word"),
    [
        (_less_epsilon, "but their events cost"),
        (_top_epsilon, "below that of a cohort"),
        (_fewer_events, "in no cohort"),
        (_weaker_attack, "allows a true-positive rate"),
        (_larger_delta, "too large"),
        (_no_threat, "gives no guarantee"),
        (_no_figure, "needs an epsilon"),
        (_private_model, "can't hold"),
    ],
)
def test_a_statement_that_claims_too_much_is_found(
    quick: Statement, tamper: Callable[[dict[str, Any]], None], word: str
) -> None:
    content = json.loads(quick.model_dump_json(by_alias=True))
    tamper(content)
    found = verify_statement(Statement.model_validate(content))
    assert not found.verified
    assert any(word in problem for problem in found.problems)


def test_events_are_held_against_the_run(quick: Statement, tmp_path: Path) -> None:
    """More noise in the file than the job had, and an epsilon that fits it: only the run's record tells."""
    write_record(tmp_path, private.record(QUICK))
    assert verify_statement(quick, tmp_path).verified
    asked = QUICK | {"privacy": QUICK["privacy"] | {"metrics": {"noise_multiplier": 9.0}}}
    prettier = build_statement(Job.model_validate(asked), private.record(asked))
    assert verify_statement(prettier).verified
    found = verify_statement(prettier, tmp_path)
    assert not found.verified
    assert "events" in found.problems[0]


def test_the_command(quick: Statement, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            run_app(app, ["statement", "verify", *arguments])
        printed = capsys.readouterr()
        return int(ended.value.code or 0), printed.out, printed.err

    write_statement(tmp_path, quick)
    code, out, err = call(str(tmp_path / PRIVACY_JSON))
    assert (code, err) == (0, "")
    assert out.count("agrees") == 2
    assert "The statement holds." in out
    code, out, _ = call(str(tmp_path), "--json")
    assert code == 0
    assert json.loads(out)["verified"] is True
    content = json.loads((tmp_path / PRIVACY_JSON).read_text())
    _less_epsilon(content)
    (tmp_path / PRIVACY_JSON).write_text(json.dumps(content))
    code, out, err = call(str(tmp_path))
    assert code == 5
    assert "UNDERSTATED" in out
    assert "the statement is not right" in err
    assert call(str(tmp_path / "none.json"))[0] == 7


def test_the_published_schema_is_current() -> None:
    published = ROOT / "docs" / "reference" / "privacy.schema.json"
    assert published.read_text(encoding="utf-8") == schema_text(), "run: fedbridge-server schema --privacy > " + str(
        published
    )


def test_the_reference_page_explains_every_field() -> None:
    page = (ROOT / "docs" / "reference" / "privacy.md").read_text(encoding="utf-8")
    schema = json.loads(schema_text())
    models = {"Statement": schema, **schema["$defs"]}
    missing = [
        f"{name}.{key}" for name, model in models.items() for key in model["properties"] if f"`{key}`" not in page
    ]
    assert missing == []
