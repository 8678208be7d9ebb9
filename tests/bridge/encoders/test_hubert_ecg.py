"""HuBERT-ECG against the numbers of the original, and how leads are laid end to end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridge.encoders.contract import check_encoder
from bridge.encoders.hubert_ecg import HubertEcgArchitecture, HubertEcgEncoder, published, unwrap
from bridge.encoders.leads import LEADS
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.split import SplitEncoder
from bridge.errors import ConfigError, WeightsError, WindowError
from bridge.windows import Preprocessing, WindowSpec
from tests.bridge.encoders.oracle import Case, assert_parity, converted, filled

TINY = HubertEcgArchitecture(
    width=16,
    layers=2,
    heads=2,
    feed_forward=24,
    filters=(8,) * 5,
    kernels=(10, 3, 3, 2, 2),
    strides=(4, 2, 2, 2, 2),
    place_kernel=6,
    place_groups=2,
)
SIZES = {
    "small": {"width": 512, "layers": 8, "heads": 8, "feed_forward": 2048},
    "base": {"width": 768, "layers": 12, "heads": 12, "feed_forward": 3072},
    "large": {"width": 960, "layers": 16, "heads": 12, "feed_forward": 3840},
}
PARAMETERS = {"small": 30_209_664, "base": 92_798_848, "large": 187_644_736}


def window(*channels: str, samples: int = 300, rate: float = 100) -> WindowSpec:
    return WindowSpec(modality="ECG", channels=channels, rate_hz=rate, samples=samples)


def encoder_of(case: Case) -> tuple[SplitEncoder, Tensor]:
    x = case.signal().unsqueeze(1)
    options = {"heads": case.facts["config"]["num_attention_heads"]} if case.facts["size"] == "tiny" else {}
    spec = window("ECG", samples=x.shape[-1])
    return converted("hubert-ecg", {"model_state_dict": case.checkpoint(), "model_config": None}, spec, **options), x


@pytest.mark.parametrize("name", ["hubertecg_tiny", "hubertecg_tiny_eps"])
def test_tiny_parity(oracle: Path, name: str) -> None:
    case = Case(oracle, name)
    encoder, x = encoder_of(case)
    assert_parity(case, encoder, x)
    check_encoder(encoder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["hubertecg_small_isruc", "hubertecg_small_wesad", "hubertecg_base_isruc", "hubertecg_large_isruc"]
)
def test_full_size_parity(oracle: Path, name: str) -> None:
    case = Case(oracle, name)
    encoder, x = encoder_of(case)
    assert_parity(case, encoder, x)
    size = case.facts["size"]
    assert sum(p.numel() for p in encoder.parameters()) == PARAMETERS[size]
    assert {name: getattr(encoder.architecture, name) for name in SIZES[size]} == SIZES[size]


@pytest.mark.parametrize("size", SIZES)
def test_sizes_tokens_and_parameters(size: str) -> None:
    full = {"filters": (512,) * 5, "place_kernel": 128, "place_groups": 16}
    architecture = HubertEcgArchitecture.model_validate({**TINY.model_dump(), **full, **SIZES[size]})
    for samples, tokens in ((82, 1), (3000, 46), (6000, 93)):
        encoder = HubertEcgEncoder.skeleton(window("II", samples=samples), architecture)
        assert encoder.layout(architecture.layers - 1, "out") == (tokens, architecture.width)
        assert architecture.tokens(samples) == tokens
    assert sum(p.numel() for p in encoder.parameters()) == PARAMETERS[size]


def test_it_fulfils_the_contract_and_comes_back_from_a_folder(tmp_path: Path) -> None:
    encoder = filled(HubertEcgEncoder, window("V5"), TINY)
    check_encoder(encoder)
    save_encoder(tmp_path, encoder.state_dict(), encoder.card(Preprocessing(), {}))
    loaded = load_encoder(tmp_path)
    x = torch.randn(2, 1, 300)
    assert torch.equal(loaded.prefix(x, 1), encoder.prefix(x, 1))


def test_the_network_is_built_without_any_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    assert filled(HubertEcgEncoder, window("I"), TINY).positions == 2


def with_leads(leads: str, *channels: str) -> SplitEncoder:
    return filled(HubertEcgEncoder, window(*channels), TINY.model_copy(update={"leads": leads}))


def one_long_lead(x: Tensor) -> Tensor:
    """What the network makes of `(batch, 12, samples)` laid end to end by hand."""
    laid = torch.cat([x[:, i] for i in range(x.shape[1])], dim=1).unsqueeze(1)
    return filled(HubertEcgEncoder, window("I", samples=laid.shape[-1]), TINY)(laid)


def test_leads_are_laid_end_to_end_in_the_standard_order() -> None:
    x = torch.randn(2, 3, 300)
    want = one_long_lead(x[:, [1, 2, 0]])
    assert torch.equal(with_leads("none", "V1", "ii", "aVR")(x), want)
    assert want.shape[1] == TINY.tokens(900)


def test_leads_that_are_missing_are_zeros_and_one_lead_is_repeated() -> None:
    x = torch.randn(2, 2, 300)
    padded = torch.zeros(2, 12, 300)
    padded[:, LEADS.index("V1")], padded[:, LEADS.index("II")] = x[:, 0], x[:, 1]
    assert torch.equal(with_leads("zero_pad", "V1", "II")(x), one_long_lead(padded))
    # A lead of no standard name comes first.
    first = torch.cat([x[:, :1], torch.zeros(2, 11, 300)], dim=1)
    assert torch.equal(with_leads("zero_pad", "X2")(x[:, :1]), one_long_lead(first))
    assert torch.equal(with_leads("repeat", "X2")(x[:, :1]), one_long_lead(x[:, :1].repeat(1, 12, 1)))
    assert with_leads("repeat", "X2").layout(0, "in") == (TINY.tokens(3600), 16)


def test_windows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(WindowError, match="can't repeat 2 leads"):
        with_leads("repeat", "I", "II")
    with pytest.raises(WindowError, match="can't place the channels I, X2") as caught:
        with_leads("none", "I", "X2")
    assert caught.value.why == "no standard leads: X2"
    assert "aVR, aVL, aVF" in caught.value.fix
    with pytest.raises(WindowError) as caught:
        with_leads("zero_pad", "V1", "v1")
    assert caught.value.why == "a lead comes twice"
    with pytest.raises(WindowError, match="at 500 Hz"):
        HubertEcgEncoder.skeleton(window("I", rate=500), TINY)
    with pytest.raises(WindowError, match="windows of 81 samples") as caught:
        HubertEcgEncoder.skeleton(window("I", samples=81), TINY)
    assert "at least 82" in caught.value.fix


def test_older_files_and_the_inert_entries_beside_the_weights_are_read(oracle: Path) -> None:
    state = Case(oracle, "hubertecg_tiny").checkpoint()
    place = "encoder.pos_conv_embed.conv."
    older = dict(state)
    older[place + "weight_g"] = older.pop(place + "parametrizations.weight.original0")
    older[place + "weight_v"] = older.pop(place + "parametrizations.weight.original1")
    older["label_embedding.0.weight"] = torch.zeros(77, 5)  # its size is not checked
    spec = window("I")
    new, old = (
        published(unwrap({"model_state_dict": s, "model_config": object()}), spec, heads=4) for s in (state, older)
    )
    assert new[1] == old[1]
    assert new[0].keys() == old[0].keys()
    assert all(torch.equal(new[0][name], old[0][name]) for name in new[0])


def test_a_width_that_was_not_published_needs_its_heads(oracle: Path) -> None:
    state = Case(oracle, "hubertecg_tiny").checkpoint()
    with pytest.raises(ConfigError, match="width 32 is none that was published"):
        published(state, window("I"))
    with pytest.raises(WeightsError, match="not those of HuBERT-ECG") as caught:
        published(state, window("I"), heads=5)
    assert "must divide width (32)" in caught.value.why


def test_differences_of_a_file_are_told_by_name(oracle: Path) -> None:
    state = Case(oracle, "hubertecg_tiny").checkpoint()
    state["encoder.layers.1.layer_norm.weight"] = torch.zeros(31)
    state["quantizer.vars"] = torch.zeros(1)
    del state["encoder.layers.2.attention.k_proj.bias"]
    with pytest.raises(WeightsError) as caught:
        published(state, window("I"), heads=4)
    assert caught.value.why == (
        "missing: encoder.layers.2.attention.k_proj.bias; extra: quantizer.vars; "
        "of another shape: encoder.layers.1.layer_norm.weight (31,) instead of (32,)"
    )
    del state["feature_projection.projection.weight"]
    with pytest.raises(WeightsError) as caught:
        published(state, window("I"), heads=4)
    assert "missing: feature_projection.projection.weight" in caught.value.why


def test_three_threads_may_build_the_first_networks_at_once() -> None:
    """In a process that has not imported transformers yet."""
    code = f"""
import sys, threading, torch
from bridge.encoders.hubert_ecg import HubertEcgArchitecture, HubertEcgEncoder
from bridge.windows import WindowSpec

sys.setswitchinterval(1e-6)
together, failed = threading.Barrier(3), []
window = WindowSpec(modality="ECG", channels=("II",), rate_hz=100, samples=600)

def build():
    together.wait()
    try:
        HubertEcgEncoder(window, HubertEcgArchitecture(**{TINY.model_dump()!r}))
    except Exception as error:
        failed.append(error)

threads = [threading.Thread(target=build) for _ in range(3)]
[each.start() for each in threads], [each.join() for each in threads]
raise SystemExit(str(failed) if failed else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
