"""A study of the demo's cohort through nginx, TLS and node authentication, with every hospital's own yes.

One consortium serves all tests here: a study without a mechanism, one with noise at the sites, and beside them a
rehearsal and a recorder at HTTP, so that what each says can be held against what the real run did.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from google.protobuf.unknown_fields import UnknownFieldSet
from safetensors.numpy import load_file

from tests.conftest import ROOT
from tests.deployment.consortium import Consortium, lines, whole
from tests.deployment.recorder import Recording, recording
from tests.end_to_end.commands import call
from tests.waiting import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DEMO = ROOT / "configs" / "demo.yaml"
SETTINGS = (
    "partition.kind=equal",
    "partition.hospitals=3",
    "train.rounds=3",
    "sites.minimum=3",
    "sites.timeout_seconds=120",
    "controls=[]",
)
RECORDED = "hospital-1"
EPSILON = 8.0

# Typed by hand from docs/reference/messages.md: what may leave under `none` with the demo's policies, and its type.
DECLARED = {
    "query.describe": {"site": str, "can_take_part": bool, "reason": int},
    "query.probe": {"probe_scores": "float64"},
    "query.similarity": {"similarity_scores": "float64"},
    "train": {
        "update.A": "float32",
        "update.B": "float32",
        "update.P": "float32",
        "weight": float,
        "train_loss": float,
    },
    "evaluate": {f"confusion.{name}": "int64" for name in ("bridge", "teacher", "agreement")},
}
PRIVATE = {
    "query.describe": DECLARED["query.describe"],
    "query.closed_form": {"statistics": "float64"},
    "evaluate": {"confusion_sums": "float64"},
}


@dataclass
class Finished:
    """The consortium after both studies."""

    consortium: Consortium
    rehearsal: Path
    recording: Recording
    plain: Path
    private: Path
    reference: Path
    output: str


def private_study(consortium: Consortium) -> Path:
    """The same cohort, each hospital adding noise of its own: one message solves for a small bridge."""
    content = yaml.safe_load((consortium.prepared / "study.yaml").read_text(encoding="utf-8"))
    content |= {
        "name": "demo-local",
        "selection": {"mode": "fixed", "input_position": 4, "output_position": 4},
        "train": "closed_form",
        "bridge": {
            "kind": "factored",
            "prototypes": 8,
            "cosines": 2,
            "initialisation": "directions",
            "frozen_prototypes": True,
            "constant": "public",
            "whitening": "public",
            "components": 16,
        },
        "privacy": {"mechanism": "local", "epsilon": EPSILON, "delta": 1e-3, "metrics": {"epsilon": 4.0}},
    }
    path = consortium.prepared / "private.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def certificate(consortium: Consortium) -> tuple[Path, Path]:
    """For the recorder, by the coordinator's own authority, as openssl makes one."""
    place, keys = consortium.place, consortium.coordinator / "keys"
    key, request, found = place / "recorder.key", place / "recorder.csr", place / "recorder.pem"
    extension = place / "recorder.ext"
    extension.write_text("subjectAltName=IP:127.0.0.1\n")
    quiet = {"check": True, "capture_output": True}
    new = ["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=recorder", "-keyout", key, "-out", request]
    subprocess.run(list(map(str, new)), **quiet)
    sign = ["openssl", "x509", "-req", "-in", request, "-CA", keys / "ca.pem", "-CAkey", keys / "ca.key"]
    sign += ["-CAcreateserial", "-days", "2", "-extfile", extension, "-out", found]
    subprocess.run(list(map(str, sign)), **quiet)
    return found, key


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    place = tmp_path_factory.mktemp("consortium")
    reference = place / "reference"
    options = [part for each in SETTINGS for part in ("--set", each)]
    call("fedbridge-sim", "run", DEMO, "--out", reference, "--quiet", *options, timeout=900)
    consortium = whole(place / "real", DEMO, *SETTINGS)
    try:
        study, private = consortium.build(), consortium.build("private.zip", private_study(consortium))
        rehearsal = place / "rehearsal"
        consortium.call(
            "fedbridge-site", "rehearse", study, "--site", consortium.sites[RECORDED], "--out", rehearsal, timeout=600
        )
        consortium.accept(study)
        consortium.accept(private)
        port = free_port()
        redirect(consortium, port)
        with recording(
            port, consortium.port, *certificate(consortium), consortium.coordinator / "keys" / "ca.pem"
        ) as it:
            consortium.up()
            output = ""
            for each in (study, private):
                code, text = consortium.run(each)
                output += text
                assert code == 0, text + consortium.call("fedbridge-server", "status", consortium.coordinator)
            runs = {path.name: path for path in (consortium.coordinator / "runs").iterdir() if path.is_dir()}
            plain = next(path for name, path in runs.items() if name.startswith("demo-") and "local" not in name)
            noised = next(path for name, path in runs.items() if name.startswith("demo-local-"))
            yield Finished(consortium, rehearsal, it, plain, noised, reference, output)
    finally:
        consortium.close()


def redirect(consortium: Consortium, port: int) -> None:
    """The hospitals take the recorder for the coordinator: all, since Flower sends no piece twice that any has sent."""
    for folder in consortium.sites.values():
        path = folder / "coordinator.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content["address"] = f"127.0.0.1:{port}"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")


def record_of(run: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return content


def test_the_bridge_is_that_of_the_in_process_engine(finished: Finished) -> None:
    mine = load_file(finished.plain / "bridge" / "bridge.safetensors")
    its = load_file(finished.reference / "bridge" / "bridge.safetensors")
    assert mine.keys() == its.keys()
    assert max(float(np.abs(mine[name] - its[name]).max()) for name in mine) <= 1e-6
    assert max(float(np.abs(its[name]).max()) for name in its) > 0.1
    deployed, simulated = record_of(finished.plain), record_of(finished.reference)
    assert deployed["status"] == "completed"
    assert deployed["engine"] == "deployment"
    assert sorted(each["site"] for each in deployed["sites"]) == sorted(finished.consortium.sites)
    for key in ("input_position", "output_position"):
        assert deployed["selection"][key] == simulated["selection"][key]


def test_the_private_study_finishes_within_budget(finished: Finished) -> None:
    assert record_of(finished.private)["status"] == "completed"
    consortium = finished.consortium
    told = consortium.call("fedbridge-server", "statement", "verify", finished.private, "--json")
    assert json.loads(told)["verdict"] == "holds"
    stated = json.loads((finished.private / "privacy.json").read_text(encoding="utf-8"))
    assert stated["threat_model"] == "local"
    assert all(cohort["epsilon"] <= EPSILON + 1e-9 for cohort in stated["cohorts"])
    for folder in consortium.sites.values():
        assert "each follows the one before it" in consortium.call("fedbridge-site", "ledger", "verify", folder)


def test_the_report_and_the_status_tell_of_both_runs(finished: Finished) -> None:
    consortium = finished.consortium
    for run in (finished.plain, finished.private):
        page = (run / "report.html").read_text(encoding="utf-8")
        assert all(name in page for name in consortium.sites)
    told = json.loads(consortium.call("fedbridge-server", "status", consortium.coordinator, "--json"))
    assert {run["state"] for run in told["runs"]} == {"completed"}
    assert {site["name"] for site in told["sites"] if site["online"]} == set(consortium.sites)
    site = json.loads(consortium.call("fedbridge-site", "status", consortium.sites[RECORDED], "--json"))
    assert {study["state"] for study in site["studies"]} == {"accepted"}


# --- what left the recorded hospital, as HTTP saw it -----------------------------------------------------------------


def test_every_request_is_one_of_the_fleet_and_holds_nothing_unknown(finished: Finished) -> None:
    assert finished.recording.requests
    for sent in finished.recording.requests:
        if sent.method == "GET":
            # `fedbridge-site status` asks whether anybody is there.
            assert (sent.path, sent.body) == ("/", b"")
        else:
            assert sent.method == "POST"
            assert sent.path.startswith("/v1/fleet/")
    for path, message in finished.recording.decoded():
        assert len(UnknownFieldSet(message)) == 0, path


def values(message: Any) -> dict[str, Any]:
    """Item name to value of a reply, arrays as numpy; no name twice."""
    found: dict[str, Any] = {}
    for record in message.content.values():
        for name, value in record.items():
            assert name not in found
            found[name] = value.numpy() if hasattr(value, "numpy") else value
    return found


def test_what_left_decodes_to_declared_items_and_the_audit_log_says_the_same(finished: Finished) -> None:
    audit = [entry for folder in finished.consortium.sites.values() for entry in lines(folder / "audit.jsonl")]
    sent = Counter(
        (entry["run"], entry["message"], entry["item"], entry["sha256"]) for entry in audit if entry["event"] == "sent"
    )
    seen: Counter[tuple[str, str, str, str]] = Counter()
    kinds: set[str] = set()
    for proto, message in finished.recording.replies():
        assert message is not None, proto.error
        kind = message.metadata.message_type
        kinds.add(kind)
        declared = DECLARED.get(kind, {}) | PRIVATE.get(kind, {})
        for name, value in values(message).items():
            is_array = isinstance(value, np.ndarray)
            assert declared[name] == (str(value.dtype) if is_array else type(value)), name
            seen[str(message.metadata.run_id), kind, name, array_hash(value) if is_array else plain_hash(value)] += 1
    assert kinds == set(DECLARED) | set(PRIVATE)
    assert seen == sent


def array_hash(array: np.ndarray[Any, Any]) -> str:
    """As docs/reference/messages.md writes it down: sha256 over a JSON list of dtype and shape, then the bytes."""
    head = json.dumps([array.dtype.newbyteorder("<").str, list(array.shape)], separators=(",", ":")).encode()
    return hashlib.sha256(head + array.astype(array.dtype.newbyteorder("<")).tobytes()).hexdigest()


def plain_hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, separators=(",", ":")).encode()).hexdigest()


# --- what the rehearsal foretold -------------------------------------------------------------------------------------


def test_the_rehearsal_foretold_items_and_bytes_exactly(finished: Finished) -> None:
    foretold = json.loads((finished.rehearsal / "rehearsal.json").read_text(encoding="utf-8"))
    run = str(record_of(finished.plain)["run_id"])
    audit = lines(finished.consortium.sites[RECORDED] / "audit.jsonl")
    real = Counter(
        (entry["message"], entry["round"], entry["item"], entry["bytes"])
        for entry in audit
        if entry["event"] == "sent" and entry["run"] == run
    )
    listed = Counter((item["message"], item["round"], item["item"], item["bytes"]) for item in foretold["outgoing"])
    assert listed == real


def test_the_rehearsal_foretold_time_and_memory_within_a_factor_of_two(finished: Finished) -> None:
    foretold = json.loads((finished.rehearsal / "rehearsal.json").read_text(encoding="utf-8"))
    run = str(record_of(finished.plain)["run_id"])
    efforts = [
        each for each in lines(finished.consortium.sites[RECORDED] / "state" / "messages.jsonl") if each["run"] == run
    ]
    seconds, peak = sum(each["seconds"] for each in efforts), max(each["peak_bytes"] for each in efforts)
    sys.stdout.write(f"seconds: {foretold['seconds']:.1f} rehearsed, {seconds:.1f} real; ")
    sys.stdout.write(f"bytes of memory: {foretold['peak_bytes']:,} rehearsed, {peak:,} real\n")
    assert 0.5 <= foretold["peak_bytes"] / peak <= 2.0
    # Three sites share this machine's cores in the real run, and one computes alone in the rehearsal.
    assert seconds > 0
