"""What a ledger tells its hospital: the plans, what was used of them, and what is left for the patients."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from client.ledger.plan import Plan, charged, counts, from_json

if TYPE_CHECKING:
    from bridge.privacy.accounting import Release
    from client.ledger.book import Ledger


@dataclass(frozen=True)
class PhaseView:
    """One kind of release of a plan: noise additions reserved, and used so far."""

    release: Release
    used: int


@dataclass(frozen=True)
class PlanView:
    """One run's plan. `patients` by cohort; `epsilon` by cohort: what the plan alone costs each of them."""

    run: str
    reserved: str
    delta: float
    phases: tuple[PhaseView, ...]
    patients: dict[str, int]
    epsilon: dict[str, float]


@dataclass(frozen=True)
class LedgerView:
    """All plans, how many patients they charge, how many withdrew, and the epsilon of the most charged one."""

    plans: tuple[PlanView, ...]
    patients: int
    withdrawn: int
    worst: float


@dataclass(frozen=True)
class Forecast:
    """What a plan would do: bring the most charged patient from `before` to `after`; `cap` is the policy's."""

    before: float
    after: float
    cap: float

    @property
    def fits(self) -> bool:
        """Whether the plan would be reserved."""
        return self.after <= self.cap

    @property
    def left(self) -> float:
        """What such a patient could still spend after it."""
        return max(self.cap - self.after, 0.0)


def view(ledger: Ledger) -> LedgerView:
    """The ledger's content, without a patient's name or hash."""
    store = ledger.store
    with store.reading():
        plans = tuple(_plan_view(ledger, row.number) for row in store.rows("kind = 'plan'"))
        patients = [patient for (patient,) in store.execute("SELECT DISTINCT patient FROM members")]
        withdrawn = len(store.rows("kind = 'forgotten'"))
        return LedgerView(plans, len(patients), withdrawn, ledger.most_spent(patients))


def forecast(ledger: Ledger, plan: Plan) -> Forecast:
    """What reserving the plan for its patients would do; nothing is booked."""
    asked = {cohort: frozenset(map(ledger.vault.patient, each)) for cohort, each in plan.cohorts.items()}
    with ledger.store.reading():
        after, before = ledger.worst(plan, asked)
    return Forecast(before, after, plan.cap)


def _plan_view(ledger: Ledger, number: int) -> PlanView:
    from bridge.privacy.accounting import epsilon

    (row,) = ledger.store.rows("number = ?", (number,))
    last = ledger.store.last("kind = 'begun' AND run = ?", (row.run,))
    used = Counter(last.body["drawn"] if last else {})
    phases = []
    for stored in row.body["releases"]:
        (kind,) = counts([stored])
        phases.append(PhaseView(from_json([stored])[0], used[kind]))
    releases, members = from_json(row.body["releases"]), ledger.members(row)
    cohorts = list(row.body["members"])
    return PlanView(
        run=row.run,
        reserved=row.written,
        delta=row.body["delta"],
        phases=tuple(phases),
        patients={cohort: len(members.get(cohort, ())) for cohort in cohorts},
        epsilon={cohort: epsilon(charged(releases, [cohort]), row.body["delta"]) for cohort in cohorts},
    )
