"""One patient more or less at a site: every array moves by at most its declared bound, and nothing else changes."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bridge.selection import fold_of
from client.statistics import SELECTION_KEY
from tests.end_to_end.privacy.neighbours import (
    FACTORED,
    Cohorts,
    Hazard,
    Mechanism,
    Pool,
    build_world,
    check_neighbours,
    compare,
    movement,
    private_job,
    record,
    script,
)

MECHANISMS: tuple[Mechanism, ...] = ("local", "central")
FORMS: dict[str, dict[str, Any]] = {
    "prototype": {},
    "factored": {"bridge": FACTORED, "train": {"start": "closed_form"}},
}
EVERY_MESSAGE = {"query.describe", "query.probe", "query.similarity", "query.closed_form", "train", "evaluate"}


def group(patient: str, groups: int) -> int:
    return fold_of(patient, groups, f"{SELECTION_KEY}/groups")


def in_one_group(pool: Pool, groups: int, count: int) -> tuple[str, ...]:
    """So many patients of whom selection makes one group."""
    for index in range(groups):
        found = [patient for patient in pool.patients if group(patient, groups) == index]
        if len(found) >= count:
            return tuple(found[:count])
    raise AssertionError("the pool is too small")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_patient_moves_every_array_by_at_most_its_bound(
    pool: Pool, tmp_path: Path, mechanism: Mechanism, form: str
) -> None:
    names = pool.patients
    job = private_job(pool, mechanism, **FORMS[form])
    there = Cohorts(names[:6], names[6:9], names[9:12])
    beside = Cohorts(names[12:15], (), names[15:16])
    shares = compare(pool, tmp_path, there, names[2], job, others=[beside] if form == "prototype" else [])
    assert set(shares) == EVERY_MESSAGE - (set() if form == "factored" else {"query.closed_form"})
    # The clip is at work: one patient moves the sums as far as it may.
    assert shares["train"] > 0.99
    assert shares.get("query.closed_form", 1.0) > 0.99


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_a_test_patient_moves_the_tables_alone(pool: Pool, tmp_path: Path, mechanism: Mechanism) -> None:
    names = pool.patients
    there = Cohorts(names[:2], (), names[4:6])
    shares = compare(pool, tmp_path, there, names[5], private_job(pool, mechanism))
    assert shares.pop("evaluate") > 0.8
    assert set(shares.values()) == {0.0}


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("there", ["pair", "test", "nobody else at all"])
def test_the_first_patient_of_a_site_shows_by_nothing_else(
    pool: Pool, tmp_path: Path, mechanism: Mechanism, there: str
) -> None:
    first, other = pool.patients[:2]
    cohorts = {
        "pair": Cohorts((first,), (), (other,)),
        "test": Cohorts((other,), (), (first,)),
        "nobody else at all": Cohorts((first,)),
    }[there]
    job = private_job(pool, mechanism, **FORMS["factored"], privacy={"training": {"sampling_rate": 1.0}})
    shares = compare(pool, tmp_path, cohorts, first, job)
    assert shares["evaluate" if there == "test" else "train"] > 0.8


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_group_that_becomes_too_small_shows_by_nothing_else(pool: Pool, tmp_path: Path, size: int) -> None:
    """Two patients are needed for a probe, four windows for a similarity."""
    members = in_one_group(pool, 4, 3)[:size]
    rest = tuple(p for p in pool.patients if group(p, 4) != group(members[0], 4))[:4]
    job = private_job(pool, "central", privacy={"selection": {"clip": 1e-3}})
    shares = compare(pool, tmp_path, Cohorts((*members, *rest)), members[-1], job, messages=script(job)[:3])
    # From something to nothing a group moves by R, half of what it may.
    assert shares["query.probe"] == pytest.approx(0.5) if size == 2 else shares["query.probe"] <= 1.0
    assert shares["query.similarity"] == pytest.approx(0.5) if size == 1 else shares["query.similarity"] <= 1.0


@pytest.mark.parametrize(
    ("mechanism", "hazard"), [("local", "nan"), ("central", "nan"), ("central", "huge"), ("central", "raises")]
)
def test_a_patient_with_broken_features_shows_by_nothing_else(
    pool: Pool, tmp_path: Path, mechanism: Mechanism, hazard: Hazard
) -> None:
    pair, test = pool.patients[:3], pool.patients[4:6]
    job = private_job(pool, mechanism, **FORMS["factored"], privacy={"training": {"sampling_rate": 1.0}})
    bad = {pair[1]: hazard, test[1]: hazard}
    there, messages = Cohorts(pair, (), test), script(job)[1:]
    shares = compare(pool, tmp_path / "pair", there, pair[1], job, messages=messages[:-2], hazards=bad)
    if hazard in ("nan", "raises"):
        assert shares["train"] == shares["query.closed_form"] == 0.0
    compare(pool, tmp_path / "test", there, test[1], job, messages=messages[-1:], hazards=bad)


@pytest.mark.parametrize(
    ("mechanism", "scale"), [("central", 1e-20), ("central", 1e6), ("central", 1e30), ("local", 1e30)]
)
def test_no_broadcast_makes_a_patient_count_for_more(
    pool: Pool, tmp_path: Path, mechanism: Mechanism, scale: float
) -> None:
    """The bridge is the server's to choose: with vanishing or overflowing numbers, too."""
    job = private_job(pool, mechanism, **FORMS["factored"], privacy={"training": {"sampling_rate": 1.0}})
    kinds = ("query.closed_form", "train", "evaluate")
    messages = [replace(each, scale=scale) for each in script(job) if each.kind in kinds]
    there = Cohorts(pool.patients[:3], (), pool.patients[3:5])
    compare(pool, tmp_path / "pair", there, there.pair[0], job, messages=messages[:-2])
    compare(pool, tmp_path / "test", there, there.test[0], job, messages=messages[-1:])


@pytest.mark.parametrize("whom", ["short", "windowless", "damaged"])
def test_a_patient_whose_recording_is_of_little_use_shows_by_nothing_else(
    pool: Pool, tmp_path: Path, whom: str
) -> None:
    patient = getattr(pool, whom)
    job = private_job(pool, "local", **FORMS["factored"])
    there = Cohorts((*pool.patients[:1], patient), (), pool.patients[2:3])
    shares = compare(pool, tmp_path, there, patient, job, messages=script(job)[:-2])
    if whom != "short":
        assert set(shares.values()) == {0.0}


@pytest.mark.parametrize("alignment", [{"loss": "infonce", "negatives": "patient"}, {"loss": "mse", "layer": "bridge"}])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_every_loss_is_of_one_patient(
    pool: Pool, tmp_path: Path, mechanism: Mechanism, alignment: dict[str, Any]
) -> None:
    job = private_job(pool, mechanism, alignment=alignment, privacy={"training": {"sampling_rate": 1.0, "clip": 1e-3}})
    messages = [each for each in script(job) if each.kind == "train"]
    there = Cohorts(pool.patients[:5])
    assert compare(pool, tmp_path, there, there.pair[0], job, messages=messages)["train"] > 0.99


def test_without_noise_local_training_depends_on_nothing_but_its_noised_sums(pool: Pool, tmp_path: Path) -> None:
    """The comparison of the steps would be worthless if runs that were given other sums came to the same update."""
    job = private_job(pool, "local", privacy={"training": {"sampling_rate": 1.0}})
    messages = [each for each in script(job) if each.kind == "train"]
    here = Cohorts(pool.patients[:3])
    one = record(pool, build_world(pool, tmp_path / "a", [here]), job, messages=messages)
    free = record(pool, build_world(pool, tmp_path / "b", [here.without(here.pair[0])]), job, messages=messages)
    with pytest.raises(AssertionError, match="more than the noised sums"):
        movement(one.replies[0], free.replies[0], job)


def test_a_run_of_the_same_site_is_the_same(pool: Pool, tmp_path: Path) -> None:
    job = private_job(pool, "central")
    here = [Cohorts(pool.patients[:3], (), pool.patients[3:4])]
    runs = [record(pool, build_world(pool, tmp_path / name, here), job) for name in "ab"]
    assert set(check_neighbours(runs[0], runs[1], job).values()) == {0.0}


def test_a_transcript_holds_what_a_site_sends_in_full(pool: Pool, tmp_path: Path) -> None:
    job = private_job(pool, "local", **FORMS["factored"])
    run = record(pool, build_world(pool, tmp_path, [Cohorts(pool.patients[:2])]), job)
    assert [each.asked.kind for each in run.replies] == [
        "query.describe",
        "query.probe",
        "query.similarity",
        "query.closed_form",
        "train",
        "train",
        "evaluate",
        "evaluate",
    ]
    train = run.replies[4]
    assert list(train.values) == ["update.A", "update.B", "weight"]
    assert [len(each.steps) for each in run.replies] == [0, 0, 0, 0, 3, 3, 0, 0]
    assert ("sent", "train", "update.A", (6, 2), 48) in run.audited[0]


# Over generated cohorts.


def generated(pool: Pool, seed: int) -> tuple[dict[str, Any], Cohorts, str, dict[str, Hazard]]:
    """A job's settings, a site, the patient who comes or goes, and the trouble that some patients make."""
    rng = np.random.default_rng(seed)
    everybody = [*pool.patients, pool.short, pool.windowless, pool.damaged]
    names = [everybody[i] for i in rng.permutation(len(everybody))]
    edges = np.cumsum(rng.choice([0, 1, 2, 5, 9], 3))
    cohorts = Cohorts(*(tuple(names[a:b]) for a, b in itertools.pairwise([0, *edges])))
    where = str(rng.choice(["pair", "pair", "validation", "test"]))
    patient = names[-1]
    cohorts = Cohorts(**{**vars(cohorts), where: (*getattr(cohorts, where), patient)})
    hazards: dict[str, Hazard] = {}
    for each in (patient, *cohorts.pair[:1]):
        if rng.random() < 0.4:
            hazards[each] = ("nan", "huge", "large", "raises")[rng.integers(4)]
    loss = str(rng.choice(["cosine", "mse", "l1", "infonce"]))
    job: dict[str, Any] = {
        **FORMS[("prototype", "factored")[seed % 2]],
        "alignment": {"loss": loss, "layer": str(rng.choice(["final", "bridge"])), "negatives": "patient"},
        "selection": {"windows_per_patient": int(rng.integers(1, 9)), "folds": int(rng.integers(2, 5))},
        "privacy": {
            "training": {
                "sampling_rate": float(rng.choice([0.1, 0.5, 1.0])),
                "clip": float(10 ** rng.uniform(-4, 0)),
                "divisor": float(rng.uniform(0.5, 20)),
            },
            "selection": {"groups": int(rng.integers(2, 7)), "clip": float(10 ** rng.uniform(-3, 0))},
            "closed_form": {
                "clip": float(10 ** rng.uniform(-2, 1)),
                "gram": str(rng.choice(["public", "diagonal", "released"])),
            },
        },
    }
    return job, cohorts, patient, hazards


def compare_generated(pool: Pool, folder: Path, mechanism: Mechanism, seed: int) -> dict[str, float]:
    job, cohorts, patient, hazards = generated(pool, seed)
    return compare(pool, folder, cohorts, patient, private_job(pool, mechanism, **job), hazards=hazards)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("seed", [1])
def test_a_generated_site_with_and_without_a_patient(
    pool: Pool, tmp_path: Path, mechanism: Mechanism, seed: int
) -> None:
    compare_generated(pool, tmp_path, mechanism, seed)


@pytest.mark.slow
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_many_generated_sites_with_and_without_a_patient(pool: Pool, tmp_path: Path, mechanism: Mechanism) -> None:
    largest: dict[str, float] = {}
    for seed in range(2, 22):
        for kind, share in compare_generated(pool, tmp_path / str(seed), mechanism, seed).items():
            largest[kind] = max(largest.get(kind, 0.0), share)
    assert largest.pop("query.describe") == 0.0
    assert min(largest.values()) > 0.3  # nothing is bounded by never moving
