"""The compact encoder family: a convolutional stem and transformer blocks, for any modality, channels and rate.

Small enough (0.1 to 0.5 million parameters) to be trained on a CPU in minutes from public recordings, so that the
product has models without any download. The stem turns `(batch, channels, samples)` into `tokens` vectors; position `i`
is transformer block `i`; the last block ends with the closing layer norm, so its output is the encoder's final tokens.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bridge.config import Settings
from bridge.encoders.split import SplitEncoder
from bridge.errors import WeightsError
from bridge.windows import WindowSpec

FAMILY = "compact"


class CompactArchitecture(Settings):
    """Sizes of a compact encoder. The defaults give about 0.2 million parameters."""

    width: int = Field(default=64, ge=8, le=512)
    """Numbers in a token."""
    blocks: int = Field(default=5, ge=1, le=24)
    """Transformer blocks, which are the positions of a bridge."""
    heads: int = Field(default=4, ge=1)
    """Attention heads; divides the width."""
    tokens: int = Field(default=50, ge=2, le=1024)
    """Tokens in a window: each stands for window seconds / tokens."""
    mlp_ratio: int = Field(default=2, ge=1, le=8)
    """Hidden width of a block's feed-forward part, in widths."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> CompactArchitecture:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class _Stem(nn.Module):
    """Two strided convolutions from samples to tokens, plus a learned vector for each place in time."""

    def __init__(self, channels: int, samples: int, architecture: CompactArchitecture) -> None:
        super().__init__()
        width, self.tokens = architecture.width, architecture.tokens
        stride = max(1, samples // self.tokens)
        first = math.isqrt(stride)
        second = stride // first
        self.first = nn.Conv1d(channels, width // 2, 3 * first, stride=first, padding=first)
        self.second = nn.Conv1d(width // 2, width, 2 * second + 1, stride=second, padding=second)
        self.place = nn.Parameter(0.02 * torch.randn(self.tokens, width))

    def embed(self, x: Tensor) -> Tensor:
        """Tokens `(batch, tokens, width)` before their place is added."""
        h: Tensor = self.second(F.gelu(self.first(x)))
        if h.shape[-1] != self.tokens:
            h = F.adaptive_avg_pool1d(h, self.tokens)
        return h.transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.embed(x) + self.place
        return h


class _Block(nn.Module):
    """A pre-norm transformer block; `closing` adds the layer norm that ends the network."""

    def __init__(self, architecture: CompactArchitecture, *, closing: bool) -> None:
        super().__init__()
        width = architecture.width
        self.heads = architecture.heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, architecture.mlp_ratio * width)
        self.down = nn.Linear(architecture.mlp_ratio * width, width)
        self.closing_norm = nn.LayerNorm(width) if closing else None

    def forward(self, h: Tensor) -> Tensor:
        batch, tokens, width = h.shape
        qkv = self.qkv(self.attention_norm(h)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        h = h + self.mix(attended.transpose(1, 2).reshape(batch, tokens, width))
        h = h + self.down(F.gelu(self.up(self.mlp_norm(h))))
        return h if self.closing_norm is None else self.closing_norm(h)


class CompactEncoder(SplitEncoder):
    """A compact encoder; position `i` is transformer block `i`.

    Made fresh it has random weights (from torch's global generator) and no digest: train it
    (`bridge.encoders.pretrain`), save it, and load it frozen with `bridge.encoders.loading.load_encoder`.
    """

    family = FAMILY
    architecture_type = CompactArchitecture
    architecture: CompactArchitecture

    def __init__(self, window: WindowSpec, architecture: CompactArchitecture, digest: str = "") -> None:
        if window.samples < architecture.tokens:
            raise WeightsError(
                f"a compact encoder of {architecture.tokens} tokens can't read windows of {window.samples} samples",
                why="a token stands for at least one sample",
                fix=f"set tokens to at most {window.samples}, or use longer windows",
            )
        super().__init__(window, architecture, digest)
        self.stem = _Stem(len(window.channels), window.samples, architecture)
        last = architecture.blocks - 1
        self.blocks = nn.ModuleList(_Block(architecture, closing=i == last) for i in range(architecture.blocks))

    @property
    def positions(self) -> int:
        """The number of transformer blocks."""
        return len(self.blocks)

    def embed(self, x: Tensor) -> Tensor:
        """The stem's tokens, with their place."""
        h: Tensor = self.stem(x)
        return h

    def run_block(self, i: int, native: Tensor) -> Tensor:
        """Block `i`."""
        h: Tensor = self.blocks[i](native)
        return h
