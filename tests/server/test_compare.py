"""Runs side by side: which are repeats of one another, what differs, and the figures in table, page and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from pathlib import Path

import pytest

from bridge.errors import ConfigError
from server.report.compare import comparison_csv, differences, figures_table, load_runs, spreads, write_comparison
from tests.server import runs

VALUES = {0: 0.71, 1: 0.75, 2: 0.74}


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Three seeds of one configuration, one of another, one failed."""
    found = []
    for seed, value in VALUES.items():
        record = runs.completed(seed)
        record["evaluation"]["bridge"] = runs.metrics(value)
        found.append(runs.write_run(tmp_path / f"seed-{seed}", record))
    other = runs.completed(0) | {"config": runs.config(0, rounds=40)}
    found.append(runs.write_run(tmp_path / "long", other))
    found.append(runs.write_run(tmp_path / "broken", runs.failed_early()))
    return found


def test_mean_and_spread_over_runs_that_differ_only_in_seed(folders: list[Path]) -> None:
    (spread,) = spreads(load_runs(folders))
    assert [run.label for run in spread.runs] == ["seed-0", "seed-1", "seed-2"]
    mean, deviation = spread.figures["bridge"]
    assert mean == pytest.approx(2.20 / 3)
    assert deviation == pytest.approx(((0.71 - mean) ** 2 + (0.75 - mean) ** 2 + (0.74 - mean) ** 2) ** 0.5 / 2**0.5)
    assert spread.figures["chance"] == (pytest.approx(1 / 3), pytest.approx(0))


def test_another_engine_or_a_figure_that_one_run_lacks_is_no_repeat(tmp_path: Path) -> None:
    local = runs.write_run(tmp_path / "local", runs.completed(0))
    flower = runs.write_run(tmp_path / "flower", runs.completed(1) | {"engine": "flower"})
    assert spreads(load_runs([local, flower])) == []
    without = runs.completed(2)
    del without["evaluation"]["baselines"]["centralised"]
    (spread,) = spreads(load_runs([local, runs.write_run(tmp_path / "without", without)]))
    assert "centralised" not in spread.figures
    assert "bridge" in spread.figures


def test_another_cohort_or_split_is_no_repeat(tmp_path: Path) -> None:
    folders = [runs.write_run(tmp_path / str(seed), runs.completed(seed)) for seed in range(3)]
    for folder, split_seed in zip(folders, (5, 5, 6), strict=True):
        text = f"seed: {folder.name}\nsplit:\n  seed: {split_seed}\n"
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    loaded = load_runs(folders)
    (spread,) = spreads(loaded)
    assert [run.label for run in spread.runs] == ["0", "1"]
    assert differences(loaded).rows[-2:] == [
        ("seed", "0", "1", "2"),
        ("simulation.split.seed", "5", "5", "6"),
    ]


def test_the_same_seed_twice_is_no_spread(tmp_path: Path) -> None:
    twice = [runs.write_run(tmp_path / name, runs.completed(0)) for name in ("a", "b")]
    assert spreads(load_runs(twice)) == []


def test_only_keys_that_differ_are_listed(folders: list[Path]) -> None:
    table = differences(load_runs([folders[0], folders[1], folders[3]]))
    assert table.heads == ("Key", "seed-0", "seed-1", "long")
    assert table.rows == [
        ("name", "ppg-for-ecg-0", "ppg-for-ecg-1", "ppg-for-ecg-0"),
        ("seed", "0", "1", "0"),
        ("train.rounds", "20", "20", "40"),
    ]


def test_a_key_that_one_run_lacks_is_named(tmp_path: Path) -> None:
    shorter = runs.completed(0)
    del shorter["config"]["train"]["criterion"]
    found = [runs.write_run(tmp_path / "a", runs.completed(0)), runs.write_run(tmp_path / "b", shorter)]
    assert differences(load_runs(found)).rows == [("train.criterion", "agreement", "(none)")]


def test_runs_of_one_name_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    paths = [runs.write_run(tmp_path / study / "run", runs.completed()) for study in ("first", "second")]
    assert [run.label for run in load_runs(paths)] == ["first/run", "second/run"]
    with pytest.raises(ConfigError, match="named twice"):
        load_runs([paths[0], tmp_path / "second" / ".." / "first" / "run"])


def test_the_table_ends_with_the_mean(folders: list[Path]) -> None:
    table = figures_table(load_runs(folders))
    column = table.heads.index("Bridge")
    assert [row[column] for row in table.rows] == [
        "0.71\n0.68–0.74",
        "0.75\n0.72–0.78",
        "0.74\n0.71–0.77",
        "0.76\n0.73–0.80",
        "–",
        f"0.733\n± {statistics.stdev(VALUES.values()):.3f}",
    ]
    assert table.strong == {5}


def test_the_csv_holds_every_figure(folders: list[Path]) -> None:
    lines = list(csv.DictReader(io.StringIO(comparison_csv(load_runs(folders)))))
    assert [line["run"] for line in lines] == ["seed-0", "seed-1", "seed-2", "long", "broken"]
    first, broken = lines[0], lines[-1]
    assert float(first["bridge.balanced_accuracy.value"]) == 0.71
    assert float(first["site_alone.f1_macro.low"]) == pytest.approx(0.702 - 0.01 - 0.034)
    assert int(first["bytes_left_sites"]) == sum(row["bytes"] for row in runs.completed()["outbox"])
    assert first["chance.balanced_accuracy.low"] == ""
    assert (broken["status"], broken["input_position"], broken["bridge.balanced_accuracy.value"]) == ("failed", "", "")


def test_the_page_shows_runs_spread_and_failures(folders: list[Path], tmp_path: Path) -> None:
    text = write_comparison(load_runs(folders), tmp_path / "compare.html").read_text(encoding="utf-8")
    assert text.count("<svg") == 1
    for words in (
        "Mean of 3 seeds",
        "broken failed.",
        "ask &lt;hospital-c&gt; &amp; run",
        "train.rounds",
        "chance 0.33",
    ):
        assert words in text
    assert "<script" not in text


def test_runs_without_any_figure_are_compared_too(tmp_path: Path) -> None:
    paths = [runs.write_run(tmp_path / name, runs.failed_early()) for name in ("a", "b")]
    text = write_comparison(load_runs(paths), tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "None of the runs has a balanced accuracy to draw." in text
    assert "Nowhere." in text
