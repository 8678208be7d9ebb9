from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from sklearn.metrics import confusion_matrix

from bridge.encoders.loading import load_encoder
from bridge.head import load_head
from bridge.messages import DEFAULT_ITEMS, ReasonCode
from client.site import open_site
from client.windowing import windows_of
from tests.client.sites import PERMISSIVE, Small, ask, build_job, build_site, start_arrays, train_config

CONFUSIONS = {"confusion.bridge", "confusion.teacher", "confusion.agreement"}


def evaluate(site: Path, small: Small, split: str = "test") -> Message:
    job = build_job(small.models, evaluate={"every": 3})
    return ask(site, job, "evaluate", {**train_config(3), "split": split}, some_bridge())


def some_bridge() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(8)
    return {name: rng.normal(size=value.shape).astype(np.float32) for name, value in start_arrays().items()}


def site(tmp_path: Path, small: Small, policy: dict[str, Any] | None, **changes: Any) -> Path:
    return build_site(tmp_path / "s", "gamma", models=small.models, seed=6, policy=policy, **changes)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_confusions_equal_the_whole_chain_run_from_the_signals(small: Small, split: str) -> None:
    sent = evaluate(small.site, small, split).content["arrays"]
    windows = windows_of(open_site(small.site), split)  # type: ignore[arg-type]
    assert windows.old is not None
    assert windows.new is not None
    old, new = load_encoder(small.models / "old_encoder"), load_encoder(small.models / "new_encoder")
    head, bridge = load_head(small.models / "task_head"), some_bridge()
    with torch.no_grad():
        teacher = head(old.taps(torch.from_numpy(windows.old)).tokens.mean(1)).argmax(1).numpy()
        h = new.prefix(torch.from_numpy(windows.new), 2).mean(1).numpy()
        tokens = (h @ bridge["A"] @ bridge["B"]).reshape(-1, 8, 4) @ bridge["P"]
        guess = head(old.suffix(torch.from_numpy(tokens), 1).mean(1)).argmax(1).numpy()
    labels = windows.table.labels
    assert len(labels) == 60
    for item, truth, predicted in (
        ("confusion.bridge", labels, guess),
        ("confusion.teacher", labels, teacher),
        ("confusion.agreement", teacher, guess),
    ):
        expected = confusion_matrix(truth, predicted, labels=[0, 1])
        np.testing.assert_array_equal(sent[item].numpy(), expected)
        assert sent[item].numpy().dtype == np.int64


def test_without_labels_only_the_agreement_exists(small: Small, tmp_path: Path) -> None:
    reply = evaluate(site(tmp_path, small, PERMISSIVE, labels=False), small)
    assert set(reply.content["arrays"]) == {"confusion.agreement"}
    assert reply.content["arrays"]["confusion.agreement"].numpy().sum() == 60


@pytest.mark.parametrize("permitted", ["confusion.bridge", "confusion.teacher", "confusion.agreement"])
def test_what_is_permitted_leaves_and_nothing_else(small: Small, tmp_path: Path, permitted: str) -> None:
    reply = evaluate(site(tmp_path, small, {"items": [*DEFAULT_ITEMS, permitted]}), small)
    assert set(reply.content) == {"arrays"}
    assert set(reply.content["arrays"]) == {permitted}


def test_nothing_permitted_is_a_refusal_before_any_data_is_touched(small: Small, tmp_path: Path) -> None:
    folder = site(tmp_path, small, {})
    reply = evaluate(folder, small)
    assert reply.error.code == ReasonCode.POLICY_FORBIDS
    assert not (folder / "cache").exists()


def test_a_group_smaller_than_the_policy_gives_no_metric(small: Small, tmp_path: Path) -> None:
    folder = site(tmp_path, small, {**PERMISSIVE, "minimum_group": 6})
    assert evaluate(folder, small).error.code == ReasonCode.GROUP_TOO_SMALL
    assert evaluate(small.site, small).has_content()


def test_an_empty_split_is_a_small_group(small: Small, tmp_path: Path) -> None:
    splits = {"pair": 1.0, "validation": 0.0, "test": 0.0}
    folder = site(tmp_path, small, PERMISSIVE, changes={"splits": splits})
    assert evaluate(folder, small).error.code == ReasonCode.GROUP_TOO_SMALL


def test_labels_of_too_few_patients_leave_the_agreement_alone(small: Small, tmp_path: Path) -> None:
    folder = tmp_path / "s"
    names = [f"gamma-p{i:02d}" for i in range(20)]
    rows = [f"{name},0,48,slow" for name in names[15:19]]
    labels = {"source": "csv", "path": "labels.csv", "classes": ["slow", "fast"]}
    site(tmp_path, small, PERMISSIVE, changes={"labels": labels})
    (folder / "labels.csv").write_text("recording,start_seconds,end_seconds,label\n" + "\n".join(rows) + "\n")
    assert set(evaluate(folder, small).content["arrays"]) == {"confusion.agreement"}
    rows.append(f"{names[19]},0,24,slow")
    (folder / "labels.csv").write_text("recording,start_seconds,end_seconds,label\n" + "\n".join(rows) + "\n")
    sent = evaluate(folder, small).content["arrays"]
    assert set(sent) == CONFUSIONS
    # four whole recordings of 12 windows and half of a fifth; the windows without a label count for the agreement
    assert sent["confusion.bridge"].numpy().sum() == 54
    assert sent["confusion.agreement"].numpy().sum() == 60


def test_windows_of_other_patients_do_not_count(small: Small) -> None:
    counted = {split: evaluate(small.site, small, split).content["arrays"] for split in ("validation", "test")}
    for sent in counted.values():
        assert sent["confusion.agreement"].numpy().sum() == 5 * 12
