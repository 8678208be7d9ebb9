"""Fitting a task head: against Adam by hand, with and without its encoder, on good and on bad input."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bridge.compute import Compute
from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.protocol import Encoder
from bridge.errors import ConfigError, SelectionError, WindowError
from bridge.head_fit import FittedHead, HeadSettings, fit_head
from bridge.held_back import held_back
from bridge.windows import WindowSpec
from tests.bridge.encoders.test_placed import Recorded

WINDOW = WindowSpec(modality="ECG", channels=("I",), rate_hz=25, samples=100)
PATIENTS = 24
Windows = tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.str_]]


@pytest.fixture(scope="module")
def encoder() -> CompactEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = CompactEncoder(WINDOW, CompactArchitecture(width=8, blocks=2, heads=2, tokens=10), "e" * 64)
    return made.eval().requires_grad_(False)


def windows(signal: float, n: int = 192, classes: int = 2) -> Windows:
    """Noise of `PATIENTS` patients, with a wave of that size whose rhythm is the class."""
    rng = np.random.default_rng(7)
    y = rng.integers(0, classes, n)
    wave = np.sin(2 * np.pi * np.outer(2 + 3 * y, np.arange(100) / 25))
    x = 0.5 * rng.standard_normal((n, 1, 100)) + signal * wave[:, None]
    return x.astype(np.float32), y, np.array([f"p{i % PATIENTS}" for i in range(n)])


def fitted(
    encoder: Encoder, data: Windows, *, compute: Compute | None = None, seed: int = 0, **keys: Any
) -> FittedHead:
    classes = int(data[1].max()) + 1
    return fit_head(encoder, *data, classes, HeadSettings(**keys), seed=seed, compute=compute)


def by_hand(
    features: NDArray[np.float64],
    y: NDArray[np.int64],
    weights: NDArray[np.float64],
    rate: float,
    steps: int,
    seed: int,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Weight and bias after `steps` of Adam on all windows at once (Kingma and Ba, algorithm 1)."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        start = torch.nn.Linear(features.shape[1], len(weights))
    theta = np.concatenate([start.weight.detach().numpy(), start.bias.detach().numpy()[:, None]], axis=1).astype(float)
    design = np.concatenate([features, np.ones((len(features), 1))], axis=1)
    m, v = np.zeros_like(theta), np.zeros_like(theta)
    share = weights[y] / weights[y].sum()
    for t in range(1, steps + 1):
        logits = design @ theta.T
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        p[np.arange(len(y)), y] -= 1
        gradient = (share[:, None] * p).T @ design
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        theta -= rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return theta[:, :-1], theta[:, -1]


@pytest.mark.parametrize("weights", ["balanced", "none", (3.0, 1.0)])
def test_the_head_is_what_adam_makes_of_the_final_tokens(encoder: CompactEncoder, weights: Any) -> None:
    data = windows(1.0)
    found = fitted(encoder, data, seed=5, epochs=7, batch=1000, learning_rate=0.02, class_weights=weights, keep="last")
    train = ~held_back(data[2], 0.25, 5)
    x, y = data[0][train], data[1][train]
    features = encoder.taps(torch.from_numpy(x)).outputs[-1].double().numpy()
    counts = np.array([(y == c).sum() for c in range(2)])
    given = {"balanced": 1 / counts, "none": np.ones(2)}.get(weights, np.array([3.0, 1.0]))
    weight, bias = by_hand(features, y, given, 0.02, 7, seed=5)
    np.testing.assert_allclose(found.head.linear.weight.detach().numpy(), weight, atol=2e-5)
    np.testing.assert_allclose(found.head.linear.bias.detach().numpy(), bias, atol=2e-5)
    assert (found.patients, found.held_back, found.windows) == (24, 6, 192)
    assert found.windows_by_class == tuple((data[1] == c).sum() for c in range(2))
    assert found.history.kept_step == len(found.history.loss) == 7
    assert [epoch for epoch, _ in found.history.validation] == list(range(1, 8))
    assert not any(each.requires_grad for each in found.head.parameters())
    assert found.encoder is encoder


def test_good_windows_are_told_from_noise(encoder: CompactEncoder) -> None:
    good = fitted(encoder, windows(1.5), epochs=30, learning_rate=0.05)
    assert good.balanced_accuracy > 0.9
    assert good.better_than_chance
    assert good.sentence().endswith("(chance 0.500): better than chance")
    assert f"{good.balanced_accuracy:.3f} [{good.interval[0]:.3f}, {good.interval[1]:.3f}] on 6 " in good.sentence()  # type: ignore[index]
    noise = fitted(encoder, windows(0.0), epochs=30, learning_rate=0.05)
    assert noise.better_than_chance is False
    assert noise.sentence().endswith("NOT better than chance")


def test_too_few_held_back_patients_tell_nothing(encoder: CompactEncoder) -> None:
    found = fitted(encoder, windows(1.5), epochs=2, validation=0.15)
    assert (found.held_back, found.interval, found.better_than_chance) == (4, None, None)
    assert "on 4 held-back patients (chance 0.500): too few patients to tell" in found.sentence()


def test_held_back_patients_of_one_class_tell_nothing(encoder: CompactEncoder) -> None:
    x, y, patients = windows(1.5)
    y[held_back(patients, 0.25, 0)] = 0
    found = fitted(encoder, (x, y, patients), epochs=2)
    assert found.better_than_chance is None
    assert found.sentence().endswith("all their windows are of one class, which tells nothing about chance")


def test_the_best_epoch_is_kept(encoder: CompactEncoder) -> None:
    """Steps so large that the accuracy jumps about; what is kept gives the best one on record, again."""
    data = windows(0.4)
    found = fitted(encoder, data, epochs=12, learning_rate=1.0, batch=16)
    scores = [score for _, score in found.history.validation]
    assert found.history.kept_step == 1 + int(np.argmax(scores))
    rows = held_back(data[2], 0.25, 0)
    features = encoder.taps(torch.from_numpy(data[0][rows])).outputs[-1]
    right = found.head(features).argmax(1).numpy() == data[1][rows]
    recalls = [right[data[1][rows] == c].mean() for c in range(2)]
    assert np.mean(recalls) == pytest.approx(max(scores))
    assert len(set(scores)) > 3


@pytest.mark.parametrize("train", ["head", "whole"])
def test_a_seed_decides_everything(encoder: CompactEncoder, train: str) -> None:
    data = windows(1.0, n=96)
    a, b, c = (fitted(encoder, data, seed=seed, epochs=2, train=train) for seed in (1, 1, 2))
    assert a.history == b.history
    assert torch.equal(a.head.linear.weight, b.head.linear.weight)
    assert not torch.equal(a.head.linear.weight, c.head.linear.weight)


def test_the_whole_is_trained_in_a_copy(encoder: CompactEncoder) -> None:
    before = {name: each.clone() for name, each in encoder.state_dict().items()}
    data = windows(1.0)
    found = fitted(encoder, data, train="whole", epochs=3)
    assert found.history.loss[-1] < fitted(encoder, data, epochs=3).history.loss[-1]
    assert found.encoder is not encoder
    assert isinstance(found.encoder, CompactEncoder)
    moved = found.encoder.state_dict()
    assert all(not torch.equal(before[name], moved[name]) for name, _ in encoder.named_parameters())
    assert all(torch.equal(each, before[name]) for name, each in encoder.state_dict().items())
    for each in (encoder, found.encoder):
        assert not any(p.requires_grad or p.grad is not None for p in each.parameters())
        assert not each.training


def test_parts_of_a_batch_train_as_the_batch_does(encoder: CompactEncoder) -> None:
    """A machine without memory sends one window at a time."""
    data = windows(1.0, n=96)
    keys: dict[str, Any] = {"train": "whole", "epochs": 2, "batch": 24, "class_weights": (1.0, 4.0), "keep": "last"}
    plenty = fitted(encoder, data, compute=Compute(10**12), **keys)
    little = fitted(encoder, data, compute=Compute(1), **keys)
    np.testing.assert_allclose(plenty.history.loss, little.history.loss, rtol=1e-4)
    np.testing.assert_allclose(
        plenty.head.linear.weight.detach().numpy(), little.head.linear.weight.detach().numpy(), atol=1e-4
    )


def test_progress_is_told(encoder: CompactEncoder) -> None:
    told: list[tuple[str, int, int]] = []
    data = windows(1.0, n=96)
    fit_head(encoder, *data, 2, HeadSettings(epochs=2), seed=0, progress=lambda *words: told.append(words))
    assert told == [("features", 64, 96), ("features", 96, 96), ("task head", 1, 2), ("task head", 2, 2)]


def test_a_network_that_is_no_module_keeps_its_weights(encoder: CompactEncoder) -> None:
    other = Recorded(encoder)
    assert fitted(other, windows(1.0), epochs=1).encoder is other
    with pytest.raises(ConfigError, match="can't be trained as a whole"):
        fitted(other, windows(1.0), epochs=1, train="whole")


class WithoutGradients(CompactEncoder):
    def embed(self, x: torch.Tensor) -> torch.Tensor:
        return super().embed(x).detach()

    def run_block(self, i: int, native: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return super().run_block(i, native)


def test_a_network_without_gradients_is_refused(encoder: CompactEncoder) -> None:
    deaf = WithoutGradients(WINDOW, encoder.architecture, "d" * 64).eval().requires_grad_(False)
    with pytest.raises(ConfigError, match="can't be trained as a whole"):
        fitted(deaf, windows(1.0), epochs=1, train="whole")


def _one_patient(x: Any, y: Any, patients: Any) -> Windows:
    return x, y, np.full_like(patients, "p")


def _one_class(x: Any, y: Any, patients: Any) -> Windows:
    return x, np.zeros_like(y), patients


def _unlabelled(x: Any, y: Any, patients: Any) -> Windows:
    return x, np.where(y == 0, -1, y), patients


def _a_class_beyond(x: Any, y: Any, patients: Any) -> Windows:
    return x, y + 1, patients


def _nothing(x: Any, y: Any, patients: Any) -> Windows:
    return x[:0], y[:0], patients[:0]


def _nan(x: Any, y: Any, patients: Any) -> Windows:
    return np.where(np.arange(100) == 3, np.nan, x).astype(np.float32), y, patients


def _infinite(x: Any, y: Any, patients: Any) -> Windows:
    return np.where(np.arange(100) == 3, np.inf, x).astype(np.float32), y, patients


def _other_shape(x: Any, y: Any, patients: Any) -> Windows:
    return x[:, :, 1:], y, patients


def _fewer_labels(x: Any, y: Any, patients: Any) -> Windows:
    return x, y[1:], patients


@pytest.mark.parametrize("train", ["head", "whole"])
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_one_patient, SelectionError, "too few patients"),
        (_one_class, SelectionError, "the training patients lack a class"),
        (_unlabelled, SelectionError, "not those of the classes"),
        (_a_class_beyond, SelectionError, "not those of the classes"),
        (_nothing, SelectionError, "no labelled window"),
        (_nan, WindowError, "not finite"),
        (_infinite, WindowError, "not finite"),
        (_other_shape, WindowError, "do not fit the encoder"),
        (_fewer_labels, WindowError, "differ in number"),
    ],
)
def test_bad_windows_are_refused(
    encoder: CompactEncoder, change: Any, error: type[Exception], words: str, train: Any
) -> None:
    x, y, patients = change(*windows(1.0))
    with pytest.raises(error, match=words):
        fit_head(encoder, x, y, patients, 2, HeadSettings(epochs=1, train=train), seed=0)


@pytest.mark.parametrize("train", ["head", "whole"])
def test_a_training_that_leaves_all_bounds_is_an_error(encoder: CompactEncoder, train: str) -> None:
    x, y, patients = windows(1.0)
    with pytest.raises(SelectionError, match="left all bounds"):
        fitted(encoder, (x * np.float32(1e38), y, patients), train=train, epochs=1)


def test_bad_settings_are_refused(encoder: CompactEncoder) -> None:
    with pytest.raises(ConfigError, match="class_weights has 3 weights"):
        fitted(encoder, windows(1.0), class_weights=(1, 1, 1))


@pytest.mark.parametrize(
    "keys",
    [
        {"validation": 0.0},
        {"validation": 1.0},
        {"epochs": 0},
        {"batch": 0},
        {"learning_rate": 0},
        {"learning_rate": 1001},
        {"class_weights": (1.0, 0.0)},
        {"class_weights": "even"},
        {"keep": "first"},
        {"train": "encoder"},
        {"steps": 5},
    ],
)
def test_settings_out_of_bounds(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(keys))):
        HeadSettings(**keys)
