"""NormWear: a vision transformer over the scalogram of each channel, for EMG and other signals at 65 to 130 Hz.

Every channel is a picture of its own, `1 + patches` tokens with a class token in front. Channels meet only in even
blocks, where a second transformer block runs over the class tokens of a window. So the network is bound to the number
of channels, and its tokens are `(batch, channels * (1 + patches), width)`, channel after channel. The closing norm and
the decoder that it was trained with are no part of the bridge's network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bridge.config import Settings
from bridge.encoders.checkpoints import (
    architecture_of,
    count_of,
    heads_of,
    require_window,
    size_of,
    state_dict_of,
    taken,
    without_prefix,
)
from bridge.encoders.published import published_model
from bridge.encoders.scalogram import LOST, SERIES, WIDTHS, scalogram
from bridge.encoders.split import SplitEncoder
from bridge.errors import WindowError
from bridge.windows import WindowSpec

FAMILY = "normwear"

_MODEL = published_model(FAMILY)
_PATCH = (9, 5)
"""Samples and wavelet widths of a patch."""
_COLUMNS = len(WIDTHS) // _PATCH[1]
_HEADS = {768: 12}


class NormwearArchitecture(Settings):
    """Sizes of a NormWear network. The defaults are those of the published one."""

    width: int = Field(default=768, ge=1)
    """Numbers in a token."""
    blocks: int = Field(default=12, ge=1)
    """Transformer blocks, which are the positions of a bridge."""
    heads: int = Field(default=12, ge=1)
    """Attention heads; divides the width."""
    mlp_width: int = Field(default=3072, ge=1)
    """Hidden numbers of a block's feed-forward part."""
    rows: int = Field(default=43, ge=1)
    """Patches along time in the stored position embedding; for other windows it is interpolated."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> NormwearArchitecture:
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class _Transformer(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, architecture: NormwearArchitecture) -> None:
        super().__init__()
        width = architecture.width
        self.heads = architecture.heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, architecture.mlp_width)
        self.down = nn.Linear(architecture.mlp_width, width)

    def forward(self, h: Tensor) -> Tensor:
        batch, tokens, width = h.shape
        qkv = self.qkv(self.norm1(h)).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        h = h + self.mix(attended.transpose(1, 2).reshape(batch, tokens, width))
        h = h + self.down(F.gelu(self.up(self.norm2(h))))
        return h


class _Block(nn.Module):
    """A block over each channel's tokens and, where it `fuses`, one over the class tokens of a window's channels."""

    def __init__(self, architecture: NormwearArchitecture, *, fuses: bool) -> None:
        super().__init__()
        self.channel = _Transformer(architecture)
        self.fusion = _Transformer(architecture) if fuses else None

    def forward(self, h: Tensor, channels: int) -> Tensor:
        """`(windows * channels, tokens, width)` to the same."""
        h = self.channel(h)
        if self.fusion is None:
            return h
        fused: Tensor = self.fusion(h[:, 0].reshape(-1, channels, h.shape[-1]))
        return torch.cat([fused.flatten(0, 1)[:, None], h[:, 1:]], dim=1)


class NormwearEncoder(SplitEncoder):
    """NormWear; position `i` is entry `i` of its `backbone.encoder_blocks`, with its fusion."""

    family = FAMILY
    architecture_type = NormwearArchitecture
    architecture: NormwearArchitecture

    def __init__(self, window: WindowSpec, architecture: NormwearArchitecture, digest: str = "") -> None:
        # It was trained on many modalities alike: rates are all that binds it.
        require_window(window, window.modality, _MODEL.rate_hz, _MODEL.title)
        if window.samples < _PATCH[0] + LOST:
            raise WindowError(
                f"{_MODEL.title} can't read windows of {window.samples} samples",
                why=f"a patch of the scalogram needs {_PATCH[0] + LOST}",
                fix="use longer windows",
            )
        super().__init__(window, architecture, digest)
        width = architecture.width
        self.patch = nn.Conv2d(SERIES, width, _PATCH, stride=_PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(torch.zeros(1, 1 + architecture.rows * _COLUMNS, width))
        self.blocks = nn.ModuleList(_Block(architecture, fuses=i % 2 == 0) for i in range(architecture.blocks))

    @property
    def positions(self) -> int:
        """The number of blocks over a channel's tokens."""
        return len(self.blocks)

    def embed(self, x: Tensor) -> Tensor:
        """Windows `(batch, channels, samples)` to the tokens that block 0 reads."""
        return self.embed_scalogram(scalogram(x.float()).to(self.patch.weight.dtype))

    def embed_scalogram(self, pictures: Tensor) -> Tensor:
        """Scalograms `(batch, channels, 3, samples - 2, 65)` to the tokens that block 0 reads."""
        patches = self.patch(pictures.flatten(0, 1)).flatten(2).transpose(1, 2) + self._places_of_patches()
        first = (self.class_token + self.places[:, :1]).expand(len(patches), -1, -1)
        return torch.cat([first, patches], dim=1).reshape(len(pictures), -1, patches.shape[-1])

    def run_block(self, i: int, native: Tensor) -> Tensor:
        """Tokens `(batch, channels * (1 + patches), width)` of block `i`'s input to those of its output."""
        channels = len(self.window.channels)
        by_channel = native.reshape(len(native) * channels, -1, native.shape[-1])
        h: Tensor = self.blocks[i](by_channel, channels)
        return h.view(native.shape)

    def _places_of_patches(self) -> Tensor:
        """The position embedding of this window's patches, `(1, patches, width)`."""
        stored = self.places[:, 1:]
        rows = (self.window.samples - LOST) // _PATCH[0]
        if rows == self.architecture.rows:
            return stored
        grid = stored.transpose(1, 2).reshape(1, -1, self.architecture.rows, _COLUMNS)
        grid = F.interpolate(grid, size=(rows, _COLUMNS), mode="bicubic", align_corners=False)
        return grid.flatten(2).transpose(1, 2)


def unwrap(loaded: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The state dict of NormWear's file; of releases that hold more than the backbone, the backbone's part."""
    state = state_dict_of(loaded, "model", _MODEL.title)
    inside = {name: tensor for name, tensor in state.items() if name.startswith("backbone.")}
    return without_prefix(inside or state, "backbone.")


def published(
    state: Mapping[str, Tensor], window: WindowSpec, *, heads: int = 0
) -> tuple[Mapping[str, Tensor], NormwearArchitecture]:
    """The encoder's tensors and architecture from NormWear's state dict.

    `heads` is needed for a width that was not published. Raises `ConfigError` without it, `WindowError` unless the
    windows are at 65 to 130 Hz, and `WeightsError` with the names of tensors that are missing, extra or misshapen.
    """
    title = _MODEL.title
    width = size_of(state, "cls_token", 2, title)
    settings = {
        "width": width,
        "blocks": count_of(state, "encoder_blocks."),
        "heads": heads_of(width, _HEADS, heads, title),
        "mlp_width": size_of(state, "encoder_blocks.0.variate_encoder.mlp.fc1.weight", 0, title),
        "rows": (size_of(state, "pos_embed", 1, title) - 1) // _COLUMNS,
    }
    architecture = architecture_of(NormwearArchitecture, settings, title)
    wanted = NormwearEncoder.skeleton(window, architecture).shapes()
    return taken(state, wanted, _MODEL.unused, title, _published_name), architecture


_NAMES = {
    "patch": "patch_embed.proj",
    "class_token": "cls_token",
    "places": "pos_embed",
    "blocks": "encoder_blocks",
    "channel": "variate_encoder",
    "fusion": "cls_fusion",
    "qkv": "attn.qkv",
    "mix": "attn.proj",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}


def _published_name(name: str) -> str:
    """The name in NormWear's file of one of the encoder's tensors."""
    return ".".join(_NAMES.get(part, part) for part in name.split("."))
