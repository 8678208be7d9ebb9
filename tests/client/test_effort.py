from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from client.effort import MAX_BYTES, Effort, peak_bytes, read_efforts, record_effort, seconds_since_start

EFFORT = Effort("2030-01-02T03:04:05+00:00", "17", "train", 3, 1.5, 200_000_000, "OK")
NEEDS_FULL_DEVICE = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")


def test_reads_what_was_recorded_in_order(tmp_path: Path) -> None:
    path = tmp_path / "messages.jsonl"
    refused = replace(EFFORT, message="describe", round=None, outcome="CODE_NOT_ACCEPTED")
    record_effort(path, EFFORT)
    record_effort(path, refused)
    assert read_efforts(path) == [EFFORT, refused]
    assert path.read_text().count("\n") == 2


def test_no_file_is_no_effort(tmp_path: Path) -> None:
    assert read_efforts(tmp_path / "messages.jsonl") == []


@pytest.mark.parametrize(
    "line",
    [
        '{"when":"2030-',
        "[]",
        "{}",
        "\x00\x00",
        '{"when":"x","run":"1","message":"train","round":1,"seconds":"long","peak_bytes":1,"outcome":"OK"}',
        '{"when":"x","run":"1","message":"train","round":"one","seconds":1,"peak_bytes":1,"outcome":"OK"}',
        '{"when":"x","run":"1","message":"train","round":1,"seconds":1,"peak_bytes":1,"outcome":"OK","more":1}',
    ],
)
def test_leaves_out_a_line_that_is_no_effort(tmp_path: Path, line: str) -> None:
    path = tmp_path / "messages.jsonl"
    record_effort(path, EFFORT)
    with path.open("a") as file:
        file.write(line + "\n")
    record_effort(path, EFFORT)
    assert read_efforts(path) == [EFFORT, EFFORT]


def test_never_raises_where_it_can_not_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record_effort(tmp_path / "no" / "folder", EFFORT)
    record_effort(tmp_path, EFFORT)
    assert capsys.readouterr().err.count("can't be written") == 2


@NEEDS_FULL_DEVICE
def test_never_raises_on_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    record_effort(Path("/dev/full"), EFFORT)
    assert "No space left" in capsys.readouterr().err


def test_moves_a_file_that_has_grown_too_long(tmp_path: Path) -> None:
    path = tmp_path / "messages.jsonl"
    path.write_text("x" * (MAX_BYTES + 1))
    record_effort(path, EFFORT)
    assert read_efforts(path) == [EFFORT]
    assert (tmp_path / "messages.jsonl.1").stat().st_size == MAX_BYTES + 1


def test_seconds_count_from_the_start_of_the_process() -> None:
    before = time.monotonic()
    code = "import time; time.sleep(0.3); from client.effort import seconds_since_start; print(seconds_since_start())"
    seconds = float(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout)
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert 0.3 - tick <= seconds <= time.monotonic() - before + tick
    assert seconds_since_start() > seconds


def test_peak_is_what_was_held_and_let_go_again_not_what_the_parent_held() -> None:
    held = bytearray(b"x") * 150_000_000
    code = "from client.effort import peak_bytes; a = peak_bytes(); b'x' * 90_000_000; b = peak_bytes(); print(a, b)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True).stdout
    first, second = map(int, output.split())
    assert first < 60_000_000
    assert 90_000_000 < second < first + 100_000_000
    assert peak_bytes() > len(held)
