"""The tutorial's commands, word for word, from a clean folder."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from simulations.flower_engine import MARK, end_processes
from tests.conftest import ROOT
from tests.end_to_end.commands import environment

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "tutorial-deployment.md"


def script() -> str:
    """The page's shell blocks, one after the other; each command is told before it runs."""
    return "set -eux\n" + "\n".join(re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S))


@pytest.mark.timeout(900)
def test_the_tutorial_runs_word_for_word(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    mark, started = "tutorial" + str(time.time_ns()), time.monotonic()
    try:
        done = subprocess.run(
            ["bash", "-c", script()],
            cwd=tmp_path,
            env=environment({MARK: mark}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=800,
            check=False,
        )
    finally:
        end_processes(mark)
    assert done.returncode == 0, done.stdout[-6000:]
    sys.stdout.write(f"the tutorial took {time.monotonic() - started:.0f} s\n")
    place = tmp_path / "runs" / "consortium"
    run = next((place / "coordinator" / "runs").glob("smoke-*"))
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    assert record["status"] == "completed"
    names = {yaml.safe_load((place / name / "site.yaml").read_text())["site"] for name in ("north", "east", "south")}
    assert {each["site"] for each in record["sites"]} == names
    assert (run / "report.html").is_file()
