"""The example of docs/own-reader.md, run as it stands there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from .files import noise

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "own-reader.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The example's package, installed by path, and three nights of two patients."""
    module, kit = blocks("python")
    (tmp_path / "night_reader.py").write_text(module)
    (tmp_path / "kit.py").write_text(kit)
    info = tmp_path / "night_ward-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: night-ward\nVersion: 1.0\n")
    point = blocks("toml")[0].splitlines()[1].replace('"', "")
    (info / "entry_points.txt").write_text(f"[fedbridge.readers]\n{point}\n")
    (tmp_path / "a-few-nights").mkdir()
    for seed, name in enumerate(("anna_1", "anna_2", "bert_1")):
        ecg, ppg = noise(20, 50, seed)[0], noise(20, 50, seed + 10)[0]
        rows = [f"{i / 50:.2f},{a:.4f},{b:.4f}" for i, (a, b) in enumerate(zip(ecg, ppg, strict=True))]
        rows[300:310] = [f"{i / 50:.2f},,0.5" for i in range(300, 310)]
        (tmp_path / "a-few-nights" / f"{name}.csv").write_text("\n".join(["seconds,ecg,ppg", *rows]) + "\n")
    return tmp_path


def run(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{place}:{ROOT}", "PATH": "/usr/bin:/bin", "COLUMNS": "200"},
        check=False,
    )


def test_the_example_keeps_the_contract(place: Path) -> None:
    found = run(place, "kit.py")
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip() in ("{'anna', 'bert'}", "{'bert', 'anna'}")


def test_the_example_is_found_by_its_entry_point_and_checked(place: Path) -> None:
    site = {"site": "ward", "folder": "a-few-nights", "window": {"seconds": 4, "step_seconds": 4}}
    sections = next(yaml.safe_load(block) for block in blocks("yaml") if "name: night" in block)
    splits = {"pair": ["anna", "bert"], "validation": [], "test": []}
    (place / "policy.yaml").write_text("minimum_patients: 2\n")
    content = {**site, **sections, "splits": splits, "policy": "policy.yaml"}
    (place / "site.yaml").write_text(yaml.safe_dump(content))
    command = "from pathlib import Path; from client.check import run_check; print(run_check(Path('site.yaml'), None))"
    found = run(place, "-c", command)
    assert found.returncode == 0, found.stderr
    assert "3 usable recordings of 2 patients" in found.stdout
    # 20 s give 5 windows; the hole from 6.0 to 6.2 s costs one
    assert re.search(r"\n pair +2 +3 +12 ", found.stdout)
    assert re.search(r"ECG missing +3 ", found.stdout)
    assert found.stdout.strip().endswith("0")


def test_a_file_that_is_no_night_is_refused(place: Path) -> None:
    (place / "a-few-nights" / "carl_1.csv").write_text("nothing,here\n1,2\n")
    command = (
        "from pathlib import Path; from night_reader import NightReader; "
        "NightReader({}).read(Path('a-few-nights/carl_1.csv'))"
    )
    found = run(place, "-c", command)
    assert "RecordingError: carl_1.csv: can't be read as a night" in found.stderr


def test_the_wfdb_example_is_valid() -> None:
    from client.readers.wfdb import WfdbReader

    section = yaml.safe_load(blocks("yaml")[0])["reader"]
    assert section["name"] == "wfdb"
    assert WfdbReader(section["options"]).options.signals["ECG"].channels == {"ECG": ("II", "I", "V")}


def test_the_table_names_the_readers_real_options() -> None:
    from client.readers.edf import EdfOptions
    from client.readers.npz import NpzOptions, NpzSignal
    from client.readers.wfdb import WfdbOptions

    for name, options in (("npz", NpzOptions), ("wfdb", WfdbOptions), ("edf", EdfOptions)):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        named = set(re.findall(r"`(\w+)`", row.split("|")[3]))
        inner = set(NpzSignal.model_fields) if name == "npz" else {"channels", "scale"}
        assert named == set(options.model_fields) | inner
