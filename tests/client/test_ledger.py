from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bridge.messages import ReasonCode
from client.audit import AuditLog
from client.errors import BudgetError, ReplayError
from client.ledger import Ledger, MessageKey
from client.ledger.verify import verify
from client.ledger.view import forecast, view
from client.site import Site
from tests.client.ledgers import METRICS, PROBE, STEP, STEPS, ask, ledger_site, plan, pld_epsilon, rdp_epsilon

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return ledger_site(tmp_path / "site")


def failing() -> bytes:
    raise ZeroDivisionError


def never() -> bytes:
    raise AssertionError("computed again")


def test_one_plan_costs_what_dp_accounting_says(site: Site) -> None:
    cost = pld_epsilon(PROBE, STEPS)
    with Ledger.open(site) as ledger:
        with pytest.raises(BudgetError) as refused:
            ledger.reserve("run", plan(cap=cost - 2e-3))
        assert refused.value.reason == ReasonCode.BUDGET_SPENT
        assert f"{cost - 2e-3:.4g} is left" in str(refused.value)
        ledger.reserve("run", plan(cap=cost + 2e-3))
        assert view(ledger).worst == pytest.approx(cost, abs=1e-3)


def test_plans_compose_whatever_the_cohort_is_called(site: Site) -> None:
    both = rdp_epsilon(PROBE, STEPS, METRICS)
    renamed = {"test": ["p2"]}
    with Ledger.open(site) as ledger:
        ledger.reserve("first", plan(cohorts={"pair": ["p1", "p2"]}))
        with pytest.raises(BudgetError):
            ledger.reserve("second", plan(both - 2e-3, (METRICS,), cohorts=renamed))
        assert view(ledger).worst == pytest.approx(pld_epsilon(PROBE, STEPS), abs=1e-3)
        ledger.reserve("strangers", plan(both - 2e-3, (METRICS,), cohorts={"test": ["p3"]}))
        ledger.reserve("second", plan(both + 2e-3, (METRICS,), cohorts=renamed))
        assert view(ledger).worst == pytest.approx(both, abs=1e-3)


def test_plans_compose_at_the_smallest_delta(site: Site) -> None:
    small = rdp_epsilon(PROBE, STEPS, METRICS, delta=1e-5)
    with Ledger.open(site) as ledger:
        ledger.reserve("first", plan(delta=1e-5))
        with pytest.raises(BudgetError):
            ledger.reserve("second", plan(small - 2e-3, (METRICS,), cohorts={"test": ["p1"]}))
        ledger.reserve("second", plan(small + 2e-3, (METRICS,), cohorts={"test": ["p1"]}))


def test_a_patient_of_two_cohorts_of_a_plan_pays_for_both(site: Site) -> None:
    cost = pld_epsilon(PROBE, STEPS, METRICS)
    both = plan(cost - 2e-3, (PROBE, STEPS, METRICS), cohorts={"pair": ["p1"], "test": ["p1"]})
    apart = plan(cost - 2e-3, (PROBE, STEPS, METRICS), cohorts={"pair": ["p1"], "test": ["p2"]})
    with Ledger.open(site) as ledger:
        with pytest.raises(BudgetError):
            ledger.reserve("run", both)
        ledger.reserve("run", apart)
        # Later the site moves p2 to the other cohort: the plan is charged again where it had not been.
        moved = plan(cost - 2e-3, (PROBE, STEPS, METRICS), cohorts={"pair": ["p1", "p2"], "test": ["p2"]})
        with pytest.raises(BudgetError):
            ledger.reserve("run", moved)


def test_an_abandoned_plan_stays_spent(site: Site) -> None:
    cap = rdp_epsilon(PROBE, STEPS, PROBE, STEPS) - 2e-3
    with Ledger.open(site) as ledger:
        ledger.reserve("abandoned", plan(cap))
        with pytest.raises(BudgetError) as refused:
            ledger.reserve("next", plan(cap))
    assert f"{pld_epsilon(PROBE, STEPS):.2f}" in refused.value.what


def test_a_plan_too_costly_for_anybody_is_refused_without_patients_too(site: Site) -> None:
    cap = pld_epsilon(PROBE, STEPS) - 2e-3
    with Ledger.open(site) as ledger:
        nobody: dict[str, list[str]] = {"pair": []}
        for cohorts in (nobody, {"pair": ["p1"]}):
            with pytest.raises(BudgetError):
                ledger.reserve("run", plan(cap, cohorts=cohorts))
        ledger.reserve("run", plan(cohorts=nobody))
        assert ask(ledger) == b"reply"


def test_reserving_again_charges_nobody_twice_and_newcomers_once(site: Site) -> None:
    once = pld_epsilon(PROBE, STEPS)
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan())
        head = ledger.store.head()
        ledger.reserve("run", plan())
        ledger.reserve("run", plan(cohorts={"pair": ["p2"]}))
        assert ledger.store.head() == head
        ledger.reserve("run", plan(cohorts={"pair": ["p1", "p3"]}))
        ledger.reserve("run", plan(cohorts={"pair": ["p1", "p3"]}))
        assert ledger.store.head().number == head.number + 1
        assert view(ledger).plans[0].patients == {"pair": 3}
        assert view(ledger).worst == pytest.approx(once, abs=1e-3)
        verify(ledger, AuditLog(site.audit_path))


def test_a_newcomer_without_budget_is_refused(site: Site) -> None:
    cap = rdp_epsilon(PROBE, STEPS, PROBE, STEPS) - 2e-3
    with Ledger.open(site) as ledger:
        ledger.reserve("before", plan(cap, cohorts={"pair": ["p3"]}))
        ledger.reserve("run", plan(cap))
        with pytest.raises(BudgetError):
            ledger.reserve("run", plan(cap, cohorts={"pair": ["p1", "p2", "p3"]}))
        assert view(ledger).plans[1].patients == {"pair": 2}


def test_a_run_has_one_plan(site: Site) -> None:
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan())
        for other in (plan(sha256="c" * 64), plan(releases=(PROBE,))):
            with pytest.raises(ReplayError) as refused:
                ledger.reserve("run", other)
            assert refused.value.reason == ReasonCode.ASKED_AGAIN


def test_a_forecast_is_what_reserving_then_does(site: Site) -> None:
    with Ledger.open(site) as ledger:
        for run in ("one", "two", "three"):
            told = forecast(ledger, plan())
            assert told.fits
            ledger.reserve(run, plan())
            assert view(ledger).worst == pytest.approx(told.after, abs=1e-12)
        cap = told.after
        assert not forecast(ledger, plan(cap)).fits
        assert forecast(ledger, plan(cap, cohorts={"pair": ["new"]})).before == 0.0
        assert len(view(ledger).plans) == 3


def test_messages_draw_down_to_the_plan_and_no_further(site: Site) -> None:
    with Ledger.open(site) as ledger:
        with pytest.raises(BudgetError):
            ask(ledger)
        ledger.reserve("run", plan())
        for round_ in range(1, 7):
            ask(ledger, round_)
        for _ in range(2):
            with pytest.raises(ReplayError, match="would make 7 noise additions"):
                ask(ledger, 7, never)
        (planned,) = view(ledger).plans
        assert [(each.release.phase, each.used) for each in planned.phases] == [("probe", 0), ("training", 6)]
        assert (
            ledger.answer("run", MessageKey("query.probe"), "q", (PROBE,), "pair", lambda: b"p", encrypt=False) == b"p"
        )


def test_a_message_pays_with_its_own_kind_and_cohort(site: Site) -> None:
    weaker = type(STEP)("training", "pair", 3.9, 0.25)
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan(releases=(PROBE, STEPS, METRICS), cohorts={"pair": ["p1"], "test": ["p2"]}))
        for release, cohort in ((weaker, "pair"), (METRICS, "pair"), (STEP, "test"), (STEP, "validation")):
            with pytest.raises(
                (BudgetError, ReplayError), match="noise additions" if release is weaker else "nothing for"
            ):
                ledger.answer("run", MessageKey("train", 1), "q", (release,), cohort, never, encrypt=False)


@pytest.mark.parametrize("encrypt", [False, True])
def test_asked_again_the_stored_reply_is_given(site: Site, encrypt: bool) -> None:
    content = os.urandom(100_000)
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan())
        assert ask(ledger, 1, lambda: content, encrypt=encrypt) == content
    with Ledger.open(site) as ledger:
        head = ledger.store.head()
        assert ask(ledger, 1, never, encrypt=encrypt) == content
        assert ledger.store.head() == head
        with pytest.raises(ReplayError):
            ask(ledger, 1, never, request="r" * 64)


def test_a_failed_computation_is_charged_and_refused_for_ever(site: Site) -> None:
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan())
        with pytest.raises(ZeroDivisionError):
            ask(ledger, 1, failing)
        for _ in range(2):
            with pytest.raises(ReplayError) as refused:
                ask(ledger, 1, never)
            assert refused.value.reason == ReasonCode.ASKED_AGAIN
        assert view(ledger).plans[0].phases[1].used == 1


def forked(site: Site, reply: Callable[[], bytes]) -> int:
    """A child process that asks for round 1 and exits with 0 where it got a reply."""
    child = os.fork()
    if child == 0:
        try:
            with Ledger.open(site) as ledger:
                ask(ledger, 1, reply)
            os._exit(0)
        except BaseException:
            os._exit(1)
    return child


def test_a_second_process_waits_for_the_one_that_computes(site: Site) -> None:
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan())
    ready, tell = os.pipe()

    def slow() -> bytes:
        os.write(tell, b"x")
        time.sleep(0.4)
        return b"from the child"

    child = forked(site, slow)
    os.read(ready, 1)
    with Ledger.open(site) as ledger:
        with pytest.raises(ReplayError) as refused:
            ask(ledger, 1, never, wait_seconds=0.05)
        assert "another process" in refused.value.what
        assert ask(ledger, 1, never) == b"from the child"
    assert os.waitpid(child, 0)[1] == 0


def test_a_killed_computation_is_told_from_a_slow_one(site: Site) -> None:
    with Ledger.open(site) as ledger:
        ledger.reserve("run", plan())
    ready, tell = os.pipe()

    def endless() -> bytes:
        os.write(tell, b"x")
        time.sleep(60)
        return b""

    child = forked(site, endless)
    os.read(ready, 1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with Ledger.open(site) as ledger:
        start = time.monotonic()
        with pytest.raises(ReplayError) as refused:
            ask(ledger, 1, never)
        assert "has no reply" in refused.value.what
        assert time.monotonic() - start < 5
        assert view(ledger).plans[0].phases[1].used == 1


def test_the_ledger_loads_no_torch(site: Site) -> None:
    """Each message may be a fresh process, and most refusals need none."""
    code = (
        "import sys, pathlib; from client.site import open_site; from tests.client.ledgers import *; "
        "ledger = Ledger.open(open_site(pathlib.Path(sys.argv[1]))); ledger.reserve('run', plan()); ask(ledger); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(site.folder)], check=True, cwd=ROOT)
