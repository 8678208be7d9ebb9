"""NormWear against the numbers of the original; its scalogram and its fusion of channels by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import signal as sps
from torch import Tensor

from bridge.encoders import normwear
from bridge.encoders.contract import check_encoder
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.normwear import NormwearArchitecture, NormwearEncoder, published, unwrap
from bridge.encoders.published import published_model
from bridge.encoders.recipes import NORMWEAR
from bridge.encoders.scalogram import scalogram
from bridge.encoders.split import SplitEncoder
from bridge.errors import ConfigError, WeightsError, WindowError
from bridge.windows import WindowSpec
from tests.bridge.encoders.oracle import Case, assert_parity, converted, filled

TINY = NormwearArchitecture(width=8, blocks=3, heads=2, mlp_width=12, rows=4)


def window(channels: int = 3, samples: int = 390, rate: float = 130) -> WindowSpec:
    names = tuple(f"muscle {i}" for i in range(channels))
    return WindowSpec(modality="EMG", channels=names, rate_hz=rate, samples=samples)


def encoder_of(case: Case) -> SplitEncoder:
    recipe = case.facts["input"]
    spec = window(case.facts["nvar"], recipe["shape"][-1] + 2)
    return converted("normwear", {"model": case.checkpoint()}, spec, heads=case.facts["arch"]["num_heads"])


def parity(case: Case, monkeypatch: pytest.MonkeyPatch) -> SplitEncoder:
    """The fixtures begin at a scalogram (of noise), which stands in for that of the window."""
    recipe = case.facts["input"]
    pictures: Tensor = case.fill.make_signal(recipe["tag"], tuple(recipe["shape"]), recipe["amplitude"])
    assert case.fill.tensor_sha256(pictures) == recipe["sha256_before_swap"]
    encoder = encoder_of(case)
    batch, channels, samples = recipe["shape"][0], case.facts["nvar"], encoder.window.samples
    with monkeypatch.context() as patch:
        patch.setattr(normwear, "scalogram", lambda x: pictures.transpose(-1, -2).to(x.device))
        assert_parity(case, encoder, torch.zeros(batch, channels, samples))
    return encoder


@pytest.mark.parametrize("name", ["normwear_tiny", "normwear_tiny_387", "normwear_tiny_eps"])
def test_tiny_parity(oracle: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    check_encoder(parity(Case(oracle, name), monkeypatch))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["normwear_fog", "normwear_fog_b2"])
def test_full_size_parity(oracle: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    parity(Case(oracle, name), monkeypatch)


def test_tokens_and_parameters_of_the_published_size(oracle: Path) -> None:
    encoder = NormwearEncoder.skeleton(window(), NormwearArchitecture())
    assert encoder.positions == 12
    assert {encoder.layout(i, side) for i in range(12) for side in ("in", "out")} == {(3 * 560, 768)}
    closing_norm = 2 * 768
    kept = sum(p.numel() for p in encoder.parameters())
    assert kept + closing_norm == published_model("normwear").parameters["base"] == 128_118_528
    keys = json.loads((oracle / "keys" / "normwear.json").read_text())["keys"]
    state = {name: torch.zeros(()).expand(shape) for name, (shape, _) in keys.items()}
    tensors, architecture = published(state, window())
    assert sum(tensor.numel() for tensor in tensors.values()) == kept
    assert architecture == NormwearArchitecture()
    wide = NormwearEncoder.skeleton(window(1, 1300), NormwearArchitecture())
    assert wide.layout(0, "in") == (1 + 13 * 144, 768)


def by_definition(x: np.ndarray) -> np.ndarray:
    """`(3, n - 2, 65)` of one channel: direct convolutions in double precision."""
    x = x.astype(np.float64)
    found = []
    for series in (x[2:], np.diff(x)[1:], np.diff(np.diff(x))):
        columns = []
        for step in range(65):
            a = step + 0.1
            span = min(10 * a, len(series))
            v = np.arange(span) - (span - 1) / 2
            psi = 2 / (np.sqrt(3 * a) * np.pi**0.25) * (1 - v**2 / a**2) * np.exp(-(v**2) / (2 * a**2))
            columns.append(sps.convolve(series, psi[::-1], mode="same", method="direct"))
        found.append(np.stack(columns, axis=1))
    return np.stack(found)


def test_the_scalogram_is_the_originals(oracle: Path) -> None:
    recipe = json.loads((oracle / "preprocessing.json").read_text())["normwear_scalogram"]
    with np.load(oracle / "preprocessing.npz") as file:
        want = file["normwear_scalogram"]
    fill = Case(oracle, "normwear_tiny").fill
    x = fill.make_signal(recipe["input"]["tag"], tuple(recipe["input"]["shape"]), recipe["input"]["amplitude"])
    assert fill.tensor_sha256(x) == recipe["input"]["sha256"]
    found = scalogram(x[None])
    assert list(found.shape[1:]) == recipe["output_shape"]
    assert np.abs(found[0, 0].numpy() - want).max() <= 1e-5 * want.std()


@pytest.mark.parametrize("samples", [11, 47, 390, 643, 1500])
def test_the_scalogram_is_its_definition_at_any_length(samples: int) -> None:
    x = torch.from_numpy(np.random.default_rng(samples).normal(size=(2, 2, samples)).cumsum(-1)).float()
    found = scalogram(x).numpy()
    assert found.shape == (2, 2, 3, samples - 2, 65)
    for row in range(2):
        want = by_definition(x[row, 1].numpy())
        assert np.abs(found[row, 1] - want).max() <= 2e-5 * want.std()


def test_a_scalogram_does_not_depend_on_its_batch() -> None:
    x = torch.randn(9, 2, 130)
    together = scalogram(x)
    assert all(torch.equal(scalogram(x[i : i + 1])[0], together[i]) for i in range(9))
    assert torch.equal(scalogram(x[:, :1]), together[:, :1])


def test_channels_meet_in_the_class_tokens_of_even_blocks_alone() -> None:
    encoder = filled(NormwearEncoder, window(3, 47), TINY)
    tokens = 1 + 13 * 5
    h = torch.randn(1, 3 * tokens, 8)
    touched = h.clone()
    touched[0, 2 * tokens :] = torch.randn(tokens, 8)  # a plain shift would be lost in the norms
    for i in range(3):
        change = (encoder.run_block(i, touched) - encoder.run_block(i, h)).abs().amax(dim=2)[0].view(3, tokens)
        assert (change[2] > 0).all()
        assert bool((change[:2, 0] > 1e-4).all()) == (i % 2 == 0)
        assert float(change[:2, 1:].max()) < 1e-6


def test_one_channel_is_read_as_it_would_be_among_others_up_to_the_first_fusion() -> None:
    one, three = (filled(NormwearEncoder, window(n, 47), TINY) for n in (1, 3))
    x = torch.randn(2, 3, 47)
    alone = one.embed(x[:, 1:2])
    assert torch.allclose(three.embed(x).view(2, 3, 66, 8)[:, 1], alone, atol=1e-6)


def test_it_comes_back_from_a_folder_and_fulfils_the_contract(tmp_path: Path) -> None:
    encoder = filled(NormwearEncoder, window(2, 38), TINY)  # exactly the stored rows: nothing is interpolated
    save_encoder(tmp_path, encoder.state_dict(), encoder.card(NORMWEAR, {"source": "none"}))
    loaded = load_encoder(tmp_path)
    check_encoder(loaded)
    x = torch.randn(3, 2, 38)
    assert torch.equal(loaded.prefix(x, 2), encoder.prefix(x, 2))


def test_other_releases_keep_the_backbone_among_other_entries(oracle: Path) -> None:
    state = Case(oracle, "normwear_tiny").checkpoint()
    larger = {f"backbone.{name}": tensor for name, tensor in state.items()} | {"head.weight": torch.zeros(3)}
    one, other = (published(unwrap({"model": each}), window(), heads=4) for each in (state, larger))
    assert one[1] == other[1]
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(WindowError) as caught:
        NormwearEncoder.skeleton(window(rate=500), TINY)
    assert caught.value.why == "it reads EMG at 65 to 130 Hz"
    with pytest.raises(WindowError, match="windows of 10 samples"):
        NormwearEncoder.skeleton(window(samples=10), TINY)
    assert NormwearEncoder.skeleton(window(samples=11), TINY).layout(0, "in") == (3 * 14, 8)


def test_differences_of_a_file_are_told_by_name(oracle: Path) -> None:
    state = Case(oracle, "normwear_tiny").checkpoint()
    with pytest.raises(ConfigError, match="width 24 is none that was published"):
        published(state, window())
    with pytest.raises(WeightsError) as caught:
        published(state, window(), heads=5)
    assert "heads (5) must divide width (24)" in caught.value.why
    del state["encoder_blocks.2.cls_fusion.attn.qkv.bias"]
    state["encoder_blocks.1.cls_fusion.norm1.weight"] = torch.zeros(24)  # odd blocks have no fusion
    with pytest.raises(WeightsError) as caught:
        published(state, window(), heads=4)
    assert caught.value.why == (
        "missing: encoder_blocks.2.cls_fusion.attn.qkv.bias; extra: encoder_blocks.1.cls_fusion.norm1.weight"
    )
