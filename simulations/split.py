"""Patients into public, pair, validation and test: disjoint, by seed, the same in any list order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field, model_validator

from bridge.config import Settings
from bridge.hashing import keyed_hash
from simulations.errors import CohortError
from simulations.source import PatientData, Source


class SplitConfig(Settings):
    """Shares of patients. Fixed roles of a source (the built-in cohort's public patients) win over `public`."""

    seed: int = Field(default=0, ge=0, lt=2**31)
    public: float = Field(default=1 / 3, ge=0, lt=1)
    """Share of patients without a fixed role who are public. They lend both encoders their training data."""
    public_lends_both: bool = True
    """Those public patients lend each encoder its own modality, never as pairs; false: half of them lend the old one
    alone, the other half the new one alone."""
    test: float = Field(default=0.3, gt=0, lt=1)
    """Share of the hospitals' patients who are tested; `rotations` above 1 set it instead."""
    validation: float = Field(default=0.0, ge=0, lt=1)
    """Share of the hospitals' patients on whom rounds are judged, where `keep: best` or `evaluate.every` asks."""
    pair_share: float = Field(default=1.0, gt=0, le=1)
    """Share of the pair patients that are kept, at least one; a smaller share keeps a part of whom a larger one does.
    The others take no part."""
    rotations: int = Field(default=1, ge=1)
    """Above 1: so many splits that between them test each patient exactly once."""
    rotation: int = Field(default=0, ge=0)
    """Which of them this is, from 0."""

    @model_validator(mode="after")
    def _fits(self) -> SplitConfig:
        if self.rotation >= self.rotations:
            raise ValueError(f"rotation counts from 0 and must be below rotations ({self.rotations})")
        if self.rotations == 1 and self.test + self.validation >= 1:
            raise ValueError("test and validation must leave patients for the pairs: their sum must be below 1")
        return self


@dataclass(frozen=True)
class Split:
    """Patients by use, each list sorted. The hospitals' patients are pair + validation + test."""

    public_old: tuple[str, ...]
    """Lend the old encoder and the head their labelled training data."""
    public_new: tuple[str, ...]
    """Lend the new encoder its unlabelled training data."""
    pair: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    @property
    def hospital(self) -> tuple[str, ...]:
        """Everybody who belongs to a hospital."""
        return tuple(sorted((*self.pair, *self.validation, *self.test)))


@dataclass(frozen=True)
class _Parts:
    public: list[PatientData]
    pair: list[PatientData]
    validation: list[PatientData]
    test: list[PatientData]


_ROLES = ("public_old", "public_new", "hospital")


def split_patients(source: Source, config: SplitConfig) -> Split:
    """Divide a source's patients. Strata and devices are spread evenly over the parts.

    Raises `CohortError` where a patient is listed twice, a role is unknown, or a part that must not be empty would be.
    """
    _check_roles(source)
    fixed = {role: [p for p in source.patients if p.role == role] for role in _ROLES}
    free = [p for p in source.patients if p.role == ""]
    parts = (_rotated if config.rotations > 1 else _once)(free, fixed["hospital"], config)
    lends_old, lends_new = (
        (parts.public, parts.public) if config.public_lends_both else (parts.public[::2], parts.public[1::2])
    )
    split = Split(
        public_old=_names([*fixed["public_old"], *lends_old]),
        public_new=_names([*fixed["public_new"], *lends_new]),
        pair=_names(_kept(parts.pair, config)),
        validation=_names(parts.validation),
        test=_names(parts.test),
    )
    _check(split, config, len(source.patients))
    return split


def _check_roles(source: Source) -> None:
    names = [p.patient for p in source.patients]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise CohortError(
            f"{len(twice)} patient(s) are listed twice, {twice[0]!r} first",
            why="a patient may be in one part alone",
            fix="give all recordings of a patient in one entry",
        )
    unknown = sorted({p.role for p in source.patients} - {*_ROLES, ""})
    if unknown:
        raise CohortError(
            f"unknown role {unknown[0]!r}", why=f"roles are {', '.join(_ROLES)}", fix="correct the source"
        )


def _count(share: float, patients: Sequence[PatientData]) -> int:
    """A share of patients, at least one where any is asked for."""
    return max(1, round(share * len(patients))) if share > 0 and patients else 0


def _kept(pair: Sequence[PatientData], config: SplitConfig) -> list[PatientData]:
    """The first patients of a line that does not depend on the share."""
    return _line(pair, config.seed)[: _count(config.pair_share, pair)]


def _names(patients: Sequence[PatientData]) -> tuple[str, ...]:
    return tuple(sorted(p.patient for p in patients))


def _line(patients: Sequence[PatientData], seed: int) -> list[PatientData]:
    """Patients in a keyed order that spreads strata and devices evenly: any stretch has about everybody's mix."""
    placed: list[tuple[float, str, PatientData]] = []
    for kind in sorted({(p.stratum, p.device) for p in patients}):
        members = [p for p in patients if (p.stratum, p.device) == kind]
        members.sort(key=lambda p: (keyed_hash("split", seed, p.patient), p.patient))
        # The i-th of n members stands at (i + u) / n of the line, u by the kind, so that a rare kind falls anywhere.
        offset = keyed_hash("split", seed, *kind) / 2**64
        placed += [((i + offset) / len(members), p.patient, p) for i, p in enumerate(members)]
    return [p for _, _, p in sorted(placed, key=lambda each: each[:2])]


def _once(free: Sequence[PatientData], hospital: Sequence[PatientData], config: SplitConfig) -> _Parts:
    line = _line(free, config.seed)
    cut = round(config.public * len(line))
    others = _line([*line[cut:], *hospital], config.seed)
    test, validation = _count(config.test, others), _count(config.validation, others)
    return _Parts(line[:cut], others[test + validation :], others[test : test + validation], others[:test])


def _rotated(free: Sequence[PatientData], hospital: Sequence[PatientData], config: SplitConfig) -> _Parts:
    """Block `rotation` of the line is tested; behind it, round the end of the line, come the public ones."""
    line = _line([*free, *hospital], config.seed)
    edges = [round(i * len(line) / config.rotations) for i in range(config.rotations + 1)]
    start, end = edges[config.rotation], edges[config.rotation + 1]
    behind = [*line[end:], *line[:start]]
    candidates = [p for p in behind if p.role == ""]
    public = {p.patient for p in candidates[: round(config.public * len(free))]}
    others = [p for p in behind if p.patient not in public]
    validation = _count(config.validation, others)
    return _Parts([p for p in behind if p.patient in public], others[validation:], others[:validation], line[start:end])


def _check(split: Split, config: SplitConfig, patients: int) -> None:
    parts = {name: len(getattr(split, name)) for name in ("public_old", "public_new", "pair", "test")}
    if config.validation > 0:
        parts["validation"] = len(split.validation)
    empty = [name for name, count in parts.items() if count == 0]
    if empty:
        raise CohortError(
            f"{patients} patient(s) leave nobody for {' and '.join(empty)}",
            why="each part needs at least one patient: " + ", ".join(f"{n} has {c}" for n, c in parts.items()),
            fix="use more patients, or change the shares of the split",
        )
