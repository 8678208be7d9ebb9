"""Which hospital a patient belongs to: whole patients, and the same hospitals for a seed in any list order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from bridge.config import Settings
from bridge.hashing import keyed_hash
from simulations.errors import CohortError
from simulations.source import PatientData, Source
from simulations.split import Split


class PartitionConfig(Settings):
    """How patients are dealt to hospitals."""

    kind: Literal["equal", "unequal", "label_skew", "device"] = "equal"
    """`equal`: as many patients each. `unequal`: sizes by `shares` or `decay`. `label_skew`: each hospital has its own
    mix of strata (built-in cohort: a patient's commonest state). `device`: a hospital is a kind of monitor."""
    hospitals: int = Field(default=4, ge=1)
    decay: float = Field(default=0.7, gt=0, le=1)
    """`unequal`: each hospital has so many times the patients of the one before."""
    shares: tuple[float, ...] = ()
    """`unequal`: explicit shares, one a hospital; they need not add up to 1."""
    alpha: float = Field(default=0.5, gt=0)
    """`label_skew`: Dirichlet concentration; small is skewed, large is even."""
    minimum_patients: int = Field(default=2, ge=1)
    """No hospital has fewer: patients move from the largest ones, or the partition is refused."""

    @model_validator(mode="after")
    def _shares_fit(self) -> PartitionConfig:
        if self.shares and self.kind != "unequal":
            raise ValueError(f"shares belong to kind 'unequal', not '{self.kind}'")
        if self.shares and len(self.shares) != self.hospitals:
            raise ValueError(f"shares must have one value a hospital ({self.hospitals}), not {len(self.shares)}")
        if any(share <= 0 for share in self.shares):
            raise ValueError("shares must be above 0")
        return self


@dataclass(frozen=True)
class Hospital:
    """One hospital's patients by use, each list sorted."""

    pair: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def partition(patients: Sequence[PatientData], config: PartitionConfig, seed: int) -> list[list[str]]:
    """Patients' names by hospital: `config.hospitals` sorted lists that hold each patient exactly once.

    Raises `CohortError` where there are too few patients, a name twice, or (kind `device`) not a device a hospital.
    """
    return _partition(patients, config, seed, config.minimum_patients, _devices(patients, config))


def hospitals(source: Source, split: Split, config: PartitionConfig, seed: int) -> list[Hospital]:
    """A split's pair, validation and test patients, each dealt to the same hospitals in the same way.

    Every hospital gets at least `minimum_patients` pair patients, and one test patient where there are enough.
    Raises `CohortError` as `partition` does.
    """
    belongs = set(split.hospital)
    devices = _devices([p for p in source.patients if p.patient in belongs], config)

    def deal(names: tuple[str, ...], minimum: int) -> list[list[str]]:
        wanted = set(names)
        members = [p for p in source.patients if p.patient in wanted]
        return _partition(members, config, seed, minimum, devices)

    enough = 1 if len(split.test) >= config.hospitals and config.kind != "device" else 0
    parts = zip(
        deal(split.pair, config.minimum_patients), deal(split.validation, 0), deal(split.test, enough), strict=True
    )
    return [Hospital(tuple(pair), tuple(validation), tuple(test)) for pair, validation, test in parts]


def _partition(
    patients: Sequence[PatientData], config: PartitionConfig, seed: int, minimum: int, devices: list[str]
) -> list[list[str]]:
    _check(patients, config, minimum)
    order = sorted(patients, key=lambda each: (keyed_hash("partition", seed, each.patient), each.patient))
    if config.kind == "device":
        groups = [[each for each in order if each.device == device] for device in devices]
    elif config.kind == "label_skew":
        groups = _label_skew(order, config, seed)
    else:
        groups = _dealt(order, _sizes(len(order), config))
    _lift(groups, config, minimum)
    return [sorted(each.patient for each in group) for group in groups]


def _check(patients: Sequence[PatientData], config: PartitionConfig, minimum: int) -> None:
    names = [each.patient for each in patients]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise CohortError(
            f"{len(twice)} patient(s) are listed twice, {twice[0]!r} first",
            why="a patient belongs to one hospital",
            fix="give all recordings of a patient in one entry",
        )
    wanted = config.hospitals * minimum
    if len(names) < wanted:
        raise CohortError(
            f"{len(names)} patient(s) can't be divided over {config.hospitals} hospitals",
            why=f"each hospital needs at least {minimum} of them, together {wanted}",
            fix="ask for fewer hospitals, lower minimum_patients, or use more patients",
        )


def _devices(patients: Sequence[PatientData], config: PartitionConfig) -> list[str]:
    """The devices that become hospitals; empty for the other kinds."""
    if config.kind != "device":
        return []
    devices = sorted({each.device for each in patients})
    if "" in devices:
        raise CohortError(
            "this source does not tell each patient's device", why="kind 'device' needs it", fix="use another kind"
        )
    if len(devices) != config.hospitals:
        raise CohortError(
            f"{len(devices)} devices do not make {config.hospitals} hospitals",
            why="kind 'device' makes one hospital of each device",
            fix=f"set hospitals to {len(devices)}, or use a cohort of {config.hospitals} devices",
        )
    return devices


def _sizes(patients: int, config: PartitionConfig) -> list[int]:
    """Hospitals' sizes by largest remainder; `equal` differs by one at most."""
    if config.kind == "equal":
        shares = [1.0] * config.hospitals
    else:
        shares = list(config.shares) or [config.decay**i for i in range(config.hospitals)]
    return _rounded(np.asarray(shares), patients)


def _rounded(shares: NDArray[np.float64], total: int) -> list[int]:
    exact = shares / shares.sum() * total
    sizes = np.floor(exact).astype(int)
    largest = np.argsort(-(exact - sizes), kind="stable")[: total - int(sizes.sum())]
    sizes[largest] += 1
    return [int(size) for size in sizes]


def _dealt(order: list[PatientData], sizes: list[int]) -> list[list[PatientData]]:
    edges = np.cumsum([0, *sizes])
    return [order[edges[i] : edges[i + 1]] for i in range(len(sizes))]


def _label_skew(order: list[PatientData], config: PartitionConfig, seed: int) -> list[list[PatientData]]:
    """Each stratum is shared out over the hospitals by its own Dirichlet draw (Hsu et al. 2019, arXiv:1909.06335)."""
    groups: list[list[PatientData]] = [[] for _ in range(config.hospitals)]
    for stratum in sorted({each.stratum for each in order}):
        members = [each for each in order if each.stratum == stratum]
        rng = np.random.default_rng(keyed_hash("label_skew", seed, stratum))
        shares = np.maximum(rng.dirichlet(np.full(config.hospitals, config.alpha)), 1e-12)
        for group, part in zip(groups, _dealt(members, _rounded(shares, len(members))), strict=True):
            group += part
    return groups


def _lift(groups: list[list[PatientData]], config: PartitionConfig, minimum: int) -> None:
    """Move patients from the largest hospital to those below the minimum; a device's patients never move."""
    for group in groups:
        while len(group) < minimum:
            if config.kind == "device":
                raise CohortError(
                    f"a device has {len(group)} patient(s) only",
                    why=f"a hospital needs at least {minimum}",
                    fix="lower minimum_patients, or use more patients",
                )
            largest = max(groups, key=len)
            group.append(largest.pop())
