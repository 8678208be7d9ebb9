"""Messages and jobs that a site does not answer: refused before any data is touched."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from numpy.typing import NDArray

from bridge.job import job_text
from bridge.messages import ReasonCode
from tests.client.sites import PERMISSIVE, Small, ask, build_job, build_site, code, start_arrays, train_config


def nan_in(name: str) -> dict[str, NDArray[np.float32]]:
    arrays = start_arrays()
    arrays[name][1, 1] = np.nan
    return arrays


BAD: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("query.describe", {"verbose": True}, {}),
    ("query.probe", {"positions": [0]}, {}),
    ("query.similarity", {}, {}),
    ("query.similarity", {"input-position": 4}, {}),
    ("query.similarity", {"input-position": -1}, {}),
    ("query.similarity", {"input-position": 1.0}, {}),
    ("query.similarity", {"input-position": True}, {}),
    ("query.similarity", {"input-position": "1"}, {}),
    ("train", train_config(0), {}),
    ("train", train_config(4), {}),
    ("train", train_config(-1), {}),
    ("train", train_config(1, m=4), {}),
    ("train", train_config(1, l=3), {}),
    ("train", {**train_config(), "learning-rate": 1.0}, {}),
    ("train", {**train_config(), "server-round": 2}, {}),
    ("train", {**train_config(), "proximal-mu": 0.5}, {}),
    ("train", train_config(), {"arrays": None}),
    ("train", train_config(), {"arrays": {}}),
    ("train", train_config(), {"arrays": {"A": start_arrays()["A"]}}),
    ("train", train_config(), {"arrays": {**start_arrays(), "C": np.zeros(1, np.float32)}}),
    ("train", train_config(), {"arrays": start_arrays(rank=3)}),
    ("train", train_config(), {"arrays": {**start_arrays(), "A": np.zeros((16, 2))}}),
    ("train", train_config(), {"arrays": {**start_arrays(), "A": np.zeros((16, 2, 1), np.float32)}}),
    ("train", train_config(), {"arrays": nan_in("A")}),
    ("train", train_config(), {"arrays": nan_in("P")}),
    ("train", train_config(), {"records": {"extra": MetricRecord({"a": 1.0})}}),
    ("train", train_config(), {"records": {"arrays": ConfigRecord({"A": 1})}}),
    ("train", train_config(), {"records": {"config": MetricRecord({"round": 1})}}),
    ("evaluate", train_config(3), {}),
    ("evaluate", {**train_config(3), "split": "pair"}, {}),
    ("evaluate", {**train_config(3), "split": "test", "patients": ["x"]}, {}),
    # the job of these tests evaluates its last round on the test patients, and nothing else
    ("evaluate", {**train_config(2), "split": "test"}, {}),
    ("evaluate", {**train_config(3), "split": "validation"}, {}),
]


@pytest.mark.parametrize(("kind", "config", "more"), BAD)
def test_a_bad_message_is_refused_before_any_data_is_touched(
    small: Small, tmp_path: Path, kind: str, config: dict[str, Any], more: dict[str, Any]
) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, policy=PERMISSIVE)
    shutil.rmtree(site / "recordings")
    assert code(small, kind, config, site, **more) == ReasonCode.MESSAGE_INVALID
    assert not (site / "cache").exists()


@pytest.mark.parametrize(
    "array",
    [
        Array("float32", (16, 2), "numpy.ndarray", b"not an array at all"),
        Array("float32", (16, 2), "numpy.ndarray", Array(np.zeros((900, 2), np.float32)).data),
        Array("float32", (16, 2), "numpy.ndarray", Array(np.zeros((16, 2), np.float32)).data[:-9]),
        Array("float32", (16, 2), "numpy.ndarray", Array(np.zeros((16, 2), np.int64)).data),
    ],
)
def test_an_array_that_is_not_what_it_claims(small: Small, array: Array) -> None:
    packed = {name: Array(value) for name, value in start_arrays().items()}
    records = {"arrays": ArrayRecord({**packed, "A": array})}
    assert code(small, "train", arrays=None, records=records) == ReasonCode.MESSAGE_INVALID


def test_a_round_beyond_the_policys_is_refused_although_the_job_allows_it(small: Small, tmp_path: Path) -> None:
    site = build_site(tmp_path / "s", "beta", models=small.models, policy={"max_rounds": 2})
    job = build_job(small.models, train={"rounds": 2})
    assert code(small, "train", train_config(2), site, job=job) == 0
    assert code(small, "train", train_config(3), site, job=job) == ReasonCode.MESSAGE_INVALID


def test_a_site_evaluates_no_more_often_than_the_job_announces(small: Small) -> None:
    job = build_job(small.models, train={"rounds": 5}, evaluate={"every": 2, "final": False})

    def answered(split: str) -> list[int]:
        kinds = {round_: {**train_config(round_), "split": split} for round_ in range(1, 6)}
        codes = {round_: code(small, "evaluate", config, job=job) for round_, config in kinds.items()}
        assert set(codes.values()) <= {0, ReasonCode.MESSAGE_INVALID}
        return [round_ for round_, found in codes.items() if found == 0]

    assert answered("validation") == [2, 4, 5]
    assert answered("test") == []


def test_positions_that_the_job_fixes(small: Small) -> None:
    job = build_job(small.models, selection={"mode": "fixed", "input_position": 2, "output_position": 1})
    assert code(small, "train", train_config(1, 2, 1), job=job) == 0
    assert code(small, "train", train_config(1, 2, 2), job=job) == ReasonCode.MESSAGE_INVALID
    assert code(small, "train", train_config(1, 1, 1), job=job) == ReasonCode.MESSAGE_INVALID


@pytest.mark.parametrize("job", ["", "a: [", "name: x", "- 1", "x" * 70_000])
def test_a_job_that_cannot_be_read(small: Small, job: str) -> None:
    assert code(small, "train", job=job) == ReasonCode.JOB_INVALID
    reply = ask(small.site, job, "query.describe")
    assert reply.content["metrics"]["reason"] == ReasonCode.JOB_INVALID


def test_an_unknown_key_in_the_job(small: Small) -> None:
    text = job_text(build_job(small.models)) + "epsilon: 3\n"
    assert code(small, "query.probe", job=text) == ReasonCode.JOB_INVALID
