"""Whole runs of the real ServerApp against sites at the wire; every figure against plain numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bridge.chain import load_chain
from server.errors import RunError
from server.record import RunRecord, read_record
from tests.server.conftest import Models
from tests.server.wire import (
    TOKENS_OLD,
    WIDTH_NEW,
    WIDTH_OLD,
    Arrays,
    Site,
    WireGrid,
    run_server,
    site_confusions,
    site_update,
)

NAMES = ("alpha", "beta", "delta", "gamma", "zeta")
EXPECTED = {"minimum": 2, "wait_seconds": 5, "timeout_seconds": 5, "retries": 1, "expected": NAMES}


def sites(**options: Any) -> list[Site]:
    # Not in the order of their names: node ids must not matter.
    return [Site(name, **options) for name in ("gamma", "alpha", "zeta", "beta", "delta")]


def run(models: Models, folder: Path, grid: WireGrid, **job: Any) -> tuple[RunRecord, Arrays]:
    run_server(grid, folder, models.folder, models.job(**{"sites": EXPECTED, **job}))
    return read_record(folder), load_file(folder / "bridge" / "bridge.safetensors")


def first_checkpoint(folder: Path) -> Arrays:
    tensors = load_file(folder / "checkpoints" / "round-000000.safetensors")
    return {name.removeprefix("arrays/"): array for name, array in tensors.items()}


def start_of(models: Models, folder: Path, **job: Any) -> Arrays:
    """The first broadcast, as a run of one round left it."""
    run(models, folder, WireGrid(sites()), **{**job, "train": {"rounds": 1}})
    return first_checkpoint(folder)


class Adam:
    """Server Adam as Reddi et al. 2021 have it, with Flower's bias correction, in float64."""

    def __init__(self, eta: float, yogi: bool) -> None:
        self.eta, self.yogi, self.m, self.v = eta, yogi, {}, {}

    def step(self, t: int, x: Arrays, mean: Arrays) -> Arrays:
        out = {}
        for k in x:
            d = mean[k].astype(np.float64) - x[k]
            self.m[k] = 0.9 * self.m.get(k, 0.0) + 0.1 * d
            v = self.v.get(k, np.zeros_like(d))
            self.v[k] = v - 0.01 * d**2 * np.sign(v - d**2) if self.yogi else 0.99 * v + 0.01 * d**2
            rate = self.eta if self.yogi else self.eta * np.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))
            out[k] = (x[k] + rate * self.m[k] / (np.sqrt(self.v[k]) + 1e-3)).astype(np.float32)
        return out


def krum(local: list[Arrays], malicious: int) -> Arrays:
    """The site whose n - f - 2 nearest neighbours are nearest (Blanchard et al. 2017)."""
    flat = [np.concatenate([a[k].astype(np.float64).ravel() for k in ("A", "B", "P")]) for a in local]
    scores = []
    for i, x in enumerate(flat):
        others = sorted(float(((x - y) ** 2).sum()) for j, y in enumerate(flat) if j != i)
        scores.append(sum(others[: max(1, len(flat) - malicious - 2)]))
    return local[int(np.argmin(scores))]


def reference(strategy: str, start: Arrays, rounds: int, weights: dict[str, float], option: float) -> Arrays:
    x, adam = dict(start), Adam(option, strategy == "FedYogi")
    for t in range(1, rounds + 1):
        local = [{k: x[k] + u for k, u in site_update(name, t, x).items()} for name in NAMES]
        stacked = {k: np.stack([each[k].astype(np.float64) for each in local]) for k in x}
        w = np.array([weights[name] for name in NAMES])
        mean = {k: np.tensordot(w / w.sum(), stacked[k], axes=1) for k in x}
        if strategy in ("FedAdam", "FedYogi"):
            x = adam.step(t, x, mean)
            continue
        if strategy == "FedMedian":
            mean = {k: np.median(stacked[k], axis=0) for k in x}
        elif strategy == "FedTrimmedAvg":
            cut = int(option * len(NAMES))
            mean = {k: np.sort(stacked[k], axis=0)[cut : len(NAMES) - cut].mean(axis=0) for k in x}
        elif strategy == "Krum":
            mean = krum(local, int(option))
        x = {k: mean[k].astype(np.float32) for k in x}
    return x


STRATEGIES: list[tuple[str, dict[str, Any], float]] = [
    ("FedAvg", {}, 0),
    ("FedProx", {"proximal_mu": 0.1}, 0),
    ("FedAdam", {"server_learning_rate": 0.05}, 0.05),
    ("FedYogi", {"server_learning_rate": 0.02}, 0.02),
    ("FedMedian", {}, 0),
    ("FedTrimmedAvg", {"trim": 0.25}, 0.25),
    ("Krum", {"malicious_sites": 1}, 1),
]


@pytest.mark.parametrize(("name", "options", "option"), STRATEGIES, ids=[each[0] for each in STRATEGIES])
def test_strategies_equal_plain_numpy(
    models: Models, tmp_path: Path, name: str, options: dict[str, Any], option: float
) -> None:
    strategy = {"name": name, **options}
    start = start_of(models, tmp_path / "start", strategy=strategy)
    record, kept = run(models, tmp_path / "run", WireGrid(sites()), strategy=strategy, train={"rounds": 6})
    wanted = reference(name, start, 6, dict.fromkeys(NAMES, 1.0), option)
    for key, array in wanted.items():
        assert kept[key].dtype == np.float32
        np.testing.assert_allclose(kept[key], array, rtol=2e-5, atol=2e-6)
        assert np.abs(array - start[key]).max() > 0.1
    assert [each.round for each in record.rounds] == [1, 2, 3, 4, 5, 6]


def test_public_weights_decide_the_mean(models: Models, tmp_path: Path) -> None:
    weights = {"alpha": 1.0, "beta": 0.25, "gamma": 0.5, "delta": 0.75, "zeta": 0.125}
    members = sites()
    for site in members:
        site.weight = weights[site.name]
    start = start_of(models, tmp_path / "start")
    _, kept = run(models, tmp_path / "run", WireGrid(members), sites={**EXPECTED, "weights": weights})
    for key, array in reference("FedAvg", start, 3, weights, 0).items():
        np.testing.assert_allclose(kept[key], array, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", ["FedAvg", "FedAdam", "FedMedian", "Krum"])
def test_results_do_not_depend_on_the_order_of_replies(models: Models, tmp_path: Path, name: str) -> None:
    job = {"strategy": {"name": name}, "train": {"rounds": 3, "keep": "best"}}
    kept = []
    for shuffle in range(4):
        record, arrays = run(models, tmp_path / str(shuffle), WireGrid(sites(), shuffle), **job)
        kept.append((arrays, record.evaluation, record.selection, [each.criterion for each in record.rounds]))
    for arrays, *rest in kept[1:]:
        assert rest == list(kept[0][1:])
        assert all(np.array_equal(arrays[key], kept[0][0][key]) for key in "ABP")


def test_a_run_leaves_a_complete_record(models: Models, tmp_path: Path) -> None:
    grid = WireGrid(sites())
    record, kept = run(models, tmp_path / "run", grid)
    assert (record.status, record.error, record.engine, record.seed) == ("completed", None, "local", 3)
    assert [site.site for site in record.sites] == sorted(NAMES)
    assert all(site.can_take_part and site.reason == "OK" and not site.lost_turns for site in record.sites)
    assert set(record.models) == {"old_encoder", "new_encoder", "task_head"}
    assert {"fedbridge", "flwr", "torch", "numpy", "python"} <= set(record.versions)
    assert record.bridge is not None
    count = WIDTH_NEW * 2 + 2 * TOKENS_OLD * 4 + 4 * WIDTH_OLD
    assert record.bridge.parameters == count == sum(array.size for array in kept.values())
    chain = load_chain(tmp_path / "run" / "bridge")
    assert (chain.m, chain.l) == (1, 2)
    np.testing.assert_array_equal(chain.bridge.arrays()["A"], kept["A"])


def test_bytes_are_those_on_the_wire(models: Models, tmp_path: Path) -> None:
    grid = WireGrid(sites())
    record, _ = run(models, tmp_path / "run", grid, evaluate={"final": False})
    arrays_up = {"probe_scores", "similarity_scores", "update.A", "update.B", "update.P"}
    counted = {row.item: row for row in record.outbox if row.site == "alpha"}
    assert set(counted) == {*arrays_up, "site", "can_take_part", "reason", "weight", "train_loss"}
    headers = 128 * sum(row.count for row in record.outbox if row.item in arrays_up)
    assert sum(row.bytes for row in record.outbox if row.item in arrays_up) == grid.bytes_up - headers
    assert sum(each.bytes_down for each in record.rounds) == grid.bytes_down
    assert counted["update.A"].count == 3
    assert counted["update.A"].bytes == 3 * WIDTH_NEW * 2 * 4
    assert counted["weight"].bytes == 3 * 8
    assert counted["train_loss"].purpose == "follow the training"
    # Of a round: three arrays, a weight and a loss from each of five sites.
    assert record.bridge is not None
    assert record.rounds[0].bytes_up == 5 * (3 * 128 + 4 * record.bridge.parameters + 2 * 8)


def test_sites_are_asked_what_the_protocol_says(models: Models, tmp_path: Path) -> None:
    members = sites()
    run(models, tmp_path / "run", WireGrid(members), train={"rounds": 2}, evaluate={"every": 2})
    positions = {"input-position": 1, "output-position": 2}
    assert members[0].seen == [
        ("query.describe", {}),
        ("query.probe", {}),
        ("query.similarity", {"input-position": 1}),
        ("train", {"round": 1, **positions}),
        ("train", {"round": 2, **positions}),
        ("evaluate", {"round": 2, "split": "validation", **positions}),
        ("evaluate", {"round": 2, "split": "test", **positions}),
    ]


def test_losses_are_averaged_over_the_sites_that_permit_them(models: Models, tmp_path: Path) -> None:
    members = sites()
    silent = {"alpha", "zeta"}
    for site in members:
        site.loss = site.name not in silent
    record, _ = run(models, tmp_path / "run", WireGrid(members))
    for each in record.rounds:
        told = [site.train_loss(each.round) for site in members if site.loss]
        assert each.loss == pytest.approx(np.mean(told), abs=1e-12)
    record, _ = run(models, tmp_path / "none", WireGrid(sites(loss=False)))
    assert [each.loss for each in record.rounds] == [None, None, None]


@pytest.mark.parametrize("criterion", ["agreement", "balanced_accuracy", "train_loss"])
def test_the_best_round_is_kept(models: Models, tmp_path: Path, criterion: str) -> None:
    train = {"rounds": 8, "keep": "best", "criterion": criterion}
    start = start_of(models, tmp_path / "start")
    record, kept = run(models, tmp_path / "run", WireGrid(sites()), train=train)
    bridges = [reference("FedAvg", start, rounds, dict.fromkeys(NAMES, 1.0), 0) for rounds in range(1, 9)]
    values = [each.criterion for each in record.rounds]
    assert None not in values
    best = int(np.argmin(values) if criterion == "train_loss" else np.argmax(values))  # type: ignore[arg-type]
    assert record.bridge is not None
    assert record.bridge.kept_round == best + 1
    assert 0 < best + 1 < 8, "the best round should not be the last: choose another seed"
    np.testing.assert_allclose(kept["A"], bridges[best]["A"], rtol=2e-5, atol=2e-6)
    if criterion == "train_loss":
        assert values == [each.loss for each in record.rounds]


def test_the_criterion_is_that_of_the_summed_confusions(models: Models, tmp_path: Path) -> None:
    seen: list[Arrays] = []

    def spy(site: Site, message: Any, honest: Any) -> Any:
        if site.name == "alpha":
            seen.append({k: a.numpy() for k, a in message.content.array_records["arrays"].items()})
        return honest

    members = sites()
    for site in members:
        site.wrong["evaluate"] = spy
    train = {"rounds": 4, "keep": "best", "criterion": "balanced_accuracy"}
    record, _ = run(models, tmp_path / "run", WireGrid(members), train=train, evaluate={"every": 2})
    assert [each.criterion is None for each in record.rounds] == [True, False, True, False]
    for bridge, each in zip(seen, (record.rounds[1], record.rounds[3]), strict=False):
        total = sum(site_confusions(name, bridge, "validation")["confusion.bridge"] for name in NAMES)
        assert each.criterion == pytest.approx(np.mean(np.diag(total) / total.sum(axis=1)), abs=1e-12)
    tested = [site_confusions(name, seen[-1], "test") for name in NAMES]
    bridge = sum(each["confusion.bridge"] for each in tested)
    agreement = sum(each["confusion.agreement"] for each in tested)
    assert record.evaluation.confusion["bridge"] == bridge.tolist()
    metrics = record.evaluation.bridge
    assert metrics is not None
    assert metrics.balanced_accuracy is not None
    assert metrics.agreement is not None
    assert metrics.balanced_accuracy.value == pytest.approx(np.mean(np.diag(bridge) / bridge.sum(axis=1)))
    assert metrics.agreement.value == pytest.approx(np.trace(agreement) / agreement.sum())
    assert metrics.balanced_accuracy.low is None
    assert record.evaluation.interval.startswith("none: ")
    assert record.evaluation.windows == agreement.sum()
    assert record.evaluation.chance is not None
    assert record.evaluation.chance.balanced_accuracy is not None
    assert record.evaluation.chance.balanced_accuracy.value == pytest.approx(1 / 3)


@pytest.mark.parametrize("criterion", ["agreement", "balanced_accuracy", "train_loss"])
def test_keep_best_without_permission_stops_the_run(models: Models, tmp_path: Path, criterion: str) -> None:
    train = {"rounds": 3, "keep": "best", "criterion": criterion}
    with pytest.raises(RunError, match="no site sends"):
        run(models, tmp_path / "run", WireGrid(sites(loss=False, confusions=False)), train=train)
    record = read_record(tmp_path / "run")
    assert record.status == "failed"
    assert record.error is not None
    assert "permits" in record.error


def test_without_permitted_confusions_the_result_is_null(models: Models, tmp_path: Path) -> None:
    record, _ = run(models, tmp_path / "run", WireGrid(sites(confusions=False)))
    assert record.status == "completed"
    assert record.evaluation.bridge is None
    assert record.evaluation.confusion == {}


def test_log_tells_each_step(models: Models, tmp_path: Path) -> None:
    run(models, tmp_path / "run", WireGrid(sites()))
    events = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    names = [each["event"] for each in events]
    assert names == [
        *("describe", "describe", "probe", "probe", "similarity", "similarity", "checkpoint"),
        *("round", "round", "round", "evaluate", "evaluate", "export", "export", "finished"),
    ]
    rounds = [each for each in events if each["event"] == "round"]
    assert [(each["round"], each["rounds"], each["sites"]) for each in rounds] == [(1, 3, 5), (2, 3, 5), (3, 3, 5)]
    assert events[3] | {"time": ""} == {"time": "", "event": "probe", "state": "done", "sites": 5, "position": 1}


def test_strategies_that_can_do_nothing_say_so(models: Models, tmp_path: Path) -> None:
    for name, text in (("FedTrimmedAvg", "cuts none"), ("Krum", "promises nothing")):
        strategy = {"name": name, "trim": 0.1, "malicious_sites": 2}
        run(models, tmp_path / name, WireGrid(sites()), strategy=strategy, train={"rounds": 1})
        assert text in (tmp_path / name / "log.jsonl").read_text()
