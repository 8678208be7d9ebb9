from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.encoders.loading import save_encoder
from bridge.head import TaskHead, save_head
from bridge.windows import Preprocessing, WindowSpec
from tests.server import wire


@dataclass(frozen=True)
class Models:
    """A models folder of small, untrained networks."""

    folder: Path
    digests: dict[str, str]

    def job(self, **changes: Any) -> str:
        return wire.job_text(self.digests, **changes)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    sizes = {
        "old_encoder": ("ECG", wire.WIDTH_OLD, wire.POSITIONS_OLD, wire.TOKENS_OLD),
        "new_encoder": ("PPG", wire.WIDTH_NEW, wire.POSITIONS_NEW, 5),
    }
    digests = {}
    for name, (modality, width, blocks, tokens) in sizes.items():
        window = WindowSpec(modality=modality, channels=("x",), rate_hz=20.0, samples=60)
        encoder = CompactEncoder(window, CompactArchitecture(width=width, blocks=blocks, heads=2, tokens=tokens))
        card = save_encoder(folder / name, encoder.state_dict(), encoder.card(Preprocessing(), {}))
        digests[name] = card.digest
    head = save_head(
        folder / "task_head",
        TaskHead(wire.WIDTH_OLD, wire.CLASSES),
        classes=("low", "middle", "high"),
        old_encoder=digests["old_encoder"],
        training={},
    )
    generator = np.random.default_rng(1)
    vectors = {f"in.{i}": generator.normal(size=(40, wire.WIDTH_OLD)) for i in range(wire.POSITIONS_OLD)}
    for i in range(wire.POSITIONS_OLD):
        vectors[f"tokens.{i}"] = generator.normal(size=(12, wire.TOKENS_OLD, wire.WIDTH_OLD)) * 3 + 1
    for i in range(wire.POSITIONS_NEW):
        mixed = generator.normal(size=(wire.WIDTH_NEW, wire.WIDTH_NEW))
        vectors |= {f"mean.{i}": generator.normal(size=wire.WIDTH_NEW), f"covariance.{i}": mixed @ mixed.T}
    save_file({k: v.astype(np.float32) for k, v in vectors.items()}, folder / "public_vectors.safetensors")
    return Models(folder, digests | {"task_head": head.digest})
