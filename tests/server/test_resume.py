"""Crash and resume: the bridge of a run that was cut anywhere is that of an unbroken one, to the last bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Error
from safetensors import safe_open
from safetensors.numpy import load_file

from server.checkpoint import Best, Checkpoint, CheckpointFolder, newest_checkpoint
from server.errors import ResumeError, RunError, RunFolderError
from server.record import read_record
from tests.server.conftest import Models
from tests.server.wire import Crash, Site, WireGrid, run_server

NAMES = ("alpha", "beta", "gamma")
SITES = {"minimum": 2, "wait_seconds": 5, "timeout_seconds": 5, "retries": 0, "expected": NAMES}
ROUNDS = 5


def job(models: Models, **changes: Any) -> str:
    return models.job(**{"sites": SITES, "train": {"rounds": ROUNDS}, **changes})


def grid(stop_at: str | None = None) -> WireGrid:
    made = WireGrid([Site(name) for name in NAMES])
    made.stop_at = stop_at
    return made


def bridge(folder: Path) -> dict[str, np.ndarray]:
    return load_file(folder / "bridge" / "bridge.safetensors")


def comparable(folder: Path) -> dict[str, Any]:
    """What of a record must not depend on whether the run was cut."""
    record = read_record(folder).model_dump()
    rounds = [{k: v for k, v in each.items() if k != "seconds"} for each in record["rounds"]]
    return {k: record[k] for k in ("selection", "bridge", "evaluation", "status", "error")} | {"rounds": rounds}


CUTS = ["query.describe", "query.probe", "query.similarity", "train 1", "train 2", "train 5", "evaluate test"]
JOBS: list[dict[str, Any]] = [
    {"strategy": {"name": "FedAdam"}},
    {"strategy": {"name": "FedYogi"}, "train": {"rounds": ROUNDS, "keep": "best"}},
    {"strategy": {"name": "FedAvg"}, "bridge": {"rank": 2, "prototypes": 4, "initialisation": "public"}},
]


@pytest.mark.parametrize("changes", JOBS, ids=["FedAdam", "FedYogi best", "FedAvg public"])
def test_resumed_equals_unbroken(models: Models, tmp_path: Path, changes: dict[str, Any]) -> None:
    text = job(models, **changes)
    run_server(grid(), tmp_path / "whole", models.folder, text)
    for cut in CUTS:
        folder = tmp_path / cut.replace(" ", "-")
        with pytest.raises(Crash):
            run_server(grid(cut), folder, models.folder, text)
        assert read_record(folder).status == "failed"
        members = grid()
        run_server(members, folder, models.folder, text, resume=True)
        assert all(np.array_equal(bridge(folder)[key], bridge(tmp_path / "whole")[key]) for key in "ABP")
        assert comparable(folder) == comparable(tmp_path / "whole")
        asked = [config["round"] for kind, config in next(iter(members.sites.values())).seen if kind == "train"]
        first = int(cut[-1]) if cut[-1].isdigit() else ROUNDS + 1 if cut == "evaluate test" else 1
        assert asked == list(range(first, ROUNDS + 1))
        assert next(iter(members.sites.values())).seen[0][0] == "query.describe"


def test_many_cuts_in_one_run(models: Models, tmp_path: Path) -> None:
    text = job(models, strategy={"name": "FedAdam"})
    run_server(grid(), tmp_path / "whole", models.folder, text)
    cuts = ["train 1", "train 2", "train 2", "train 4", "train 5", "evaluate test"]
    for i, cut in enumerate(cuts):
        with pytest.raises(Crash):
            run_server(grid(cut), tmp_path / "cut", models.folder, text, resume=i > 0)
    run_server(grid(), tmp_path / "cut", models.folder, text, resume=True)
    assert comparable(tmp_path / "cut") == comparable(tmp_path / "whole")
    record = read_record(tmp_path / "cut")
    assert record.resumed_from_round == ROUNDS
    assert {row.count for row in record.outbox if row.item == "update.A"} == {ROUNDS}


def test_a_round_that_did_not_count_leaves_no_trace_in_the_optimiser(models: Models, tmp_path: Path) -> None:
    """The criterion is refused after FedAdam made its step: resumed with it permitted, the run is as if unbroken."""
    text = job(models, strategy={"name": "FedAdam"}, train={"rounds": 3, "keep": "best"})
    run_server(grid(), tmp_path / "whole", models.folder, text)
    shut = grid()
    for site in shut.sites.values():
        site.wrong["evaluate 2"] = lambda *_: Error(code=103, reason="")
    with pytest.raises(RunError, match=r"no site sends 'confusion.agreement': alpha \(POLICY_FORBIDS\)"):
        run_server(shut, tmp_path / "cut", models.folder, text)
    run_server(grid(), tmp_path / "cut", models.folder, text, resume=True)
    assert all(np.array_equal(bridge(tmp_path / "cut")[key], bridge(tmp_path / "whole")[key]) for key in "ABP")


def test_a_stopped_run_says_why_in_its_checkpoint(models: Models, tmp_path: Path) -> None:
    weak = grid()
    for node in (1000, 1002):
        weak.sites[node].wrong["train 3"] = lambda *_: None
    with pytest.raises(RunError):
        run_server(weak, tmp_path, models.folder, job(models))
    with safe_open(tmp_path / "checkpoints" / "round-000002.safetensors", framework="numpy") as file:
        state = json.loads(file.metadata()["state"])
    assert state["stopped"].endswith("missing: alpha (NO_REPLY), gamma (NO_REPLY)")
    assert state["progress"]["lost"] == {"alpha": ["round 3: NO_REPLY"], "gamma": ["round 3: NO_REPLY"]}
    run_server(grid(), tmp_path, models.folder, job(models), resume=True)
    record = read_record(tmp_path)
    assert (record.status, record.error, len(record.rounds)) == ("completed", None, ROUNDS)
    assert record.sites[0].lost_turns == ["round 3: NO_REPLY"]


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "state"])
def test_a_damaged_checkpoint_is_passed_over(models: Models, tmp_path: Path, damage: str) -> None:
    text = job(models, strategy={"name": "FedAdam"})
    run_server(grid(), tmp_path / "whole", models.folder, text)
    with pytest.raises(Crash):
        run_server(grid("train 5"), tmp_path / "cut", models.folder, text)
    newest = tmp_path / "cut" / "checkpoints" / "round-000004.safetensors"
    data = bytearray(newest.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        data[-20] ^= 1
    elif damage == "empty":
        data = bytearray()
    else:
        data = bytearray(bytes(data).replace(b'\\"round\\": 4', b'\\"round\\": 3', 1))
    newest.write_bytes(data)
    run_server(grid(), tmp_path / "cut", models.folder, text, resume=True)
    assert all(np.array_equal(bridge(tmp_path / "cut")[key], bridge(tmp_path / "whole")[key]) for key in "ABP")
    assert read_record(tmp_path / "cut").resumed_from_round == 3
    assert "round-000004.safetensors is damaged" in (tmp_path / "cut" / "log.jsonl").read_text()


def test_when_all_checkpoints_are_damaged_the_resume_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run_server(grid("train 5"), tmp_path, models.folder, job(models))
    for path in (tmp_path / "checkpoints").iterdir():
        path.write_bytes(b"")
    with pytest.raises(ResumeError, match="no checkpoint can be used"):
        run_server(grid(), tmp_path, models.folder, job(models), resume=True)


def test_resume_with_a_changed_config_is_refused(models: Models, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run_server(grid("train 3"), tmp_path, models.folder, job(models))
    changed = job(models, train={"rounds": ROUNDS, "learning_rate": 0.5}, strategy={"name": "Krum"})
    with pytest.raises(ResumeError) as caught:
        run_server(grid(), tmp_path, models.folder, changed, resume=True)
    assert "resume with a changed config" in str(caught.value)
    assert "train.learning_rate, strategy.name" in str(caught.value)
    assert caught.value.exit_code == 2
    (tmp_path / "run.json").unlink()
    with pytest.raises(ResumeError, match="resume with a changed config"):
        run_server(grid(), tmp_path, models.folder, changed, resume=True)


def test_the_same_job_written_otherwise_is_the_same_job(models: Models, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run_server(grid("train 3"), tmp_path, models.folder, job(models))
    run_server(grid(), tmp_path, models.folder, "# a comment\n" + job(models, evaluate={"every": 0}), resume=True)
    assert read_record(tmp_path).status == "completed"


def test_resuming_a_completed_run_changes_nothing(models: Models, tmp_path: Path) -> None:
    run_server(grid(), tmp_path, models.folder, job(models))
    before = (tmp_path / "run.json").read_bytes()
    idle = grid()
    run_server(idle, tmp_path, models.folder, job(models), resume=True)
    assert (tmp_path / "run.json").read_bytes() == before
    assert all(site.seen == [] for site in idle.sites.values())
    assert "complete already" in (tmp_path / "log.jsonl").read_text()


def test_resume_needs_a_folder(models: Models, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="nothing to resume"):
        run_server(grid(), tmp_path / "nowhere", models.folder, job(models), resume=True)


def test_a_half_written_log_line_stays_alone(models: Models, tmp_path: Path) -> None:
    with pytest.raises(Crash):
        run_server(grid("train 3"), tmp_path, models.folder, job(models))
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"time": "2026-01-01T00:00:00", "eve')
    run_server(grid(), tmp_path, models.folder, job(models), resume=True)
    broken = []
    for line in (tmp_path / "log.jsonl").read_text().splitlines():
        try:
            json.loads(line)
        except json.JSONDecodeError:
            broken.append(line)
    assert broken == ['{"time": "2026-01-01T00:00:00", "eve']


def test_checkpoints_are_few_whole_and_free_of_pickle(tmp_path: Path) -> None:
    arrays = {"A": np.arange(6, dtype=np.float32).reshape(2, 3).T, "B": np.zeros((0, 4), np.float32)}
    moments = {"m_t": {"A": np.ones((3, 2)), "B": np.zeros((0, 4))}}
    checkpoints = CheckpointFolder(tmp_path)
    for round_ in range(7):
        best = Best(round_, 0.5, arrays) if round_ > 2 else None
        progress = {"rounds": [{"round": i} for i in range(round_)]}
        checkpoints.save(Checkpoint(round_, "a" * 64, arrays, moments, best, progress, "because"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"round-00000{i}.safetensors" for i in (4, 5, 6)]
    found, damaged = newest_checkpoint(tmp_path, "a" * 64)
    assert damaged == []
    assert found is not None
    assert (found.round, found.stopped, found.progress) == (6, "because", {"rounds": [{"round": i} for i in range(6)]})
    np.testing.assert_array_equal(found.arrays["A"], arrays["A"])
    assert found.arrays["B"].shape == (0, 4)
    assert found.optimiser["m_t"]["A"].dtype == np.float64
    assert found.best is not None
    assert (found.best.round, found.best.criterion) == (6, 0.5)
    with pytest.raises(ResumeError):
        newest_checkpoint(tmp_path, "b" * 64)


def test_a_checkpoint_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    checkpoint = Checkpoint(1, "a" * 64, {"A": np.zeros(3, np.float32)})
    with pytest.raises(RunFolderError, match="checkpoint can't be written"):
        CheckpointFolder(tmp_path / "missing").save(checkpoint)


def child(models: Models, folder: Path, resume: bool) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    run_server(grid(), folder, models.folder, job(models, strategy={"name": "FedAdam"}), resume=resume)


@pytest.mark.slow
def test_killed_at_random_moments(models: Models, tmp_path: Path) -> None:
    """SIGKILL to a real process, again and again until the run gets through; then nothing tells it was ever killed."""
    run_server(grid(), tmp_path / "whole", models.folder, job(models, strategy={"name": "FedAdam"}))
    wanted = bridge(tmp_path / "whole")
    chance, context, kills = random.Random(0), multiprocessing.get_context("fork"), 0
    started = time.monotonic()
    process = context.Process(target=child, args=(models, tmp_path / "timed", False))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    unbroken = time.monotonic() - started
    for trial in range(30):
        folder = tmp_path / str(trial)
        process = context.Process(target=child, args=(models, folder, False))
        process.start()
        time.sleep(chance.uniform(0, unbroken))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join(30)
        kills += process.exitcode == -signal.SIGKILL
        if folder.is_dir():
            run_server(grid(), folder, models.folder, job(models, strategy={"name": "FedAdam"}), resume=True)
            assert all(np.array_equal(bridge(folder)[key], wanted[key]) for key in "ABP")
            assert [each.round for each in read_record(folder).rounds] == list(range(1, ROUNDS + 1))
            assert not [path for path in folder.rglob(".*") if path.name != ".lock"]
    assert kills >= 10


def test_a_process_that_is_told_to_end_says_so(models: Models, tmp_path: Path) -> None:
    """As Flower does on SIGTERM; the text of a SystemExit would be its number."""

    def ended(site: Site, message: object, honest: object) -> None:
        raise SystemExit(0)

    members = [Site("a"), Site("b", wrong={"train 2": ended})]  # type: ignore[dict-item]
    with pytest.raises(SystemExit):
        run_server(WireGrid(members), tmp_path, models.folder, models.job(sites={"minimum": 2}))
    record = read_record(tmp_path)
    assert record.status == "failed"
    assert record.error is not None
    assert record.error.startswith("the run's process was told to end")
