"""The closed form's statistics at a site: right, bounded by patient, noised as declared, and of one shape always."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.fft import dct
from scipy.stats import kstest

from bridge.job import Job
from bridge.messages import closed_form_length
from bridge.privacy.noise import NoiseSource
from bridge.prototype import PrototypeBridge
from bridge.selection import cap_windows
from bridge.shape import BridgeShape
from client.closed_form import closed_form_item
from client.features import FeatureSet, features
from client.requests import Request
from client.session import Deadline
from client.site import open_site
from client.statistics import SELECTION_KEY
from tests.client.sites import PROTOTYPES, RANK, TOKENS, WIDTH, Small, ask, build_job

M, L = 2, 1
SHAPE = BridgeShape(
    WIDTH, RANK, TOKENS, PROTOTYPES, WIDTH, cosines=2, components=3, constant=True, frozen_prototypes=True
)
BRIDGE = {
    "kind": "factored",
    "cosines": 2,
    "components": 3,
    "initialisation": "directions",
    "frozen_prototypes": True,
    "constant": "public",
    "whitening": "public",
}


def broadcast() -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=size).astype(np.float32) for name, size in SHAPE.arrays().items()}


def bridge() -> PrototypeBridge:
    found = PrototypeBridge(SHAPE)
    found.load_arrays(broadcast())
    return found


def job(small: Small, mechanism: str = "none", **closed_form: Any) -> Job:
    privacy = {"mechanism": mechanism, "closed_form": {"noise_multiplier": 1.5, **closed_form}}
    return build_job(small.models, bridge=BRIDGE, train={"method": "closed_form"}, privacy=privacy)


def item(found: FeatureSet | None, asked: Job, noise: NoiseSource | None = None) -> NDArray[np.float64]:
    request = Request("query.closed_form", "run", None, M, L, shape=SHAPE)
    name, value = closed_form_item(found, asked, request, bridge(), Deadline(60), noise)
    assert (name, value.dtype.name) == ("statistics" if asked.privacy.private else "closed_form_moments", "float64")
    return value


def by_hand(found: FeatureSet, patient: str, gram: str) -> NDArray[np.float64]:
    """One patient's vector, window by window."""
    arrays = {name: array.astype(np.float64) for name, array in broadcast().items()}
    own = cap_windows(found.table.patients, 6, SELECTION_KEY)
    own = own[found.table.patients[own] == patient]
    cross, matrix = np.zeros((4, 2 * PROTOTYPES)), np.zeros((4, 4))
    for row in own:
        x = np.append((found.new_output(M)[row] - arrays["mean"]) @ arrays["whitening"], 1.0)
        tokens = found.old_input_tokens(L, [row])[0] - arrays["constant"]
        waves = dct(tokens, axis=0, norm="ortho")[:2]
        c = np.concatenate([np.linalg.lstsq(arrays["P"].T, wave, rcond=None)[0] for wave in waves])
        cross += np.outer(x, c) / len(own)
        matrix += np.outer(x, x) / len(own)
    packed = [np.array([0.25]), cross.ravel() / np.sqrt(4 * 2 * PROTOTYPES)]
    of_gram = {
        "public": [],
        "diagonal": [matrix[:3, 3] * 0.5 / np.sqrt(4), np.diag(matrix)[:3] / 4],
        "released": [matrix[np.triu_indices(4)] / 4],
    }
    return np.concatenate([*packed, *of_gram[gram]])


@pytest.fixture(scope="module")
def pairs(small: Small) -> FeatureSet:
    return features(open_site(small.site), "pair")


@dataclasses.dataclass
class Without(FeatureSet):
    """A set without some of its patients: a neighbour."""

    kept: NDArray[np.int64] | None = None

    @classmethod
    def of(cls, whole: FeatureSet, patients: Sequence[str]) -> Without:
        kept = np.flatnonzero(~np.isin(whole.table.patients, patients))
        values = {each.name: getattr(whole, each.name) for each in fields(FeatureSet)}
        values["table"] = whole.table.take(kept)
        return cls(**values, kept=kept)

    def __post_init__(self) -> None:
        self._firsts = np.cumsum([0, *[len(each) for each in self._recordings]])

    def new_output(self, m: int) -> NDArray[np.float32]:
        assert self.kept is not None
        return super().new_output(m)[self.kept]

    def old_input_tokens(self, l: int, rows: Any) -> NDArray[np.float32]:  # noqa: E741
        assert self.kept is not None
        return super().old_input_tokens(l, self.kept[rows])


@dataclasses.dataclass
class Broken(Without):
    """A set in which one patient's old recording raises, or gives what is no number."""

    broken: str = ""
    how: str = ""

    def old_input_tokens(self, l: int, rows: Any) -> NDArray[np.float32]:  # noqa: E741
        found = super().old_input_tokens(l, rows)
        if self.broken in self.table.patients[rows]:
            if self.how == "raises":
                raise ZeroDivisionError
            found[0, 0, 0] = np.nan
        return found


def test_without_a_mechanism_it_is_the_plain_sum_over_patients(small: Small, pairs: FeatureSet) -> None:
    expected = np.sum([by_hand(pairs, name, "released") for name in np.unique(pairs.table.patients)], axis=0)
    found = item(pairs, job(small))
    assert found.shape == (closed_form_length(SHAPE, "released"),) == (1 + 4 * 2 * PROTOTYPES + 10,)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mechanism", ["local", "central"])
@pytest.mark.parametrize("gram", ["public", "diagonal", "released"])
def test_a_private_sum_is_of_clipped_patients(small: Small, pairs: FeatureSet, mechanism: str, gram: str) -> None:
    clip = 0.8
    parts = [by_hand(pairs, name, gram) for name in np.unique(pairs.table.patients)]
    norms = np.linalg.norm(parts, axis=1)
    assert norms.max() > clip, "else nothing is clipped here"
    found = item(pairs, job(small, mechanism, clip=clip, gram=gram))
    expected = np.sum([part * min(1.0, clip / norm) for part, norm in zip(parts, norms, strict=True)], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip", [1e-3, 0.5, 1e6])
def test_adding_or_removing_a_patient_moves_it_by_its_own_part(small: Small, pairs: FeatureSet, clip: float) -> None:
    asked = job(small, "central", clip=clip, gram="public")
    whole = item(pairs, asked)
    for patient in np.unique(pairs.table.patients):
        part = by_hand(pairs, str(patient), "public")
        moved = whole - item(Without.of(pairs, [str(patient)]), asked)
        np.testing.assert_allclose(moved, part * min(1.0, clip / np.linalg.norm(part)), rtol=1e-4, atol=1e-5 * clip)
        assert np.linalg.norm(moved) <= clip * (1 + 1e-9)


def test_nobody_and_one_patient_look_the_same(small: Small, pairs: FeatureSet) -> None:
    names = np.unique(pairs.table.patients)
    asked = job(small, "local", gram="public")
    one = item(Without.of(pairs, [str(name) for name in names[1:]]), asked)
    nobody = item(None, asked)
    assert one.shape == nobody.shape == (closed_form_length(SHAPE, "public"),)
    assert not nobody.any()
    assert one.any()


@pytest.mark.parametrize("how", ["raises", "gives NaN"])
def test_a_patient_whose_data_fail_counts_as_zeros(small: Small, pairs: FeatureSet, how: str) -> None:
    asked, patient = job(small, "central"), str(np.unique(pairs.table.patients)[2])
    broken = dataclasses.replace(Broken.of(pairs, []), broken=patient, how=how)
    np.testing.assert_array_equal(item(broken, asked), item(Without.of(pairs, [patient]), asked))


def test_a_sites_noise_has_the_declared_scale(small: Small) -> None:
    asked = job(small, "local", clip=0.4, noise_multiplier=2.5)
    drawn = np.concatenate([item(None, asked, NoiseSource.seeded(3, number)) for number in range(120)])
    assert len(drawn) > 3000
    assert kstest(drawn, "norm", (0, 2.5 * 0.4)).pvalue > 1e-3
    for wrong in (2 / 3, 3 / 2):
        assert kstest(drawn, "norm", (0, 2.5 * 0.4 * wrong)).pvalue < 1e-6
    with pytest.raises(ValueError, match="noise multiplier"):
        item(None, job(small, "local", noise_multiplier=None), NoiseSource.seeded(3))


def test_more_windows_than_are_allowed_do_not_count(small: Small, pairs: FeatureSet) -> None:
    counts = np.unique(pairs.table.patients, return_counts=True)[1]
    assert counts.max() > 6, "the job allows six"
    asked = job(small)
    wider = asked.model_copy(update={"selection": asked.selection.model_copy(update={"windows_per_patient": 99})})
    assert np.abs(item(pairs, asked) - item(pairs, wider)).max() > 1e-3


def test_a_site_answers_the_message(small: Small, pairs: FeatureSet, tmp_path: Path) -> None:
    asked = job(small)
    config = {"input-position": M, "output-position": L}
    reply = ask(small.site, asked, "query.closed_form", config, broadcast())
    assert not reply.has_error(), reply.error
    np.testing.assert_array_equal(reply.content["arrays"]["closed_form_moments"].numpy(), item(pairs, asked))
