"""The claims of the demonstration, from its own run record."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.end_to_end.commands import call

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def made_by_make_demo() -> Path | None:
    """The run of `make demo`, where it is whole and no code or configuration changed since."""
    run = ROOT / "runs" / "demo"
    if not (run / "report.html").is_file():
        return None
    sources = [ROOT / "configs" / "demo.yaml"]
    sources += [path for name in ("bridge", "client", "server", "simulations") for path in (ROOT / name).rglob("*.py")]
    newest = max(path.stat().st_mtime for path in sources)
    return run if (run / "config.yaml").stat().st_mtime > newest else None


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (made := made_by_make_demo()) is not None:
        return made
    run = tmp_path_factory.mktemp("demo") / "run"
    printed = call("fedbridge-sim", "run", ROOT / "configs" / "demo.yaml", "--out", run, timeout=900)
    assert printed.rstrip().endswith(str(run / "report.html"))
    return run


def test_the_bridge_beats_shuffled_pairs_and_the_mean_hospital_alone(demo: Path) -> None:
    evaluation = json.loads((demo / "run.json").read_text(encoding="utf-8"))["evaluation"]
    bridge = evaluation["bridge"]["balanced_accuracy"]
    shuffled = evaluation["baselines"]["shuffled_pairs"]["balanced_accuracy"]
    alone = evaluation["baselines"]["site_alone"]["balanced_accuracy"]
    assert bridge["low"] > shuffled["high"]
    assert bridge["value"] > alone["value"]
    assert evaluation["teacher"]["balanced_accuracy"]["value"] > bridge["value"]


def test_the_exported_bridge_gives_the_evaluation_exactly(demo: Path, tmp_path: Path) -> None:
    """Each site, in a fresh process that reads the new modality alone."""
    with (demo / "predictions.csv").open(encoding="utf-8", newline="") as file:
        evaluated = {(row["recording"], float(row["start_seconds"])): row["bridge"] for row in csv.DictReader(file)}
    predicted: dict[tuple[str, float], str] = {}
    for site in sorted((demo / "sites").glob("site-*")):
        out = tmp_path / f"{site.name}.csv"
        call("fedbridge-site", "predict", demo / "bridge", site, "--split", "test", "--out", out)
        with out.open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                predicted[row["recording"], float(row["start_seconds"])] = row["prediction"]
    # Windows that the old modality's artefacts kept out of the evaluation are predicted, too.
    assert set(evaluated) <= set(predicted)
    assert {key: predicted[key] for key in evaluated} == evaluated
    assert len(set(evaluated.values())) == 3
