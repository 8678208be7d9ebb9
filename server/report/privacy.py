"""What a run promises about privacy, in sentences that can be quoted, and a record without what isn't released."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from server.audit_record import AuditRecord
from server.record import Evaluation, RunRecord
from server.report.tables import Table
from server.report.words import count
from server.statement import Cohort, Phase, Statement

_PHASES: dict[Phase, str] = {
    "probe": "Scores for where the bridge reads",
    "similarity": "Scores for where the bridge writes",
    "closed_form": "Statistics of the one-step bridge",
    "training": "Sums of gradients in training",
    "metrics": "Evaluation: confusion tables",
}
_COHORTS: dict[Cohort, str] = {
    "pair": "patients whose recordings train the bridge",
    "validation": "validation patients",
    "test": "test patients",
}
_TRAINED = {
    "public": "public patients, says its card",
    "private": "patients without privacy, says its card",
    "unknown": "not said by its card",
}


@dataclass(frozen=True)
class PrivacyPart:
    """The report's part on privacy. `box` stands at the top of the page: what holds, and one sentence on it."""

    box: tuple[str, str]
    bad: bool
    sentences: list[str]
    reasons: list[str]
    cohorts: Table | None = None
    events: Table | None = None
    choices: Table | None = None
    provenance: Table | None = None
    not_covered: tuple[str, ...] = ()
    fine_print: str = ""


def released(record: RunRecord) -> RunRecord:
    """The record without what a private mechanism does not release, should it hold any: per-site scores, losses,
    seconds, counts of patients and windows, controls on the sites' own data."""
    if record.threat_model == "none":
        return record
    selection = record.selection
    if selection is not None:
        scores = {
            name: found.model_copy(update={"per_site": None})
            for name in ("probe_scores", "similarity_scores")
            if (found := getattr(selection, name)) is not None
        }
        selection = selection.model_copy(update=scores)
    hidden: dict[str, object] = {
        "baselines": {},
        "site_alone_per_site": {},
        "groups": {},
        "patients": None,
        "windows": None,
    }
    return record.model_copy(
        update={
            "selection": selection,
            "rounds": [row.model_copy(update={"loss": None, "seconds": None}) for row in record.rounds],
            "evaluation": record.evaluation.model_copy(update=hidden),
            "seconds": None,
        }
    )


def privacy_part(record: RunRecord, statement: Statement | None) -> PrivacyPart:
    """What to say of a run, from its statement; without one a private run promises nothing."""
    if record.threat_model == "none":
        reasons = [] if statement is None else [reason for reason in statement.reasons if statement.verdict == "void"]
        return PrivacyPart(
            box=(
                "No formal privacy guarantee.",
                "This run used threat model none: no noise, no encryption of updates.",
            ),
            bad=False,
            sentences=[],
            reasons=reasons,
        )
    if statement is None or statement.threat_model != record.threat_model or statement.epsilon is None:
        return _without_statement(record)
    return _with_statement(statement)


def _without_statement(record: RunRecord) -> PrivacyPart:
    if record.rotations:
        text = (
            f"Its {len(record.rotations)} rotations have a statement each. A patient takes part in all of them, so "
            "what they lose adds up: no single rotation's epsilon holds for the whole."
        )
        return PrivacyPart(("Privacy is stated by rotation.", text), bad=False, sentences=[text], reasons=[])
    text = f"The run asked for threat model {record.threat_model}, but its statement (privacy.json) is not there."
    return PrivacyPart(("No privacy statement.", text), bad=True, sentences=[text], reasons=[])


def _with_statement(statement: Statement) -> PrivacyPart:
    assert statement.epsilon is not None
    assert statement.delta is not None
    promise = f"epsilon {_up(statement.epsilon, 2)} at delta {statement.delta:g} for each patient"
    boxes = {
        "holds": (f"Patient-level differential privacy: {promise}.", f"Threat model {statement.threat_model}."),
        "conditional": (
            f"Patient-level differential privacy, on a condition: {promise}.",
            f"Threat model {statement.threat_model}. " + " ".join(statement.reasons),
        ),
        "void": (
            "The privacy statement is void.",
            f"The noise would give {promise}, but: " + " ".join(statement.reasons),
        ),
        "none": ("No formal privacy guarantee.", ""),
    }
    return PrivacyPart(
        box=boxes[statement.verdict],
        bad=statement.verdict == "void",
        sentences=_sentences(statement),
        reasons=statement.reasons,
        cohorts=_cohorts_table(statement),
        events=_events_table(statement),
        choices=Table(
            ("What was chosen", "Which", "On what"), [(row.what, row.chosen, row.on) for row in statement.choices]
        ),
        provenance=Table(
            ("Model", "Trained on", "Data"),
            [(row.model.replace("_", " "), _TRAINED[row.trained_on], row.data) for row in statement.provenance],
        ),
        not_covered=tuple(statement.not_covered),
        fine_print=f"Accountant: {statement.accountant}, version {statement.accountant_version}.",
    )


def _sentences(statement: Statement) -> list[str]:
    """What a data-protection officer can quote."""
    assert statement.epsilon is not None
    assert statement.delta is not None
    rate = statement.best_true_positive_rate or 0.0
    where = {
        "local": "Each hospital added random noise to everything that left it",
        "central": "The server added random noise to the sums over all hospitals before it used or stored them",
    }.get(statement.threat_model, "")
    holds = "This was to protect" if statement.verdict == "void" else "This protects"
    return [
        f"{where}. {holds} {statement.unit} (differential privacy; neighbouring data sets: {statement.adjacency}).",
        f"Everything this run released about one patient satisfies epsilon = {_up(statement.epsilon, 3)} at delta = "
        f"{statement.delta:g}, however much an attacker knows about everybody else.",
        f"Someone who wants to find out whether a given person was a patient in this study, and accepts to be wrong "
        f"about 1 % of those who were not, can be right about at most {_percent(rate)} of those who were. (Without any "
        "information it would be 1 %.)"
        + (" At this epsilon the bound by itself rules out hardly any attack." if rate > 0.95 else ""),
        f"Who must be trusted: {statement.trusted}.",
        "The figures are for the whole plan that the hospitals reserved, whether or not all of it was used.",
    ]


def _up(value: float, digits: int) -> str:
    """Rounded up: a bound must not read lower than it is."""
    return f"{ceil(value * 10**digits - 1e-9) / 10**digits:.{digits}f}"


def _percent(rate: float) -> str:
    return f"{min(float(_up(100 * rate, 1)), 100.0):g} %"


def _cohorts_table(statement: Statement) -> Table:
    rows = [
        (
            _COHORTS[row.cohort].capitalize(),
            _up(row.epsilon, 3),
            f"{statement.delta:g}",
            _percent(row.best_true_positive_rate),
        )
        for row in statement.cohorts
    ]
    heads = ("Who", "Epsilon", "Delta", "An attacker's best true-positive rate\nat 1 % false positives")
    return Table(heads, rows, frozenset({1, 2, 3}))


def _events_table(statement: Statement) -> Table:
    rows = [
        (
            f"{_PHASES[row.phase]}\n{_COHORTS[row.cohort]}",
            f"{row.noise_multiplier:.4g}",
            f"{row.sensitivity:g}",
            f"{row.noise_multiplier * row.sensitivity:.4g}",
            "all" if row.sampling_rate == 1 else f"{row.sampling_rate:.3g}",
            f"{row.count:,}",
        )
        for row in statement.events
    ]
    heads = ("What was released", "Noise multiplier", "Sensitivity", "Standard deviation", "Share drawn", "Times")
    return Table(heads, rows, frozenset(range(1, 6)), fine=frozenset({0}))


def simulated_on_whom(evaluation: Evaluation) -> str:
    """On whom the simulator's figures are."""
    if evaluation.patients is None:
        return "on the test patients"
    windows = "" if evaluation.windows is None else f" ({count(evaluation.windows, 'window')})"
    return f"on {count(evaluation.patients, 'test patient')}{windows}"


@dataclass(frozen=True)
class AuditPart:
    """The section on an audit: a sentence of its outcome, a row a phase, and what it can't show."""

    verdict: str
    bad: bool
    phases: Table
    not_covered: str


def audit_part(record: AuditRecord | None) -> AuditPart | None:
    """What to say of an audit; None where there was none."""
    if record is None:
        return None
    rows = [
        (
            phase.phase.replace("_", " "),
            str(phase.canaries),
            f"{phase.correct} of {phase.guesses}",
            f"{phase.lower_bound:.2f}",
            f"{phase.claim.epsilon:.2f} at delta {phase.claim.delta:g}",
            f"{phase.half_noise_bound:.2f}",
        )
        for phase in record.phases
    ]
    heads = ("Phase", "Canaries", "Right guesses", "Epsilon at least", "Claim", "With half the noise it would say")
    verdict = (
        f"Nothing speaks against the claim, with {record.confidence:.0%} confidence."
        if record.holds
        else f"The claim is refuted, with {record.confidence:.0%} confidence: something is wrong with the mechanism."
    )
    return AuditPart(verdict, not record.holds, Table(heads, rows, frozenset({1, 2, 3, 4, 5})), record.not_covered)
