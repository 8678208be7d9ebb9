"""Sweeps: which runs a grid asks for, rows that survive, intervals by hand computation, and real runs side by side."""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from scipy.stats import t

from bridge.errors import ConfigError
from server.errors import RunFolderError
from server.record import Evaluation, Metric, Metrics
from simulations.cli import main
from simulations.sweep.execute import run_sweep, side_by_side
from simulations.sweep.grid import Point, SweepConfig, expand, load_sweep
from simulations.sweep.page import write_page
from simulations.sweep.summary import summary
from simulations.sweep.table import Row, csv_text, figures
from tests.conftest import ROOT
from tests.simulations.studies import SMOKE, TINY
from tests.simulations.work import dies, doubled, refused

PRIVATE = {
    "name": "base",
    "train": {"rounds": 2, "local_steps": 1},
    "privacy": {"selection": {"epsilon": 0.1}, "metrics": {"epsilon": 1.0}},
}


def sweep(grid: dict[str, Any], **keys: Any) -> SweepConfig:
    """A sweep as its file gives it: the base with all its keys."""
    base = yaml.safe_load(_config(keys.pop("base", PRIVATE)).text())
    return SweepConfig.model_validate({"schema": "fedbridge.sweep/1", "name": "s", "base": base, "grid": grid, **keys})


def _config(content: dict[str, Any]) -> Any:
    from simulations.config import SimulationConfig

    return SimulationConfig.model_validate(content)


def labels(points: list[Point]) -> list[tuple[Any, ...]]:
    return [(*point.labels.values(), point.seed) for point in points]


def test_a_grid_is_every_combination_with_every_seed() -> None:
    points = expand(sweep({"train.rounds": [1, 5], "bridge": {"a": {}, "b": {"bridge.rank": 3}}}, seeds=[4, 2]))
    assert labels(points) == [(r, b, s) for r in (1, 5) for b in ("a", "b") for s in (4, 2)]
    assert [(p.config.train.rounds, p.config.bridge.rank, p.config.seed) for p in points] == [
        (r, k, s) for r in (1, 5) for k in (8, 3) for s in (4, 2)
    ]
    assert len({point.key for point in points}) == 8


def test_no_epsilon_and_no_mechanism_are_one_run() -> None:
    grid = {"privacy.mechanism": ["none", "local", "central"], "privacy.epsilon": [1, "none"], "train.rounds": [1, 2]}
    points = expand(sweep(grid))
    assert sorted(labels(points), key=str) == sorted(
        [(m, e, r, 0) for r in (1, 2) for m, e in (("none", "none"), ("local", 1), ("central", 1))], key=str
    )
    plain = [point.config.privacy for point in points if point.labels["privacy.mechanism"] == "none"]
    assert [(each.mechanism, each.epsilon) for each in plain] == [("none", None)] * 2


def test_rules_set_and_skip_where_their_axes_have_the_values() -> None:
    rules = [
        {"where": {"privacy.mechanism": "central", "train.rounds": [2, 3]}, "set": {"train.learning_rate": 0.5}},
        {"where": {"train.rounds": 3, "privacy.mechanism": "none"}, "skip": True},
        {"where": {"privacy.epsilon": None}, "set": {"train.local_steps": 7}},
    ]
    grid = {"privacy.mechanism": ["central"], "privacy.epsilon": [1.0, None], "train.rounds": [1, 2, 3]}
    found = {
        (p.labels["privacy.epsilon"], p.labels["train.rounds"]): (
            p.config.train.learning_rate,
            p.config.train.local_steps,
        )
        for p in expand(sweep(grid, rules=rules))
    }
    assert found == {
        (1.0, 1): (1e-3, 1),
        (1.0, 2): (0.5, 1),
        (1.0, 3): (0.5, 1),
        ("none", 1): (1e-3, 7),
        ("none", 2): (1e-3, 7),
    }


def test_seeded_noise_is_another_for_each_seed() -> None:
    base = PRIVATE | {"privacy": {"simulation_seed": 5}}
    points = expand(sweep({"train.rounds": [1]}, seeds=[3, 4], base=base))
    assert [point.config.privacy.simulation_seed for point in points] == [3, 4]
    assert [p.config.privacy.simulation_seed for p in expand(sweep({"train.rounds": [1]}, seeds=[3]))] == [None]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"grid": {"train.ronds": [1]}}, "did you mean 'rounds'"),
        ({"grid": {"train.rounds": [0]}}, "at train.rounds 0"),
        ({"grid": {"train.rounds": []}}, "axis 'train.rounds' has no value"),
        ({"curves": {"x": "train.steps"}}, "'train.steps' is no axis"),
        ({"rules": [{"where": {"train.steps": 1}, "skip": True}]}, "'train.steps' is no axis"),
        ({"rules": [{"where": {"train.rounds": 1}}]}, "either `set`"),
        ({"rules": [{"where": {"train.rounds": 1}, "skip": True}]}, "skip every point"),
        ({"base": None}, "key 'base' is missing"),
        ({"base": "nowhere.yaml"}, "can't be read"),
        ({"seed": [1]}, "did you mean 'seeds'"),
    ],
)
def test_what_is_wrong_in_a_sweep_is_told(content: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    whole = {"schema": "fedbridge.sweep/1", "name": "s", "base": PRIVATE, "grid": {"train.rounds": [1]}} | content
    path.write_text(yaml.safe_dump(whole), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        expand(load_sweep(path))
    assert told in str(caught.value).replace("'train.rounds'?", "'rounds'?")


def test_overrides_reach_seeds_axes_and_the_base(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        yaml.safe_dump({"schema": "fedbridge.sweep/1", "name": "s", "base": str(SMOKE), "grid": {"train.rounds": [1]}}),
        encoding="utf-8",
    )
    asked = ["seeds=[7]", "grid.train.rounds=[2, 3]", "base.bridge.rank=5", "grid.bridge={a: {bridge.prototypes: 9}}"]
    points = expand(load_sweep(tmp_path / "sweep.yaml", asked))
    assert labels(points) == [(2, "a", 7), (3, "a", 7)]
    assert {(p.config.bridge.rank, p.config.bridge.prototypes) for p in points} == {(5, 9)}


def test_the_ready_example_has_the_runs_that_it_promises() -> None:
    points = expand(load_sweep(ROOT / "configs" / "tradeoff.yaml", ["seeds=[0, 1, 2, 3, 4]"]))
    once = [(p.labels["privacy.mechanism"], p.labels["privacy.epsilon"], p.labels["bridge"]) for p in points]
    bridges = ("paper", "factored", "closed_form")
    wanted = {(m, e, b) for m in ("local", "central") for e in (0.5, 1, 2, 4, 8) for b in bridges}
    assert set(once) == wanted | {("none", "none", b) for b in bridges}
    assert len(once) == 5 * len(set(once))
    for point in points:
        assert point.config.privacy.mechanism == point.labels["privacy.mechanism"]
        assert (point.config.partition.hospitals, point.config.data.source) == (8, "builtin")


def metric(value: float, below: float, above: float) -> Metric:
    return Metric(value=value, low=value - below, high=value + above)


def test_an_interval_over_seeds_and_patients_is_that_of_the_hand_computation() -> None:
    found = summary([metric(0.6, 0.1, 0.05), metric(0.7, 0.2, 0.05), metric(0.62, 0.15, 0.05)])
    assert found is not None
    values = [0.6, 0.7, 0.62]
    half = t.ppf(0.975, 2) * statistics.stdev(values) / 3**0.5
    assert found.value == pytest.approx(0.64)
    assert (found.seeds_low, found.seeds_high) == pytest.approx((0.64 - half, 0.64 + half))
    assert found.low == pytest.approx(0.64 - (half**2 + 0.15**2) ** 0.5)
    assert found.high == pytest.approx(0.64 + (half**2 + 0.05**2) ** 0.5)


def test_one_seed_has_the_patients_interval_alone_and_none_has_nothing() -> None:
    found = summary([metric(0.6, 0.1, 0.05)])
    assert found is not None
    assert (found.low, found.high) == pytest.approx((0.5, 0.65))
    assert found.seeds_low is None
    assert summary([]) is None
    assert summary([Metric(value=0.5)]).low is None  # type: ignore[union-attr]
    wide = summary([metric(0.1, 0.05, 0.05), metric(0.9, 0.05, 0.05)])
    assert wide is not None
    assert (wide.low, wide.high) == (0.0, 1.0)


def row(seed: int, value: float, **keys: Any) -> Row:
    found = {
        "bridge": Metrics(balanced_accuracy=metric(value, 0.1, 0.1)),
        "chance": Metrics(balanced_accuracy=Metric(value=1 / 3)),
    }
    return Row(key=f"k{seed}", labels={"privacy.epsilon": 1.0}, seed=seed, status="completed", figures=found, **keys)


def test_the_table_has_one_line_a_run_and_a_column_a_figure() -> None:
    rows = [row(0, 0.7, threat_model="local", epsilon=0.99, delta=1e-3, parameters=12), row(1, 0.5)]
    failed = Row(key="f", labels={"privacy.epsilon": 2.0}, seed=0, status="failed", error="too few\nWhy: so")
    lines = list(csv.DictReader(csv_text([*rows, failed]).splitlines(keepends=True)))
    assert [line["bridge.balanced_accuracy"] for line in lines] == ["0.7", "0.5", ""]
    assert (lines[0]["pair_epsilon"], lines[0]["parameters"], lines[0]["privacy.epsilon"]) == ("0.99", "12", "1.0")
    assert float(lines[0]["bridge.balanced_accuracy.low"]) == pytest.approx(0.6)
    assert (lines[2]["status"], lines[2]["error"]) == ("failed", "too few\nWhy: so")


def test_the_true_figures_of_a_private_run_stand_beside_its_record(finished: Path, tmp_path: Path) -> None:
    plain = figures(finished)
    assert plain.bridge is not None
    (tmp_path / "run.json").write_bytes((finished / "run.json").read_bytes())
    true = Evaluation(bridge=Metrics(balanced_accuracy=Metric(value=0.123)))
    (tmp_path / "simulated_evaluation.json").write_text(true.model_dump_json(), encoding="utf-8")
    assert figures(tmp_path) == true
    (tmp_path / "simulated_evaluation.json").write_text("{", encoding="utf-8")
    with pytest.raises(RunFolderError, match="is not an evaluation"):
        figures(tmp_path)


def test_a_task_that_raises_or_dies_is_told_and_the_others_are_done(tmp_path: Path) -> None:
    tasks: dict[str, Any] = {f"good-{i}": (doubled, i) for i in range(3)}
    tasks |= {"bad": (refused, 5), "dead": (dies, tmp_path)}
    found = dict(side_by_side(tasks, workers=1))
    assert [found[f"good-{i}"] for i in range(3)] == [0, 2, 4]
    assert found["bad"] == "ValueError: not 5"
    assert "twice" in found["dead"]
    assert len(list(tmp_path.iterdir())) == 2


def tiny_sweep(path: Path, **keys: Any) -> Path:
    """A sweep of runs that take seconds, in a file."""
    from simulations.config import load_simulation

    base = yaml.safe_load(load_simulation(SMOKE, [*TINY, "controls=[]", "train.rounds=1"]).text())
    grid = {"train.local_steps": [1, 2]}
    content = {"schema": "fedbridge.sweep/1", "name": "tiny", "base": base, "grid": grid, **keys}
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def test_a_sweep_computes_what_is_missing_and_nothing_else(session_cache: Path, tmp_path: Path) -> None:
    path = tiny_sweep(tmp_path / "s.yaml", curves={"x": "train.local_steps"})
    wrong = {"wrong": {"data.source": "eegmat", "data.eegmat": {"folder": "/nowhere"}}, "right": {}}
    seen: list[tuple[str, int, int]] = []

    def progress(what: str, done: int, total: int) -> None:
        seen.append((what, done, total))

    first = run_sweep(load_sweep(path), tmp_path / "out", workers=1, progress=progress)
    assert [each.status for each in first] == ["completed", "completed"]
    assert seen[-1] == ("runs", 2, 2)
    for each in first:
        assert each.figure("bridge") is not None
        assert each.figure("teacher") is not None
        folder = tmp_path / "out" / "runs" / each.key
        assert (folder / "run.json").is_file()
        assert not (folder / "sites").exists()
    before = {each: each.stat().st_mtime_ns for each in (tmp_path / "out" / "rows").iterdir()}

    with pytest.raises(RunFolderError, match="already holds a sweep"):
        run_sweep(load_sweep(path), tmp_path / "out", workers=1, progress=progress)
    grown = load_sweep(path, [f"grid.data={json.dumps(wrong)}", "grid.train.local_steps=[2]"])
    second = run_sweep(grown, tmp_path / "out", workers=1, resume=True, progress=progress)
    assert [(each.labels["data"], each.status) for each in second] == [("wrong", "failed"), ("right", "completed")]
    assert "no recordings" in (second[0].error or "")
    assert second[1].figures == first[1].figures
    assert {each: each.stat().st_mtime_ns for each in before} == before  # nothing was computed again
    rows = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))["rows"]
    assert [each["key"] for each in rows] == [each.key for each in second]

    page = write_page(load_sweep(path), first, tmp_path / "out").read_text(encoding="utf-8")
    assert "<svg" in page
    assert (tmp_path / "out" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert "1 run failed" in write_page(grown, second, tmp_path / "out").read_text(encoding="utf-8")


def test_another_folder_is_left_alone(tmp_path: Path) -> None:
    path = tiny_sweep(tmp_path / "s.yaml")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "precious.txt").touch()
    with pytest.raises(SystemExit) as ended:
        main(["sweep", str(path), "--out", str(tmp_path / "notes"), "--overwrite"])
    assert ended.value.code != 0
    assert [each.name for each in (tmp_path / "notes").iterdir()] == ["precious.txt"]


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_stood(session_cache: Path, tmp_path: Path) -> None:
    path = tiny_sweep(tmp_path / "s.yaml", seeds=[0, 1])
    command = [sys.executable, "-c", "from simulations.cli import main; main()", "sweep", str(path), "--quiet"]
    whole = subprocess.run([*command, "--out", str(tmp_path / "whole")], check=True, capture_output=True, text=True)
    assert "4 runs, 0 failed" in whole.stdout
    killed = subprocess.Popen([*command, "--out", str(tmp_path / "killed")], stdout=subprocess.DEVNULL)
    rows = tmp_path / "killed" / "rows"
    while not rows.is_dir() or not list(rows.glob("*.json")):
        assert killed.poll() is None
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(list(rows.glob("*.json"))) < 4
    again = subprocess.run(
        [*command, "--resume", "--out", str(tmp_path / "killed")], check=True, capture_output=True, text=True
    )
    assert "4 runs, 0 failed" in again.stdout
    tables = [json.loads((tmp_path / name / "results.json").read_text())["rows"] for name in ("whole", "killed")]
    for one, other in zip(*tables, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}


def test_a_private_row_has_the_statements_epsilons_and_both_kinds_of_figures(
    session_cache: Path, tmp_path: Path
) -> None:
    private = {"privacy.mechanism": "local", "privacy.epsilon": 3.0, "privacy.metrics.epsilon": 2.0}
    chosen = {"selection": {"mode": "fixed", "input_position": 1, "output_position": 1}}
    path = tiny_sweep(tmp_path / "s.yaml", grid={"kind": {"private": private | chosen}})
    (found,) = run_sweep(load_sweep(path), tmp_path / "out", workers=1, progress=lambda what, done, total: None)
    assert (found.status, found.threat_model) == ("completed", "local")
    assert found.epsilon == pytest.approx(3.0, abs=1e-3)
    assert found.test_epsilon == pytest.approx(2.0, abs=1e-3)
    assert found.seconds > 0
    true, released = found.figure("bridge"), found.released
    assert true is not None
    assert released is not None
    assert released.balanced_accuracy is not None
    assert released.balanced_accuracy.value != true.value
