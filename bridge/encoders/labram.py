"""LaBraM-base (EEG, 200 Hz): a transformer over one token a channel and second, with electrodes known by name.

Source: `labram-base.pth`, MIT. Windows hold microvolt divided by 100.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from bridge.config import Settings
from bridge.encoders.checkpoints import architecture_of, count_of, require_window, size_of, state_dict_of, taken
from bridge.encoders.published import published_model
from bridge.encoders.split import SplitEncoder
from bridge.errors import WindowError
from bridge.windows import WindowSpec

FAMILY = "labram"
_MODEL = published_model(FAMILY)
_SECOND = 200
"""Samples of a patch, which is one second of one channel."""
_FILTERS = 8
_WIDTH = 200
"""25 steps of 8 filters."""
_EPS = 1e-6
_RANDOM_DEVIATION = 0.02

ELECTRODES = tuple(
    """
    FP1 FPZ FP2 AF9 AF7 AF5 AF3 AF1 AFZ AF2 AF4 AF6 AF8 AF10
    F9 F7 F5 F3 F1 FZ F2 F4 F6 F8 F10
    FT9 FT7 FC5 FC3 FC1 FCZ FC2 FC4 FC6 FT8 FT10
    T9 T7 C5 C3 C1 CZ C2 C4 C6 T8 T10
    TP9 TP7 CP5 CP3 CP1 CPZ CP2 CP4 CP6 TP8 TP10
    P9 P7 P5 P3 P1 PZ P2 P4 P6 P8 P10
    PO9 PO7 PO5 PO3 PO1 POZ PO2 PO4 PO6 PO8 PO10
    O1 OZ O2 O9 CB1 CB2 IZ O10 T3 T5 T4 T6 M1 M2 A1 A2
    CFC1 CFC2 CFC3 CFC4 CFC5 CFC6 CFC7 CFC8 CCP1 CCP2 CCP3 CCP4 CCP5 CCP6 CCP7 CCP8
    T1 T2 FTT9h TTP7h TPP9h FTT10h TPP8h TPP10h
    FP1-F7 F7-T7 T7-P7 P7-O1 FP2-F8 F8-T8 T8-P8 P8-O2
    """.split()  # noqa: SIM905
)
"""Electrodes and electrode pairs in the order of the rows of the model's electrode embedding, from row 1 on."""


class LabramArchitecture(Settings):
    """Sizes of a LaBraM, and which embeddings its tokens get."""

    blocks: int = Field(default=12, ge=1)
    """Transformer blocks, which are the positions of a bridge."""
    heads: int = Field(default=10, ge=1)
    """Attention heads; divides the width of 200."""
    feed_forward: int = Field(default=800, gt=0)
    """Hidden width of a block's feed-forward part."""
    electrode_rows: int = Field(default=129, ge=2)
    """Rows of the electrode embedding: the first is the class token's."""
    seconds: int = Field(default=16, ge=1)
    """Rows of the time embedding."""
    electrode_embedding: Literal["on", "off"] = "on"
    """`off` leaves electrodes unknown to the network, as the published bridges between modalities do."""
    time_embedding: Literal["published", "interpolated", "random"] = "published"
    """Where the rows of the time embedding come from. Published ones cover 16 s; longer windows need others."""

    @model_validator(mode="after")
    def _heads_divide_width(self) -> LabramArchitecture:
        if _WIDTH % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({_WIDTH})")
        return self


class _Patches(nn.Module):
    """Three convolutions over each channel's seconds; a window is normed as a whole."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, _FILTERS, (1, 15), stride=(1, 8), padding=(0, 7))
        self.norm1 = nn.GroupNorm(4, _FILTERS)
        self.conv2 = nn.Conv2d(_FILTERS, _FILTERS, (1, 3), padding=(0, 1))
        self.norm2 = nn.GroupNorm(4, _FILTERS)
        self.conv3 = nn.Conv2d(_FILTERS, _FILTERS, (1, 3), padding=(0, 1))
        self.norm3 = nn.GroupNorm(4, _FILTERS)

    def forward(self, x: Tensor) -> Tensor:
        """`(batch, patches, samples)` to `(batch, patches, width)`: steps outside, filters inside."""
        h = F.gelu(self.norm1(self.conv1(x.unsqueeze(1))))
        h = F.gelu(self.norm2(self.conv2(h)))
        h = F.gelu(self.norm3(self.conv3(h)))
        return h.permute(0, 2, 3, 1).flatten(2)


class _Attention(nn.Module):
    """Self-attention whose queries and keys are normed in each head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(_WIDTH, 3 * _WIDTH, bias=False)
        self.q_norm = nn.LayerNorm(_WIDTH // heads, eps=_EPS)
        self.k_norm = nn.LayerNorm(_WIDTH // heads, eps=_EPS)
        self.proj = nn.Linear(_WIDTH, _WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        batch, tokens, _ = h.shape
        q, k, v = self.qkv(h).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        mixed: Tensor = self.proj(attended.transpose(1, 2).flatten(2))
        return mixed


class _FeedForward(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(_WIDTH, hidden)
        self.fc2 = nn.Linear(hidden, _WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(h)))
        return out


class _Block(nn.Module):
    """A pre-norm transformer block with layer scale."""

    def __init__(self, architecture: LabramArchitecture) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(_WIDTH, eps=_EPS)
        self.attn = _Attention(architecture.heads)
        self.gamma_1 = nn.Parameter(torch.ones(_WIDTH))
        self.norm2 = nn.LayerNorm(_WIDTH, eps=_EPS)
        self.mlp = _FeedForward(architecture.feed_forward)
        self.gamma_2 = nn.Parameter(torch.ones(_WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.gamma_1 * self.attn(self.norm1(h))
        out: Tensor = h + self.gamma_2 * self.mlp(self.norm2(h))
        return out


class LabramEncoder(SplitEncoder):
    """A frozen LaBraM; position `i` is block `i`. Tokens: the class token, then every channel's seconds in turn."""

    family = FAMILY
    architecture_type = LabramArchitecture
    architecture: LabramArchitecture

    def __init__(self, window: WindowSpec, architecture: LabramArchitecture, digest: str = "") -> None:
        require_window(window, _MODEL.modality, _MODEL.rate_hz, _MODEL.title)
        self._seconds = _whole_seconds(window)
        self._require_time(architecture.seconds)
        is_on = architecture.electrode_embedding == "on"
        self._rows = electrode_rows(window, architecture.electrode_rows) if is_on else ()
        super().__init__(window, architecture, digest)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, _WIDTH))
        self.pos_embed = nn.Parameter(torch.zeros(1, architecture.electrode_rows, _WIDTH))
        self.time_embed = nn.Parameter(torch.zeros(1, architecture.seconds, _WIDTH))
        self.patch_embed = _Patches()
        self.blocks = nn.ModuleList(_Block(architecture) for _ in range(architecture.blocks))

    @property
    def positions(self) -> int:
        """The number of transformer blocks."""
        return self.architecture.blocks

    def embed(self, x: Tensor) -> Tensor:
        """Class token and patches with what is known of their electrode and second."""
        batch, channels, _ = x.shape
        patches: Tensor = self.patch_embed(x.reshape(batch, channels * self._seconds, _SECOND))
        grid = patches.view(batch, channels, self._seconds, _WIDTH) + self.time_embed[:, None, : self._seconds]
        cls = self.cls_token.expand(batch, -1, -1)
        if self._rows:
            grid = grid + self.pos_embed[:, list(self._rows), None]
            cls = cls + self.pos_embed[:, :1]
        return torch.cat([cls, grid.flatten(1, 2)], dim=1)

    def run_block(self, i: int, native: Tensor) -> Tensor:
        """Block `i`."""
        out: Tensor = self.blocks[i](native)
        return out

    def _require_time(self, rows: int) -> None:
        if self._seconds > rows:
            raise WindowError(
                f"this {_MODEL.title} can't read windows of {self._seconds} s",
                why=f"its time embedding has {rows} rows, one a second",
                fix="convert the published file for windows of this length",
            )


def electrode_rows(window: WindowSpec, rows: int) -> tuple[int, ...]:
    """The row of the electrode embedding of each of the window's channels; names in any case.

    Raises `WindowError` where a name is unknown or comes twice.
    """
    known = {name.upper(): row for row, name in enumerate(ELECTRODES, start=1) if row < rows}
    names = [channel.upper() for channel in window.channels]
    unknown = [channel for channel, name in zip(window.channels, names, strict=True) if name not in known]
    if unknown:
        raise WindowError(
            f"{_MODEL.title} does not know the electrodes {', '.join(unknown)}",
            why=f"it knows {', '.join(name for name in ELECTRODES if name.upper() in known)}",
            fix="name the channels so, leave others out, or convert with electrode_embedding: off",
        )
    if len(set(names)) < len(names):
        raise WindowError(
            f"{_MODEL.title} can't read an electrode twice",
            why=f"the channels are {', '.join(window.channels)}",
            fix="give each electrode once",
        )
    return tuple(known[name] for name in names)


def unwrap(loaded: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The student's state dict out of what the published file holds; the heads beside it are left out."""
    state = state_dict_of(loaded, "model", _MODEL.title)
    student = "student."
    if not any(name.startswith(student) for name in state):
        return state
    beside = ("lm_head.", "projection_head.")
    return {name.removeprefix(student): tensor for name, tensor in state.items() if not name.startswith(beside)}


def published(
    state: Mapping[str, Tensor],
    window: WindowSpec,
    *,
    electrode_embedding: Literal["on", "off"] = "on",
    time_embedding: Literal["interpolated", "random"] = "interpolated",
    seed: int = 0,
) -> tuple[Mapping[str, Tensor], LabramArchitecture]:
    """The encoder's tensors and architecture from an unwrapped state dict.

    Windows longer than the file's time embedding get one of their own: its rows interpolated, or random ones of `seed`.
    Raises `WeightsError` and `WindowError`.
    """
    settings: dict[str, Any] = {
        "blocks": max(1, count_of(state, "blocks.")),
        "heads": _WIDTH // max(1, size_of(state, "blocks.0.attn.q_norm.weight", 0, _MODEL.title)),
        "feed_forward": size_of(state, "blocks.0.mlp.fc1.weight", 0, _MODEL.title),
        "electrode_rows": size_of(state, "pos_embed", 1, _MODEL.title),
        "seconds": size_of(state, "time_embed", 1, _MODEL.title),
        "electrode_embedding": electrode_embedding,
    }
    seconds = _whole_seconds(window)
    if seconds > settings["seconds"]:
        stretched = _time_rows(state["time_embed"], seconds, time_embedding, seed)
        state = {**state, "time_embed": stretched}
        settings.update(seconds=seconds, time_embedding=time_embedding)
    architecture = architecture_of(LabramArchitecture, settings, _MODEL.title)
    wanted = LabramEncoder.skeleton(window, architecture).shapes()
    return taken(state, wanted, _MODEL.unused, _MODEL.title), architecture


def _time_rows(rows: Tensor, seconds: int, how: str, seed: int) -> Tensor:
    """A time embedding `(1, seconds, width)`: the published one stretched, ends onto ends, or random."""
    if how == "random":
        generator = torch.Generator().manual_seed(seed)
        return _RANDOM_DEVIATION * torch.randn(1, seconds, rows.shape[-1], generator=generator)
    stretched = F.interpolate(rows.float().transpose(1, 2), size=seconds, mode="linear", align_corners=True)
    return stretched.transpose(1, 2)


def _whole_seconds(window: WindowSpec) -> int:
    if window.samples % _SECOND:
        raise WindowError(
            f"{_MODEL.title} can't read windows of {window.samples} samples",
            why=f"it cuts windows into whole seconds of {_SECOND} samples",
            fix=f"use windows of a multiple of {_SECOND} samples",
        )
    return window.samples // _SECOND
