"""`privacy.json`: what a run promises each patient, as data; and its recomputation by accountants of another make.

Unit: the patient, with all windows, in all sessions, at one site. The claim is the composition of everything that the
sites reserved for the run before its first message, so it holds for a run that stopped half way, too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationError

from bridge.config import Settings
from bridge.files import write_whole
from bridge.job import Job
from bridge.job_privacy import MechanismName
from server.errors import RunFolderError
from server.record import RunRecord

if TYPE_CHECKING:
    from bridge.privacy.accounting import Release

PRIVACY_JSON = "privacy.json"
UNIT = "the patient, with all windows, in all sessions, at one site"
ADJACENCY = "add or remove one patient"

Phase = Literal["probe", "similarity", "closed_form", "training", "metrics"]
Cohort = Literal["pair", "validation", "test"]
Verdict = Literal["holds", "conditional", "void", "none"]

_TRUSTED: dict[MechanismName, str] = {
    "none": "the server and everyone who sees the sites' updates, scores and metrics",
    "local": "nobody outside the hospital: the noise is added at the site, before anything leaves it",
    "central": "the server: it sees each site's sum before the noise, and is trusted to add it and to keep no raw sum",
}
_NOT_COVERED = (
    "Timing: how long a site takes to answer is not hidden.",
    "Floating point is not hardened: noise is drawn with 52 bits, and which sums can occur exactly is not hidden.",
    "A person who is a patient at k sites has k guarantees, composed: at most k times epsilon and k times delta.",
    "Other runs on the same patients add to this one. Each site's ledger, not this file, holds the total.",
    "That a hospital takes part, and that it declared itself to have enough patients, is public.",
    "What is learnt about people in general, which would be learnt without any one patient, too.",
    "What hospitals do with their own recordings, and what is known about a patient from elsewhere.",
)
_LENT = (
    "The patients on whom a hospital fitted a frozen model without a privacy mechanism: whoever has it may learn "
    "about them, and no noise of this run protects them.",
)
_NO_GUARANTEE = "Threat model 'none' adds no noise: what leaves the sites can reveal information about their patients."


class StatedEvent(Settings):
    """Releases of one kind. Noise of standard deviation `noise_multiplier * sensitivity` in each number released;
    `sensitivity` bounds the L2 norm by which one patient moves it; `sampling_rate` is each patient's chance (Poisson)
    to be in it; it happens `count` times."""

    phase: Phase
    cohort: Cohort
    mechanism: Literal["gaussian"] = "gaussian"
    noise_multiplier: float = Field(gt=0)
    sensitivity: float = Field(gt=0)
    sampling_rate: float = Field(gt=0, le=1)
    count: int = Field(ge=1)


class StatedCohort(Settings):
    """What a patient of one cohort loses. No patient is in two cohorts of one run."""

    cohort: Cohort
    epsilon: float = Field(ge=0)
    best_true_positive_rate: float = Field(ge=0, le=1)
    """The best that any attacker can do who tells patients who took part from others, at 1 % false positives."""


class Choice(Settings):
    """Something that the run chose, and on what."""

    what: str
    chosen: str
    on: str


class ModelProvenance(Settings):
    """Where a frozen model comes from, in so far as its card says."""

    model: str
    digest: str
    trained_on: Literal["public", "private", "unknown"]
    data: str


class Statement(Settings):
    """The whole of `privacy.json`, schema fedbridge.privacy/1."""

    schema_: Literal["fedbridge.privacy/1"] = Field(default="fedbridge.privacy/1", alias="schema")
    run_id: str
    name: str
    threat_model: MechanismName
    verdict: Verdict
    """`holds`; `conditional`: if what `reasons` names is true; `void`: it does not hold, for these `reasons`; `none`:
    no guarantee was asked for."""
    reasons: list[str] = Field(default_factory=list)
    unit: str = UNIT
    adjacency: str = ADJACENCY
    trusted: str
    epsilon: float | None = None
    """Composed over the run, of the cohort that loses most; null where there is no guarantee."""
    delta: float | None = None
    """Of each patient, over all phases; null where there is no guarantee."""
    best_true_positive_rate: float | None = None
    """At 1 % false positives, for that epsilon and delta; null where there is no guarantee."""
    cohorts: list[StatedCohort] = Field(default_factory=list)
    events: list[StatedEvent] = Field(default_factory=list)
    accountant: str | None = None
    accountant_version: str | None = None
    public: dict[str, int | float | str | bool | None] = Field(default_factory=dict)
    """The study plan's numbers on which the guarantee rests."""
    choices: list[Choice] = Field(default_factory=list)
    provenance: list[ModelProvenance] = Field(default_factory=list)
    not_covered: list[str] = Field(default_factory=list)


def build_statement(job: Job, record: RunRecord) -> Statement:
    """The statement of a run: its job with every noise multiplier filled in, and its record so far (models' cards,
    positions, kept round).

    Raises `ConfigError` where the job lacks a noise multiplier that its plan needs.
    """
    provenance = [_provenance(name, card) for name, card in record.models.items()]
    fitted = [_fitted(name, card) for name, card in record.models.items() if _fitted_on(card)]
    if not job.privacy.private:
        return Statement(
            run_id=record.run_id,
            name=job.name,
            threat_model="none",
            verdict="none",
            reasons=[_NO_GUARANTEE, *fitted],
            trusted=_TRUSTED["none"],
            choices=_choices(job, record),
            provenance=provenance,
            not_covered=[*_NOT_COVERED, *(_LENT * bool(fitted))],
        )
    from bridge.privacy.accounting import plan_releases, true_positive_rate

    events = [_event(job, release) for release in plan_releases(job)]
    cohorts = _cohorts(job, events)
    verdict, reasons = _verdict(job, provenance)
    # A model that was fitted on patients voids the claim; here is on whose.
    reasons += fitted
    largest = max((cohort.epsilon for cohort in cohorts), default=0.0)
    return Statement(
        run_id=record.run_id,
        name=job.name,
        threat_model=job.privacy.mechanism,
        verdict=verdict,
        reasons=reasons,
        trusted=_TRUSTED[job.privacy.mechanism],
        epsilon=largest,
        delta=job.privacy.delta,
        best_true_positive_rate=true_positive_rate(largest, job.privacy.delta),
        cohorts=cohorts,
        events=events,
        accountant="dp-accounting PLD, add or remove one",
        accountant_version=version("dp-accounting"),
        public=_public(job, record),
        choices=_choices(job, record),
        provenance=provenance,
        not_covered=[*_NOT_COVERED, *(_LENT * bool(fitted))],
    )


def sensitivity(job: Job, phase: Phase) -> float:
    """Bound on the L2 norm by which adding or removing one patient moves what a phase releases."""
    asked = job.privacy
    return {
        "probe": 2 * asked.selection.clip,
        "similarity": 2 * asked.selection.clip,
        "closed_form": asked.closed_form.clip,
        "training": asked.training.clip,
        "metrics": 1.0,
    }[phase]


def _event(job: Job, release: Release) -> StatedEvent:
    return StatedEvent(
        phase=release.phase,
        cohort=release.cohort,
        noise_multiplier=release.noise_multiplier,
        sensitivity=sensitivity(job, release.phase),
        sampling_rate=release.sampling_rate,
        count=release.count,
    )


def _cohorts(job: Job, events: list[StatedEvent]) -> list[StatedCohort]:
    from bridge.privacy.accounting import epsilon, true_positive_rate

    found = []
    for cohort in dict.fromkeys(event.cohort for event in events):
        lost = float(epsilon(releases_of(events, cohort), job.privacy.delta))
        rate = true_positive_rate(lost, job.privacy.delta)
        found.append(StatedCohort(cohort=cohort, epsilon=lost, best_true_positive_rate=rate))
    return found


def releases_of(events: list[StatedEvent], cohort: Cohort) -> tuple[Release, ...]:
    """The accounting's view of a cohort's events."""
    from bridge.privacy.accounting import Release

    return tuple(
        Release(event.phase, event.cohort, event.noise_multiplier, event.sampling_rate, event.count)
        for event in events
        if event.cohort == cohort
    )


def _verdict(job: Job, provenance: list[ModelProvenance]) -> tuple[Verdict, list[str]]:
    void = [
        f"The {_words(model.model)} was trained on patients without privacy, says its card: every answer through it "
        "can reveal them, and no noise added here protects them."
        for model in provenance
        if model.trained_on == "private"
    ]
    if job.privacy.simulation_seed is not None:
        void.append("The noise and the draws come from a seed (privacy.simulation_seed): whoever has it can undo them.")
    if void:
        return "void", void
    unknown = [_words(model.model) for model in provenance if model.trained_on == "unknown"]
    if unknown:
        return "conditional", [
            f"It holds if no patient of a taking-part hospital lent training data to the {' and the '.join(unknown)}: "
            "the card does not say. One that was trained on a hospital's patients without privacy voids it."
        ]
    return "holds", []


def _provenance(name: str, card: Mapping[str, Any]) -> ModelProvenance:
    """Cards say `public_patients: n` or `public: true` of models from public data; `public: false` or
    `private_patients: n` of others."""
    training = card.get("training") or {}
    trained: Literal["public", "private", "unknown"] = "unknown"
    if training.get("public") is False or training.get("private_patients"):
        trained = "private"
    elif training.get("public") is True or training.get("public_patients"):
        trained = "public"
    return ModelProvenance(
        model=name,
        digest=str(card.get("digest", "")),
        trained_on=trained,
        data=str(training.get("data") or "not said by its card") + (f" ({lent})" if (lent := _fitted_on(card)) else ""),
    )


def _fitted(name: str, card: Mapping[str, Any]) -> str:
    return f"The {_words(name)} was fitted on {_fitted_on(card)}, without a privacy mechanism, says its card."


def _fitted_on(card: Mapping[str, Any]) -> str:
    """On whose patients a hospital fitted the model (`fedbridge-site head fit`), and how many; empty for others."""
    training = card.get("training") or {}
    where, number = training.get("fitted_on"), training.get("private_patients")
    if not where:
        return ""
    return str(where) + (f", {number} of them" if number else "")


def _words(model: str) -> str:
    return model.replace("_", " ")


def _public(job: Job, record: RunRecord) -> dict[str, int | float | str | bool | None]:
    asked, sites = job.privacy, job.sites.expected or tuple(site.site for site in record.sites if site.can_take_part)
    numbers: dict[str, int | float | str | bool | None] = {
        "sites": len(sites),
        "patients_bound": asked.patients_bound,
        "largest_weight": max((job.sites.weight(site) for site in sites), default=1.0),
    }
    if job.rounds:
        numbers |= {
            "rounds": job.rounds,
            "local_steps": job.train.local_steps,
            "sampling_rate": asked.training.sampling_rate,
            "clip": asked.training.clip,
            "divisor": asked.training.divisor,
        }
    if job.selection.mode != "fixed":
        numbers |= {"groups": asked.selection.groups, "selection_clip": asked.selection.clip}
    if job.train.solves:
        numbers |= {"closed_form_clip": asked.closed_form.clip, "gram": asked.closed_form.gram}
    return numbers


def _choices(job: Job, record: RunRecord) -> list[Choice]:
    found, private = record.selection, job.privacy.private
    where = "not chosen yet" if found is None else f"input {found.input_position}, output {found.output_position}"
    if job.selection.mode == "fixed":
        on = "fixed in the job"
    else:
        on = "noised sums of groups' scores, charged as events" if private else "the sites' scores, without noise"
    kept = "none yet" if record.bridge is None else f"round {record.bridge.kept_round}"
    if job.train.keep == "last" or not job.rounds:
        judged = "nothing: the last one, by plan"
    else:
        judged = "noised values of validation patients, charged as events" if private else "the sites' own values"
    return [
        Choice(what="positions of the bridge", chosen=where, on=on),
        Choice(what="bridge that is kept", chosen=kept, on=judged),
        Choice(
            what="everything else in the job",
            chosen="as configured",
            on="fixed before the run; what earlier runs on the same patients it was found by, the sites' ledgers hold",
        ),
    ]


def write_statement(folder: Path, statement: Statement) -> None:
    """Write `privacy.json` in one atomic rename; raises `RunFolderError` where the folder can't be written."""
    text = json.dumps(statement.model_dump(mode="json", by_alias=True), indent=2, ensure_ascii=False, allow_nan=False)
    try:
        write_whole(folder / PRIVACY_JSON, text + "\n")
    except OSError as error:
        raise RunFolderError(
            f"{folder}: the privacy statement can't be written",
            why=error.strerror or "",
            fix="free space or choose a writable --out",
        ) from error


def read_statement(file: Path) -> Statement:
    """Read a statement (a file, or the folder that holds `privacy.json`); raises `RunFolderError` where there is none
    or it is not of the schema."""
    path = file / PRIVACY_JSON if file.is_dir() else file
    try:
        return Statement.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(
            f"{path}: can't be read", why=error.strerror or "", fix="name the privacy.json of a run"
        ) from error
    except (ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        raise RunFolderError(
            f"{path}: is not a privacy statement of schema fedbridge.privacy/1",
            why=f"{'.'.join(map(str, first['loc']))}: {first['msg']}".lstrip(": ") if first else str(error),
            fix="use the file as the run wrote it",
        ) from error


def schema_text() -> str:
    """The JSON schema of `privacy.json` as text: docs/reference/privacy.schema.json."""
    return json.dumps(Statement.model_json_schema(by_alias=True), indent=2, ensure_ascii=False, sort_keys=True) + "\n"
