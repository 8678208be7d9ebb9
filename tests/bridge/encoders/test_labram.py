"""LaBraM against the numbers of the original, and what binds it to electrodes and seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bridge.encoders.contract import check_encoder
from bridge.encoders.labram import ELECTRODES, LabramArchitecture, LabramEncoder, published, unwrap
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.split import SplitEncoder
from bridge.errors import WeightsError, WindowError
from bridge.windows import Preprocessing, WindowSpec
from tests.bridge.encoders.oracle import Case, assert_parity, converted, filled

TINY = LabramArchitecture(blocks=2, feed_forward=64)
CASES = ("labram_tiny", "labram_tiny_eps", "labram_tiny_nopos")
FULL = ("labram_posembed", "labram_fog_paper", "labram_isruc_paper")


def window(*channels: str, seconds: int = 2, rate: float = 200) -> WindowSpec:
    return WindowSpec(modality="EEG", channels=channels, rate_hz=rate, samples=200 * seconds)


def encoder_of(case: Case) -> tuple[SplitEncoder, Tensor]:
    facts = case.facts
    state = case.checkpoint()
    rows = facts["time_embed_length"]
    if rows != 16:
        name = "student.time_embed"
        state[name] = case.fill.fill_tensor(name, (1, rows, 200), torch.float32, facts["seed"], facts["profile"])
    x = case.signal() / 100
    spec = window(*facts["channels"], seconds=x.shape[-1] // 200)
    embedding = "on" if facts["use_abs_pos_emb"] else "off"
    return converted("labram", {"model": state}, spec, electrode_embedding=embedding), x


@pytest.mark.parametrize("name", CASES)
def test_tiny_parity(oracle: Path, name: str) -> None:
    case = Case(oracle, name)
    encoder, x = encoder_of(case)
    assert_parity(case, encoder, x)
    check_encoder(encoder)


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_full_size_parity(oracle: Path, name: str) -> None:
    case = Case(oracle, name)
    encoder, x = encoder_of(case)
    assert_parity(case, encoder, x)
    assert encoder.positions == 12
    # 14 more rows of 200 where the time embedding has 30.
    extra = 14 * 200 if name == "labram_isruc_paper" else 0
    assert sum(p.numel() for p in encoder.parameters()) == 5_819_536 + extra


def test_the_network_has_the_published_number_of_parameters() -> None:
    encoder = LabramEncoder.skeleton(window("C3"), LabramArchitecture())
    assert sum(p.numel() for p in encoder.parameters()) == 5_819_536


@pytest.mark.parametrize(("channels", "seconds", "tokens"), [(6, 30, 181), (6, 3, 19), (1, 16, 17)])
def test_tokens_are_one_and_one_a_channel_and_second(channels: int, seconds: int, tokens: int) -> None:
    spec = window(*ELECTRODES[:channels], seconds=seconds)
    encoder = LabramEncoder.skeleton(spec, LabramArchitecture(seconds=30))
    assert {encoder.layout(i, side) for i in range(12) for side in ("in", "out")} == {(tokens, 200)}


def test_the_electrodes_are_the_models_own(oracle: Path) -> None:
    names = json.loads((oracle / "labram_electrodes.json").read_text())["names"]
    assert list(ELECTRODES) == names[:128]


def test_it_fulfils_the_contract_with_and_without_electrodes() -> None:
    for embedding in ("on", "off"):
        architecture = TINY.model_copy(update={"electrode_embedding": embedding})
        check_encoder(filled(LabramEncoder, window("CZ", "fp1"), architecture))


def test_a_model_folder_comes_back(tmp_path: Path) -> None:
    encoder = filled(LabramEncoder, window("CZ", "FP1"), TINY)
    save_encoder(tmp_path, encoder.state_dict(), encoder.card(Preprocessing(scale=0.01, normalise="none"), {}))
    loaded = load_encoder(tmp_path)
    x = torch.randn(2, 2, 400)
    assert torch.equal(loaded.prefix(x, 1), encoder.prefix(x, 1))


def test_electrodes_go_by_name_and_not_by_place() -> None:
    a = filled(LabramEncoder, window("C3", "O2", seconds=1), TINY)
    b = filled(LabramEncoder, window("o2", "c3", seconds=1), TINY)
    x = torch.randn(3, 2, 200)
    # The same channels in another order are the same tokens in another order.
    torch.testing.assert_close(a(x)[:, [0, 2, 1]], b(x[:, [1, 0]]), rtol=0, atol=2e-5)
    other = filled(LabramEncoder, window("C4", "O2", seconds=1), TINY)
    assert not torch.allclose(a(x), other(x), atol=1e-2)


def test_without_the_embedding_any_names_will_do() -> None:
    off = TINY.model_copy(update={"electrode_embedding": "off"})
    a, b = (filled(LabramEncoder, window(*names), off) for names in (("C3", "O2"), ("x", "y")))
    x = torch.randn(1, 2, 400)
    assert torch.equal(a(x), b(x))


def test_unknown_electrodes_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(WindowError, match="does not know the electrodes F3_A2, EMG1") as caught:
        LabramEncoder.skeleton(window("C3", "F3_A2", "EMG1"), TINY)
    assert "FP1, FPZ, FP2" in caught.value.why
    with pytest.raises(WindowError, match="an electrode twice"):
        LabramEncoder.skeleton(window("C3", "c3"), TINY)


def test_windows_that_do_not_fit_are_refused() -> None:
    odd = WindowSpec(modality="EEG", channels=("C3",), rate_hz=200, samples=250)
    with pytest.raises(WindowError, match="windows of 250 samples"):
        LabramEncoder.skeleton(odd, TINY)
    with pytest.raises(WindowError, match="at 250 Hz"):
        LabramEncoder.skeleton(window("C3", rate=250), TINY)
    with pytest.raises(WindowError, match="can't read ECG windows"):
        LabramEncoder.skeleton(window("C3").model_copy(update={"modality": "ECG"}), TINY)
    with pytest.raises(WindowError, match="windows of 17 s"):
        LabramEncoder.skeleton(window("C3", seconds=17), TINY)


def test_beyond_the_published_seconds_rows_are_stretched_or_drawn(oracle: Path) -> None:
    state = dict(unwrap({"model": Case(oracle, "labram_tiny").checkpoint()}))
    ramp = torch.arange(16.0).view(1, 16, 1)
    state["time_embed"] = ramp.expand(1, 16, 200)
    long = window("C3", seconds=30)
    tensors, architecture = published(state, long)
    assert (architecture.seconds, architecture.time_embedding) == (30, "interpolated")
    wanted = torch.tensor([15 * k / 29 for k in range(30)])
    torch.testing.assert_close(tensors["time_embed"][0, :, 7], wanted)

    tensors, architecture = published(state, long, time_embedding="random", seed=1)
    assert architecture.time_embedding == "random"
    drawn = tensors["time_embed"]
    assert drawn.shape == (1, 30, 200)
    assert abs(float(drawn.std()) - 0.02) < 0.001
    assert torch.equal(published(state, long, time_embedding="random", seed=1)[0]["time_embed"], drawn)
    assert not torch.equal(published(state, long, time_embedding="random", seed=2)[0]["time_embed"], drawn)

    tensors, architecture = published(state, window("C3", seconds=16), time_embedding="random")
    assert (architecture.seconds, architecture.time_embedding) == (16, "published")
    assert torch.equal(tensors["time_embed"], state["time_embed"])


def test_differences_of_a_file_are_told_by_name(oracle: Path) -> None:
    state = Case(oracle, "labram_tiny").checkpoint()
    del state["student.blocks.1.attn.proj.bias"]
    state["student.cls_token"] = torch.zeros(1, 1, 100)
    state["student.rel_pos_bias"] = torch.zeros(3)
    with pytest.raises(WeightsError, match="not those of LaBraM-base") as caught:
        published(unwrap({"model": state}), window("C3"))
    assert "missing: blocks.1.attn.proj.bias" in caught.value.why
    assert "extra: rel_pos_bias" in caught.value.why
    assert "cls_token (1, 1, 100) instead of (1, 1, 200)" in caught.value.why
    with pytest.raises(WeightsError, match="not those of LaBraM-base"):
        published({"pos_embed": torch.zeros(3)}, window("C3"))


def test_a_file_without_the_students_prefix_is_read(oracle: Path) -> None:
    loaded = {"model": Case(oracle, "labram_tiny").checkpoint()}
    bare = unwrap(loaded)
    assert unwrap(bare) == bare
    assert published(bare, window("C3"))[1] == LabramArchitecture(blocks=3)
