"""The plan of a study before it runs: what it costs each patient, and whether a bridge can come out of it.

Everything follows from the configuration alone: no recording and no weights are opened, and no cohort is made.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Literal

from pydantic import Field

from bridge.config import Settings
from bridge.encoders.cards import EncoderCard
from bridge.job import Job, Models
from bridge.job_privacy import MechanismName
from bridge.messages import closed_form_length
from bridge.privacy.accounting import Cohort, Phase, Release, epsilon, plan_releases, true_positive_rate
from bridge.privacy.calibration import resolved
from bridge.privacy.forecast import (
    FEASIBLE,
    HOPELESS,
    NARROW,
    TABLES,
    WIDE,
    Forecast,
    Outlook,
    forecast,
    metric_half_width,
    metric_outlook,
)
from bridge.shape import BridgeShape
from client.readers.fog import CLASSES as FOG_CLASSES
from server.statement import sensitivity
from simulations.config import SimulationConfig
from simulations.datasets.cinc2015 import ALARM_CLASSES, HEART_RATE_CLASSES
from simulations.datasets.eegmat import CLASSES as EEGMAT_CLASSES
from simulations.models.layouts import planned_card
from simulations.models.signals import signals_of

_PLACEHOLDER = Models(old_encoder="", new_encoder="", task_head="")


class StudyPlan(Settings):
    """The public numbers of who takes part."""

    sites: int
    pair_patients: float
    """Of a site, as expected in public."""
    test_patients: float | None
    """Of a site; null where the configuration does not tell."""
    expected_from: str
    """Where these two come from."""
    patients_bound: int


class BridgePlan(Settings):
    """Size of the bridge. `parameters` counts the numbers that training changes, at the positions where there are most
    of them; `parameters_least` where there are fewest."""

    kind: Literal["prototype", "factored"]
    parameters: int
    parameters_least: int
    statistics: int | None = None
    """Numbers in the closed form's one release; null where it is not asked for."""


class PhasePlan(Settings):
    """One kind of release: its noise, what it costs by itself, and its predicted signal-to-noise ratio."""

    phase: Phase
    cohort: Cohort
    noise_multiplier: float
    sensitivity: float
    sampling_rate: float
    count: int
    epsilon: float
    """Of all `count` releases of this phase, by themselves."""
    numbers: int
    """Length of the noised vector."""
    share: float | None = None
    """Assumed common part of the patients' contributions, in units of the bound; null for metrics."""
    signal_to_noise: float | None = None
    """Of one release; null for metrics."""
    signal_to_noise_run: float | None = None
    """Over all releases of the phase; null for metrics."""
    half_width: float | None = None
    """Metrics: half the interval of balanced accuracy by noise alone; null where the patients are not known."""
    outlook: Outlook | None = None
    patients_needed: int | None = None
    """Patients of a site at which the phase looks feasible; null for metrics."""


class CohortPlan(Settings):
    """What a patient of one cohort loses over the whole run."""

    cohort: Cohort
    epsilon: float
    best_true_positive_rate: float
    """Of any attacker who tells those who took part from others, at 1 % false positives."""


class Plan(Settings):
    """The whole of `fedbridge-sim plan --json`, schema fedbridge.plan/1."""

    schema_: Literal["fedbridge.plan/1"] = Field(default="fedbridge.plan/1", alias="schema")
    name: str
    threat_model: MechanismName
    delta: float | None = None
    study: StudyPlan
    bridge: BridgePlan
    phases: list[PhasePlan] = Field(default_factory=list)
    cohorts: list[CohortPlan] = Field(default_factory=list)
    outlook: Outlook | None = None
    """Of the phase that makes the bridge: null without a private mechanism."""
    patients_needed: int | None = None
    """Pair patients of all sites together at which that phase looks feasible, with this many sites and this epsilon."""
    remarks: list[str] = Field(default_factory=list)


def plan(config: SimulationConfig) -> Plan:
    """The plan of a configuration.

    Raises `ConfigError` where a phase has neither noise nor epsilon, or an epsilon can't be met.
    """
    job = resolved(config.job(_PLACEHOLDER))
    study, cards = _study(config), _cards(config)
    bridge = _bridge(cards, job)
    if not job.privacy.private:
        remark = "Threat model none: no noise, no formal guarantee. What leaves the sites can reveal information."
        return Plan(name=job.name, threat_model="none", study=study, bridge=bridge, remarks=[remark])
    releases = plan_releases(job)
    phases = [_phase(config, job, study, cards, bridge, release) for release in releases]
    main = next((phase for phase in phases if phase.phase == ("training" if job.rounds else "closed_form")), None)
    needed = main.patients_needed if main else None
    return Plan(
        name=job.name,
        threat_model=job.privacy.mechanism,
        delta=job.privacy.delta,
        study=study,
        bridge=bridge,
        phases=phases,
        cohorts=[_cohort(job, cohort, releases) for cohort in dict.fromkeys(each.cohort for each in releases)],
        outlook=main.outlook if main else None,
        patients_needed=None if needed is None else needed * study.sites,
        remarks=_remarks(job, study, phases),
    )


def plan_summary(config: SimulationConfig) -> list[str]:
    """Two to four lines to show before a run: parameters, predicted signal-to-noise ratio, epsilon of each cohort."""
    found = plan(config)
    lines = [f"bridge: {found.bridge.kind}, {_parameters(found.bridge)} trained numbers"]
    if found.threat_model == "none":
        return [*lines, "privacy: threat model none, no formal guarantee"]
    costs = ", ".join(f"{cohort.cohort} patients epsilon {cohort.epsilon:.3g}" for cohort in found.cohorts)
    lines.append(f"privacy: threat model {found.threat_model}, {costs} at delta {found.delta:g}")
    ratios = [
        f"{_words(phase.phase)} {phase.signal_to_noise:.2g} a release, {phase.signal_to_noise_run:.2g} over the run"
        for phase in found.phases
        if phase.phase in ("closed_form", "training")
    ]
    lines.append(f"predicted signal-to-noise: {'; '.join(ratios)}: {found.outlook}")
    if found.outlook != "feasible" and found.patients_needed is not None:
        lines.append(f"it would look feasible from about {found.patients_needed:,} pair patients in all")
    return lines


def lines_of(found: Plan) -> list[str]:
    """The plan's sentences, for people: who, which bridge, what can be expected."""
    study, bridge = found.study, found.bridge
    tested = "" if study.test_patients is None else f" and {study.test_patients:.4g} test patients"
    lines = [
        f"{study.sites} sites with about {study.pair_patients:.4g} pair patients{tested} each ({study.expected_from})",
        f"bridge: {bridge.kind}, {_parameters(bridge)} trained numbers"
        + (f"; closed form: {bridge.statistics:,} numbers in one release" if bridge.statistics else ""),
    ]
    for cohort in found.cohorts:
        lines.append(
            f"{cohort.cohort} patients: epsilon {cohort.epsilon:.4g} in all at delta {found.delta:g}; an attacker's "
            f"best true-positive rate at 1 % false positives is {cohort.best_true_positive_rate:.0%}"
        )
    if found.outlook is not None:
        needed = f", about {found.patients_needed:,} pair patients in all would look feasible"
        lines.append(
            f"outlook: {found.outlook.upper()}"
            + (needed if found.outlook != "feasible" else "")
            + f" (signal-to-noise over the run: below {HOPELESS:g} hopeless, from {FEASIBLE:g} feasible)"
        )
    return [*lines, *found.remarks]


def _parameters(bridge: BridgePlan) -> str:
    if bridge.parameters_least == bridge.parameters:
        return f"{bridge.parameters:,}"
    return f"{bridge.parameters_least:,} to {bridge.parameters:,}, by position,"


def _words(phase: Phase) -> str:
    return phase.replace("_", " ")


def _study(config: SimulationConfig) -> StudyPlan:
    """Expected patients of a site: of the built-in cohort, whose numbers are in its configuration, or of the plan."""
    sites = len(config.sites.expected) or config.partition.hospitals
    asked, split = config.privacy, config.split
    if config.data.source == "builtin":
        tested = split.test if split.rotations == 1 else 1 / split.rotations
        each = config.data.builtin.hospital_patients / sites
        return StudyPlan(
            sites=sites,
            pair_patients=each * (1 - tested - split.validation) * split.pair_share,
            test_patients=each * tested,
            expected_from="the built-in cohort's configuration",
            patients_bound=asked.patients_bound,
        )
    return StudyPlan(
        sites=sites,
        pair_patients=asked.training.divisor / asked.training.sampling_rate,
        test_patients=None,
        expected_from="privacy.training: divisor / sampling_rate",
        patients_bound=asked.patients_bound,
    )


@dataclass(frozen=True)
class _Cards:
    old: EncoderCard
    new: EncoderCard


def _cards(config: SimulationConfig) -> _Cards:
    """Cards with the layouts of the encoders to come; nothing else in them is read."""
    signals = signals_of(config.data)
    return _Cards(
        planned_card(config.encoders.old, signals.old, signals.seconds),
        planned_card(config.encoders.new, signals.new, signals.seconds),
    )


def _shapes(cards: _Cards, job: Job) -> list[BridgeShape]:
    """The bridge at every pair of positions that may be chosen."""
    chosen = job.selection
    if chosen.input_position is not None and chosen.output_position is not None:
        return [BridgeShape.of(job.bridge, cards.old, cards.new, (chosen.input_position, chosen.output_position))]
    positions = product(range(cards.new.positions), range(cards.old.positions))
    return [BridgeShape.of(job.bridge, cards.old, cards.new, each) for each in positions]


def _bridge(cards: _Cards, job: Job) -> BridgePlan:
    shapes = _shapes(cards, job)
    counts = [shape.parameters for shape in shapes]
    gram = job.privacy.gram
    statistics = max(closed_form_length(shape, gram) for shape in shapes) if job.train.solves else None
    return BridgePlan(kind=job.bridge.kind, parameters=max(counts), parameters_least=min(counts), statistics=statistics)


def _classes(config: SimulationConfig) -> int:
    data = config.data
    if data.source == "builtin":
        return data.builtin.classes
    if data.source == "eegmat":
        return len(EEGMAT_CLASSES)
    if data.source == "fog":
        return len(FOG_CLASSES)
    if data.source in ("isruc", "wesad"):
        return int(getattr(data, data.source).classes)
    alarm = data.cinc2015 is not None and data.cinc2015.task == "alarm"
    return len(ALARM_CLASSES if alarm else HEART_RATE_CLASSES)


def _phase(
    config: SimulationConfig, job: Job, study: StudyPlan, cards: _Cards, bridge: BridgePlan, release: Release
) -> PhasePlan:
    asked = job.privacy
    classes = _classes(config)
    numbers: dict[Phase, int] = {
        "probe": cards.new.positions,
        "similarity": cards.old.positions,
        "closed_form": bridge.statistics or 0,
        "training": bridge.parameters,
        "metrics": TABLES * classes**2,
    }
    about = PhasePlan(
        phase=release.phase,
        cohort=release.cohort,
        noise_multiplier=release.noise_multiplier,
        sensitivity=sensitivity(job, release.phase),
        sampling_rate=release.sampling_rate,
        count=release.count,
        epsilon=epsilon((release,), asked.delta),
        numbers=numbers[release.phase],
    )
    noised_at: Literal["site", "server"] = "site" if asked.mechanism == "local" else "server"
    if release.phase == "metrics":
        if release.cohort != "test" or study.test_patients is None:
            return about
        width = metric_half_width(
            release.noise_multiplier, classes, patients=study.test_patients, sites=study.sites, noised_at=noised_at
        )
        return about.model_copy(update={"half_width": width, "outlook": metric_outlook(width)})
    expected = forecast(
        release.phase,
        release.noise_multiplier,
        about.numbers,
        patients=asked.selection.groups if release.phase in ("probe", "similarity") else study.pair_patients,
        sites=study.sites,
        sampling_rate=release.sampling_rate,
        count=release.count,
        noised_at=noised_at,
    )
    return about.model_copy(update=_expected(release.phase, expected, study, asked.selection.groups))


def _expected(phase: Phase, found: Forecast, study: StudyPlan, groups: int) -> dict[str, object]:
    # Groups of a site grow with its patients: as many times more of both.
    needed = found.patients_needed
    if phase in ("probe", "similarity"):
        needed = round(study.pair_patients * needed / groups + 0.5)
    return {
        "share": found.share,
        "signal_to_noise": found.one,
        "signal_to_noise_run": found.run,
        "outlook": found.outlook,
        "patients_needed": needed,
    }


def _cohort(job: Job, cohort: Cohort, releases: tuple[Release, ...]) -> CohortPlan:
    lost = epsilon((each for each in releases if each.cohort == cohort), job.privacy.delta)
    return CohortPlan(cohort=cohort, epsilon=lost, best_true_positive_rate=true_positive_rate(lost, job.privacy.delta))


def _remarks(job: Job, study: StudyPlan, phases: list[PhasePlan]) -> list[str]:
    """What a reader of the plan should look at again."""
    asked, found = job.privacy, []
    drawn = study.pair_patients * asked.training.sampling_rate
    if job.rounds and not 0.5 <= drawn / asked.training.divisor <= 2:
        found.append(
            f"privacy.training.divisor is {asked.training.divisor:g}, but about {drawn:.3g} patients of a site are in "
            "a draw: set it near that"
        )
    if study.pair_patients > asked.patients_bound:
        found.append(
            f"about {study.pair_patients:.4g} patients a site are expected, above privacy.patients_bound "
            f"{asked.patients_bound}: raise it (and lower delta)"
        )
    for phase in phases:
        if phase.half_width is not None and phase.half_width > NARROW:
            says = "says nothing" if phase.half_width > WIDE else "is blurred"
            found.append(
                f"the noise alone gives balanced accuracy about +-{min(phase.half_width, 1):.2f}: the figure {says}; "
                "give privacy.metrics more, or test more patients"
            )
    if any(phase.phase == "probe" and phase.outlook == "hopeless" for phase in phases):
        found.append(
            "selection is little more than a guess at this noise: give privacy.selection more, or fix the positions"
        )
    if asked.simulation_seed is not None:
        found.append("privacy.simulation_seed is set: reproducible noise protects nobody, and the statement is void")
    return found
