"""The task head's folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bridge.encoders.cards import WEIGHTS
from bridge.errors import WeightsError
from bridge.head import TaskHead, load_head, read_head_card, save_head


def make(folder: Path) -> TaskHead:
    torch.manual_seed(0)
    head = TaskHead(6, 3)
    save_head(folder, head, classes=("a", "b", "c"), old_encoder="f" * 64, training={"seed": 0})
    return head


def test_logits_are_one_linear_layer_and_survive_the_folder(tmp_path: Path) -> None:
    made = make(tmp_path)
    loaded = load_head(tmp_path)
    pooled = np.random.default_rng(1).standard_normal((4, 6)).astype(np.float32)
    weight, bias = (p.detach().numpy() for p in made.parameters())
    np.testing.assert_allclose(loaded(torch.from_numpy(pooled)).numpy(), pooled @ weight.T + bias, atol=1e-6)
    card = read_head_card(tmp_path)
    assert (card.classes, card.width, card.old_encoder) == (("a", "b", "c"), 6, "f" * 64)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_changed_weights_are_refused(tmp_path: Path) -> None:
    make(tmp_path)
    save_file({"linear.weight": torch.zeros(3, 6), "linear.bias": torch.zeros(3)}, tmp_path / WEIGHTS)
    with pytest.raises(WeightsError, match="not the weights that the card describes"):
        load_head(tmp_path)


def test_another_head_in_the_same_card_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    torch.manual_seed(0)
    save_head(tmp_path / "b", TaskHead(6, 2), classes=("a", "b", "c"), old_encoder="f" * 64, training={})
    with pytest.raises(WeightsError, match="not those of a task head of width 6 and 3 classes"):
        load_head(tmp_path / "b")
