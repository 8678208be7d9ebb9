"""What a hospital did not accept does not run, whoever sends it; what it opens meanwhile is watched from outside.

The coordinator here is a dishonest one: it hands Flower whatever it likes, without a command of fedbridge's. The
hospital's executor runs under strace, so that "no data is read" is what the system saw.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import yaml

from bridge.bundle import build_app
from bridge.run_config import RUN_CONFIG_DEFAULTS, toml_text
from tests.deployment.consortium import Consortium, lines
from tests.end_to_end.commands import SMOKE, command
from tests.waiting import until

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt install strace)"),
]

SITE = "hospital-1"
SITES = {"minimum": 1, "expected": [SITE], "retries": 0, "timeout_seconds": 200, "wait_seconds": 150}
STRACE = ("strace", "-f", "-q", "-s", "4096", "-e", "trace=open,openat,openat2", "-o")
OPENED = re.compile(r'\bopen(?:at2?)?\((?:AT_FDCWD|\d+)?,? ?"([^"]+)"')


class Watched:
    """One hospital whose executor is watched, and a coordinator that sends what it likes."""

    def __init__(self, place: Path) -> None:
        self.consortium = Consortium(place)
        self.consortium.prepare(SMOKE, "train.rounds=1")
        self.consortium.sites = {SITE: self.consortium.sites[SITE]}
        self.consortium.init_coordinator()
        self.consortium.enrol(SITE)
        self.consortium.edit_study(sites=SITES)
        self.study = self.consortium.build()
        self.consortium.accept(self.study)
        self.consortium.call("fedbridge-server", "start", self.consortium.coordinator)
        self.site = self.consortium.sites[SITE]
        self.trace = place / "trace"
        self.supernode = self.consortium.start("fedbridge-site", "supernode", self.site)
        self.executor = subprocess.Popen(
            [*STRACE, str(self.trace), command("fedbridge-site"), "executor", str(self.site)],
            cwd=place,
            env=self.consortium.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.count = 0

    @property
    def job(self) -> str:
        """The accepted job's text."""
        return next((self.site / "studies").glob("smoke-*/job.yaml")).read_text(encoding="utf-8")

    def opened(self) -> set[str]:
        """Every file that the executor and what it started opened, or tried to."""
        return set(OPENED.findall(self.trace.read_text(encoding="utf-8", errors="replace")))

    def send(self, change: Callable[[Path], object] = lambda app: None, **config: str) -> tuple[str, set[str]]:
        """Start a run with Flower's own command; the hospital's code for it, and the files opened for it."""
        self.count += 1
        place = self.consortium.place / f"attack-{self.count}"
        app = build_app(place / "app")
        change(app)
        values = dict(RUN_CONFIG_DEFAULTS) | {
            "job": self.job,
            "run-folder": str(place / "run"),
            "models-folder": str(self.consortium.prepared / "models"),
            "run-key": "0" * 32,
            **config,
        }
        (place / "run-config.toml").write_text(toml_text(values), encoding="utf-8")
        before = self.opened()
        self.flwr("run", str(app), "fedbridge", "--run-config", str(place / "run-config.toml"), "--format", "json")
        log = place / "run" / "log.jsonl"
        until(lambda: any(line["event"] in ("failed", "finished") for line in lines(log)), 500, "the end of the run")
        return self.code(place / "run"), self.opened() - before

    def code(self, run: Path) -> str:
        record = json.loads((run / "run.json").read_text(encoding="utf-8"))
        return str({each["site"]: each["reason"] for each in record["sites"]}[SITE])

    def flwr(self, *arguments: str) -> Mapping[str, object]:
        environment = self.consortium.environment({"FLWR_HOME": str(self.consortium.coordinator / "flower")})
        done = subprocess.run(
            [command("flwr"), *arguments],
            cwd=self.consortium.coordinator / "state",
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        found: Mapping[str, object] = json.loads(done.stdout[done.stdout.index("{") :])
        assert found["success"], done.stdout
        return found


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    found = Watched(tmp_path_factory.mktemp("refusals"))
    try:
        yield found
    finally:
        os.killpg(found.executor.pid, signal.SIGKILL)
        found.consortium.close()


def data_of(site: Path, opened: set[str]) -> set[str]:
    """Opened files that are patients': recordings, labels, caches."""
    patients = [str(site / name) for name in ("recordings", "labels.csv", "cache", "ledger")]
    return {path for path in opened if path.startswith(tuple(patients))}


def unpacked(site: Path) -> list[Path]:
    apps = site / "state" / "flower" / "apps"
    return sorted(apps.iterdir()) if apps.exists() else []


def test_the_accepted_code_and_job_do_read_data(watched: Watched) -> None:
    """The control: what follows is not a hospital that reads nothing ever."""
    code, opened = watched.send()
    assert code == "OK"
    assert data_of(watched.site, opened)
    assert unpacked(watched.site) == []


def one_line(app: Path) -> None:
    path = app / "client" / "outbox.py"
    text = path.read_text(encoding="utf-8")
    changed = text.replace("self._policy.demand(name)", "pass", 1)
    assert changed != text
    path.write_text(changed, encoding="utf-8")


def test_one_changed_line_of_code(watched: Watched) -> None:
    code, opened = watched.send(one_line)
    assert code == "CODE_NOT_ACCEPTED"
    assert data_of(watched.site, opened) == set()
    assert unpacked(watched.site) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [(("train", "rounds"), 2), (("seed",), 1), (("coordinator",), "another"), (("name",), "another")],
)
def test_another_job(watched: Watched, key: tuple[str, ...], value: object) -> None:
    job = yaml.safe_load(watched.job)
    part = job
    for name in key[:-1]:
        part = part[name]
    part[key[-1]] = value
    code, opened = watched.send(job=yaml.safe_dump(job, sort_keys=False))
    assert code == "JOB_NOT_ACCEPTED"
    assert data_of(watched.site, opened) == set()


def test_swapped_weights(watched: Watched) -> None:
    weights = watched.site / "models" / "new_encoder" / "weights.safetensors"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept[:-4] + bytes(4))
        code, opened = watched.send()
    finally:
        weights.write_bytes(kept)
    assert code == "WEIGHTS_MISSING"
    assert data_of(watched.site, opened) == set()


def test_another_model_with_a_card_of_its_own(watched: Watched) -> None:
    """Weights and card that fit each other, but are not the study's."""
    folder = watched.site / "models" / "new_encoder"
    kept = folder.with_name("kept")
    folder.rename(kept)
    try:
        shutil.copytree(folder.with_name("old_encoder"), folder)
        code, opened = watched.send()
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)
    assert code in ("WEIGHTS_MISSING", "WEIGHTS_DIFFER")
    assert data_of(watched.site, opened) == set()


def test_a_study_signed_by_another_key(watched: Watched, tmp_path: Path) -> None:
    """At the door: nothing of it is written, and nothing of the hospital's is read."""
    other = Consortium(tmp_path / "other")
    other.place.mkdir()
    other.init_coordinator()
    study = tmp_path / "forged.zip"
    config = watched.consortium.prepared / "study.yaml"
    other.call("fedbridge-server", "study", "build", config, "--out", study, "--dir", other.coordinator)
    before = {path: path.stat().st_mtime_ns for path in (watched.site / "studies").rglob("*")}
    trace = tmp_path / "trace"
    done = subprocess.run(
        [*STRACE, str(trace), command("fedbridge-site"), "accept", str(study), "--site", str(watched.site), "--yes"],
        env=watched.consortium.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 5
    assert "signed" in done.stderr
    opened = set(OPENED.findall(trace.read_text(encoding="utf-8", errors="replace")))
    assert opened
    assert data_of(watched.site, opened) == set()
    assert {path: path.stat().st_mtime_ns for path in (watched.site / "studies").rglob("*")} == before


def test_a_study_that_was_left(watched: Watched) -> None:
    """Last here: afterwards nothing of the study runs any more."""
    name = next((watched.site / "studies").glob("smoke-*")).name
    watched.consortium.call("fedbridge-site", "withdraw", name, "--site", watched.site)
    code, opened = watched.send()
    assert code == "STUDY_WITHDRAWN"
    assert data_of(watched.site, opened) == set()


def test_every_refusal_is_in_the_audit_log(watched: Watched) -> None:
    purposes = [entry["purpose"] for entry in lines(watched.site / "audit.jsonl") if entry["event"] == "refused"]
    for code in ("CODE_NOT_ACCEPTED", "STUDY_WITHDRAWN"):
        assert any(code in purpose for purpose in purposes), purposes
    watched.consortium.call("fedbridge-site", "audit", "verify", watched.site)
