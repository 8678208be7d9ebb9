from __future__ import annotations

import pytest
import torch

from bridge.encoders.compact import CompactArchitecture, CompactEncoder
from bridge.windows import WindowSpec


@pytest.fixture(scope="session")
def encoder() -> CompactEncoder:
    """A small frozen old encoder of 3 positions, 10 tokens and width 16, with random weights."""
    torch.manual_seed(0)
    window = WindowSpec(modality="ECG", channels=("II",), rate_hz=50, samples=100)
    small = CompactEncoder(window, CompactArchitecture(width=16, blocks=3, heads=2, tokens=10), digest="d")
    return small.eval().requires_grad_(False)
