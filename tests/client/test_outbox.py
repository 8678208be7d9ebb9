from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord

from bridge.messages import DESCRIBE, EVALUATE, PROBE, TRAIN, Dimensions, ReasonCode
from bridge.shape import BridgeShape
from client.audit import AuditLog
from client.errors import AuditError, OutboxError, PolicyError, SiteError
from client.outbox import Outbox
from client.policy import Policy

SIZES = Dimensions(
    positions_new=3,
    positions_old=4,
    classes=2,
    bridge=BridgeShape(width_new=6, rank=2, tokens_old=7, prototypes=5, width_old=8),
)
UPDATE = {"update.A": (6, 2), "update.B": (2, 35), "update.P": (5, 8)}


def outbox(tmp_path: Path, message: str = TRAIN, policy: Policy | None = None, round_: int | None = 2) -> Outbox:
    return Outbox(message, SIZES, policy or Policy(), AuditLog(tmp_path / "audit.jsonl"), "41", round_)


def records(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def test_a_train_reply_and_its_audit_entries(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    arrays = {name: np.random.default_rng(1).normal(size=shape).astype(np.float32) for name, shape in UPDATE.items()}
    for name, value in arrays.items():
        box.add(name, value)
    box.add("weight", 1.0)
    content = box.reply_content()
    assert set(content) == {"arrays", "metrics"}
    assert isinstance(content["arrays"], ArrayRecord)
    assert isinstance(content["metrics"], MetricRecord)
    assert dict(content["metrics"]) == {"weight": 1.0}
    for name, value in arrays.items():
        np.testing.assert_array_equal(content["arrays"][name].numpy(), value)
    entries = records(tmp_path)
    assert [(e["item"], e["shape"], e["bytes"]) for e in entries] == [
        ("update.A", [6, 2], 48),
        ("update.B", [2, 35], 280),
        ("update.P", [5, 8], 160),
        ("weight", [], 8),
    ]
    assert {(e["run"], e["round"], e["message"], e["event"]) for e in entries} == {("41", 2, "train", "sent")}
    head = json.dumps(["<f4", [6, 2]], separators=(",", ":")).encode()
    assert entries[0]["sha256"] == hashlib.sha256(head + arrays["update.A"].tobytes()).hexdigest()
    assert entries[0]["purpose"] == "train the bridge"


def test_a_describe_reply(tmp_path: Path) -> None:
    box = outbox(tmp_path, DESCRIBE, round_=None)
    box.add("site", "north-1")
    box.add("can_take_part", False)
    box.add("reason", int(ReasonCode.TOO_FEW_PATIENTS))
    content = box.reply_content()
    assert isinstance(content["config"], ConfigRecord)
    assert dict(content["config"]) == {"site": "north-1", "can_take_part": False}
    assert dict(content["metrics"]) == {"reason": 106}
    assert [e["round"] for e in records(tmp_path)] == [None, None, None]


OK = np.zeros((6, 2), np.float32)


def with_value(value: float) -> np.ndarray[Any, Any]:
    array = OK.copy()
    array[3, 1] = value
    return array


@pytest.mark.parametrize(
    ("message", "name", "value", "said"),
    [
        (TRAIN, "patients", 12, "item 'patients' is not declared for 'train'"),
        (TRAIN, "probe_scores", np.zeros(3), "'probe_scores' is not declared for 'train'"),
        (TRAIN, "update.A", np.zeros((7, 2), np.float32), "'update.A' of 'train' is refused: its shape is (7, 2)"),
        (TRAIN, "update.A", np.zeros((6, 2, 1), np.float32), "its shape is (6, 2, 1)"),
        (TRAIN, "update.A", np.zeros((600, 200), np.float32), "its shape is (600, 200)"),
        (TRAIN, "update.A", np.zeros((6, 2)), "its dtype is float64"),
        (TRAIN, "update.A", with_value(np.nan), "NaN or infinity"),
        (TRAIN, "update.A", with_value(-np.inf), "NaN or infinity"),
        (TRAIN, "update.A", with_value(2e6), "beyond its bound"),
        (TRAIN, "update.A", OK.tolist(), "it is a list"),
        (TRAIN, "weight", 1.5, "out of its bound"),
        (TRAIN, "weight", float("nan"), "not finite"),
        (TRAIN, "weight", True, "it is a bool"),
        (TRAIN, "weight", "1", "it is a str"),
        (PROBE, "probe_scores", np.array([0.5, 0.5, 1.01]), "beyond its bound"),
        (PROBE, "probe_scores", np.zeros(2), "its shape is (2,)"),
        (DESCRIBE, "site", "Ms Miller, born 1961", "not a plain name"),
        (DESCRIBE, "can_take_part", 17, "it is a int"),
        (DESCRIBE, "reason", 5000, "out of its bound"),
    ],
)
def test_what_is_not_as_declared_is_refused_by_name_and_nothing_leaves(
    tmp_path: Path, message: str, name: str, value: Any, said: str
) -> None:
    box = outbox(tmp_path, message)
    with pytest.raises(OutboxError) as caught:
        box.add(name, value)
    assert name in str(caught.value)
    assert said in str(caught.value)
    assert caught.value.reason is ReasonCode.ITEM_REFUSED
    # all or nothing: neither the content nor another item after it
    with pytest.raises(OutboxError, match="is shut"):
        box.reply_content()
    with pytest.raises(OutboxError, match="is shut"):
        box.add("weight", 1.0)
    assert records(tmp_path) == []


def test_the_policy_wins_over_what_is_declared(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    box.add("weight", 1.0)
    with pytest.raises(PolicyError) as caught:
        box.add("train_loss", 0.3)
    assert caught.value.reason is ReasonCode.POLICY_FORBIDS
    assert "train_loss" in str(caught.value)
    with pytest.raises(SiteError):
        box.reply_content()
    assert records(tmp_path) == []
    for name in Policy().items:
        others = Policy(items=tuple(item for item in Policy().items if item != name))
        assert not others.permits(name)


def test_confusions_need_permission_and_integers(tmp_path: Path) -> None:
    counts = np.array([[3, 1], [0, 4]])
    with pytest.raises(PolicyError):
        outbox(tmp_path, EVALUATE).add("confusion.bridge", counts)
    permitted = Policy(items=("confusion.bridge",))
    with pytest.raises(OutboxError, match="float64"):
        outbox(tmp_path, EVALUATE, permitted).add("confusion.bridge", counts / 1)
    box = outbox(tmp_path, EVALUATE, permitted)
    box.add("confusion.bridge", counts)
    np.testing.assert_array_equal(box.reply_content()["arrays"]["confusion.bridge"].numpy(), counts)


def test_what_was_checked_is_what_leaves(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    value = np.zeros((6, 2), np.float32)
    box.add("update.A", value)
    value[:] = 77
    assert box.reply_content()["arrays"]["update.A"].numpy().max() == 0


@pytest.mark.parametrize("value", [5e9, np.nan])
def test_a_mask_hides_nothing_from_the_checks(tmp_path: Path, value: float) -> None:
    hidden = np.ma.masked_array(OK.copy(), mask=True)
    hidden.data[0, 0] = value
    with pytest.raises(OutboxError):
        outbox(tmp_path).add("update.A", hidden)


def test_twice_the_same_item_and_empty_and_spent_outboxes(tmp_path: Path) -> None:
    box = outbox(tmp_path)
    box.add("weight", 1.0)
    with pytest.raises(OutboxError, match="given twice"):
        box.add("weight", 0.5)
    with pytest.raises(OutboxError, match="empty"):
        outbox(tmp_path).reply_content()
    box = outbox(tmp_path)
    box.add("weight", 1.0)
    box.reply_content()
    with pytest.raises(OutboxError, match="is shut"):
        box.reply_content()
    assert len(records(tmp_path)) == 1


def test_no_audit_no_reply(tmp_path: Path) -> None:
    (tmp_path / "audit.jsonl").mkdir()
    box = outbox(tmp_path)
    box.add("weight", 1.0)
    with pytest.raises(AuditError):
        box.reply_content()
