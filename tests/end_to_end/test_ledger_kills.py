"""The ledger under SIGKILL and under a hundred processes at once.

Children are real processes, forked, that open the ledger, reserve and ask. Each tells through a file with one
unbuffered write when it computes, and through another when the reply is in its hands, which is when it would leave.
"""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import client.errors
from bridge.privacy.accounting import epsilon
from client.audit import AuditLog
from client.errors import BudgetError, ReplayError
from client.ledger import Ledger, MessageKey
from client.ledger.verify import verify
from client.ledger.view import view
from client.site import Site
from tests.client.ledgers import DELTA, PROBE, STEP, STEPS, ledger_site, plan, rdp_epsilon

pytestmark = pytest.mark.slow

PRODUCT = tuple(str(Path(client.errors.__file__).parent / name) for name in ("ledger", "vault.py", "audit.py"))


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where there is one: a kill, unlike a power cut, loses nothing that was written, so thousands
    of waits for the disk would show nothing."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


@dataclass
class Case:
    """One message that is asked under a kill: of a run of its own, with patients of its own."""

    site: Site
    name: str

    @property
    def computed(self) -> Path:
        """Grows by one byte each time the reply is computed."""
        return self.site.folder / f"{self.name}.computed"

    @property
    def left(self) -> Path:
        """Holds the reply once it would leave."""
        return self.site.folder / f"{self.name}.left"

    @property
    def reply(self) -> bytes:
        return f"reply of {self.name}".encode() * 20

    def compute(self) -> bytes:
        appended(self.computed, b"x")
        return self.reply

    def ask(self) -> bytes:
        """Open, reserve, ask: what every message does."""
        with Ledger.open(self.site) as ledger:
            ledger.reserve(self.name, plan(cohorts={"pair": [f"{self.name}-1", f"{self.name}-2"]}))
            key = MessageKey("train", 1)
            return ledger.answer(self.name, key, "q" * 64, (STEP,), "pair", self.compute, encrypt=True)

    def child(self, prepare: Callable[[], None] = lambda: None) -> int:
        """A process that asks once; exit code 0: replied, 3: refused."""
        pid = os.fork()
        if pid:
            return pid
        code = 1
        try:
            prepare()
            appended(self.left, self.ask())
            code = 0
        except ReplayError:
            code = 3
        finally:
            os._exit(code)

    def check(self, ledger: Ledger) -> str:
        """What is true whatever was killed when; returns what became of the message."""
        computed = self.computed.stat().st_size if self.computed.exists() else 0
        left = self.left.read_bytes() if self.left.exists() else b""
        begun = ledger.store.rows("kind = 'begun' AND run = ?", (self.name,))
        answered = ledger.store.rows("kind = 'answered' AND run = ?", (self.name,))
        plans = ledger.store.rows("kind = 'plan' AND run = ?", (self.name,))
        assert computed <= 1, "computed twice"
        assert len(plans) <= 1
        assert len(begun) <= 1, "charged twice"
        assert computed <= len(begun) <= len(plans), "computed before it was charged"
        assert bool(left) <= len(answered) <= len(begun), "left uncharged"
        assert left in (b"", self.reply)
        if begun:
            assert sum(begun[0].body["drawn"].values()) == 1
        try:
            again = self.ask()
        except ReplayError:
            assert begun
            assert not answered
            assert not left
            return "refused"
        assert again == self.reply
        if answered:
            assert self.computed.stat().st_size == computed == 1
            return "stored"
        assert not begun
        assert computed == 0
        assert self.computed.stat().st_size == 1
        return "free"


def appended(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(descriptor, content)
    os.close(descriptor)


def ended(pid: int) -> int:
    """The exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def warm() -> None:
    """What children inherit: imports, and the price of the plan."""
    epsilon((PROBE, STEPS), DELTA)
    epsilon((), DELTA)


def sites(folder: Path) -> Iterator[Site]:
    number = 0
    while True:
        yield ledger_site(folder / f"site{number}")
        number += 1


def sound(site: Site) -> None:
    with Ledger.open(site) as ledger:
        verify(ledger, AuditLog(site.audit_path))


RANDOM_KILLS, A_SITE = 1000, 50


def test_a_kill_at_a_random_moment_loses_and_repeats_nothing(folder: Path) -> None:
    warm()
    rng = random.Random(5)
    site_of = sites(folder)
    outcomes = {"free": 0, "refused": 0, "stored": 0}
    killed = number = 0
    usual = duration(Case(next(site_of), "measure"))
    while killed < RANDOM_KILLS:
        if number % A_SITE == 0:
            site = next(site_of)
        case = Case(site, f"run{number}")
        child = case.child()
        time.sleep(rng.uniform(0, usual))
        os.kill(child, signal.SIGKILL)
        number += 1
        hit = ended(child) == -signal.SIGKILL
        # A machine with other work is now slow, now fast: follow it, so that kills fall on a child's whole life.
        usual *= 1.01 if hit else 0.96
        if hit:
            killed += 1
            with Ledger.open(site) as ledger:
                outcomes[case.check(ledger)] += 1
        if number % A_SITE == 0:
            sound(site)
        assert number < 5 * RANDOM_KILLS, f"only {killed} of {number} children were killed before their end"
    sound(site)
    assert min(outcomes.values()) > 0, outcomes


def duration(case: Case) -> float:
    """How long a child usually needs, in seconds."""
    times = []
    for number in range(9):
        start = time.monotonic()
        assert ended(Case(case.site, f"{case.name}{number}").child()) == 0
        times.append(time.monotonic() - start)
    return statistics.median(times)


def test_of_two_that_ask_at_once_the_other_survives_a_kill(folder: Path) -> None:
    warm()
    rng = random.Random(6)
    usual = duration(Case(ledger_site(folder / "measure"), "measure"))
    site = ledger_site(folder / "site")
    codes = {0: 0, 3: 0}
    for number in range(150):
        case = Case(site, f"run{number}")
        children = [case.child(), case.child()]
        time.sleep(rng.uniform(0, usual))
        victim = children.pop(rng.randrange(2))
        os.kill(victim, signal.SIGKILL)
        ended(victim)
        code = ended(children[0])
        codes[code] += 1
        left = case.left.read_bytes() if case.left.exists() else b""
        assert left in (b"", case.reply, 2 * case.reply)
        computed = case.computed.stat().st_size if case.computed.exists() else 0
        # Where the victim died between its charge and its first byte, the other is refused.
        assert computed == 1 or (computed == 0 and code == 3)
    assert codes[0] > 0
    sound(site)


def die_at_statement(number: int) -> None:
    """Kill this process when SQLite is about to run its `number`-th statement."""
    connect, count = sqlite3.connect, [0]

    def trace(_: str) -> None:
        if count[0] == number:
            os.kill(os.getpid(), signal.SIGKILL)
        count[0] += 1

    def traced(*arguments: Any, **keywords: Any) -> Any:
        database = connect(*arguments, **keywords)
        database.set_trace_callback(trace)
        return database

    sqlite3.connect = traced


def die_at_line(number: int) -> None:
    """Kill this process before the `number`-th line that it runs of the ledger, the vault and the audit log."""
    count = [0]

    def trace(frame: FrameType, event: str, _: object) -> Any:
        if not frame.f_code.co_filename.startswith(PRODUCT):
            return None
        if event == "line":
            if count[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            count[0] += 1
        return trace

    sys.settrace(trace)


Die = Callable[[int], None]


@pytest.mark.parametrize(("die", "least"), [(die_at_statement, 20), (die_at_line, 150)])
def test_a_kill_at_every_statement_of_a_message_loses_and_repeats_nothing(folder: Path, die: Die, least: int) -> None:
    warm()
    site_of = sites(folder)
    outcomes = {"free": 0, "refused": 0, "stored": 0}
    number, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        if number % A_SITE == 0:
            site = next(site_of)
            Ledger.open(site).close()
        case = Case(site, f"run{number}")
        code = ended(case.child(lambda: die(number)))  # noqa: B023 - forked at once
        with Ledger.open(site) as ledger:
            outcomes[case.check(ledger)] += 1
        number += 1
        if number % A_SITE == 0:
            sound(site)
    assert code == 0
    sound(site)
    assert number > least
    assert min(outcomes.values()) > 0, outcomes


@pytest.mark.parametrize(("die", "least"), [(die_at_statement, 20), (die_at_line, 60)])
def test_a_kill_at_every_statement_of_the_first_opening_leaves_a_ledger_that_opens(
    folder: Path, die: Die, least: int
) -> None:
    number, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        site = ledger_site(folder / f"site{number}")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                die(number)
                Ledger.open(site)
                code = 0
            finally:
                os._exit(code)
        code = ended(child)
        sound(site)
        number += 1
    assert code == 0
    assert number > least


def together(work: Callable[[int], int], processes: int = 100) -> list[int]:
    """Exit codes of processes that begin at the same moment."""
    wait, go = os.pipe()
    children = []
    for number in range(processes):
        pid = os.fork()
        if pid == 0:
            code = 99
            try:
                os.close(go)
                os.read(wait, 1)
                code = work(number)
            finally:
                os._exit(code)
        children.append(pid)
    os.close(wait)
    os.close(go)
    return [ended(pid) for pid in children]


def test_a_hundred_messages_at_once_never_overspend(folder: Path) -> None:
    warm()
    site = ledger_site(folder / "site")
    steps = type(STEPS)("training", "pair", 4.0, 0.25, 40)
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan(releases=(steps,)))

    def work(number: int) -> int:
        with Ledger.open(site) as ledger:
            key = MessageKey("train", number)
            try:
                reply = ledger.answer("run", key, "q", (STEP,), "pair", lambda: b"%d" % number, encrypt=True)
            except ReplayError:
                return 5
            return 0 if reply == b"%d" % number else 1

    codes = together(work)
    assert codes.count(0) == 40
    assert codes.count(5) == 60
    sound(site)


def test_a_message_asked_a_hundred_times_at_once_is_computed_once(folder: Path) -> None:
    warm()
    case = Case(ledger_site(folder / "site"), "run")

    def slow() -> bytes:
        appended(case.computed, b"x")
        time.sleep(0.3)
        return case.reply

    def work(_: int) -> int:
        with Ledger.open(case.site) as ledger:
            ledger.reserve("run", plan())
            return int(
                case.reply != ledger.answer("run", MessageKey("train", 1), "q", (STEP,), "pair", slow, encrypt=True)
            )

    assert together(work) == [0] * 100
    assert case.computed.stat().st_size == 1
    with Ledger.open(case.site) as ledger:
        assert len(view(ledger).plans) == 1
        assert view(ledger).plans[0].phases[1].used == 1
    sound(case.site)


def test_a_hundred_plans_at_once_never_overspend(folder: Path) -> None:
    warm()
    site = ledger_site(folder / "site")
    admitted = 7
    cap = rdp_epsilon(*[PROBE] * admitted) + 2e-3
    assert rdp_epsilon(*[PROBE] * (admitted + 1)) > cap

    def work(number: int) -> int:
        with Ledger.open(site) as ledger:
            try:
                ledger.reserve(f"run{number}", plan(cap, (PROBE,)))
            except BudgetError:
                return 5
            return 0

    codes = together(work)
    assert codes.count(0) == admitted
    assert codes.count(5) == 100 - admitted
    sound(site)
