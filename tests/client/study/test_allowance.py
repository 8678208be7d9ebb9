"""How often a question is answered: exactly as often as the study says, whoever asks at once and whatever is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bridge.job import job_text
from bridge.messages import ReasonCode
from client.errors import NotAcceptedError
from client.site import Site, open_site
from client.study.allowance import ALLOWANCE, Question, take, taken
from client.study.record import Accepted
from client.study.running import set_running_bundle
from client.study.withdraw import withdraw
from tests.client.agreements import agree
from tests.client.disk import read_only, small_disk
from tests.client.ledgers import ledger_site
from tests.client.sites import PERMISSIVE, Small, build_job, build_site, send, start_arrays, train_config

TRAIN = Question("train", 1)


@pytest.fixture
def study(small: Small, tmp_path: Path) -> Accepted:
    return agree(ledger_site(tmp_path / "site"), build_job(small.models), attempts=3)


@pytest.fixture
def site(study: Accepted) -> Site:
    return open_site(study.folder.parents[1])


def refused(site: Site, study: Accepted, question: Question) -> ReasonCode:
    with pytest.raises(NotAcceptedError) as error:
        take(site, study, question)
    return error.value.reason


def test_each_question_has_an_allowance_of_its_own(site: Site, study: Accepted) -> None:
    questions = [
        TRAIN,
        Question("train", 2),
        Question("query.probe"),
        Question("evaluate", 2, "test"),
        Question("evaluate", 2, "validation"),
    ]
    assert taken(site, study) == {}
    for question in questions:
        for _ in range(3):
            take(site, study, question)
    for question in questions:
        assert refused(site, study, question) == ReasonCode.ASKED_TOO_OFTEN
    names = ("evaluate round 2 test", "evaluate round 2 validation", "query.probe", "train round 1", "train round 2")
    assert taken(site, study) == dict.fromkeys(names, 3)


def test_another_study_has_its_own_count_and_accepting_again_gives_no_more(
    small: Small, site: Site, study: Accepted
) -> None:
    for _ in range(3):
        take(site, study, TRAIN)
    take(site, agree(site, build_job(small.models, name="second"), attempts=1), TRAIN)
    withdraw(site, study.id, "me")
    again = agree(site, build_job(small.models), attempts=3)
    assert again.id == study.id
    assert refused(site, again, TRAIN) == ReasonCode.ASKED_TOO_OFTEN


FORK = multiprocessing.get_context("fork")


def _ask(site: Site, study: Accepted, rounds: int, go: Any, said: int) -> None:
    """A process that takes one turn in each round, and writes down what it got."""
    go.wait()
    for round_ in range(1, rounds + 1):
        try:
            take(site, study, Question("train", round_))
            answer = "taken"
        except NotAcceptedError as error:
            answer = error.reason.name
        os.write(said, f"{answer} {round_}\n".encode())


def test_twenty_processes_at_once_get_exactly_the_allowance(site: Site, study: Accepted) -> None:
    ours, theirs = os.pipe()
    go = FORK.Barrier(20)
    children = [FORK.Process(target=_ask, args=(site, study, 5, go, theirs)) for _ in range(20)]
    try:
        for child in children:
            child.start()
        for child in children:
            child.join(timeout=120)
        assert [child.exitcode for child in children] == [0] * 20
        os.close(theirs)
        with os.fdopen(ours) as file:
            said = Counter(file.read().splitlines())
    finally:
        for child in children:
            child.kill()
            child.join()
    expected = {f"taken {round_}": 3 for round_ in range(1, 6)}
    assert said == Counter({**expected, **{f"ASKED_TOO_OFTEN {round_}": 17 for round_ in range(1, 6)}})
    assert taken(site, study) == {f"train round {round_}": 3 for round_ in range(1, 6)}


def test_what_was_taken_before_a_kill_stays_taken(site: Site, study: Accepted) -> None:
    """Children are killed wherever they are: each turn that one had is counted, at most one more, none above the
    limit."""
    had: Counter[str] = Counter()
    for number in range(24):
        ours, theirs = os.pipe()
        go = FORK.Event()
        go.set()
        child = FORK.Process(target=_ask, args=(site, study, 400, go, theirs))
        child.start()
        os.close(theirs)
        with os.fdopen(ours) as file:
            lines = [file.readline() for _ in range(1 + number)]  # the later ones come further
            time.sleep(0.0007 * number)
            child.kill()
            child.join()
            lines += file.readlines()
        assert child.exitcode == -signal.SIGKILL
        had.update(line.split()[1] for line in lines if line.startswith("taken "))
        count = taken(site, study)
        assert max(count.values()) <= 3
        assert all(count[f"train round {round_}"] >= times for round_, times in had.items())
        assert had.total() <= sum(count.values()) <= had.total() + number + 1
    assert had.total() > 24


def test_a_count_that_was_killed_while_it_was_made_is_empty(site: Site, study: Accepted) -> None:
    (site.studies_folder / ALLOWANCE).touch()
    assert taken(site, study) == {}
    take(site, study, TRAIN)
    assert taken(site, study) == {"train round 1": 1}


@pytest.mark.parametrize("content", [b"no database, but longer than the header of one is, by far" * 4, b"short"])
def test_a_damaged_count_answers_nothing(site: Site, study: Accepted, content: bytes) -> None:
    (site.studies_folder / ALLOWANCE).write_bytes(content)
    assert refused(site, study, TRAIN) == ReasonCode.STUDY_UNUSABLE


def test_a_count_of_another_kind_answers_nothing(site: Site, study: Accepted) -> None:
    with sqlite3.connect(site.studies_folder / ALLOWANCE) as database:
        database.execute("CREATE TABLE taken (something TEXT)")
    database.close()
    assert refused(site, study, TRAIN) in (ReasonCode.STORAGE, ReasonCode.STUDY_UNUSABLE)


def test_a_disk_that_is_full_or_can_only_be_read_answers_nothing(small: Small, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk") as folder:
        site = ledger_site(folder / "site")
        study = agree(site, build_job(small.models), attempts=3)
        with read_only(site.studies_folder):
            assert refused(site, study, TRAIN) == ReasonCode.STORAGE
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        assert refused(site, study, TRAIN) == ReasonCode.STORAGE
        (folder / "filler").unlink()
        take(site, study, TRAIN)
        assert taken(site, study) == {"train round 1": 1}


def test_a_site_counts_sound_questions_before_it_works(small: Small, tmp_path: Path) -> None:
    """A refused message costs nothing, a failed one its turn; describe is not counted."""
    site = open_site(build_site(tmp_path / "site", "beta", models=small.models, policy=PERMISSIVE))
    job = build_job(small.models)
    study = agree(site, job, attempts=2)

    def code(kind: str, config: dict[str, object]) -> int:
        arrays = start_arrays() if kind == "train" else None
        reply = send({"site": str(site.path)}, job_text(job), kind, config, arrays)
        return reply.error.code if reply.has_error() else 0

    try:
        assert [code("query.describe", {}) for _ in range(4)] == [0] * 4
        assert code("train", train_config(9)) == ReasonCode.MESSAGE_INVALID
        assert taken(site, study) == {}
        assert [code("train", train_config(1, m)) for m in (1, 2, 3)] == [0, 0, ReasonCode.ASKED_TOO_OFTEN]
        assert code("train", train_config(2)) == 0
        (site.folder / "recordings").rename(site.folder / "elsewhere")
        assert code("train", train_config(2)) == ReasonCode.SITE_MISCONFIGURED
        assert code("train", train_config(2)) == ReasonCode.ASKED_TOO_OFTEN
    finally:
        set_running_bundle("")
    assert taken(site, study) == {"train round 1": 2, "train round 2": 2}
    assert "over all runs" in site.log_path.read_text()
