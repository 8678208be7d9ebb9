"""Distillation: the losses against numpy by hand, students that learn what their teacher says, and bad lessons."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from bridge.compute import Compute
from bridge.distil import Lessons, Rival, RivalSettings, Student, contrastive_loss, distil, distillation_loss
from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.protocol import Encoder
from bridge.errors import ConfigError, SelectionError, WindowError
from bridge.windows import WindowSpec
from tests.bridge.encoders.test_placed import Recorded

WINDOW = WindowSpec(modality="PPG", channels=("finger",), rate_hz=25, samples=100)
WIDTH, CLASSES, OLD_WIDTH = 8, 3, 12
QUICK: dict[str, Any] = {"steps": 6, "batch": 16, "projection": 5}


@pytest.fixture(scope="module")
def encoder() -> CompactEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = CompactEncoder(WINDOW, CompactArchitecture(width=WIDTH, blocks=2, heads=2, tokens=10), "e" * 64)
    return made.eval().requires_grad_(False)


def lessons(n: int, seed: int = 7) -> tuple[Lessons, NDArray[np.int64]]:
    """Waves whose rhythm is the class, a teacher that is sure of it, and features of its own for each moment."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, n)
    wave = np.sin(2 * np.pi * np.outer(1 + 3 * y, np.arange(100) / 25) + rng.uniform(0, 6.28, (n, 1)))
    x = wave[:, None] + 0.3 * rng.standard_normal((n, 1, 100))
    logits = 4.0 * np.eye(CLASSES)[y] + 0.2 * rng.standard_normal((n, CLASSES))
    pooled = np.eye(CLASSES, OLD_WIDTH)[y] + 0.3 * rng.standard_normal((n, OLD_WIDTH))
    return Lessons(x.astype(np.float32), logits.astype(np.float32), pooled.astype(np.float32)), y


def taught(encoder: Encoder, rival: Rival, n: int = 48, *, compute: Compute | None = None, **keys: Any) -> Student:
    return distil(rival, encoder, lessons(n)[0], RivalSettings(**QUICK | keys), seed=0, compute=compute)


def weights(student: Student) -> dict[str, Tensor]:
    assert isinstance(student.encoder, torch.nn.Module)
    return {**student.encoder.state_dict(), **student.head.state_dict()}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_is_the_divergence_from_the_teachers_softmax(temperature: float) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.standard_normal((2, 7, 4))
    p = np.exp(teacher / temperature) / np.exp(teacher / temperature).sum(axis=1, keepdims=True)
    q = np.exp(student / temperature) / np.exp(student / temperature).sum(axis=1, keepdims=True)
    expected = temperature**2 * (p * np.log(p / q)).sum() / 7
    found = distillation_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    assert float(found) == pytest.approx(expected, rel=1e-12)
    assert float(distillation_loss(torch.from_numpy(teacher), torch.from_numpy(teacher), temperature)) == 0.0


def test_contrast_picks_each_moment_both_ways() -> None:
    rng = np.random.default_rng(1)
    new, old = rng.standard_normal((2, 6, 5))
    cosines = (new @ old.T) / np.outer(np.linalg.norm(new, axis=1), np.linalg.norm(old, axis=1)) / 0.2
    rows = np.log(np.exp(cosines).sum(axis=1)) - np.diag(cosines)
    columns = np.log(np.exp(cosines).sum(axis=0)) - np.diag(cosines)
    found = contrastive_loss(torch.from_numpy(new), torch.from_numpy(old), 0.2)
    assert float(found) == pytest.approx((rows.mean() + columns.mean()) / 2, rel=1e-12)
    assert float(contrastive_loss(torch.from_numpy(new[:1]), torch.from_numpy(old[:1]), 0.2)) == 0.0


@pytest.mark.parametrize("rival", ["kd", "kd_contrast"])
def test_a_student_answers_as_its_teacher_on_windows_that_it_never_saw(encoder: CompactEncoder, rival: Rival) -> None:
    student = taught(encoder, rival, n=192, steps=120, batch=32, learning_rate=3e-3)
    other, y = lessons(120, seed=11)
    assert (student.classes_of(other.windows) == y).mean() > 0.95
    assert np.mean(student.losses[-10:]) < 0.5 * np.mean(student.losses[:10])
    assert len(student.losses) == 120


def test_everything_of_the_student_is_trained_and_nothing_of_the_encoder_it_came_from(encoder: CompactEncoder) -> None:
    before = copy.deepcopy(encoder.state_dict())
    student = taught(encoder, "kd", steps=3)
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())
    assert not any(each.requires_grad for each in encoder.parameters())
    assert isinstance(student.encoder, CompactEncoder)
    moved = {name for name, value in student.encoder.state_dict().items() if not torch.equal(before[name], value)}
    assert moved == set(before)
    assert not any(each.requires_grad for each in (*student.encoder.parameters(), *student.head.parameters()))


def test_parameters_are_those_of_encoder_head_and_projections(encoder: CompactEncoder) -> None:
    whole = sum(value.numel() for value in encoder.state_dict().values()) + WIDTH * CLASSES + CLASSES
    assert taught(encoder, "kd").parameters == whole
    projections = (WIDTH + 1) * 5 + (OLD_WIDTH + 1) * 5
    assert taught(encoder, "kd_contrast").parameters == whole + projections


@pytest.mark.parametrize("rival", ["kd", "kd_contrast"])
def test_in_little_memory_a_batch_in_parts_gives_the_same_student(encoder: CompactEncoder, rival: Rival) -> None:
    whole = taught(encoder, rival)
    parted = taught(encoder, rival, compute=Compute(memory_bytes=1))
    np.testing.assert_allclose(parted.losses, whole.losses, rtol=1e-4)
    x = lessons(48)[0].windows
    np.testing.assert_array_equal(parted.classes_of(x), whole.classes_of(x))


def test_the_same_seed_gives_the_same_student(encoder: CompactEncoder) -> None:
    one, again = taught(encoder, "kd_contrast"), taught(encoder, "kd_contrast")
    other = distil("kd_contrast", encoder, lessons(48)[0], RivalSettings(**QUICK), seed=1)
    assert one.losses == again.losses
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(one).items())
    assert one.losses != other.losses


def test_fewer_windows_than_a_batch_are_one_batch(encoder: CompactEncoder) -> None:
    assert len(taught(encoder, "kd_contrast", n=3, steps=4).losses) == 4


def spoilt(**changes: Any) -> Lessons:
    good, _ = lessons(8)
    return Lessons(**{**vars(good), **changes})


@pytest.mark.parametrize(
    ("rival", "bad", "words"),
    [
        ("kd", spoilt(logits=np.zeros((7, 3), np.float32)), "8 windows, 7 logits"),
        ("kd_contrast", spoilt(pooled=np.zeros((9, 4), np.float32)), "9 pooled"),
        ("kd_contrast", spoilt(pooled=None), "teacher's features"),
        ("kd", spoilt(windows=np.zeros((8, 1, 99), np.float32)), "99"),
        ("kd", Lessons(np.zeros((0, 1, 100), np.float32), np.zeros((0, 3), np.float32)), "at least one"),
        ("kd", spoilt(windows=np.full((8, 1, 100), np.nan, np.float32)), "windows: some values are not finite"),
        ("kd", spoilt(logits=np.full((8, 3), np.inf, np.float32)), "logits: some values are not finite"),
    ],
)
def test_lessons_that_do_not_fit_are_named(encoder: CompactEncoder, rival: Rival, bad: Lessons, words: str) -> None:
    with pytest.raises(WindowError, match=words):
        distil(rival, encoder, bad, RivalSettings(**QUICK), seed=0)


def test_an_encoder_that_is_no_module_is_refused(encoder: CompactEncoder) -> None:
    with pytest.raises(ConfigError, match="can't be trained as a whole"):
        taught(Recorded(encoder), "kd")


def test_steps_that_are_too_large_are_named(encoder: CompactEncoder) -> None:
    with pytest.raises(SelectionError, match=r"rivals\.learning_rate"):
        taught(encoder, "kd", learning_rate=1e30, steps=20)
