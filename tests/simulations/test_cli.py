"""`fedbridge-sim` as a command: what it prints, and with which code it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from bridge.hashing import sha256_json
from server.record import read_record
from simulations import cli
from simulations.flower_engine import MARK, end_processes, marked_processes
from simulations.prepare import flwr_command
from tests.simulations.studies import SMOKE, TINY

SIM = str(Path(sys.executable).parent / "fedbridge-sim")
CHANGES = [part for override in TINY for part in ("--set", override)]


def call(*arguments: str | Path) -> int:
    """Run in this process; the exit code."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(each) for each in arguments])
    return int(ended.value.code or 0)


def test_a_run_prints_a_table_and_the_reports_path(
    session_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    changes = [*CHANGES, "--set", "controls=[linear_student]", "--set", "workers=1"]
    assert call("run", SMOKE, *changes, "--out", out) == 0
    printed = capsys.readouterr()
    assert printed.out.rstrip().endswith(f"report: {out / 'report.html'}")
    for name in ("teacher", "bridge, federated", "linear student", "chance"):
        assert name in " ".join(printed.out.split())
    assert "shuffled" not in printed.out
    balanced = read_record(out).evaluation.baselines["linear_student"].balanced_accuracy
    assert balanced is not None
    assert f"[{balanced.low:.3f}, {balanced.high:.3f}]" in printed.out
    assert "training rounds: 3 of 3" in printed.err


def test_quiet_prints_one_line(session_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert call("run", SMOKE, *CHANGES, "--set", "controls=[]", "--out", out, "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    pattern = (
        r"tiny completed: balanced accuracy bridge 0\.\d{3} \[.*\], teacher 0\.\d{3} \[.*\]; report /.*report\.html\n"
    )
    assert re.fullmatch(pattern, printed.out)
    assert call("run", SMOKE, *CHANGES, "--set", "controls=[]", "--out", out, "--quiet") == 7
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert "--resume" in told
    assert "Traceback" not in told


def test_prepare_tells_how_flower_runs_it(
    session_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("prepare", SMOKE, *CHANGES, "--out", tmp_path / "study", "--quiet") == 0
    printed = capsys.readouterr().out
    assert flwr_command(tmp_path / "study") in printed
    assert (tmp_path / "study" / "app" / "client" / "app.py").is_file()


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["run", "nowhere.yaml"], 2, "can't be read"),
        (["run", str(SMOKE), "--set", "train.ronds=3"], 2, "did you mean"),
        (["run", str(SMOKE), "--engine", "spark"], 2, "not one of local, flower"),
        (["run", str(SMOKE), "--out", "/proc/nowhere", "--quiet"], 7, "can't be written"),
        (["run", str(SMOKE), "--out", "/etc", "--quiet"], 7, "is not an empty folder"),
        (["run", str(SMOKE), "--unknown"], 2, "--unknown"),
        (
            ["run", str(SMOKE), "--set", "partition.hospitals=99", "--quiet", "--out", "/tmp/fedbridge-never-made"],
            3,
            "can't be divided over 99 hospitals",
        ),
    ],
)
def test_what_goes_wrong_has_its_code_and_a_way_out(
    arguments: list[str], code: int, told: str, session_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(*arguments) == code
    printed = capsys.readouterr()
    assert told in " ".join(printed.err.split())
    assert "Traceback" not in printed.err


def test_a_failed_run_ends_with_a_code(session_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forbidden = ["--set", "policy={items: [site, can_take_part, reason]}", "--set", "sites.wait_seconds=1"]
    assert call("run", SMOKE, *CHANGES, *forbidden, "--out", tmp_path / "run", "--quiet") == 6
    assert "error: " in capsys.readouterr().err


def bridge(folder: Path) -> dict[str, np.ndarray[Any, Any]]:
    return dict(load_file(folder / "bridge" / "bridge.safetensors"))


@pytest.mark.slow
def test_both_engines_choose_and_train_the_same(session_cache: Path, tmp_path: Path) -> None:
    for engine in ("local", "flower"):
        changes = ["--set", "controls=[]", "--engine", engine, "--out", tmp_path / engine, "--quiet"]
        assert call("run", SMOKE, *changes) == 0
    local, flower = read_record(tmp_path / "local"), read_record(tmp_path / "flower")
    assert (local.engine, flower.engine) == ("local", "flower")
    assert local.selection == flower.selection
    assert local.evaluation == flower.evaluation
    one, two = bridge(tmp_path / "local"), bridge(tmp_path / "flower")
    assert one.keys() == two.keys() == {"A", "B", "P"}
    assert max(float(np.abs(one[name] - two[name]).max()) for name in one) < 1e-6
    assert marked_processes(sha256_json(str((tmp_path / "flower").resolve()))[:32]) == []


@pytest.mark.slow
def test_the_printed_flwr_command_runs_the_study(
    session_cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    """As the README has it: `flwr run` by hand, then the controls by `--resume`."""
    study = tmp_path / "study"
    assert call("prepare", SMOKE, *CHANGES, "--out", study, "--quiet") == 0
    command = capsys.readouterr().out.partition("run it with Flower: ")[2].strip()
    mark = f"by-hand-{os.getpid()}"
    environment = os.environ | {
        MARK: mark,
        "FLWR_HOME": str(tmp_path / "home"),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": "39187",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    try:
        subprocess.run(["bash", "-c", command], env=environment, check=True, capture_output=True, timeout=300)
        deadline = time.monotonic() + 60
        while read_record(study).status == "running" and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        end_processes(mark)
    assert read_record(study).status == "completed"
    for name, array in bridge(finished).items():
        assert float(np.abs(array - bridge(study)[name]).max()) < 1e-6
    assert call("run", SMOKE, *CHANGES, "--out", study, "--resume", "--quiet") == 0
    assert read_record(study).evaluation == read_record(finished).evaluation


@pytest.mark.slow
def test_sigterm_ends_a_run_and_resume_finishes_it(session_cache: Path, tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    arguments = [SIM, "run", str(SMOKE), *CHANGES, "--out", str(out), "--quiet"]
    child = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (out / "log.jsonl").is_file() and time.monotonic() < deadline:
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert call("run", SMOKE, *CHANGES, "--out", out, "--resume", "--quiet") == 0
    for name, array in bridge(finished).items():
        np.testing.assert_array_equal(array, bridge(out)[name])
