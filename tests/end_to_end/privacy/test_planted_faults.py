"""Faults planted one at a time, and the very checks of `test_neighbours` that catch each.

A fault is a change of one function of the product. Every scene passes without its fault.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import bridge.closed_form
import bridge.privacy.central
import bridge.privacy.gradients
import bridge.privacy.local
import bridge.privacy.selection
import client.app
import client.private_answers
import client.private_evaluation
import client.private_statistics
import client.private_training
from bridge.alignment import aligner
from bridge.metrics import confusion_matrix
from bridge.privacy.gradients import clipped_sum
from bridge.privacy.mechanism import Batch, TrainPlan
from bridge.privacy.sampling import PatientSampler
from client.features import FeatureSet
from client.private import Randomness
from client.session import Session
from tests.end_to_end.privacy.neighbours import FACTORED, Cohorts, Hazard, Mechanism, Pool, compare, private_job, script

Plant = Callable[[pytest.MonkeyPatch], None]

ALL_DRAWN: dict[str, Any] = {"privacy": {"training": {"sampling_rate": 1.0}}}
FACTORED_JOB: dict[str, Any] = {"bridge": FACTORED, "train": {"start": "closed_form"}}


@dataclass(frozen=True)
class Scene:
    """Where a fault shows: a message, and how many patients are there before the first of them goes."""

    message: str
    mechanism: Mechanism = "central"
    pair: int = 5
    test: int = 0
    job: dict[str, Any] = field(default_factory=dict)
    hazard: Hazard | None = None
    """Of the patient who goes."""

    def compare(self, pool: Pool, folder: Path) -> dict[str, float]:
        pair, test = pool.patients[: self.pair], pool.patients[self.pair : self.pair + self.test]
        goes = pair[0] if self.message != "evaluate" else test[0]
        job = private_job(pool, self.mechanism, **self.job)
        messages = [
            each for each in script(job) if each.kind == self.message and each.config.get("split", "test") == "test"
        ]
        hazards = {goes: self.hazard} if self.hazard else {}
        return compare(pool, folder, Cohorts(pair, (), test), goes, job, messages=messages, hazards=hazards)


# Training.


def unclipped_patient(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        bridge.privacy.gradients,
        "_factors",
        lambda squares, clip: (torch.ones_like(squares), torch.isfinite(squares)),
    )


def nan_passes_the_clip(patch: pytest.MonkeyPatch) -> None:
    def factors(squares: torch.Tensor, clip: float) -> tuple[torch.Tensor, torch.Tensor]:
        return clip / squares.sqrt().clamp(min=clip), torch.ones_like(squares, dtype=torch.bool)

    patch.setattr(bridge.privacy.gradients, "_factors", factors)


def windows_as_the_unit(patch: pytest.MonkeyPatch) -> None:
    plain = clipped_sum

    def by_window(bridge_: Any, batch: Batch, align: Any, clip: float) -> Any:
        parts = (batch.features, batch.targets, batch.mask)
        return plain(bridge_, Batch(*(each.flatten(0, 1)[:, None] for each in parts)), align, clip)

    patch.setattr(bridge.privacy.central, "clipped_sum", by_window)


def clip_by_parameter(patch: pytest.MonkeyPatch) -> None:
    def by_parameter(bridge_: Any, batch: Batch, align: Any, clip: float) -> Any:
        weights = {name: getattr(bridge_, name).weight for name in bridge_.shape.trained}
        total = {name: np.zeros(bridge_.shape.arrays()[name]) for name in weights}
        for row in range(len(batch.mask)):
            own = Batch(batch.features[row, None], batch.targets[row, None], batch.mask[row, None])
            gradients = torch.autograd.grad(align(bridge_(own.features), own).sum(), list(weights.values()))
            for name, gradient in zip(weights, gradients, strict=True):
                total[name] += (gradient * min(1.0, clip / float(gradient.norm()))).T.double().numpy()
        return total

    patch.setattr(bridge.privacy.central, "clipped_sum", by_parameter)


def private_divisor(patch: pytest.MonkeyPatch) -> None:
    """The mean over the patients who are there, instead of a sum over a public number."""
    plain = clipped_sum

    def mean(bridge_: Any, batch: Batch, *rest: Any) -> Any:
        return {name: sums * 3.0 / max(1, len(batch.mask)) for name, sums in plain(bridge_, batch, *rest).items()}

    patch.setattr(bridge.privacy.local, "clipped_sum", mean)


def divisor_of_all_the_sites_patients(patch: pytest.MonkeyPatch) -> None:
    plain = client.private_training.private_update

    def own_divisor(site: Any, features: FeatureSet | None, job: Any, *rest: Any) -> Any:
        count = 0 if features is None else len(np.unique(features.table.patients))
        training = job.privacy.training.model_copy(update={"divisor": max(1.0, float(count))})
        privacy = job.privacy.model_copy(update={"training": training})
        return plain(site, features, job.model_copy(update={"privacy": privacy}), *rest)

    patch.setattr(client.private_training, "private_update", own_divisor)


def empty_draw_skipped(patch: pytest.MonkeyPatch) -> None:
    plain = client.private_training._draws
    patch.setattr(client.private_training, "_draws", lambda *rest: (each for each in plain(*rest) if len(each.mask)))


def empty_draw_without_noise(patch: pytest.MonkeyPatch) -> None:
    """No step at all where nobody is drawn, though there are as many draws as announced."""

    def site_update(self: Any, bridge_: Any, batches: Iterable[Batch], plan: Any) -> Any:
        listed = [batch for batch in batches if len(batch.mask)]
        return plain(self, bridge_, listed, type(plan)(**{**vars(plan), "local_steps": len(listed)}))

    plain = bridge.privacy.local.LocalPrivacy.site_update
    patch.setattr(bridge.privacy.local.LocalPrivacy, "site_update", site_update)


def negatives_of_other_patients(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        client.private_training,
        "aligner",
        lambda spec, *rest: aligner(spec.model_copy(update={"negatives": "batch"}), *rest),
    )


def scaler_of_the_site(patch: pytest.MonkeyPatch) -> None:
    plain = FeatureSet.new_output

    def scaled(self: FeatureSet, m: int) -> NDArray[np.float32]:
        own = plain(self, m)
        return np.asarray((own - own.mean(axis=0)) / (own.std(axis=0) + 1e-6), dtype=np.float32)

    patch.setattr(FeatureSet, "new_output", scaled)


def draws_from_one_generator(patch: pytest.MonkeyPatch) -> None:
    """Whether a patient is drawn depends on how many come before in the list."""
    plain = PatientSampler.draws

    def draws(self: PatientSampler, *rest: Any) -> Any:
        rng = np.random.default_rng(0)
        patch.setattr(PatientSampler, "_uniform", lambda self, step, name: rng.random())
        return plain(self, *rest)

    patch.setattr(PatientSampler, "draws", draws)


def weight_by_patients(patch: pytest.MonkeyPatch) -> None:
    plain = client.private_answers.train

    def train(session: Session, request: Any, features: FeatureSet | None, randomness: Randomness) -> Any:
        count = 0 if features is None else len(np.unique(features.table.patients))
        return plain(session, request, features, randomness) | {"weight": count / 100}

    patch.setattr(client.private_answers, "train", train)


def loss_in_the_reply(patch: pytest.MonkeyPatch) -> None:
    plain, losses = client.private_answers.train, []

    def watched(spec: Any, *rest: Any) -> Any:
        align = aligner(spec, *rest)

        def with_loss(*given: Any) -> torch.Tensor:
            found = align(*given)
            losses.append(float(found.detach().sum()))
            return found

        return with_loss

    def train(*given: Any) -> Any:
        losses.clear()
        items = plain(*given)
        return items | {"train_loss": sum(losses)}

    patch.setattr(client.private_training, "aligner", watched)
    patch.setattr(client.private_answers, "train", train)


def update_beside_the_sums(patch: pytest.MonkeyPatch) -> None:
    """The update takes something along that no noise was added to."""
    plain = bridge.privacy.local.LocalPrivacy.site_update

    def site_update(self: Any, bridge_: Any, batches: Iterable[Batch], plan: Any) -> Any:
        listed = list(batches)
        found = plain(self, bridge_, listed, plan)
        found.update["A"] = found.update["A"] + np.float32(1e-3) * float(sum(b.features.sum() for b in listed))
        return found

    patch.setattr(bridge.privacy.local.LocalPrivacy, "site_update", site_update)


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    plain = TrainPlan
    patch.setattr(
        client.private_training,
        "TrainPlan",
        lambda **given: plain(**{**given, "noise_multiplier": given["noise_multiplier"] / 2}),
    )


# Selection, the closed form, metrics, describe.


def groups_by_permutation(patch: pytest.MonkeyPatch) -> None:
    def sums(patients: Any, positions: int, score: Any, *, groups: int, clip: float, key: str) -> Any:
        names, owner = np.unique(patients, return_inverse=True)
        group = (np.random.default_rng(0).permutation(len(names)) % groups)[owner]
        parts = [np.flatnonzero(group == index).astype(np.int64) for index in range(groups)]
        return np.sum([bridge.privacy.selection._vector(rows, positions, score, clip) for rows in parts], axis=0)

    patch.setattr(bridge.privacy.selection, "group_sums", sums)


def one_score_times_the_groups(patch: pytest.MonkeyPatch) -> None:
    """The whole site's score, as large as the sum of the groups' may be."""
    plain = bridge.privacy.selection._vector

    def sums(patients: Any, positions: int, score: Any, *, groups: int, clip: float, key: str) -> Any:
        return groups * plain(np.arange(len(patients)), positions, score, clip)

    patch.setattr(bridge.privacy.selection, "group_sums", sums)


def small_group_refused(patch: pytest.MonkeyPatch) -> None:
    def vector(rows: NDArray[np.int64], positions: int, score: Any, clip: float) -> Any:
        return bridge.privacy.selection.bounded(score(rows), clip) if len(rows) else np.zeros(positions)

    patch.setattr(bridge.privacy.selection, "_vector", vector)


def scores_not_bounded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(bridge.privacy.selection, "bounded", lambda scores, clip: scores - np.mean(scores))


def closed_form_clipped_by_window(patch: pytest.MonkeyPatch) -> None:
    plain = bridge.closed_form.Regression.patient

    def patient(self: Any, h: Any, tokens: Any, clip: float | None = None) -> Any:
        return np.sum([plain(self, h[i, None], tokens[i, None], clip) for i in range(len(h))], axis=0)

    patch.setattr(bridge.closed_form.Regression, "patient", patient)


def closed_form_not_clipped(patch: pytest.MonkeyPatch) -> None:
    plain = bridge.closed_form.Regression.patient
    patch.setattr(bridge.closed_form.Regression, "patient", lambda self, h, tokens, clip=None: plain(self, h, tokens))


def tables_of_counts(patch: pytest.MonkeyPatch) -> None:
    def tables(labels: Any, teacher: Any, predicted: Any, classes: int) -> Any:
        pairs = ((labels, predicted), (labels, teacher), (teacher, predicted))
        return np.stack([confusion_matrix(*pair, classes) for pair in pairs]).astype(np.float64)

    patch.setattr(client.private_evaluation, "patient_tables", tables)


def tables_of_norm_one_each(patch: pytest.MonkeyPatch) -> None:
    """Each of the three tables is bounded, but not all together."""

    def tables(labels: Any, teacher: Any, predicted: Any, classes: int) -> Any:
        pairs = ((labels, predicted), (labels, teacher), (teacher, predicted))
        found = np.stack([confusion_matrix(*pair, classes) for pair in pairs]) / len(labels)
        return found / np.maximum(1e-12, np.linalg.norm(found, axis=(1, 2), keepdims=True))

    patch.setattr(client.private_evaluation, "patient_tables", tables)


def describe_by_a_count(patch: pytest.MonkeyPatch) -> None:
    plain = client.app._prepare

    def prepare(session: Session, message: Any) -> None:
        session.pairs()
        plain(session, message)

    patch.setattr(client.app, "_prepare", prepare)


def no_patient_is_an_error(patch: pytest.MonkeyPatch) -> None:
    plain = Session.cohort
    patch.setattr(
        Session, "cohort", lambda self, split: self.features(split) if split == "pair" else plain(self, split)
    )


def no_patient_is_an_empty_array(patch: pytest.MonkeyPatch) -> None:
    """Left out rather than refused."""
    plain = client.private_answers.evaluate

    def evaluate(session: Session, request: Any, features: FeatureSet | None, randomness: Randomness) -> Any:
        items = plain(session, request, features, randomness)
        return items if features is not None else {}

    patch.setattr(client.private_answers, "evaluate", evaluate)


def noise_by_the_count(patch: pytest.MonkeyPatch) -> None:
    plain = client.private_evaluation.confusion_sums

    def sums(features: FeatureSet | None, chain: Any, classes: int, noise: Any, z: float) -> Any:
        count = 0 if features is None else len(np.unique(features.table.patients))
        return plain(features, chain, classes, noise, z / max(1, count))

    patch.setattr(client.private_evaluation, "confusion_sums", sums)


TRAIN = Scene("train", job=ALL_DRAWN)
LOCAL_TRAIN = Scene("train", "local", job=ALL_DRAWN)
FIRST = Scene("train", "local", pair=1, job={"privacy": {"training": {"sampling_rate": 1.0, "divisor": 4.0}}})
PROBE = Scene("query.probe", pair=12, job={"privacy": {"selection": {"clip": 1e-3}}})
SIMILARITY = Scene("query.similarity", job={"privacy": {"selection": {"clip": 1e-3}}})
CLOSED_FORM = Scene("query.closed_form", job=FACTORED_JOB)
EVALUATE = Scene("evaluate", test=2, pair=1)

MOVED, CODES = r"moved by .* the declared bound is", r"codes 0 and 1\d\d|codes 1\d\d and 0"


def infonce(windows: int) -> dict[str, Any]:
    return {
        "alignment": {"loss": "infonce", "negatives": "patient"},
        "train": {"windows_per_patient": windows},
        "privacy": {"training": {"sampling_rate": 1.0, "clip": 1e-3}},
    }


FAULTS: list[tuple[Plant, Scene, str]] = [
    (unclipped_patient, TRAIN, MOVED),
    (nan_passes_the_clip, Scene("train", job=ALL_DRAWN, hazard="nan"), CODES),
    (windows_as_the_unit, TRAIN, MOVED),
    (clip_by_parameter, TRAIN, MOVED),
    (
        private_divisor,
        Scene("train", "local", pair=1, job={"privacy": {"training": {"sampling_rate": 1.0, "divisor": 3.0}}}),
        MOVED,
    ),
    (divisor_of_all_the_sites_patients, FIRST, MOVED),
    (empty_draw_skipped, FIRST, CODES),
    (empty_draw_without_noise, FIRST, "other draws of noise"),
    (negatives_of_other_patients, Scene("train", pair=3, job=infonce(windows=1)), MOVED),
    (negatives_of_other_patients, Scene("train", job=infonce(windows=3), hazard="nan"), MOVED),
    (scaler_of_the_site, Scene("train", job=ALL_DRAWN, hazard="large"), MOVED),
    (draws_from_one_generator, Scene("train", pair=12, job={"privacy": {"training": {"sampling_rate": 0.5}}}), MOVED),
    (weight_by_patients, TRAIN, "another number, flag or text"),
    (loss_in_the_reply, TRAIN, "another number, flag or text"),
    (update_beside_the_sums, LOCAL_TRAIN, "depends on more than the noised sums"),
    (half_the_noise, LOCAL_TRAIN, "is due"),
    (groups_by_permutation, PROBE, MOVED),
    (one_score_times_the_groups, PROBE, MOVED),
    (small_group_refused, Scene("query.similarity", pair=1, job={"selection": {"windows_per_patient": 3}}), CODES),
    (scores_not_bounded, SIMILARITY, MOVED),
    (closed_form_clipped_by_window, CLOSED_FORM, MOVED),
    (closed_form_not_clipped, CLOSED_FORM, MOVED),
    (tables_of_counts, EVALUATE, MOVED),
    (tables_of_norm_one_each, EVALUATE, MOVED),
    (describe_by_a_count, Scene("query.describe"), "another number, flag or text"),
    (no_patient_is_an_error, Scene("query.probe", pair=1), CODES),
    (no_patient_is_an_empty_array, Scene("evaluate", pair=1, test=1), CODES),
    (noise_by_the_count, Scene("evaluate", "local", pair=1, test=2), "other draws of noise"),
]

SCENES = list({id(scene): scene for _, scene, _ in FAULTS}.values())


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: f"{scene.message}-{scene.mechanism}")
def test_a_scene_without_a_fault_passes(pool: Pool, tmp_path: Path, scene: Scene) -> None:
    scene.compare(pool, tmp_path)


@pytest.mark.parametrize(("plant", "scene", "caught"), FAULTS, ids=[plant.__name__ for plant, _, _ in FAULTS])
def test_a_planted_fault_is_caught(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Plant, scene: Scene, caught: str
) -> None:
    plant(monkeypatch)
    with pytest.raises(AssertionError) as found:
        scene.compare(pool, tmp_path)
    assert re.search(caught, str(found.value)), f"caught by another check: {found.value}"
