"""Model folders: what is written comes back, and what was tampered with does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bridge.encoders.cards import CARD, WEIGHTS, EncoderCard, seal, write_card
from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.loading import load_encoder, read_encoder_card, save_encoder
from bridge.errors import WeightsError
from bridge.hashing import sha256_file
from bridge.windows import Preprocessing, WindowSpec

ARCHITECTURE = CompactArchitecture(width=16, blocks=2, heads=2, tokens=10)
WINDOW = WindowSpec(modality="PPG", channels=("PPG",), rate_hz=50, samples=200)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    encoder = CompactEncoder(WINDOW, ARCHITECTURE)
    card = encoder.card(Preprocessing(bandpass_hz=(0.5, 8)), {"data": "noise", "seed": 0})
    save_encoder(tmp_path / "model", encoder.state_dict(), card)
    return tmp_path / "model"


def reseal(folder: Path, **changes: object) -> None:
    card = EncoderCard.model_validate(json.loads((folder / CARD).read_text()))
    changes.setdefault("weights_sha256", sha256_file(folder / WEIGHTS))
    write_card(folder, seal(card.model_copy(update=changes)))


def test_saved_weights_come_back_frozen_and_compute_the_same(folder: Path) -> None:
    torch.manual_seed(0)
    made = CompactEncoder(WINDOW, ARCHITECTURE).eval()
    loaded = load_encoder(folder)
    assert isinstance(loaded, CompactEncoder)
    x = torch.randn(3, 1, 200)
    assert torch.equal(loaded.prefix(x, 1), made.prefix(x, 1))
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    card = read_encoder_card(folder)
    assert card.digest == loaded.digest
    assert len(card.digest) == 64
    assert card.parameters == sum(p.numel() for p in made.parameters())
    assert card.preprocessing.bandpass_hz == (0.5, 8)


def test_other_weights_or_another_card_give_another_digest(folder: Path, tmp_path: Path) -> None:
    digest = read_encoder_card(folder).digest
    torch.manual_seed(1)
    other = CompactEncoder(WINDOW, ARCHITECTURE)
    changed_weights = save_encoder(
        tmp_path / "b",
        other.state_dict(),
        other.card(Preprocessing(bandpass_hz=(0.5, 8)), {"data": "noise", "seed": 0}),
    )
    reseal(folder, preprocessing=Preprocessing(bandpass_hz=(0.5, 9)))
    assert len({digest, changed_weights.digest, read_encoder_card(folder).digest}) == 3


def test_one_changed_weight_is_noticed(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    tensors["stem.place"][0, 0] += 1e-6
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(WeightsError, match="not the weights that the card describes"):
        load_encoder(folder)


def test_a_card_changed_by_hand_is_noticed(folder: Path) -> None:
    text = (folder / CARD).read_text().replace('"PPG"', '"ECG"')
    (folder / CARD).write_text(text)
    with pytest.raises(WeightsError, match="changed after it was written"):
        load_encoder(folder)


def test_truncated_weights_are_refused_even_with_a_fitting_card(folder: Path) -> None:
    raw = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(raw[: len(raw) // 2])
    reseal(folder)
    with pytest.raises(WeightsError, match="no compact encoder can be built"):
        load_encoder(folder)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="no complete model folder"):
        load_encoder(tmp_path / "nothing")


def test_an_unknown_family_names_what_to_install(folder: Path) -> None:
    reseal(folder, family="unheard-of")
    with pytest.raises(WeightsError, match="encoder family 'unheard-of', which is not installed") as caught:
        load_encoder(folder)
    assert "compact" in caught.value.why


def test_a_card_with_untrue_layouts_is_refused(folder: Path) -> None:
    reseal(folder, layouts_in=((10, 16), (10, 17)))
    with pytest.raises(WeightsError, match="input layouts of the network that was built differ"):
        load_encoder(folder)


def test_a_card_with_another_architecture_is_refused(folder: Path) -> None:
    reseal(folder, architecture={**ARCHITECTURE.model_dump(), "width": 32})
    with pytest.raises(WeightsError, match="no compact encoder can be built"):
        load_encoder(folder)
