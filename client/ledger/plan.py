"""What a run may cost its patients: the plan that it reserves, and what plans cost a patient together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from bridge.hashing import canonical_json

if TYPE_CHECKING:
    from bridge.privacy.accounting import Release


@dataclass(frozen=True)
class Plan:
    """All that a run may release, and of whom. `cohorts` holds patient ids by the cohort's name; `cap` is the epsilon
    that the policy gives a patient, over all plans."""

    sha256: str
    """Of the job."""
    releases: tuple[Release, ...]
    delta: float
    cap: float
    cohorts: Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class MessageKey:
    """What tells one message of a run from another: a run is answered once under each."""

    message: str
    round: int | None = None
    split: str | None = None

    @property
    def text(self) -> str:
        """The key as the ledger holds it."""
        return canonical_json([self.message, self.round, self.split]).decode()


@dataclass(frozen=True)
class Cost:
    """One plan as it falls on one patient: the releases of the cohorts that the patient is in."""

    releases: tuple[Release, ...]
    delta: float


def spent(costs: Iterable[Cost]) -> float:
    """Epsilon of plans that were reserved one after another, at the smallest of their deltas.

    A plan is fixed before it starts, so one alone is composed by privacy loss distributions. The next one may have been
    chosen after looking at what the first released: several are composed by an RDP filter.
    """
    from bridge.privacy.accounting import epsilon, rdp_epsilon

    real = [cost for cost in costs if cost.releases]
    if not real:
        return 0.0
    delta = min(cost.delta for cost in real)
    if len(real) == 1:
        return epsilon(real[0].releases, delta)
    return rdp_epsilon([cost.releases for cost in real], delta)


def charged(releases: Iterable[Release], cohorts: Iterable[str]) -> tuple[Release, ...]:
    """Those of a plan's releases that a patient of these cohorts pays for."""
    names = set(cohorts)
    return tuple(release for release in releases if release.cohort in names)


def to_json(releases: Iterable[Release]) -> list[dict[str, Any]]:
    """Releases as the ledger's rows hold them."""
    return [asdict(release) for release in releases]


def from_json(values: Iterable[Mapping[str, Any]]) -> tuple[Release, ...]:
    """Releases out of a ledger's row."""
    from bridge.privacy.accounting import Release

    return tuple(Release(**value) for value in values)


def counts(releases: Iterable[Mapping[str, Any]]) -> Counter[str]:
    """How many noise additions of each kind, of releases as `to_json` gives them. A kind is all of a release but its
    count, as text."""
    found: Counter[str] = Counter()
    for release in releases:
        kind = [release[key] for key in ("phase", "cohort", "noise_multiplier", "sampling_rate")]
        found[canonical_json(kind).decode()] += release["count"]
    return found
