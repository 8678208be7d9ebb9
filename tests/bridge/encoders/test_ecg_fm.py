"""ECG-FM against the numbers of the original, and leads at their places."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridge.encoders.contract import check_encoder
from bridge.encoders.ecg_fm import EcgFmEncoder, published, unwrap
from bridge.encoders.leads import LEADS
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.speech import SpeechArchitecture
from bridge.encoders.split import SplitEncoder
from bridge.errors import ConfigError, WeightsError, WindowError
from bridge.windows import Preprocessing, WindowSpec
from tests.bridge.encoders.oracle import Case, assert_parity, converted, filled

TINY = SpeechArchitecture(
    width=16,
    layers=2,
    heads=2,
    feed_forward=24,
    filters=(8,) * 4,
    kernels=(2,) * 4,
    strides=(2,) * 4,
    place_kernel=6,
    place_groups=2,
)
FULL = SpeechArchitecture(
    width=768,
    layers=12,
    heads=12,
    feed_forward=3072,
    filters=(256,) * 4,
    kernels=(2,) * 4,
    strides=(2,) * 4,
    place_kernel=128,
    place_groups=16,
)


def window(*channels: str, samples: int = 200, rate: float = 500) -> WindowSpec:
    return WindowSpec(modality="ECG", channels=channels, rate_hz=rate, samples=samples)


def encoder_of(case: Case) -> tuple[SplitEncoder, Tensor]:
    x = case.signal()
    heads = case.facts["config"].get("encoder_attention_heads", 0)
    spec = window(*LEADS, samples=x.shape[-1])
    return converted("ecg-fm", {"model": case.checkpoint(), "cfg": None}, spec, heads=heads), x


@pytest.mark.parametrize("name", ["ecgfm_tiny", "ecgfm_tiny_eps"])
def test_tiny_parity(oracle: Path, name: str) -> None:
    case = Case(oracle, name)
    encoder, x = encoder_of(case)
    assert_parity(case, encoder, x)
    check_encoder(encoder)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ecgfm_5s", "ecgfm_isruc"])
def test_full_size_parity(oracle: Path, name: str) -> None:
    case = Case(oracle, name)
    encoder, x = encoder_of(case)
    assert_parity(case, encoder, x)
    assert encoder.architecture == FULL


@pytest.mark.parametrize(("samples", "tokens"), [(15_000, 937), (30_000, 1_875), (16, 1), (507, 31)])
def test_sizes_tokens_and_parameters(samples: int, tokens: int) -> None:
    encoder = EcgFmEncoder.skeleton(window("I", samples=samples), FULL)
    assert encoder.positions == 12
    assert {encoder.layout(i, side) for i in range(12) for side in ("in", "out")} == {(tokens, 768)}
    assert sum(p.numel() for p in encoder.parameters()) == 90_373_248


def test_it_fulfils_the_contract_and_comes_back_from_a_folder(tmp_path: Path) -> None:
    encoder = filled(EcgFmEncoder, window("V5"), TINY)
    check_encoder(encoder)
    save_encoder(tmp_path, encoder.state_dict(), encoder.card(Preprocessing(), {}))
    loaded = load_encoder(tmp_path)
    x = torch.randn(2, 1, 200)
    assert torch.equal(loaded.prefix(x, 1), encoder.prefix(x, 1))


def test_leads_are_placed_by_name_and_the_others_are_zeros() -> None:
    x = torch.randn(2, 12, 200)
    every = filled(EcgFmEncoder, window(*LEADS), TINY)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0)).tolist()
    mixed = filled(EcgFmEncoder, window(*(LEADS[i].lower() for i in order)), TINY)
    assert torch.equal(mixed(x[:, order]), every(x))
    for name, place in (("V6", 11), ("ECG", 0), ("I", 0)):
        only = torch.zeros(2, 12, 200)
        only[:, place] = x[:, 3]
        assert torch.equal(filled(EcgFmEncoder, window(name), TINY)(x[:, 3:4]), every(only))


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(WindowError, match="can't place the channels I, MLII"):
        EcgFmEncoder.skeleton(window("I", "MLII"), TINY)
    with pytest.raises(WindowError, match="at 100 Hz"):
        EcgFmEncoder.skeleton(window("I", rate=100), TINY)
    with pytest.raises(WindowError, match="windows of 15 samples"):
        EcgFmEncoder.skeleton(window("I", samples=15), TINY)


def test_older_files_and_the_configuration_beside_the_weights_are_read(oracle: Path) -> None:
    state = Case(oracle, "ecgfm_tiny").checkpoint()
    older = dict(state)
    older["conv_pos.pos_conv.0.weight_g"] = older.pop("conv_pos.pos_conv.0.parametrizations.weight.original0")
    older["conv_pos.pos_conv.0.weight_v"] = older.pop("conv_pos.pos_conv.0.parametrizations.weight.original1")
    new, old = (published(unwrap({"model": s, "cfg": object()}), window("I"), heads=4) for s in (state, older))
    assert new[1] == old[1]
    assert all(torch.equal(new[0][name], old[0][name]) for name in new[0])
    assert new[0].keys() == old[0].keys()


def test_differences_of_a_file_are_told_by_its_own_names(oracle: Path) -> None:
    state = Case(oracle, "ecgfm_tiny").checkpoint()
    with pytest.raises(ConfigError, match="width 32 is none that was published"):
        published(state, window("I"))
    for name in ("layer_norm.bias", "post_extract_proj.bias", "feature_extractor.conv_layers.0.2.weight"):
        del state[name]
    state["encoder.layers.2.fc2.weight"] = torch.zeros(3)
    state["encoder.layers.1.self_attn.q_proj.bias"] = torch.full((32,), torch.inf)
    state["encoder.layers.0.adapter.weight"] = torch.zeros(3)
    with pytest.raises(WeightsError) as caught:
        published(state, window("I"), heads=4)
    assert caught.value.why == (
        "missing: feature_extractor.conv_layers.0.2.weight, layer_norm.bias, post_extract_proj.bias; "
        "extra: encoder.layers.0.adapter.weight; "
        "of another shape: encoder.layers.2.fc2.weight (3,) instead of (32, 64); "
        "not finite: encoder.layers.1.self_attn.q_proj.bias"
    )
