"""Every message of a whole run, recorded at the grid by a recorder that uses nothing of fedbridge."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.commands import SMOKE, call
from tests.end_to_end.recorder.sitecustomize import wrap

RECORDER = Path(__file__).parent / "recorder"

# Typed by hand from the documentation, not read from the code: message -> (record, name) -> dtype, or the Python type.
DECLARED: dict[str, dict[tuple[str, str], str]] = {
    "query.describe": {("config", "site"): "str", ("config", "can_take_part"): "bool", ("metrics", "reason"): "int"},
    "query.probe": {("arrays", "probe_scores"): "float64"},
    "query.similarity": {("arrays", "similarity_scores"): "float64"},
    "train": {
        ("arrays", "update.A"): "float32",
        ("arrays", "update.B"): "float32",
        ("arrays", "update.P"): "float32",
        ("metrics", "weight"): "float",
        ("metrics", "train_loss"): "float",
    },
    "evaluate": {
        ("arrays", "confusion.bridge"): "int64",
        ("arrays", "confusion.teacher"): "int64",
        ("arrays", "confusion.agreement"): "int64",
    },
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_replies(recorded: list[dict[str, Any]], run: Path) -> None:
    replies = [line for line in recorded if line["direction"] == "from_site"]
    assert {line["type"] for line in replies} == set(DECLARED)
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    positions_new = len(record["selection"]["probe_scores"]["aggregate"])
    positions_old = len(record["selection"]["similarity_scores"]["aggregate"])
    classes = len(record["evaluation"]["classes"])
    sizes = {"probe_scores": [positions_new], "similarity_scores": [positions_old]}
    sizes |= {f"confusion.{name}": [classes, classes] for name in ("bridge", "teacher", "agreement")}
    for line in replies:
        assert line["error"] is None
        for value in line["values"]:
            declared = DECLARED[line["type"]][(value["record"], value["name"])]
            assert value.get("dtype", value.get("python")) == declared, value
            assert value["name"] not in sizes or value["shape"] == sizes[value["name"]]
            assert value.get("finite", True)
        if line["type"] == "train":
            assert [v["value"] for v in line["values"] if v["name"] == "weight"] == [1.0]
            numbers = sum(v["bytes"] // 4 for v in line["values"] if v["kind"] == "ArrayRecord")
            assert numbers == record["bridge"]["parameters"]
    check_audit(replies, run)


def check_audit(replies: list[dict[str, Any]], run: Path) -> None:
    """Each array at the wire stands in one site's audit log with the same bytes and hash, and nothing else does."""
    wire = Counter((v["name"], v["bytes"]) for line in replies for v in line["values"] if v["kind"] == "ArrayRecord")
    audit: Counter[tuple[str, int]] = Counter()
    for path in sorted((run / "sites").glob("site-*/audit.jsonl")):
        for entry in lines(path):
            if entry["shape"]:
                audit[entry["item"], entry["bytes"]] += 1
    assert audit == wire


def test_every_byte_that_leaves_a_site_is_declared_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from simulations import cli
    from simulations.local_grid import LocalGrid

    recording, run = tmp_path / "wire.jsonl", tmp_path / "run"
    monkeypatch.setattr(LocalGrid, "push_messages", LocalGrid.push_messages)
    monkeypatch.setattr(LocalGrid, "pull_messages", LocalGrid.pull_messages)
    wrap(LocalGrid, str(recording))
    monkeypatch.setattr("sys.argv", ["fedbridge-sim", "run", str(SMOKE), "--out", str(run), "--quiet"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    check_replies(lines(recording), run)


@pytest.mark.slow
def test_every_byte_that_leaves_a_site_is_declared_flower(tmp_path: Path) -> None:
    recording, run = tmp_path / "wire.jsonl", tmp_path / "run"
    extra = {"PYTHONPATH": str(RECORDER), "GRID_RECORD": str(recording)}
    call("fedbridge-sim", "run", SMOKE, "--engine", "flower", "--out", run, "--quiet", extra=extra, timeout=400)
    check_replies(lines(recording), run)
