"""Training of compact encoders: seeds, what the objectives see, and that training learns."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.pretrain import (
    PretrainSettings,
    SupervisedSettings,
    fit_teacher,
    log_spectrum,
    pretrain,
)
from bridge.errors import SelectionError, WindowError
from bridge.windows import WindowSpec

RATE, SAMPLES = 50.0, 250
WINDOW = WindowSpec(modality="PPG", channels=("PPG",), rate_hz=RATE, samples=SAMPLES)
ARCHITECTURE = CompactArchitecture(width=16, blocks=2, heads=2, tokens=25)


def fresh(seed: int = 0) -> CompactEncoder:
    torch.manual_seed(seed)
    return CompactEncoder(WINDOW, ARCHITECTURE)


def rhythms(n: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]:
    """Noisy sines of 1 Hz (class 0) or 2 Hz (class 1) in any phase; ten patients."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, n)
    time = np.arange(SAMPLES) / RATE
    phase = rng.uniform(0, 2 * np.pi, (n, 1))
    x = np.sin(2 * np.pi * (1 + labels[:, None]) * time + phase) + 0.5 * rng.standard_normal((n, SAMPLES))
    return x[:, None].astype(np.float32), labels, np.array([f"p{i % 10}" for i in range(n)])


def state(encoder: CompactEncoder) -> NDArray[np.float32]:
    return np.concatenate([value.numpy().ravel() for value in encoder.state_dict().values()])


def test_log_spectrum_equals_a_plain_periodogram() -> None:
    x = np.random.default_rng(0).standard_normal((2, 3, SAMPLES))
    got = log_spectrum(torch.from_numpy(x), RATE, 1000, None).numpy().reshape(2, 3, -1)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(SAMPLES) / SAMPLES)
    n = np.arange(SAMPLES)
    all_power = [np.abs((x * hann * np.exp(-2j * np.pi * k * n / SAMPLES)).sum(-1)) ** 2 for k in range(126)]
    floor = 1e-5 * np.mean(all_power, axis=0)
    for k in (1, 7, 60, 125):  # a direct Fourier sum; with many bands each is one bin
        np.testing.assert_allclose(got[..., k - 1], np.log(all_power[k] + floor), atol=1e-4)
    assert got.shape[-1] == SAMPLES // 2


def test_spectrum_bands_are_fine_at_the_low_end_and_end_at_the_limit() -> None:
    time = np.arange(SAMPLES) / RATE
    found = []
    for hz in (1.0, 1.2, 12.0, 20.0):
        bands = log_spectrum(torch.from_numpy(np.sin(2 * np.pi * hz * time))[None, None], RATE, 24, 12.4)
        assert bands.shape[1] <= 24
        found.append(int(bands.argmax()))
    assert found[0] != found[1]  # one bin (0.2 Hz) apart
    assert found[2] > found[1]
    highest = log_spectrum(torch.from_numpy(np.sin(2 * np.pi * 20.0 * time))[None, None], RATE, 24, 12.4)
    assert float(highest.max() - highest.min()) < 15  # 20 Hz lies beyond: floor and leakage alone


def test_pretraining_has_no_place_for_a_label() -> None:
    assert set(inspect.signature(pretrain).parameters) == {"encoder", "windows", "settings", "seed", "progress"}


@pytest.mark.parametrize(("weights", "falls_to"), [((1.0, 0.0), 0.95), ((0.0, 1.0), 0.85)])
def test_each_objective_falls(weights: tuple[float, float], falls_to: float) -> None:
    rng = np.random.default_rng(0)
    turns = rng.uniform(1, 1.5, (128, 1)) * np.arange(SAMPLES) / RATE + rng.uniform(0, 1, (128, 1))
    x = np.sin(2 * np.pi * turns)[:, None].astype(np.float32)
    settings = PretrainSettings(
        steps=120,
        batch=32,
        learning_rate=4e-3,
        reconstruction_weight=weights[0],
        spectrum_weight=weights[1],
        spectrum_bands=32,
        mask_span=2,
    )
    history = pretrain(fresh(), x, settings, seed=0)
    assert len(history.loss) == 120
    assert np.mean(history.loss[-10:]) < falls_to * np.mean(history.loss[:10])


def test_pretraining_repeats_by_seed_and_leaves_the_global_generator_alone() -> None:
    x, _, _ = rhythms(64)
    settings = PretrainSettings(steps=5, batch=16, spectrum_bands=16)
    runs = []
    for seed, disturb in ((0, 1), (0, 2), (1, 1)):
        encoder = fresh()
        torch.manual_seed(disturb)
        before = torch.random.get_rng_state()
        pretrain(encoder, x, settings, seed=seed)
        assert torch.equal(before, torch.random.get_rng_state())
        assert not encoder.training
        runs.append(state(encoder))
    assert np.array_equal(runs[0], runs[1])
    assert np.abs(runs[0] - runs[2]).max() > 1e-4


def test_spectral_pretraining_makes_the_rhythm_linearly_readable() -> None:
    """Least squares on pooled tokens tells 1.2 from 1.4 Hz in new windows, far better than before training."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 2, 600)
    turns = (1.2 + 0.2 * y[:, None]) * np.arange(SAMPLES) / RATE + rng.uniform(0, 1, (600, 1))
    noisy = np.sin(2 * np.pi * turns) + 0.5 * rng.standard_normal((600, SAMPLES))
    x = noisy[:, None].astype(np.float32)

    def readable(steps: int) -> float:
        encoder = fresh().eval()
        settings = PretrainSettings(steps=steps, batch=32, learning_rate=4e-3, noise=0, spectrum_bands=32)
        pretrain(encoder, x[:300], settings, seed=0)
        with torch.no_grad():
            features = encoder(torch.from_numpy(x)).mean(1).double().numpy()
        design = np.c_[features, np.ones(len(features))]
        gram = design[:300].T @ design[:300] + 1e-3 * np.eye(17)
        weights = np.linalg.solve(gram, design[:300].T @ (2.0 * y[:300] - 1))
        return float(np.mean((design[300:] @ weights > 0) == y[300:]))

    assert readable(0) < 0.85
    assert readable(200) > 0.9


def test_teacher_learns_and_keeps_its_best_moment() -> None:
    x, y, p = rhythms(300)
    encoder = fresh()
    head, history = fit_teacher(
        encoder, x[:200], y[:200], p[:200], 2, SupervisedSettings(steps=120, batch=32, checks=6), seed=0
    )
    with torch.no_grad():
        predicted = head(encoder(torch.from_numpy(x[200:])).mean(1)).argmax(1).numpy()
    assert np.mean(predicted == y[200:]) > 0.9
    scores = dict(history.validation)
    assert len(scores) == 6
    assert history.kept_step is not None
    assert history.kept_step >= 60  # half of the steps
    assert scores[history.kept_step] == max(score for step, score in scores.items() if step >= 60)


def test_held_back_patients_never_train() -> None:
    """Windows of the held-back patients choose the moment, so with one check they change nothing at all."""
    x, y, _ = rhythms(120)
    p = np.array([f"p{i % 4}" for i in range(120)])
    settings = SupervisedSettings(steps=6, batch=16, checks=1, validation=0.25)
    results = []
    for patient in ["p0", "p1", "p2", "p3"]:
        changed = x.copy()
        changed[p == patient] += 5.0
        for data in (x, changed):
            encoder = fresh()
            fit_teacher(encoder, data, y, p, 2, settings, seed=0)
            results.append(state(encoder))
    same = [np.array_equal(results[2 * i], results[2 * i + 1]) for i in range(4)]
    assert sorted(same) == [False, False, False, True]


def test_rare_classes_count_equally() -> None:
    """With 1 window in 20 of class 1 and features that say nothing, the loss stays near log 2, not near zero."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 1, SAMPLES)).astype(np.float32)
    y = (np.arange(200) % 20 == 0).astype(np.int64)
    p = np.array([f"p{i % 7}" for i in range(200)])
    _, history = fit_teacher(
        fresh(), x, y, p, 2, SupervisedSettings(steps=20, batch=64, learning_rate=1e-4, label_smoothing=0), seed=0
    )
    assert np.mean(history.loss) == pytest.approx(np.log(2), abs=0.15)


def test_bad_public_sets_are_refused() -> None:
    x, y, p = rhythms(40)
    with pytest.raises(WindowError, match="do not fit"):
        pretrain(fresh(), x[:, :, :100], PretrainSettings(steps=1), seed=0)
    with pytest.raises(SelectionError, match="no public window"):
        pretrain(fresh(), x[:0], PretrainSettings(steps=1), seed=0)
    with pytest.raises(SelectionError, match="lack a class") as caught:
        fit_teacher(fresh(), x, np.zeros(40, np.int64), p, 2, SupervisedSettings(steps=1), seed=0)
    assert "1 of 2 classes" in caught.value.why
    with pytest.raises(SelectionError, match="too few public patients"):
        fit_teacher(fresh(), x, y, np.full(40, "p0"), 2, SupervisedSettings(steps=1), seed=0)


def test_progress_reaches_the_end() -> None:
    x, _, _ = rhythms(32)
    seen: list[tuple[str, int, int]] = []
    settings = PretrainSettings(steps=23, batch=8, spectrum_bands=8)
    pretrain(fresh(), x, settings, seed=0, progress=lambda *each: seen.append(each))
    assert seen[-1] == ("masked pretraining", 23, 23)
    assert [done for _, done, _ in seen] == [10, 20, 23]
