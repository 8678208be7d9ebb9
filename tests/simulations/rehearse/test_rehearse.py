"""Whole rehearsals by the hospital's own command, held against real runs of the same studies.

Where the machine lets it, the command runs in a network namespace without a network.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from bridge.hashing import sha256_array
from client.ledger import Ledger
from client.site import open_site
from simulations.prepare import prepare
from simulations.run import _run_engine
from tests.simulations.rehearse.study_files import hospital, state_of, study_of
from tests.simulations.studies import tiny

pytestmark = pytest.mark.slow

COMMAND = [str(Path(sys.executable).parent / "fedbridge-site"), "rehearse"]
ISOLATED = ["unshare", "-n"]
PRIVATE = (
    "privacy={mechanism: local, epsilon: 4, delta: 1.0e-3, patients_bound: 20}",
    "privacy.selection={epsilon: 1}",
    "privacy.metrics={epsilon: 2}",
    "train.rounds=2",
)


def alone() -> list[str]:
    """What takes the network away from a command; nothing where that is not permitted."""
    try:
        permitted = subprocess.run([*ISOLATED, "true"], capture_output=True).returncode == 0
    except OSError:
        permitted = False
    return ISOLATED if permitted else []


@dataclass
class Rehearsed:
    site: Path
    out: Path
    summary: str
    before: dict[str, tuple[str, int]]
    real: list[dict[str, Any]]
    """What the audit log of a real run has sent."""

    @property
    def found(self) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.out / "rehearsal.json").read_text())
        return content


def call(study: Path, site: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [*alone(), *COMMAND, str(study), "--site", str(site), "--out", str(out), "--quiet", *options]
    # A folder of that name where the command is given must not be taken for ours.
    elsewhere = site.parent / "elsewhere"
    (elsewhere / "client").mkdir(parents=True, exist_ok=True)
    (elsewhere / "client" / "__init__.py").write_text("raise SystemExit('not mine')")
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=elsewhere)


def rehearsed(place: Path, *overrides: str) -> Rehearsed:
    """A study, its real run on all hospitals, and then its rehearsal at the first of them, which took part in it."""
    config = tiny(*overrides)
    folder = prepare(config, place / "study")
    site = hospital(folder, place / "hospital")
    _run_engine(config, folder, "local")
    for name in ("audit.jsonl", "audit.jsonl.head", "ledger.sqlite", "ledger.key", "site.log"):
        if (source := folder / "sites" / "site-0" / name).exists():
            shutil.copy(source, site / name)
    real = [json.loads(line) for line in (site / "audit.jsonl").read_text().splitlines()]
    before = state_of(site)
    done = call(study_of(folder, place / "study.zip"), site, place / "out")
    assert done.returncode == 0, done.stderr
    return Rehearsed(site, place / "out", done.stdout, before, [line for line in real if line["event"] == "sent"])


@pytest.fixture(scope="module")
def plain(session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    return rehearsed(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def private(session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Rehearsed:
    return rehearsed(tmp_path_factory.mktemp("private"), *PRIVATE)


@pytest.fixture(params=["plain", "private"])
def each(request: pytest.FixtureRequest) -> Rehearsed:
    found: Rehearsed = request.getfixturevalue(request.param)
    return found


def listed(lines: list[dict[str, Any]]) -> Counter[tuple[Any, ...]]:
    return Counter(
        (line["message"], line["round"], line["item"], tuple(line["shape"]), line["bytes"]) for line in lines
    )


def test_items_and_bytes_are_those_of_the_real_run(each: Rehearsed) -> None:
    assert listed(each.found["outgoing"]) == listed(each.real)
    assert each.found["bytes"] == sum(line["bytes"] for line in each.real)
    low, high = each.found["planned_bytes"]
    assert low == high == each.found["bytes"]


def test_the_site_is_byte_for_byte_as_it_was(each: Rehearsed) -> None:
    assert state_of(each.site) == each.before
    assert [path.name for path in each.out.parent.iterdir() if path.name.startswith(".")] == []


def test_every_item_lies_in_the_folder_as_it_would_leave(each: Rehearsed) -> None:
    files = {str(path.relative_to(each.out)) for path in (each.out / "outgoing").rglob("*") if path.is_file()}
    assert files == {item["file"] for item in each.found["outgoing"]}
    for item in each.found["outgoing"]:
        path = each.out / item["file"]
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            assert (array.shape, array.nbytes) == (tuple(item["shape"]), item["bytes"])
            assert sha256_array(array) == item["sha256"]
        else:
            value = json.dumps(json.loads(path.read_text()), separators=(",", ":"))
            assert hashlib.sha256(value.encode()).hexdigest() == item["sha256"]


def test_the_others_cost_and_leave_nothing_in_the_record(each: Rehearsed) -> None:
    found = each.found
    assert found["pretend"] == ["hospital-1", "hospital-2", "pretend-2"]
    assert {Path(item["file"]).parts[1].split("-", 1)[1] for item in found["outgoing"]} == {
        f"{message['message']}-hospital-1" for message in found["messages"]
    }
    assert [message["number"] for message in found["messages"]] == list(range(1, len(found["messages"]) + 1))


def test_cost_is_that_of_a_process_a_message(each: Rehearsed) -> None:
    found = each.found
    messages = found["messages"]
    assert {message["outcome"] for message in messages} == {"OK"}
    assert all(0 < message["ready_seconds"] < message["seconds"] for message in messages)
    assert all(message["peak_bytes"] > 100_000_000 for message in messages)
    assert found["seconds"] == pytest.approx(sum(message["seconds"] for message in messages), abs=0.01)
    assert found["peak_bytes"] == max(message["peak_bytes"] for message in messages)
    # The cache begins empty: the first message computes features, though the site's own cache may hold them.
    assert messages[0]["cached_bytes"] > 0
    assert found["features_seconds"] > 0
    assert found["disk_bytes"] > sum(message["cached_bytes"] for message in messages) > 0


def test_the_summary_names_items_sizes_costs_and_no_patient(each: Rehearsed) -> None:
    assert f"{each.found['bytes']:,} bytes in all" in each.summary
    for item in {item["item"] for item in each.found["outgoing"]}:
        assert f" {item} " in each.summary
    for word in (
        "one core busy for",
        "most of it: ",
        "for SuperNode and executor",
        "for features, ledger and audit log",
    ):
        assert word in each.summary
    assert (each.out / "summary.txt").read_text() in each.summary
    splits = yaml.safe_load((each.site / "site.yaml").read_text())["splits"]
    text = each.summary + (each.out / "rehearsal.json").read_text()
    assert not [patient for split in ("pair", "test") for patient in splits[split] if patient in text]


def test_a_plain_study_is_said_to_be_without_noise(plain: Rehearsed, private: Rehearsed) -> None:
    assert "depends on single patients" in plain.summary
    assert "depends on single patients" not in private.summary


def test_what_was_spent_counts(private: Rehearsed, tmp_path: Path) -> None:
    """The first real run has spent epsilon 4; a cap of 5 has no room for another."""
    site = tmp_path / "hospital"
    shutil.copytree(private.site, site)
    policy = yaml.safe_load((site / "policy.yaml").read_text())
    policy["privacy"]["epsilon_cap"] = 5.0
    (site / "policy.yaml").write_text(yaml.safe_dump(policy, sort_keys=False))
    before = state_of(site)
    done = call(private.out.parent / "study.zip", site, tmp_path / "out")
    assert done.returncode == 5
    assert "BUDGET_SPENT" in done.stderr
    assert state_of(site) == before
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def study(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return study_of(prepared, tmp_path_factory.mktemp("study") / "study.zip")


def change(path: Path, **changes: Any) -> None:
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | changes, sort_keys=False))


def refused(study: Path, site: Path, out: Path) -> str:
    before = state_of(site)
    done = call(study, site, out)
    assert done.returncode == 5, done.stdout + done.stderr
    assert state_of(site) == before
    assert not out.exists()
    assert [path for path in out.parent.iterdir() if path.name.startswith(".")] == []
    return done.stderr


def test_too_few_patients(prepared: Path, study: Path, tmp_path: Path) -> None:
    site = hospital(prepared, tmp_path / "hospital")
    change(site / "policy.yaml", minimum_patients=50)
    text = refused(study, site, tmp_path / "out")
    assert "would not take part in the study: TOO_FEW_PATIENTS" in text
    assert "the policy's minimum_patients is 50" in text


def test_one_patient(prepared: Path, study: Path, tmp_path: Path) -> None:
    site = hospital(prepared, tmp_path / "hospital")
    splits = yaml.safe_load((site / "site.yaml").read_text())["splits"]
    change(site / "site.yaml", splits={"pair": splits["pair"][:1], "validation": [], "test": []})
    assert "TOO_FEW_PATIENTS" in refused(study, site, tmp_path / "out")
    change(site / "policy.yaml", minimum_patients=1)
    done = call(study, site, tmp_path / "out", "--pretend", "2")
    assert done.returncode == 0, done.stderr
    assert "evaluate, round 3, test patients: GROUP_TOO_SMALL" in done.stdout


def test_recordings_that_can_not_be_read(prepared: Path, study: Path, tmp_path: Path) -> None:
    site = hospital(prepared, tmp_path / "hospital")
    for path in (site / "recordings").iterdir():
        path.write_bytes(b"not a recording")
    assert "TOO_FEW_PATIENTS" in refused(study, site, tmp_path / "out")


def test_metrics_that_the_policy_forbids_are_told_and_the_rest_goes_on_with_the_models_of_the_site(
    prepared: Path, tmp_path: Path
) -> None:
    site = hospital(prepared, tmp_path / "hospital")
    policy = yaml.safe_load((site / "policy.yaml").read_text())
    change(site / "policy.yaml", items=[item for item in policy["items"] if not item.startswith("confusion.")])
    study = study_of(prepared, tmp_path / "study.zip", included=False)
    done = call(study, site, tmp_path / "out", "--pretend", "1")
    assert done.returncode == 0, done.stderr
    assert "evaluate, round 3, test patients: POLICY_FORBIDS" in done.stdout
    found = json.loads((tmp_path / "out" / "rehearsal.json").read_text())
    assert [message["outcome"] for message in found["messages"]] == ["OK"] * 6 + ["POLICY_FORBIDS"]
    assert found["pretend"] == ["hospital-1"]
    assert {item["message"] for item in found["outgoing"]} == {
        "query.describe",
        "query.probe",
        "query.similarity",
        "train",
    }


def computing(place: Path) -> list[int]:
    """Ids of processes that work in a folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "cwd").readlink().is_relative_to(place):
                    found.append(int(entry.name))
            except OSError:
                continue
    return found


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_half_way_it_leaves_no_process_no_copy_and_no_half_result(
    prepared: Path, study: Path, tmp_path: Path, number: signal.Signals
) -> None:
    site, out = hospital(prepared, tmp_path / "hospital"), tmp_path / "results" / "out"
    before = state_of(site)
    place = out.parent / ".out.rehearsing"
    process = subprocess.Popen([*COMMAND, str(study), "--site", str(site), "--out", str(out), "--quiet"])
    try:
        wait_for(lambda: list((place / "out" / "outgoing").glob("002-*")) and bool(computing(place)))
        process.send_signal(number)
        assert process.wait(timeout=60) != 0
    finally:
        process.kill()
        process.wait()
    wait_for(lambda: not computing(place) and list(out.parent.iterdir()) == [])
    assert state_of(site) == before


def wait_for(holds: Any, seconds: float = 90) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def test_a_withdrawn_patient_is_in_no_pretend_site(prepared: Path, tmp_path: Path) -> None:
    from client.patients import cohorts_of
    from simulations.rehearse.sites import write_sites

    site = open_site(hospital(prepared, tmp_path / "hospital"))
    cohorts = cohorts_of(site)
    gone = cohorts["pair"][0]
    with Ledger.open(site) as ledger:
        ledger.forget(gone)
    sites = write_sites(site, ("hospital-1", "a", "b"), prepared / "models", tmp_path / "place")
    dealt = {patient for each in sites[1:] for patient in each.file.splits.listed}
    assert dealt == {patient for patients in cohorts.values() for patient in patients} - {gone}
    from client.forget import withdrawn

    assert gone in withdrawn(sites[0])
