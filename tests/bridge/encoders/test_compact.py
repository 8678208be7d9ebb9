"""The compact family against its contract, and against a plain re-computation in numpy."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.contract import check_encoder
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.protocol import Encoder
from bridge.errors import PositionError, WeightsError, WindowError
from bridge.windows import Modality, Preprocessing, WindowSpec


def spec(modality: Modality = "ECG", channels: int = 1, rate: float = 125, samples: int = 1250) -> WindowSpec:
    return WindowSpec(
        modality=modality, channels=tuple(f"c{i}" for i in range(channels)), rate_hz=rate, samples=samples
    )


def saved(folder: Path, window: WindowSpec, architecture: CompactArchitecture | None = None) -> Encoder:
    torch.manual_seed(3)
    encoder = CompactEncoder(window, architecture or CompactArchitecture())
    save_encoder(folder, encoder.state_dict(), encoder.card(Preprocessing(), {"data": "none"}))
    return load_encoder(folder)


@pytest.mark.parametrize(
    ("window", "architecture"),
    [
        (spec(), {}),
        (spec("PPG", 1, 64, 333), {"tokens": 50}),  # no whole number of samples a token
        (spec("EEG", 19, 128, 512), {"width": 32, "blocks": 3, "tokens": 16, "heads": 2}),
        (spec("EMG", 4, 1000, 2000), {"tokens": 7, "blocks": 1}),
        (spec("PPG", 1, 25, 50), {"tokens": 50}),  # one sample a token
    ],
)
def test_any_modality_channels_and_rate_fulfil_the_contract(
    tmp_path: Path, window: WindowSpec, architecture: dict[str, int]
) -> None:
    wanted = CompactArchitecture.model_validate(architecture)
    encoder = saved(tmp_path, window, wanted)
    check_encoder(encoder)
    assert encoder.positions == wanted.blocks
    assert encoder.layout(wanted.blocks - 1, "out") == (wanted.tokens, wanted.width)


def test_default_size_is_within_the_family(tmp_path: Path) -> None:
    for window in (spec(), spec("EEG", 19, 250, 2500)):
        encoder = CompactEncoder(window, CompactArchitecture())
        assert 100_000 <= sum(p.numel() for p in encoder.parameters()) <= 500_000


def layer_norm(h: NDArray[np.float64], weight: NDArray[np.float64], bias: NDArray[np.float64]) -> NDArray[np.float64]:
    mean, variance = h.mean(-1, keepdims=True), h.var(-1, keepdims=True)
    return np.asarray((h - mean) / np.sqrt(variance + 1e-5) * weight + bias)


def gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2))))


def test_a_block_is_the_transformer_it_says_it_is(tmp_path: Path) -> None:
    architecture = CompactArchitecture(width=8, blocks=2, heads=2, tokens=5)
    encoder = saved(tmp_path, spec(samples=50, rate=10), architecture)
    assert isinstance(encoder, CompactEncoder)
    weights = {k: v.double().numpy() for k, v in encoder.state_dict().items()}
    h = np.random.default_rng(0).standard_normal((1, 5, 8))
    want = h[0]
    for i in range(2):
        w = {k.removeprefix(f"blocks.{i}."): v for k, v in weights.items() if k.startswith(f"blocks.{i}.")}
        normed = layer_norm(want, w["attention_norm.weight"], w["attention_norm.bias"])
        qkv = normed @ w["qkv.weight"].T + w["qkv.bias"]
        heads = []
        for head in range(2):
            q, k, v = (qkv[:, part * 8 + head * 4 : part * 8 + head * 4 + 4] for part in range(3))
            scores = np.exp(q @ k.T / 2.0)  # sqrt(4) = 2
            heads.append(scores / scores.sum(1, keepdims=True) @ v)
        want = want + np.concatenate(heads, 1) @ w["mix.weight"].T + w["mix.bias"]
        normed = layer_norm(want, w["mlp_norm.weight"], w["mlp_norm.bias"])
        want = want + gelu(normed @ w["up.weight"].T + w["up.bias"]) @ w["down.weight"].T + w["down.bias"]
    want = layer_norm(want, weights["blocks.1.closing_norm.weight"], weights["blocks.1.closing_norm.bias"])
    got = encoder.suffix(torch.from_numpy(h).float(), 0)[0].numpy()
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_tokens_follow_time(tmp_path: Path) -> None:
    """The stem's token t sees the samples round t * samples / tokens and no others."""
    encoder = saved(tmp_path, spec())
    assert isinstance(encoder, CompactEncoder)
    x = torch.zeros(1, 1, 1250)
    touched = x.clone()
    touched[0, 0, 500:525] = 1.0
    change = (encoder.stem(touched) - encoder.stem(x)).abs().sum(-1)[0]
    assert set(torch.nonzero(change > 1e-6).flatten().tolist()) <= set(range(18, 24))
    assert change[20] > 1e-3


def test_wrong_windows_and_positions_are_refused(tmp_path: Path) -> None:
    encoder = saved(tmp_path, spec())
    for shape in ((2, 2, 1250), (2, 1, 1249), (1, 1250)):
        with pytest.raises(WindowError, match="do not fit"):
            encoder.taps(torch.zeros(shape))
    for position in (-1, 5):
        with pytest.raises(PositionError, match="is not one of"):
            encoder.suffix(torch.zeros(1, 50, 64), position)


def test_architectures_that_can_not_be(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"heads \(3\) must divide width \(64\)"):
        CompactArchitecture(heads=3)
    with pytest.raises(WeightsError, match="50 tokens can't read windows of 40 samples"):
        CompactEncoder(spec(samples=40), CompactArchitecture())
