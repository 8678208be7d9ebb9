"""Rivals as controls: what they learn from, how they are named, what they cost, and where it is shown."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bridge.encoders.loading import load_encoder
from bridge.errors import ConfigError
from client.features import features
from client.site import Site, open_site
from client.windowing import WindowTable
from server.record import Cost, Evaluation, RunRecord, read_record
from server.report.costs import costs_table
from simulations.config import BootstrapConfig, load_simulation
from simulations.controls import _tasks, join_sites
from simulations.evaluation import Predictions, evaluate
from simulations.prepare import site_folders
from simulations.rivals import lessons_of, new_windows, pooled_old, rival_of, train_rival
from simulations.run import run
from tests.conftest import ROOT
from tests.server import runs
from tests.simulations.studies import SMOKE, tiny

CLASSES = ["rest", "walk", "stress"]
COST = Cost(parameters=100, seconds=2.0, cpu_seconds=1.5, peak_bytes=400_000_000, added_bytes=30_000_000)


@pytest.fixture(scope="module")
def site(prepared: Path) -> Site:
    return open_site(prepared / "sites" / "site-0")


def test_the_windows_are_those_behind_the_features(site: Site) -> None:
    pairs = features(site, "pair")
    windows = new_windows(site, "pair", pairs)
    encoder = load_encoder(site.model_folder("new_encoder"))
    with torch.no_grad():
        outputs = encoder.taps(torch.from_numpy(windows)).outputs
    assert len(windows) == len(pairs)
    np.testing.assert_allclose(outputs[1].numpy(), pairs.new_output(1), atol=1e-5)


def test_the_teacher_gives_its_logits_and_for_contrast_its_features(site: Site) -> None:
    pairs = features(site, "pair")
    plain, contrast = lessons_of(site, "kd"), lessons_of(site, "kd_contrast")
    assert plain.pooled is None
    assert contrast.pooled is not None
    np.testing.assert_array_equal(plain.logits, pairs.teacher_logits)
    expected = np.stack([pairs.old_tokens([row])[0].mean(axis=0) for row in range(len(pairs))])
    np.testing.assert_allclose(contrast.pooled, expected, atol=1e-6)
    assert pooled_old(pairs).shape == (len(pairs), site.old_card.layouts_out[-1][1])


def test_a_student_of_a_site_leaves_its_models_as_they_are(site: Site) -> None:
    before = {path: path.read_bytes() for path in site.model_folder("new_encoder").iterdir()}
    settings = tiny("rivals.steps=2", "rivals.batch=8").rivals
    student = train_rival("kd", site, settings, seed=0)
    card = site.new_card
    assert student.parameters == card.parameters + (card.layouts_out[-1][1] + 1) * len(site.head_card.classes)
    assert {path: path.read_bytes() for path in site.model_folder("new_encoder").iterdir()} == before


def test_each_rival_is_trained_on_one_machine_and_at_each_hospital(prepared: Path) -> None:
    sites = [open_site(folder) for folder in site_folders(prepared)]
    config = tiny("baselines=[kd_contrast, kd, kd_contrast]", "controls=[site_alone]")
    assert _tasks(config, sites) == [
        "kd_contrast:centralised",
        "kd:centralised",
        "kd_contrast:site_alone:hospital-1",
        "kd_contrast:site_alone:hospital-2",
        "kd:site_alone:hospital-1",
        "kd:site_alone:hospital-2",
        "site_alone:hospital-1",
        "site_alone:hospital-2",
    ]
    assert [rival_of(name) for name in ("kd:centralised", "kd_contrast:site_alone:a", "site_alone:kd", "bridge")] == [
        "kd",
        "kd_contrast",
        None,
        None,
    ]
    assert _tasks(tiny("controls=[]"), sites) == []


def test_rivals_that_are_none_and_settings_out_of_bounds_are_named() -> None:
    for override, words in (
        ("baselines=[distil]", "baselines.0"),
        ("rivals.steps=0", "rivals.steps"),
        ("rivals.batch=1", "rivals.batch"),
        ("rivals.temperature=0", "rivals.temperature"),
        ("rivals.epochs=3", "rivals.epochs"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            load_simulation(SMOKE, [override])
    assert load_simulation(ROOT / "configs" / "demo.yaml").rivals == load_simulation(SMOKE).rivals


def predictions() -> Predictions:
    """Twelve windows of four patients, labels 0, 1, 2 in turn; what each answers is easily counted."""
    labels = np.arange(12) % 3
    names = np.repeat(["p1", "p2", "p3", "p4"], 3)
    table = WindowTable(names, names, np.arange(0, 120, 10, dtype=np.float64), labels, np.array([""] * 12))
    two_right = np.where(labels == 2, 0, labels)
    answers = {
        "bridge": labels,
        "kd:centralised": two_right,
        "kd:site_alone:a": labels,
        "kd:site_alone:b": np.zeros(12, np.int64),
        "site_alone:a": two_right,
    }
    return Predictions(table, labels, answers, {"kd:centralised": COST})


def test_rivals_stand_among_the_controls_by_name() -> None:
    found = evaluate(predictions(), CLASSES, BootstrapConfig(samples=1000), seed=0)
    value = {name: row.balanced_accuracy.value for name, row in found.baselines.items() if row.balanced_accuracy}
    assert value == pytest.approx({"kd:centralised": 2 / 3, "site_alone": 2 / 3, "kd:site_alone": 2 / 3})
    assert set(found.site_alone_per_site) == {"a"}
    assert {rival: set(sites) for rival, sites in found.rivals_per_site.items()} == {"kd": {"a", "b"}}
    worst = found.rivals_per_site["kd"]["b"].balanced_accuracy
    assert worst is not None
    assert worst.value == pytest.approx(1 / 3)
    assert found.costs == {"kd:centralised": COST}


def test_answers_and_costs_are_kept_and_read_again(tmp_path: Path) -> None:
    predictions().save(tmp_path / "predictions.npz")
    again = Predictions.load(tmp_path / "predictions.npz")
    assert again.costs == {"kd:centralised": COST}
    assert list(again.predicted) == list(predictions().predicted)
    again.write_csv(tmp_path / "predictions.csv", CLASSES)
    rows = list(csv.DictReader((tmp_path / "predictions.csv").open()))
    assert list(rows[0])[5:] == ["bridge", "kd:centralised", "kd:site_alone:a", "kd:site_alone:b"]
    assert [row["kd:centralised"] for row in rows[:3]] == ["rest", "walk", "rest"]


def test_several_test_sets_are_joined_without_costs() -> None:
    joined = Predictions.joined([predictions(), predictions()])
    assert len(joined.predicted["kd:centralised"]) == 24
    assert joined.costs == {}


def record_with_costs() -> RunRecord:
    record = runs.completed()
    record["evaluation"]["baselines"] |= {"kd:centralised": runs.metrics(0.74), "kd:site_alone": runs.metrics(0.6)}
    bridge = {"parameters": 15_360, "seconds": 20.0, "cpu_seconds": 18.0}
    memory = {"peak_bytes": 500_000_000, "added_bytes": 20_000_000}
    whole = {"parameters": 268_800, "seconds": 90.0, "cpu_seconds": 80.0}
    record["evaluation"]["costs"] = {
        "centralised": bridge | memory,
        "kd:centralised": whole | memory,
        "kd:site_alone:a": whole | memory | {"seconds": 10.0, "added_bytes": 30_000_000},
        "kd:site_alone:b": whole | memory | {"seconds": 30.0},
    }
    return RunRecord.model_validate(record)


def test_the_table_tells_what_each_way_costs() -> None:
    rows = {row[0]: row[1:] for row in costs_table(record_with_costs()).rows}
    assert rows == {
        "Federated bridge": ("0.76\n0.73–0.80", "15,360", "1.0 ×", "–", "–"),
        "Bridge, one machine": (
            "0.77\n0.74–0.80",
            "15,360",
            "1.0 ×",
            "20 s\n18 s of computing",
            "20.0 MB\n500 MB in all",
        ),
        "KD, one machine": (
            "0.74\n0.71–0.77",
            "268,800",
            "17.5 ×",
            "1 min 30 s\n1 min 20 s of computing",
            "20.0 MB\n500 MB in all",
        ),
        "Bridge, hospital alone (mean)": ("0.70\n0.67–0.74", "–", "–", "–", "–"),
        "KD, hospital alone (mean)": (
            "0.60\n0.57–0.63",
            "268,800",
            "17.5 ×",
            "20 s\n1 min 20 s of computing",
            "30.0 MB\n500 MB in all",
        ),
    }
    assert costs_table(RunRecord.model_validate(runs.completed())).rows == []


def test_memory_and_time_are_those_of_the_training_alone() -> None:
    code = (
        "import time, json, numpy as np\n"
        "from simulations.cost import Meter\n"
        "meter = Meter()\n"
        "held = np.ones(25_000_000)\n"
        "del held\n"
        "time.sleep(0.3)\n"
        "print(meter.read(7).model_dump_json())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    cost = Cost.model_validate(json.loads(done.stdout))
    assert cost.parameters == 7
    assert 190_000_000 <= cost.added_bytes < 230_000_000  # the kernel counts pages in lots
    assert cost.peak_bytes > cost.added_bytes + 50_000_000
    assert cost.seconds >= 0.3
    assert cost.cpu_seconds < cost.seconds


@pytest.mark.slow
def test_a_run_with_rivals_tells_their_figures_and_costs(session_cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = tiny("baselines=[kd, kd_contrast]", "rivals.steps=5", "controls=[centralised, site_alone]", "workers=2")
    evaluation = run(config, out).evaluation
    rivals = {f"{rival}:{where}" for rival in ("kd", "kd_contrast") for where in ("centralised", "site_alone")}
    assert set(evaluation.baselines) == {"centralised", "site_alone"} | rivals
    hospitals = {"hospital-1", "hospital-2"}
    assert {rival: set(found) for rival, found in evaluation.rivals_per_site.items()} == {
        "kd": hospitals,
        "kd_contrast": hospitals,
    }
    _check_costs(evaluation, read_record(out))
    for name in ("kd:centralised", "kd_contrast:site_alone:hospital-2"):
        _check_answers(out, name)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "What each way costs" in page
    assert "KD-Contrast, hospital alone (mean)" in page


def _check_costs(evaluation: Evaluation, record: RunRecord) -> None:
    places = ["centralised", "site_alone:hospital-1", "site_alone:hospital-2"]
    assert set(evaluation.costs) == {f"{way}{place}" for way in ("", "kd:", "kd_contrast:") for place in places}
    assert record.bridge is not None
    old, new, head = (record.models[name] for name in ("old_encoder", "new_encoder", "task_head"))
    width, old_width = new["layouts_out"][-1][1], old["layouts_out"][-1][1]
    whole = new["parameters"] + (width + 1) * len(head["classes"])
    for place in places:
        assert evaluation.costs[place].parameters == record.bridge.parameters
        assert evaluation.costs[f"kd:{place}"].parameters == whole
        assert evaluation.costs[f"kd_contrast:{place}"].parameters == whole + (width + 1 + old_width + 1) * 64
    for cost in evaluation.costs.values():
        assert cost.seconds > 0
        assert cost.cpu_seconds > 0
        assert 0 < cost.added_bytes < cost.peak_bytes


def _check_answers(out: Path, name: str) -> None:
    """The same training in this process gives the answers that the run kept."""
    sites = [open_site(folder) for folder in site_folders(out)]
    join_sites(sites, out / "joined")
    everything = open_site(out / "joined")
    rival = rival_of(name)
    assert rival is not None
    where = everything if name.endswith("centralised") else next(s for s in sites if name.endswith(s.name))
    student = train_rival(rival, where, tiny("rivals.steps=5").rivals, seed=0)
    found = student.classes_of(new_windows(everything, "test", features(everything, "test")))
    kept = Predictions.load(out / "predictions.npz").predicted[name]
    assert (found == kept).mean() > 0.97
