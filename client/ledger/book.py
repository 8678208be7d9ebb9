"""The ledger: plans are reserved before anything is computed, messages draw down from them, replies are kept.

A message goes through four steps, each on disk before the next: it is charged (a `begun` row), the audit log learns the
ledger's new head, the reply is computed and stored (an `answered` row), and only then handed out. Whatever is killed
when: a reply that may have left is charged, a message is computed once at most, and one that was begun and has no reply
is refused for ever, since nobody can tell what became of it.

The kinds of rows: `opened`, `plan` and `joined` (patients and what they are charged), `begun`, `answered`, `forgotten`
(a patient who withdrew) and `purged` (a stored reply that was deleted since).
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

from filelock import FileLock, Timeout

from bridge.hashing import sha256_json
from client.audit import AuditLog
from client.audit import Entry as AuditEntry
from client.errors import BudgetError, ReplayError
from client.ledger.opening import open_store
from client.ledger.plan import Cost, MessageKey, Plan, charged, counts, from_json, spent, to_json
from client.ledger.store import Head, Row, Store, broken, unusable
from client.vault import Vault

if TYPE_CHECKING:
    from bridge.privacy.accounting import Release
    from client.site import Site

Members = Mapping[str, frozenset[str]]
"""Keyed hashes of patients by cohort."""


class Ledger:
    """A site's open ledger. Any number of processes may hold it open; close it, or use it in a `with` block."""

    def __init__(self, store: Store, vault: Vault, audit: AuditLog) -> None:
        self.store = store
        self.vault = vault
        self._audit = audit

    @classmethod
    def open(cls, site: Site) -> Ledger:
        """The ledger of a site; a new one, with a new key, where there was never one.

        Raises `LedgerError` where ledger or key is missing, damaged, of another kind, not the other's, or older than
        the audit log says.
        """
        audit = AuditLog(site.audit_path)
        return cls(*open_store(site, audit), audit)

    def close(self) -> None:
        """Close the file."""
        self.store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reserve(self, run: str, plan: Plan) -> None:
        """Charge a run's whole plan to every patient of its cohorts, used or not; once, however often it is called.

        Patients who were not there at an earlier call are charged when they come. Raises `BudgetError` where a
        patient's plans would together cost more than `plan.cap` (nobody is charged then), and `ReplayError` where the
        run has reserved another plan.
        """
        asked = {
            cohort: frozenset(map(self.vault.patient, patients)) for cohort, patients in sorted(plan.cohorts.items())
        }
        known = self._plan(run)
        if known is not None and not any(self._newcomers(known, plan, asked).values()):
            return
        with self.store.writing():
            known = self._plan(run)
            new = asked if known is None else self._newcomers(known, plan, asked)
            self._check_budget(plan, new, known)
            head = self._charge(run, plan, new, known)
        self._publish(run, head, "reserve a plan")

    def answer(
        self,
        run: str,
        key: MessageKey,
        request_sha256: str,
        releases: tuple[Release, ...],
        cohort: str,
        compute: Callable[[], bytes],
        *,
        encrypt: bool,
        wait_seconds: float = 600.0,
    ) -> bytes:
        """The reply to a message: computed and charged once, and from then on the stored one.

        `releases` is what the message costs, `cohort` whose patients it looks at; `encrypt` a reply that is not noised
        yet. An exception of `compute` is passed on, and the message stays charged. Raises `BudgetError` where the run
        has reserved nothing for the cohort, `ReplayError` where its plan is used up, or the message was asked before in
        another form, or was begun and has no reply. While another process computes it, its end is awaited for
        `wait_seconds`.
        """
        with self._alone(run, key, wait_seconds):
            begun = self.store.last("kind = 'begun' AND run = ? AND name = ?", (run, key.text))
            if begun is not None:
                return self._again(begun, key, request_sha256)
            number = self._begin(run, key, request_sha256, releases, cohort)
            content = compute()
            self._finish(run, key, number, content, encrypt)
            return content

    def withdrawn(self) -> frozenset[str]:
        """Keyed hashes of the patients who have withdrawn."""
        return frozenset(name for (name,) in self.store.execute("SELECT name FROM chain WHERE kind = 'forgotten'"))

    def knows(self, patient: str) -> bool:
        """Whether a plan has charged the patient, or the patient has withdrawn."""
        name = self.vault.patient(patient)
        return any(self.costs([name]).values()) or name in self.withdrawn()

    def forget(self, patient: str) -> int:
        """Book a patient's withdrawal and delete the stored replies of every run that has charged the patient; returns
        how many. What was spent stays spent. Booked once, however often it is called; replies that came since are
        deleted then, too."""
        name = self.vault.patient(patient)
        with self.store.writing():
            if self.store.last("kind = 'forgotten' AND name = ?", (name,)) is None:
                self.store.append("forgotten", "", name, {})
            stored = self.store.execute(
                "SELECT DISTINCT replies.row, begun.run FROM replies "
                "JOIN chain AS begun ON begun.number = replies.row "
                "JOIN chain AS plan ON plan.kind = 'plan' AND plan.run = begun.run "
                "JOIN members ON members.plan = plan.number WHERE members.patient = ? ORDER BY replies.row",
                (name,),
            )
            for row, run in stored:
                self.store.append("purged", run, str(row), {"why": "a patient withdrew"})
                self.store.execute("DELETE FROM replies WHERE row = ?", (row,))
            head = self.store.head()
        self.store.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        note = AuditEntry(run="", message="", event="withdrawn", sha256=name, purpose="a patient withdrew")
        self._publish("", head, "book a withdrawal", note)
        return len(stored)

    def _plan(self, run: str) -> Row | None:
        return self.store.last("kind = 'plan' AND run = ?", (run,))

    def members(self, plan: Row) -> Members:
        """The patients that a plan's row has charged so far."""
        found: dict[str, set[str]] = {}
        for cohort, patient in self.store.execute("SELECT cohort, patient FROM members WHERE plan = ?", (plan.number,)):
            found.setdefault(cohort, set()).add(patient)
        return {cohort: frozenset(patients) for cohort, patients in found.items()}

    def _newcomers(self, known: Row, plan: Plan, asked: Members) -> Members:
        """Those of the cohorts whom the run's plan has not charged yet."""
        if known.body["job"] != plan.sha256 or known.body["releases"] != to_json(plan.releases):
            raise ReplayError(
                "the run has reserved another plan",
                why="its job has changed since; a run has one job",
                fix="the coordinator must start a new run",
            )
        there = self.members(known)
        return {cohort: patients - there.get(cohort, frozenset()) for cohort, patients in asked.items()}

    def costs(self, patients: Iterable[str]) -> dict[str, dict[int, frozenset[str]]]:
        """For each keyed hash the plans' row numbers that charge it, and in each the cohorts."""
        found: dict[str, dict[int, frozenset[str]]] = {}
        for patient in patients:
            mine: dict[int, frozenset[str]] = {}
            for number, cohort in self.store.execute("SELECT plan, cohort FROM members WHERE patient = ?", (patient,)):
                mine[number] = mine.get(number, frozenset()) | {cohort}
            found[patient] = mine
        return found

    def worst(self, plan: Plan, new: Members, known: Row | None = None) -> tuple[float, float]:
        """What the plan would bring the most charged of these patients to, and what that one has spent before.

        A cohort without patients counts as one of unspent ones, so that a plan too costly for anybody is refused
        whoever is there. Patients charged by the same plans are composed once.
        """
        own = -1 if known is None else known.number
        patients = frozenset().union(*new.values())
        groups: set[frozenset[tuple[int, str]]] = {frozenset()}
        for cohort in new:
            groups.add(frozenset({(own, cohort)}))
        before: dict[frozenset[tuple[int, str]], frozenset[tuple[int, str]]] = {group: frozenset() for group in groups}
        for patient, mine in self.costs(patients).items():
            old = frozenset((number, cohort) for number, cohorts in mine.items() for cohort in cohorts)
            joins = frozenset((own, cohort) for cohort, members in new.items() if patient in members)
            before[old | joins] = old
        plans = self._plans() | {own: Cost(plan.releases, plan.delta)}
        return max((_composed(plans, after), _composed(plans, old)) for after, old in before.items())

    def most_spent(self, patients: Iterable[str]) -> float:
        """Epsilon of the most charged of these keyed hashes; 0 where nobody was charged."""
        plans = self._plans()
        groups = {
            frozenset((number, cohort) for number, cohorts in mine.items() for cohort in cohorts)
            for mine in self.costs(patients).values()
        }
        return max((_composed(plans, group) for group in groups), default=0.0)

    def _plans(self) -> dict[int, Cost]:
        return {
            row.number: Cost(from_json(row.body["releases"]), row.body["delta"])
            for row in self.store.rows("kind = 'plan'")
        }

    def _check_budget(self, plan: Plan, new: Members, known: Row | None) -> None:
        after, before = self.worst(plan, new, known)
        if after > plan.cap:
            raise BudgetError(
                f"the plan would bring a patient to epsilon {after:.4g}; earlier plans have spent {before:.4g} of it",
                why=f"the policy's privacy.epsilon_cap is {plan.cap:g}, so {max(plan.cap - before, 0):.4g} is left",
                fix="ask for a plan with more noise or fewer rounds; what is spent stays spent, whatever became of it",
            )

    def _charge(self, run: str, plan: Plan, new: Members, known: Row | None) -> Head:
        who = {cohort: {"count": len(each), "sha256": sha256_json(sorted(each))} for cohort, each in new.items()}
        if known is None:
            body = {
                "job": plan.sha256,
                "releases": to_json(plan.releases),
                "delta": plan.delta,
                "cap": plan.cap,
                "members": who,
            }
            head = self.store.append("plan", run, "", body)
            number = head.number
        else:
            number = known.number
            head = self.store.append("joined", run, "", {"plan": number, "cap": plan.cap, "members": who})
        rows = [(number, cohort, patient, head.number) for cohort, each in new.items() for patient in sorted(each)]
        self.store.insert_many("INSERT INTO members VALUES (?, ?, ?, ?)", rows)
        return head

    def _begin(self, run: str, key: MessageKey, request_sha256: str, releases: tuple[Release, ...], cohort: str) -> int:
        """Charge the message; returns the number of its row."""
        with self.store.writing():
            plan = self._plan(run)
            foreign = any(release.cohort != cohort for release in releases)
            if plan is None or cohort not in plan.body["members"] or foreign:
                raise BudgetError(
                    f"the run has reserved nothing for {cohort} patients",
                    why="a message is paid from its run's plan",
                    fix="this is a defect of fedbridge if the job has such a message: report it",
                )
            last = self.store.last("kind = 'begun' AND run = ?", (run,))
            drawn = Counter(last.body["drawn"] if last else {}) + counts(to_json(releases))
            _check_drawn(drawn, counts(plan.body["releases"]))
            body = {
                "request": request_sha256,
                "cohort": cohort,
                "releases": to_json(releases),
                "drawn": dict(drawn),
            }
            head = self.store.append("begun", run, key.text, body)
        self._publish(run, head, "charge a message")
        return head.number

    def _finish(self, run: str, key: MessageKey, number: int, content: bytes, encrypt: bool) -> None:
        """Store the reply."""
        stored = self.vault.seal(content, place(number)) if encrypt else content
        body = {
            "begun": number,
            "sealed": encrypt,
            "bytes": len(stored),
            "sha256": hashlib.sha256(stored).hexdigest(),
        }
        with self.store.writing():
            withdrawn = self.store.execute(
                "SELECT 1 FROM chain JOIN members ON members.patient = chain.name WHERE chain.kind = 'forgotten' "
                "AND chain.number > ? AND members.plan = (SELECT number FROM chain WHERE kind = 'plan' AND run = ?)",
                (number, run),
            )
            if withdrawn:
                raise ReplayError(
                    "a patient withdrew while the reply was computed",
                    why="the reply was made with the patient's recordings",
                    fix="nothing left; the message stays charged",
                )
            self.store.append("answered", run, key.text, body)
            self.store.execute("INSERT INTO replies VALUES (?, ?)", (number, stored))

    def _again(self, begun: Row, key: MessageKey, request_sha256: str) -> bytes:
        """The stored reply of a message that was begun before."""
        if begun.body["request"] != request_sha256:
            raise ReplayError(
                f"{key.message} was asked before in another form",
                why="a message of a run is answered once: a second answer would have to be paid again",
                fix="the coordinator must repeat the same message, or start a new run",
            )
        answered = self.store.last("kind = 'answered' AND run = ? AND name = ?", (begun.run, begun.name))
        stored = self.store.execute("SELECT content FROM replies WHERE row = ?", (begun.number,))
        if answered is None:
            raise ReplayError(
                f"{key.message} was begun before, at {begun.written}, and has no reply",
                why="the site was interrupted, or its computation failed; what was computed then was charged",
                fix="the coordinator must go on without this reply, or start a new run",
            )
        if not stored:
            if self.store.last("kind = 'purged' AND name = ?", (str(begun.number),)) is None:
                raise broken(self.store.path, answered.number, "the reply that it announces is gone")
            raise ReplayError(
                f"the reply to {key.message} was deleted since",
                why="a patient of the run withdrew",
                fix="the coordinator must go on without this reply, or start a new run",
            )
        content: bytes = stored[0][0]
        if hashlib.sha256(content).hexdigest() != answered.body["sha256"]:
            raise broken(self.store.path, answered.number, "the stored reply is not the one that it announces")
        return self.vault.unseal(content, place(begun.number)) if answered.body["sealed"] else content

    def _publish(self, run: str, head: Head, why: str, *notes: AuditEntry) -> None:
        """Let the audit log know the ledger's head: a ledger older than that is refused later."""
        entry = AuditEntry(
            run=run, message="", event="ledger", item="ledger", shape=(head.number,), sha256=head.hash, purpose=why
        )
        self._audit.append([*notes, entry])

    @contextmanager
    def _alone(self, run: str, key: MessageKey, wait_seconds: float) -> Iterator[None]:
        """Hold the message's lock. The system lets go of it when its process dies, and never before it ends."""
        folder = self.store.path.with_name(self.store.path.name + ".busy")
        lock = FileLock(folder / f"{sha256_json([run, key.text])[:32]}.lock", timeout=wait_seconds)
        try:
            folder.mkdir(exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise ReplayError(
                f"{key.message} is being computed by another process",
                why=f"waited {wait_seconds:g} s for its end",
                fix="the coordinator may ask again later",
            ) from error
        except OSError as error:
            raise unusable(folder, error.strerror or str(error)) from error
        try:
            yield
            # The message is settled now, so whoever waits for this file may as well take a new one.
            Path(lock.lock_file).unlink(missing_ok=True)
        finally:
            lock.release()


def _composed(plans: Mapping[int, Cost], memberships: frozenset[tuple[int, str]]) -> float:
    cohorts: dict[int, set[str]] = {}
    for number, cohort in memberships:
        cohorts.setdefault(number, set()).add(cohort)
    return spent(Cost(charged(plans[each].releases, names), plans[each].delta) for each, names in cohorts.items())


def _check_drawn(drawn: Counter[str], reserved: Counter[str]) -> None:
    for kind, count in drawn.items():
        if count > reserved[kind]:
            raise ReplayError(
                f"the message would make {count} noise additions of the kind {kind}",
                why=f"the run's plan has reserved {reserved[kind]}",
                fix="the coordinator must keep to the job's plan, or start a new run",
            )


def place(number: int) -> str:
    """What a sealed reply is bound to: its message's row."""
    return f"row {number}"
