from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bridge.messages import SENTENCES, ReasonCode
from client.audit import AuditLog
from tests.client.disk import small_disk
from tests.client.sites import (
    KINDS,
    PERMISSIVE,
    Small,
    arrays_for,
    ask,
    build_job,
    build_models,
    build_site,
    code,
    start_arrays,
    train_config,
)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_message_is_answered(small: Small, kind: str) -> None:
    assert code(small, kind) == 0


# describe


def described(site: Path, small: Small, **job: Any) -> tuple[str, bool, int]:
    reply = ask(site, build_job(small.models, **job), "query.describe")
    assert set(reply.content) == {"config", "metrics"}
    config, metrics = dict(reply.content["config"]), dict(reply.content["metrics"])
    assert set(config) == {"site", "can_take_part"}
    assert set(metrics) == {"reason"}
    return str(config["site"]), bool(config["can_take_part"]), int(metrics["reason"])


def test_describe_says_yes_and_the_name(small: Small) -> None:
    assert described(small.site, small) == ("alpha", True, 0)


def test_describe_is_the_same_whatever_the_number_of_patients(small: Small, tmp_path: Path) -> None:
    for patients in (10, 14):
        site = build_site(tmp_path / f"s{patients}", "same", models=small.models, patients=patients)
        assert described(site, small) == ("same", True, 0)


@pytest.mark.parametrize(
    ("policy", "job", "reason"),
    [
        ({}, {"selection": {"mode": "moments"}}, ReasonCode.POLICY_FORBIDS),
        ({"coordinators": ["uni"]}, {}, ReasonCode.COORDINATOR_UNKNOWN),
        ({"max_rounds": 2}, {}, ReasonCode.TOO_MANY_ROUNDS),
        ({"privacy": {"mechanisms": ["central"]}}, {}, ReasonCode.MECHANISM_FORBIDDEN),
        ({"minimum_patients": 11}, {}, ReasonCode.TOO_FEW_PATIENTS),
        ({"max_seconds_per_message": 1e-9}, {}, ReasonCode.TOO_SLOW),
        ({"encoders": {"new": ["f" * 64]}}, {}, ReasonCode.POLICY_FORBIDS),
    ],
)
def test_describe_says_no_by_code(
    small: Small, tmp_path: Path, policy: dict[str, Any] | None, job: dict[str, Any], reason: ReasonCode
) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, policy=policy)
    assert described(site, small, **job) == ("beta", False, int(reason))
    # and what describe refuses is refused when it is asked for all the same
    job_ = build_job(small.models, **job)
    reply = ask(site, job_, "train", train_config(), start_arrays())
    assert reply.error.code == reason


def test_the_sites_own_minimum_decides_and_the_job_has_no_say(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, patients=8)
    assert described(site, small)[2] == ReasonCode.TOO_FEW_PATIENTS
    assert code(small, "query.describe", {"minimum-patients": 1}, site) == ReasonCode.MESSAGE_INVALID


def test_no_usable_pair_at_all_is_too_few(small: Small, tmp_path: Path) -> None:
    splits = {"pair": 0.0, "validation": 0.5, "test": 0.5}
    site = build_site(tmp_path / "s", "beta", models=small.models, changes={"splits": splits})
    assert described(site, small)[2] == ReasonCode.TOO_FEW_PATIENTS


def test_two_sites_with_different_encoder_weights(small: Small, tmp_path: Path) -> None:
    other = build_models(tmp_path / "models", seed=3)
    site = build_site(tmp_path / "s", "beta", models=other)
    assert described(site, small) == ("beta", False, int(ReasonCode.WEIGHTS_DIFFER))
    for kind in ("query.probe", "train", "evaluate"):
        assert code(small, kind, site=site) == ReasonCode.WEIGHTS_DIFFER
    assert not (site / "cache").exists()


def test_damaged_weights(small: Small, tmp_path: Path) -> None:
    models = tmp_path / "models"
    shutil.copytree(small.models, models)
    weights = models / "old_encoder" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    site = build_site(tmp_path / "s", "beta", models=models)
    assert described(site, small)[2] == ReasonCode.WEIGHTS_MISSING


def test_a_damaged_recording_is_left_out_and_named_in_the_sites_own_log_only(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, patients=10)
    broken = site / "recordings" / "beta-p01.npz"
    whole = broken.read_bytes()
    broken.write_bytes(whole[:200])
    assert described(site, small)[2] == ReasonCode.TOO_FEW_PATIENTS
    (site / "policy.yaml").write_text("minimum_patients: 4\nprivacy: {mechanisms: [none]}\n")
    file = yaml.safe_load((site / "site.yaml").read_text())
    (site / "site.yaml").write_text(yaml.safe_dump({**file, "policy": "policy.yaml"}))
    assert described(site, small)[2] == 0
    assert "FILE_LEFT_OUT" in (site / "site.log").read_text()
    assert "beta-p01" in (site / "site.log").read_text()
    assert "beta-p01" not in (site / "audit.jsonl").read_text()


# train


def test_the_same_request_gives_the_same_bits(small: Small) -> None:
    job = build_job(small.models)
    first, again = (ask(small.site, job, "train", train_config(2), start_arrays()) for _ in range(2))
    other = ask(small.site, job, "train", train_config(3), start_arrays())
    for name in ("update.A", "update.B", "update.P"):
        one = first.content["arrays"][name].numpy()
        assert one.dtype == np.float32
        np.testing.assert_array_equal(one, again.content["arrays"][name].numpy())
        assert not np.array_equal(one, other.content["arrays"][name].numpy())


_FRESH = """
import sys
from pathlib import Path
import numpy as np
from tests.client.sites import ask, build_job, start_arrays, train_config
site, models, out = map(Path, sys.argv[1:])
content = ask(site, build_job(models), "train", train_config(2), start_arrays()).content["arrays"]
np.savez(out, **{name: content[name].numpy() for name in content})
"""


def test_a_fresh_process_without_a_cache_gives_the_same_bits(small: Small, tmp_path: Path) -> None:
    here = ask(small.site, build_job(small.models), "train", train_config(2), start_arrays()).content["arrays"]
    site, out = tmp_path / "alpha", tmp_path / "update.npz"
    shutil.copytree(small.site, site, ignore=shutil.ignore_patterns("cache", "audit*"))
    command = [sys.executable, "-c", _FRESH, str(site), str(small.models), str(out)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    with np.load(out) as there:
        assert set(there) == set(here)
        for name in here:
            np.testing.assert_array_equal(there[name], here[name].numpy())


def test_a_site_without_a_policy_answers_nothing_without_a_private_mechanism(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, policy=None)
    reply = ask(site, build_job(small.models), "train", train_config(), start_arrays())
    assert reply.error.code == ReasonCode.MECHANISM_FORBIDDEN


def test_a_site_with_an_empty_policy_for_none_trains_and_keeps_its_loss(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, policy={})
    reply = ask(site, build_job(small.models), "train", train_config(), start_arrays())
    assert set(reply.content["arrays"]) == {"update.A", "update.B", "update.P"}
    assert dict(reply.content["metrics"]) == {"weight": 1.0}
    assert len(reply.content.array_records) == 1
    assert len(reply.content.metric_records) == 1


def test_the_weight_is_the_jobs_public_one(small: Small) -> None:
    job = build_job(small.models, sites={"weights": {"alpha": 0.25, "beta": 1.0}})
    reply = ask(small.site, job, "train", train_config(), start_arrays())
    assert reply.content["metrics"]["weight"] == 0.25


def test_training_lowers_the_loss_round_by_round(small: Small) -> None:
    job = build_job(small.models, train={"rounds": 6, "local_steps": 10})
    bridge, losses = start_arrays(), []
    for round_ in range(1, 7):
        reply = ask(small.site, job, "train", train_config(round_), bridge)
        losses.append(float(reply.content["metrics"]["train_loss"]))
        bridge = {name: value + reply.content["arrays"][f"update.{name}"].numpy() for name, value in bridge.items()}
    assert losses[-1] < 0.6 * losses[0]


def test_the_proximal_term_of_fedprox_pulls_towards_the_broadcast(small: Small) -> None:
    def size(mu: float) -> float:
        job = build_job(small.models, strategy={"name": "FedProx", "proximal_mu": mu}, train={"local_steps": 12})
        config = {**train_config(), "server-round": 1, "proximal-mu": mu}
        content = ask(small.site, job, "train", config, start_arrays()).content["arrays"]
        return float(sum(np.square(content[name].numpy()).sum() for name in content))

    assert size(100.0) < 0.5 * size(0.0)


# what leaves when something goes wrong


SECRET = "patient-4711-Mueller"


def test_nothing_of_an_error_leaves_but_its_code(small: Small, tmp_path: Path) -> None:
    """A site file that names a secret path, and one whose model folder is unreadable: the reply is a fixed sentence."""
    site = build_site(tmp_path / SECRET, "beta", models=small.models, changes={"folder": f"nowhere-{SECRET}"})
    reply = ask(site, build_job(small.models), "train", train_config(), start_arrays())
    assert (reply.error.code, reply.error.reason) == (110, SENTENCES[ReasonCode.SITE_MISCONFIGURED])
    assert SECRET in (site / "site.log").read_text()
    assert (site / "site.log").stat().st_mode & 0o077 == 0


def test_a_defect_inside_is_a_code_outside(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import client.training

    def fails(*_: object, **__: object) -> None:
        raise ValueError(f"could not convert {SECRET} to float")

    site = build_site(tmp_path / "s", "beta", models=small.models)
    monkeypatch.setattr(client.training, "train_update", fails)
    reply = ask(site, build_job(small.models), "train", train_config(), start_arrays())
    assert (reply.error.code, reply.error.reason) == (100, SENTENCES[ReasonCode.INTERNAL])
    log = (site / "site.log").read_text()
    assert SECRET in log
    assert "Traceback" in log
    _, *lines = AuditLog(site / "audit.jsonl").verify()
    assert [(line.entry.event, line.entry.purpose) for line in lines] == [("refused", "answered by INTERNAL alone")]
    assert SECRET not in (site / "audit.jsonl").read_text()


def test_an_audit_log_that_was_tampered_with_shuts_the_door(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models)
    assert code(small, "query.probe", site=site) == 0
    (site / "audit.jsonl").write_text("")
    assert code(small, "query.probe", site=site) == ReasonCode.STORAGE
    assert code(small, "train", site=site) == ReasonCode.STORAGE


def test_a_full_disk_under_the_audit_log_lets_nothing_out(small: Small, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        changes = {"audit": str(disk / "audit.jsonl")}
        site = build_site(tmp_path / "s", "beta", models=small.models, changes=changes)
        assert code(small, "query.describe", site=site) == 0
        before = (disk / "audit.jsonl.head").read_bytes()
        with suppress(OSError), (disk / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        for kind in ("query.describe", "query.probe", "train"):
            assert code(small, kind, site=site) == ReasonCode.STORAGE
        assert (disk / "audit.jsonl.head").read_bytes() == before
    assert "No space left on device" in (site / "site.log").read_text()


def test_a_message_that_takes_too_long_gives_nothing(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, policy={"max_seconds_per_message": 2.0})
    assert code(small, "query.probe", site=site) == 0
    job = build_job(small.models, train={"local_steps": 100_000})
    assert code(small, "train", site=site, job=job) == ReasonCode.TOO_SLOW
    assert "update.A" not in (site / "audit.jsonl").read_text()


def test_every_item_of_a_reply_is_in_the_audit_log(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, policy=PERMISSIVE)
    sent = []
    for kind, config in KINDS.items():
        content = ask(site, build_job(small.models), kind, config, arrays_for(kind)).content
        sent += sorted((kind, name) for record in content.values() for name in record)
    _, *lines = AuditLog(site / "audit.jsonl").verify()
    assert sorted((line.entry.message, line.entry.item) for line in lines) == sorted(sent)
    assert [line.entry.round for line in lines] == [None] * 5 + [1] * 5 + [3] * 3
    assert {line.entry.run for line in lines} == {"7"}


# finding the site


def test_the_node_config_wins_over_the_simulation_folder(small: Small, tmp_path: Path) -> None:
    build_site(tmp_path / "site-0", "pretend", models=small.models)
    simulated = {"simulation-folder": str(tmp_path)}

    def name(node: dict[str, Any]) -> str:
        reply = ask(small.site, build_job(small.models), "query.describe", node_config=node, run_config=simulated)
        return str(reply.content["config"]["site"])

    assert name({"partition-id": 0}) == "pretend"
    assert name({"partition-id": 0, "site": str(small.site)}) == "alpha"
    assert name({"site": str(small.site / "site.yaml")}) == "alpha"


@pytest.mark.parametrize(
    "node", [{}, {"partition-id": 5}, {"partition-id": "0"}, {"partition-id": "../x"}, {"site": "/nowhere/site.yaml"}]
)
def test_a_node_without_a_site(small: Small, tmp_path: Path, node: dict[str, Any]) -> None:
    run = {"simulation-folder": str(tmp_path)}
    assert code(small, "query.describe", node_config=node, run_config=run) == ReasonCode.SITE_MISCONFIGURED


def test_a_policy_for_another_site(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, policy={"site": "gamma"})
    assert code(small, "query.describe", site=site) == ReasonCode.SITE_MISCONFIGURED


def test_an_unknown_key_in_the_policy_or_the_site_file(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, policy={"minimum_patient": 1})
    assert code(small, "train", site=site) == ReasonCode.SITE_MISCONFIGURED
    (site / "policy.yaml").write_text("minimum_patients: 5\nprivacy: {mechanisms: [none]}\n")
    assert code(small, "train", site=site) == 0
    file = yaml.safe_load((site / "site.yaml").read_text())
    (site / "site.yaml").write_text(yaml.safe_dump({**file, "polcy": "policy.yaml"}))
    assert code(small, "train", site=site) == ReasonCode.SITE_MISCONFIGURED
    assert "did you mean 'policy'" in (site / "site.log").read_text()
