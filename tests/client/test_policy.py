from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from bridge.job import Job
from bridge.messages import ITEMS, ReasonCode
from client.errors import PolicyError, SiteFileError
from client.policy import Policy, PrivacyPolicy, load_policy, required_items, template

DIGESTS = {"old_encoder": "a" * 64, "new_encoder": "b" * 64, "task_head": "c" * 64}
DEFAULTS = {
    "site",
    "can_take_part",
    "reason",
    "probe_scores",
    "similarity_scores",
    "update.A",
    "update.B",
    "update.P",
    "weight",
    "probe_sums",
    "similarity_sums",
    "statistics",
    "confusion_sums",
}
OPT_IN = {
    "probe_moments",
    "similarity_moments",
    "closed_form_moments",
    "train_loss",
    "confusion.bridge",
    "confusion.teacher",
    "confusion.agreement",
}


def job(**changes: Any) -> Job:
    return Job.model_validate({"schema": "fedbridge.job/1", "name": "j", "models": DIGESTS, **changes})


def written(folder: Path, **keys: Any) -> Path:
    path = folder / "policy.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


def test_no_file_means_default_items_and_five_patients() -> None:
    policy = load_policy(None)
    assert set(policy.items) == DEFAULTS
    assert {name for name in ITEMS if not policy.permits(name)} == OPT_IN
    assert (policy.minimum_patients, policy.minimum_group) == (5, 5)
    assert policy.privacy.mechanisms == ("local",)
    assert not policy.fit_head
    with pytest.raises(PolicyError, match="the mechanism 'none'") as caught:
        policy.judge(job())
    assert caught.value.reason is ReasonCode.MECHANISM_FORBIDDEN


def test_template_explains_every_key_and_holds_the_defaults(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(template(), encoding="utf-8")
    assert load_policy(path) == Policy()
    written_keys = set(yaml.safe_load(template()))
    assert written_keys == set(Policy.model_fields)
    assert set(yaml.safe_load(template())["privacy"]) == {
        "mechanisms",
        "epsilon_cap",
        "delta",
        "clip_max",
        "noise_multiplier_min",
        "sampling_rate_max",
    }
    lines = template().splitlines()
    for key in written_keys:
        before = lines[lines.index(next(line for line in lines if line.startswith(f"{key}:"))) - 1]
        assert before.startswith("#") or key == "privacy", key
    path.write_text(template("north"), encoding="utf-8")
    assert load_policy(path) == Policy(site="north")
    for name in OPT_IN - {"confusion.bridge", "confusion.teacher", "confusion.agreement"}:
        assert f"# - {name} " in template()


@pytest.mark.parametrize(
    ("keys", "closest"),
    [
        ({"minimum_patient": 3}, "did you mean 'minimum_patients'"),
        ({"privacy": {"epsilon": 2.0}}, "did you mean 'epsilon_cap'"),
        ({"items": ["probe_score"]}, "did you mean 'probe_scores'"),
        ({"items": ["confusions.*"]}, "did you mean 'confusion.*'"),
        ({"items": ["*"]}, "'*' is not a declared item"),
        ({"minimum_patients": 0}, "minimum_patients"),
        ({"privacy": {"mechanisms": ["nothing"]}}, "mechanisms"),
        ({"site": "Ward 3, Dr. Jones"}, "site"),
    ],
)
def test_a_policy_that_cannot_be_understood_permits_nothing(tmp_path: Path, keys: dict[str, Any], closest: str) -> None:
    path = written(tmp_path, **keys)
    with pytest.raises(SiteFileError) as caught:
        load_policy(path)
    assert closest in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_named_policy_that_is_absent_is_refused_rather_than_replaced_by_defaults(tmp_path: Path) -> None:
    with pytest.raises(SiteFileError, match=r"policy\.yaml"):
        load_policy(tmp_path / "policy.yaml")


def test_wildcards_stand_for_declared_items_only(tmp_path: Path) -> None:
    policy = load_policy(written(tmp_path, items=["confusion.*", "update.A"]))
    assert set(policy.items) == {"confusion.bridge", "confusion.teacher", "confusion.agreement", "update.A"}


@pytest.mark.parametrize(
    ("keys", "changes", "code"),
    [
        ({"coordinators": ["uni"]}, {"coordinator": "other"}, ReasonCode.COORDINATOR_UNKNOWN),
        ({"max_rounds": 5}, {"train": {"rounds": 6}}, ReasonCode.TOO_MANY_ROUNDS),
        ({"privacy": {"mechanisms": ["local"]}}, {}, ReasonCode.MECHANISM_FORBIDDEN),
        ({"privacy": {"mechanisms": []}}, {}, ReasonCode.MECHANISM_FORBIDDEN),
        ({}, {"selection": {"mode": "moments"}}, ReasonCode.POLICY_FORBIDS),
        ({"items": ["probe_scores", "similarity_scores", "weight"]}, {}, ReasonCode.POLICY_FORBIDS),
        ({"encoders": {"old": ["d" * 64]}}, {}, ReasonCode.POLICY_FORBIDS),
        ({"encoders": {"head": ["d" * 64]}}, {}, ReasonCode.POLICY_FORBIDS),
    ],
)
def test_the_policy_wins_over_the_job(keys: dict[str, Any], changes: dict[str, Any], code: ReasonCode) -> None:
    open_hearted = {"privacy": {"mechanisms": ["none"]}}
    with pytest.raises(PolicyError) as caught:
        Policy.model_validate({**open_hearted, **keys}).judge(job(**changes))
    assert caught.value.reason is code
    Policy.model_validate(open_hearted).judge(job())


def test_a_job_within_the_policy_passes() -> None:
    policy = Policy(
        coordinators=("uni",),
        max_rounds=6,
        items=("update.*", "weight", "probe_moments", "similarity_moments"),
        encoders={"old": ["a" * 64, "e" * 64], "new": ["b" * 64], "head": ["c" * 64]},  # type: ignore[arg-type]
        privacy=PrivacyPolicy(mechanisms=("none",)),
    )
    policy.judge(job(coordinator="uni", train={"rounds": 6}, selection={"mode": "moments"}))


def test_fixed_positions_need_no_selection_items() -> None:
    fixed = job(selection={"mode": "fixed", "input_position": 0, "output_position": 1})
    assert set(required_items(fixed)) == {"update.A", "update.B", "update.P", "weight"}
    Policy(items=("update.*", "weight"), privacy=PrivacyPolicy(mechanisms=("none",))).judge(fixed)
