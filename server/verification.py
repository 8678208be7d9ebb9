"""Recompute a privacy statement with accountants that share no code with the one that made it."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Literal

from bridge.config import Settings
from bridge.job import Job
from bridge.privacy.accounting import true_positive_rate
from server.errors import RunFolderError
from server.record import RUN_JSON, read_record
from server.statement import Cohort, StatedEvent, Statement, build_statement

PRV_ERROR = 0.01
"""The error to which Opacus's accountant is asked to bound epsilon."""
_TOLERANCE = 1e-3
"""The error of the statement's own accountant."""


class CohortCheck(Settings):
    """One cohort's epsilon by three accountants. Opacus's PRV bounds the true one from above, at most `0.02` too high;
    Renyi accounting bounds it from above, loosely."""

    cohort: Cohort
    stated: float
    prv: float | None
    """Opacus PRV (Gopi et al. 2021); null where it can't compute it (very little noise)."""
    rdp: float
    difference: float
    """Stated minus the second accountant's; below zero by more than its error: too much privacy is claimed."""
    agrees: bool


class Verification(Settings):
    """What the recomputation found. `verified`: the numbers are right; whether they hold is the statement's verdict."""

    verified: bool
    verdict: Literal["holds", "conditional", "void", "none"]
    cohorts: list[CohortCheck]
    problems: list[str]


def verify_statement(statement: Statement, folder: Path | None = None) -> Verification:
    """Recompute every cohort's epsilon, and what follows from it; with the run's folder, also hold the events against
    the job in its `run.json`."""
    checks = [
        _check(cohort.cohort, cohort.epsilon, statement.events, statement.delta or 0.0) for cohort in statement.cohorts
    ]
    problems = _problems(statement, checks)
    if folder is not None and (folder / RUN_JSON).exists():
        problems += _against_run(statement, folder)
    return Verification(
        verified=not problems and all(check.agrees for check in checks),
        verdict=statement.verdict,
        cohorts=checks,
        problems=problems,
    )


def prv_epsilon(events: list[StatedEvent], delta: float) -> float | None:
    """An upper bound by Opacus, at most twice `PRV_ERROR` above the true epsilon; None where it finds none."""
    from opacus.accountants import PRVAccountant

    accountant = PRVAccountant()
    accountant.history = [(event.noise_multiplier, event.sampling_rate, event.count) for event in events]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it takes the logarithm of 1 - q, also where q is 1
        try:
            return float(accountant.get_epsilon(delta, eps_error=PRV_ERROR))
        except (RuntimeError, ValueError, MemoryError, IndexError):
            return None


def rdp_epsilon(events: list[StatedEvent], delta: float) -> float:
    """An upper bound by Renyi differential privacy (Mironov et al. 2019) as Opacus computes it: 10 to 30 % loose."""
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(event.noise_multiplier, event.sampling_rate, event.count) for event in events]
    logger, level = logging.getLogger("opacus"), logging.getLogger("opacus").level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns where the best order is its largest or smallest
        try:
            return float(accountant.get_epsilon(delta))
        finally:
            logger.setLevel(level)


def _check(cohort: Cohort, stated: float, events: list[StatedEvent], delta: float) -> CohortCheck:
    own = [event for event in events if event.cohort == cohort]
    prv, rdp = (prv_epsilon(own, delta), rdp_epsilon(own, delta)) if own else (0.0, 0.0)
    second, error = (prv, 2 * PRV_ERROR) if prv is not None else (rdp, 0.35 * rdp)
    difference = stated - second
    return CohortCheck(
        cohort=cohort,
        stated=stated,
        prv=prv,
        rdp=rdp,
        difference=difference,
        agrees=difference >= -error - _TOLERANCE,
    )


def _problems(statement: Statement, checks: list[CohortCheck]) -> list[str]:
    """Whatever in the statement contradicts itself or the recomputation."""
    found = [
        f"epsilon of the {check.cohort} patients is stated as {check.stated:.4f}, but their events cost "
        f"{check.stated - check.difference:.4f}"
        for check in checks
        if not check.agrees
    ]
    if statement.threat_model == "none":
        if statement.verdict != "none" or statement.epsilon is not None or statement.cohorts:
            found.append("threat model 'none' gives no guarantee, but the statement names one")
        return found
    if statement.verdict == "none" or statement.epsilon is None or statement.delta is None:
        return [*found, f"threat model '{statement.threat_model}' needs an epsilon and a delta, and a verdict"]
    stated = {cohort.cohort for cohort in statement.cohorts}
    missing = sorted({event.cohort for event in statement.events} - stated)
    if missing:
        found.append(f"events of the {', '.join(missing)} patients are in no cohort's epsilon")
    largest = max((cohort.epsilon for cohort in statement.cohorts), default=0.0)
    if statement.epsilon < largest - 1e-9:
        found.append(f"epsilon {statement.epsilon:.4f} is below that of a cohort, {largest:.4f}")
    rates = [(statement.epsilon, statement.best_true_positive_rate or 0.0)]
    rates += [(cohort.epsilon, cohort.best_true_positive_rate) for cohort in statement.cohorts]
    for epsilon, rate in rates:
        allowed = true_positive_rate(epsilon, statement.delta)
        if rate < allowed - 1e-9:
            found.append(f"epsilon {epsilon:.4f} allows a true-positive rate of {allowed:.4f}, not {rate:.4f}")
    bound = statement.public.get("patients_bound")
    if isinstance(bound, int | float) and statement.delta * bound > 0.1 + 1e-12:
        found.append(f"delta {statement.delta:g} is too large for up to {bound:g} patients of a site")
    if any(model.trained_on == "private" for model in statement.provenance) and statement.verdict != "void":
        found.append("a model was trained on patients without privacy, so the statement can't hold")
    return found


def _against_run(statement: Statement, folder: Path) -> list[str]:
    """Whether the statement is the one that follows from the run's own record."""
    try:
        record = read_record(folder)
        expected = build_statement(Job.model_validate(record.config), record)
    except (RunFolderError, ValueError) as error:
        return [f"{folder / RUN_JSON} can't be held against it: {str(error).splitlines()[0]}"]
    names = ("threat_model", "delta", "events", "provenance", "verdict")
    differ = [name for name in names if getattr(statement, name) != getattr(expected, name)]
    return [f"{', '.join(differ)}: not what follows from the run's {RUN_JSON}"] if differ else []
