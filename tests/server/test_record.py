"""run.json: written whole, read back equal, its published schema current, wrong files refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.errors import RunFolderError
from server.record import RunRecord, read_record, schema_text, write_record
from tests.conftest import ROOT
from tests.server import runs


def test_a_record_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    record = RunRecord.model_validate(runs.completed())
    write_record(tmp_path, record)
    assert read_record(tmp_path) == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]
    plain = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert plain["schema"] == "fedbridge.run/1"
    assert plain["evaluation"]["bridge"]["balanced_accuracy"] == {"value": 0.764, "low": 0.732, "high": 0.796}
    assert plain["evaluation"]["baselines"].keys() == {"shuffled_pairs", "centralised", "linear_student", "site_alone"}


def test_a_record_without_rotations_is_still_a_record(tmp_path: Path) -> None:
    plain = runs.completed()
    assert "rotations" not in plain
    assert read_record(runs.write_run(tmp_path, plain)).rotations == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"schema": "fedbridge.run/2"}, "schema"),
        ({"patients": ["p1"]}, "patients"),
        ({"status": "done"}, "status"),
    ],
)
def test_another_file_is_refused(tmp_path: Path, change: dict[str, object], problem: str) -> None:
    (tmp_path / "run.json").write_text(json.dumps(runs.completed() | change), encoding="utf-8")
    with pytest.raises(RunFolderError, match=r"is not a run record of schema fedbridge.run/1"):
        read_record(tmp_path)


def test_a_truncated_file_and_an_absent_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="can't be read"):
        read_record(tmp_path)
    path = runs.write_run(tmp_path, runs.completed()) / "run.json"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RunFolderError, match="is not a run record"):
        read_record(tmp_path)


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="can't be written"):
        write_record(tmp_path / "absent", RunRecord.model_validate(runs.completed()))


def test_not_a_number_never_gets_into_the_file(tmp_path: Path) -> None:
    record = runs.completed()
    record["rounds"][0]["loss"] = float("nan")
    with pytest.raises(ValueError, match="JSON"):
        write_record(tmp_path, RunRecord.model_validate(record))
    assert not (tmp_path / "run.json").exists()


def test_the_published_schema_is_current() -> None:
    published = ROOT / "docs" / "reference" / "run.schema.json"
    assert published.read_text(encoding="utf-8") == schema_text(), "run: fedbridge-server schema > " + str(published)


def test_the_reference_page_explains_every_field() -> None:
    page = (ROOT / "docs" / "reference" / "run.md").read_text(encoding="utf-8")
    schema = json.loads(schema_text())
    models = {"RunRecord": schema, **schema["$defs"]}
    missing = [
        f"{name}.{key}" for name, model in models.items() for key in model["properties"] if f"`{key}`" not in page
    ]
    assert missing == []
