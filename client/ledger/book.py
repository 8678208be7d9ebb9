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
from typing import TYPE_CHECKING, Self

from filelock import FileLock, Timeout

from bridge.hashing import sha256_json
from client.audit import AuditLog
from client.audit import Entry as AuditEntry
from client.errors import BudgetError, LedgerError, ReplayError
from client.ledger.plan import Cost, MessageKey, Plan, charged, counts, from_json, spent, to_json
from client.ledger.store import Head, Row, Store, broken, create_store, unusable
from client.vault import Vault, create_key, read_key

if TYPE_CHECKING:
    from bridge.privacy.accounting import Release
    from client.site import Site

SETUP_SECONDS = 60.0

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
        path, audit = site.ledger_path, AuditLog(site.audit_path)
        known = _known_head(audit)
        with _setting_up(site):
            if not path.exists() or path.stat().st_size == 0:
                _refuse_lost(site, known)
                if not site.key_path.exists():
                    create_key(site.key_path)
                create_store(path, {"key": read_key(site.key_path).check})
        vault, store = read_key(site.key_path), Store(path)
        try:
            _check_opened(store, vault, known)
        except BaseException:
            store.close()
            raise
        return cls(store, vault, audit)

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
        has not reserved so much, `ReplayError` where the message was asked in another form, or was begun and has no
        reply; while another process computes it, its end is awaited for `wait_seconds`.
        """
        with self._alone(run, key, wait_seconds):
            begun = self.store.last("kind = 'begun' AND run = ? AND name = ?", (run, key.text))
            if begun is not None:
                return self._again(begun, key, request_sha256)
            number = self._begin(run, key, request_sha256, releases, cohort)
            content = compute()
            self._finish(run, key, number, content, encrypt)
            return content

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
            if plan is None or cohort not in plan.body["members"]:
                raise BudgetError(
                    f"the run has reserved nothing for {cohort} patients",
                    why="a message is paid from its run's plan",
                    fix="this is a defect of fedbridge if the job has such a message: report it",
                )
            last = self.store.last("kind = 'begun' AND run = ?", (run,))
            drawn = Counter(last.body["drawn"] if last else {}) + counts(releases)
            _check_drawn(drawn, counts(from_json(plan.body["releases"])))
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
        stored = self.vault.seal(content, _place(number)) if encrypt else content
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
        return self.vault.unseal(content, _place(begun.number)) if answered.body["sealed"] else content

    def _publish(self, run: str, head: Head, why: str) -> None:
        """Let the audit log know the ledger's head: a ledger older than that is refused later."""
        entry = AuditEntry(
            run=run, message="", event="ledger", item="ledger", shape=(head.number,), sha256=head.hash, purpose=why
        )
        self._audit.append([entry])

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
            raise BudgetError(
                f"the message would make {count} noise additions of the kind {kind}",
                why=f"the run's plan has reserved {reserved[kind]}",
                fix="the coordinator must keep to the job's plan, or start a new run",
            )


def _place(number: int) -> str:
    return f"row {number}"


def _known_head(audit: AuditLog) -> Head | None:
    """The newest head of the ledger that the audit log knows."""
    found = audit.newest("ledger")
    return None if found is None else Head(found.shape[0], found.sha256)


@contextmanager
def _setting_up(site: Site) -> Iterator[None]:
    path = site.ledger_path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(path.name + ".lock"), timeout=SETUP_SECONDS):
            yield
    except (OSError, Timeout) as error:
        if isinstance(error, Timeout):
            raise unusable(path, f"another process has been setting it up for {SETUP_SECONDS:g} s") from error
        raise unusable(path, error.strerror or str(error)) from error


def _refuse_lost(site: Site, known: Head | None) -> None:
    if known is not None:
        raise LedgerError(
            f"{site.ledger_path}: the privacy ledger is gone",
            why=f"the audit log {site.audit_path} knows its row {known.number}",
            fix="restore ledger and key file; a new ledger would give every patient a fresh budget",
        )


def _check_opened(store: Store, vault: Vault, known: Head | None) -> None:
    """The cheap checks: the key, the last row, and the head that the audit log knows."""
    first, last = store.last("number = 1"), store.last("1")
    if first is None or last is None or first.kind != "opened":
        raise broken(store.path, 1, "it does not open a ledger")
    if first.body["key"] != vault.check:
        raise LedgerError(
            f"{store.path}: the ledger was written with another key",
            why="its patients would not be known again",
            fix="restore the key file that belongs to it",
        )
    if last.own_hash != last.hash:
        raise broken(store.path, last.number, "its content does not hash to its own hash")
    if known is None:
        return
    there = store.last("number = ?", (known.number,))
    if there is None:
        raise LedgerError(
            f"{store.path}: the ledger is an old copy, or rows were removed",
            why=f"it ends at row {last.number}; the audit log knows row {known.number}",
            fix="restore the newest ledger: an old one does not know what was spent since",
        )
    if there.hash != known.hash:
        raise broken(store.path, known.number, "the audit log knows another row in its place")
