"""The server killed with SIGKILL, a real process each time, and resumed: the same bridge as an unbroken run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.end_to_end.commands import SMOKE, attempt, call, start

pytestmark = pytest.mark.slow

# FedAdam, so that the server's optimiser has moments to lose; no controls, so that the kills hit the federation. Small
# steps: with smoke.yaml's own, a difference of 1e-7 in the start grows to 0.1 and says nothing about resuming.
SETTINGS = (
    "controls=[]",
    "strategy.name=FedAdam",
    "strategy.server_learning_rate=0.01",
    "train.rounds=8",
    "train.local_steps=5",
    "train.learning_rate=0.002",
)
CHANGES = tuple(word for setting in SETTINGS for word in ("--set", setting))


def bridge(run: Path) -> dict[str, np.ndarray]:
    return dict(load_file(run / "bridge" / "bridge.safetensors"))


def same_bridge(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    assert one.keys() == two.keys()
    return max(float(np.abs(one[name] - two[name]).max()) for name in one)


def rounds_of(run: Path) -> list[tuple[int, float, int]]:
    """Number, loss and sites of each round: where two runs part."""
    rounds = json.loads((run / "run.json").read_text())["rounds"]
    return [(each["round"], each["loss"], len(each["sites"])) for each in rounds]


def kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # it may have ended by itself
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    run = tmp_path_factory.mktemp("unbroken") / "run"
    call("fedbridge-sim", "run", SMOKE, *CHANGES, "--out", run, "--quiet")  # fills the caches
    again = tmp_path_factory.mktemp("timed") / "run"
    begun = time.monotonic()
    call("fedbridge-sim", "run", SMOKE, *CHANGES, "--out", again, "--quiet")
    assert same_bridge(bridge(run), bridge(again)) == 0.0
    return run, time.monotonic() - begun


@pytest.mark.timeout(1500)
def test_killed_at_twenty_random_moments(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    """Up to four times in a run's life, each resumption like the start."""
    reference, seconds = unbroken
    rng, killed, runs = random.Random(20), 0, 0
    while killed < 20:
        runs += 1
        assert runs <= 20
        run, resume, moments = tmp_path / f"run-{runs}", (), []
        for share in (0.8, 0.5, 0.4, 0.3):  # there is less left of it each time
            moments.append(rng.uniform(0.3, share * seconds))
            process = start("fedbridge-sim", "run", SMOKE, *CHANGES, "--out", run, "--quiet", *resume)
            time.sleep(moments[-1])
            ended = process.poll() is not None
            kill(process)
            if ended:
                # The machine is faster now than when the unbroken run was timed.
                seconds = max(2.0, 0.75 * seconds)
                break
            killed, resume = killed + 1, ("--resume",)
        call("fedbridge-sim", "run", SMOKE, *CHANGES, "--out", run, "--quiet", "--resume")
        assert same_bridge(bridge(run), bridge(reference)) < 1e-6, (moments, rounds_of(reference), rounds_of(run))
        assert [number for number, *_ in rounds_of(run)] == list(range(1, 9))


def test_killed_after_a_chosen_round(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    reference, _ = unbroken
    run = tmp_path / "run"
    process = start("fedbridge-sim", "run", SMOKE, *CHANGES, "--out", run, "--quiet")
    log = run / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and '"round": 5' in log.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    kill(process)
    call("fedbridge-sim", "run", SMOKE, *CHANGES, "--out", run, "--quiet", "--resume")
    assert json.loads((run / "run.json").read_text())["resumed_from_round"] >= 4
    assert same_bridge(bridge(run), bridge(reference)) < 1e-6


def test_resume_with_another_configuration_is_refused(unbroken: tuple[Path, float], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("fedbridge-sim", "run", SMOKE, *CHANGES, "--out", run, "--quiet")
    log = run / "log.jsonl"
    while not (log.is_file() and '"round": 2' in log.read_text(encoding="utf-8")):
        assert process.poll() is None
        time.sleep(0.002)
    kill(process)
    code, text = attempt(
        "fedbridge-sim", "run", SMOKE, *CHANGES, "--set", "train.learning_rate=0.5", "--out", run, "--quiet", "--resume"
    )
    assert code == 2, text
    assert "configuration" in text.lower()
    assert "Traceback" not in text
