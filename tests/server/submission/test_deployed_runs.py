"""Runs on real processes, submitted, left, found again, killed, stopped and resumed by the coordinator's commands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from server.record import read_record
from server.submission.record import read_submission
from server.submission.runs import run_state
from tests.deployment.consortium import Consortium, lines, whole
from tests.end_to_end.commands import SMOKE
from tests.waiting import until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

SETTINGS = (
    "partition.hospitals=2",
    "selection.mode=fixed",
    "selection.input_position=1",
    "selection.output_position=1",
    "train.rounds=3",
    "sites.timeout_seconds=150",
    "sites.retries=0",
    "controls=[]",
)
SECONDS = 600


@dataclass
class Deployed:
    """A consortium of two hospitals that is up and has accepted the study, and its first, undisturbed run."""

    consortium: Consortium
    study: Path
    name: str

    @property
    def runs(self) -> Path:
        return self.consortium.coordinator / "runs"

    def server(self, *arguments: str | Path, code: int = 0) -> str:
        where = ("--dir", self.consortium.coordinator)
        return self.consortium.call("fedbridge-server", *arguments, *where, code=code, timeout=SECONDS)

    def submit(self, name: str) -> Path:
        self.server("run", self.study, "--name", name, "--detach")
        return self.runs / name

    def rounds(self, folder: Path) -> int:
        return sum(event["event"] == "round" for event in lines(folder / "log.jsonl"))

    def until_round(self, folder: Path, number: int) -> None:
        until(lambda: self.rounds(folder) >= number, SECONDS, f"round {number} of {folder.name}")

    def check_same(self, folder: Path) -> None:
        """The run of that folder made the very bridge of the undisturbed one, under the same run key throughout."""
        mine, first = (load_file(each / "bridge" / "bridge.safetensors") for each in (folder, self.runs / self.name))
        assert mine.keys() == first.keys()
        for key, value in first.items():
            np.testing.assert_allclose(mine[key], value, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def deployed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployed]:
    consortium = whole(tmp_path_factory.mktemp("deployed"), SMOKE, *SETTINGS)
    try:
        config = consortium.prepared / "study.yaml"
        # Every test asks the same questions again: more often than a study would.
        config.write_text(yaml.safe_dump({**yaml.safe_load(config.read_text()), "attempts": 40}))
        study = consortium.build()
        consortium.accept(study)
        consortium.up()
        output = consortium.call("fedbridge-server", "run", study, "--dir", consortium.coordinator, timeout=SECONDS)
        name = consortium.run_folder(study).name
        assert f"{name}: submitted as Flower's run" in output
        yield Deployed(consortium, study, name)
    finally:
        consortium.close()


def test_a_run_leaves_its_folder_its_report_and_how_flower_ended_it(deployed: Deployed) -> None:
    folder = deployed.runs / deployed.name
    record, submission = read_record(folder), read_submission(folder)
    assert (record.status, record.engine, len(record.rounds)) == ("completed", "deployment", 3)
    assert [site.site for site in record.sites] == ["hospital-1", "hospital-2"]
    assert submission is not None
    assert (submission.study, submission.flower_run, submission.ended) == (deployed.name, record.run_id, "completed")
    text = (folder / "report.html").read_text()
    assert deployed.name in text
    assert "simulat" not in re.sub(r"<pre.*?</pre>", "", text, flags=re.S)
    assert "hospital-1: OK, last answered" in deployed.consortium.call(
        "fedbridge-server", "status", deployed.consortium.coordinator
    )


@contextmanager
def following(deployed: Deployed, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """A command that a terminal's Ctrl-C reaches, which a shell's background job would not be."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "from server.cli import main; sys.argv[0] = 'fedbridge-server'; main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments, "--dir", str(deployed.consortium.coordinator)],
        cwd=deployed.consortium.place,
        env=deployed.consortium.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def test_control_c_leaves_the_run_alone_and_it_is_found_again(deployed: Deployed) -> None:
    with following(deployed, "run", str(deployed.study), "--name", "left") as child:
        folder = deployed.runs / "left"
        deployed.until_round(folder, 1)
        # What is asked below must find it going on, however slow the commands are.
        (executor,) = deployed.consortium.processes("fedbridge-site executor", "hospital-1")
        os.kill(executor, signal.SIGSTOP)
        child.send_signal(signal.SIGINT)
        told, _ = child.communicate(timeout=60)
    assert child.returncode == 130
    assert "left, running" in told
    assert "no longer followed; the run goes on" in told
    back = re.search(r"come back to it: fedbridge-server (follow left .*)", told)
    assert back is not None
    assert run_state(folder).state == "running"
    # It can neither be started a second time nor resumed while it goes on.
    again = deployed.server("run", deployed.study, "--name", "left", code=7)
    assert "already holds a run" in again
    twice = deployed.server("run", deployed.study, "--name", "left", "--resume", code=7)
    assert "the run is still going on" in twice
    assert "left: running" in deployed.consortium.call("fedbridge-server", "status", deployed.consortium.coordinator)
    os.kill(executor, signal.SIGCONT)
    told = deployed.consortium.call("fedbridge-server", *back.group(1).split(), timeout=SECONDS)
    assert "left, completed" in told
    assert str(folder / "report.html") in told
    deployed.check_same(folder)


def test_a_stopped_run_says_so_and_goes_on_when_asked(deployed: Deployed) -> None:
    folder = deployed.submit("stopped")
    deployed.until_round(folder, 1)
    assert "stopped: stopped; go on with --resume" in deployed.server("end", "stopped")
    assert run_state(folder).state == "stopped"
    assert "had ended already (stopped)" in deployed.server("end", "stopped")
    assert "the run was stopped" in deployed.server("follow", "stopped", code=6)
    assert "stopped, completed" in deployed.server("run", deployed.study, "--name", "stopped", "--resume")
    deployed.check_same(folder)


def test_a_full_disk_under_the_run_folder_ends_the_run_with_that_reason(deployed: Deployed) -> None:
    folder = deployed.runs / "full"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", folder], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("no right to mount a small disk")
    try:
        told = deployed.server("run", deployed.study, "--name", "full", code=6)
        assert "No space left on device" in told
        assert run_state(folder).state in ("failed", "lost")
        subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
        assert "full, completed" in deployed.server("run", deployed.study, "--name", "full", "--resume")
        deployed.check_same(folder)
    finally:
        subprocess.run(["umount", folder], check=False)


def test_a_study_of_another_and_an_unknown_run_are_refused(deployed: Deployed, tmp_path: Path) -> None:
    other = deployed.consortium.build("other.zip")
    told = deployed.server("run", other, "--name", deployed.name, "--resume", code=2)
    assert "is a run of another study" in told
    assert "is no submitted run" in deployed.server("follow", "nothing", code=7)
    assert "is no submitted run" in deployed.server("end", "nothing", code=7)
    torn = tmp_path / "torn.zip"
    torn.write_bytes(deployed.study.read_bytes()[:-100])
    assert "is not a sound study file" in deployed.server("run", torn, code=5)


def test_too_few_sites_end_the_run_with_each_sites_code(deployed: Deployed) -> None:
    """The last test: a hospital leaves the study for good."""
    deployed.consortium.call(
        "fedbridge-site", "withdraw", deployed.name, "--site", deployed.consortium.sites["hospital-2"], "--who", "test"
    )
    told = deployed.server("run", deployed.study, "--name", "few", code=6)
    assert "few: the run failed" in told
    assert "describe: 1 sites can take part, 2 are needed" in told
    assert "hospital-2: STUDY_WITHDRAWN" in told
    state = run_state(deployed.runs / "few")
    assert (state.state, state.sites) == ("failed", {"hospital-1": "OK", "hospital-2": "STUDY_WITHDRAWN"})
