"""What a fit writes: every family read back as it was trained, cards that carry licences on, all or none."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from bridge.encoders.cards import WEIGHTS, EncoderCard, HeadCard, read_card
from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.ecg_fm import EcgFmEncoder
from bridge.encoders.hubert_ecg import HubertEcgEncoder
from bridge.encoders.labram import LabramArchitecture, LabramEncoder
from bridge.encoders.loading import load_encoder, save_encoder
from bridge.encoders.normwear import NormwearArchitecture, NormwearEncoder
from bridge.encoders.papagei import PapageiArchitecture, PapageiEncoder
from bridge.encoders.protocol import Encoder
from bridge.encoders.split import SplitEncoder
from bridge.errors import ConfigError, WeightsError, WeightsStorageError
from bridge.head import load_head, read_head_card
from bridge.head_files import save_fitted
from bridge.head_fit import FittedHead, HeadSettings, fit_head
from bridge.windows import Preprocessing, WindowSpec
from tests.bridge.encoders import test_ecg_fm, test_hubert_ecg
from tests.bridge.encoders.oracle import filled
from tests.client.disk import read_only
from tests.conftest import ROOT

CLASSES = ("low", "high")
ORIGIN = {
    "data": "as its authors trained it",
    "model": "Some Model",
    "official_file": "some.pth",
    "source_sha256": "f" * 64,
    "licence_code": "MIT",
    "licence_weights": "CC BY-NC 4.0",
    "commercial_use": "forbidden",
    "options": "none",
}
PUBLIC = {"data": "public recordings", "public": True, "public_patients": 6, "seed": 4}
PRIVATE = {"data": "pair patients of north", "public": False, "private_patients": 6, "fitted_on": "patients of north"}
PREPROCESSING = Preprocessing(bandpass_hz=(0.5, 8.0))


def compact() -> CompactEncoder:
    window = WindowSpec(modality="ECG", channels=("I",), rate_hz=25, samples=100)
    return CompactEncoder(window, CompactArchitecture(width=8, blocks=2, heads=2, tokens=10))


def labram() -> SplitEncoder:
    window = WindowSpec(modality="EEG", channels=("C3", "O2"), rate_hz=200, samples=400)
    return filled(LabramEncoder, window, LabramArchitecture(blocks=2, feed_forward=64))


def hubert() -> SplitEncoder:
    return filled(HubertEcgEncoder, test_hubert_ecg.window("I"), test_hubert_ecg.TINY)


def ecg_fm() -> SplitEncoder:
    return filled(EcgFmEncoder, test_ecg_fm.window("I", "II"), test_ecg_fm.TINY)


def papagei() -> SplitEncoder:
    window = WindowSpec(modality="PPG", channels=("PLETH",), rate_hz=125, samples=101)
    encoder = filled(PapageiEncoder, window, PapageiArchitecture(width=4, blocks=6))
    state = {
        name: tensor.abs() + 0.5 if name.endswith("running_var") else tensor
        for name, tensor in encoder.state_dict().items()
    }
    return PapageiEncoder.build(window, encoder.architecture, state)


def normwear() -> SplitEncoder:
    window = WindowSpec(modality="EMG", channels=("a", "b", "c"), rate_hz=130, samples=47)
    return filled(NormwearEncoder, window, NormwearArchitecture(width=8, blocks=3, heads=2, mlp_width=12, rows=4))


FAMILIES = {
    "compact": compact,
    "labram": labram,
    "hubert-ecg": hubert,
    "ecg-fm": ecg_fm,
    "papagei": papagei,
    "normwear": normwear,
}


def stored(folder: Path, name: str = "compact", training: dict[str, Any] | None = None) -> tuple[Encoder, EncoderCard]:
    """An encoder of that family as it comes from its folder, and its card."""
    made = FAMILIES[name]()
    card = save_encoder(folder, made.state_dict(), made.card(PREPROCESSING, ORIGIN if training is None else training))
    return load_encoder(folder), card


def fitted(encoder: Encoder, train: Literal["head", "whole"], **keys: Any) -> tuple[FittedHead, torch.Tensor]:
    """A fit of one epoch on noise, and its windows."""
    x = np.random.default_rng(1).standard_normal((12, len(encoder.window.channels), encoder.window.samples))
    patients, labels = np.array([f"p{i // 2}" for i in range(12)]), np.array([0, 1] * 6)
    windows = x.astype(np.float32)
    settings = HeadSettings(train=train, epochs=1, **keys)
    return fit_head(encoder, windows, labels, patients, 2, settings, seed=0), torch.from_numpy(windows)


def logits(encoder: Encoder, head: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = head(encoder.taps(x).outputs[-1])
    return found


@pytest.mark.parametrize("train", ["head", "whole"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_read_back_as_it_was_trained(
    name: str, train: Literal["head", "whole"], tmp_path: Path
) -> None:
    encoder, card = stored(tmp_path / "given", name)
    found, x = fitted(encoder, train, learning_rate=1e-2)
    encoder_card, head_card = save_fitted(found, card, tmp_path / "out", classes=CLASSES, training=PUBLIC)
    place = tmp_path / "out" / "old_encoder" if train == "whole" else tmp_path / "given"
    again, head = load_encoder(place), load_head(tmp_path / "out" / "task_head")
    assert read_card(place, EncoderCard) == encoder_card
    assert read_head_card(tmp_path / "out" / "task_head") == head_card
    assert head_card.old_encoder == again.digest == encoder_card.digest
    assert torch.equal(logits(again, head, x), logits(found.encoder, found.head, x))
    different = not torch.equal(logits(encoder, head, x), logits(again, head, x))
    assert different == (encoder_card.digest != card.digest) == (train == "whole")
    assert {each.name for each in (tmp_path / "out").iterdir()} == {"task_head"} | ({place.name} - {"given"})


def test_the_cards_carry_on_what_is_known_of_the_original(tmp_path: Path) -> None:
    encoder, card = stored(tmp_path / "given")
    found, _ = fitted(encoder, "whole")
    trained, head = save_fitted(found, card, tmp_path / "out", classes=CLASSES, training=PUBLIC)
    for key in ("family", "window", "preprocessing", "layouts_in", "layouts_out", "parameters", "architecture"):
        assert getattr(trained, key) == getattr(card, key)
    assert {key: trained.training[key] for key in ORIGIN if key != "data"} == {
        key: value for key, value in ORIGIN.items() if key != "data"
    }
    assert trained.training["trained_from"] == card.digest
    assert trained.training["data"] == "as its authors trained it; then public recordings"
    licence = ("model", "licence_code", "licence_weights", "commercial_use")
    assert {key: head.training[key] for key in licence} == {key: ORIGIN[key] for key in licence}
    for each in (trained, head):
        assert each.training["settings"] == found.settings.model_dump(mode="json")
        assert each.training["sentence"] == found.sentence()
        assert each.training["windows_by_class"] == [6, 6]
        assert (each.training["patients"], each.training["held_back_patients"]) == (6, 2)
    assert (head.training["public"], head.training["public_patients"]) == (True, 6)
    assert head.classes == CLASSES


@pytest.mark.parametrize(
    ("before", "now", "public"),
    [
        ({"public_patients": 9}, PUBLIC, True),
        ({}, PUBLIC, None),
        ({"public": False, "private_patients": 9, "fitted_on": "patients of south"}, PUBLIC, False),
        ({"public_patients": 9}, PRIVATE, False),
        ({}, PRIVATE, False),
    ],
)
def test_a_trained_encoder_is_public_only_where_all_its_data_were(
    before: dict[str, Any], now: dict[str, Any], public: bool | None, tmp_path: Path
) -> None:
    encoder, card = stored(tmp_path / "given", training=before)
    found, _ = fitted(encoder, "whole")
    training = save_fitted(found, card, tmp_path / "out", classes=CLASSES, training=now)[0].training
    assert training.get("public") is public
    assert ("public_patients" in training) == (public is True)
    assert ("private_patients" in training) == (public is False)
    assert training.get("fitted_on") == (now.get("fitted_on") or before.get("fitted_on"))


def test_what_shall_not_be_told_is_in_no_card(tmp_path: Path) -> None:
    encoder, card = stored(tmp_path / "given")
    found, _ = fitted(encoder, "whole")
    cards = save_fitted(
        found, card, tmp_path / "out", classes=CLASSES, training=PUBLIC, left_out=("sentence", "windows_by_class")
    )
    for each in cards:
        assert not {"sentence", "windows_by_class"} & set(each.training)
        assert "balanced accuracy" not in each.model_dump_json()


@pytest.mark.parametrize("name", ["task_head", "old_encoder"])
def test_nothing_is_overwritten(name: str, tmp_path: Path) -> None:
    encoder, card = stored(tmp_path / "given")
    found, _ = fitted(encoder, "whole")
    (tmp_path / "out" / name).mkdir(parents=True)
    with pytest.raises(ConfigError, match=f"{name} exists already"):
        save_fitted(found, card, tmp_path / "out", classes=CLASSES, training=PUBLIC)
    assert [each.name for each in (tmp_path / "out").iterdir()] == [name]


def test_a_fit_joins_what_is_in_the_folder(tmp_path: Path) -> None:
    """As a simulation puts the encoder there first."""
    encoder, card = stored(tmp_path / "old_encoder")
    save_fitted(fitted(encoder, "head")[0], card, tmp_path, classes=CLASSES, training=PUBLIC)
    assert {each.name for each in tmp_path.iterdir()} == {"old_encoder", "task_head"}
    assert (tmp_path / "task_head").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "task_head" / WEIGHTS).stat().st_mode & 0o777 == 0o644


def test_a_folder_that_can_not_be_written_is_left_as_it_was(tmp_path: Path) -> None:
    encoder, card = stored(tmp_path / "given")
    found, _ = fitted(encoder, "whole")
    shut = tmp_path / "shut"
    shut.mkdir()
    with read_only(shut), pytest.raises(WeightsStorageError, match="can't be written"):
        save_fitted(found, card, shut / "out", classes=CLASSES, training=PUBLIC)
    assert list(shut.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsStorageError, match="can't be written"):
        save_fitted(found, card, tmp_path / "file", classes=CLASSES, training=PUBLIC)


OWN = """

class Renaming(TwoBlocks):
    @classmethod
    def load(cls, folder, card):
        encoder = super().load(folder, card)
        encoder.embed.weight.data += 1
        return encoder
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The encoder of docs/own-encoder.md in a package of its own, which this process sees installed; and one of whose
    weights its load() makes others."""
    page = (ROOT / "docs" / "own-encoder.md").read_text(encoding="utf-8")
    place = tmp_path / "installed"
    (place / "own-1.dist-info").mkdir(parents=True)
    (place / "own_blocks.py").write_text(re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0] + OWN)
    (place / "own-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1\n")
    (place / "own-1.dist-info" / "entry_points.txt").write_text(
        "[fedbridge.encoders]\ntwo-blocks = own_blocks:TwoBlocks\nrenaming = own_blocks:Renaming\n"
    )
    monkeypatch.syspath_prepend(place)
    yield place
    sys.modules.pop("own_blocks", None)


def own_encoder(folder: Path, family: str) -> tuple[Encoder, EncoderCard]:
    window = WindowSpec(modality="PPG", channels=("PLETH",), rate_hz=125, samples=1250)
    network = import_module("own_blocks").TwoBlocks(window)
    layouts = tuple(network.layout(i, "in") for i in range(network.positions))
    card = EncoderCard(
        family=family,
        window=window,
        preprocessing=PREPROCESSING,
        layouts_in=layouts,
        layouts_out=layouts,
        parameters=sum(p.numel() for p in network.parameters()),
        weights_sha256="",
    )
    sealed = save_encoder(folder, network.state_dict(), card)
    return load_encoder(folder), sealed


def test_an_own_encoder_is_trained_like_any_other(own: Path, tmp_path: Path) -> None:
    encoder, card = own_encoder(tmp_path / "given", "two-blocks")
    found, x = fitted(encoder, "whole", learning_rate=1e-2)
    trained, _ = save_fitted(found, card, tmp_path / "out", classes=CLASSES, training=PUBLIC)
    again = load_encoder(tmp_path / "out" / "old_encoder")
    assert again.digest == trained.digest != card.digest
    assert torch.equal(
        logits(again, load_head(tmp_path / "out" / "task_head"), x), logits(found.encoder, found.head, x)
    )


def test_a_family_that_reads_back_another_network_is_refused(own: Path, tmp_path: Path) -> None:
    encoder, card = own_encoder(tmp_path / "given", "renaming")
    save_fitted(fitted(encoder, "head")[0], card, tmp_path / "head", classes=CLASSES, training=PUBLIC)
    with pytest.raises(WeightsError, match="'renaming' can't be trained as a whole"):
        save_fitted(fitted(encoder, "whole")[0], card, tmp_path / "out", classes=CLASSES, training=PUBLIC)
    assert not (tmp_path / "out").exists()
    assert read_card(tmp_path / "head" / "task_head", HeadCard).old_encoder == card.digest
