"""The task head: one linear layer on the old encoder's pooled final tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from bridge.encoders.cards import WEIGHTS, HeadCard, read_card, seal, write_card
from bridge.encoders.loading import save_tensors
from bridge.errors import WeightsError


class TaskHead(nn.Module):
    """Logits `(batch, classes)` from pooled final tokens `(batch, width)`."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, classes)

    def forward(self, pooled: Tensor) -> Tensor:
        """Logits `(..., classes)` from pooled tokens `(..., width)`."""
        logits: Tensor = self.linear(pooled)
        return logits


def save_head(
    folder: Path, head: TaskHead, *, classes: tuple[str, ...], old_encoder: str, training: Mapping[str, Any]
) -> HeadCard:
    """Write a head's weights and sealed card; `old_encoder` is the digest of the encoder that it was fitted on."""
    card = HeadCard(
        classes=classes,
        width=head.linear.in_features,
        old_encoder=old_encoder,
        training=dict(training),
        weights_sha256=save_tensors(folder, head.state_dict()),
    )
    sealed = seal(card)
    write_card(folder, sealed)
    return sealed


def read_head_card(folder: Path) -> HeadCard:
    """The head's card, checked against its hashes. Raises `WeightsError`."""
    return read_card(folder, HeadCard)


def load_head(folder: Path) -> TaskHead:
    """The frozen head of a model folder. Raises `WeightsError` where it is damaged."""
    card = read_head_card(folder)
    head = TaskHead(card.width, len(card.classes))
    try:
        head.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        raise WeightsError(
            f"{folder}: the tensors are not those of a task head of width {card.width} and {len(card.classes)} classes",
            why=str(error).splitlines()[0],
            fix="copy the whole folder again from its source",
        ) from error
    head.eval().requires_grad_(False)
    return head
