"""Whole runs in which one of three hospitals is wrong: real apps and site folders, joined by the local engine's wire.

The run goes on without the wrong one where `sites.minimum` allows, else it stops and names the site and its reason.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from safetensors.numpy import load_file, save_file

import client.app
from bridge.errors import ExitCode
from simulations import cli
from simulations.local_grid import LocalGrid
from tests.client.disk import read_only, small_disk
from tests.end_to_end.commands import SMOKE, call
from tests.end_to_end.recorder.sitecustomize import wrap
from tests.end_to_end.test_bad_input import told
from tests.simulations.studies import TINY

CHANGES = [
    *(change for change in TINY if not change.startswith("partition")),
    "data.builtin.hospital_patients=18",
    "partition={hospitals: 3}",
    "controls=[]",
    "sites.retries=1",
]
HOSPITALS = ["hospital-1", "hospital-2", "hospital-3"]
WRONG = 1
"""Partition of the hospital that is wrong: hospital-2."""
SECRET = "patient-0815-Mustermann"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEDBRIDGE_CACHE", str(folder))
        yield folder


def words(*changes: str) -> list[str]:
    return [word for change in (*CHANGES, *changes) for word in ("--set", change)]


@pytest.fixture(scope="session")
def prepared(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study that nobody runs: each test spoils a copy of it."""
    folder = tmp_path_factory.mktemp("prepared") / "study"
    call("fedbridge-sim", "prepare", SMOKE, *words(), "--out", folder, "--quiet", extra={"FEDBRIDGE_CACHE": str(cache)})
    return folder


@dataclass
class Study:
    """A copy of the prepared study, one of whose hospitals is to be spoilt, and how its run ends."""

    folder: Path
    capture: pytest.CaptureFixture[str]

    @property
    def site(self) -> Path:
        return self.folder / "sites" / f"site-{WRONG}"

    def edit(self, name: str, change: Callable[[dict[str, Any]], object], folder: Path | None = None) -> None:
        path = (folder or self.site) / name
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        change(content)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")

    def run(self, *options: str) -> tuple[int, str]:
        """`fedbridge-sim run` in this process: its exit code and what it printed."""
        with pytest.raises(SystemExit) as ended:
            cli.main(["run", str(SMOKE), *words(), "--out", str(self.folder), "--quiet", *options])
        printed = self.capture.readouterr()
        return int(ended.value.code or 0), printed.out + printed.err

    def minimum(self, count: int) -> None:
        """Ask for so many sites: the prepared job is what sites are asked."""
        self.edit("job.yaml", lambda job: job["sites"].__setitem__("minimum", count), self.folder)

    @property
    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "run.json").read_text(encoding="utf-8"))
        return found

    def sites_of_rounds(self) -> list[list[str]]:
        return [each["sites"] for each in self.record["rounds"]]

    def lost_turns(self) -> dict[str, list[str]]:
        return {each["site"]: each["lost_turns"] for each in self.record["sites"] if each["lost_turns"]}

    def audit(self, site: int = WRONG) -> list[dict[str, Any]]:
        text = (self.folder / "sites" / f"site-{site}" / "audit.jsonl").read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    def site_log(self) -> str:
        return (self.site / "site.log").read_text(encoding="utf-8")

    def goes_on_without(self, code: str) -> None:
        """The run completes with the two others, and its record tells why the third was left out."""
        told(self.run(), ExitCode.OK, "completed")
        assert self.sites_of_rounds() == [["hospital-1", "hospital-3"]] * 3
        said = {each["site"]: (each["can_take_part"], each["reason"]) for each in self.record["sites"]}
        assert said == {"hospital-1": (True, "OK"), "hospital-2": (False, code), "hospital-3": (True, "OK")}


@pytest.fixture
def study(prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Study:
    folder = tmp_path / "study"
    shutil.copytree(prepared, folder, symlinks=True)
    return Study(folder, capsys)


def other_weights(study: Study, *, declared: bool) -> None:
    """The site's own new encoder, one number of it changed; `declared`: its card is that of the changed weights."""
    from bridge.encoders.cards import EncoderCard, read_card
    from bridge.encoders.loading import save_encoder

    theirs = study.site / "models" / "new_encoder"
    shutil.copytree(study.folder / "models" / "new_encoder", theirs)
    study.edit("site.yaml", lambda file: file["models"].__setitem__("new_encoder", "models/new_encoder"))
    state = load_file(theirs / "weights.safetensors")
    next(iter(state.values())).flat[0] += 1.0
    if not declared:
        save_file(state, theirs / "weights.safetensors")
        return
    import torch

    card = read_card(theirs, EncoderCard)
    shutil.rmtree(theirs)
    save_encoder(theirs, {name: torch.from_numpy(array) for name, array in state.items()}, card)


def test_a_site_with_other_encoder_weights_is_left_out(study: Study) -> None:
    other_weights(study, declared=True)
    study.goes_on_without("WEIGHTS_DIFFER")
    assert {line["event"] for line in study.audit()} <= {"sent", "refused"}
    assert "get the model folders of this study from the coordinator" in study.site_log()


def test_a_site_with_damaged_weights_stops_a_run_that_needs_it(study: Study) -> None:
    other_weights(study, declared=False)
    study.minimum(3)
    told(study.run(), ExitCode.RUN_FAILED, "error: describe: 2 sites can take part, 3 are needed",
         "hospital-2: WEIGHTS_MISSING", "What to do: see to the sites named, or lower sites.minimum")  # fmt: skip
    assert study.record["status"] == "failed"
    assert "new_encoder" in study.site_log()


def fake(monkeypatch: pytest.MonkeyPatch, behave: Callable[[Message, Context], Message | None]) -> None:
    """A ClientApp around the real one: what `behave` answers for the wrong partition, else the real answer."""
    real = client.app.app

    def app(message: Message, context: Context) -> Message:
        wrong = context.node_config["partition-id"] == WRONG
        reply = behave(message, context) if wrong else None
        return real(message, context) if reply is None else reply

    monkeypatch.setattr(client.app, "app", app)


def garbage(message: Message) -> Message:
    arrays = ArrayRecord({"update.A": Array(np.full((2, 2), np.nan)), SECRET: Array(np.arange(7))})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"weight": 1e9})})
    return Message(content, reply_to=message)


def test_a_site_that_answers_garbage_loses_its_turns(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    rounds = {"train": 0}

    def behave(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type != "train":
            return None
        rounds["train"] += 1
        if rounds["train"] == 1:
            return garbage(message)
        return Message(Error(code=4711, reason=SECRET), reply_to=message) if rounds["train"] == 2 else None

    fake(monkeypatch, behave)
    told(study.run(), ExitCode.OK, "completed")
    assert study.sites_of_rounds() == [["hospital-1", "hospital-3"]] * 2 + [HOSPITALS]
    assert study.lost_turns() == {"hospital-2": ["round 1: BAD_REPLY", "round 2: UNKNOWN_CODE"]}
    written = (study.folder / "run.json").read_text() + (study.folder / "log.jsonl").read_text()
    assert SECRET not in written


def test_a_run_that_needs_the_garbled_site_stops_with_a_checkpoint(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behave(message: Message, context: Context) -> Message | None:
        config = message.content.config_records["config"]
        return garbage(message) if message.metadata.message_type == "train" and config["round"] == 2 else None

    study.minimum(3)
    with monkeypatch.context() as patch:
        fake(patch, behave)
        told(study.run(), ExitCode.RUN_FAILED, "error: round 2: 2 good replies, 3 are needed",
             "missing: hospital-2 (BAD_REPLY)", "What to do: see to the missing sites, then resume")  # fmt: skip
    assert study.record["status"] == "failed"
    told(study.run("--resume"), ExitCode.OK, "completed")
    assert study.record["resumed_from_round"] == 1
    assert study.sites_of_rounds() == [HOSPITALS] * 3


def test_a_site_that_times_out_loses_its_turn(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = 4

    def behave(message: Message, context: Context) -> Message | None:
        if message.metadata.message_type == "train" and message.content.config_records["config"]["round"] == 1:
            time.sleep(seconds + 1)
        return None  # late, but an honest answer: it must not be taken for that of the next question

    def change(job: dict[str, Any]) -> None:
        job["sites"]["timeout_seconds"] = seconds
        job["train"]["rounds"] = 2

    fake(monkeypatch, behave)
    study.edit("job.yaml", change, study.folder)
    told(study.run(), ExitCode.OK, "completed")
    assert study.sites_of_rounds() == [["hospital-1", "hospital-3"], HOSPITALS]
    assert study.lost_turns() == {"hospital-2": ["round 1: NO_REPLY"]}


def test_a_site_whose_disk_is_full_while_it_caches(study: Study, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:
        (disk / "ballast").write_bytes(b"x" * 900_000)
        study.edit("site.yaml", lambda file: file["cache"].__setitem__("folder", str(disk / "cache")))
        study.goes_on_without("STORAGE")
        assert "No space left on device" in study.site_log()
        for entry in (disk / "cache").glob("*/*"):  # whole entries alone are left
            stamps = json.loads((entry / "entry.json").read_text(encoding="utf-8"))["arrays"]
            found = {path.stem: path.stat().st_size for path in entry.glob("*.npy")}
            assert found == {name: stamp["bytes"] for name, stamp in stamps.items()}


def keep_patients(study: Study, count: int) -> None:
    def change(file: dict[str, Any]) -> None:
        file["splits"]["pair"] = file["splits"]["pair"][:count]

    study.edit("site.yaml", change)


def cut_short(study: Study) -> None:
    for link in (study.site / "recordings").iterdir():
        content = link.read_bytes()
        link.unlink()
        link.write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("spoil", "code", "logged"),
    [
        (lambda study: keep_patients(study, 1), "TOO_FEW_PATIENTS", "minimum_patients is 2"),
        (lambda study: keep_patients(study, 0), "TOO_FEW_PATIENTS", "no usable window"),
        (cut_short, "TOO_FEW_PATIENTS", "can't be read as .npz"),
        (
            lambda study: study.edit("policy.yaml", lambda policy: policy.__setitem__("max_round", 3)),
            "SITE_MISCONFIGURED",
            "unknown key 'max_round', did you mean 'max_rounds'?",
        ),
    ],
    ids=["one patient", "zero patients", "truncated files", "unknown key of the policy"],
)
def test_a_site_that_cannot_take_part(spoil: Callable[[Study], None], code: str, logged: str, study: Study) -> None:
    spoil(study)
    study.minimum(3)
    result = study.run()
    told(result, ExitCode.RUN_FAILED, "2 sites can take part, 3 are needed", code, "What to do")
    assert logged in study.site_log()
    assert logged not in result[1] + (study.folder / "run.json").read_text() + (study.folder / "log.jsonl").read_text()


def test_an_unknown_key_of_the_job_names_the_closest(study: Study) -> None:
    path = study.folder / "job.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("local_steps:", "local_step:"), encoding="utf-8")
    told(study.run(), ExitCode.CONFIG, "unknown key 'train.local_step', did you mean 'local_steps'?", "What to do")


def test_a_policy_that_forbids_the_loss_wins(study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study.edit("policy.yaml", lambda policy: policy["items"].remove("train_loss"))
    for name in ("push_messages", "pull_messages"):
        monkeypatch.setattr(LocalGrid, name, getattr(LocalGrid, name))
    wrap(LocalGrid, str(tmp_path / "wire.jsonl"))
    told(study.run(), ExitCode.OK, "completed")
    lines = [json.loads(line) for line in (tmp_path / "wire.jsonl").read_text(encoding="utf-8").splitlines()]
    replies = [line for line in lines if line["direction"] == "from_site" and line["type"] == "train"]
    losses = [sum(value["name"] == "train_loss" for value in reply["values"]) for reply in replies]
    assert (len(replies), sum(losses)) == (9, 6)
    left = [(each["site"], each["item"]) for each in study.record["outbox"]]
    assert ("hospital-1", "train_loss") in left
    assert ("hospital-2", "update.A") in left
    assert ("hospital-2", "train_loss") not in left
    assert "train_loss" not in {line["item"] for line in study.audit()}
    assert study.sites_of_rounds() == [HOSPITALS] * 3
    assert all(each["loss"] is not None for each in study.record["rounds"])


def test_a_policy_that_forbids_updates_keeps_the_site_out(study: Study) -> None:
    def change(policy: dict[str, Any]) -> None:
        policy["items"] = [item for item in policy["items"] if not item.startswith("update.")]

    study.edit("policy.yaml", change)
    study.goes_on_without("POLICY_FORBIDS")
    assert {line["item"] for line in study.audit()} == {"site", "can_take_part", "reason"}
    assert "the item 'update.A' may not leave" in study.site_log()


def test_resume_with_a_changed_configuration_names_the_key(study: Study) -> None:
    study.edit("job.yaml", lambda job: job["train"].__setitem__("rounds", 1), study.folder)
    told(study.run(), ExitCode.OK, "completed")
    before = (study.folder / "run.json").read_bytes()
    result = study.run("--resume", "--set", "train.learning_rate=0.5")
    told(
        result, ExitCode.CONFIG, f"error: {study.folder}", "another configuration", "train.learning_rate", "What to do"
    )
    assert (study.folder / "run.json").read_bytes() == before


def test_files_of_a_run_that_were_damaged_are_named(study: Study) -> None:
    study.edit("job.yaml", lambda job: job["train"].__setitem__("rounds", 1), study.folder)
    told(study.run(), ExitCode.OK, "completed")
    for name, text in (("predictions.npz", "is damaged"), ("run.json", "is not a run record")):
        path = study.folder / name
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        told(study.run("--resume"), ExitCode.STORAGE, f"error: {path}: {text}", "Why: ", "What to do: ")
        path.write_bytes(content)
    told(study.run("--resume"), ExitCode.OK, "completed")


def test_a_disk_that_is_full_at_the_export(study: Study, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as disk:  # room for the study, not for a second copy of its models
        there = Study(disk / "run", study.capture)
        result = there.run()
        told(result, ExitCode.STORAGE, f"error: {disk / 'run'}", "Why: ", "No space left on device", "What to do: ")
        assert len(result[1]) < 1000
        assert not (disk / "run" / "bridge").exists()


def test_a_run_folder_that_became_read_only(study: Study) -> None:
    with read_only(study.folder):
        told(study.run(), ExitCode.STORAGE, f"error: {study.folder}: the run folder can't be written",
             "Why: Read-only file system", "What to do: name a writable folder")  # fmt: skip
    told(study.run(), ExitCode.OK, "completed")


@pytest.mark.slow
def test_flower_tells_what_is_wrong_with_the_job(study: Study) -> None:
    path = study.folder / "job.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("local_steps:", "local_step:"), encoding="utf-8")
    closest = "unknown key 'train.local_step', did you mean 'local_steps'?"
    told(study.run("--engine", "flower"), ExitCode.RUN_FAILED, closest, "What to do", "flower.log")
