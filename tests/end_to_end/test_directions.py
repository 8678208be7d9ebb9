"""Every published direction through the real commands, on made-up recordings and filled weights of full size."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from bridge.chain import load_chain, read_manifest
from tests.conftest import ROOT
from tests.end_to_end.commands import attempt, call

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]


@dataclass(frozen=True)
class Direction:
    """What a configuration's run must show."""

    models: tuple[str, str]
    """Families of the old and the new encoder."""
    positions: tuple[int, int]
    """Number of old and of new positions."""
    classes: int
    windows: int
    """Of each patient."""
    forbidden: bool
    """Whether a licence among them forbids commercial use."""


DIRECTIONS = {
    "isruc_eeg2ecg": Direction(("labram", "hubert-ecg"), (12, 8), 2, 4, True),
    "isruc_ecg2eeg": Direction(("hubert-ecg", "labram"), (8, 12), 2, 4, True),
    "wesad_ppg2ecg": Direction(("papagei", "hubert-ecg"), (18, 8), 3, 6, True),
    "wesad_ecg2ppg": Direction(("hubert-ecg", "papagei"), (8, 18), 3, 6, True),
    "fog_eeg2emg": Direction(("labram", "normwear"), (12, 12), 2, 2, False),
    "fog_emg2eeg": Direction(("normwear", "labram"), (12, 12), 2, 2, False),
    "wesad_ppg2ecg_ecgfm": Direction(("papagei", "ecg-fm"), (18, 12), 3, 3, False),
}
PHASES = ["describe", "probe", "similarity", "round", "evaluate", "export"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """One cache for all: a file's conversion is used by each direction that reads it."""
    return {"FEDBRIDGE_CACHE": str(tmp_path_factory.mktemp("cache"))}


def parameters(record: dict[str, Any]) -> int:
    """The bridge's parameters by hand, at the positions that were chosen."""
    new = record["models"]["new_encoder"]["layouts_out"][record["selection"]["input_position"]]
    tokens, width = record["models"]["old_encoder"]["layouts_in"][record["selection"]["output_position"]]
    rank, prototypes = record["bridge"]["rank"], record["bridge"]["prototypes"]
    return int(new[1] * rank + rank * tokens * prototypes + prototypes * width)


@pytest.mark.parametrize("name", DIRECTIONS)
def test_a_direction_runs(tmp_path: Path, cache: Mapping[str, str], name: str) -> None:
    wanted = DIRECTIONS[name]
    made = tmp_path / "made"
    printed = call("fedbridge-sim", "made-up", ROOT / "configs" / f"{name}.yaml", "--out", made)
    assert "NO RESULT MEANS ANYTHING" in printed
    assert f"fedbridge-sim run {made / 'config.yaml'} --out" in printed

    plan = json.loads(call("fedbridge-sim", "plan", made / "config.yaml", "--json", extra=cache))
    call("fedbridge-sim", "run", made / "config.yaml", "--out", tmp_path / "run", "--quiet", extra=cache, timeout=1400)
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()]

    assert record["status"] == "completed"
    done = [each["event"] for each in log if each["event"] == "round" or each.get("state") == "done"]
    assert list(dict.fromkeys(done)) == PHASES
    assert done.count("round") == 2
    assert [site["can_take_part"] for site in record["sites"]] == [True, True]
    models = [record["models"][f"{side}_encoder"] for side in ("old", "new")]
    assert tuple(model["family"] for model in models) == wanted.models
    assert tuple(len(model["layouts_in"]) for model in models) == wanted.positions
    uses = {model["training"]["commercial_use"] for model in models}
    assert ("forbidden" in uses) == wanted.forbidden

    selection = record["selection"]
    assert selection["mode"] == "scores"
    assert len(selection["similarity_scores"]["aggregate"]) == wanted.positions[0]
    assert len(selection["probe_scores"]["aggregate"]) == wanted.positions[1]
    assert record["bridge"]["parameters"] == parameters(record)
    assert plan["bridge"]["parameters_least"] <= parameters(record) <= plan["bridge"]["parameters"]
    assert [each["round"] for each in record["rounds"]] == [1, 2]
    assert all(len(each["sites"]) == 2 and each["bytes_up"] > 0 for each in record["rounds"])
    evaluation = record["evaluation"]
    assert evaluation["patients"] == 3
    assert evaluation["windows"] == 3 * wanted.windows
    assert len(evaluation["classes"]) == wanted.classes
    assert evaluation["baselines"] == {}
    assert (tmp_path / "run" / "report.html").is_file()

    bridge = tmp_path / "run" / "bridge"
    assert read_manifest(bridge).classes == tuple(evaluation["classes"])
    load_chain(bridge)
    _check_predictions(tmp_path, bridge, evaluation["classes"], wanted.windows, cache)


def _check_predictions(
    tmp_path: Path, bridge: Path, classes: list[str], windows: int, cache: Mapping[str, str]
) -> None:
    """A site's test windows, each in a row, as the evaluation had them."""
    with (tmp_path / "run" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        evaluated = {(row["recording"], float(row["start_seconds"])): row["bridge"] for row in csv.DictReader(file)}
    site, out = tmp_path / "run" / "sites" / "site-0", tmp_path / "predicted.csv"
    call("fedbridge-site", "predict", bridge, site, "--split", "test", "--out", out, extra=cache)
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    patients = {row["patient"] for row in rows}
    assert patients
    assert len(rows) == windows * len(patients)
    for row in rows:
        shares = [float(row[f"probability_{label}"]) for label in classes]
        assert sum(shares) == pytest.approx(1, abs=1e-5)
        assert row["prediction"] == evaluated[row["recording"], float(row["start_seconds"])]


def test_the_paper_s_positions_run_as_fixed_ones(tmp_path: Path, cache: Mapping[str, str]) -> None:
    """The bridge has the published number of parameters, and no position is scored."""
    made = tmp_path / "made"
    call("fedbridge-sim", "made-up", ROOT / "configs" / "wesad_ppg2ecg.yaml", "--out", made)
    call(
        "fedbridge-sim", "run", made / "config.yaml", "--out", tmp_path / "run", "--quiet", "--set",
        "selection={mode: fixed, input_position: 7, output_position: 11}", extra=cache, timeout=600,
    )  # fmt: skip
    record = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert record["bridge"]["parameters"] == 398_784
    assert (record["selection"]["input_position"], record["selection"]["output_position"]) == (7, 11)
    assert record["selection"]["probe_scores"] is None


def test_other_sources_and_places_are_refused(tmp_path: Path) -> None:
    code, printed = attempt("fedbridge-sim", "made-up", ROOT / "configs" / "demo.yaml", "--out", tmp_path / "made")
    assert code == 2, printed
    assert "isruc, wesad, fog" in printed
    assert not list(tmp_path.iterdir())
